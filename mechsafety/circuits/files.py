"""``circuit.json``: how a circuit is written, and how a file is read that anybody may have edited.

Reading follows the dataclasses' own annotations, so every field is checked for its type, and an error names its place.
"""

import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from mechsafety.circuits.circuit import (
    LEVELS,
    NODE_STATUS,
    ROLES,
    Behaviour,
    CircuitEdge,
    CircuitNode,
    ModelShape,
    RefusalCircuit,
    Search,
)
from mechsafety.circuits.verification.outcome import Verification
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import SLOTS, Edge, Node
from mechsafety.results import Opener, Provenance

if TYPE_CHECKING:
    from torch import Tensor  # noqa: F401

FORMAT, VERSION = "mechsafety.circuit", 2
NAMES = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}

C = TypeVar("C", bound=RefusalCircuit)


def write(circuit: RefusalCircuit) -> str:
    """The text of ``circuit.json``."""
    check = asdict(circuit.verification)
    held_out = {
        "faithfulness": check.pop("held_out_faithfulness"),
        "ci": check.pop("held_out_ci"),
        "topics": check.pop("held_out_topics"),
    }
    provenance = circuit.provenance.to_json()
    provenance["mechsafety"] = provenance["versions"].get("mechsafety", "")
    data = {
        "format": FORMAT,
        "version": VERSION,
        "provenance": provenance,
        "metric": dict(circuit.metric),
        "behaviour": {kind: _behaviour_row(value) for kind, value in circuit.behaviour.items()},
        "level": circuit.level,
        "shape": None if circuit.shape is None else asdict(circuit.shape),
        "n_candidates": circuit.n_candidates,
        "nodes": [_node_row(member) for member in circuit.nodes],
        "edges": [_edge_row(member) for member in circuit.edges],
        "verification": {**check, "held_out": held_out},
        "search": None if circuit.search is None else _search_row(circuit.search),
    }
    return json.dumps(_rounded(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read(kind: type[C], text: str) -> C:
    """The circuit in the text of a ``circuit.json`` of this or an earlier version.

    Raises:
        MechsafetyError: Not JSON, another format, a newer version, or a wrong or missing field, which is named.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise MechsafetyError(f"malformed JSON ({error})", expected="a circuit.json") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise MechsafetyError("not a circuit file", expected=f'"format": "{FORMAT}"')
    version = data.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= VERSION:
        raise MechsafetyError(
            f"circuit format version {version!r}", expected=f"1 to {VERSION}", hint="pip install --upgrade mechsafety"
        )
    needed = {"provenance", "metric", "behaviour", "n_candidates", "nodes", "edges", "verification"}
    _keys(data, needed | {"format", "version"}, {"level", "shape", "search"}, "the file")
    nodes = tuple(_node(row, f"nodes[{k}]") for k, row in enumerate(_list(data["nodes"], "nodes")))
    edges = tuple(_edge(row, f"edges[{k}]") for k, row in enumerate(_list(data["edges"], "edges")))
    _check_parts(nodes, edges)
    return kind(
        provenance=_provenance(data["provenance"]),
        metric=_metric(data["metric"]),
        behaviour=_behaviour(data["behaviour"]),
        nodes=nodes,
        edges=edges,
        verification=_verification(data["verification"]),
        n_candidates=_natural(data["n_candidates"], "n_candidates"),
        level=_one_of(data.get("level", "node"), LEVELS, "level"),
        search=None if data.get("search") is None else _search(data["search"]),
        shape=None if data.get("shape") is None else decode(ModelShape, data["shape"], "shape"),
    )


def decode(kind: Any, value: Any, where: str) -> Any:
    """A value of an annotated type from parsed JSON.

    Args:
        kind: The annotation: numbers, text, None, tuples, mappings from text, dataclasses, and unions with None.
        value: What the file holds.
        where: The field's place, for the error.

    Raises:
        MechsafetyError: Another type, or a missing or unknown field of a dataclass.
    """
    if kind is Any:
        return value
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (kind,) = [part for part in inner if part is not type(None)]
        return decode(kind, value, where)
    if origin is tuple:
        rows = _list(value, where)
        if inner[-1] is Ellipsis:
            return tuple(decode(inner[0], row, f"{where}[{k}]") for k, row in enumerate(rows))
        if len(rows) != len(inner):
            raise MechsafetyError(f"{where}: {len(rows)} values", expected=f"{len(inner)}")
        if inner == (float, float):
            # an interval: null is an end without a bound
            ends = zip(rows, (-math.inf, math.inf), strict=True)
            return tuple(
                end if row is None else decode(float, row, f"{where}[{k}]") for k, (row, end) in enumerate(ends)
            )
        return tuple(decode(part, row, f"{where}[{k}]") for k, (part, row) in enumerate(zip(inner, rows, strict=True)))
    if origin is Mapping:
        return {key: decode(inner[1], item, f"{where}.{key}") for key, item in _object(value, where).items()}
    if kind in (Node, Edge):
        return _part(value, where) if kind is Node else _path(value, where)
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    # what is no number is written as null: in a verification that means that it was not measured
    if kind is float and value is None and where.startswith("verification"):
        return math.nan
    wanted = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise MechsafetyError(f"{where}: {value!r}", expected=NAMES[kind])
    if isinstance(value, float) and not math.isfinite(value):
        raise MechsafetyError(f"{where}: {value!r}", expected="a finite number")
    return value


def _dataclass(kind: Any, value: Any, where: str, skip: Mapping[str, Any] | None = None) -> Any:
    """A dataclass from an object with its fields; ``skip`` gives fields that are written elsewhere."""
    given = dict(skip or {})
    known = {field.name: field for field in fields(kind) if field.name not in given}
    required = {name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    row = _object(value, where)
    _keys(row, required, set(known), where)
    hints = get_type_hints(kind)
    for name in row:
        given[name] = decode(hints[name], row[name], f"{where}.{name}")
        if name == "p_value" and given[name] is not None and not math.isnan(given[name]) and not 0 <= given[name] <= 1:
            raise MechsafetyError(f"{where}.p_value: {given[name]}", expected="a number from 0 to 1")
    return kind(**given)


def _verification(value: Any) -> Verification:
    row = dict(_object(value, "verification"))
    if "held_out" not in row:
        raise MechsafetyError("verification: field 'held_out' is missing", expected="a circuit.json of this format")
    held = _object(row.pop("held_out"), "verification.held_out")
    _keys(held, {"faithfulness", "ci", "topics"}, set(), "verification.held_out")
    fixed = {
        "held_out_faithfulness": decode(float, held["faithfulness"], "verification.held_out.faithfulness"),
        "held_out_ci": decode(tuple[float, float], held["ci"], "verification.held_out.ci"),
        "held_out_topics": decode(tuple[str, ...], held["topics"], "verification.held_out.topics"),
    }
    return _dataclass(Verification, row, "verification", fixed)


def _provenance(value: Any) -> Provenance:
    row = dict(_object(value, "provenance"))
    decode(str, row.pop("mechsafety", ""), "provenance.mechsafety")
    return _dataclass(Provenance, row, "provenance")


def _metric(value: Any) -> dict[str, Any]:
    row = _object(value, "metric")
    texts, ids = ("refusal_tokens", "comply_tokens"), ("refusal_ids", "comply_ids")
    kinds: dict[str, Any] = {"name": str} | dict.fromkeys(texts, tuple[str, ...]) | dict.fromkeys(ids, tuple[int, ...])
    # only of metrics that were detected, or that read after a reply's opener
    openers = {"opener": str, "opener_ids": tuple[int, ...], "tried": tuple[Opener, ...]}
    kinds |= openers
    for name, kind in kinds.items():
        if name in row:
            decode(kind, row[name], f"metric.{name}")
    # files of mechsafety before ids were stored have none
    _keys(row, {"name", *texts, *(ids if set(ids) & set(row) else ())}, {*ids, *openers}, "metric")
    for text, number in zip(texts, ids, strict=True):
        if number in row and len(row[number]) != len(row[text]):
            raise MechsafetyError(
                f"metric.{number}: {len(row[number])} ids of {len(row[text])} tokens", expected="one each"
            )
    return dict(row)


def _behaviour_row(behaviour: Behaviour) -> dict[str, Any]:
    """Without kinds of reply where they were not measured, so that an older file is written as it was."""
    return {name: value for name, value in asdict(behaviour).items() if name != "kinds" or value is not None}


def _behaviour(value: Any) -> dict[str, Behaviour]:
    rows = _object(value, "behaviour")
    _keys(rows, {"harmful", "harmless"}, set(), "behaviour")
    found = {kind: decode(Behaviour, row, f"behaviour.{kind}") for kind, row in rows.items()}
    for kind, one in found.items():
        counts = [] if one.kinds is None else list(asdict(one.kinds).values())
        if counts and (sum(counts) != one.n or min(counts) < 0):
            raise MechsafetyError(f"behaviour.{kind}.kinds: {counts}", expected=f"counts that sum to {one.n}")
    return found


def _node_row(member: CircuitNode) -> dict[str, Any]:
    evidence = {key: value for key, value in asdict(member.evidence).items() if value is not None}
    row = {**asdict(member.node), "role": member.role, "effect": member.effect, "ci": member.ci}
    return row | {"p_value": member.p_value, "status": member.status, "evidence": evidence}


def _node(value: Any, where: str) -> CircuitNode:
    row = dict(_object(value, where))
    names = {"kind", "layer", "index"}
    _keys(row, names | {"role", "effect", "ci", "p_value", "status"}, {"evidence"}, where)
    node = _part({name: row.pop(name) for name in ("kind", "layer", "index")}, where)
    _one_of(row["role"], ROLES, f"{where}.role")
    _one_of(row["status"], NODE_STATUS, f"{where}.status")
    return _dataclass(CircuitNode, row, where, {"node": node})


def _edge_row(member: CircuitEdge) -> dict[str, Any]:
    rest = {"effect": member.effect, "status": member.status, "estimate": member.estimate}
    return _path_row(member.edge) | rest


def _edge(value: Any, where: str) -> CircuitEdge:
    row = dict(_object(value, where))
    _keys(row, {"from", "to", "slot", "effect", "status"}, {"estimate"}, where)
    path = _path({name: row.pop(name) for name in ("from", "to", "slot")}, where)
    _one_of(row["status"], NODE_STATUS, f"{where}.status")
    return _dataclass(CircuitEdge, row, where, {"edge": path})


def _path_row(edge: Edge) -> dict[str, Any]:
    return {"from": asdict(edge.sender), "to": asdict(edge.receiver), "slot": edge.slot}


def _path(value: Any, where: str) -> Edge:
    row = _object(value, where)
    _keys(row, {"from", "to", "slot"}, set(), where)
    sender, receiver = _part(row["from"], f"{where}.from"), _part(row["to"], f"{where}.to")
    _one_of(row["slot"], SLOTS.get(receiver.kind, ()), f"{where}.slot")
    try:
        return Edge(sender, receiver, row["slot"])
    except MechsafetyError as error:
        raise MechsafetyError(f"{where}.to: {error.problem}", expected=error.expected) from None


def _part(value: Any, where: str) -> Node:
    row = _object(value, where)
    _keys(row, {"kind", "layer", "index"}, set(), where)
    kind = decode(str, row["kind"], f"{where}.kind")
    places = [None if row[n] is None else _natural(row[n], f"{where}.{n}") for n in ("layer", "index")]
    try:
        return Node(kind, *places)
    except MechsafetyError as error:
        raise MechsafetyError(f"{where}.kind: {error.problem}", expected=error.expected) from None


def _search_row(search: Search) -> dict[str, Any]:
    return {**asdict(search), "linked": [_path_row(edge) for edge in search.linked]}


def _search(value: Any) -> Search:
    return _dataclass(Search, value, "search")


def _check_parts(nodes: tuple[CircuitNode, ...], edges: tuple[CircuitEdge, ...]) -> None:
    """Every part once, and edges between parts that are there."""
    seen: set[Node] = set()
    for k, member in enumerate(nodes):
        if member.node in seen or member.node.kind in ("embed", "logits"):
            raise MechsafetyError(f"nodes[{k}]: {member.node}", expected="heads, MLPs and neurons, each once")
        seen.add(member.node)
    paths: set[Edge] = set()
    for k, path in enumerate(edges):
        for name, node in (("from", path.edge.sender), ("to", path.edge.receiver)):
            if node.kind not in ("embed", "logits") and node not in seen:
                raise MechsafetyError(f"edges[{k}].{name}: {node}", expected="a node of this circuit")
        if path.edge in paths:
            raise MechsafetyError(f"edges[{k}]: {path.edge}", expected="each edge once")
        paths.add(path.edge)


def _keys(row: Mapping[str, Any], required: set[str], optional: set[str], where: str) -> None:
    missing, unknown = sorted(required - set(row)), sorted(set(row) - required - optional)
    if missing:
        raise MechsafetyError(f"{where}: field {missing[0]!r} is missing", expected="a circuit.json of this format")
    if unknown:
        raise MechsafetyError(f"{where}: unknown field {unknown[0]!r}", expected="a circuit.json of this format")


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise MechsafetyError(f"{where}: {value!r}", expected="an object")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise MechsafetyError(f"{where}: {value!r}", expected="a list")
    return value


def _natural(value: Any, where: str) -> int:
    number: int = decode(int, value, where)
    if number < 0:
        raise MechsafetyError(f"{where}: {number}", expected="at least 0")
    return number


def _one_of(value: Any, known: tuple[str, ...], where: str) -> str:
    if value not in known:
        raise MechsafetyError(f"{where}: {value!r}", expected=f"one of {known}")
    return str(value)


def _rounded(value: Any) -> Any:
    """Six significant digits: what is measured, without the noise of the last bits."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
