"""Many directions removed or added at once, exactly, computing only what differs.

Chat prompts share the template's first tokens. What an edit does there depends on the edit and not on the prompt. These
positions are therefore run once per edit, and all prompts use the result. That run includes the edit, because the edit
changes the keys and values.

Prompts of similar length are run together, padded on the left. Edits are run as variants of one batch. An addition at
layer l does not change the blocks before l, so it starts from their stored output. Logits are computed at the last
position only.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any, TypeVar

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Count, Prompts, public
from mechsafety.interventions.steering import orthonormal, removal_hooks
from mechsafety.models import LensModel
from mechsafety.models.backend import Prefix
from mechsafety.models.engine import BaseRun, base_run, expand_rows, run_from, shared_columns, split_rows
from mechsafety.models.memory import batch_bytes
from mechsafety.prompts import Tokens
from mechsafety.scale.work import work
from mechsafety.sites import Site, SiteKind

R = TypeVar("R")

# edits in one batch: enough that matrix products are large, few enough that activations stay small
VARIANTS = 16
# share of a batch's memory for what the engine stores; the rest is for what it computes
STORED_SHARE = 0.5
# the fewest columns that a prompt has after the shared ones; each prompt has one row of logits
COLUMNS_A_PROMPT = 8


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts of similar length.

    Attributes:
        index: Place of each prompt among all prompts.
        tokens: Token rows of the prompts, padded on the left.
    """

    index: tuple[int, ...]
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class PromptBatches:
    """Prompts sorted by length and cut into batches.

    Attributes:
        batches: The shortest prompts first.
        start: Number of first tokens that all prompts share; 0 if they share none or if there is only one prompt.
        shared: One row that begins with those tokens.
        n: Number of prompts.
    """

    batches: tuple[PromptBatch, ...]
    start: int
    shared: Tokens
    n: int

    @property
    def suffix(self) -> int:
        """Number of template tokens after the instruction that all prompts have."""
        spans = [spans for batch in self.batches for spans in batch.tokens.spans]
        return min(each.n_suffix for each in spans)

    @classmethod
    @public
    def of(
        cls, model: LensModel, prompts: Prompts, variants: Count = VARIANTS, max_columns: Count | None = None
    ) -> "PromptBatches":
        """Sort prompts by length and put as many into each batch as fit into memory.

        Args:
            model: The model.
            prompts: Prompts of any length.
            variants: Number of edits that will be run together.
            max_columns: Largest product of a batch's prompts and its columns after the shared ones. By default as
                large as the memory allows.
        """
        if not prompts:
            raise MechsafetyError("no prompts", expected="a list of at least one")
        tokens = model.tokenize(prompts)
        lengths = [spans.length for spans in tokens.spans]
        order = sorted(range(len(prompts)), key=lambda k: lengths[k])
        shortest = lengths[order[0]]
        heads = torch.stack([ids[-length:][:shortest] for ids, length in zip(tokens.ids, lengths, strict=True)])
        same = int((heads == heads[0]).all(0).long().cumprod(0).sum())
        start = min(same, shortest - 1) if len(prompts) > 1 else 0
        if len(set(model.backend.rotation(torch.tensor([start + 1, *lengths])))) > 1:
            start = 0  # rows of different lengths rotate the shared columns differently
        limit = max_columns or _columns(model) // variants
        chunks: list[list[int]] = []
        for k in order:
            if not chunks or (len(chunks[-1]) + 1) * (lengths[k] - start) > limit:
                chunks.append([])
            chunks[-1].append(k)
        batches = tuple(PromptBatch(tuple(chunk), tokens.rows(chunk)) for chunk in chunks)
        return cls(batches, start, tokens.rows([order[0]]), len(prompts))


@dataclass(frozen=True, slots=True)
class EditedRun:
    """Results of some prompts under some edits.

    Attributes:
        variants: Place of each edit among all edits.
        index: Place of each prompt among all prompts.
        logits: Next-token logits.
        resid: Inputs of every block from ``layer`` on and, in the last row, of the final norm; at the last position.
        layer: First block of ``resid``.
    """

    variants: tuple[int, ...]
    index: tuple[int, ...]
    logits: Float[Tensor, "variant prompt d_vocab"]
    resid: Float[Tensor, "layer variant prompt d_model"]
    layer: int


# computes one of many edited runs when it is called; calls in order share preparations
Later = Callable[[], EditedRun]


def run_removed(
    model: LensModel, prompts: PromptBatches, bases: Sequence[Tensor], strength: float = 1.0
) -> Iterator[EditedRun]:
    """The runs of `removed_runs`, one after the other."""
    return (run() for run in removed_runs(model, prompts, bases, strength))


@public
def removed_runs(
    model: LensModel, prompts: PromptBatches, bases: Sequence[Tensor], strength: float = 1.0
) -> list[Later]:
    """Runs with the span of each of ``bases`` removed from all that is written to the residual stream.

    Args:
        model: The model.
        prompts: The prompts.
        bases: Linearly independent rows [rank d_model] per basis; all bases have the same rank. They are removed as by
            `project_out`.
        strength: Share that is removed.

    Returns:
        Functions that compute the results batch by batch; ``resid`` is at the last position, from block 1.
    """
    ranks = {len(basis) for basis in bases}
    if len(ranks) > 1:
        raise MechsafetyError(f"bases of ranks {sorted(ranks)}", expected="one rank")
    together = VARIANTS if model.shortcuts.batch_variants else 1
    prefix_of = lru_cache(maxsize=1)(lambda first, n: _prefix_run(model, prompts, n))

    def run(first: int, batch: PromptBatch) -> EditedRun:
        chunk = torch.stack([orthonormal(basis) for basis in bases[first : first + together]])
        members = tuple(range(first, first + len(chunk)))
        with torch.no_grad(), model.hooks(removal_hooks(model, chunk, strength), by_column=True):
            own = _base(model, prompts, batch, len(chunk), prefix_of(first, len(chunk)))
            # the engine stores block 0's input before the removal: leave it out
            resid = [split_rows(layer[:, -1], len(chunk)) for layer in own.resid[1:]]
            return EditedRun(members, batch.index, split_rows(own.logits, len(chunk)), torch.stack(resid), 1)

    return [partial(run, first, batch) for first in range(0, len(bases), together) for batch in prompts.batches]


def run_added(
    model: LensModel, prompts: PromptBatches, vectors: Float[Tensor, "layer column d_model"], layers: Sequence[int]
) -> Iterator[EditedRun]:
    """The runs of `added_runs`, one after the other."""
    return (run() for run in added_runs(model, prompts, vectors, layers))


def added_runs(
    model: LensModel, prompts: PromptBatches, vectors: Float[Tensor, "layer column d_model"], layers: Sequence[int]
) -> list[Later]:
    """Runs with one vector added at a block's input, at all positions; every vector of every layer is one edit.

    Args:
        model: The model.
        prompts: The prompts.
        vectors: The vectors to add, one per edit.
        layers: Block of each row of ``vectors``.

    Returns:
        Functions that compute one result per batch and layer. ``variants`` are ``row * n_columns + column``. ``resid``
        is at the last position, from the block after the addition.
    """
    if len(vectors) != len(layers):
        raise MechsafetyError(f"{len(vectors)} rows of vectors for {len(layers)} layers", expected="one row per layer")
    n_columns = vectors.shape[1]

    @cache
    def prefix_of(row: int) -> Prefix:
        edit = (Site(SiteKind.RESID_PRE, layers[row]), _adder(vectors[row]))
        with torch.no_grad(), model.hooks([edit], by_column=True):
            return _prefix_run(model, prompts, n_columns)

    unedited = cache(lambda: _prefix_run(model, prompts, n_columns))
    base_of = lru_cache(maxsize=1)(lambda k: _base(model, prompts, prompts.batches[k], n_columns, unedited()))

    def run(k: int, row: int) -> EditedRun:
        layer, batch = layers[row], prompts.batches[k]
        with torch.no_grad():
            base = base_of(k)
            own = replace(base, prefix=_widen(prefix_of(row), batch.tokens)) if base.prefix else base
            logits, resid = _run_on(model, own, layer, _adder(vectors[row])(base.resid[layer]))
            variants = tuple(row * n_columns + column for column in range(n_columns))
            seen = torch.stack([split_rows(part, n_columns) for part in resid])
            return EditedRun(variants, batch.index, split_rows(logits, n_columns), seen, layer + 1)

    return [partial(run, k, row) for k in range(len(prompts.batches)) for row in range(len(layers))]


def swept_batches(
    model: LensModel, prompts: PromptBatches, read: Callable[[PromptBatch, BaseRun], R], kind: Any
) -> Iterator[tuple[PromptBatch, R]]:
    """What ``read`` takes from the run of every batch without further edits, over the columns after the shared ones.

    Args:
        model: The model.
        prompts: The prompts.
        read: Function of a batch and its run.
        kind: Annotation of what it returns, as for `mechsafety.scale.work`.
    """
    prefix = cache(lambda: _prefix_run(model, prompts, 1))

    def found(batch: PromptBatch) -> R:
        with torch.no_grad():
            return read(batch, _base(model, prompts, batch, 1, prefix()))

    return zip(prompts.batches, work("prompts", prompts.batches, found, kind), strict=True)


def run_unedited(model: LensModel, prompts: PromptBatches) -> EditedRun:
    """One run of all prompts without an edit; ``resid`` begins at block 0."""
    logits: dict[int, Tensor] = {}
    resid: dict[int, Tensor] = {}
    read = swept_batches(model, prompts, lambda _, run: (run.logits, run.resid[:, :, -1]), tuple[Tensor, Tensor])
    for batch, (own, last) in read:
        for row, index in enumerate(batch.index):
            logits[index], resid[index] = own[row].to(model.device), last[:, row].to(model.device)
    order = range(prompts.n)
    stacked = torch.stack([resid[k] for k in order], dim=1)
    whole = torch.stack([logits[k] for k in order])
    return EditedRun((0,), tuple(order), whole[None], rearrange(stacked, "layer prompt d -> layer 1 prompt d"), 0)


def _adder(vectors: Float[Tensor, "variant d_model"]) -> Callable[[Tensor], Tensor]:
    def add(own: Tensor) -> Tensor:
        rows = repeat(vectors.to(own), "variant d -> (variant prompt) 1 d", prompt=len(own) // len(vectors))
        return own + rows

    return add


def _columns(model: LensModel) -> int:
    """Number of rows x columns whose residual streams (stored twice) and logits (a few copies) fit into memory."""
    column = 2 * 4 * (model.n_layers + 1) * model.d_model + 4 * 4 * model.d_vocab // COLUMNS_A_PROMPT
    return int(STORED_SHARE * batch_bytes(model.device) / column)


def _prefix_run(model: LensModel, prompts: PromptBatches, variants: int) -> Prefix:
    """Keys and values of the shared first tokens, one row per variant, under the active hooks."""
    start = shared_columns(model, prompts.start)
    if not start:
        return ()
    shared = prompts.shared
    ids, mask = (expand_rows(t, variants) for t in (shared.ids, shared.mask))
    with torch.no_grad(), model.lock:
        return model.backend.prefix(Tokens(ids, mask, shared.spans * variants), start)


def _widen(prefix: Prefix, tokens: Tokens) -> Prefix:
    """Repeat a prefix of one row per variant for all prompts of a batch, as the first columns of their rows.

    A shorter prompt has padding in its first columns, so its shared tokens begin later. The last shared tokens then lie
    outside the prefix. They are run again with the prompt's own tokens.
    """
    if not prefix:
        return ()
    start = prefix[0][0].shape[2]
    padding = [min(start, tokens.ids.shape[1] - spans.length) for spans in tokens.spans]

    def wide(tensor: Tensor) -> Tensor:
        rows = [torch.nn.functional.pad(tensor[:, :, : start - pad], (0, 0, pad, 0)) for pad in padding]
        return rearrange(torch.stack(rows, dim=1), "variant prompt ... -> (variant prompt) ...")

    return tuple((wide(keys), wide(values)) for keys, values in prefix)


def _base(model: LensModel, prompts: PromptBatches, batch: PromptBatch, variants: int, prefix: Prefix) -> BaseRun:
    """The run of each prompt under each variant of the active hooks."""
    tokens = batch.tokens
    ids, mask = (expand_rows(t, variants) for t in (tokens.ids, tokens.mask))
    rows = replace(tokens, ids=ids, mask=mask, spans=tokens.spans * variants)
    start = shared_columns(model, prompts.start)
    return base_run(model, rows, start, keep=(), prefix=_widen(prefix, tokens), max_batch_tokens=1)


def _run_on(model: LensModel, base: BaseRun, layer: int, resid: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the last position's input of every later block and of the final norm."""
    seen: dict[Site, Tensor] = {}
    sites = [Site(SiteKind.RESID_PRE, k) for k in range(layer + 1, model.n_layers)] + [Site(SiteKind.FINAL_NORM_IN)]

    def keep(site: Site) -> Callable[[Tensor], None]:
        return lambda tensor: seen.__setitem__(site, tensor[:, -1].detach())

    logits = run_from(model, base, layer, resid, [(site, keep(site)) for site in sites])
    return logits, [seen[site] for site in sites]
