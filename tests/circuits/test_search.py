"""Faithfulness against slow whole forwards, and the search on a model whose circuit is known."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from whole_forwards import patched_whole

import mechsafety as ms
from mechsafety.attribution import NodeAttribution, node_attribution
from mechsafety.circuits.budget import Budget
from mechsafety.circuits.edge_faithfulness import EdgeMeter
from mechsafety.circuits.faithfulness import FaithfulnessMeter, _cuts
from mechsafety.circuits.goal import Goal
from mechsafety.circuits.neurons import NeuronMeter
from mechsafety.circuits.search import CURVE_SHARES, _without_blocks, faithfulness_curve, marginals, search_nodes
from mechsafety.circuits.verification.stability import attribute_pairs
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Edge, Node, head_and_mlp_nodes
from mechsafety.patching import pair_runs
from mechsafety.sites import SiteKind

TRUE = (Node("head", 0, 1), Node("head", 1, 2), Node("mlp", 1), Node("head", 2, 0))
ALL = head_and_mlp_nodes(3, 4)


def slow_kept(model, pairs, metric, circuit):
    """Metric with every node outside the circuit patched: whole forwards, plain hooks."""
    tokens = model.tokenize_pairs(pairs)
    outside = [node for node in ALL if node not in circuit]
    return metric(patched_whole(model, tokens.harmful, tokens.harmless, outside))


@pytest.fixture(scope="module")
def metric(planted):
    return ms.RefusalLogOdds.of(planted[0], ["sorry"], ["sure"])


@pytest.fixture(scope="module")
def meters(planted, metric):
    model, pairs = planted
    return tuple(FaithfulnessMeter(model, pair_runs(model, part), metric) for part in pairs.halves())


@pytest.fixture(scope="module")
def attribution(meters, metric):
    return node_attribution(meters[0].model, meters[0].runs, metric)


CIRCUITS = [[], TRUE, list(TRUE)[:2], [Node("mlp", 0)], ALL[:7], ALL[3:], ALL]


def test_faithfulness_by_its_definition(any_model, pairs, log_odds):
    meter = FaithfulnessMeter(any_model, pair_runs(any_model, pairs), log_odds)
    harmful, harmless = (log_odds(any_model.logits(side)) for side in (pairs.harmful, pairs.harmless))
    kept, values = meter.kept(CIRCUITS), meter.faithfulness(CIRCUITS)
    for row, circuit in enumerate(CIRCUITS):
        slow = slow_kept(any_model, pairs, log_odds, circuit)
        np.testing.assert_allclose(kept[row], slow, atol=1e-4)
        expected = float((slow.mean() - harmless.mean()) / (harmful.mean() - harmless.mean()))
        assert values[row] == pytest.approx(expected, abs=2e-3)
    assert values[0] == pytest.approx(0.0, abs=1e-3), "without any node: the harmless run"
    assert values[-1] == pytest.approx(1.0, abs=1e-3), "with all nodes: the model itself"
    np.testing.assert_allclose(meter.ends()[0], harmful, atol=1e-4)
    np.testing.assert_allclose(meter.ends()[1], harmless, atol=1e-4)


def test_going_on_from_a_near_circuit_changes_nothing(any_model, pairs, log_odds):
    """What lies before the first difference is run once; the numbers are those of whole runs."""
    meter = FaithfulnessMeter(any_model, pair_runs(any_model, pairs), log_odds)
    for near in (TRUE, ALL[:9], ALL, []):
        smaller = [[node for node in near if node != gone] for gone in near]
        larger = [[*near, node] for node in ALL if node not in near]
        circuits = [near, *smaller, *larger[::-1], ALL[4:], []]
        np.testing.assert_allclose(meter.kept(circuits, near), meter.kept(circuits), atol=1e-4)


def test_going_on_from_a_near_circuit_in_small_batches(llama, pairs, log_odds):
    meter = FaithfulnessMeter(llama, pair_runs(llama, pairs), log_odds)
    small = FaithfulnessMeter(llama, pair_runs(llama, pairs, max_batch_tokens=1), log_odds)
    circuits = [[node for node in TRUE if node != gone] for gone in TRUE]
    np.testing.assert_allclose(small.kept(circuits, TRUE), meter.kept(circuits), atol=1e-5)


@pytest.fixture
def always_divided(monkeypatch):
    """Small batches are divided too: what a map's larger ones do is tested on small models."""
    monkeypatch.setattr("mechsafety.circuits.faithfulness.SMALL_BATCH", 0)


def test_pairs_in_groups_of_like_length(any_model, ragged, log_odds, always_divided):
    meter = FaithfulnessMeter(any_model, pair_runs(any_model, ragged), log_odds)
    groups = meter.grouped(2)
    rows = [row for rows, _ in groups.groups for row in rows]
    assert len(groups.groups) == 2 and sorted(rows) == list(range(len(ragged)))
    assert sum(len(r) * runs.harmful.n_pos for r, runs in groups.groups) < len(ragged) * meter.runs.harmful.n_pos
    np.testing.assert_allclose(groups.kept(CIRCUITS), meter.kept(CIRCUITS), atol=1e-4)
    smaller = [[node for node in TRUE if node != gone] for gone in TRUE]
    np.testing.assert_allclose(groups.kept(smaller, TRUE), meter.kept(smaller), atol=1e-4)
    np.testing.assert_allclose(groups.removed(CIRCUITS), meter.removed(CIRCUITS), atol=1e-4)


def test_small_batches_are_not_divided(llama, ragged, log_odds, monkeypatch):
    meter = FaithfulnessMeter(llama, pair_runs(llama, ragged), log_odds)
    groups = meter.grouped(2)
    cells = len(CIRCUITS) * len(ragged) * meter.runs.harmful.n_pos
    seen: list[int] = []
    scores_of = FaithfulnessMeter._scores_of
    monkeypatch.setattr(
        FaithfulnessMeter,
        "_scores_of",
        lambda self, runs, *rest: (seen.append(len(runs.harmful)), scores_of(self, runs, *rest))[1],
    )
    for limit, parts in ((cells, 1), (cells - 1, 2)):
        monkeypatch.setattr("mechsafety.circuits.faithfulness.SMALL_BATCH", limit)
        seen.clear()
        np.testing.assert_allclose(groups.kept(CIRCUITS), meter.kept(CIRCUITS), atol=1e-4)
        assert len(seen) == parts + 1 and sum(seen[:parts]) == len(ragged)


def test_groups_that_save_little_stay_together(llama, ragged, log_odds, monkeypatch):
    meter = FaithfulnessMeter(llama, pair_runs(llama, ragged), log_odds)
    monkeypatch.setattr("mechsafety.circuits.faithfulness.WORTH", 0.01)
    assert meter.grouped(2) is meter


def test_pairs_of_one_length_stay_together(any_model, pairs, log_odds):
    same = pairs.sample(1)
    meter = FaithfulnessMeter(any_model, pair_runs(any_model, same), log_odds)
    assert meter.grouped() is meter


def test_removed_is_kept_of_the_rest(any_model, pairs, log_odds):
    meter = FaithfulnessMeter(any_model, pair_runs(any_model, pairs), log_odds)
    rest = [[node for node in ALL if node not in circuit] for circuit in CIRCUITS]
    np.testing.assert_allclose(meter.removed(CIRCUITS), meter.kept(rest), atol=1e-5)
    np.testing.assert_allclose(meter.removed([ALL])[0], meter.ends()[1], atol=1e-4)


def test_bars_count_what_is_measured(llama, ragged, log_odds, recorded_bars, monkeypatch):
    monkeypatch.setattr("mechsafety.circuits.faithfulness.SMALL_BATCH", 0)
    shown = recorded_bars("mechsafety.circuits.faithfulness.progress_bar")
    runs = pair_runs(llama, ragged)
    meter = FaithfulnessMeter(llama, runs, log_odds, progress=True).grouped(2)
    meter.kept(CIRCUITS)
    meter.kept(CIRCUITS, TRUE)
    attribute_pairs(meter, steps=2)
    EdgeMeter(llama, runs, log_odds, progress=True).kept([[], []])
    totals = [2 * len(CIRCUITS), 2 * len(CIRCUITS), 2 * len(ragged), 2]
    assert [bar.n for bar in shown] == [bar.total for bar in shown] == totals
    assert FaithfulnessMeter(llama, runs, log_odds).bar(1).disable, "a meter shows none unless it is told to"


@pytest.mark.parametrize("target", [0.5, 0.8, 0.95])
def test_the_planted_circuit_is_found(meters, attribution, target):
    found_on, held_out = meters
    found = search_nodes(found_on, held_out, attribution, target)
    assert found.reached and set(found.circuit) <= set(TRUE) and found.minimal and found.ranked >= len(found.circuit)
    if target == 0.95:
        assert found.circuit == TRUE
    assert found_on.faithfulness([found.circuit])[0] >= target <= held_out.faithfulness([found.circuit])[0]
    for gone in found.circuit:
        smaller = [node for node in found.circuit if node != gone]
        assert min(meter.faithfulness([smaller])[0] for meter in meters) < target, "no node less does"


def test_a_part_that_only_the_held_out_pairs_need_stays(meters, attribution):
    """Removal looks further where the cheapest part may not leave on held-out pairs."""

    class Needs(FaithfulnessMeter):
        __slots__ = ()

        def faithfulness(self, circuits, near=None):
            return [0.9 if TRUE[1] in circuit else 0.1 for circuit in circuits]

    class Free(FaithfulnessMeter):
        __slots__ = ()

        def faithfulness(self, circuits, near=None):
            return [0.9 + 0.01 * sum(node != TRUE[1] for node in circuit) / 15 for circuit in circuits]

    made = [kind(meters[0].model, meters[0].runs, meters[0].metric) for kind in (Free, Needs)]
    found = search_nodes(*made, attribution, 0.8, rounds=20)
    assert found.circuit == (TRUE[1],) and found.minimal and found.reached


def test_a_largest_size(meters, attribution):
    found = search_nodes(*meters, attribution, 0.95, max_nodes=3)
    assert len(found.circuit) == 3 and not found.reached and found.minimal is None
    assert set(found.circuit) < set(TRUE)
    assert search_nodes(*meters, attribution, 0.95, max_nodes=4).reached


def test_removal_that_time_cuts_short(meters, attribution):
    ticks = iter(range(1000))
    budget = Budget(1e-9, clock=lambda: float(next(ticks)))
    found = search_nodes(*meters, attribution, 0.8, budget=budget)
    assert found.minimal is None and found.marginals == {} and len(found.circuit) == found.ranked < 15
    assert budget.cut == ("removal of parts that do not matter: stopped before no part could leave",)


def test_both_meters_must_reach_the_target(meters, attribution):
    class Weak(FaithfulnessMeter):
        """Held-out pairs on which every smaller circuit is less faithful."""

        __slots__ = ()

        def kept(self, circuits, near=None):
            harmless = self.ends()[1]
            shares = np.array([[len(circuit) / 15] for circuit in circuits])
            return harmless + (super().kept(circuits, near) - harmless) * shares

    found_on, held_out = meters
    weak = Weak(held_out.model, held_out.runs, held_out.metric)
    found = search_nodes(found_on, weak, attribution, 0.6)
    assert weak.faithfulness([found.circuit])[0] >= 0.6 and len(found.circuit) >= 8
    assert len(search_nodes(found_on, held_out, attribution, 0.6).circuit) <= 4


def test_a_target_that_is_out_of_reach(meters, attribution):
    found = search_nodes(*meters, attribution, 1.5)
    assert not found.reached
    smaller = [point for point in found.curve if point.n_nodes < 15]
    best = max(smaller, key=lambda point: (min(point.faithfulness, point.held_out), -point.n_nodes))
    assert len(found.circuit) == best.n_nodes
    assert list(found.circuit) == sorted(found.ranking[: best.n_nodes], key=lambda node: node.order)


def test_a_target_that_only_the_whole_model_reaches(meters, attribution):
    """The whole model is no circuit: what is shown is the best smaller set, as one that misses the target."""

    class Steep(FaithfulnessMeter):
        __slots__ = ()

        def kept(self, circuits, near=None):
            harmful, harmless = self.ends()
            return harmless + (harmful - harmless) * np.array([[0.99999995 if len(c) == 15 else 0.9] for c in circuits])

    found_on, held_out = meters
    steep = Steep(held_out.model, held_out.runs, held_out.metric)
    found = search_nodes(found_on, steep, attribution, 1.0)
    assert not found.reached and 0 < len(found.circuit) < 15


class Sum(FaithfulnessMeter):
    """Every part adds its own share, whatever else is there; some take away, and all together give 1."""

    __slots__ = ()
    SHARES = dict(zip(ALL, [0.5, -0.4, 0.4, 0.35, -0.3, 0.3, 0.25, -0.2, 0.1, *[0.0] * 6], strict=True))

    def kept(self, circuits, near=None):
        harmful, harmless = self.ends()
        shares = np.array([[sum(self.SHARES[node] for node in circuit)] for circuit in circuits])
        return harmless + (harmful - harmless) * shares


@pytest.fixture
def opposed(meters, attribution):
    """Meters of a model with opposing parts, and an attribution that knows every share."""
    made = [Sum(meter.model, meter.runs, meter.metric) for meter in meters]
    heads, mlps = torch.zeros_like(attribution.heads), torch.zeros_like(attribution.mlps)
    for node, share in Sum.SHARES.items():
        (heads if node.kind == "head" else mlps)[(node.layer, node.index)[: 2 - (node.kind == "mlp")]] = share
    return made, NodeAttribution(attribution.provenance, attribution.metric, heads, mlps, None, 1.0)


def test_a_circuit_that_reaches_the_target_leaves_out_what_opposes(opposed):
    (found_on, held_out), exact = opposed
    found = search_nodes(found_on, held_out, exact, 0.8)
    assert found.reached and len(found.circuit) == 2 and min(Sum.SHARES[node] for node in found.circuit) > 0
    assert [round(point.faithfulness, 2) for point in found.curve if point.n_nodes == 6] == [1.9], "it overshoots"


@pytest.mark.parametrize("target", [0.8, 0.95])
def test_a_circuit_that_matches_holds_what_opposes(opposed, target):
    (found_on, held_out), exact = opposed
    found = search_nodes(found_on, held_out, exact, target, goal="match")
    values = [meter.faithfulness([found.circuit])[0] for meter in (found_on, held_out)]
    assert found.reached and all(target - 1e-6 <= value <= 2 - target + 1e-6 for value in values)
    sizes = [abs(Sum.SHARES[node]) for node in found.ranking]
    assert sizes == sorted(sizes, reverse=True) and found.minimal
    for gone in found.circuit:  # no single part may leave
        without = sum(Sum.SHARES[node] for node in found.circuit if node != gone)
        assert not Goal(target, "match").met(without)


def test_a_match_out_of_reach_is_the_set_that_comes_closest(opposed, attribution):
    class Far(Sum):
        """Of smaller sets the first prefix is much too faithful, the others are less so."""

        __slots__ = ()

        def kept(self, circuits, near=None):
            harmful, harmless = self.ends()
            shares = [[1.0 if len(c) == 15 else 3.0 - 0.1 * len(c)] for c in circuits]
            return harmless + (harmful - harmless) * np.array(shares)

    (found_on, held_out), exact = opposed
    far = [Far(meter.model, meter.runs, meter.metric) for meter in (found_on, held_out)]
    found = search_nodes(*far, exact, 0.9, goal="match")
    sizes = [point.n_nodes for point in found.curve if point.n_nodes < 15]
    assert not found.reached and len(found.circuit) == max(sizes)


@given(st.floats(0.05, 1.0), st.sampled_from(["reach", "match"]), st.lists(st.floats(-3, 3), min_size=1, max_size=3))
def test_goals(target, kind, values):
    goal = Goal(target, kind)
    assert goal.met(1.0) and not goal.met(target - 1e-3)
    assert goal.met(*values) == all(goal.met(value) for value in values)
    assert (goal.missing(*values) <= 1e-6) == goal.met(*values)
    assert goal.met(5.0) is (kind == "reach") and goal.missing(1.0) == 0.0
    wanted = sorted([0.1, -0.5, 0.3], key=goal.size, reverse=True)
    assert wanted == ([0.3, 0.1, -0.5] if kind == "reach" else [-0.5, 0.3, 0.1])
    for value in values:
        if goal.met(value):
            assert goal.near(value, value - target, 1.0) and not goal.near(value, 3 * (value - target) + 0.1, 2.0)


def test_ranking_and_curve(meters, attribution):
    found = search_nodes(*meters, attribution, 0.8)
    estimates = [attribution.of(node) for node in found.ranking]
    assert estimates == sorted(estimates, reverse=True) and set(found.ranking) == set(ALL)
    sizes = [point.n_nodes for point in found.curve]
    assert sizes == sorted({round(share * 15) for share in CURVE_SHARES} | {10}) and sizes[-1] == 15
    for point in found.curve:
        circuit = [found.ranking[: point.n_nodes]]
        assert point.k == point.n_nodes / 15
        assert point.faithfulness == pytest.approx(meters[0].faithfulness(circuit)[0], abs=1e-5)
        assert point.held_out == pytest.approx(meters[1].faithfulness(circuit)[0], abs=1e-5)
    assert found.curve[-1].faithfulness == pytest.approx(1.0, abs=1e-4)
    assert faithfulness_curve(*meters, found.ranking) == found.curve


def test_a_ranking_that_is_backwards_is_repaired_by_elimination(meters, attribution):
    backwards = NodeAttribution(
        attribution.provenance, attribution.metric, -attribution.heads, -attribution.mlps, None, -attribution.total
    )
    found = search_nodes(*meters, backwards, 0.8)
    assert found.reached and len(found.circuit) < 15
    assert min(meter.faithfulness([found.circuit])[0] for meter in meters) >= 0.8


def test_marginals_by_their_definition(meters):
    circuit = [TRUE[3], TRUE[0], Node("mlp", 0), TRUE[2]]
    found = marginals(meters[0], circuit)
    whole = meters[0].faithfulness([circuit])[0]
    assert list(found) == sorted(circuit, key=lambda node: node.order)
    for node, value in found.items():
        without = meters[0].faithfulness([[other for other in circuit if other != node]])[0]
        assert value == pytest.approx(whole - without, abs=1e-5)
    assert marginals(meters[0], []) == {}


def test_duplicates_and_order_do_not_matter(meters):
    shuffled = [*TRUE[::-1], TRUE[0]]
    np.testing.assert_allclose(meters[0].kept([shuffled]), meters[0].kept([TRUE]), atol=1e-6)
    assert torch.is_tensor(meters[0].runs.harmful.logits)


def test_blocks_leave_what_matters():
    """Of 100 parts 7 matter, one of them ranked last: few measurements take away nearly everything else."""
    parts = [Node("head", k // 10, k % 10) for k in range(100)]
    needed, asked = {parts[k] for k in (3, 17, 18, 40, 55, 77, 99)}, []

    def reaches(some):
        asked.append(len(some))
        return needed <= set(some)

    left = _without_blocks(parts, reaches, 30, Budget())
    assert needed <= set(left) and len(left) <= 30 and left == sorted(left, key=parts.index)
    assert len(asked) < 60
    assert _without_blocks(parts[:20], reaches, 30, Budget()) == parts[:20]
    spent = Budget(1.0, clock=iter([0.0, *[2.0] * 10]).__next__)
    assert _without_blocks(parts, reaches, 30, spent) == parts


def _all_ways(needed, groups):
    """The grouping as it is defined: every way to cut, in order, the first of those with the fewest cells."""
    ways = [w for k in range(groups) for w in itertools.combinations(range(1, len(needed)), k)]

    def cells(cuts):
        ends = [*cuts, len(needed)]
        return sum((b - a) * needed[b - 1] for a, b in itertools.pairwise([0, *ends]))

    return min(ways, key=cells)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 9))
def test_groups_by_length_are_the_best_of_all_ways(lengths, groups):
    assert _cuts(sorted(lengths), groups) == _all_ways(sorted(lengths), groups)


def test_many_pairs_are_grouped_by_their_lengths_alone(monkeypatch):
    """The work is that of the different lengths: 100 times as many pairs make no larger table."""
    sizes = []
    real = np.where
    monkeypatch.setattr(np, "where", lambda mask, *rest: sizes.append(mask.shape) or real(mask, *rest))
    few, many = ([length for length in (5, 8, 9, 30) for _ in range(n)] for n in (2, 200))
    assert _cuts(many, 3) == tuple(100 * cut for cut in _cuts(few, 3)) and sizes == [(4, 4), (4, 4)]


def test_parts_that_a_meter_would_not_measure_are_refused(llama, pairs, log_odds):
    runs = pair_runs(llama, pairs, extra=[SiteKind.NEURONS])
    nodes, edge = FaithfulnessMeter(llama, runs, log_odds), Edge(Node("embed"), Node("mlp", 1), "mlp")
    text = "embed in a circuit of FaithfulnessMeter; expected its parts: ['head', 'mlp']"
    with pytest.raises(MechsafetyError) as error:
        nodes.kept([[Node("embed"), Node("head", 0, 1)]])
    assert str(error.value) == text
    cases = [
        (lambda: nodes.kept([[edge]]), "embed -> L1.MLP .mlp. in a circuit of FaithfulnessMeter"),
        (lambda: nodes.removed([[edge]]), "embed -> L1.MLP .mlp. in a circuit of FaithfulnessMeter"),
        (lambda: nodes.kept([[Node("neuron", 1, 3)]]), "L1.N3 in a circuit of FaithfulnessMeter"),
        (lambda: nodes.kept([[]], near=[Node("logits")]), "logits in a circuit of FaithfulnessMeter"),
        (lambda: nodes.removed([[Node("logits")]]), "logits cannot be patched; expected heads, MLPs or neurons"),
        (lambda: NeuronMeter.of(nodes, (1,)).kept([[Node("mlp", 1)]]), "L1.MLP in a circuit of NeuronMeter"),
        (lambda: EdgeMeter(llama, runs, log_odds).kept([[Node("mlp", 1)]]), "L1.MLP in a circuit of EdgeMeter"),
        (lambda: EdgeMeter(llama, runs, log_odds).removed([[Node("mlp", 1)]]), "L1.MLP in a circuit of EdgeMeter"),
    ]
    for call, match in cases:
        with pytest.raises(MechsafetyError, match=match):
            call()
