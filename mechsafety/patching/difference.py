"""Two results of activation patching against each other: the same nodes under two settings, models or prompt sets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.patching.activation import PatchMap
from mechsafety.patching.effects import effect_intervals
from mechsafety.results import NO_BOUNDS, Provenance, Result, unbounded


@dataclass(frozen=True, slots=True, repr=False)
class EffectDifference(Result):
    """Effects of the same nodes in two results, and their difference.

    Attributes:
        provenance, other: The first result's and the second's.
        names: The two results' names, for tables and figures.
        nodes: What was patched in each row; with ``each``, with its position.
        first, second: Effects, shares of each result's own gap.
        difference: Second less first.
        intervals: 95 % interval of each difference.
        paired: Whether both results are of the same prompts, whose differences are then taken prompt by prompt.

    Example:
        >>> here, there = (ms.activation_patching(one, pairs, metric) for one in (model, base))
        >>> difference = ms.patching.compare_effects(here, there, ("aligned", "base"))
        >>> difference.paired, difference.to_dataframe().columns[1:4].tolist()
        (False, ['aligned', 'base', 'difference'])
    """

    provenance: Provenance
    other: Provenance
    names: tuple[str, str]
    nodes: tuple[str, ...]
    first: Float[Tensor, " node"]
    second: Float[Tensor, " node"]
    difference: Float[Tensor, " node"]
    intervals: tuple[tuple[float, float], ...]
    paired: bool

    def __repr__(self) -> str:
        apart = sum(not low <= 0 <= high for low, high in self.intervals)
        kind = "paired" if self.paired else "independent"
        return f"EffectDifference({len(self.nodes)} nodes, {kind} prompts, {apart} intervals without 0)"

    def to_dataframe(self) -> pd.DataFrame:
        """One row per node, the largest difference first: both effects, the difference and its interval."""
        low, high = zip(*self.intervals, strict=True)
        columns = {
            "node": self.nodes,
            self.names[0]: self.first.tolist(),
            self.names[1]: self.second.tolist(),
            "difference": self.difference.tolist(),
            "ci_low": low,
            "ci_high": high,
        }
        return pd.DataFrame(columns).sort_values("difference", key=abs, ascending=False, ignore_index=True)

    def plot(self, most: int = 25) -> go.Figure:
        """The nodes with the largest differences: both effects on the left, the difference with its interval beside.

        A cross is a difference whose interval has no bounds.

        Args:
            most: Largest number of nodes.
        """
        from plotly.subplots import make_subplots

        frame = self.to_dataframe().head(most).iloc[::-1]
        titles = ("effects", "difference, 95 % interval")
        figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=titles)
        for name, symbol, colour in zip(self.names, ("circle-open", "diamond"), ("#8D96A2", "#0072B2"), strict=True):
            marker = {"symbol": symbol, "size": 8, "color": colour}
            figure.add_scatter(x=frame[name], y=frame.node, mode="markers", name=name, marker=marker, row=1, col=1)
        whiskers = {"array": frame.ci_high - frame.difference, "arrayminus": frame.difference - frame.ci_low}
        open_ended = unbounded(frame)
        figure.add_scatter(
            x=frame.difference,
            y=frame.node,
            mode="markers",
            error_x={"type": "data", "symmetric": False, "thickness": 1.2, **whiskers},
            marker={"size": 7, "color": "#14181D", "symbol": ["x-thin-open" if o else "circle" for o in open_ended]},
            showlegend=False,
            row=1,
            col=2,
        )
        if any(open_ended):
            note = {"xref": "paper", "yref": "paper", "x": 1, "xanchor": "right", "showarrow": False}
            note |= {"y": 1, "yanchor": "bottom", "yshift": 24}  # in pixels: above the titles of few nodes too
            figure.add_annotation(text=f"cross: {NO_BOUNDS}", **note)
        figure.update_xaxes(title_text="share of the gap", zeroline=True, zerolinecolor="#8D96A2")
        figure.update_xaxes(title_text=f"{self.names[1]} less {self.names[0]}", row=1, col=2)
        figure.update_yaxes(type="category")
        legend = {"orientation": "h", "yref": "container", "y": 0.99, "yanchor": "top", "x": 0}
        return figure.update_layout(height=230 + 19 * len(frame), width=760, legend=legend)


def compare_effects(
    first: PatchMap, second: PatchMap, names: tuple[str, str] = ("first", "second"), *, seed: int = 0
) -> EffectDifference:
    """Compare two results of activation patching node by node; no model is run.

    If both results are of the same prompts (the same scores of the unpatched runs), the difference is taken prompt by
    prompt, and its interval is that of a single effect (`ratio_intervals`). Otherwise the two sets of prompts count as
    independent, and the interval is made of the two effects' own intervals (MOVER; Zou and Donner 2008).

    The intervals are not adjusted for the number of nodes: of 100 nodes without any difference, about five have an
    interval without 0.

    Args:
        first: A result of `activation_patching`.
        second: Another one, of the same nodes in the same order and with the same kind of positions.
        names: Names of the two, for tables and figures.
        seed: Seed of the resampling.

    Raises:
        MechsafetyError: Other nodes or positions, or the same name twice.

    Example:
        >>> one = ms.activation_patching(model, pairs, metric, positions="instruction")
        >>> two = ms.activation_patching(model, pairs, metric, positions="suffix")
        >>> ms.patching.compare_effects(one, two, ("instruction", "suffix")).to_dataframe().columns[1:4].tolist()
        ['instruction', 'suffix', 'difference']
    """
    rows = [_rows(found) for found in (first, second)]
    if rows[0] != rows[1]:
        raise MechsafetyError(f"results of other nodes or positions ({_unlike(*rows)})", expected="the same in both")
    if len(set(names)) < 2 or set(names) & {"node", "difference", "ci_low", "ci_high"}:
        raise MechsafetyError(f"names {names}", expected="two names that are no columns of the table")
    paired = torch.equal(first.harmful, second.harmful) and torch.equal(first.harmless, second.harmless)
    if paired:
        found = effect_intervals(second.changes - first.changes, first.harmful - first.harmless, seed)
    else:
        ends = [result.intervals(seed) for result in (first, second)]
        effects = first.effects.tolist(), second.effects.tolist()
        found = [_mover(*row) for row in zip(*effects, *ends, strict=True)]
    return EffectDifference(
        first.provenance,
        second.provenance,
        names,
        rows[0],
        first.effects,
        second.effects,
        second.effects - first.effects,
        tuple(found),
        paired,
    )


def _unlike(first: Sequence[str], second: Sequence[str]) -> str:
    """Which rows one of the two lacks, up to three of each; or that only their order differs."""
    said = []
    for which, own, other in (("first", first, set(second)), ("second", second, set(first))):
        alone = [name for name in own if name not in other]
        more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
        said += [f"only the {which} has {', '.join(alone[:3])}{more}"] if alone else []
    return "; ".join(said) or "the same ones in another order"


def _rows(found: PatchMap) -> tuple[str, ...]:
    if found.row_positions is None:
        return tuple(map(str, found.nodes))
    return tuple(f"{node} @ {at}" for node, at in zip(found.nodes, found.row_positions, strict=True))


def _mover(a: float, b: float, ci_a: tuple[float, float], ci_b: tuple[float, float]) -> tuple[float, float]:
    """Interval of b - a from the intervals of two independent estimates.

    Example:
        >>> low, high = _mover(0.2, 0.5, (0.1, 0.3), (0.4, 0.6))  # the half widths add in squares
        >>> round(low, 3), round(high, 3)
        (0.159, 0.441)
    """
    return (
        b - a - math.hypot(b - ci_b[0], ci_a[1] - a),
        b - a + math.hypot(ci_b[1] - b, a - ci_a[0]),
    )
