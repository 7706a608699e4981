"""The 95 % intervals of means, ratios and rates over prompts, with one definition per kind.

``scripts/simulate_coverage.py`` simulates how often they contain the true value. The table is in
``docs/results/coverage.md``.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float

from mechsafety.errors import MechsafetyError

# with at least this many values the percentile bootstrap covers; with 40 skewed or heavy-tailed values it covers less
# than 93 %
MANY = 50
# with fewer values than this, too few resamples differ from one another for a studentised bootstrap
FEW = 5
RESAMPLES = 2000
UNBOUNDED = (-np.inf, np.inf)


@lru_cache(maxsize=4096)
def wilson_interval(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a rate (scipy).

    Raises:
        MechsafetyError: There is no trial.

    Example:
        >>> low, high = wilson_interval(9, 10)
        >>> round(low, 3), round(high, 3)
        (0.596, 0.982)
    """
    from scipy.stats import binomtest

    if n < 1:
        raise MechsafetyError(f"a rate of {n} prompts", expected="at least 1")
    interval = binomtest(hits, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: Any, seed: int = 0, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the mean over prompts.

    With fewer than `MANY` prompts, each end is the wider of Student's t and the studentised bootstrap (see
    `ratio_intervals`). With `MANY` prompts or more, it is a percentile bootstrap (scipy, 2,000 resamples).

    Args:
        values: One value per prompt.
        seed: Seed of the resampling.
        confidence: Confidence of the interval.

    Returns:
        Both ends. If several values are all equal, the interval is a point. A single value bounds nothing, so its
        interval is unbounded.

    Raises:
        MechsafetyError: There is no value, or a value is not finite.

    Example:
        >>> low, high = mean_interval([1.0, 2.0, 3.0, 4.0])  # Student's t, 3 degrees of freedom
        >>> round(low, 3), round(high, 3)
        (0.446, 4.554)
    """
    data = np.asarray(values, dtype=np.float64)
    return ratio_intervals(data[None], np.ones_like(data), seed, confidence=confidence)[0]


def mean_of_known(values: Any) -> tuple[float, float, float]:
    """Mean of the values that are not NaN, and its interval (`mean_interval`); NaN where there are none.

    Example:
        >>> value, low, high = mean_of_known([1.0, 2.0, float("nan"), 3.0, 4.0])
        >>> round(value, 3), round(low, 3), round(high, 3)
        (2.5, 0.446, 4.554)
    """
    data = np.asarray(values, dtype=np.float64)
    known = data[~np.isnan(data)]
    return (float(known.mean()), *mean_interval(known)) if len(known) else (float("nan"),) * 3


def perplexity_of(losses: Any) -> tuple[float, float, float]:
    """Perplexity in which every prompt counts equally, and its interval: `exp` of the mean loss per token (in nats).

    Example:
        >>> [round(end, 2) for end in perplexity_of([0.0, 1.0, 2.0, float("nan")])]
        [2.72, 0.23, 32.59]
    """
    value, low, high = np.exp(mean_of_known(losses)).tolist()
    return value, low, high


def ratio_interval(
    part: Any, whole: Any, seed: int = 0, n: int = RESAMPLES, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of the ratio of two means over the same prompts; see `ratio_intervals`.

    Example:
        >>> low, high = ratio_interval([1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 8.5])
        >>> round(low, 3), round(high, 3)
        (0.465, 0.652)
    """
    return ratio_intervals(np.asarray(part)[None], whole, seed, n, confidence)[0]


def ratio_intervals(
    parts: Float[np.ndarray, "row prompt"],
    whole: Any,
    seed: int = 0,
    n: int = RESAMPLES,
    confidence: float = 0.95,
) -> list[tuple[float, float]]:
    """Interval of mean(part) / mean(whole) for each row of ``parts``, over the same prompts.

    With fewer than `MANY` prompts, it is Fieller's interval (1954):

    1. For a ratio r, take the t statistic of the differences ``part - r * whole``.
    2. The interval holds all ratios r whose t statistic lies between two critical values.
    3. Each critical value is the wider of two: Student's t, and the studentised bootstrap of the differences at the
       observed ratio. Student's t is right for symmetric and heavy-tailed values, the bootstrap for skewed values.
    4. If the bootstrap's critical value gives no end and Student's gives one, the end is the wider of Student's end and
       ``ratio - value * standard error``. Here ``value`` is the bootstrap's critical value.

    With `MANY` prompts or more, it is a percentile bootstrap (scipy).

    Args:
        parts: One value per prompt in each row.
        whole: One value per prompt, the same for all rows or one row each.
        seed: Seed of the resampling.
        n: Number of resamples.
        confidence: Confidence of the intervals.

    Returns:
        Both ends of each interval. If the ratio is the same on all prompts, the interval is a point. It is unbounded if
        there is only one prompt, or if the mean of ``whole`` cannot be told from 0.

    Raises:
        MechsafetyError: There is no prompt, the numbers of prompts differ, or a value is not finite.
    """
    rows, scale = np.atleast_2d(np.asarray(parts, dtype=np.float64)), np.asarray(whole, dtype=np.float64)
    for values in (rows, scale):
        _check(values)
    if scale.shape not in (rows.shape, rows.shape[1:]):
        raise MechsafetyError(f"values of shapes {rows.shape} and {scale.shape}", expected="one per prompt in both")
    scales = np.broadcast_to(scale, rows.shape)
    if rows.shape[1] >= MANY:
        return [_percentile(row, own, seed, n, confidence) for row, own in zip(rows, scales, strict=True)]
    found: list[tuple[float, float]] = []
    for first in range(0, len(rows), 1000):
        some = slice(first, first + 1000)
        found += _fieller(rows[some], scales[some], seed, n, confidence)
    return found


def _check(values: np.ndarray) -> None:
    if not values.shape[-1:] or not values.shape[-1]:
        raise MechsafetyError(f"values of shape {values.shape}", expected="one per prompt, of at least one prompt")
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise MechsafetyError(f"{bad} of {values.size} values are not finite", expected="numbers")


def _percentile(
    part: Float[np.ndarray, " prompt"], whole: Float[np.ndarray, " prompt"], seed: int, n: int, confidence: float
) -> tuple[float, float]:
    """Percentile bootstrap of the ratio of means (or of the mean of ``part``, if ``whole`` is 1 everywhere)."""
    from scipy.stats import bootstrap

    if not np.ptp(part - part.mean() / whole.mean() * whole):
        return (float(part.mean() / whole.mean()),) * 2
    constant = bool((whole == 1).all())
    found = bootstrap(
        (part,) if constant else (part, whole),
        np.mean if constant else lambda a, b, axis: a.mean(axis=axis) / b.mean(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=n,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def _fieller(
    rows: Float[np.ndarray, "row prompt"],
    wholes: Float[np.ndarray, "row prompt"],
    seed: int,
    n: int,
    confidence: float,
) -> list[tuple[float, float]]:
    from scipy.stats import t

    prompts = wholes.shape[1]
    # flip signs so that the whole is above 0; the ratio stays the same
    signs = np.sign(wholes.mean(axis=1, keepdims=True))
    rows, wholes = rows * signs, wholes * signs
    a, b = rows.mean(axis=1), wholes.mean(axis=1)
    if prompts < 2:
        return [UNBOUNDED] * len(rows)
    ratio = np.divide(a, b, out=np.zeros_like(a), where=b > 0)
    differences = rows - ratio[:, None] * wholes
    # differences that are 0 up to rounding count as no spread
    sizes = np.maximum(np.abs(rows).max(axis=1), np.abs(ratio) * np.abs(wholes).max(axis=1))
    spread = np.ptp(differences, axis=1) > 1e-12 * sizes
    lower, upper = _critical(differences, seed, n, confidence)
    centred, own = rows - a[:, None], wholes - b[:, None]
    degrees = prompts * (prompts - 1)
    v_aa, v_ab, v_bb = ((x * y).sum(axis=1) / degrees for x, y in ((centred, centred), (centred, own), (own, own)))

    error = np.sqrt(np.maximum(v_aa - 2 * ratio * v_ab + ratio**2 * v_bb, 0.0))

    def root(critical: np.ndarray, sign: int) -> np.ndarray:
        """The ratio, on one side, at which the t statistic squared is the critical value squared; NaN without one."""
        c = critical**2
        quadratic, linear, constant = b * b - c * v_bb, a * b - c * v_ab, a * a - c * v_aa
        edge = np.sqrt(np.maximum(linear**2 - quadratic * constant, 0.0))
        ends: np.ndarray = np.divide(linear + sign * edge, quadratic, out=np.full_like(a, np.nan), where=quadratic > 0)
        return ends

    student = np.full_like(a, t.ppf((1 + confidence) / 2, prompts - 1))
    ends = []
    for critical, sign in ((upper, -1), (lower, 1)):
        # the wider critical value may give no end; the end is then Student's, or the straight line's if that is wider
        line = ratio - critical * np.divide(error, b, out=np.full_like(a, np.inf), where=b > 0)
        plain = root(student, sign)
        wider = np.minimum(plain, line) if sign < 0 else np.maximum(plain, line)
        found = root(critical, sign)
        ends.append(np.where(np.isnan(found), wider, found))
    low, high = ends
    # if the whole's own mean may be 0 by Student's t, no ratio can be excluded
    known = np.isfinite(low) & np.isfinite(high)
    low, high = np.where(known, low, -np.inf), np.where(known, high, np.inf)
    # if the ratio is the same on all prompts, the interval is a point, unless the whole's mean is 0
    same = ~spread & (b > 0)
    low, high = np.where(same, ratio, low), np.where(same, ratio, high)
    return [(float(x), float(y)) for x, y in zip(low, high, strict=True)]


def _critical(
    differences: Float[np.ndarray, "row prompt"], seed: int, n: int, confidence: float
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """Lower and upper critical value of each row's t statistic: the wider of Student's and the bootstrap's."""
    from scipy.stats import t

    prompts, tail = differences.shape[1], (1 - confidence) / 2
    student = np.full(len(differences), t.ppf(1 - tail, prompts - 1))
    if prompts < FEW:
        return -student, student
    weights = _weights(prompts, seed, n)
    centred = differences - differences.mean(axis=1, keepdims=True)
    means, squares = weights @ centred.T, weights @ (centred**2).T
    variance = squares - means**2
    # a resample that repeats one value has no t statistic; here it gets 0, the middle
    real = variance > 1e-12 * (centred**2).mean(axis=1)
    statistics = np.where(real, means, 0.0) / np.sqrt(np.where(real, variance, 1.0) / (prompts - 1))
    drawn = np.quantile(statistics, [tail, 1 - tail], axis=0)
    return np.minimum(drawn[0], -student), np.maximum(drawn[1], student)


@lru_cache(maxsize=8)
def _weights(prompts: int, seed: int, n: int) -> Float[np.ndarray, "resample prompt"]:
    """Share of each prompt in the draws of each resample."""
    drawn = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=n) / prompts
    drawn.flags.writeable = False
    return drawn
