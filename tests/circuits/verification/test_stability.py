"""Attribution pair by pair, and circuits from resampled prompts."""

import itertools

import numpy as np
import pytest
import torch

import mechsafety as ms
from mechsafety.attribution import node_attribution
from mechsafety.circuits.budget import Budget
from mechsafety.circuits.faithfulness import FaithfulnessMeter
from mechsafety.circuits.goal import Goal
from mechsafety.circuits.search import ranked
from mechsafety.circuits.verification.stability import _prefixes, attribute_pairs, bootstrap_stability
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


@pytest.mark.parametrize("target", [0.5, 0.8, 0.97])
def test_the_smallest_prefix_from_any_guess(setting, target):
    meter, _, found = setting
    attribution = found.mean()
    nodes = head_and_mlp_nodes(3, 4)
    ranking = sorted(nodes, key=lambda node: (-attribution.of(node), node.order))
    values = meter.faithfulness([ranking[:n] for n in range(16)])
    reached = [n for n, value in enumerate(values) if value >= target - 1e-6]
    if all(value >= target - 1e-6 for value in values[reached[0] :]):
        guesses = (None, 1, 5, 15)
        sizes = {_prefixes(meter, [(ranking, np.ones(4))], Goal(target), guess)[0][1] for guess in guesses}
        assert sizes == {reached[0]}
    weights = np.array([3.0, 0.0, 1.0, 0.0])
    two = [(ranking, np.ones(4)), (ranking, weights)]
    alone = [_prefixes(meter, [one], Goal(target), 4)[0] for one in two]
    assert _prefixes(meter, two, Goal(target), 4) == alone, "side by side as one after the other"
    kept, size = alone[1]
    harmful, harmless = meter.ends()
    value = weights @ (meter.kept([ranking[:size]])[0] - harmless) / (weights @ (harmful - harmless))
    assert value >= target - 1e-6 and kept == set(ranking[:size])


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
    assert budget.cut == ("resamples of the prompts: 0 of 5 done",)
