"""Masks that are trained together: against exact runs, and on models whose circuit is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import mechsafety as ms
from mechsafety import testbed
from mechsafety.circuits import EdgeMeter, FaithfulnessMeter, NeuronMeter
from mechsafety.circuits.masks import START, Training, _gates, _open, batches_of_pairs, train_masks
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Edge
from mechsafety.patching import pair_runs
from mechsafety.sites import SiteKind
from mechsafety.testbed.vocabulary import REFUSAL

SHORT = Training(steps=150)


@pytest.fixture(scope="module")
def meters(planted):
    model, pairs = planted
    metric = ms.RefusalLogOdds.of(model, ["sorry"], ["sure"])
    runs = pair_runs(model, pairs.sample(6), extra=[SiteKind.NEURONS])
    whole = FaithfulnessMeter(model, runs, metric)
    return {"node": whole, "neuron": NeuronMeter.of(whole, (1,)), "edge": EdgeMeter(model, runs, metric)}


@pytest.mark.parametrize("level", ["node", "neuron", "edge"])
def test_gates_of_0_and_1_are_a_circuit(meters, level):
    meter = meters[level]
    rng = np.random.default_rng(0)
    for share in (0.0, 0.3, 0.8, 1.0):
        kept = rng.random(len(meter.parts)) < share
        exact = meter.kept([[part for part, keep in zip(meter.parts, kept, strict=True) if keep]])[0]
        soft = meter.soft(meter.runs, torch.from_numpy(kept).float())
        assert soft.tolist() == pytest.approx(exact.tolist(), abs=2e-4)


@pytest.mark.parametrize("level", ["node", "neuron", "edge"])
def test_the_gradient_is_that_of_the_gates(meters, level):
    """By a finite difference in one direction."""
    meter = meters[level]
    weights = torch.linspace(0.2, 0.9, len(meter.parts)).requires_grad_()
    direction = torch.randn(len(weights), generator=torch.Generator().manual_seed(1))
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(meter.soft(meter.runs, weights).sum(), [weights])
    step = 1e-2 / float(direction.norm())
    ends = [float(meter.soft(meter.runs, (weights + sign * step * direction).detach()).sum()) for sign in (1, -1)]
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(gradient @ direction), rel=0.02)


def test_gates_are_hard_concrete():
    """Shares of draws at 0, at 1 and between, and the mean chance of not being 0."""
    logits = torch.tensor([-3.0, 0.0, START]).repeat(20000, 1)
    drawn = _gates(logits, torch.rand(logits.shape, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6))
    assert (drawn > 0).float().mean(0).tolist() == pytest.approx(_open(logits[0]).tolist(), abs=0.02)
    assert drawn.min() == 0 and drawn.max() == 1 and 0 < float(((drawn > 0) & (drawn < 1)).float().mean()) < 1


@pytest.mark.parametrize("level", ["node", "edge"])
@pytest.mark.parametrize("stand_ins", [0, 1])
def test_what_the_planted_model_needs_comes_first(level, stand_ins):
    """Decoys do not, and a backup does, though gradients cannot see it: other gates close now and then."""
    made = testbed.planted(2, 2, 4, decoys=2, backups=stand_ins)
    model = ms.load_model((made.model, made.tokenizer))
    runs = pair_runs(model, made.pairs.sample(12))
    meter = (EdgeMeter if level == "edge" else FaithfulnessMeter)(
        model, runs, ms.RefusalLogOdds.of(model, [REFUSAL[0]])
    )
    found = train_masks(meter, "reach", SHORT)
    true = set(made.truth.edges) if level == "edge" else {node.home for node in made.truth.nodes}
    assert set(found.ranking[: len(true)]) == true and sorted(found.ranking, key=str) == sorted(meter.parts, key=str)
    assert found.path[0][0] == len(meter.parts) and found.path[-1][0] <= len(true)
    assert len(found.path) == 150 and found.path[-1][1] < 0.05


def test_the_same_seed_gives_the_same_ranking(meters):
    short = Training(steps=15, batch=4)
    first, again = (train_masks(meters["node"], training=short) for _ in range(2))
    assert first == again
    assert first.path != train_masks(meters["node"], training=replace(short, seed=1)).path


def test_pairs_that_count_nothing_are_not_run(meters):
    counts = torch.tensor([2.0, 0.0, 1.0, 0.0, 0.0, 3.0])
    batches = batches_of_pairs(meters["node"], 2, counts)
    assert sorted(count for _, part in batches for count in part.tolist()) == [1.0, 2.0, 3.0]
    assert [len(runs.harmful) for runs, _ in batches] == [2, 1]
    some = meters["node"].runs.tokens.rows([0, 2, 5])
    alone = replace(meters["node"], runs=pair_runs(meters["node"].model, some))
    one = Training(steps=3, batch=8)
    short = train_masks(alone, training=one, weights=[2, 1, 3])
    assert train_masks(meters["node"], training=one, weights=[2, 0, 1, 0, 0, 3]) == short


def test_a_goal_to_reach_does_not_count_what_is_above(meters):
    """Parts against the behaviour may then close at once."""
    meter = meters["node"]
    found = {goal: train_masks(meter, goal, Training(steps=60)).path for goal in ("reach", "match")}
    assert all(a[1] <= b[1] + 1e-9 for a, b in zip(found["reach"][:1], found["match"][:1], strict=True))


@pytest.mark.parametrize("level", ["node", "neuron", "edge"])
def test_a_map_by_masks(level, monkeypatch):
    # fewer steps than by default: two layers need no more
    monkeypatch.setattr(ms.MapOptions, "training", property(lambda options: Training(steps=60, seed=options.seed)))
    made = testbed.planted(5, 2, 4, decoys=2)
    model = ms.load_model((made.model, made.tokenizer))
    options = ms.MapOptions(level=level, search="masks", limit=12, n_random=0, n_resamples=0, n_added=0, shortlist=0)
    circuit = ms.map_refusal_circuit(model, made.pairs.sample(12), options=options, progress=False)
    found = testbed.score(circuit, made.truth)
    assert found.found_nodes.f1 == 1.0 and found.decoys_found == ()
    assert circuit.provenance.options["search"] == "masks"
    if level == "edge":
        assert found.found_edges.f1 == 1.0 and all(isinstance(path.edge, Edge) for path in circuit.edges)


def test_a_map_trains_masks_once_and_again_for_every_resample(monkeypatch):
    made = testbed.planted(5, 2, 4)
    model = ms.load_model((made.model, made.tokenizer))
    trained = []

    def train(meter, goal, training, *, weights=None):
        trained.append(weights)
        return train_masks(meter, goal, Training(steps=40), weights=weights)

    monkeypatch.setattr("mechsafety.circuits.levels.train_masks", train)
    options = ms.MapOptions(search="masks", limit=12, n_random=0, n_resamples=2, n_added=0, shortlist=0)
    circuit = ms.map_refusal_circuit(model, made.pairs.sample(12), options=options, progress=False)
    assert [weights is None for weights in trained] == [True, False, False]
    assert len(circuit.verification.stability.jaccards) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": (0.0, 1.0)}, r"penalty \(0.0, 1.0\); expected two numbers above 0"),
        ({"steps": 0}, "steps"),
    ],
)
def test_training_that_makes_no_sense(options, message):
    with pytest.raises(MechsafetyError, match=message):
        Training(**options)


def test_an_unknown_search():
    with pytest.raises(MechsafetyError, match="search"):
        ms.MapOptions(search="luck")
