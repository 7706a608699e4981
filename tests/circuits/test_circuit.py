"""Nodes, edges and the circuit's file format: what is written, what is refused."""

import contextlib
import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch

from mechsafety import Edge, MechsafetyError, Node, RefusalCircuit
from mechsafety.circuits.circuit import (
    AttentionExample,
    Backup,
    Behaviour,
    CircuitEdge,
    CircuitNode,
    CurvePoint,
    FreshCheck,
    KindCounts,
    MapDetails,
    ModelShape,
    NodeScore,
    Notes,
    RandomControls,
    RoleEvidence,
    Search,
    Verification,
)
from mechsafety.circuits.verification.outcome import Claim, Independence, SideEffects, Stability
from mechsafety.nodes import head_and_mlp_nodes
from mechsafety.replies import KINDS
from mechsafety.results import Provenance
from mechsafety.viz.report import render_report
from mechsafety.viz.words import caption, concentration, finding

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


@pytest.fixture
def full(circuit) -> RefusalCircuit:
    """A circuit with a value in every field."""
    backup = Backup(MLP, HEAD, (HEAD, MLP), 0.01, 0.02, 0.5, (0.4, 0.6), 0.01)
    check = dataclasses.replace(
        circuit.verification,
        random_controls=RandomControls(120, 0.05, 0.125, 0.01),
        completeness=0.25,
        completeness_without=("L1.H3",),
        fresh=FreshCheck(5, 0.5, (0.25, 0.75)),
        necessity_controls=RandomControls(100, 0.5, 0.75, 0.5),
        minimality_p={"L1.H3": 0.5},
        independence=Independence(5, 0.125, 0.5, -0.25, (-0.5, 0.125)),
        minimality_ci={"L1.H3": (0.25, 0.75)},
        minimality_null=0.125,
        goal="match",
        stability=Stability((0.5, 0.75), 0.625, (3, 4)),
        side_effects=SideEffects(0.1, (0.0, 0.2), 0.3, (0.2, 0.4)),
        claims=(
            Claim("faithfulness", "it is", 0.5, (0.25, 0.625), None, "at least 0.8", False),
            Claim("sufficiency", "so it is", 0.5, None, 0.01, "p < 0.05", True),
            Claim("stability", "still", None, None, None, "mean Jaccard overlap at least 0.5", None, "left out"),
        ),
    )
    evidence = RoleEvidence(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.15, 0.35, "L1.H3", 0.25)
    return dataclasses.replace(
        circuit,
        nodes=(dataclasses.replace(circuit.nodes[0], evidence=evidence), *circuit.nodes[1:]),
        verification=check,
        search=Search(9, 6, True, (backup,), (circuit.edges[1].edge,), (Node("head", 0, 2),), ("removal: 1 of 2",)),
        shape=ModelShape(2, 4, 64),
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
        ((HEAD, MLP, "w"), "edge slot 'w'; expected one of ('mlp',)"),
        ((MLP, NEURON, "q"), "edge slot 'q'; expected one of ('mlp',)"),
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
        "role 'detector'; expected one of ('detection', 'relay', 'evaluation', 'decision', 'production', 'none')"
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
    assert (data["format"], data["version"]) == ("mechsafety.circuit", 5)
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
        "ci": None,
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
    assert math.isnan(loaded.minimality["L1.H3"])


def test_nodes_without_measurements_stay_so(circuit):
    loaded = RefusalCircuit.from_json(circuit.to_json()).nodes[2]
    assert (loaded.ci, loaded.p_value, loaded.status, loaded.evidence) == (None, None, "estimated", RoleEvidence())


def test_missing_file(tmp_path):
    with pytest.raises(MechsafetyError) as caught:
        RefusalCircuit.load(tmp_path / "none.json")
    assert str(caught.value) == f"no such file: {tmp_path / 'none.json'}; expected what RefusalCircuit.save wrote"


def test_not_utf8(circuit, tmp_path):
    path = tmp_path / "circuit.json"
    path.write_bytes(circuit.to_json().encode("latin-1"))
    with pytest.raises(MechsafetyError) as caught:
        RefusalCircuit.load(path)
    assert str(caught.value) == f"{path}: not UTF-8 text; expected what RefusalCircuit.save wrote"


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
FIELDS = "; expected the fields of "
AGAIN = "; expected 1 to 5; make the circuit again"
ROLES = "('detection', 'relay', 'evaluation', 'decision', 'production', 'none')"
STATUS = "('estimated', 'measured', 'verified', 'rejected')"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (put("format", "mechsafety.result"), 'not a circuit file; expected "format": "mechsafety.circuit"'),
        (put("format", DROP), 'not a circuit file; expected "format": "mechsafety.circuit"'),
        (put("version", 6), "circuit format version 6; expected 1 to 5; pip install --upgrade mechsafety"),
        (put("version", 0), "circuit format version 0" + AGAIN),
        (put("version", True), "circuit format version True" + AGAIN),
        (put("version", "1"), "circuit format version '1'" + AGAIN),
        (put("version", DROP), "circuit format version None" + AGAIN),
        (put("provenance", DROP), "field 'provenance' is missing" + FIELDS + "RefusalCircuit"),
        (
            put("behaviour", "harmful", "refusal_ci", DROP),
            "behaviour.harmful: field 'refusal_ci' is missing" + FIELDS + "Behaviour",
        ),
        (put("behaviour", "harmless", DROP), "behaviour: field 'harmless' is missing; expected harmful and harmless"),
        (put("verification", "held_out", DROP), "verification: field 'held_out' is missing" + FIELDS + "Verification"),
        (
            put("verification", "held_out", "topics", DROP),
            "verification.held_out: field 'topics' is missing" + FIELDS + "Verification",
        ),
        (put("verification", "luck", 1), "verification: unknown field 'luck'" + FIELDS + "Verification"),
        (put("verification", "curve", 0, "k", "x"), "verification.curve[0].k: 'x'; expected a number"),
        (put("nodes", 1, "role", DROP), "nodes[1]: field 'role' is missing" + FIELDS + "CircuitNode"),
        (put("nodes", 1, "role", "detector"), f"nodes[1].role: 'detector'; expected one of {ROLES}"),
        (put("nodes", 1, "status", "guessed"), f"nodes[1].status: 'guessed'; expected one of {STATUS}"),
        (put("nodes", 0, "effect", None), "nodes[0].effect: None; expected a number"),
        (put("nodes", 0, "effect", True), "nodes[0].effect: True; expected a number"),
        (put("nodes", 0, "p_value", 1.5), "nodes[0].p_value: 1.5; expected a number from 0 to 1"),
        (put("nodes", 0, "ci", [0.1]), "nodes[0].ci: 1 values; expected 2"),
        (
            put("nodes", 0, "evidence", {"hunch": 1}),
            "nodes[0].evidence: unknown field 'hunch'" + FIELDS + "RoleEvidence",
        ),
        (put("nodes", 0, "L1.H3"), "nodes[0]: 'L1.H3'; expected an object"),
        (put("nodes", 3), "nodes: 3; expected a list"),
        (
            put("nodes", 0, "kind", "tail"),
            "nodes[0]: node kind 'tail'; expected one of ('embed', 'head', 'mlp', 'neuron', 'logits')",
        ),
        (put("nodes", 0, "index", None), "nodes[0]: a node of kind 'head' with layer 1 and index None"),
        (put("nodes", 0, "layer", -1), "nodes[0].layer: -1; expected at least 0"),
        (
            put("nodes", 0, {"kind": "logits", "layer": None, "index": None}),
            "nodes[0]: field 'ci' is missing" + FIELDS + "CircuitNode",
        ),
        (put("edges", 0, "effect", None), "edges[0].effect: None; expected a number"),
        (put("edges", 0, "status", "sure"), f"edges[0].status: 'sure'; expected one of {STATUS}"),
        (put("edges", 0, "slot", "z"), "edges[0]: edge slot 'z'; expected one of ('mlp',)"),
        (put("edges", 1, "slot", "mlp"), "edges[1]: edge slot 'mlp'; expected one of ('q', 'k', 'v')"),
        (
            put("edges", 0, "from", {"kind": "neuron", "layer": 2, "index": 40}),
            "edges[0]: edge L2.N40 -> L1.MLP runs against the order of computation",
        ),
        (
            put("edges", 0, "from", {"kind": "head", "layer": 0, "index": 0}),
            "edges[0].from: L0.H0; expected a node of this circuit",
        ),
        (put("provenance", "user", "me"), "provenance: unknown field 'user'" + FIELDS + "Provenance"),
        (put("level", "layer"), "level: 'layer'; expected one of ('node', 'neuron', 'edge')"),
        (put("shape", {"n_layers": 2}), "shape: field 'd_mlp' is missing" + FIELDS + "ModelShape"),
        (put("colour", "red"), "unknown field 'colour'" + FIELDS + "RefusalCircuit"),
    ],
)
def test_files_that_are_refused(circuit, tmp_path, change, expected):
    data = json.loads(circuit.to_json())
    change(data)
    path = tmp_path / "circuit.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(MechsafetyError) as caught:
        RefusalCircuit.load(path)
    assert str(caught.value) == f"{path}: {expected}"


@pytest.mark.parametrize("part", ["nodes", "edges"])
def test_parts_given_twice(circuit, part):
    data = json.loads(circuit.to_json())
    data[part].append(data[part][0])
    with pytest.raises(MechsafetyError, match=r"each (once|edge once)|, each once"):
        RefusalCircuit.from_json(json.dumps(data))


def test_kinds_of_reply_are_kept_and_may_be_absent(circuit):
    """Files of earlier versions have none, and are written again as they were."""
    assert tuple(field.name for field in dataclasses.fields(KindCounts)) == KINDS
    assert "kinds" not in circuit.to_json()
    bad = dataclasses.replace(circuit.behaviour["harmful"], kinds=KindCounts(3, 0, 1, 0))
    counted = dataclasses.replace(circuit, behaviour={**circuit.behaviour, "harmful": bad})
    again = RefusalCircuit.from_json(counted.to_json())
    assert again.behaviour["harmful"].kinds == bad.kinds and again.behaviour["harmless"].kinds is None
    wrong = counted.to_json().replace('"degenerate": 1', '"degenerate": 2')
    with pytest.raises(
        MechsafetyError, match=r"^behaviour.harmful: kinds of reply \[3, 0, 2, 0\]; expected counts that"
    ):
        RefusalCircuit.from_json(wrong)


# fields whose contents are free, and those that a file may lack
FREE = ("options", "versions", "minimality", "minimality_p", "minimality_ci")
OPTIONAL = {
    "evidence",
    "estimate",
    "mechsafety",
    "level",
    "shape",
    "search",
    "seed",
    "options",
    "versions",
    "judge",
    "kinds",
}
OPTIONAL |= {field.name for field in dataclasses.fields(Verification) if field.default is not dataclasses.MISSING}
OPTIONAL |= {field.name for field in dataclasses.fields(RoleEvidence)}
OPTIONAL |= {"backups", "linked", "dropped", "cut", "minimal", "reason", "p_value", "pairs_needed", "correlation", "ci"}


def places(value, path=()):
    """Every place of the parsed file, by keys."""
    if path:
        yield path
    if path and path[-1] in FREE:
        return
    rows = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in rows:
        yield from places(item, (*path, key))


def name_of(path):
    return next(key for key in reversed(path) if isinstance(key, str))


def test_a_wrong_type_anywhere_is_refused_with_the_name_of_the_field(full):
    """Every field in turn gets a value of a type that no field has."""
    text, tried = full.to_json(), 0
    for path in places(json.loads(text)):
        data = json.loads(text)
        place = data
        for key in path[:-1]:
            place = place[key]
        scalar = not isinstance(place[path[-1]], dict | list)
        place[path[-1]] = [["wrong"]] if scalar else "wrong"
        with pytest.raises(MechsafetyError) as caught:
            RefusalCircuit.from_json(json.dumps(data))
        if path[0] not in ("format", "version"):
            assert name_of(path) in str(caught.value), path
        assert "\n" not in str(caught.value)
        tried += 1
    assert tried > 200


def test_a_field_missing_anywhere_is_named_or_has_a_default(full):
    text, refused = full.to_json(), 0
    for path in places(json.loads(text)):
        if not isinstance(path[-1], str) or path[0] in ("format", "version"):
            continue
        data = json.loads(text)
        place = data
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]
        if path[-1] in OPTIONAL and path[:2] != ("verification", "held_out"):
            with contextlib.suppress(MechsafetyError):  # some names are optional in one place and not in another
                RefusalCircuit.from_json(json.dumps(data))
            continue
        with pytest.raises(MechsafetyError, match=f"field '{path[-1]}' is missing"):
            RefusalCircuit.from_json(json.dumps(data))
        refused += 1
    assert refused > 80


def test_an_unknown_field_anywhere_is_named(full):
    text = full.to_json()
    for path in [(), *places(json.loads(text))]:
        data = json.loads(text)
        place = data
        for key in path:
            place = place[key]
        if not isinstance(place, dict) or (path and path[-1] in FREE):
            continue
        place["surprise"] = 1
        with pytest.raises(MechsafetyError, match="surprise"):
            RefusalCircuit.from_json(json.dumps(data))


def test_everything_comes_back(full):
    loaded = RefusalCircuit.from_json(full.to_json())
    assert loaded == full.without_details()
    assert loaded.to_json() == full.to_json()


def test_a_file_of_version_1_loads(circuit):
    data = json.loads(circuit.to_json())
    data["version"] = 1
    for name in ("level", "shape", "search"):
        del data[name]
    kept = ("faithfulness", "held_out", "necessity", "random_controls", "curve", "cmd", "cpr", "target", "reached")
    kept += ("completeness", "minimality", "fresh")
    data["verification"] = {name: data["verification"][name] for name in kept}
    loaded = RefusalCircuit.from_json(json.dumps(data))
    assert (loaded.level, loaded.search, loaded.shape, loaded.verification.claims) == ("node", None, None, ())
    assert loaded.nodes == circuit.nodes and loaded.verification.faithfulness == 0.75
    assert json.loads(loaded.to_json())["version"] == 5


def without_paths(circuit):
    """What is left of an older file's circuit: its sums over paths were other quantities of the same names."""
    gone = {"from_detection": None, "from_evaluation": None}
    nodes = [dataclasses.replace(m, evidence=dataclasses.replace(m.evidence, **gone)) for m in circuit.nodes]
    return dataclasses.replace(circuit.without_details(), nodes=tuple(nodes))


def test_a_file_of_version_3_has_a_test_of_equivalence(full):
    data = json.loads(full.to_json())
    data["version"] = 3
    data["verification"]["equivalence"] = {"margin": 0.2, "difference": -0.1, "ci": [-0.2, 0.1], "p_value": 0.5}
    assert RefusalCircuit.from_json(json.dumps(data)) == without_paths(full)
    data["version"] = 5
    with pytest.raises(MechsafetyError, match="equivalence"):
        RefusalCircuit.from_json(json.dumps(data))


def test_a_file_of_version_2_named_two_fields_of_backups_otherwise(full):
    data = json.loads(full.to_json())
    (row,) = data["search"]["backups"]
    assert list(row) == ["node", "primary", "group", "single", "primary_effect", "joint", "ci", "p_value"]
    data["version"] = 2
    old = {"behind": row.pop("primary"), "first": row.pop("primary_effect")}
    row |= old
    assert RefusalCircuit.from_json(json.dumps(data)) == without_paths(full)
    data["version"] = 3
    with pytest.raises(MechsafetyError, match=r"^search.backups\[0\]: field 'primary' is missing"):
        RefusalCircuit.from_json(json.dumps(data))


def test_a_folder_holds_the_details_and_every_digit(full, tmp_path):
    nearly = dataclasses.replace(full.nodes[0], effect=0.1 + 0.2)
    seen = AttentionExample("a", ("b",), (HEAD,), torch.rand(1, 1, 1))
    notes = {HEAD: Notes(("x",), spans={"suffix": 0.5}), NEURON: Notes(texts=((("a", "b"), (0.5, -1.0)),))}
    details = dataclasses.replace(full.details, attention=(seen,), notes=notes)
    whole = dataclasses.replace(full, nodes=(nearly, *full.nodes[1:]), details=details)
    path = whole.save(tmp_path / "circuit")
    loaded = RefusalCircuit.load(path)
    assert loaded.nodes[0] == nearly and loaded.details.notes == notes and loaded.details.scores == details.scores
    assert torch.equal(loaded.details.attention[0].patterns, seen.patterns)
    assert loaded.to_json() == whole.to_json()


# --- claims, parts, unions --------------------------------------------------------------------------------------------


def test_claims_are_counted_and_tabled(full):
    assert repr(full).endswith(", 1 of 3 claims hold)")
    frame = full.claims_dataframe()
    assert list(frame.name) == ["faithfulness", "sufficiency", "stability"]
    assert list(frame.passed) == [False, True, None] and frame.reason[2] == "left out"
    assert [str(claim) for claim in full.verification.claims] == [
        "faithfulness: FAILS (0.5 [0.25, 0.625]; at least 0.8)",
        "sufficiency: holds (0.5 p = 0.01; p < 0.05)",
        "stability: not measured (left out; mean Jaccard overlap at least 0.5)",
    ]
    assert [claim.name for claim in full.verification.failed] == ["faithfulness"]


def test_edges_as_a_table_and_the_circuit_as_a_graph(full):
    table, graph = full.edges_dataframe(), full.to_networkx()
    assert list(table.effect.abs()) == sorted(table.effect.abs(), reverse=True) and len(table) == len(full.edges)
    linked = {(str(edge.sender), str(edge.receiver), edge.slot) for edge in full.search.linked}
    assert {(row.sender, row.receiver, row.slot) for row in table.itertuples() if row.links} == linked
    assert graph.number_of_edges() == len(full.edges) and graph.graph["level"] == full.level
    for member in full.nodes:
        attributes = graph.nodes[str(member.node)]
        assert (attributes["role"], attributes["effect"]) == (member.role, member.effect)
    for row in table.itertuples():
        assert graph.edges[row.sender, row.receiver, row.slot]["effect"] == row.effect
    empty = dataclasses.replace(full, edges=()).edges_dataframe()
    assert empty.empty and list(empty.columns) == list(table.columns)


def unverified(circuit):
    check = circuit.verification
    assert not check.measured and math.isnan(check.faithfulness) and math.isnan(check.necessity)
    assert (check.minimality, check.completeness, check.curve, check.reached) == (None, None, (), False)
    assert "not verified" in repr(circuit) and "verified" not in {member.status for member in circuit.nodes}
    (claim,) = check.claims
    assert claim.passed is None
    assert RefusalCircuit.from_json(circuit.to_json()).to_json() == circuit.to_json()
    assert "\u2013" in render_report(circuit), "the report shows that there is no number"
    return claim.reason


def test_what_is_iterated_over_is_contained(circuit):
    assert all(member in circuit for member in circuit) and all(member.node in circuit for member in circuit)
    assert all(member in circuit and member.edge in circuit for member in circuit.edges)
    assert len(circuit) == len(list(circuit)) == 3
    assert Node("head", 0, 0) not in circuit and Edge(HEAD, MLP, "mlp") in circuit
    assert "L1.H3" in circuit and "0.0" not in circuit, "by name"
    assert dataclasses.replace(circuit.nodes[0], effect=9.0) not in circuit, "a measurement of another circuit"


def test_a_circuit_that_restores_more_than_the_model_says_so_and_where(circuit):
    """1.2 may be restored with the target 0.8; what counts is the whole interval, and the goal."""
    check = circuit.verification
    assert check.target == 0.8 and not check.overshoots and "more than the whole model" not in finding(circuit)
    held, nowhere = "held-out pairs", ()
    for change, where in (
        ({"held_out_ci": (1.2, 1.5)}, nowhere),
        ({"held_out_ci": (1.21, 1.5)}, (held,)),
        ({"held_out_ci": (1.21, 1.5), "goal": "match"}, nowhere),
        ({"held_out_ci": (1.21, 1.5), "fresh": FreshCheck(9, 1.0, (0.9, 1.1))}, (held,)),
        ({"fresh": FreshCheck(9, 1.4, (1.1, 1.5))}, nowhere),
        ({"fresh": FreshCheck(9, 1.4, (1.3, 1.5))}, ("fresh pairs",)),
        ({"held_out_ci": (1.3, 1.5), "fresh": FreshCheck(9, 1.4, (1.3, 1.5))}, (held, "fresh pairs")),
        ({"held_out_ci": (math.nan, math.nan)}, nowhere),
        ({"held_out_ci": (1.0 + 1e-8, 1.0), "target": 1.0}, nowhere),
    ):
        changed = dataclasses.replace(check, **change)
        assert changed.overshoots == where, change
        said = re.findall(
            "On ([^.]*) they restore more than the whole model",
            finding(dataclasses.replace(circuit, verification=changed)),
        )
        assert said == ([" and on ".join(where)] if where else []), change


def test_what_was_not_measured_is_not_judged(circuit):
    """No word about a target, chance or need where there is no number."""
    for part in (circuit.subset([MLP, HEAD]), circuit.merge(circuit)):
        assert not part.verification.reached
        page = re.sub(r"<(script|style).*?</\1>", "", render_report(part), flags=re.DOTALL)
        text = re.sub(r"<[^>]+>", " ", page.split('<section id="methods"')[0])
        for words in ("misses the target", "reaches the target", "target not reached", "not better than chance"):
            assert words not in text, words
        assert text.count("not measured") >= 4 and "not verified as a whole" in text
        assert not re.search(r"\bnan\b", text.lower())
        assert concentration(part) == "not measured" and "target" not in " ".join(caption(part, 1))
    check = dataclasses.replace(
        circuit.verification, random_controls=RandomControls(0, math.nan, math.nan, math.nan), necessity=math.nan
    )
    cut = dataclasses.replace(circuit, verification=check)
    assert finding(cut).endswith(". No random sets of the same size were drawn.")
    assert "no random circuits were drawn" in caption(cut, 1)[1]
    assert repr(cut).endswith("held-out faithfulness 0.50)")


def test_subset(circuit):
    part = circuit.subset([MLP, HEAD])
    assert [member.node for member in part] == [HEAD, MLP]
    assert [str(member.edge) for member in part.edges] == [
        "L1.H3 -> L1.MLP (mlp)",
        "embed -> L1.H3 (v)",
        "L1.MLP -> logits (resid)",
    ]
    assert part.nodes[0].effect == circuit.nodes[0].effect and part.behaviour == circuit.behaviour
    assert unverified(part) == "part of a circuit, not checked alone"
    assert [str(member.edge) for member in circuit.subset([MLP]).edges] == ["L1.MLP -> logits (resid)"]
    for keep, message in (([], "no nodes to keep"), ([Node("head", 0, 0)], "L0.H0 is not in this circuit")):
        with pytest.raises(MechsafetyError) as caught:
            circuit.subset(keep)
        assert str(caught.value) == f"{message}; expected nodes of the circuit"


def test_ids_of_the_metric_are_kept_and_old_files_have_none(circuit):
    metric = {"name": "refusal_log_odds", "refusal_tokens": ["I", " can't"], "comply_tokens": []}
    with_ids = metric | {"refusal_ids": [40, 518], "comply_ids": []}
    old, new = (dataclasses.replace(circuit, metric=some) for some in (metric, with_ids))
    assert json.loads(new.to_json()) == json.loads(old.to_json()) | {"metric": with_ids}
    for some in (old, new):
        back = RefusalCircuit.from_json(some.to_json())
        assert back.metric == some.metric and back.to_json() == some.to_json()
    assert len(old.merge(new)) == len(new.merge(old)) == 3, "one metric, in an older and a newer file"
    for wrong, message in (
        (
            {"refusal_ids": [40], "comply_ids": []},
            "metric: [1, 0] refusal_ids, comply_ids of [2, 0] tokens; expected one each",
        ),
        ({"refusal_ids": [40, "b"], "comply_ids": []}, "metric.refusal_ids[1]: 'b'; expected a whole number"),
        ({"refusal_ids": [40, 518]}, "metric: [2, None] refusal_ids, comply_ids of [2, 0] tokens; expected one each"),
    ):
        with pytest.raises(MechsafetyError) as caught:
            RefusalCircuit.from_json(dataclasses.replace(circuit, metric=metric | wrong).to_json())
        assert str(caught.value) == message


def test_saving_makes_folders(circuit, tmp_path):
    path = circuit.save(tmp_path / "new" / "dir" / "c.json")
    assert RefusalCircuit.load(path).to_json() == circuit.to_json()
    assert [p.name for p in path.parent.iterdir()] == ["c.json"]


def test_merge(circuit):
    other = dataclasses.replace(
        circuit,
        nodes=(CircuitNode(Node("head", 0, 0), "detection", 0.4), dataclasses.replace(circuit.nodes[0], effect=0.9)),
        edges=(CircuitEdge(Edge(Node("head", 0, 0), HEAD, "q"), 0.6), circuit.edges[0]),
    )
    both = circuit.merge(other)
    assert [member.node for member in both] == [Node("head", 0, 0), HEAD, MLP, NEURON]
    assert both.nodes[1].effect == 0.25, "its own measurement is kept"
    assert str(both.edges[0].edge) == "L0.H0 -> L1.H3 (q)" and len(both.edges) == 4
    assert unverified(both) == "merged, not checked as one circuit"
    assert both.provenance.options["merged_with"] == {"pairs": None, "seed": 0}
    assert {m.node for m in other.merge(circuit)} == {m.node for m in both}
    stranger = dataclasses.replace(
        circuit, provenance=dataclasses.replace(circuit.provenance, weights_sha256="ef" * 32)
    )
    with pytest.raises(MechsafetyError) as caught:
        circuit.merge(stranger)
    assert str(caught.value) == (
        "circuits with different weights (abababababab and efefefefefef); expected two circuits of one model; "
        "compare_circuits(a, b) sets them side by side"
    )


def test_circuits_under_two_system_texts_are_two_models(circuit):
    options = {"system": "you help", "enable_thinking": False}
    prompted = dataclasses.replace(
        circuit, provenance=dataclasses.replace(circuit.provenance, template_options=options)
    )
    assert RefusalCircuit.from_json(prompted.to_json()).provenance == prompted.provenance
    assert prompted.to_json() != circuit.to_json() and '"template_options"' not in circuit.to_json()
    with pytest.raises(MechsafetyError, match=r"^circuits with different template options \({} and {\"system\""):
        circuit.merge(prompted)


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


def test_the_builtin_circuit_is_the_gallerys_map_of_the_demo_model():
    found = RefusalCircuit.builtin()
    drawn = Path(__file__).parents[2] / "docs" / "gallery" / "demo.json"
    assert found.to_json() == drawn.read_text(encoding="utf-8")
    assert (found.provenance.model, found.unfinished, found.preliminary) == ("demo", False, False)
