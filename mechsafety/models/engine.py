"""The forward engine: runs only what an intervention can change.

Three shortcuts, each exact: positions before the first difference of a pair are run once and their keys and values
kept; blocks before the first edited layer are not run, their output is taken from the stored base run; logits are
computed at the last position only. Variants of one base run (other heads patched, other circuits) go through as one
larger batch.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from mechsafety.models.lens import LensModel
from mechsafety.prompts import Tokens
from mechsafety.sites import Site, SiteKind

Hook = tuple[Site, Callable[[Tensor], "Tensor | None"]]

# rows x positions of one engine batch: on a CPU larger ones gain nothing, and activations stay below 100 MB
MAX_BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class BlockCall:
    """What a block was called with besides its input: architectures differ in order and names."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def expand(self, batch: int, variants: int, cache: Any) -> "BlockCall":
        """The same call for ``variants`` copies of the batch, with ``cache`` in place of the stored call's."""

        def one(value: Any) -> Any:
            return cache if _is_cache(value) else _expand(value, batch, variants)

        return BlockCall(tuple(map(one, self.args)), {key: one(value) for key, value in self.kwargs.items()})


@dataclass(frozen=True, slots=True)
class BaseRun:
    """A stored run of some prompts: everything that is needed to run on from any layer.

    Attributes:
        tokens: The prompts.
        start: First column that is run; ``pos`` in the shapes below counts from here.
        resid: Input of every block, and last the input of the final norm.
        calls: What each block was called with besides its input.
        prefix: Keys and values of the columns before ``start``, one pair of [batch kv_head pos d_head] a layer.
        acts: Stored activations by site kind, each with a leading layer axis.
        logits: Next-token logits of the base run, float32.
    """

    tokens: Tokens
    start: int
    resid: Float[Tensor, "layer_plus_1 batch pos d_model"]
    calls: tuple["BlockCall", ...]
    prefix: tuple[tuple[Tensor, Tensor], ...]
    acts: Mapping[SiteKind, Tensor]
    logits: Float[Tensor, "batch d_vocab"]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_pos(self) -> int:
        """Number of columns that are run."""
        return self.tokens.ids.shape[1] - self.start


def base_run(
    model: LensModel,
    tokens: Tokens,
    start: int = 0,
    keep: Sequence[SiteKind] = (SiteKind.Z, SiteKind.MLP_OUT),
    prefix: "BaseRun | None" = None,
) -> BaseRun:
    """Run prompts once and store what `run_from` needs, and the activations of the kinds in ``keep``.

    Args:
        model: The model.
        tokens: The prompts.
        start: First column to run in every variant; the columns before must be common to base and source run.
        keep: Site kinds to store, of all layers, columns from ``start``.
        prefix: A run of other prompts with the same columns before ``start``, whose keys and values are used again.
    """
    inputs: dict[int, Tensor] = {}
    calls: dict[int, BlockCall] = {}
    store: dict[Site, Tensor] = {}
    blocks = list(model.bridge.blocks)

    def note_call(layer: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[layer] = args[0] if args else kwargs["hidden_states"]
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            calls[layer] = BlockCall(tuple(args[1:]), rest)

        return hook

    def note_site(site: Site) -> Callable[[Tensor], None]:
        return lambda tensor: store.__setitem__(site, tensor.detach())

    sites = [Site(kind, layer) for kind in keep for layer in range(model.n_layers)]
    sites.append(Site(SiteKind.FINAL_NORM_IN))
    with torch.no_grad(), model.hooks([(site, note_site(site)) for site in sites]):
        kept_prefix = _prefix(model, tokens, start) if prefix is None else prefix.prefix
        handles: list[Any] = []
        try:
            for layer, block in enumerate(blocks):
                handles.append(block.register_forward_pre_hook(note_call(layer), with_kwargs=True))
            out = model.hf_model(
                input_ids=tokens.ids[:, start:],
                attention_mask=tokens.mask.long(),
                position_ids=tokens.position_ids[:, start:],
                past_key_values=_cache(model, kept_prefix) if start else None,
                use_cache=bool(start),
                logits_to_keep=1,
            )
        finally:
            for handle in handles:
                handle.remove()
    resid = torch.stack([inputs[layer] for layer in range(model.n_layers)] + [store[Site(SiteKind.FINAL_NORM_IN)]])
    acts = {kind: torch.stack([store[Site(kind, layer)] for layer in range(model.n_layers)]) for kind in keep}
    kept = tuple(calls[layer] for layer in range(model.n_layers))
    return BaseRun(tokens, start, resid, kept, kept_prefix, acts, out.logits[:, -1].float())


def run_from(
    model: LensModel,
    base: BaseRun,
    layer: int,
    resid: Float[Tensor, "row pos d_model"],
    hooks: Sequence[Hook] = (),
    *,
    stop: int | None = None,
) -> Float[Tensor, "row ..."]:
    """Next-token logits when the residual stream before block ``layer`` is ``resid`` and ``hooks`` edit what follows.

    Args:
        model: The model.
        base: The base run; its rows repeat in order, ``row = variant * batch + prompt``.
        layer: First block to run; ``n_layers`` runs the final norm and the unembedding only.
        resid: Input of that block. Gradients flow through it under grad mode.
        hooks: Edits, as for `LensModel.hooks`.
        stop: Block before which to stop, for its input instead of logits.

    Returns:
        Logits [row d_vocab] in float32 at the last position; with ``stop`` the residual stream [row pos d_model].
    """
    variants = resid.shape[0] // len(base)
    hidden = resid
    with model.hooks(hooks):
        cache = _cache(model, base.prefix, variants) if base.start else None
        for index in range(layer, model.n_layers if stop is None else stop):
            call = base.calls[index].expand(len(base), variants, cache)
            hidden = model.bridge.blocks[index](hidden, *call.args, **call.kwargs)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return hidden if stop is not None else unembed(model, hidden[:, -1:])[:, 0]


class _Captured(Exception):
    """Ends a run once what it was for has been seen."""


def capture(
    model: LensModel,
    base: BaseRun,
    layer: int,
    resid: Float[Tensor, "row pos d_model"],
    site: Site,
    hooks: Sequence[Hook] = (),
) -> Tensor:
    """Activation at a site of one block run alone, which stops there: what comes after it is not computed."""
    seen: list[Tensor] = []

    def stop(tensor: Tensor) -> None:
        seen.append(tensor)
        raise _Captured

    with contextlib.suppress(_Captured):
        run_block(model, base, layer, resid, [*hooks, (site, stop)])
    return seen[0]


def run_block(
    model: LensModel, base: BaseRun, layer: int, resid: Float[Tensor, "row pos d_model"], hooks: Sequence[Hook] = ()
) -> Float[Tensor, "row pos d_model"]:
    """Output of one block alone, for variants of a base run."""
    return run_from(model, base, layer, resid, hooks, stop=layer + 1)


def unembed(model: LensModel, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
    """Final norm, unembedding and the logit soft cap where there is one; float32."""
    with model.lock:
        logits = model.bridge.unembed(model.bridge.ln_final(resid)).float()
    cap = float(model.bridge.cfg.output_logits_soft_cap)
    return cap * torch.tanh(logits / cap) if cap > 0 else logits


def max_variants(base: BaseRun, max_batch_tokens: int | None = None) -> int:
    """How many variants of a base run fit into one engine batch."""
    return max(1, (max_batch_tokens or MAX_BATCH_TOKENS) // (len(base) * base.n_pos))


def expand_rows(tensor: Tensor, variants: int) -> Tensor:
    """Repeat a [batch ...] tensor for each variant: [(variant batch) ...]."""
    return repeat(tensor, "batch ... -> (variant batch) ...", variant=variants)


def split_rows(tensor: Tensor, variants: int) -> Tensor:
    """Inverse grouping of `expand_rows`: [(variant batch) ...] -> [variant batch ...]."""
    return rearrange(tensor, "(variant batch) ... -> variant batch ...", variant=variants)


def check_engine(model: LensModel, tokens: Tokens) -> float:
    """Largest difference between the engine's logits and a whole forward's, from the first and the middle layer."""
    whole = model.logits(tokens)
    gaps = []
    for start in (0, tokens.ids.shape[1] // 2):
        base = base_run(model, tokens, start, keep=())
        for layer in (0, model.n_layers // 2, model.n_layers):
            with torch.no_grad():
                rows = run_from(model, base, layer, expand_rows(base.resid[layer], 2))
            gaps.append((split_rows(rows, 2) - whole).abs().max())
    return float(torch.stack(gaps).max())  # NaN if any is: Python's max would lose it


def _prefix(model: LensModel, tokens: Tokens, start: int) -> tuple[tuple[Tensor, Tensor], ...]:
    if not start:
        return ()
    from transformers import DynamicCache

    ids, mask = tokens.ids[:, :start], tokens.mask[:, :start]
    # prompts of one length begin with the same tokens of the chat template: one row is run for all
    same = bool((ids == ids[:1]).all()) and bool((mask == mask[:1]).all())
    rows = slice(0, 1) if same else slice(None)
    cache = DynamicCache()
    model.hf_model(
        input_ids=ids[rows],
        attention_mask=mask[rows].long(),
        position_ids=tokens.position_ids[rows, :start],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    layers: list[Any] = list(cache.layers)
    return tuple(
        (layer.keys.expand(len(ids), -1, -1, -1), layer.values.expand(len(ids), -1, -1, -1)) for layer in layers
    )


def _cache(model: LensModel, prefix: Sequence[tuple[Tensor, Tensor]], variants: int = 1) -> Any:
    """A fresh key-value cache holding the prefix; running on appends to it, so every run needs its own."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(prefix):
        cache.update(expand_rows(keys, variants), expand_rows(values, variants), layer)
    return cache


def _is_cache(value: Any) -> bool:
    from transformers import Cache

    return isinstance(value, Cache)


def _expand(value: Any, batch: int, variants: int) -> Any:
    """Repeat whatever has a batch axis of the base run for each variant."""
    if isinstance(value, torch.Tensor):
        has_batch = value.ndim > 1 and value.shape[0] == batch and batch > 1
        return expand_rows(value, variants) if has_batch and variants > 1 else value
    if isinstance(value, tuple):
        return tuple(_expand(item, batch, variants) for item in value)
    return value
