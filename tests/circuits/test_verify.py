"""Checks of a circuit: controls, intervals, areas, each against its definition."""

import dataclasses
import importlib

import numpy as np
import pytest

import mechsafety as ms
from mechsafety.attribution import node_attribution
from mechsafety.circuits.circuit import CurvePoint
from mechsafety.circuits.discover import FaithfulnessMeter, discover, marginals
from mechsafety.circuits.verify import curve_areas, random_faithfulness, verify
from mechsafety.nodes import Node
from mechsafety.patching import pair_runs


@pytest.fixture(scope="module")
def found(planted):
    model, pairs = planted
    metric = ms.RefusalLogOdds.of(model, ["sorry"], ["sure"])
    meters = [FaithfulnessMeter(model, pair_runs(model, part), metric) for part in pairs.halves()]
    attribution = node_attribution(model, meters[0].runs, metric)
    return meters, discover(*meters, attribution, 0.8)


def test_everything_by_its_definition(found):
    (found_on, held_out), discovery = found
    check = verify(discovery, found_on, held_out, target=0.8, topics=["explosives"], n_random=40, seed=5)
    circuit = discovery.circuit
    harmful, harmless = held_out.ends()
    assert check.faithfulness == pytest.approx(found_on.faithfulness([circuit])[0], abs=1e-6)
    assert check.held_out_faithfulness == pytest.approx(held_out.faithfulness([circuit])[0], abs=1e-6)
    lost = harmful.mean() - held_out.removed([circuit])[0].mean()
    assert check.necessity == pytest.approx(lost / (harmful.mean() - harmless.mean()), abs=1e-6)
    low, high = check.held_out_ci
    assert low < check.held_out_faithfulness < high
    per_prompt = (held_out.kept([circuit])[0] - harmless) / (harmful - harmless)
    assert min(per_prompt) - 1e-6 <= low and high <= max(per_prompt) + 1e-6
    random = random_faithfulness(held_out, circuit, 40, 5)
    controls = check.random_controls
    assert (controls.n, controls.mean, controls.highest) == (
        40,
        pytest.approx(random.mean()),
        pytest.approx(random.max()),
    )
    assert controls.p_value == (1 + (random >= check.held_out_faithfulness).sum()) / 41 < 0.1
    assert check.minimality == pytest.approx({str(n): v for n, v in marginals(held_out, circuit).items()})
    assert check.curve == discovery.curve and (check.cmd, check.cpr) == curve_areas(discovery.curve)
    assert (check.target, check.reached, check.held_out_topics) == (0.8, True, ("explosives",))
    assert verify(discovery, found_on, held_out, target=0.8, topics=["explosives"], n_random=40, seed=5) == check
    other = verify(discovery, found_on, held_out, target=0.8, n_random=40, seed=6)
    assert other.random_controls != controls and other.held_out_faithfulness == check.held_out_faithfulness


def test_a_circuit_no_better_than_chance_has_a_large_p(found):
    (found_on, held_out), discovery = found
    useless = dataclasses.replace(discovery, circuit=(Node("head", 0, 0), Node("head", 2, 3)), reached=False)
    check = verify(useless, found_on, held_out, target=0.8, n_random=20)
    assert check.random_controls.p_value > 0.2 and check.held_out_faithfulness < 0.3 and not check.reached


def test_random_circuits_have_the_same_sizes(found, monkeypatch):
    (_, held_out), _ = found
    drawn, real = [], FaithfulnessMeter.faithfulness
    monkeypatch.setattr(FaithfulnessMeter, "faithfulness", lambda self, c: (drawn.extend(c), real(self, c))[1])
    circuit = [Node("head", 0, 0), Node("head", 0, 1), Node("head", 2, 3), Node("mlp", 1)]
    values = random_faithfulness(held_out, circuit, 25, 7)
    for nodes in drawn:
        assert len(set(nodes)) == len(nodes) == 4
        assert sorted(node.kind for node in nodes) == ["head", "head", "head", "mlp"]
    assert len({frozenset(nodes) for nodes in drawn}) > 20
    np.testing.assert_array_equal(random_faithfulness(held_out, circuit, 25, 7), values)
    assert not np.array_equal(random_faithfulness(held_out, circuit, 25, 8), values)


def test_p_counts_ties_and_the_circuit_itself(found, monkeypatch):
    (found_on, held_out), discovery = found
    actual = held_out.faithfulness([discovery.circuit])[0]
    fixed = np.array(
        [actual + 1, actual + 1, actual + 1, actual - 1, actual - 1, actual - 1, actual - 1, actual - 1, -9.0]
    )
    monkeypatch.setattr(
        importlib.import_module("mechsafety.circuits.verify"), "random_faithfulness", lambda *args: fixed
    )
    check = verify(discovery, found_on, held_out, target=0.8, n_random=9)
    assert check.random_controls.p_value == pytest.approx((1 + 3) / (1 + 9))


def test_areas_of_known_curves():
    def curve(points):
        return [CurvePoint(k, 0, 9.0, value) for k, value in points]  # the search's own pairs do not count

    assert curve_areas(curve([(0, 0.0), (1, 1.0)])) == pytest.approx((0.5, 0.5))
    assert curve_areas(curve([(0, 1.0), (0.5, 1.0), (1, 1.0)])) == pytest.approx((0.0, 1.0))
    assert curve_areas(curve([(0, 0.0), (0.5, 0.5), (1, 0.5)])) == pytest.approx((0.625, 0.375))
    assert curve_areas(curve([(0, 1.5), (1, 1.5)])) == pytest.approx((0.5, 1.5)), "above 1 counts against"
