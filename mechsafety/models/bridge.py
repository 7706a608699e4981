"""TransformerLens 4: a `TransformerBridge` around a Hugging Face model, whose own code runs."""

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.models.backend import (
    Backend,
    BlockCall,
    Half,
    Hook,
    NormForm,
    Prefix,
    Sizes,
    Writer,
    adapt,
    expand_batched,
    expand_rows,
    forward_hooks,
    is_lens,
)
from mechsafety.models.kinds import check_folded, check_kind, has_experts, is_multimodal
from mechsafety.models.placed import Fetching, devices, fetched, home, is_dispatched, is_offloaded
from mechsafety.models.quantised import dequantised, is_quantised
from mechsafety.models.rotary import n_positions, of_lengths, rotation, row_by_row
from mechsafety.models.template import tokenizer_copy
from mechsafety.prompts import Tokens
from mechsafety.prompts.spans import positions
from mechsafety.sites import Generation, hook_name, hook_points

NAME = "TransformerBridge"
# names of the Hugging Face modules that write to the residual stream
_ATTENTION = re.compile(r"(?:self_attn|attention|attn)\.(?:o_proj|out_proj|c_proj|dense|o)$")
_MLP = re.compile(r"mlp\.(?:down_proj|c_proj|dense_4h_to_h|fc2|fc_out|out)$")
_POSITIONS = re.compile(r"(?:^|\.)(?:wpe|embed_positions|position_embeddings)$")
_WRAPPER = "._original_component"


def is_mine(model: Any) -> bool:
    """Whether this is a bridge."""
    return is_lens(model, NAME)


def check_known(model: Any) -> None:
    """Refuse a Hugging Face model whose architecture TransformerLens does not know.

    Raises:
        MechsafetyError: TransformerLens does not know the architecture. The message names the model's class.
    """
    if not _known(model):
        raise MechsafetyError(
            f"TransformerLens does not know the architecture {type(model).__name__}",
            expected="one such as LlamaForCausalLM, Qwen3ForCausalLM, Gemma2ForCausalLM or GPT2LMHeadModel",
        )


def _known(model: Any) -> list[str]:
    """Names of a model's architecture that TransformerLens knows, the most specific first."""
    logging_level = logging.getLogger().level
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformer_lens.model_bridge import TransformerBridge  # noqa: F401

    logging.getLogger().setLevel(logging_level)  # importing TransformerLens changes the root logger
    # TransformerLens takes the architecture's name from the configuration, where a model made in memory has none
    names = [kind.__name__ for kind in type(model).__mro__] + list(model.config.architectures or [])
    return [name for name in names if name in SUPPORTED_ARCHITECTURES]


def convert(name: str, model: Any, tokenizer: Any) -> "BridgeBackend":
    """Wrap a Hugging Face model in place: it switches to eager attention, and its blocks become TransformerLens'.

    Raises:
        MechsafetyError: TransformerLens does not know the architecture.
    """
    check_known(model)
    from transformer_lens.model_bridge import TransformerBridge

    # TransformerLens would load the tokenizer again from its source, with a start token added. That needs the hub, and
    # fails for a tokenizer made in memory. This package renders and tokenizes prompts itself, so TransformerLens gets a
    # copy that is marked as adding a start token. If a tokenizer has no end token, TransformerLens adds one to its
    # vocabulary. Such a tokenizer is therefore copied with its vocabulary.
    copied = tokenizer_copy(tokenizer) if tokenizer.eos_token_id is not None else copy.deepcopy(tokenizer)
    model.config.architectures = _known(model)[:1]
    copied.init_kwargs = {**tokenizer.init_kwargs, "name_or_path": name, "add_bos_token": True}
    device = str(home(model))
    # TransformerLens refuses a map of a GPU beside memory or disk. Its components fetch what accelerate has offloaded,
    # and the load checks compare the wrapped model with the plain one.
    places = vars(model).pop("hf_device_map", None)
    try:
        booted = TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=copied, device=device)
    finally:
        if places is not None:
            model.hf_device_map = places
    return BridgeBackend(booted)


def wrap(bridge: Any) -> "BridgeBackend":
    """The backend of a bridge that the user made.

    Raises:
        MechsafetyError: The bridge is in compatibility mode, which folds norms into weights, or its model is of a kind
            that is not accepted.
    """
    if getattr(bridge, "compatibility_mode", False):
        raise MechsafetyError(
            "a TransformerBridge in compatibility mode",
            expected="one with its own weights",
            hint="boot it again and leave enable_compatibility_mode() out",
        )
    model = bridge.original_model.eval()
    if is_multimodal(model.config):
        raise MechsafetyError(
            "a TransformerBridge of a multimodal model", hint="pass the Hugging Face model: its language model is taken"
        )
    check_kind(model)
    check_folded(model)
    return BridgeBackend(bridge)


class BridgeBackend(Backend):
    """See `Backend`."""

    rounding = 1.0

    def __init__(self, bridge: Any) -> None:
        self.tl_model = bridge
        self.module: Any = bridge.original_model
        self.module.config.return_dict = True  # outputs are read by name
        self._rotary = row_by_row(self.module)
        self._points: dict[str, Any] = {}
        # accelerate's hooks fix where a dispatched model runs
        dispatched = is_dispatched(self.module)
        self._home = home(self.module) if dispatched else None
        self._split = dispatched and len(devices(self.module)) > 1
        self._offloaded = dispatched and any(map(is_offloaded, self.module.modules()))
        cfg = bridge.cfg
        self.sizes = Sizes(
            n_layers=cfg.n_layers,
            n_heads=cfg.n_heads,
            n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
            d_model=cfg.d_model,
            d_head=cfg.d_head,
            d_mlp=0 if has_experts(self.module) else cfg.d_mlp,
            d_vocab=cfg.d_vocab,
            n_ctx=n_positions(self.module.config, cfg.n_ctx),
            parallel=bool(cfg.parallel_attn_mlp),
            post_norm=hasattr(bridge.blocks[0], "ln1_post"),
            experts=has_experts(self.module),
        )

    @property
    def device(self) -> torch.device:
        """Where tokens go, logits come from, and functions on activations see them."""
        return super().device if self._home is None else self._home

    @property
    def offloaded(self) -> bool:
        """Whether some weights are without numbers until their module runs (see `mechsafety.models.placed`)."""
        return self._offloaded

    def weights(self) -> Mapping[str, Tensor]:
        """All parameters by name."""
        return Fetching(self.module) if self._offloaded else self.module.state_dict()

    def _weight(self, module: Any, name: str, slot: str) -> Tensor:
        """A module's weight on the model's device; of a quantised layer, the numbers that it computes with."""
        linear = getattr(module._modules.get(slot), "original_component", None)
        if linear is None or not is_quantised(linear):
            return super()._weight(module, name, slot)
        with fetched(linear):
            view = self._here(dequantised(linear)).T
        form = {"W_O": "(head d) m -> head d m", "W_V": "m (head d) -> head m d"}.get(name)
        return view if form is None else rearrange(view, form, d=self.sizes.d_head)

    def _here(self, tensor: Tensor) -> Tensor:
        """A tensor on the model's device."""
        return tensor.to(self.device) if self._split else tensor

    def _at_home(self, function: Callable[[Tensor], "Tensor | None"]) -> Callable[[Tensor], "Tensor | None"]:
        """A function of activations for a layer on another device: it sees and returns them on the model's device."""
        if not self._split:
            return function

        def moved(tensor: Tensor) -> Tensor | None:
            new = function(tensor.to(self.device))
            return None if new is None else new.to(tensor.device)

        return moved

    @contextmanager
    def hooks(self, edits: Sequence[Hook]) -> Iterator[None]:
        """Context in which each function sees its site's activation and may return another."""
        added: list[tuple[Any, Any]] = []
        try:
            for site, function in edits:
                point = self._point(hook_name(site, Generation.BRIDGE))
                added.append((point, point.add_hook(adapt(self._at_home(function)))))
            yield
        finally:
            for point, handle in added:
                handle.hook.remove()
                point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]

    def _point(self, name: str) -> Any:
        """TransformerLens' hook point of a name.

        TransformerLens' own context lists all hook points and all their other names whenever it is entered. In a map of
        the demo model that took a sixth of the time. Its checks are made once per name.
        """
        if name not in self._points:
            mark = adapt(lambda tensor: None)
            with self.tl_model.hooks(fwd_hooks=[(name, mark)]):
                points = hook_points(self.tl_model)
                self._points[name] = next(p for p in points if any(own.user_hook is mark for own in p.fwd_hooks))
        return self._points[name]

    def logits(self, tokens: Tokens, keep: int) -> Float[Tensor, "batch keep d_vocab"]:
        """Logits of a whole forward at the last ``keep`` columns, padding handled by mask and position ids."""
        return self._run(tokens.ids, tokens.mask, keep)

    def prefix(self, tokens: Tokens, stop: int) -> Prefix:
        """Keys (rotated) and values of the columns before ``stop``."""
        cache = self.new_cache(len(tokens))
        with of_lengths(self._rotary, tokens.mask.sum(1)):
            self._run(tokens.ids[:, :stop], tokens.mask[:, :stop], 1, cache)
        layers: list[Any] = list(cache.layers)
        return tuple((layer.keys, layer.values) for layer in layers)

    def run(
        self, tokens: Tokens, start: int, prefix: Prefix, keep: int
    ) -> tuple[Float[Tensor, "batch keep d_vocab"], list[BlockCall]]:
        """Run the columns from ``start`` on; return logits of the last ``keep`` and each block call's arguments."""
        from transformers import Cache, DynamicCache

        calls: dict[int, BlockCall] = {}

        def without_cache(value: Any) -> Any:
            # an empty cache keeps its place: every run brings a cache of its own, and this one is large
            return DynamicCache() if isinstance(value, Cache) else value

        def note(layer: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            rest = {key: without_cache(value) for key, value in kwargs.items() if key != "hidden_states"}
            calls[layer] = BlockCall(tuple(map(without_cache, args[1:])), rest)

        with self.block_calls(note):
            logits = self._run(tokens.ids[:, start:], tokens.mask, keep, self.cache(prefix, 1) if start else None)
        return logits, [calls[layer] for layer in range(self.sizes.n_layers)]

    def cache(self, prefix: Prefix, variants: int) -> Any:
        """A fresh key-value cache that holds the prefix; a run appends to it, so every run needs its own."""
        cache = self.new_cache(variants)
        for layer, (keys, values) in enumerate(prefix):
            cache.update(expand_rows(keys, variants), expand_rows(values, variants), layer)
        return cache

    def block(
        self, layer: int, hidden: Float[Tensor, "row pos d_model"], call: BlockCall, batch: int, cache: Any
    ) -> Float[Tensor, "row pos d_model"]:
        """Run one block on rows that repeat ``batch`` prompts; ``call`` is from the stored run of these prompts."""
        from transformers import Cache

        variants = hidden.shape[0] // batch

        def again(value: Any) -> Any:
            return cache if isinstance(value, Cache) else expand_batched(value, batch, variants)

        kwargs = {key: again(value) for key, value in call.kwargs.items()}
        out = self._block(layer)(hidden, *map(again, call.args), **kwargs)
        stream: Tensor = out[0] if isinstance(out, tuple) else out
        return stream

    def mlp(self, layer: int, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """What a layer's MLP adds when it reads ``resid``, norms included."""
        block = self._block(layer)
        if hasattr(block, "ln2"):
            resid = block.ln2(resid)
        elif self.sizes.parallel:
            resid = block.ln1(resid)
        out = block.mlp(resid)
        # some experts return the router's scores as well, and some return all tokens along one axis
        out = (out[0] if isinstance(out, tuple) else out).reshape(resid.shape)
        return self._here(block.ln2_post(out) if hasattr(block, "ln2_post") else out)

    def unembed(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        """Final norm, unembedding and soft cap; float32."""
        return self.capped(self._here(self.tl_model.unembed(self.tl_model.ln_final(resid))).float())

    def new_cache(self, rows: int) -> Any:
        """An empty key-value cache, which `feed` fills."""
        from transformers import DynamicCache

        return DynamicCache()

    def repeat_cache(self, cache: Any, rows: int) -> None:
        """Let a cache of one row hold that row ``rows`` times."""
        cache.batch_repeat_interleave(rows)

    def feed(
        self, cache: Any, ids: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch seen"], keep: int
    ) -> Float[Tensor, "batch keep d_vocab"]:
        """Read further columns into a cache; ``mask`` covers all columns read so far, with these at its end."""
        return self._run(ids, mask, keep, cache)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a reply, from the generation configuration or, if it names none, from the model's.

        No other option of the generation configuration is read.
        """
        for config in (getattr(self.module, "generation_config", None), self.module.config):
            ends = getattr(config, "eos_token_id", None)
            if ends is not None:
                return (ends,) if isinstance(ends, int) else tuple(ends)
        return ()

    @property
    def by_position(self) -> bool:
        """Whether attention depends on tokens' positions alone, with no sliding window."""
        config = self.module.config
        kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
        if kinds:
            return set(kinds) <= {"full_attention", "global"}
        return getattr(config, "sliding_window", None) is None

    def rotation(self, lengths: Int[Tensor, " batch"]) -> tuple[Any, ...]:
        """One entry per row of these lengths: what its rotary angles depend on; () if they never change."""
        return rotation(self._rotary, lengths)

    def _run(
        self, ids: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch seen"], keep: int, cache: Any = None
    ) -> Float[Tensor, "batch keep d_vocab"]:
        """Logits of the last ``keep`` columns of ``ids``; ``mask`` also covers the columns in ``cache`` before them."""
        if not self.module.config.return_dict:  # without it Hugging Face's own code fails inside the model
            self.module.config.return_dict = True
        logits: Tensor = self.module(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=positions(mask)[:, -ids.shape[1] :],
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=keep,
        ).logits
        return logits

    def _block(self, layer: int) -> Any:
        """TransformerLens' block."""
        return self.tl_model.blocks[layer]

    def running_module(self, layer: int, part: Half) -> torch.nn.Module | None:
        """TransformerLens' module; None for a mixture of experts, which may lay all tokens along one axis."""
        module: Any = getattr(self._block(layer), part, None)
        # without a name it is no module of its own, and the whole block would be called in its place
        return None if module is None or module.name is None or (part == "mlp" and self.sizes.experts) else module

    def _rows_of_cache(self, value: Any, layer: int, rows: Int[Tensor, " row"]) -> Any:
        """A cache after some of its rows of a layer are left; any other value as it is."""
        from transformers import Cache

        if isinstance(value, Cache) and layer < len(value.layers):
            entry: Any = value.layers[layer]
            if getattr(entry, "keys", None) is not None and entry.keys.numel():
                entry.keys, entry.values = (held[rows.to(held.device)] for held in (entry.keys, entry.values))
        return value

    def part_weights(self, layer: int) -> dict[str, tuple[torch.nn.Parameter, Tensor]]:
        """Weights and biases of a layer's heads and neurons, from the linear layers that run.

        TransformerLens' own ``W_Q`` may be that of a fused layer, which it has split and no longer runs.

        Raises:
            MechsafetyError: Weights are offloaded.
        """
        self.check_in_memory("reading and writing the weights of single parts")
        block, found = self._block(layer), {}
        parts = [(block.attn, slot.lower(), slot, "head") for slot in ("Q", "K", "V", "O")]
        parts += [] if self.sizes.experts else [(block.mlp, place, place, "") for place in ("in", "gate", "out")]
        for owner, child, name, by in parts:
            linear = getattr(owner._modules.get(child), "original_component", None)
            weight = getattr(linear, "weight", None)
            if not isinstance(weight, torch.nn.Parameter):
                continue
            # Hugging Face's Conv1D stores [in, out], torch's Linear [out, in]
            view = weight.detach().T if isinstance(linear, torch.nn.Linear) else weight.detach()
            if by:
                form = "(head d) m -> head d m" if name == "O" else "m (head d) -> head m d"
                view = rearrange(view, form, d=self.sizes.d_head)
            found[f"W_{name}"] = (weight, view)
            bias = getattr(linear, "bias", None)
            if bias is not None:
                whole = bias.detach()
                split = by and name != "O"
                found[f"b_{name}"] = (
                    bias,
                    rearrange(whole, "(head d) -> head d", d=self.sizes.d_head) if split else whole,
                )
        return found

    def norms(self, layer: int, *names: str) -> list[torch.nn.Module]:
        """A block's norms of the given names; names that it lacks are skipped."""
        block = self._block(layer)
        return [getattr(block, name) for name in names if hasattr(block, name)]

    def reads(self, layer: int, edit: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
        """Context of one pass, in which a layer's heads read what ``edit`` makes of their norm's output."""
        return forward_hooks(self.norms(layer, "ln1"), lambda module, args, out: self._at_home(edit)(out))

    def writers(self) -> list[Writer]:
        """All parameters that write to the residual stream; a tied unembedding is not among them."""
        self.check_in_memory("erasing directions from weights")
        # modules that hold a weight themselves, under names without TransformerLens' wrappers
        plain = {k.replace(_WRAPPER, ""): m for k, m in self.module.named_modules() if "weight" in m._parameters}
        embedding = self.module.get_input_embeddings().weight
        tables = [m for m in plain.values() if isinstance(m, torch.nn.Embedding) and m.weight is embedding]
        tables += [module for name, module in plain.items() if _POSITIONS.search(name)]
        outputs = [m for name, m in plain.items() if _ATTENTION.search(name) or _MLP.search(name)]
        if len(outputs) != 2 * self.sizes.n_layers or not tables:
            raise MechsafetyError(
                f"found {len(outputs)} output weights and {len(tables)} embeddings in {type(self.module).__name__}",
                expected=f"{2 * self.sizes.n_layers} and at least 1, under known names",
                hint="use project_out",
            )
        found: list[Writer] = [(module, "weight", -1) for module in tables]
        for module in outputs:
            # Hugging Face's Conv1D stores [in, out], torch's Linear [out, in]
            found.append((module, "weight", 0 if isinstance(module, torch.nn.Linear) else -1))
            if getattr(module, "bias", None) is not None:
                found.append((module, "bias", -1))
        return found

    def norm_form(self, norm: torch.nn.Module) -> NormForm:
        """A norm of the residual stream's width as numbers."""
        cfg = self.tl_model.cfg
        with fetched(norm) if self._offloaded else nullcontext():
            own = getattr(norm, "weight", None)  # OLMo's norms have none
            bias = getattr(norm, "bias", None) if not cfg.uses_rms_norm else None
            ones = torch.ones(self.sizes.d_model, device=self.device)
            weight = ones if own is None else self._here(own).float() + (1.0 if cfg.rmsnorm_uses_offset else 0.0)
            bias = self._here(bias).float() if bias is not None else torch.zeros_like(weight)
        return NormForm(weight, bias, float(cfg.eps), not cfg.uses_rms_norm)
