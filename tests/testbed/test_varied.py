"""Planted circuits of varied shape, checked by brute force: whole forwards that share nothing with the engine."""

import itertools
import random

import pytest
from planted_checks import effect, wrapped

import mechsafety as ms
from mechsafety.nodes import Node, head_and_mlp_nodes
from mechsafety.testbed.plant import planted
from mechsafety.testbed.varied import PLACES, varied_plan

SHAPES = {
    "neurons detect, two kinds of relay": {"seed": 2, "layers": 5},
    "two harmful words": {"seed": 4, "layers": 3},
    "two harmful words, LayerNorm": {"seed": 7, "layers": 3, "norm": "layernorm"},
    "two routes": {"seed": 12, "layers": 4},
    "heads evaluate and produce, neurons decide": {"seed": 13, "layers": 4, "norm": "layernorm"},
}


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def made(request):
    """The planted model, wrapped, its metric, and a pair of each topic."""
    return wrapped(planted(**SHAPES[request.param], varied=True))


def test_it_refuses_and_complies(made):
    _, model, _, pairs = made
    assert set(model.generate(pairs.harmful, 12)) == {"Sorry , I can not help ."}
    assert set(model.generate(pairs.harmless, 12)) == {"Sure ! here is how ."}


def test_every_part_matters_and_nothing_else(made):
    built, model, _, _ = made
    truth = built.truth
    plan = varied_plan(random.Random(built.seed), model.n_layers, model.n_heads, 4, 2)
    assert plan.truth() == truth
    for node in truth.roles:
        # parts that write shares of one feature; an MLP writes what its neurons do
        share = sum(part.length for part in plan.parts if part.role != "decoy" and node in (part.node, part.node.home))
        assert effect(made, [node]) > 0.8 * share, node
    every = head_and_mlp_nodes(model.n_layers, model.n_heads)
    outside = [node for node in every if node not in truth.nodes]
    assert outside and abs(effect(made, outside)) < 0.15
    assert all(abs(effect(made, [node])) < 0.1 for node in (*outside, *truth.decoys))


def test_edges_lead_from_the_embeddings_to_the_logits(made):
    truth = made[0].truth
    ends = {node for edge in truth.edges for node in (edge.sender, edge.receiver)}
    assert ends == {*truth.nodes, Node("embed"), Node("logits")}
    roles = truth.roles | {Node("embed"): "", Node("logits"): ""}
    steps = {(roles[edge.sender], roles[edge.receiver]) for edge in truth.edges}
    assert steps <= {
        ("", "detection"),
        *(("detection", after) for after in ("relay", "evaluation")),
        *(("relay", after) for after in ("evaluation", "decision")),
        *(("evaluation", after) for after in ("relay", "decision")),
        ("decision", "production"),
        ("production", ""),
    }


@pytest.mark.parametrize("shape", ["two harmful words", "two harmful words, LayerNorm"])
def test_neither_word_alone_is_refused(shape):
    built = planted(**SHAPES[shape], varied=True)
    model = ms.load_model((built.model, built.tokenizer))
    metric = ms.RefusalLogOdds.of(model, ["Sorry"])
    for pair in built.pairs.sample(4, 1):
        bad, good = pair.harmful.split(), pair.harmless.split()
        places = [k for k, words in enumerate(zip(bad, good, strict=True)) if words[0] != words[1]]
        assert len(places) == 2
        mixed = [" ".join(good[: k + 1] + bad[k + 1 :]) for k in places[:1]]
        mixed += [" ".join(bad[: places[0] + 1] + good[places[0] + 1 :])]
        assert bool((metric(model.logits(mixed)) < 0).all()) and float(metric(model.logits([pair.harmful]))) > 0


def test_plans_differ_in_all_that_they_are_to_differ_in():
    plans = [varied_plan(random.Random(seed), 6, 4, 2, 2) for seed in range(60)]
    kinds = {(part.role, part.node.kind) for plan in plans for part in plan.parts}
    stages = ("detection", "evaluation", "decision", "production")
    assert kinds >= set(itertools.product(stages, ("head", "neuron")))
    assert ("relay", "head") in kinds
    for role in ("detection", "evaluation", "decision"):
        assert {part.work.at for plan in plans for part in plan.parts if part.role == role} == set(PLACES)
    assert 5 < sum(plan.two_words for plan in plans) < 40
    assert sum(any(part.kind == "detection far" for part in plan.parts) for plan in plans) > 2
    for plan in plans:
        nodes = [part.node for part in plan.parts]
        assert len(set(nodes)) == len(nodes), "two parts at one place"
        layers = {}
        for part in plan.parts:
            layers.setdefault(part.kind, []).append(2 * part.node.layer + (part.node.kind == "neuron"))
        for before, after in plan.wires:
            if before != "embed" and after != "logits":
                assert max(layers[before]) < min(layers[after]), "a part reads what is written later"


def test_what_does_not_go_together():
    with pytest.raises(
        ms.MechsafetyError, match=r"backups=1, opposing=False with varied=True; expected backups=0, opposing=False"
    ):
        planted(varied=True, backups=1)
    with pytest.raises(ms.MechsafetyError, match=r"layers=1, heads=4, decoys=0, neurons=2; expected at least 2"):
        varied_plan(random.Random(0), 1, 4, 0, 2)


def test_same_seed_same_circuit():
    one, two, other = (planted(seed, 6, varied=True) for seed in (3, 3, 4))
    assert one.truth == two.truth != other.truth
