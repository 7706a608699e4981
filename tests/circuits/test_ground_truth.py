"""The whole map on models whose circuit is known: it finds what is planted, no decoy, and names roles and backups."""

from dataclasses import replace

import pytest

import mechsafety as ms
from mechsafety import testbed

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


def test_edges_behind_two_backups():
    """A gradient does not see one edge of this model, ranked last: the rest must not come along."""
    made = testbed.planted(seed=3008, layers=4, heads=4, norm="layernorm", decoys=0, backups=2, neurons=1)
    model = ms.load_model((made.model, made.tokenizer))
    circuit = ms.map_refusal_circuit(model, made.pairs.sample(12), options=replace(OPTIONS, level="edge"), **QUIET)
    found = testbed.score(circuit, made.truth)
    assert circuit.search.minimal and found.found_nodes.precision == 1.0 and found.found_edges.precision >= 0.8
