"""Statistics of a circuit: tests that scipy lacks or has only in part (equivalence, independence), areas of a curve."""

import numpy as np
from jaxtyping import Float

from mechsafety.circuits.verification.outcome import Equivalence, Independence
from mechsafety.intervals import UNBOUNDED


def equivalence_test(differences: np.ndarray, margin: float) -> Equivalence:
    """Two one-sided t-tests (Schuirmann 1987) that the mean difference lies within plus and minus ``margin``.

    A usual test that finds no difference does not show that the difference is small. This test shows it.

    Args:
        differences: One difference per prompt.
        margin: The margin, above 0.
    """
    from scipy.stats import ttest_1samp

    mean, n = float(np.mean(differences)), len(differences)
    if n < 2 or np.ptp(differences) == 0:
        # nothing varies: the mean is known, but a t-test has no scale
        p_value = 1.0 if n < 2 or abs(mean) >= margin else 0.0
        return Equivalence(margin, mean, UNBOUNDED if n < 2 else (mean, mean), p_value)
    above = ttest_1samp(differences, -margin, alternative="greater").pvalue
    below = ttest_1samp(differences, margin, alternative="less").pvalue
    interval = ttest_1samp(differences, 0.0).confidence_interval(0.9)
    return Equivalence(margin, mean, (float(interval.low), float(interval.high)), float(max(above, below)))


def independence_test(x: np.ndarray, y: np.ndarray, seed: int, n_permutations: int = 2000) -> Independence:
    """HSIC of paired samples (Gretton et al. 2005), and its p under permutations of one of them.

    The kernels are Gaussian. Their width is the median distance between different points. The estimate is the biased
    one, tr(KHLH) / n^2, where K and L are the kernel matrices and H centres them.

    Args:
        x: One value per prompt.
        y: A second value per prompt.
        seed: Seed of the permutations.
        n_permutations: Number of permutations; the observed order counts as one more.
    """
    n = len(x)
    k, lists = _centred_kernel(x), _kernel(y)
    rng = np.random.default_rng(seed)
    observed = float((k * lists).sum()) / n**2
    hits = 0
    for _ in range(n_permutations):
        order = rng.permutation(n)
        hits += float((k * lists[np.ix_(order, order)]).sum()) / n**2 >= observed * (1 - 1e-12)
    return Independence(n, observed, (1 + hits) / (1 + n_permutations))


def _kernel(values: np.ndarray) -> np.ndarray:
    distance = np.abs(values[:, None] - values[None, :]).astype(np.float64)
    apart = distance[np.triu_indices(len(values), 1)]
    width = float(np.median(apart[apart > 0])) if (apart > 0).any() else 1.0
    return np.exp(-(distance**2) / (2 * width**2))


def _centred_kernel(values: np.ndarray) -> np.ndarray:
    kernel = _kernel(values)
    return kernel - kernel.mean(0) - kernel.mean(1)[:, None] + kernel.mean()


def ratio(part: np.ndarray, whole: np.ndarray) -> float:
    """Ratio of two means."""
    return float(part.mean() / whole.mean())


def prompt_areas(
    k: Float[np.ndarray, " point"],
    scores: Float[np.ndarray, "point prompt"],
    harmful: Float[np.ndarray, " prompt"],
    harmless: Float[np.ndarray, " prompt"],
) -> tuple[Float[np.ndarray, " prompt"], Float[np.ndarray, " prompt"]]:
    """Each prompt's own part of the areas CMD and CPR of a faithfulness curve (trapezoid), in units of the metric.

    The mean of these parts, divided by the mean gap, is the area. CMD counts a prompt's distance from 1 at each point
    with the sign of the mean distance there.

    Args:
        k: Share of all parts at each point.
        scores: Metric with the circuit of each point kept.
        harmful: Metric of the harmful prompts, unedited.
        harmless: Metric of the harmless prompts, unedited.
    """
    missing = harmful - scores
    sides = np.sign(missing.mean(axis=1, keepdims=True))
    return np.trapezoid(sides * missing, k, axis=0), np.trapezoid(scores - harmless, k, axis=0)


def rank_p(observed: float, null: np.ndarray) -> float:
    """(1 + number of null values at least as large) / (1 + number of null values); a NaN counts as large."""
    return float((1 + (~(null < observed)).sum()) / (1 + len(null)))
