"""Equivalence and independence tests against what they must say of made-up numbers."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from mechsafety.circuits.verification.statistics import equivalence_test, independence_test, rank_p, ratio
from mechsafety.intervals import ratio_interval


def test_equivalence_is_not_the_absence_of_a_difference():
    rng = np.random.default_rng(0)
    close, far, vague = rng.normal(0.0, 0.05, 20), rng.normal(0.3, 0.05, 20), rng.normal(0.0, 2.0, 5)
    assert equivalence_test(close, 0.2).p_value < 1e-6
    assert equivalence_test(far, 0.2).p_value > 0.99
    found = equivalence_test(vague, 0.2)
    assert ttest_1samp(vague, 0.0).pvalue > 0.05 and found.p_value > 0.05, "too few, too spread: nothing is shown"


def test_equivalence_agrees_with_its_interval():
    rng = np.random.default_rng(1)
    for _ in range(60):
        values = rng.normal(rng.uniform(-0.3, 0.3), 0.2, rng.integers(3, 12))
        found = equivalence_test(values, 0.2)
        inside = found.ci[0] > -0.2 and found.ci[1] < 0.2
        assert inside == (found.p_value < 0.05) and found.difference == pytest.approx(values.mean())


def test_equivalence_of_constants():
    assert equivalence_test(np.full(4, 0.1), 0.2).p_value == 0.0
    assert equivalence_test(np.full(4, 0.3), 0.2).p_value == 1.0
    assert equivalence_test(np.array([0.0]), 0.2).p_value == 1.0, "one prompt shows nothing"


def test_independence_by_its_definition():
    rng = np.random.default_rng(2)
    x = rng.normal(size=12)

    def kernel(values):
        distances = np.abs(values[:, None] - values[None])
        width = np.median(distances[np.triu_indices(12, 1)])
        return np.exp(-(distances**2) / (2 * width**2))

    y, centre = x**2, np.eye(12) - 1 / 12
    expected = np.trace(kernel(x) @ centre @ kernel(y) @ centre) / 144
    assert independence_test(x, y, 0).hsic == pytest.approx(expected)


def test_dependence_is_seen_and_independence_is_not_rejected_too_often():
    rng = np.random.default_rng(3)
    x = rng.normal(size=30)
    assert independence_test(x, x**2, 0).p_value < 0.01, "a correlation would not see this one"
    p_values = [independence_test(rng.normal(size=15), rng.normal(size=15), k, 200).p_value for k in range(60)]
    assert np.mean(np.array(p_values) < 0.05) < 0.15 and 0.3 < np.mean(p_values) < 0.7
    assert independence_test(x, x, 4, 99).p_value == 0.01
    assert independence_test(x, x**3, 5) == independence_test(x, x**3, 5)
    assert independence_test(np.ones(5), x[:5], 0).p_value == 1.0, "what does not vary depends on nothing"


def test_ratios():
    part, whole = np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])
    assert ratio(part, whole) == 0.5 and ratio_interval(part, whole, 0) == pytest.approx((0.5, 0.5))
    assert rank_p(2.0, np.array([1.0, 2.0, 3.0])) == 0.75
