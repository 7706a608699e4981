"""Attribution pair by pair, and circuits from resampled prompts."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import mechsafety as ms
from mechsafety.attribution import node_attribution
from mechsafety.circuits.budget import Budget
from mechsafety.circuits.faithfulness import FaithfulnessMeter
from mechsafety.circuits.goal import Goal
from mechsafety.circuits.search import prefix_scores, ranked, search_nodes
from mechsafety.circuits.verification.stability import _size_needed, attribute_pairs, bootstrap_stability
from mechsafety.nodes import head_and_mlp_nodes
from mechsafety.patching import pair_runs


def by_gradient(found):
    """Rankings of resampled pairs, as the map makes them."""
    return lambda weights: ranked(head_and_mlp_nodes(3, 4), found.mean(weights), Goal(0.8))


@pytest.fixture(scope="module")
def setting(planted):
    model, pairs = planted
    metric = ms.RefusalLogOdds.of(model, ["sorry"], ["sure"])
    some = ms.PromptPairs(pairs.pairs[:4])
    meter = FaithfulnessMeter(model, pair_runs(model, some), metric).grouped(2)
    return meter, some, attribute_pairs(meter)


def test_pairs_add_up_to_the_whole(setting):
    meter, pairs, found = setting
    expected = node_attribution(meter.model, meter.runs, meter.metric)
    mean = found.mean()
    torch.testing.assert_close(mean.heads, expected.heads, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mean.mlps, expected.mlps, atol=1e-4, rtol=1e-4)
    assert mean.total == pytest.approx(expected.total, abs=1e-4)
    twice = meter.model.tokenize_pairs(pairs).rows([0, 0, 2])
    resampled = node_attribution(meter.model, pair_runs(meter.model, twice), meter.metric)
    torch.testing.assert_close(found.mean([2, 0, 1, 0]).heads, resampled.heads, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["reach", "match"])
@pytest.mark.parametrize("target", [0.5, 0.8, 0.97])
def test_the_size_is_the_smallest_prefix_where_every_size_was_measured(setting, target, kind):
    meter, _, found = setting
    ranking = by_gradient(found)(None)
    ends, goal = meter.ends(), Goal(target, kind)
    every = list(range(len(ranking) + 1))
    scores = meter.kept([ranking[:n] for n in every])
    for weights in (np.ones(4), np.array([3.0, 0.0, 1.0, 0.0])):
        values = (scores - ends[1]) @ weights / (weights @ (ends[0] - ends[1]))
        expected = next(n for n, value in enumerate(values) if goal.met(value))
        assert _size_needed((every, scores), *ends, len(ranking), goal, weights) == expected


@pytest.mark.parametrize(
    ("kind", "size"),
    # 0, 0.2 and 1.4 at sizes 0, 2 and 8: straight between, 0.8 is reached at 5, and 1.2 is left at 7
    [(Goal(0.8), 5), (Goal(0.8, "match"), 5), (Goal(0.2), 2), (Goal(1.0), 6)],
)
def test_between_two_sizes_the_curve_is_straight(kind, size):
    ones = np.ones(3)
    curve = [0, 2, 8, 10], np.outer([0.0, 0.2, 1.4, 1.0], ones)
    assert _size_needed(curve, ones, 0 * ones, 10, kind, ones) == size


def test_a_curve_that_jumps_over_the_goal_meets_it_on_the_way():
    """From 0.2 to 1.8 in one part, and back to 1: to match the model, it takes the part that comes back."""
    curve = [0, 1, 2, 4], np.array([[0.0], [0.2], [1.8], [1.0]])
    one = np.ones(1)
    assert _size_needed(curve, one, 0 * one, 4, Goal(0.8, "match"), one) == 4
    assert _size_needed(curve, one, 0 * one, 4, Goal(0.5, "match"), one) == 3


def test_a_curve_that_begins_with_one_part_begins_at_nothing():
    """With 501 parts or more, the smallest size on the curve is no longer 0; a circuit holds at least one part."""
    one = np.ones(1)
    curve = [2, 4], np.array([[0.9], [1.0]])
    assert [_size_needed(curve, one, 0 * one, 4, Goal(target), one) for target in (0.01, 0.4, 0.8, 1.0)] == [1, 1, 2, 4]


def test_a_resample_without_a_gap_needs_all_parts():
    curve = [0, 1, 2], np.array([[0.0, 0.0], [1.0, -1.0], [1.0, -1.0]])
    ends = np.array([1.0, -1.0]), np.zeros(2)
    assert _size_needed(curve, *ends, 2, Goal(), np.array([0.0, 2.0])) == 2
    assert _size_needed(curve, *ends, 2, Goal(), np.array([2.0, 0.0])) == 1


def test_the_curve_of_the_search_is_the_curve(setting):
    """The map gives the search's own scores, so that nothing is run for stability."""
    meter, _, found = setting
    result = search_nodes(meter, meter, found.mean(), 0.8)
    sizes, scores = prefix_scores(meter, result.ranking)
    assert sizes == [point.n_nodes for point in result.curve]
    np.testing.assert_allclose(scores, result.found_scores, atol=1e-5)
    given = bootstrap_stability(meter, by_gradient(found), Goal(), n=4, curve=(sizes, np.array(result.found_scores)))
    assert given == bootstrap_stability(meter, by_gradient(found), Goal(), n=4)
    quiet = replace(meter, groups=())
    object.__setattr__(quiet, "model", None)  # a run would fail
    assert bootstrap_stability(quiet, by_gradient(found), Goal(), n=4, curve=(sizes, scores)).mean == given.mean


def test_stability(setting):
    meter, _, found = setting
    stability = bootstrap_stability(meter, by_gradient(found), Goal(0.8), n=6, seed=3)
    assert len(stability.jaccards) == len(stability.n_nodes) == 6
    assert all(0 < value <= 1 for value in stability.jaccards) and stability.mean == np.mean(stability.jaccards)
    assert bootstrap_stability(meter, by_gradient(found), Goal(0.8), n=6, seed=3) == stability
    assert stability.mean > 0.5, "the planted parts are the same whatever prompts are drawn"


def test_unlike_rankings_overlap_little(setting):
    """With scores of its own for every pair, a resample finds other nodes."""
    meter, _, found = setting
    nodes = torch.zeros(4, 3, 4)
    for pair, (layer, head) in enumerate(itertools.product((0, 2), (0, 3))):
        nodes[pair, layer, head] = 1.0

    class Kept(FaithfulnessMeter):
        __slots__ = ()

        def kept(self, circuits, near=None):
            harmful, harmless = self.ends()
            return np.stack([harmful if len(circuit) else harmless for circuit in circuits])

    made = type(found)(nodes, torch.zeros(4, 3), found.gaps, found.provenance, found.metric)
    stability = bootstrap_stability(
        Kept(meter.model, meter.runs, meter.metric), by_gradient(made), Goal(0.8), n=8, seed=0
    )
    assert stability.mean < 1.0 and set(stability.n_nodes) == {1}
    assert set(stability.jaccards) <= {0.0, 1.0} and 0.0 in stability.jaccards


def test_time_that_is_over(setting):
    meter, _, found = setting
    budget = Budget(1e-9, clock=iter(range(100)).__next__)
    assert bootstrap_stability(meter, by_gradient(found), Goal(0.8), budget=budget) is None
    assert budget.cut == ("resamples of the prompts: 0 of 100 done",)
