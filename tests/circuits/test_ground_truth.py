"""The whole map on models whose circuit is known: it finds what is planted, no decoy, and names roles and backups."""

from dataclasses import replace

import pytest

import mechsafety as ms
from mechsafety import testbed
from mechsafety.circuits import map as mapping
from mechsafety.circuits import wiring
from mechsafety.circuits.edges import on_a_path
from mechsafety.circuits.verification import verify
from mechsafety.nodes import EMBED, LOGITS
from mechsafety.viz import circuit_tikz, layout_circuit, render_report

SHAPES = {
    "grouped queries, decoys": {"seed": 3, "layers": 3, "heads": 4, "kv_heads": 2, "decoys": 4},
    "LayerNorm, decoys": {"seed": 4, "layers": 3, "heads": 2, "norm": "layernorm", "decoys": 3},
    "backups": {"seed": 5, "layers": 4, "heads": 4, "decoys": 0, "backups": 1},
}
OPTIONS = ms.MapOptions(limit=12, n_random=20, n_resamples=2)
QUIET = {"progress": False}


@pytest.fixture(scope="module", params=SHAPES)
def mapped(request):
    made = testbed.planted(**SHAPES[request.param])
    model = ms.load_model((made.model, made.tokenizer))
    return made, model, ms.map_refusal_circuit(model, made.pairs.sample(12), options=OPTIONS, **QUIET)


def test_everything_planted_and_nothing_else_is_found(mapped):
    made, _, circuit = mapped
    found = testbed.score(circuit, made.truth)
    assert found.found_nodes.f1 == 1.0 and found.decoys_found == () and found.role_accuracy == 1.0
    assert (found.found_edges.recall, found.found_edges.precision) == (1.0, 1.0)
    assert {edge.status for edge in circuit.edges} == {"measured"}
    assert circuit.verification.reached


def test_backups_are_named_with_what_they_stand_in_for(mapped):
    made, _, circuit = mapped
    pairs = {frozenset((backup.node, backup.primary)) for backup in circuit.search.backups}
    assert pairs == set(map(frozenset, made.truth.backups))
    for backup in circuit.search.backups:
        (member,) = [member for member in circuit.nodes if member.node == backup.node]
        assert member.evidence.backup_of == str(backup.primary)
        assert member.evidence.joint == backup.joint > backup.single + backup.primary_effect
        # it has edges of its own, measured while what it stands in for is patched
        ends = {edge.edge.sender for edge in circuit.edges} & {backup.node}, {e.edge.receiver for e in circuit.edges}
        assert ends[0] and backup.node in ends[1]


def test_links_of_a_backup_are_measured_while_it_is_alive():
    """No edge is kept for what it carries, so that all are links; those into and out of the backup carry its effect."""
    made = testbed.planted(seed=3, layers=4, heads=2, backups=1)
    model = ms.load_model((made.model, made.tokenizer))
    options = replace(OPTIONS, n_edges=0, n_random=0, n_added=0, n_resamples=0)
    circuit = ms.map_refusal_circuit(model, made.pairs.sample(12), options=options, **QUIET)
    (backup,) = circuit.search.backups
    own = [edge for edge in circuit.edges if backup.node in (edge.edge.sender, edge.edge.receiver)]
    assert len(own) >= 2 and min(abs(edge.effect) for edge in own) > 0.5


def test_neurons_of_a_patched_mlp_are_patched_with_it():
    """The primary MLP of this model is patched while its backup is measured: its neurons then send nothing."""
    made = testbed.planted(seed=6, layers=4, heads=2, backups=1, decoys=0)
    model = ms.load_model((made.model, made.tokenizer))
    options = replace(OPTIONS, level="neuron", n_random=0, n_added=0, n_resamples=0)
    circuit = ms.map_refusal_circuit(model, made.pairs.sample(12), options=options, **QUIET)
    found = testbed.score(circuit, made.truth)
    assert found.found_edges.precision == 1.0 and min(abs(edge.effect) for edge in circuit.edges) > 0.05


def test_neurons_of_the_circuit(mapped):
    made, model, _ = mapped
    circuit = ms.map_refusal_circuit(model, made.pairs.sample(12), options=replace(OPTIONS, level="neuron"), **QUIET)
    found = testbed.score(circuit, made.truth)
    assert found.found_nodes.precision >= 0.95 and found.found_nodes.recall >= 0.95 and found.decoys_found == ()
    assert found.role_accuracy >= 0.9


def test_a_circuit_too_large_to_measure_each_neuron(monkeypatch):
    """The neurons of an MLP are then measured together: they share a role, and edges run between MLPs."""
    for module in (mapping, wiring, verify):
        monkeypatch.setattr(module, "MAX_EXACT", 2)
    made = testbed.planted(seed=6, layers=4, heads=2, backups=1, decoys=0)
    model = ms.load_model((made.model, made.tokenizer))
    options = replace(OPTIONS, level="neuron", n_random=0, n_added=4, n_resamples=0)
    circuit = ms.map_refusal_circuit(model, made.pairs.sample(12), options=options, **QUIET)
    neurons = [member for member in circuit.nodes if member.node.kind == "neuron"]
    homes = {member.node.home for member in circuit.nodes}
    assert len(neurons) > len({member.node.layer for member in neurons}) and len(circuit) > 2
    for home in {member.node.home for member in neurons}:
        own = [member for member in neurons if member.node.home == home]
        assert {(member.role, member.evidence) for member in own} == {(own[0].role, own[0].evidence)}
        assert own[0].evidence.together == str(home)
        assert own[0].role == made.truth.roles[own[0].node]
    assert homes == on_a_path([member.edge for member in circuit.edges]) - {EMBED, LOGITS}
    assert sum(member.status != "estimated" for member in circuit.nodes) < len(circuit)
    claim = {claim.name: claim for claim in circuit.verification.claims}["minimality"]
    n_parts = len(circuit) - sum(member.evidence.backup_of is not None for member in circuit.nodes)
    assert len(circuit.verification.minimality) == 2
    assert claim.statement.startswith(f"each of 2 of the {n_parts} parts, drawn at random, adds")
    assert [cut.split(":")[0] for cut in circuit.search.cut] == [
        "exact effects of single nodes",
        "edges and roles of single neurons",
        "minimality",
    ]
    assert ms.RefusalCircuit.from_json(circuit.to_json()).to_json() == circuit.to_json()
    whole = circuit.by_mlp()
    assert [member.node for member in whole.nodes] == sorted(homes, key=lambda node: node.order)
    drawn = layout_circuit(circuit)
    assert {mark.key for mark in drawn.nodes} == {str(node) for node in homes} | {"embed", "logits"}
    assert len(drawn.edges) == len(circuit.edges)
    assert any("neurons were measured together by MLP" in label.text for label in drawn.labels)
    assert str(neurons[0].node) not in circuit.to_networkx() and neurons[0].evidence.together in circuit.to_networkx()
    kept = circuit.subset([circuit.nodes[0].node, neurons[0].node])
    ends = {circuit.nodes[0].node, neurons[0].node.home, EMBED, LOGITS}
    assert {member.node for member in kept.by_mlp().nodes} == ends - {EMBED, LOGITS}, "one neuron left of its MLP"
    assert {end for path in kept.edges for end in (path.edge.sender, path.edge.receiver)} <= ends and kept.edges
    assert neurons[0].evidence.together in render_report(circuit) and "L0.N" not in circuit_tikz(circuit)


TWO_DOUBLED = {
    "the edge between the backups": {"seed": 3007, "layers": 4, "heads": 8, "kv_heads": 2, "decoys": 0, "neurons": 3},
    "the edge from a primary to the other's backup": {"seed": 4004, "layers": 5, "heads": 4, "decoys": 4, "neurons": 2},
}


@pytest.mark.parametrize("level", ["node", "edge"])
@pytest.mark.parametrize("shape", TWO_DOUBLED)
def test_every_edge_of_two_doubled_stages_is_found(shape, level):
    """An edge between backups of two primaries carries something only while both primaries are patched."""
    made = testbed.planted(**TWO_DOUBLED[shape], backups=2)
    model = ms.load_model((made.model, made.tokenizer))
    options = replace(OPTIONS, level=level, n_random=0, n_added=0)
    circuit = ms.map_refusal_circuit(model, made.pairs.sample(12), options=options, **QUIET)
    assert len(circuit.search.backups) == 2
    assert {member.edge for member in circuit.edges} == set(made.truth.edges)


def test_edges_behind_two_backups():
    """A gradient does not see one edge of this model, ranked last: the rest must not come along."""
    made = testbed.planted(seed=3008, layers=4, heads=4, norm="layernorm", decoys=0, backups=2, neurons=1)
    model = ms.load_model((made.model, made.tokenizer))
    circuit = ms.map_refusal_circuit(model, made.pairs.sample(12), options=replace(OPTIONS, level="edge"), **QUIET)
    found = testbed.score(circuit, made.truth)
    assert circuit.search.minimal and found.found_nodes.precision == 1.0 and found.found_edges.precision >= 0.8
