"""How often the package's intervals hold the true value, and how often its tests reject what is true.

    python scripts/simulate_coverage.py            # docs/results/coverage.json and its page, about five minutes
    python scripts/simulate_coverage.py --quick    # a tenth of the samples; the page is printed, nothing is written

Every sample comes from a population whose true value is known. Intervals are at 95 %, tests at 5 %.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from pages.render import simulation
from scipy import stats
from tqdm.auto import tqdm

from mechsafety.circuits.verification.statistics import independence_test, prompt_areas, rank_p
from mechsafety.intervals import MANY, ratio_intervals, wilson_interval
from mechsafety.metrics import adjust_p, sign_flip_p

SIZES = (7, 12, 20, 40)
RATES = (0.5, 0.7, 0.8, 0.9, 0.95)
# shares of all parts at which the simulated curves are measured, and their mean faithfulness there
K = np.array([0.0, 0.05, 0.1, 0.2, 0.5, 1.0])
CURVES = {
    "rises to 1": np.array([0.0, 0.1, 0.3, 0.6, 0.9, 1.0]),
    "at 1 early": np.array([0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
}

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
# each with mean 0 and standard deviation 1 but for the heavy tails, whose scale is that of Student's t
NOISE: dict[str, Draw] = {
    "normal": lambda rng, size: rng.normal(size=size),
    "skewed": lambda rng, size: (rng.lognormal(0, 0.5, size) - math.exp(0.125)) / 0.6039,
    "very skewed": lambda rng, size: (rng.lognormal(0, 1, size) - math.exp(0.5)) / 2.1612,
    "heavy tails": lambda rng, size: rng.standard_t(3, size),
    "bounded": lambda rng, size: (rng.beta(2, 5, size) - 2 / 7) / 0.1597,
    "half zeros": lambda rng, size: (np.where(rng.random(size) < 0.5, 0, rng.beta(2, 5, size)) - 1 / 7) / 0.1819,
}


def held(ends: np.ndarray, truth: float) -> dict[str, float]:
    """Share of the intervals [sample 2] that hold the truth; and of those that have no end on a side."""
    inside = (ends[:, 0] <= truth) & (truth <= ends[:, 1])
    return {"held": float(inside.mean()), "unbounded": float(np.isinf(ends).any(1).mean())}


def all_intervals(
    method: Callable[..., list[tuple[float, float]]], parts: np.ndarray, wholes: np.ndarray
) -> np.ndarray:
    """Intervals of all rows, twenty seeds in turn."""
    ends = np.zeros((len(parts), 2))
    for k in range(20):
        ends[k::20] = method(parts[k::20], wholes[k::20], seed=k)
    return ends


def means(samples: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Means of every kind of value."""
    for name, draw in NOISE.items():
        for n in SIZES:
            values = 1 + draw(rng, (samples, n))
            ends = all_intervals(ratio_intervals, values, np.ones_like(values))
            yield {"of": "mean", "data": name, "n": n, **held(ends, 1.0)}


def ratios(samples: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Shares of a gap that is far from 0 on every prompt, and ratios to one that is not."""
    for kind, spread, scale in (("share of the gap", 0.3, 0.3), ("ratio", 0.6, 0.5)):
        for name, draw in NOISE.items():
            for n in SIZES:
                whole = 1 + spread * rng.normal(size=(samples, n))
                part = 0.4 * whole + scale * draw(rng, (samples, n))
                ends = all_intervals(ratio_intervals, part, whole)
                yield {"of": kind, "data": name, "n": n, **held(ends, 0.4)}


def rates(*_: Any) -> Iterator[dict[str, Any]]:
    """Wilson's interval, exactly: summed over all outcomes of the binomial distribution."""
    for rate in RATES:
        for n in SIZES:
            hits = np.arange(n + 1)
            ends = np.array([wilson_interval(int(k), n) for k in hits])
            inside = (ends[:, 0] <= rate) & (rate <= ends[:, 1])
            found = float(stats.binom.pmf(hits, n, rate)[inside].sum())
            yield {"of": "rate", "data": f"{rate:g}", "n": n, "held": found, "unbounded": 0.0}
    grid = (np.arange(1000) + 0.5) / 1000
    for n in SIZES:
        ends = np.array([wilson_interval(k, n) for k in range(n + 1)])
        inside = (ends[:, :1] <= grid) & (grid <= ends[:, 1:])
        pmf = stats.binom.pmf(np.arange(n + 1)[:, None], n, grid)
        yield {"of": "rate", "data": "all", "n": n, "held": float((pmf * inside).sum(0).mean()), "unbounded": 0.0}


def areas(samples: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """CMD and CPR of curves that rise to 1 and of curves that are at 1 early, where CMD cannot be below 0."""
    for curve, mean in CURVES.items():
        truth = np.trapezoid(np.abs(1 - mean), K), np.trapezoid(mean, K)
        for name in ("normal", "very skewed", "heavy tails"):
            for n in SIZES:
                gaps = 1 + 0.3 * rng.normal(size=(samples, n))
                own = 0.2 * NOISE[name](rng, (1, samples, n)) + 0.1 * rng.normal(size=(len(K), samples, n))
                own[[0, -1]] = 0.0  # nothing kept and everything kept are known
                scores = mean[:, None, None] * gaps + own
                parts = [prompt_areas(K, scores[:, k], gaps[k], np.zeros(n)) for k in range(samples)]
                for place, area in enumerate(("CMD", "CPR")):
                    ends = all_intervals(ratio_intervals, np.array([part[place] for part in parts]), gaps)
                    yield {"of": f"{area}, {curve}", "data": name, "n": n, **held(ends, truth[place])}


def others(samples: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """What other intervals of a mean hold on the same kinds of values."""
    fewer = max(50, samples // 2)
    for name in ("normal", "very skewed", "heavy tails", "half zeros"):
        for n in SIZES:
            values = 1 + NOISE[name](rng, (fewer, n))
            for method in ("percentile", "BCa"):
                with warnings.catch_warnings(action="ignore"):  # of samples of one value repeated
                    found = stats.bootstrap(
                        (values,), np.mean, axis=1, n_resamples=1000, method=method, rng=rng, batch=100
                    ).confidence_interval
                ends = np.stack([found.low, found.high], 1)
                ends = np.where(np.isnan(ends), values.mean(1, keepdims=True), ends)
                yield {"method": method, "data": name, "n": n, **held(ends, 1.0)}
            error = stats.sem(values, axis=1)
            half = stats.t.ppf(0.975, n - 1) * error
            ends = np.stack([values.mean(1) - half, values.mean(1) + half], 1)
            yield {"method": "Student's t", "data": name, "n": n, **held(ends, 1.0)}
            # of resamples of one value repeated, nothing
            drawn = values[:, rng.integers(n, size=(1000, n))]
            with np.errstate(invalid="ignore", divide="ignore"):
                t = (drawn.mean(-1) - values.mean(1, keepdims=True)) / (drawn.std(-1, ddof=1) / math.sqrt(n))
            low, high = np.nanquantile(np.where(np.isfinite(t), t, np.nan), [0.025, 0.975], axis=1)
            ends = np.stack([values.mean(1) - high * error, values.mean(1) - low * error], 1)
            yield {"method": "studentised", "data": name, "n": n, **held(ends, 1.0)}


def tests(samples: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """How often each test rejects what is true, at 5 %."""
    for name in ("normal", "very skewed", "heavy tails"):
        for n in SIZES:
            values = NOISE[name](rng, (samples, n))
            p = np.concatenate([sign_flip_p(values[k::10], seed=k) for k in range(10)])
            yield {"test": "sign flips", "data": name, "n": n, "rejected": float((p < 0.05).mean())}
    for n in (20, 100, 200):
        p = np.array([rank_p(row[0], row[1:]) for row in rng.normal(size=(samples, n + 1))])
        yield {"test": "random circuits", "data": f"{n} circuits", "n": n, "rejected": float((p < 0.05).mean())}
    for n in SIZES:
        some = max(50, samples // 10)
        pairs = [(rng.normal(size=n), rng.normal(size=n)) for _ in range(some)]
        p = np.array([independence_test(x, y, k, 200).p_value for k, (x, y) in enumerate(pairs)])
        yield {"test": "independence", "data": "normal", "n": n, "rejected": float((p < 0.05).mean())}
    for share in (0.0, 0.1):
        for n in (12, 14, 20, 40):
            yield {"test": f"sweep, {share:.0%} real", "data": "normal", "n": n, **sweep(samples, n, share, rng)}


def sweep(samples: int, n: int, share: float, rng: np.random.Generator) -> dict[str, float]:
    """Sweeps over 300 parts, correlated within each prompt; of those real the effect is two standard deviations.

    ``rejected``: the mean share of what is rejected that is not real, what Benjamini and Hochberg bound at 5 %.
    """
    false, found = [], []
    real = np.arange(300) < 300 * share
    for k in range(max(5, samples // 40)):
        values = 0.6 * rng.normal(size=(1, n)) + 0.8 * rng.normal(size=(300, n)) + 2.0 * real[:, None]
        chosen = adjust_p(sign_flip_p(values, seed=k)) < 0.05
        false.append((chosen & ~real).sum() / max(1, chosen.sum()))
        found.append(chosen[real].mean() if share else 0.0)
    return {"rejected": float(np.mean(false)), "found": float(np.mean(found))}


PARTS = {"coverage": (means, ratios, rates, areas), "others": (others,), "tests": (tests,)}


def simulate(samples: int, seed: int) -> dict[str, Any]:
    """All tables."""
    store: dict[str, Any] = {"samples": samples, "seed": seed, "many": MANY}
    for name, parts in PARTS.items():
        store[name] = []
        for part in parts:
            # a generator of its own each, so that a part can be run again by itself
            rng = np.random.default_rng([seed, *map(ord, part.__name__)])
            for row in tqdm(part(samples, rng), desc=part.__name__):
                store[name].append({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()})
    return store


if __name__ == "__main__":
    simulation("coverage", __doc__, simulate, few=100, many=1000)
