"""The values that a patch puts in place of a run's own, and the columns where it does so."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.models.engine import BaseRun
from mechsafety.patching.masks import PairRuns, stored
from mechsafety.prompts import Align, Tokens
from mechsafety.sites import SiteKind

Source = Literal["other", "mean", "resample", "zero"]


def check_start(runs: PairRuns, positions: str | Sequence[int], source: str) -> None:
    """Check that stored runs hold every column that a patch replaces.

    A source that is not the other prompt of the pair also replaces columns before the first difference, where both
    prompts are the same. Runs of pairs aligned at the suffix hold only the suffix, so earlier columns are refused.
    """
    if runs.align == "suffix" and positions in ("prefix", "instruction"):
        raise MechsafetyError(
            f"positions {positions!r} of pairs aligned at the suffix",
            expected="'all' (which is the suffix), 'each', or positions from the end",
            hint="use pairs of equal length for earlier tokens",
        )
    if isinstance(positions, int):
        raise MechsafetyError(
            f"positions={positions}", expected="a span, 'each', or positions from the end, such as [-1]"
        )
    if source == "other" or runs.start == 0 or runs.align == "suffix":
        return
    tokens = runs.harmful.tokens
    if positions == "each":
        early = True
    elif isinstance(positions, str):
        early = bool(tokens.span_mask(positions)[:, : runs.start].any())
    else:
        early = min(positions, default=0) < runs.start - tokens.ids.shape[1]
    if early:
        raise MechsafetyError(
            f"these runs begin at position {runs.start}, {source!r} at {positions!r} replaces earlier ones",
            hint="use pair_runs(model, pairs, start=0)",
        )


def column_masks(
    base: BaseRun, start: int, positions: str | Sequence[int]
) -> tuple[list[int], list[Bool[Tensor, "batch pos"]]]:
    """Positions from the end (for ``each`` only), and one mask per variant of the run's columns that it patches."""
    real = base.tokens.mask[:, start:]
    if isinstance(positions, str) and positions != "each":
        return [], [base.tokens.span_mask(positions)[:, start:]]
    every = list(range(-real.shape[1], 0))
    if not isinstance(positions, str):
        wrong = [at for at in positions if at not in every]
        if wrong or not positions:
            raise MechsafetyError(
                f"positions {wrong or positions}",
                expected=f"positions from the end, {every[0]} to -1"
                + (" (earlier ones are the same in both prompts)" if start else ""),
            )
    masks = []
    for at in every:
        mask = torch.zeros_like(real)
        mask[:, at] = real[:, at]
        masks.append(mask)
    if positions == "each":
        return every, masks
    return [], [torch.stack([masks[at] for at in positions]).any(0)]  # type: ignore[index]


def source_values(
    other: BaseRun, kinds: Sequence[SiteKind], source: str, seed: int, align: Align = "tokens"
) -> Mapping[SiteKind, Tensor]:
    """Replacement activations of each kind [layer batch pos ...]."""
    out = {}
    groups: list[list[int]] = []
    if source in ("mean", "resample"):
        # the suffix's columns correspond in prompts of any length
        groups = _same_length(other.tokens, source, any_length=align == "suffix")
    for kind in kinds:
        values = stored(other.acts, kind)
        if source == "zero":
            values = torch.zeros_like(values)
        elif source == "mean":
            mean = values.clone()
            for rows in groups:
                mean[:, rows] = values[:, rows].mean(1, keepdim=True)
            values = mean
        elif source == "resample":
            values = values[:, _derangement(groups, seed)]
        out[kind] = values
    return out


def _same_length(tokens: Tokens, source: str, *, any_length: bool = False) -> list[list[int]]:
    """Groups of rows with the same number of tokens, because only in these do columns (and padding) correspond.

    Raises:
        MechsafetyError: A prompt has a length that no other prompt has.
    """
    groups: dict[int, list[int]] = {}
    for row, spans in enumerate(tokens.spans):
        groups.setdefault(0 if any_length else spans.length, []).append(row)
    alone = {length: rows[0] + 1 for length, rows in groups.items() if len(rows) == 1}
    if alone:
        named = ", ".join(f"{row} ({length} tokens)" for length, row in alone.items())
        raise MechsafetyError(
            f"source {source!r} finds no other pair of the same length for pair {named}",
            expected="two or more pairs of each token length",
            hint="leave such pairs out, or use source='other' or 'zero'",
        )
    return list(groups.values())


def _derangement(groups: Sequence[Sequence[int]], seed: int) -> list[int]:
    """A random order of all rows in which every row changes its place and stays in its group."""
    generator = torch.Generator().manual_seed(seed)
    follows: dict[int, int] = {}
    for rows in groups:
        order = [rows[k] for k in torch.randperm(len(rows), generator=generator).tolist()]
        follows |= {order[k]: order[(k + 1) % len(order)] for k in range(len(order))}
    return [follows[row] for row in sorted(follows)]
