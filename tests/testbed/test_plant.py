"""Planted models checked by brute force: every part patched by whole forwards that share nothing with the engine."""

import pytest
import torch
from planted_checks import effect, wrapped

import mechsafety as ms
from mechsafety.nodes import Node, head_and_mlp_nodes
from mechsafety.patching import pair_runs
from mechsafety.patching.paths import measured_edges
from mechsafety.patching.senders import node_outputs
from mechsafety.testbed.certify import untrained_model
from mechsafety.testbed.plant import planted
from mechsafety.testbed.planter import plateau

SHAPES = {
    "plain": {"seed": 0},
    "grouped": {"seed": 1, "heads": 8, "kv_heads": 2, "layers": 3, "decoys": 6},
    "layernorm": {"seed": 2, "norm": "layernorm", "layers": 5},
    "one backup": {"seed": 3, "backups": 1, "kv_heads": 1, "layers": 3},
    "layernorm, one backup": {"seed": 4, "norm": "layernorm", "backups": 1, "heads": 2},
    "two backups": {"seed": 5, "backups": 2, "kv_heads": 2, "layers": 6},
    "three neurons": {"seed": 6, "neurons": 3, "decoys": 0, "heads": 2, "layers": 4},
}


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def made(request):
    """The planted model, wrapped, its metric, and a pair of each topic."""
    return wrapped(planted(**SHAPES[request.param]))


def backed_up(truth):
    """Nodes and neurons that another can stand in for."""
    nodes = set(truth.backed_up)
    return nodes | {n for n in truth.neurons if Node("mlp", n.layer) in nodes}


def test_it_refuses_and_complies(made):
    _, model, _, pairs = made
    assert set(model.generate(pairs.harmful, 12)) == {"Sorry , I can not help ."}
    assert set(model.generate(pairs.harmless, 12)) == {"Sure ! here is how ."}
    assert ms.RefusalLogOdds.detect(model, pairs).refusal_tokens == ("Sorry",)


def test_planted_parts_matter(made):
    truth = made[0].truth
    spared = backed_up(truth)
    neurons_alike = {node: sum(n.layer == node.layer for n in truth.neurons) for node in truth.neurons}
    for node in (*truth.nodes, *truth.neurons):
        if node not in spared:
            assert effect(made, [node]) > 0.8 / neurons_alike.get(node, 1), node


def test_decoys_do_not_matter(made):
    truth = made[0].truth
    for node in truth.decoys:
        assert abs(effect(made, [node])) < 0.05, node
    if truth.decoys:
        assert abs(effect(made, list(truth.decoys))) < 0.1


def test_decoys_differ_more_than_the_circuit(made):
    """What a decoy writes differs between the two prompts more than what any node of the circuit writes."""
    built, model, _, pairs = made
    truth, runs = built.truth, pair_runs(model, pairs)
    every = head_and_mlp_nodes(model.n_layers, model.n_heads)
    change = node_outputs(model, runs.harmful, every) - node_outputs(model, runs.harmless, every)
    size = dict(zip(every, change.norm(dim=-1).amax(-1).mean(-1).tolist(), strict=True))
    # an MLP of the circuit may hold a decoy neuron besides
    mixed = {Node("mlp", node.layer) for node in truth.decoys if node.kind == "neuron"}
    decoys = [size[node] for node in truth.decoys if node.kind != "neuron"]
    assert not decoys or min(decoys) > max(size[node] for node in truth.nodes if node not in mixed)


def test_backups_matter_together_only(made):
    truth = made[0].truth
    for node in backed_up(truth):
        assert abs(effect(made, [node])) < 0.15, node
    for group in truth.backups:
        assert effect(made, list(group)) > 0.85


def test_nothing_else_matters_and_nothing_is_zero(made):
    built, model, metric, pairs = made
    truth = built.truth
    idle = [n for n in head_and_mlp_nodes(model.n_layers, model.n_heads) if n not in {*truth.nodes, *truth.decoys}]
    # the two largest of an exact sweep, measured again by whole forwards
    sweep = ms.activation_patching(model, pairs, metric, nodes=idle, progress=False)
    largest = sweep.effects.abs().topk(2).indices.tolist()
    assert float(sweep.effects.abs().max()) < 0.05
    assert all(abs(effect(made, [idle[k]])) < 0.05 for k in largest)
    weights = [p for name, p in built.model.named_parameters() if "norm" not in name and "ln_" not in name]
    assert all(float((weight == 0).float().mean()) < 0.1 for weight in weights)


def test_the_circuit_is_enough(made):
    built, model, _, _ = made
    outside = [n for n in head_and_mlp_nodes(model.n_layers, model.n_heads) if n not in built.truth.nodes]
    assert abs(effect(made, outside)) < 0.1


def test_edges_carry_the_effect(made):
    """Single edges, exactly: those of the truth matter where nothing backs them up, the others never do."""
    built, model, metric, pairs = made
    truth, runs = built.truth, pair_runs(model, pairs)
    nodes = [n for n in head_and_mlp_nodes(model.n_layers, model.n_heads) if n in truth.nodes or n in truth.decoys]
    slots = {"head": ("q", "k", "v"), "mlp": ("mlp",), "logits": ("resid",)}
    every = [
        ms.Edge(sender, receiver, slot)
        for sender in nodes
        for receiver in [*nodes, Node("logits")]
        for slot in slots[receiver.kind]
        if sender.order[:2] < receiver.order[:2]
    ]
    harmful, harmless = runs.scores(metric)
    effects = (measured_edges(model, runs, metric, every).mean(1) / (harmful - harmless).mean()).tolist()
    spared = backed_up(truth)
    for edge, value in zip(every, effects, strict=True):
        if edge not in truth.edges:
            assert abs(value) < 0.06, edge
        elif edge.sender not in spared and edge.receiver not in spared:
            assert value > 0.8, edge


def test_truth_names_every_stage(made):
    truth = made[0].truth
    assert set(truth.roles.values()) == {"detection", "evaluation", "decision", "production"}
    assert {edge.sender.kind for edge in truth.edges} == {"embed", "head", "mlp"}
    assert {node for edge in truth.edges for node in (edge.sender, edge.receiver)} == {
        *truth.nodes,
        Node("embed"),
        Node("logits"),
    }
    frame = truth.to_dataframe()
    assert len(frame) == len(truth.roles) + len(truth.decoys)


def test_same_seed_same_bytes():
    one, two, other = planted(7, decoys=2), planted(7, decoys=2), planted(8, decoys=2)
    assert one.truth == two.truth
    for (name, a), (_, b) in zip(one.model.named_parameters(), two.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert any(not torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=False))


@pytest.mark.parametrize("build", [lambda: planted(0), lambda: untrained_model(0)])
def test_the_callers_random_state_stays(build):
    before = torch.random.get_rng_state()
    build()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_seeds_differ_in_place_and_in_what_is_backed_up():
    truths = [planted(seed, decoys=2, backups=1).truth for seed in range(6)]
    assert len({truth.nodes for truth in truths}) > 3
    assert len({truth.roles[truth.backups[0][0]] for truth in truths}) > 1


def test_no_direction_lies_along_an_axis():
    built = planted(0)
    written = built.model.model.layers[0].self_attn.o_proj.weight.detach()
    assert float(written.abs().max() / written.norm()) < 0.5


def test_pairs_have_topics_and_splits():
    pairs = planted(0).pairs
    train, test = pairs.split("train"), pairs.split("test")
    assert len(train.topics) == len(test.topics) == 2
    assert not set(train.topics) & set(test.topics)


def test_two_decoys_may_be_in_a_layer_of_one_head():
    """Where no head is left, decoys are neurons."""
    truth = planted(0, layers=2, heads=1, decoys=4).truth
    assert {node.kind for node in truth.decoys} <= {"neuron", "mlp"}


@pytest.mark.parametrize("function", [torch.nn.SiLU(), torch.nn.GELU(), torch.nn.GELU(approximate="tanh")])
def test_plateau(function):
    a = plateau(function)
    one, two = function(torch.tensor([-a, -2 * a], dtype=torch.float64))
    assert float(one) == pytest.approx(float(two), rel=1e-6)
    assert float(one) < -0.1
    a = plateau(function, 1.1, gated=True)
    one, two = function(torch.tensor([-1.1 * a, -2 * a], dtype=torch.float64))
    assert 1.1 * float(one) == pytest.approx(float(two), rel=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_opposing_neurons_take_back_half_of_what_production_writes(seed):
    made = planted(seed, opposing=True, decoys=2)
    model = ms.load_model((made.model, made.tokenizer))
    drawn = ms.circuits.draw_pairs(model, made.pairs, limit=8, progress=False)
    meter = ms.circuits.split_pairs(model, drawn, progress=False).meters.found_on
    produce, against = sorted(
        (node for node, role in made.truth.roles.items() if role == "production" and node.kind == "mlp"),
        key=lambda node: meter.without([[node]])[0],
    )
    alone = meter.faithfulness([[node for node in made.truth.nodes if node != against], made.truth.nodes])
    assert alone == pytest.approx([1.45, 1.0], abs=0.2)
    assert meter.without([[produce], [against]]) == pytest.approx([-0.45, 1.45], abs=0.2)
    neurons = [node for node in made.truth.neurons if node.home == against]
    assert len(neurons) == 2 and {made.truth.roles[node] for node in neurons} == {"production"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"norm": "batch"}, "norm 'batch'; expected 'rmsnorm' or 'layernorm'"),
        ({"kv_heads": 3}, "4 heads over 3 key-value heads; expected a divisor of the heads"),
        (
            {"norm": "layernorm", "kv_heads": 2},
            "grouped queries with norm='layernorm'; expected kv_heads=None (GPT-2 has none)",
        ),
        (
            {"layers": 1},
            "layers=1, heads=4, decoys=4, backups=0, neurons=2; expected at least 2 layers, 1 head, 0 decoys, 1 neuron,"
            " and 0 to 2 backups",
        ),
        ({"layers": 2, "heads": 1, "backups": 1}, "1 backups do not fit into 2 layers of 1 heads; a larger model"),
        (
            {"layers": 2, "opposing": True},
            "0 backups and opposing parts do not fit into 2 layers of 4 heads; a larger model",
        ),
    ],
)
def test_errors(options, text):
    with pytest.raises(ms.MechsafetyError) as error:
        planted(0, **options)
    assert str(error.value) == text
