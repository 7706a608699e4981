"""Checks of a circuit: controls, intervals, areas, each against its definition."""

import dataclasses
import importlib
import itertools

import numpy as np
import pytest

import mechsafety as ms
from mechsafety.attribution import node_attribution
from mechsafety.circuits.budget import Budget
from mechsafety.circuits.circuit import CurvePoint
from mechsafety.circuits.faithfulness import FaithfulnessMeter
from mechsafety.circuits.search import marginals, search_nodes
from mechsafety.circuits.verification.statistics import independence_test
from mechsafety.circuits.verification.verify import completeness, curve_areas, mib_points, random_circuits, verify
from mechsafety.intervals import ratio_interval
from mechsafety.metrics import adjust_p
from mechsafety.nodes import Node, head_and_mlp_nodes
from mechsafety.patching import pair_runs

SMALL = {"target": 0.8, "n_random": 40, "n_added": 11, "seed": 5}


@pytest.fixture(scope="module")
def found(planted):
    model, pairs = planted
    metric = ms.RefusalLogOdds.of(model, ["sorry"], ["sure"])
    meters = [FaithfulnessMeter(model, pair_runs(model, part), metric) for part in pairs.halves()]
    attribution = node_attribution(model, meters[0].runs, metric)
    return meters, search_nodes(*meters, attribution, 0.8)


@pytest.fixture(scope="module")
def check(found):
    (found_on, held_out), discovery = found
    return verify(discovery, found_on, held_out, topics=["explosives"], **SMALL)


def test_everything_by_its_definition(found, check):
    (found_on, held_out), discovery = found
    circuit = discovery.circuit
    harmful, harmless = held_out.ends()
    gap = harmful.mean() - harmless.mean()
    assert check.faithfulness == pytest.approx(found_on.faithfulness([circuit])[0], abs=1e-6)
    assert check.held_out_faithfulness == pytest.approx(held_out.faithfulness([circuit])[0], abs=1e-6)
    removed = held_out.removed([circuit])[0]
    assert check.necessity == pytest.approx((harmful.mean() - removed.mean()) / gap, abs=1e-6)
    low, high = check.held_out_ci
    assert low < check.held_out_faithfulness < high
    kept = held_out.kept([circuit])[0] - harmless
    assert check.held_out_ci == pytest.approx(ratio_interval(kept, harmful - harmless, 5), abs=1e-5)
    drawn = random_circuits(held_out, circuit, 40, 5)
    for controls, values, own in (
        (check.random_controls, held_out.faithfulness(drawn), check.held_out_faithfulness),
        (check.necessity_controls, [1 - value for value in held_out.without(drawn)], check.necessity),
    ):
        assert (controls.n, controls.mean, controls.highest) == (
            40,
            pytest.approx(np.mean(values)),
            pytest.approx(max(values)),
        )
        assert controls.p_value == pytest.approx((1 + sum(value >= own for value in values)) / 41)
    assert check.random_controls.p_value < 0.1 and check.necessity_controls.p_value < 0.2
    assert check.minimality == pytest.approx({str(n): v for n, v in marginals(held_out, circuit).items()})
    assert check.curve == discovery.curve and (check.cmd, check.cpr) == curve_areas(mib_points(discovery.curve))
    assert (check.target, check.reached, check.held_out_topics) == (0.8, True, ("explosives",))
    without = held_out.kept([[part for part in circuit if part != circuit[0]]])[0]
    lost = held_out.kept([circuit])[0] - without
    assert check.minimality_ci[str(circuit[0])] == pytest.approx(ratio_interval(lost, harmful - harmless, 5), abs=1e-5)
    assert check.minimality_null is None, "fewer than 20 parts were added"
    assert check.independence == independence_test(harmful, removed, 5)


def test_intervals_of_the_areas(found, check):
    (_, held_out), discovery = found
    harmful, harmless = held_out.ends()
    for (low, high), value in ((check.cmd_ci, check.cmd), (check.cpr_ci, check.cpr)):
        assert low < value < high
    # by hand: the scores of the curve's points are those of its circuits, and each prompt has an area of its own
    points = mib_points(discovery.curve)
    rows = [list(discovery.curve).index(point) for point in points]
    scores = np.array(discovery.curve_scores)[rows]
    size = points[4].n_nodes
    np.testing.assert_allclose(scores[4], held_out.kept([discovery.ranking[:size]])[0], atol=1e-5)
    steps, gap = np.diff([point.k for point in points]), harmful - harmless

    def area(values):
        return ((values[1:] + values[:-1]) / 2 * steps[:, None]).sum(0)

    under, missing = area(scores - harmless), harmful - scores
    assert check.cpr == pytest.approx(under.mean() / gap.mean(), abs=1e-5)
    assert check.cpr_ci == pytest.approx(ratio_interval(under, gap, 5), abs=1e-5)
    beside = area(missing * np.sign(missing.mean(1, keepdims=True)))
    assert check.cmd == pytest.approx(beside.mean() / gap.mean(), abs=1e-5)
    assert check.cmd_ci == pytest.approx(ratio_interval(beside, gap, 5), abs=1e-5)


def test_interval_of_the_completeness(found, check):
    (_, held_out), discovery = found
    low, high = check.completeness_ci
    assert low <= check.completeness + 1e-6 and high >= check.completeness - 1e-6
    gone = [part for part in discovery.circuit if str(part) in check.completeness_without]
    rest = [part for part in discovery.circuit if part not in gone]
    harmful, harmless = held_out.ends()
    gap = held_out.kept([rest])[0] - held_out.removed([gone])[0]
    assert (low, high) == pytest.approx(ratio_interval(gap * np.sign(gap.mean()), harmful - harmless, 5), abs=1e-5)


def test_the_verdict_is_on_the_circuit_as_it_is_now(found):
    """Backups may join and unconnected nodes leave after the search has said that the target is reached."""
    (found_on, held_out), discovery = found
    less = dataclasses.replace(discovery, circuit=discovery.circuit[:1], reached=True)
    assert not verify(less, found_on, held_out, **SMALL).reached
    whole = dataclasses.replace(discovery, circuit=tuple(held_out.parts), reached=False)
    assert verify(whole, found_on, held_out, **SMALL).reached


def test_the_same_seed_gives_the_same_numbers(found, check):
    (found_on, held_out), discovery = found
    assert verify(discovery, found_on, held_out, topics=["explosives"], **SMALL) == check
    other = verify(discovery, found_on, held_out, **{**SMALL, "seed": 6})
    assert other.random_controls != check.random_controls
    assert other.held_out_faithfulness == check.held_out_faithfulness


def test_a_circuit_no_better_than_chance_is_shown_as_failed(found):
    (found_on, held_out), discovery = found
    useless = dataclasses.replace(discovery, circuit=(Node("head", 0, 0), Node("head", 2, 3)), reached=False)
    check = verify(useless, found_on, held_out, target=0.8, n_random=20)
    assert check.random_controls.p_value > 0.2 and check.held_out_faithfulness < 0.3 and not check.reached
    verdicts = {claim.name: claim.passed for claim in check.claims}
    assert not any(verdicts[name] for name in ("faithfulness", "sufficiency", "necessity", "completeness"))
    assert {claim.name for claim in check.failed} >= {"faithfulness", "sufficiency"}


def test_random_circuits_have_the_same_sizes(found):
    (_, held_out), _ = found
    circuit = [Node("head", 0, 0), Node("head", 0, 1), Node("head", 2, 3), Node("mlp", 1)]
    drawn = random_circuits(held_out, circuit, 25, 7)
    for nodes in drawn:
        assert len(set(nodes)) == len(nodes) == 4
        assert sorted(node.kind for node in nodes) == ["head", "head", "head", "mlp"]
    assert len({frozenset(nodes) for nodes in drawn}) > 20
    assert random_circuits(held_out, circuit, 25, 7) == drawn != random_circuits(held_out, circuit, 25, 8)


def test_p_counts_ties_and_the_circuit_itself(found, monkeypatch):
    (found_on, held_out), discovery = found
    actual = held_out.faithfulness([discovery.circuit])[0]
    fixed = np.array([actual + 1] * 3 + [actual - 1] * 5 + [-9.0])
    verify_module = importlib.import_module("mechsafety.circuits.verification.verify")
    monkeypatch.setattr(verify_module, "_random_values", lambda *args: fixed)
    check = verify(discovery, found_on, held_out, target=0.8, n_random=9)
    assert check.random_controls.p_value == pytest.approx((1 + 3) / (1 + 9))


def test_minimality_against_parts_added_at_random(found, monkeypatch):
    (found_on, held_out), discovery = found
    circuit = discovery.circuit
    monkeypatch.setattr(importlib.import_module("mechsafety.circuits.verification.verify"), "MIN_ADDED", 5)
    check = verify(discovery, found_on, held_out, **SMALL)
    outside = [node for node in head_and_mlp_nodes(3, 4) if node not in circuit]
    assert len(outside) == 11, "all of them are added, one at a time"
    whole = held_out.faithfulness([circuit])[0]
    null = np.abs([held_out.faithfulness([[*circuit, node]])[0] - whole for node in outside])
    costs = marginals(held_out, circuit)
    expected = adjust_p(np.array([(1 + (null >= cost).sum()) / 12 for cost in costs.values()]))
    assert check.minimality_p == pytest.approx(dict(zip(map(str, costs), expected, strict=True)))
    assert max(check.minimality_p.values()) < 0.2 and null.max() < min(costs.values())


def test_too_few_parts_outside_say_so(check):
    (claim,) = [claim for claim in check.claims if claim.name == "minimality"]
    assert check.minimality_p is None and check.minimality is not None
    assert (claim.passed, claim.reason) == (None, "too few parts outside the circuit for a p below 0.05")


def test_completeness_is_the_largest_difference(found):
    (_, held_out), discovery = found
    circuit = discovery.circuit
    subsets = [list(some) for n in range(len(circuit) + 1) for some in itertools.combinations(circuit, n)]
    rest = [[node for node in circuit if node not in gone] for gone in subsets]
    gaps = np.abs(np.array(held_out.faithfulness(rest)) - held_out.without(subsets))
    value, gone = completeness(held_out, circuit, circuit, steps=len(circuit), width=len(circuit))
    place = [set(some) for some in subsets].index(set(gone))
    assert value == pytest.approx(gaps[place], abs=1e-5), "the difference at the subset that it names"
    assert value >= max(gaps[0], gaps[-1]) - 1e-5, "the empty and the whole subset count"
    singles = [k for k, some in enumerate(subsets) if len(some) == 1]
    assert value >= max(gaps[singles]) - 1e-5 and value == pytest.approx(gaps.max(), abs=1e-5)
    assert completeness(held_out, circuit, circuit, steps=0, width=3)[0] == pytest.approx(max(gaps[0], gaps[-1]))


def test_an_incomplete_circuit_is_found_out(found):
    """Without its first head the model still has the others, and the circuit that lacks them has nothing."""
    (_, held_out), discovery = found
    part = discovery.circuit[:1]
    value, _ = completeness(held_out, part, part, steps=1, width=1)
    assert value > 0.3


def test_what_time_leaves_no_room_for_is_none_and_noted(found):
    (found_on, held_out), discovery = found
    ticks = itertools.count()
    budget = Budget(1e-9, clock=lambda: float(next(ticks)))
    check = verify(discovery, found_on, held_out, target=0.8, budget=budget)
    assert check.minimality is None and check.completeness is None and check.side_effects is None
    assert check.random_controls.n == check.necessity_controls.n == 0 and np.isnan(check.random_controls.p_value)
    assert check.held_out_faithfulness > 0.8, "the figures that everything rests on are measured"
    unmeasured = {claim.name for claim in check.claims if claim.passed is None}
    assert {"sufficiency", "necessity", "minimality", "completeness", "harmless prompts"} <= unmeasured
    assert budget.cut == (
        "random circuits, kept: 0 of 40 done",
        "random circuits, removed: 0 of 40 done",
        "minimality: left out",
        "side effects on harmless prompts: left out",
    )


def test_areas_of_known_curves():
    def curve(points):
        return [CurvePoint(k, 0, 9.0, value) for k, value in points]  # the search's own pairs do not count

    assert curve_areas(curve([(0, 0.0), (1, 1.0)])) == pytest.approx((0.5, 0.5))
    assert curve_areas(curve([(0, 1.0), (0.5, 1.0), (1, 1.0)])) == pytest.approx((0.0, 1.0))
    assert curve_areas(curve([(0, 0.0), (0.5, 0.5), (1, 0.5)])) == pytest.approx((0.625, 0.375))
    assert curve_areas(curve([(0, 1.5), (1, 1.5)])) == pytest.approx((0.5, 1.5)), "above 1 counts against"


def test_areas_are_taken_over_the_grid_of_the_benchmark():
    sizes = [0, 1, 2, 5, 10, 20, 50, 60, 100, 150, 200, 500, 700, 1000]
    points = mib_points([CurvePoint(n / 1000, n, 0.0, 0.0) for n in sizes])
    assert [point.n_nodes for point in points] == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]


def test_checks_of_many_runs_use_the_control_pairs(found, planted):
    """Random circuits, minimality and their p are of the control pairs, every other figure of all pairs."""
    (found_on, held_out), discovery = found
    model, pairs = planted
    few = FaithfulnessMeter(model, pair_runs(model, ms.PromptPairs(pairs.halves()[1].pairs[:2])), held_out.metric)
    less = dataclasses.replace(discovery, circuit=discovery.circuit[1:], reached=False)
    check = verify(less, found_on, held_out, controls=few, **SMALL)
    plain = verify(less, found_on, held_out, **SMALL)
    own, everywhere = (meter.faithfulness([less.circuit])[0] for meter in (few, held_out))
    assert own != pytest.approx(everywhere, abs=1e-3), "else the test could not tell them apart"
    assert check.random_controls.observed == pytest.approx(own, abs=1e-5) and check.random_controls.n_pairs == 2
    values = few.faithfulness(random_circuits(few, less.circuit, 40, SMALL["seed"]))
    assert check.random_controls.p_value == pytest.approx((1 + sum(value >= own for value in values)) / 41)
    assert check.minimality == pytest.approx({str(n): v for n, v in marginals(few, less.circuit).items()}, abs=1e-5)
    assert (check.necessity, check.independence) == (plain.necessity, plain.independence)
    assert check.completeness >= abs(1 - everywhere) - 1e-5, "no smaller than what is lost without any part gone"
    said = {claim.name: claim.criterion for claim in check.claims}
    assert said["sufficiency"].endswith(", on 2 of the pairs") and said["minimality"].endswith("; on 2 of the pairs")
    assert not any("of the pairs" in claim.criterion for claim in plain.claims)
