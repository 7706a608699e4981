"""The published procedures of two peers, written plainly on a Hugging Face model as it is loaded.

`published_means` and `published_scores` do what the code of Arditi et al. 2024 does: prompts in the order given, 32
together, padded on the left, whole forwards with hooks on the modules, one candidate at a time. `plain_acdc` does what
auto-circuit does: one edge a run, from the receiver's block on, what every node wrote kept from run to run.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import mechsafety as ms
from mechsafety.models import LensModel

BATCH = 32


def plain_twin(model: LensModel) -> Any:
    """The same weights in a Hugging Face model of its own, with its default attention."""
    config = copy.deepcopy(model.hf_model.config)
    config._attn_implementation = "sdpa"
    twin = AutoModelForCausalLM.from_config(config, dtype=model.dtype).eval()
    weights = {name.replace("_original_component.", ""): t for name, t in model.hf_model.state_dict().items()}
    twin.load_state_dict({name: weights[name] for name in twin.state_dict()})
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    return twin


@contextlib.contextmanager
def hooked(before: Sequence[tuple[Any, Callable]], after: Sequence[tuple[Any, Callable]] = ()) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in before]
    handles += [module.register_forward_hook(hook) for module, hook in after]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def batches(model: LensModel, prompts: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Chat prompts in the order given, padded on the left."""
    for first in range(0, len(prompts), BATCH):
        tokens = model.tokenize(prompts[first : first + BATCH])
        yield {"input_ids": tokens.ids, "attention_mask": tokens.mask.long()}


def published_means(
    model: LensModel, twin: Any, harmful: Sequence[str], harmless: Sequence[str], n_columns: int
) -> Tensor:
    """Mean harmful less mean harmless input of every block at the last columns [layer column d_model], float64."""
    means = []
    for prompts in (harmful, harmless):
        total = torch.zeros(model.n_layers, n_columns, model.d_model, dtype=torch.float64)

        def add(layer: int, total: Tensor = total) -> Callable:
            def hook(module: Any, args: tuple) -> None:
                total[layer] += args[0].double()[:, -n_columns:].sum(0)

            return hook

        with torch.no_grad(), hooked([(block, add(k)) for k, block in enumerate(twin.model.layers)]):
            for batch in batches(model, prompts):
                twin(**batch)
        means.append(total / len(prompts))
    return means[0] - means[1]


def published_scores(
    model: LensModel,
    twin: Any,
    metric: ms.RefusalLogOdds,
    harmful: Sequence[str],
    harmless: Sequence[str],
    vectors: Tensor,
    layers: Sequence[int],
) -> Tensor:
    """Mean bypass, induce and KL of every candidate [score layer column]."""

    def last(prompts: Sequence[str]) -> Tensor:
        with torch.no_grad():
            return torch.cat([twin(**batch).logits[:, -1] for batch in batches(model, prompts)])

    plain = last(harmless).double().log_softmax(-1)
    found = torch.zeros(3, len(layers), vectors.shape[1], dtype=torch.float64)
    for row, layer in enumerate(layers):
        for column, vector in enumerate(vectors[row]):
            unit = vector / vector.norm()

            def without(x: Tensor, unit: Tensor = unit) -> Tensor:
                return x - (x @ unit)[..., None] * unit

            def before(module: Any, args: tuple, without: Callable = without) -> tuple:
                return (without(args[0]), *args[1:])

            def after(module: Any, args: tuple, out: Any, without: Callable = without) -> Any:
                return (without(out[0]), *out[1:]) if isinstance(out, tuple) else without(out)

            def plus(module: Any, args: tuple, vector: Tensor = vector) -> tuple:
                return (args[0] + vector, *args[1:])

            blocks = list(twin.model.layers)
            written = [part for block in blocks for part in (block.self_attn, block.mlp)]
            with hooked([(block, before) for block in blocks], [(part, after) for part in written]):
                found[0, row, column] = metric(last(harmful)).double().mean()
                kept = last(harmless).double().log_softmax(-1)
            found[2, row, column] = (plain.exp() * (plain - kept)).sum(-1).mean()
            with hooked([(blocks[layer], plus)]):
                found[1, row, column] = metric(last(harmless)).double().mean()
    return found


class EdgeRuns:
    """Runs of a Llama in which every slot of every head and MLP reads an input of its own.

    Args:
        twin: The model.
        ids: Token rows of the prompts, of one length.
        others: Of their twins, whose values cut edges carry.
    """

    def __init__(self, twin: Any, ids: Tensor, others: Tensor) -> None:
        config = twin.config
        self.twin, self.heads, self.layers = twin, config.num_attention_heads, config.num_hidden_layers
        self.size = config.head_dim
        self.group = self.heads // config.num_key_value_heads
        self.width = 1 + self.layers * (self.heads + 1)
        positions = torch.arange(ids.shape[1])[None]
        self.rotary = twin.model.rotary_emb(twin.model.embed_tokens(ids), positions)
        self.mask = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)
        # 1 at cut edges: [slot of q, k, v; layer; head; sender], [layer; sender] and [sender]
        self.cut = torch.zeros(3, self.layers, self.heads, self.width)
        self.cut_mlp, self.cut_logits = torch.zeros(self.layers, self.width), torch.zeros(self.width)
        self.patch = torch.zeros(self.width, *ids.shape, config.hidden_size)
        self.own, self.inputs = torch.zeros_like(self.patch), list[Tensor]()
        self.run(0, twin.model.embed_tokens(others))
        self.patch, self.own, self.inputs = self.own, torch.zeros_like(self.patch), []
        self.clean = self.run(0, twin.model.embed_tokens(ids))
        # input of every block, and of the final norm, in the prompts' own run
        self.starts = self.inputs

    def run(self, start: int, stream: Tensor) -> Tensor:
        """Last logits of a run from a block on."""
        self.inputs = []
        if start == 0:
            self.own[0] = stream
        for layer in range(start, self.layers):
            self.inputs.append(stream)
            block, first = self.twin.model.layers[layer], 1 + layer * (self.heads + 1)
            change = self.patch[:first] - self.own[:first]
            reads = stream + torch.einsum("shj,jbpd->shbpd", self.cut[:, layer, :, :first], change)
            normed = block.input_layernorm(reads)
            attention = block.self_attn
            q = torch.einsum("hbpd,hed->bhpe", normed[0], self._weight(attention.q_proj, 1))
            k = torch.einsum("hbpd,hed->bhpe", normed[1], self._weight(attention.k_proj, self.group))
            v = torch.einsum("hbpd,hed->bhpe", normed[2], self._weight(attention.v_proj, self.group))
            q, k = self._turn(q), self._turn(k)
            pattern = (torch.einsum("bhqe,bhke->bhqk", q, k) / self.size**0.5 + self.mask).softmax(-1)
            weight = attention.o_proj.weight.unflatten(1, (self.heads, self.size))
            out = torch.einsum("bhpe,dhe->hbpd", pattern @ v, weight)
            self.own[first : first + self.heads] = out
            stream = stream + out.sum(0)
            after = first + self.heads
            change = self.patch[:after] - self.own[:after]
            read = stream + torch.einsum("j,jbpd->bpd", self.cut_mlp[layer, :after], change)
            out = block.mlp(block.post_attention_layernorm(read))
            self.own[after] = out
            stream = stream + out
        self.inputs.append(stream)
        final = stream[:, -1] + torch.einsum("j,jbd->bd", self.cut_logits, (self.patch - self.own)[:, :, -1])
        return self.twin.lm_head(self.twin.model.norm(final))

    def _weight(self, module: Any, group: int) -> Tensor:
        return module.weight.unflatten(0, (-1, self.size)).repeat_interleave(group, 0)

    def _turn(self, x: Tensor) -> Tensor:
        cos, sin = (part[:, None] for part in self.rotary)
        half = self.size // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def plain_acdc(twin: Any, ids: Tensor, others: Tensor, threshold: float, order: Sequence[ms.Edge]) -> set[ms.Edge]:
    """ACDC by KL divergence, one edge a run; what it leaves, edges on no path included."""
    with torch.no_grad():
        runs = EdgeRuns(twin, ids, others)
        target, now, left = runs.clean.log_softmax(-1), 0.0, set()
        for edge in order:
            receiver, sender = edge.receiver, edge.sender
            start = runs.layers if receiver.layer is None else receiver.layer
            if receiver.kind == "logits":
                place = runs.cut_logits
            elif receiver.kind == "mlp":
                place = runs.cut_mlp[start]
            else:
                place = runs.cut["qkv".index(edge.slot), start, receiver.index]
            within = runs.heads if sender.kind == "mlp" else sender.index
            row = 0 if sender.kind == "embed" else 1 + sender.layer * (runs.heads + 1) + within
            place[row] = 1.0
            logits = runs.run(start, runs.starts[start])
            value = float((target.exp() * (target - logits.log_softmax(-1))).sum(-1).mean())
            if value - now < threshold:
                now = value
            else:
                place[row] = 0.0
                left.add(edge)
    return left
