"""Many directions removed or added at once, exactly, computing only what differs.

Chat prompts share the template's first tokens. What an edit does there depends on the edit and not on the prompt, so
these positions are run once an edit (the edit included: their keys and values differ from the unedited run's) and used
for all prompts. Prompts of one length go through together, so that no column is padding; edits go through as
variants of one batch. An addition at layer l leaves the blocks before l as they are: it starts from their stored
output. Logits are computed at the last position only.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Count, Prompts, public
from mechsafety.interventions.steering import orthonormal, removal_hooks
from mechsafety.models import LensModel
from mechsafety.models.engine import BaseRun, base_run, expand_rows, run_from, split_rows
from mechsafety.prompts import Tokens
from mechsafety.sites import Site, SiteKind

# edits in one batch: enough that matrix products are large, few enough that activations stay small
VARIANTS = 16


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts of one length.

    Attributes:
        index: Their places among all prompts.
        tokens: Their rows, without padding.
    """

    index: tuple[int, ...]
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class PromptBatches:
    """Prompts grouped by length.

    Attributes:
        batches: One a length.
        start: Number of first tokens that all prompts share (0 if there are none, or only one prompt).
        n: Number of prompts.
    """

    batches: tuple[PromptBatch, ...]
    start: int
    n: int

    @classmethod
    @public
    def of(cls, model: LensModel, prompts: Prompts, max_rows: Count = 16) -> "PromptBatches":
        """Group prompts by length, at most ``max_rows`` together."""
        if not prompts:
            raise MechsafetyError("no prompts", expected="a list of at least one")
        rows = [model.tokenize([prompt]) for prompt in prompts]
        by_length: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            by_length.setdefault(row.ids.shape[1], []).append(index)
        shortest = min(by_length)
        first = rows[0].ids[0, :shortest]
        same = torch.stack([row.ids[0, :shortest] == first for row in rows]).all(0)
        start = min(int(same.long().cumprod(0).sum()), shortest - 1) if len(rows) > 1 else 0
        lengths = torch.tensor([start + 1, *by_length])
        if len(set(model.backend.rotation(lengths))) > 1:  # shared columns of short rows are rotated otherwise
            start = 0
        batches = []
        for length in sorted(by_length):
            members = by_length[length]
            for k in range(0, len(members), max_rows):
                chunk = members[k : k + max_rows]
                tokens = [rows[index] for index in chunk]
                ids, mask = torch.cat([t.ids for t in tokens]), torch.cat([t.mask for t in tokens])
                batches.append(PromptBatch(tuple(chunk), Tokens(ids, mask, tuple(t.spans[0] for t in tokens))))
        return cls(tuple(batches), start, len(rows))


@dataclass(frozen=True, slots=True)
class EditedRun:
    """What some prompts' runs give under some edits.

    Attributes:
        variants: Places of the edits among all of them.
        index: Places of the prompts.
        logits: Next-token logits.
        resid: Input of every block from ``layer`` on, and last the final norm's, at the last columns.
        layer: First block of ``resid``.
    """

    variants: tuple[int, ...]
    index: tuple[int, ...]
    logits: Float[Tensor, "variant prompt d_vocab"]
    resid: Float[Tensor, "layer variant prompt d_model"]
    layer: int


def run_removed(
    model: LensModel,
    prompts: PromptBatches,
    bases: Sequence[Tensor],
    strength: float = 1.0,
) -> Iterator[EditedRun]:
    """Runs with the span of each of ``bases`` removed from all that is written to the residual stream.

    Args:
        model: The model.
        prompts: What is run.
        bases: Linearly independent rows [rank d_model], of one rank for all; removed as by `project_out`.
        strength: Share that is removed.

    Yields:
        Results batch by batch; ``resid`` is at the last position, from block 1.
    """
    ranks = {len(basis) for basis in bases}
    if len(ranks) > 1:
        raise MechsafetyError(f"bases of ranks {sorted(ranks)}", expected="one rank")
    for first in range(0, len(bases), VARIANTS):
        chunk = torch.stack([orthonormal(basis) for basis in bases[first : first + VARIANTS]])
        members = tuple(range(first, first + len(chunk)))
        with torch.no_grad(), model.hooks(removal_hooks(model, chunk, strength)):
            prefix = _prefix_run(model, prompts, len(chunk))
            for batch in prompts.batches:
                run = _base(model, prompts, batch, len(chunk), prefix)
                # the engine stores block 0's input as it is before the removal
                resid = [split_rows(layer[:, -1], len(chunk)) for layer in run.resid[1:]]
                yield EditedRun(members, batch.index, split_rows(run.logits, len(chunk)), torch.stack(resid), 1)


def run_added(
    model: LensModel,
    prompts: PromptBatches,
    vectors: Float[Tensor, "layer column d_model"],
    layers: Sequence[int],
) -> Iterator[EditedRun]:
    """Runs with one vector added at the input of a block, at all positions: all columns' vectors of each layer.

    Args:
        model: The model.
        prompts: What is run.
        vectors: What is added.
        layers: Block of each row of ``vectors``.

    Yields:
        Results layer by layer and batch by batch; ``variants`` are ``row * n_columns + column``; ``resid`` is at the
        last position, from the block after the addition.
    """
    n_columns = vectors.shape[1]
    prefixes = []
    for row, layer in enumerate(layers):
        add = _adder(vectors[row])
        with torch.no_grad(), model.hooks([(Site(SiteKind.RESID_PRE, layer), add)]):
            prefixes.append(_prefix_run(model, prompts, n_columns))
    with torch.no_grad():
        unedited = _prefix_run(model, prompts, n_columns)
        for batch in prompts.batches:
            base = _base(model, prompts, batch, n_columns, unedited)
            for row, layer in enumerate(layers):
                prefix = prefixes[row]
                run = base if prefix is None else replace(base, prefix=_widen(prefix, len(batch.index)))
                logits, resid = _run_on(model, run, layer, _adder(vectors[row])(base.resid[layer]))
                variants = tuple(row * n_columns + column for column in range(n_columns))
                seen = torch.stack([split_rows(part, n_columns) for part in resid])
                yield EditedRun(variants, batch.index, split_rows(logits, n_columns), seen, layer + 1)


def run_unedited(model: LensModel, prompts: PromptBatches) -> EditedRun:
    """One run of all prompts as they are; ``resid`` from block 0."""
    logits: dict[int, Tensor] = {}
    resid: dict[int, Tensor] = {}
    with torch.no_grad():
        prefix = _prefix_run(model, prompts, 1)
        for batch in prompts.batches:
            run = _base(model, prompts, batch, 1, prefix)
            for row, index in enumerate(batch.index):
                logits[index], resid[index] = run.logits[row], run.resid[:, row, -1]
    order = range(prompts.n)
    stacked = torch.stack([resid[k] for k in order], dim=1)
    whole = torch.stack([logits[k] for k in order])
    return EditedRun((0,), tuple(order), whole[None], rearrange(stacked, "layer prompt d -> layer 1 prompt d"), 0)


def _adder(vectors: Float[Tensor, "variant d_model"]) -> Callable[[Tensor], Tensor]:
    def add(own: Tensor) -> Tensor:
        rows = repeat(vectors.to(own), "variant d -> (variant prompt) 1 d", prompt=len(own) // len(vectors))
        return own + rows

    return add


def _prefix_run(model: LensModel, prompts: PromptBatches, variants: int) -> BaseRun | None:
    """Keys and values of the shared first tokens, one row a variant, under the hooks that are active."""
    if not prompts.start:
        return None
    shortest = prompts.batches[0].tokens
    width = prompts.start + 1  # the engine wants at least one column after the prefix
    ids, mask = (repeat(t[0, :width], "pos -> variant pos", variant=variants) for t in (shortest.ids, shortest.mask))
    return base_run(model, Tokens(ids, mask, shortest.spans[:1] * variants), prompts.start, keep=())


def _widen(prefix: BaseRun, rows: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """A prefix of one row a variant for batches of ``rows`` prompts."""

    def wide(tensor: Tensor) -> Tensor:
        return repeat(tensor, "variant ... -> (variant prompt) ...", prompt=rows)

    return tuple((wide(keys), wide(values)) for keys, values in prefix.prefix)


def _base(
    model: LensModel, prompts: PromptBatches, batch: PromptBatch, variants: int, prefix: BaseRun | None
) -> BaseRun:
    """The run of each prompt under each variant of the active hooks."""
    tokens = batch.tokens
    rows = Tokens(expand_rows(tokens.ids, variants), expand_rows(tokens.mask, variants), tokens.spans * variants)
    shared = None if prefix is None else replace(prefix, prefix=_widen(prefix, len(tokens)))
    return base_run(model, rows, prompts.start, keep=(), prefix=shared)


def _run_on(model: LensModel, base: BaseRun, layer: int, resid: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the last position's input of every later block and of the final norm."""
    seen: dict[Site, Tensor] = {}
    sites = [Site(SiteKind.RESID_PRE, k) for k in range(layer + 1, model.n_layers)] + [Site(SiteKind.FINAL_NORM_IN)]

    def keep(site: Site) -> Callable[[Tensor], None]:
        return lambda tensor: seen.__setitem__(site, tensor[:, -1].detach())

    logits = run_from(model, base, layer, resid, [(site, keep(site)) for site in sites])
    return logits, [seen[site] for site in sites]
