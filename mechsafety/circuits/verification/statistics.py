"""Statistics of a circuit: independence (scipy lacks HSIC), areas of a curve."""

import numpy as np
from jaxtyping import Float

from mechsafety.circuits.verification.outcome import Independence
from mechsafety.intervals import UNBOUNDED


def independence_test(x: np.ndarray, y: np.ndarray, seed: int, n_permutations: int = 2000) -> Independence:
    """HSIC of paired samples (Gretton et al. 2005), its p under permutations of one of them, and their correlation.

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
    return Independence(n, observed, (1 + hits) / (1 + n_permutations), *_correlation(x, y))


def _correlation(x: np.ndarray, y: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Pearson's correlation with its 95 % interval by Fisher's transformation; 0 if a sample does not vary."""
    from scipy.stats import pearsonr

    if not (np.ptp(x) and np.ptp(y)):
        return 0.0, (0.0, 0.0)
    if len(x) < 4:
        return float(np.corrcoef(x, y)[0, 1]), UNBOUNDED
    found = pearsonr(x, y)
    low, high = found.confidence_interval(0.95)
    return float(found.statistic), (float(low), float(high))


def _kernel(values: np.ndarray) -> np.ndarray:
    distance = np.abs(values[:, None] - values[None, :]).astype(np.float64)
    apart = distance[np.triu_indices(len(values), 1)]
    width = float(np.median(apart[apart > 0])) if (apart > 0).any() else 1.0
    kernel: np.ndarray = np.exp(-(distance**2) / (2 * width**2))
    return kernel


def _centred_kernel(values: np.ndarray) -> np.ndarray:
    kernel = _kernel(values)
    centred: np.ndarray = kernel - kernel.mean(0) - kernel.mean(1)[:, None] + kernel.mean()
    return centred


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
