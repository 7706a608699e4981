"""Slow references that share nothing with the package's engine: path patching by whole forwards.

Also a transformer in plain torch, with a separate residual input for every slot of every head.
"""

import math

import torch
import transformers
from whole_forwards import node_hook, record, whole_logits


def random_model(kind, seed, kv_heads, make_hf_model):
    """An unwrapped tiny model; ``kv_heads`` key-value heads where the architecture groups queries."""
    if kind != "llama":
        return make_hf_model(kind, seed)
    config = make_hf_model("llama").config
    config.num_key_value_heads = kv_heads
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def kept_norm(model, norm, base_input, x):
    """A norm of ``x`` that divides by the scale of ``base_input``, from its weights."""
    cfg, bias = model.bridge.cfg, getattr(norm, "bias", None)
    weight = norm.weight + 1 if cfg.rmsnorm_uses_offset else norm.weight
    if not cfg.uses_rms_norm:
        scale = (base_input.var(-1, keepdim=True, unbiased=False) + cfg.eps).sqrt()
        return (x - x.mean(-1, keepdim=True)) / scale * weight + bias
    return x / (base_input.square().mean(-1, keepdim=True) + cfg.eps).sqrt() * weight


def norm_edits(model, base, of_heads=False):
    """Hooks under which every norm outside attention (or those of queries and keys) keeps its scale of a run."""
    norms = {} if of_heads else {"ln_final": model.bridge.ln_final}
    for layer, block in enumerate(model.bridge.blocks):
        if of_heads:
            norms |= {f"blocks.{layer}.attn.{name}": getattr(block.attn, name) for name in ("q_norm", "k_norm")}
            continue
        names = [name for name in ("ln1", "ln1_post", "ln2", "ln2_post") if hasattr(block, name)]
        norms |= {f"blocks.{layer}.{name}": getattr(block, name) for name in names}
    own = record(model, base, [f"{name}.{end}" for name in norms for end in ("hook_in", "hook_out")])
    edits, seen = [], {}
    for name, norm in norms.items():
        before = own[f"{name}.hook_in"]
        torch.testing.assert_close(
            kept_norm(model, norm, before, before), own[f"{name}.hook_out"], atol=1e-5, rtol=1e-5
        )

        def see(tensor, name=name):
            seen[name] = tensor

        def keep(tensor, name=name, norm=norm, before=before):
            return kept_norm(model, norm, before, seen[name])

        edits += [(f"{name}.hook_in", see), (f"{name}.hook_out", keep)]
    return edits


def sender_edit(model, base, source, part, where):
    """Hook that gives a sender its source value at the columns ``where`` [batch pos]."""
    kind, layer = str(part.kind), part.layer or 0
    kind = "resid_pre" if kind == "embed" else kind
    if kind in ("head", "mlp", "neuron"):
        name, index = node_hook(part)
    else:
        name, index = f"blocks.{layer}.hook_{kind}", (slice(None), slice(None))
    if kind == "resid_mid":  # an edit there would miss the skip branch
        name = f"blocks.{layer}.hook_attn_out"
        parts = [f"blocks.{layer}.hook_resid_pre", name]
        new = sum(record(model, source, parts).values()) - record(model, base, parts[:1])[parts[0]]
    else:
        new = record(model, source, [name])[name][index]

    def edit(tensor):
        out = tensor.clone()
        keep = where.reshape(*where.shape, *[1] * (new.ndim - 2))
        out[index] = torch.where(keep, new, tensor[index])
        return out

    return name, edit


def frozen_run(model, base, source, part, *, mlp, norm="recompute", where=None, read=()):
    """Path patching by whole forwards: only the sender changes, attention (and MLPs, and norms' scales) stay.

    Returns logits, and what is seen at the hooks ``read`` before anything is frozen there.
    """
    where = base.mask if where is None else where
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.n_layers)]
    if mlp == "freeze":
        names += [f"blocks.{layer}.hook_mlp_out" for layer in range(model.n_layers)]
    if str(part.kind) == "neuron" and mlp == "freeze":  # else its own MLP's output is put back
        names.remove(f"blocks.{part.layer}.hook_mlp_out")
    own, seen = record(model, base, names), {}
    # norms first: an MLP's output may be the very hook of the norm behind it
    edits = norm_edits(model, base) if norm == "freeze" else []
    edits += [(name, lambda t, name=name: seen.update({name: t.clone()})) for name in read]
    edits += [(name, lambda tensor, name=name: own[name]) for name in names]
    edits.append(sender_edit(model, base, source, part, where))
    return whole_logits(model, base, edits), seen


def slot_hook(receiver, slot):
    """Hook name of what a slot holds."""
    if receiver.kind == "head":
        return f"blocks.{receiver.layer}.attn.hook_{slot}"
    return f"blocks.{receiver.layer}.{'hook_mlp_out' if receiver.kind == 'mlp' else 'mlp.hook_post'}"


def path_whole(model, base, source, part, receivers, *, mlp, norm="recompute", downstream="live", where=None):
    """Logits when ``part`` changes the slots of ``receivers`` [(node, slot)], by whole forwards alone.

    Several receivers (downstream live) are patched in one run and must not share a layer.
    """
    if receivers[0][0].kind == "logits":
        return frozen_run(model, base, source, part, mlp=mlp, norm=norm, where=where)[0]
    names = [slot_hook(*receiver) for receiver in receivers]
    _, read = frozen_run(model, base, source, part, mlp=mlp, norm=norm, where=where, read=names)
    edits = []
    for (node, _), name in zip(receivers, names, strict=True):
        values, target, index = read[name], name, (slice(None), slice(None), node.index)
        if node.kind == "head":  # keys and values may be shared: only the receiver's z is kept of a run that has them
            target = f"blocks.{node.layer}.attn.hook_z"
            store = {}
            see = [(target, lambda t, store=store: store.update(z=t.clone()))]
            whole_logits(model, base, [*edits, (name, lambda t, values=values: values), *see])
            values = store["z"]

        def put(tensor, values=values, index=index, node=node):
            if node.kind == "mlp":
                return values
            out = tensor.clone()
            out[index] = values[index]
            return out

        edits.append((target, put))
    if downstream == "frozen":
        (node, _), (target, put) = receivers[0], edits[0]
        names = [f"blocks.{layer}.{end}" for layer in range(model.n_layers) for end in ("attn.hook_z", "hook_mlp_out")]
        if node.kind == "neuron":
            names.remove(f"blocks.{node.layer}.hook_mlp_out")
        own = record(model, base, names)
        edits = [(name, lambda tensor, name=name: own[name]) for name in names] + edits
        edits = (norm_edits(model, base) if norm == "freeze" else []) + edits
    return whole_logits(model, base, edits)


def hook_count(model):
    """All hooks on all TransformerLens hook points and all forward hooks of all modules."""
    points = sum(len(p.fwd_hooks) + len(p.bwd_hooks) for p in model.bridge.hook_dict.values())
    modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf_model.modules())
    return points, modules


class PlainModel:
    """Llama, GPT-2 or GPT-NeoX in plain torch on one unpadded row, from an unwrapped Hugging Face model's weights.

    ``forks`` maps (slot, layer, head) to what is added to the residual stream where that slot alone reads it; slots are
    q, k, v (with a head), mlp (head None) and logits (layer and head None).
    """

    def __init__(self, hf):
        self.w = {name: value.detach() for name, value in hf.state_dict().items()}
        self.cfg, self.kind = hf.config, hf.config.model_type
        self.n_layers, self.n_heads = self.cfg.num_hidden_layers, self.cfg.num_attention_heads
        self.d_head = self.cfg.hidden_size // self.n_heads
        self.n_kv = getattr(self.cfg, "num_key_value_heads", None) or self.n_heads
        self.parallel = self.kind == "gpt_neox"

    def norm(self, name, x):
        if self.kind == "llama":
            return x / (x.square().mean(-1, keepdim=True) + self.cfg.rms_norm_eps).sqrt() * self.w[f"{name}.weight"]
        eps = self.cfg.layer_norm_epsilon if self.kind == "gpt2" else self.cfg.layer_norm_eps
        scale = (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
        return (x - x.mean(-1, keepdim=True)) / scale * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def rope(self, x):
        if self.kind == "gpt2":
            return x
        dim = self.d_head if self.kind == "llama" else 2 * round(self.d_head * 0.25 / 2)
        angle = torch.arange(len(x)).double()[:, None] * 10000.0 ** (-torch.arange(0, dim, 2).double() / dim)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b, rest = x[:, : dim // 2], x[:, dim // 2 : dim], x[:, dim:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    def qkv(self, layer, head, slot, x):
        """The slot's projection of the raw residual stream ``x``, before the rotary embedding."""
        size, group = self.d_head, head // (self.n_heads // self.n_kv)
        if self.kind == "llama":
            row = head if slot == "q" else group
            x = self.norm(f"model.layers.{layer}.input_layernorm", x)
            return x @ self.w[f"model.layers.{layer}.self_attn.{slot}_proj.weight"][row * size : (row + 1) * size].T
        place = "qkv".index(slot)
        if self.kind == "gpt2":
            x = self.norm(f"transformer.h.{layer}.ln_1", x)
            first = place * self.cfg.hidden_size + head * size
            weight = self.w[f"transformer.h.{layer}.attn.c_attn.weight"][:, first : first + size]
            return x @ weight + self.w[f"transformer.h.{layer}.attn.c_attn.bias"][first : first + size]
        x = self.norm(f"gpt_neox.layers.{layer}.input_layernorm", x)
        first = (3 * head + place) * size
        name = f"gpt_neox.layers.{layer}.attention.query_key_value"
        return x @ self.w[f"{name}.weight"][first : first + size].T + self.w[f"{name}.bias"][first : first + size]

    def write(self, layer, head, z):
        columns = slice(head * self.d_head, (head + 1) * self.d_head)
        if self.kind == "llama":
            return z @ self.w[f"model.layers.{layer}.self_attn.o_proj.weight"][:, columns].T
        if self.kind == "gpt2":
            return z @ self.w[f"transformer.h.{layer}.attn.c_proj.weight"][columns]
        return z @ self.w[f"gpt_neox.layers.{layer}.attention.dense.weight"][:, columns].T

    def write_bias(self, layer):
        names = {"gpt2": f"transformer.h.{layer}.attn.c_proj.bias"}
        names["gpt_neox"] = f"gpt_neox.layers.{layer}.attention.dense.bias"
        return self.w[names[self.kind]] if self.kind in names else 0.0

    def mlp(self, layer, x):
        act = torch.nn.functional
        if self.kind == "llama":
            x, mlp = self.norm(f"model.layers.{layer}.post_attention_layernorm", x), f"model.layers.{layer}.mlp"
            gated = act.silu(x @ self.w[f"{mlp}.gate_proj.weight"].T) * (x @ self.w[f"{mlp}.up_proj.weight"].T)
            return gated @ self.w[f"{mlp}.down_proj.weight"].T
        if self.kind == "gpt2":
            x, mlp = self.norm(f"transformer.h.{layer}.ln_2", x), f"transformer.h.{layer}.mlp"
            hidden = act.gelu(x @ self.w[f"{mlp}.c_fc.weight"] + self.w[f"{mlp}.c_fc.bias"], approximate="tanh")
            return hidden @ self.w[f"{mlp}.c_proj.weight"] + self.w[f"{mlp}.c_proj.bias"]
        x = self.norm(f"gpt_neox.layers.{layer}.post_attention_layernorm", x)
        mlp = f"gpt_neox.layers.{layer}.mlp"
        hidden = act.gelu(x @ self.w[f"{mlp}.dense_h_to_4h.weight"].T + self.w[f"{mlp}.dense_h_to_4h.bias"])
        return hidden @ self.w[f"{mlp}.dense_4h_to_h.weight"].T + self.w[f"{mlp}.dense_4h_to_h.bias"]

    def embed(self, ids):
        names = {"llama": "model.embed_tokens.weight", "gpt_neox": "gpt_neox.embed_in.weight"}
        if self.kind == "gpt2":
            return self.w["transformer.wte.weight"][ids] + self.w["transformer.wpe.weight"][: len(ids)]
        return self.w[names[self.kind]][ids]

    def unembed(self, x):
        final = {"llama": "model.norm", "gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm"}
        # transformers 5 names GPT-NeoX's unembedding embed_out in files and lm_head or embed_out in memory
        weight = next(self.w[name] for name in ("lm_head.weight", "embed_out.weight") if name in self.w)
        return self.norm(final[self.kind], x) @ weight.T

    def __call__(self, ids, forks=None):
        """Logits at the last position, and what each head (layer, head) and MLP (layer, None) writes [pos d_model]."""
        forks, x = forks or {}, self.embed(ids)
        hidden = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
        writes = {}
        for layer in range(self.n_layers):
            attention = self.write_bias(layer)
            for head in range(self.n_heads):
                q, k, v = (self.qkv(layer, head, s, x + forks.get((s, layer, head), 0.0)) for s in "qkv")
                scores = (self.rope(q) @ self.rope(k).T / math.sqrt(self.d_head)).masked_fill(hidden, -torch.inf)
                writes[layer, head] = self.write(layer, head, scores.softmax(-1) @ v)
                attention = attention + writes[layer, head]
            middle = x if self.parallel else x + attention
            writes[layer, None] = self.mlp(layer, middle + forks.get(("mlp", layer, None), 0.0))
            x = x + attention + writes[layer, None]
        return self.unembed(x + forks.get(("logits", None, None), 0.0))[-1], writes
