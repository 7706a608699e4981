"""Two circuits side by side."""

import dataclasses

import pytest

from mechsafety import MechsafetyError, Node
from mechsafety.circuits.circuit import (
    CircuitEdge,
    CircuitNode,
    ModelShape,
    RefusalCircuit,
    Verification,
)
from mechsafety.circuits.comparison import CircuitComparison, compare_circuits
from mechsafety.circuits.goal import Goal
from mechsafety.nodes import Edge
from mechsafety.results import Provenance

ONE, TWO, THREE, FOUR = Node("head", 0, 1), Node("mlp", 0), Node("head", 1, 0), Node("head", 1, 1)


def circuit(nodes, edges=(), model="a", **changes):
    made = RefusalCircuit(
        Provenance(model, "ab" * 32, "float32", "cpu", "cd" * 32),
        {"name": "refusal_log_odds", "refusal_tokens": ["no"], "comply_tokens": []},
        {},
        tuple(nodes),
        tuple(edges),
        Verification.not_measured(Goal(0.8), "made by hand"),
        10,
        shape=ModelShape(2, 4, 16),
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture
def found() -> CircuitComparison:
    a = circuit(
        [
            CircuitNode(ONE, "detection", 0.4, (0.3, 0.5)),
            CircuitNode(TWO, "evaluation", 0.2, (0.1, 0.3)),
            CircuitNode(THREE, "none", 0.2, (0.1, 0.3)),
        ],
        [CircuitEdge(Edge(ONE, TWO, "mlp"), 0.2), CircuitEdge(Edge(ONE, THREE, "v"), 0.1)],
    )
    b = circuit(
        [
            CircuitNode(ONE, "detection", 0.6, (0.5, 0.7)),
            CircuitNode(THREE, "decision", 0.2, (0.1, 0.3)),
            CircuitNode(FOUR, "production", 0.3),
        ],
        [CircuitEdge(Edge(ONE, THREE, "v"), 0.3), CircuitEdge(Edge(ONE, FOUR, "v"), -0.5)],
        model="b",
    )
    return compare_circuits(a, b)


def test_what_appears_vanishes_and_changes(found):
    rows = {row.part: row for row in found.nodes}
    assert list(rows) == [ONE, TWO, THREE, FOUR]
    assert [row.change for row in found.nodes] == ["stays", "vanishes", "changes", "appears"]
    assert rows[ONE].overlap is True and rows[ONE].effects == (0.4, 0.6), "the intervals touch"
    assert rows[THREE].roles == ("none", "decision") and rows[TWO].roles == ("evaluation", None)
    assert rows[FOUR].effects == (None, 0.3) and rows[FOUR].overlap is None
    assert [(str(row.part), row.change) for row in found.edges] == [
        ("L0.H1 -> L1.H1 (v)", "appears"),
        ("L0.H1 -> L1.H0 (v)", "stays"),
        ("L0.H1 -> L0.MLP (mlp)", "vanishes"),
    ]
    assert found.jaccard == 0.5 and [row.part for row in found.having("appears")] == [FOUR]
    assert repr(found) == "CircuitComparison(a -> b: nodes 1 appear, 1 vanish, 1 change, 1 stay; overlap 0.50)"


def test_effects_change_where_intervals_are_apart():
    a, b = (circuit([CircuitNode(ONE, "none", e, ci)]) for e, ci in ((0.4, (0.3, 0.49)), (0.6, (0.5, 0.7))))
    (row,) = compare_circuits(a, b).nodes
    assert (row.change, row.overlap) == ("changes", False)
    estimated = circuit([CircuitNode(ONE, "none", 0.9)])
    (row,) = compare_circuits(a, estimated).nodes
    assert (row.change, row.overlap) == ("stays", None), "an estimate has no interval to be apart from"


def test_table_figure_and_file(found, tmp_path):
    frame = found.to_dataframe()
    assert list(frame.part)[:4] == ["L0.H1", "L0.MLP", "L1.H0", "L1.H1"] and list(frame.kind).count("edge") == 3
    assert frame.ci_low_second[0] == 0.5 and frame.role_first[1] == "evaluation"
    assert sum(len(trace.x) for trace in found.plot().data) == 4
    back = CircuitComparison.load(found.save(tmp_path / "comparison"))
    assert (back.nodes, back.edges, back.jaccard) == (found.nodes, found.edges, found.jaccard)


def test_the_same_circuit_twice(found):
    one = circuit([CircuitNode(ONE, "none", 0.4, (0.3, 0.5))])
    same = compare_circuits(one, one)
    assert [row.change for row in same.nodes] == ["stays"] and same.jaccard == 1.0
    assert compare_circuits(circuit([]), circuit([])).nodes == ()
    with pytest.raises(MechsafetyError, match=r"^change 'grows'; expected one of \('appears', 'vanishes', "):
        same.having("grows")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"shape": ModelShape(3, 4, 16)},
            r"^circuits of different shape \(\(2, 4, 16\) and \(3, 4, 16\)\); expected two",
        ),
        (
            {"level": "edge"},
            r"^circuits of different level \(node and edge\); expected two circuits of one architecture",
        ),
        ({"n_candidates": 11}, r"^circuits of different number of candidates \(10 and 11\); expected two circuits"),
    ],
)
def test_different_shapes_are_refused(changes, message):
    with pytest.raises(MechsafetyError, match=message):
        compare_circuits(circuit([]), circuit([], **changes))


def test_circuits_of_neurons_take_apart_what_they_found():
    a, b = circuit([], level="neuron", n_candidates=20), circuit([], level="neuron", n_candidates=30)
    assert compare_circuits(a, b).jaccard == 0.0 and a.merge(b).n_candidates == 30


def test_files_of_version_1_have_no_shape_to_compare():
    assert compare_circuits(circuit([]), circuit([], shape=None)).jaccard == 0.0
