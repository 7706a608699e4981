"""Scores against hand-counted values, for every kind of result."""

import itertools

import pytest
import torch

import mechsafety as ms
from mechsafety.nodes import Edge, Node
from mechsafety.patching import PatchMap
from mechsafety.testbed import Truth, score

A, B, C, D = (Node("head", 0, k) for k in range(4))
M0, M1 = Node("mlp", 0), Node("mlp", 1)
N1, N2 = Node("neuron", 1, 4), Node("neuron", 1, 5)
IN, OUT = Node("embed"), Node("logits")


@pytest.fixture
def truth():
    """Heads A and B (backups of each other) into two neurons of the second MLP; C is a decoy."""
    edges = (Edge(IN, A, "v"), Edge(IN, B, "v"), Edge(A, M1, "mlp"), Edge(B, M1, "mlp"), Edge(M1, OUT, "resid"))
    roles = {A: "detection", B: "detection", M1: "production", N1: "production", N2: "production"}
    return Truth((A, B, M1), (N1, N2), edges, roles, (C,), ((A, B),))


def by_hand(scores, inside):
    """AUROC and average precision by their definitions, pair by pair and threshold by threshold."""
    pairs = list(itertools.product(inside, [part for part in scores if part not in inside]))
    auroc = sum((scores[a] > scores[b]) + 0.5 * (scores[a] == scores[b]) for a, b in pairs) / len(pairs)
    precision, recall, area = 0.0, 0.0, 0.0
    for threshold in sorted(set(scores.values()), reverse=True):
        kept = [part for part in scores if scores[part] >= threshold]
        hits = sum(part in inside for part in kept)
        precision, before, recall = hits / len(kept), recall, hits / len(inside)
        area += precision * (recall - before)
    return auroc, area


@pytest.mark.parametrize(
    "values",
    [(5, 4, 3, 2, 1, 0), (0, 1, 2, 3, 4, 5), (1, 1, 1, 1, 1, 1), (2, 2, 2, 0, 1, 1), (3, 1, 3, 1, 1, 2)],
)
def test_rankings_with_ties(truth, values):
    scores = dict(zip((A, B, M1, C, D, M0), values, strict=True))
    found = score(scores, truth).nodes
    assert (found.auroc, found.average_precision) == pytest.approx(by_hand(scores, (A, B, M1)))
    assert (found.n_true, found.n) == (3, 6)


def test_order_of_ties_does_not_matter(truth):
    parts = (A, B, M1, C, D, M0)
    orders = list(itertools.permutations(parts))[::90]
    found = {score(dict.fromkeys(order, 1.0), truth).nodes for order in orders}
    assert len(found) == 1


def test_scores_are_absolute(truth):
    signed = {A: -5.0, B: 4.0, M1: -3.0, C: 2.0, D: -1.0, M0: 0.0}
    assert score(signed, truth).nodes.auroc == 1.0


def test_decoys_and_backups_have_figures_of_their_own(truth):
    found = score({A: 3.0, B: 0.0, M1: 3.0, C: 9.0, D: 1.0, M0: 0.5}, truth).nodes
    assert found.auroc_decoys == 0.0
    assert found.auroc_backups == pytest.approx((2 + 0) / 6)  # A above two of three, B above none
    assert (found.strength_decoys, found.strength_backups) == (3.0, 0.5)  # against M1, which nothing backs up


def test_what_is_left_out_ranks_last(truth):
    found = score({A: 1.0, C: 0.0, M1: 0.5, D: 0.0}, truth).nodes
    assert found.n == 5
    assert found.auroc == pytest.approx(4 / 6)


def test_neurons_are_ranked_by_themselves(truth):
    found = score({N1: 2.0, N2: 1.0, Node("neuron", 0, 0): 1.5, A: 9.0, C: 1.0, M1: 3.0}, truth)
    assert found.neurons.auroc == 0.5
    assert found.nodes.auroc == pytest.approx(2 / 3)  # B is missing


def test_heads_alone_are_a_ranking_of_heads(truth):
    assert score({A: 2.0, B: 2.0, C: 1.0, D: 0.0}, truth).nodes == score({A: 9.0, B: 9.0, C: 2.0, D: 1.0}, truth).nodes


def test_edges_of_the_embedding_count_where_there_are_any(truth):
    inner = {Edge(A, M1, "mlp"): 3.0, Edge(B, M1, "mlp"): 2.0, Edge(M1, OUT, "resid"): 2.0, Edge(C, OUT, "resid"): 1.0}
    assert score(inner, truth).edges.auroc == 1.0
    assert score({**inner, Edge(IN, C, "v"): 0.5}, truth).edges.auroc < 1.0


def test_a_set_of_nodes(truth):
    found = score({A, M1, C, D, IN, OUT}, truth)
    assert (found.found_nodes.precision, found.found_nodes.recall) == (0.5, pytest.approx(2 / 3))
    assert found.found_nodes.f1 == pytest.approx(4 / 7)
    assert found.found_nodes.missed == (B,)
    assert set(found.found_nodes.wrong) == {C, D}
    assert found.decoys_found == (C,)
    assert found.backups_found == 0.5
    assert found.found_edges is None
    assert found.role_accuracy is None


def test_a_set_with_neurons_is_judged_by_neurons(truth):
    assert score([A, B, M1, N1, N2], truth).found_nodes.f1 == 1.0
    found = score([A, B, N1, Node("neuron", 1, 0), M0], truth).found_nodes
    assert (found.precision, found.recall) == (pytest.approx(3 / 5), pytest.approx(3 / 4))


def test_a_set_of_edges(truth):
    found = score([Edge(A, M1, "mlp"), Edge(C, M1, "mlp")], truth)
    assert found.found_nodes is None
    assert (found.found_edges.precision, found.found_edges.recall) == (0.5, pytest.approx(1 / 3))


def test_edges_of_neurons_count_as_their_mlps(truth):
    found = score([Edge(A, N1, "mlp"), Edge(A, N2, "mlp"), Edge(C, N1, "mlp")], truth)
    assert (found.found_edges.precision, found.found_edges.recall) == (0.5, pytest.approx(1 / 3))


@pytest.fixture(scope="module")
def results(planted):
    model, pairs = planted
    metric = ms.RefusalLogOdds.of(model, ["sorry"], ["sure"])
    options = ms.MapOptions(n_random=5)
    circuit = ms.map_refusal_circuit(model, pairs, metric, options, progress=False)
    return model, pairs, metric, circuit


def known(circuit):
    """A truth that says just what the circuit says."""
    nodes = tuple(member.node for member in circuit.nodes)
    edges = tuple(member.edge for member in circuit.edges)
    return Truth(nodes, (), edges, {member.node: member.role for member in circuit.nodes})


def test_a_refusal_circuit_against_itself(results):
    *_, circuit = results
    found = score(circuit, known(circuit))
    assert found.found_nodes.f1 == found.found_edges.f1 == found.role_accuracy == 1.0
    assert found.provenance == circuit.provenance
    other = {member.node: "none" for member in circuit.nodes}
    wrong = Truth(known(circuit).nodes, (), (), other)
    expected = sum(member.role == "none" for member in circuit.nodes) / len(circuit.nodes)
    assert score(circuit, wrong).role_accuracy == expected


def test_every_kind_of_ranking(results):
    model, pairs, metric, circuit = results
    truth = known(circuit)
    nodes = ms.node_attribution(model, pairs, metric)
    patched = ms.activation_patching(model, pairs, metric, progress=False)
    heads = [Node("head", layer, k) for layer in range(3) for k in range(4)]
    paths = ms.path_patching(model, pairs, metric, senders=heads, progress=False)
    edges = ms.edge_attribution(model, pairs, metric, progress=False)
    for result, about in ((nodes, "nodes"), (patched, "nodes"), (paths, "edges"), (edges, "edges")):
        found = score(result, truth)
        assert 0 <= getattr(found, about).auroc <= 1
        assert found.what == type(result).__name__
        assert found.provenance == result.provenance
    assert score(edges, truth).edges.n == edges.n_edges
    strengths = dict(zip(patched.nodes, patched.effects.abs().tolist(), strict=True))
    expected = by_hand(strengths, truth.nodes)
    found = score(patched, truth).nodes
    assert (found.auroc, found.average_precision) == pytest.approx(expected)


def test_neurons_of_an_attribution(results):
    model, pairs, metric, _ = results
    found = ms.node_attribution(model, pairs, metric, neurons=True)
    best = int(found.neurons[1].abs().argmax())
    neuron = Node("neuron", 1, best)
    truth = Truth((M1,), (neuron,), (), {M1: "production", neuron: "production"})
    rank = int((found.neurons.abs() >= found.neurons[1, best].abs()).sum()) - 1
    expected = 1 - rank / (found.neurons.numel() - 1)
    assert score(found, truth).neurons.auroc == pytest.approx(expected)


def test_a_score_is_a_result(truth, tmp_path):
    found = score({A: 3.0, B: 2.0, M1: 1.0, C: 0.5, D: 0.0}, truth)
    assert repr(found) == "TruthScore(dict: nodes AP 1.000)"
    assert type(found).load(found.save(tmp_path / "score")) == found
    assert found.to_dataframe().value.tolist() == [1.0, 1.0, 1.0, 1.0, 0.5, 2.5]
    assert found.plot().data


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("result", "text"),
    [
        ({A: float("nan")}, "the score of L0.H0 is nan; expected numbers"),
        ({7: 1.0}, "a int to score; expected nodes or edges"),
        (
            ["L0H0"],
            "no node is named 'L0H0'; expected a name such as 'L14.H2', 'L26.MLP' or 'L3.N17'; did you mean 'L0.H0'?",
        ),
        ([], "nothing to score; expected nodes or edges"),
        ({}, "nothing to score; expected nodes or edges"),
    ],
)
def test_what_cannot_be_scored(truth, result, text):
    with pytest.raises(ms.MechsafetyError) as error:
        score(result, truth)
    assert str(error.value) == text


def test_nodes_are_given_by_name_too(truth):
    by_node = {A: 3.0, B: 2.0, M1: 1.0, C: 0.5, D: 0.0}
    by_name = {str(node): value for node, value in by_node.items()}
    assert score(by_name, truth) == score(by_node, truth)
    assert score(list(by_name), truth) == score(list(by_node), truth)


def test_sites_and_joint_receivers_have_no_truth(results, truth):
    model, pairs, metric, _ = results
    site = ms.activation_patching(model, pairs, metric, nodes=[ms.Site("resid_mid", 0)], progress=False)
    with pytest.raises(ms.MechsafetyError, match=r"^patched sites or positions have no truth"):
        score(site, truth)
    receivers = [(Node("head", 1, 0), "q"), (Node("head", 1, 1), "q")]
    joint = ms.path_patching(model, pairs, metric, senders=[A], receivers=receivers, joint=True, progress=False)
    with pytest.raises(ms.MechsafetyError, match=r"^joint receivers have no truth"):
        score(joint, truth)


def test_patch_maps_are_scored_by_mean_effect(truth):
    changes = torch.tensor([[1.0, 3.0], [-2.0, -2.0], [0.5, 0.5], [0.0, 0.2], [0.0, 0.0], [0.0, 0.1]])
    ends = torch.tensor([1.0, 1.0])
    provenance = ms.results.Provenance("m", "w", "float32", "cpu", "t")
    nodes = (A, B, M1, C, D, M0)
    found = PatchMap(provenance, {}, nodes, changes, ends, -ends, "noising", "all")
    assert score(found, truth).nodes.auroc == 1.0
    assert score(found, truth).scores["L0.H0"] == pytest.approx(1.0)
