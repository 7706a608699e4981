"""Intervals: each against its definition, and how often they hold the true value."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mechsafety.errors import MechsafetyError
from mechsafety.intervals import FEW, MANY, mean_interval, ratio_interval, ratio_intervals, wilson_interval


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_the_closed_formula(case):
    hits, n = case
    z, p = 1.959963984540054, hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = wilson_interval(hits, n)
    assert low == pytest.approx(max(0, centre - half), abs=1e-9)
    assert high == pytest.approx(min(1, centre + half), abs=1e-9)


@pytest.mark.parametrize("n", [2, 3, FEW - 1])
def test_of_very_few_values_it_is_students(n):
    values = np.random.default_rng(n).normal(3.0, 2.0, size=n)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert mean_interval(values) == pytest.approx((expected.low, expected.high))


def test_of_few_values_each_end_is_the_wider_of_two():
    values = np.random.default_rng(2).lognormal(size=12)
    mean, error = values.mean(), stats.sem(values)
    some = np.random.default_rng(7).choice(values, size=(40_000, 12))
    drawn = (some.mean(1) - mean) / stats.sem(some, axis=1)
    student = stats.t.ppf(0.975, 11)
    lower, upper = np.quantile(drawn, [0.025, 0.975])
    assert lower < -student and upper < student, "skewed: the two differ, on one side each way"
    assert mean_interval(values) == pytest.approx((mean - student * error, mean - lower * error), rel=0.1)


def test_of_many_values_it_is_the_percentile_bootstrap():
    values = np.random.default_rng(5).normal(3.0, 2.0, size=MANY)
    whole = values + np.random.default_rng(6).normal(5.0, size=MANY)
    options = {"method": "percentile", "n_resamples": 2000, "rng": np.random.default_rng(1)}
    expected = stats.bootstrap((values,), np.mean, **options).confidence_interval
    assert mean_interval(values, seed=1) == (expected.low, expected.high)
    options["rng"] = np.random.default_rng(1)

    def ratio(a, b, axis):
        return a.mean(axis) / b.mean(axis)

    expected = stats.bootstrap((values, whole), ratio, paired=True, vectorized=True, **options).confidence_interval
    assert ratio_interval(values, whole, seed=1) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("n", [12, 80])
def test_the_seed_decides_and_confidence_widens(n):
    values = np.random.default_rng(5).lognormal(size=n)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1) != mean_interval(values, seed=2)
    ends = [mean_interval(values, seed=1, confidence=level) for level in (0.8, 0.95, 0.99)]
    assert all(wide[0] < narrow[0] < narrow[1] < wide[1] for narrow, wide in pairwise(ends))


def test_a_ratio_of_few_is_fiellers():
    """Its ends are the ratios r at which a t-test of part - r * whole is just significant."""
    rng = np.random.default_rng(0)
    whole = rng.normal(5.0, 1.0, size=4)
    part = 0.4 * whole + rng.normal(0.0, 0.5, size=4)
    low, high = ratio_interval(part, whole)
    assert low < part.mean() / whole.mean() < high
    assert [stats.ttest_1samp(part - end * whole, 0.0).pvalue for end in (low, high)] == pytest.approx([0.05, 0.05])


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(2, MANY - 1), st.floats(0.1, 10.0), st.sampled_from([-1.0, 1.0]))
def test_ratios_scale_and_are_one_by_one_what_they_are_together(seed, n, scale, sign):
    rng = np.random.default_rng(seed)
    whole, parts = rng.normal(6.0, 1.0, size=n), rng.normal(1.0, 2.0, size=(3, n))
    together = ratio_intervals(parts, whole)
    np.testing.assert_allclose([ratio_interval(part, whole) for part in parts], together)
    scaled = ratio_intervals(parts * scale * sign, whole * sign)
    np.testing.assert_allclose(scaled, np.array(together) * scale, rtol=1e-6, atol=1e-9)
    wholes = np.stack([whole, 2 * whole, -whole])
    np.testing.assert_allclose(
        ratio_intervals(parts, wholes), [ratio_interval(part, own) for part, own in zip(parts, wholes, strict=True)]
    )
    low, high = ratio_interval(-parts[0], whole)
    assert low < -parts[0].mean() / whole.mean() < high


@pytest.mark.parametrize("n", [2, 7, MANY])
def test_what_does_not_vary_is_a_point(n):
    whole = np.random.default_rng(1).normal(4.0, 1.0, size=n)
    assert mean_interval(np.full(n, 2.5)) == (2.5, 2.5)
    assert ratio_interval(0.1 * whole, whole) == pytest.approx((0.1, 0.1), rel=1e-9)
    assert ratio_interval(0 * whole, whole) == (0.0, 0.0) and ratio_interval(whole, whole) == (1.0, 1.0)


def test_what_nothing_bounds_is_unbounded():
    everything = (-math.inf, math.inf)
    assert mean_interval([2.5]) == everything, "one value has no spread to judge by"
    assert ratio_interval([1.0], [2.0]) == everything
    assert ratio_interval([1.0, 2.0, 3.0], [-1.0, 1.0, 0.5]) == everything, "the whole may be 0"
    assert ratio_interval([1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]) == everything, "the whole is 0"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: mean_interval([]), r"values of shape \(1, 0\); expected one per prompt, of at least one prompt"),
        (lambda: mean_interval([1.0, math.nan, math.inf]), "2 of 3 values are not finite; expected numbers"),
        (lambda: ratio_interval([1.0, 2.0], [1.0, math.nan]), "1 of 2 values are not finite"),
        (lambda: ratio_intervals(np.array([[1.0, math.nan]]), [1.0, 1.0]), "1 of 2 values are not finite"),
        (
            lambda: ratio_interval([1.0, 2.0, 3.0], [1.0, 2.0]),
            r"values of shapes \(1, 3\) and \(2,\); expected one per prompt in both",
        ),
        (lambda: wilson_interval(0, 0), "a rate of 0 prompts; expected at least 1"),
    ],
)
def test_errors(call, text):
    with pytest.raises(MechsafetyError, match=text):
        call()


@pytest.mark.parametrize("n", [7, 12, 20, 40])
def test_they_hold_the_true_mean_as_often_as_they_say(n):
    """All samples at once, as rows; the percentile bootstrap, the control, does not at 7 values."""
    rng, held = np.random.default_rng(n), {}
    for name, values, truth in (
        ("normal", rng.normal(1.0, 1.0, size=(1500, n)), 1.0),
        ("skewed", rng.lognormal(0.0, 0.5, size=(1500, n)), math.exp(0.125)),
        ("heavy", 1.0 + rng.standard_t(3, size=(1500, n)), 1.0),
    ):
        ends = np.array(ratio_intervals(values, np.ones(n)))
        held[name] = ((ends[:, 0] <= truth) & (truth <= ends[:, 1])).mean()
    assert all(0.93 <= share <= 0.98 for share in held.values()), held
    if n == 7:
        values = rng.normal(1.0, 1.0, size=(400, n))
        drawn = values[:, rng.integers(n, size=(600, n))].mean(-1)
        low, high = np.quantile(drawn, [0.025, 0.975], axis=1)
        assert ((low <= 1.0) & (high >= 1.0)).mean() < 0.92
