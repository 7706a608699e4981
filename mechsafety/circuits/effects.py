"""Exact effects of single nodes, with intervals."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mechsafety.circuits.budget import Budget
from mechsafety.circuits.faithfulness import FaithfulnessMeter
from mechsafety.nodes import Node
from mechsafety.patching.effects import effect_intervals, effect_p_values
from mechsafety.progress import progress_bar

# exact effect, its interval, its adjusted p
Measured = tuple[float, tuple[float, float], float]


def pair_gaps(meters: Sequence[FaithfulnessMeter]) -> np.ndarray:
    """Metric of the harmful prompt less that of the harmless one, one value per pair, meter after meter."""
    return np.concatenate([harmful - harmless for harmful, harmless in (meter.ends() for meter in meters)])


def single_effects(
    meters: Sequence[FaithfulnessMeter], nodes: Sequence[Node], budget: Budget, progress: bool
) -> dict[Node, np.ndarray]:
    """Exact effect of each node alone on every prompt, as a share of the mean gap, as far as time allows.

    Args:
        meters: Meters to measure on; the prompts of one follow those of the other.
        nodes: The nodes, most important first.
        budget: Time budget.
        progress: Whether to show a bar.
    """
    gap = pair_gaps(meters).mean()
    found: dict[Node, np.ndarray] = {}
    with progress_bar(total=len(nodes), desc="nodes", show=progress) as bar:
        for some in budget.within(nodes, 12, 0.5, "exact effects of single nodes"):
            alone = sorted(some, key=lambda node: node.order)
            lost = [meter.ends()[0] - meter.removed([[node] for node in alone]) for meter in meters]
            found |= dict(zip(alone, np.concatenate(lost, axis=1) / gap, strict=True))
            bar.update(len(some))
    return {node: found[node] for node in nodes if node in found}


def with_intervals(effects: Mapping[Node, np.ndarray], gaps: np.ndarray, seed: int) -> dict[Node, Measured]:
    """Mean of each node's effect, its interval, and its sign-flip p adjusted over all nodes.

    Args:
        effects: Effect of each node on every prompt, as a share of the mean gap.
        gaps: Gap of every prompt, in units of the metric.
        seed: Seed of the resampling.
    """
    if not effects:
        return {}
    rows = torch.from_numpy(np.stack(list(effects.values())))
    intervals = effect_intervals(rows, torch.from_numpy(gaps / gaps.mean()), seed)
    means, p_values = rows.mean(1).tolist(), effect_p_values(rows, seed)
    return dict(zip(effects, zip(means, intervals, p_values, strict=True), strict=True))


def on_some(
    effects: Mapping[Node, np.ndarray], meters: Sequence[FaithfulnessMeter], rows: Sequence[int]
) -> dict[Node, float]:
    """Mean effect on some of the pairs, as a share of their own mean gap.

    Args:
        effects: Effect of each node on every pair of the meters, as a share of the mean gap of all these pairs.
        meters: The meters that the effects were measured on.
        rows: Indices of the chosen pairs.
    """
    gaps, chosen = pair_gaps(meters), list(rows)
    scale = gaps.mean() / gaps[chosen].mean()
    return {node: float(values[chosen].mean() * scale) for node, values in effects.items()}
