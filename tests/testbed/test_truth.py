"""The truth refuses what contradicts itself."""

import pytest

import mechsafety as ms
from mechsafety.circuits import circuit
from mechsafety.nodes import Edge, Node
from mechsafety.testbed import Truth

HEAD, MLP = Node("head", 0, 1), Node("mlp", 1)
ROLES = {HEAD: "detection", MLP: "production"}


def test_units_are_heads_and_neurons_or_heads_and_mlps():
    neuron = Node("neuron", 1, 3)
    coarse = Truth((HEAD, MLP), (), (Edge(HEAD, MLP, "mlp"),), ROLES)
    fine = Truth((HEAD, MLP), (neuron,), (), {**ROLES, neuron: "production"})
    assert list(coarse.units()) == [HEAD, MLP]
    assert list(fine.units()) == [HEAD, neuron]
    assert repr(coarse) == "Truth(2 nodes, 0 neurons, 1 edges, 0 decoys, 0 backed up)"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"roles": {HEAD: "detection"}}, "the role of L1.MLP; expected one for every node of the circuit and no other"),
        ({"decoys": (MLP,)}, "L1.MLP is not a decoy; expected decoys outside, backups inside"),
        (
            {"backups": ((Node("mlp", 0), MLP),)},
            "L0.MLP is not a node of the circuit; expected decoys outside, backups inside",
        ),
        (
            {"roles": {HEAD: "thinking", MLP: "production"}},
            f"roles ['thinking']; expected some of {circuit.ROLES}",
        ),
    ],
)
def test_contradictions(change, text):
    fields = {"nodes": (HEAD, MLP), "neurons": (), "edges": (), "roles": ROLES} | change
    with pytest.raises(ms.MechsafetyError) as error:
        Truth(**fields)
    assert str(error.value) == text
