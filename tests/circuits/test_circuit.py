"""Nodes, edges and the circuit's file format: what is written, what is refused."""

import dataclasses
import json
import math

import pytest

from mechsafety import Edge, MechsafetyError, Node, RefusalCircuit
from mechsafety.circuits.circuit import (
    Behaviour,
    CircuitEdge,
    CircuitNode,
    CurvePoint,
    MapDetails,
    NodeScore,
    RandomControls,
    RoleEvidence,
    Verification,
)
from mechsafety.nodes import head_and_mlp_nodes
from mechsafety.results import Provenance

HEAD, MLP, NEURON = Node("head", 1, 3), Node("mlp", 1), Node("neuron", 2, 40)


@pytest.fixture
def circuit() -> RefusalCircuit:
    nodes = (
        CircuitNode(HEAD, "detection", 0.25, (0.125, 0.5), 0.001, "verified", RoleEvidence(direct=0.1, at_suffix=-0.2)),
        CircuitNode(MLP, "evaluation", 0.125, (0.1, 0.2), 0.04, "measured"),
        CircuitNode(NEURON, "none", -0.5),
    )
    edges = (
        CircuitEdge(Edge(HEAD, MLP, "mlp"), 0.2, "measured", 0.25),
        CircuitEdge(Edge(Node("embed"), HEAD, "v"), -0.1),
        CircuitEdge(Edge(MLP, Node("logits"), "resid"), 0.05),
    )
    check = Verification(
        faithfulness=0.75,
        held_out_faithfulness=0.5,
        held_out_ci=(0.25, 0.625),
        held_out_topics=("fraud", "weapons"),
        necessity=0.9,
        random_controls=RandomControls(120, 0.05, 0.125, 1 / 121),
        curve=(CurvePoint(0.25, 1, 0.25, 0.2), CurvePoint(1.0, 4, 1.0, 1.0)),
        cmd=0.3,
        cpr=0.7,
        target=0.8,
        reached=False,
        minimality={"L1.H3": 0.5},
    )
    return RefusalCircuit(
        provenance=Provenance("tiny", "ab" * 32, "float32", "cpu", "cd" * 32, 0, {"limit": 4}, {"mechsafety": "0.1.0"}),
        metric={"name": "refusal_log_odds", "refusal_tokens": ["I", " can't", "\u00e9"], "comply_tokens": []},
        behaviour={
            "harmful": Behaviour(4, 0.75, (0.3, 0.95), 3.0, (2.0, 4.0)),
            "harmless": Behaviour(4, 0.0, (0.0, 0.49), -8.0, (-9.0, -7.0)),
        },
        nodes=nodes,
        edges=edges,
        verification=check,
        n_candidates=4,
        details=MapDetails(2, 4, (NodeScore(HEAD, 0.3, 0.25, (0.125, 0.5), 0.001, True), NodeScore(MLP, 0.1))),
    )


# --- nodes and edges --------------------------------------------------------------------------------------------------


def test_node_names():
    nodes = (HEAD, MLP, NEURON, Node("embed"), Node("logits"))
    assert list(map(str, nodes)) == ["L1.H3", "L1.MLP", "L2.N40", "embed", "logits"]
    assert str(Edge(HEAD, MLP, "mlp")) == "L1.H3 -> L1.MLP (mlp)"


def test_nodes_sort_in_the_order_of_computation():
    ordered = [
        Node("embed"),
        Node("head", 0, 1),
        Node("head", 0, 2),
        Node("mlp", 0),
        Node("neuron", 0, 0),
        Node("neuron", 0, 9),
        Node("head", 1, 0),
        Node("mlp", 1),
        Node("logits"),
    ]
    assert sorted(reversed(ordered), key=lambda node: node.order) == ordered
    assert len({node.order for node in ordered}) == len(ordered)


def test_all_heads_and_mlps_in_order():
    nodes = head_and_mlp_nodes(3, 4)
    assert len(set(nodes)) == 3 * 4 + 3
    assert list(nodes) == sorted(nodes, key=lambda node: node.order)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("heads", 1, 2), "node kind 'heads'; expected one of ('embed', 'head', 'mlp', 'neuron', 'logits')"),
        (("head", 1), "a node of kind 'head' with layer 1 and index None"),
        (("head",), "a node of kind 'head' with layer None and index None"),
        (("neuron", None, 3), "a node of kind 'neuron' with layer None and index 3"),
        (("mlp",), "a node of kind 'mlp' with layer None and index None"),
        (("mlp", 1, 2), "a node of kind 'mlp' with layer 1 and index 2"),
        (("logits", 4), "a node of kind 'logits' with layer 4 and index None"),
    ],
)
def test_nodes_that_cannot_be(args, expected):
    with pytest.raises(MechsafetyError) as caught:
        Node(*args)
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((HEAD, MLP, "w"), "edge slot 'w'; expected one of ('q', 'k', 'v', 'mlp', 'resid')"),
        ((MLP, HEAD, "q"), "edge L1.MLP -> L1.H3 runs against the order of computation"),
        ((HEAD, HEAD, "q"), "edge L1.H3 -> L1.H3 runs against the order of computation"),
        ((Node("logits"), HEAD, "q"), "edge logits -> L1.H3 runs against the order of computation"),
        ((HEAD, Node("embed"), "resid"), "edge L1.H3 -> embed runs against the order of computation"),
        ((HEAD, Node("head", 1, 4), "q"), "edge L1.H3 -> L1.H4 runs against the order of computation"),
    ],
)
def test_edges_that_cannot_be(args, expected):
    with pytest.raises(MechsafetyError) as caught:
        Edge(*args)
    assert str(caught.value) == expected


def test_nodes_are_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        HEAD.layer = 2
    assert {Node("head", 1, 3): 1}[HEAD] == 1


# --- the circuit ------------------------------------------------------------------------------------------------------


def test_membership_iteration_and_repr(circuit):
    assert HEAD in circuit
    assert Node("head", 0, 0) not in circuit
    assert [member.node for member in circuit] == [HEAD, MLP, NEURON]
    assert repr(circuit) == ("RefusalCircuit(tiny: 3 of 4 nodes, 3 edges, held-out faithfulness 0.50, p = 0.00826)")


def test_by_role(circuit):
    assert [member.node for member in circuit.by_role("detection")] == [HEAD]
    assert circuit.by_role("production") == ()
    with pytest.raises(MechsafetyError) as caught:
        circuit.by_role("detector")
    assert str(caught.value) == (
        "role 'detector'; expected one of ('detection', 'evaluation', 'decision', 'production', 'none')"
    )


def test_tables(circuit):
    frame = circuit.to_dataframe()
    assert list(frame.name) == ["L1.H3", "L1.MLP", "L2.N40"]
    assert list(frame.effect) == [0.25, 0.125, -0.5]
    assert frame.ci_low[0] == 0.125
    assert math.isnan(frame.ci_low[2])
    assert frame.at_suffix[0] == -0.2
    scores = circuit.scores_dataframe()
    assert list(scores.in_circuit) == [True, False]
    with pytest.raises(MechsafetyError) as caught:
        circuit.without_details().scores_dataframe()
    assert str(caught.value) == "this circuit has no scores of its candidates; run map_refusal_circuit again"


# --- the file ---------------------------------------------------------------------------------------------------------


def test_json_has_the_designed_shape(circuit):
    data = json.loads(circuit.to_json())
    assert (data["format"], data["version"]) == ("mechsafety.circuit", 1)
    assert data["provenance"]["mechsafety"] == "0.1.0"
    assert data["nodes"][0] == {
        "kind": "head",
        "layer": 1,
        "index": 3,
        "role": "detection",
        "effect": 0.25,
        "ci": [0.125, 0.5],
        "p_value": 0.001,
        "status": "verified",
        "evidence": {"direct": 0.1, "at_suffix": -0.2},
    }
    assert data["edges"][0] == {
        "from": {"kind": "head", "layer": 1, "index": 3},
        "to": {"kind": "mlp", "layer": 1, "index": None},
        "slot": "mlp",
        "effect": 0.2,
        "status": "measured",
        "estimate": 0.25,
    }
    assert data["behaviour"]["harmful"]["refusal_rate"] == 0.75
    check = data["verification"]
    assert check["held_out"] == {"faithfulness": 0.5, "ci": [0.25, 0.625], "topics": ["fraud", "weapons"]}
    assert check["random_controls"] == {"n": 120, "mean": 0.05, "highest": 0.125, "p_value": 0.00826446}
    assert check["curve"][0] == {"k": 0.25, "n_nodes": 1, "faithfulness": 0.25, "held_out": 0.2}
    assert {"faithfulness", "completeness", "minimality", "cmd", "cpr"} <= set(check)


def test_round_trip(circuit):
    text = circuit.to_json()
    loaded = RefusalCircuit.from_json(text)
    assert loaded.to_json() == text
    kept = dataclasses.replace(
        circuit.without_details(),
        verification=dataclasses.replace(
            circuit.verification, random_controls=RandomControls(120, 0.05, 0.125, 0.00826446)
        ),
    )
    assert loaded == kept


def test_same_bytes_twice_in_a_file(circuit, tmp_path):
    one, two = circuit.save(tmp_path / "one.json"), circuit.save(tmp_path / "two.json")
    assert one.read_bytes() == two.read_bytes()
    assert RefusalCircuit.load(one).save(two).read_bytes() == one.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "two.json"]
    assert "\u00e9" in one.read_text(encoding="utf-8")


def test_six_digits_hide_the_last_bits(circuit):
    nearly = dataclasses.replace(circuit.nodes[0], effect=0.1 + 0.2)
    exactly = dataclasses.replace(circuit.nodes[0], effect=0.3)
    texts = [dataclasses.replace(circuit, nodes=(node,), edges=()).to_json() for node in (nearly, exactly)]
    assert texts[0] == texts[1]


def test_what_is_no_number_becomes_null(circuit):
    check = dataclasses.replace(circuit.verification, completeness=math.nan, minimality={"L1.H3": math.inf})
    text = dataclasses.replace(circuit, verification=check).to_json()
    assert "NaN" not in text
    assert "Infinity" not in text
    loaded = RefusalCircuit.from_json(text).verification
    assert loaded.completeness is None
    assert loaded.minimality == {"L1.H3": None}


def test_nodes_without_measurements_stay_so(circuit):
    loaded = RefusalCircuit.from_json(circuit.to_json()).nodes[2]
    assert (loaded.ci, loaded.p_value, loaded.status, loaded.evidence) == (None, None, "estimated", RoleEvidence())


def test_missing_file(tmp_path):
    with pytest.raises(MechsafetyError) as caught:
        RefusalCircuit.load(tmp_path / "none.json")
    assert str(caught.value) == f"no such file: {tmp_path / 'none.json'}; expected a circuit.json"


def test_not_utf8(circuit, tmp_path):
    path = tmp_path / "circuit.json"
    path.write_bytes(circuit.to_json().encode("latin-1"))
    with pytest.raises(MechsafetyError) as caught:
        RefusalCircuit.load(path)
    assert str(caught.value) == f"{path} is not UTF-8 text; expected a circuit.json"


def put(*path_and_value):
    """An edit of the parsed file: put(keys..., value) sets, and the value DROP removes."""
    *path, last, value = path_and_value

    def change(data):
        for key in path:
            data = data[key]
        if value is DROP:
            del data[last]
        else:
            data[last] = value

    return change


DROP = object()
THIS = "; expected a circuit.json of this format"
ROLES = "('detection', 'evaluation', 'decision', 'production', 'none')"
STATUS = "('estimated', 'measured', 'verified', 'rejected')"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (put("format", "mechsafety.result"), 'not a circuit file; expected "format": "mechsafety.circuit"'),
        (put("format", DROP), 'not a circuit file; expected "format": "mechsafety.circuit"'),
        (put("version", 2), "circuit format version 2; expected at most 1"),
        (put("version", "1"), "circuit format version '1'; expected at most 1"),
        (put("version", DROP), "circuit format version None; expected at most 1"),
        (put("provenance", DROP), "provenance: field 'provenance' is missing" + THIS),
        (put("metric", DROP), "the file: field 'metric' is missing" + THIS),
        (put("n_candidates", DROP), "the file: field 'n_candidates' is missing" + THIS),
        (put("behaviour", "harmful", "refusal_ci", DROP), "behaviour: field 'refusal_ci' is missing" + THIS),
        (put("verification", "held_out", DROP), "verification: field 'held_out' is missing" + THIS),
        (put("verification", "held_out", "topics", DROP), "verification: field 'topics' is missing" + THIS),
        (put("nodes", 1, "role", DROP), "nodes: field 'role' is missing" + THIS),
        (put("nodes", 1, "layer", DROP), "nodes: field 'layer' is missing" + THIS),
        (put("nodes", 1, "role", "detector"), f"nodes: role 'detector'; expected one of {ROLES}"),
        (put("nodes", 1, "status", "guessed"), f"nodes: status 'guessed'; expected one of {STATUS}"),
        (put("nodes", 0, "effect", None), "nodes: effect None, p_value 0.001; expected numbers"),
        (put("nodes", 0, "p_value", "low"), "nodes: effect 0.25, p_value 'low'; expected numbers"),
        (put("nodes", 0, "ci", [0.1]), "nodes: list index out of range" + THIS),
        (
            put("nodes", 0, "kind", "tail"),
            "node kind 'tail'; expected one of ('embed', 'head', 'mlp', 'neuron', 'logits')",
        ),
        (put("nodes", 0, "index", None), "a node of kind 'head' with layer 1 and index None"),
        (put("edges", 0, "effect", None), "edges: effect None; expected a number"),
        (put("edges", 0, "status", "sure"), f"edges: status 'sure'; expected one of {STATUS}"),
        (put("edges", 0, "slot", "z"), "edge slot 'z'; expected one of ('q', 'k', 'v', 'mlp', 'resid')"),
        (put("edges", 0, "slot", DROP), "edges: field 'slot' is missing" + THIS),
        (
            put("edges", 0, "to", {"kind": "head", "layer": 0, "index": 0}),
            "edge L1.H3 -> L0.H0 runs against the order of computation",
        ),
        (
            put("provenance", "user", "me"),
            "provenance has the unknown fields ['user']; expected some of ['device', 'dtype', 'model', 'options', "
            "'seed', 'template_sha256', 'versions', 'weights_sha256']",
        ),
    ],
)
def test_files_that_are_refused(circuit, tmp_path, change, expected):
    data = json.loads(circuit.to_json())
    change(data)
    path = tmp_path / "circuit.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(MechsafetyError) as caught:
        RefusalCircuit.load(path)
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (put("verification", "cmd", DROP), r"^verification: .*missing.*'cmd'"),
        (put("verification", "luck", 1), r"^verification: .*unexpected keyword argument 'luck'"),
        (put("nodes", 0, "evidence", {"hunch": 1}), r"^nodes: .*unexpected keyword argument 'hunch'"),
        (put("nodes", 3), r"^nodes: 'int' object is not iterable"),
        (put("nodes", 0, "L1.H3"), r"^nodes: "),
        (put("behaviour", []), r"^behaviour: 'list' object has no attribute 'items'"),
    ],
)
def test_wrong_shapes_name_the_part(circuit, change, pattern):
    data = json.loads(circuit.to_json())
    change(data)
    with pytest.raises(MechsafetyError, match=pattern) as caught:
        RefusalCircuit.from_json(json.dumps(data))
    assert str(caught.value).endswith(THIS)


@pytest.mark.parametrize("text", ["[]", '"mechsafety.circuit"', "null"])
def test_json_that_is_no_object(text):
    with pytest.raises(MechsafetyError, match=r'^not a circuit file; expected "format": "mechsafety.circuit"$'):
        RefusalCircuit.from_json(text)


def test_malformed_json():
    with pytest.raises(MechsafetyError) as caught:
        RefusalCircuit.from_json('{"format": ')
    assert str(caught.value) == (
        "malformed JSON (Expecting value: line 1 column 12 (char 11)); expected a circuit.json"
    )
