"""The numbers that are reported with every exact effect: share of the gap, interval over prompts, adjusted p."""

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from mechsafety.intervals import ratio_intervals
from mechsafety.metrics import adjust_p, sign_flip_p


def mean_gap(harmful: Float[Tensor, " prompt"], harmless: Float[Tensor, " prompt"]) -> float:
    """Mean metric on harmful prompts minus that on harmless prompts."""
    return total_gap(harmful, harmless) / len(harmful)


def total_gap(harmful: Float[Tensor, " prompt"], harmless: Float[Tensor, " prompt"]) -> float:
    """Sum of the metric on harmful prompts minus that on harmless prompts, in float64."""
    return float((harmful - harmless).detach().cpu().double().sum())


def effect_intervals(
    changes: Float[Tensor, "row prompt"], gaps: Float[Tensor, " prompt"], seed: int = 0
) -> list[tuple[float, float]]:
    """95 % interval over prompts of each row's share of the gap, a ratio of two means (`ratio_intervals`)."""
    return ratio_intervals(changes.cpu().double().numpy(), gaps.cpu().double().numpy(), seed)


def effect_p_values(changes: Float[Tensor, "row prompt"], seed: int = 0) -> list[float]:
    """Sign-flip permutation p of each row's mean change, Benjamini-Hochberg adjusted over the rows."""
    return [float(p) for p in adjust_p(sign_flip_p(changes.cpu().double().numpy(), seed))]


def effect_table(changes: Float[Tensor, "row prompt"], gaps: Float[Tensor, " prompt"], seed: int = 0) -> pd.DataFrame:
    """``effect``, ``ci_low``, ``ci_high`` and ``p_value`` of each row.

    Args:
        changes: Change of the metric on each prompt.
        gaps: Metric of each harmful prompt minus that of its harmless counterfactual.
        seed: Seed of the resampling.

    Example:
        >>> import torch
        >>> effect_table(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([2.0, 4.0]))
           effect  ci_low  ci_high  p_value
        0     0.5     0.5      0.5      1.0
        1     0.0     0.0      0.0      1.0
    """
    low, high = zip(*effect_intervals(changes, gaps, seed), strict=True)
    effects = (changes.cpu().double().mean(1) / gaps.cpu().double().mean()).tolist()
    return pd.DataFrame({"effect": effects, "ci_low": low, "ci_high": high, "p_value": effect_p_values(changes, seed)})
