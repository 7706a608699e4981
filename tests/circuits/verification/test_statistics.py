"""The independence test against what it must say of made-up numbers."""

import numpy as np
import pytest

from mechsafety.circuits.verification.statistics import independence_test, rank_p, ratio
from mechsafety.intervals import ratio_interval


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


def test_the_correlation_and_its_interval_by_fishers_transformation():
    rng = np.random.default_rng(6)
    x = rng.normal(size=20)
    y = x + rng.normal(size=20)
    found = independence_test(x, y, 0)
    r = np.corrcoef(x, y)[0, 1]
    ends = np.tanh(np.arctanh(r) + np.array([-1, 1]) * 1.959964 / np.sqrt(17))
    assert found.correlation == pytest.approx(r) and found.ci == pytest.approx(tuple(ends), abs=1e-6)
