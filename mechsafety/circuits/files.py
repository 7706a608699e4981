"""``circuit.json``: a circuit as `mechsafety.codec` writes it, rounded and in an order for readers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from mechsafety.circuits.circuit import CircuitEdge, CircuitNode, RefusalCircuit
from mechsafety.codec import decode, encode, no_number, parse
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Edge, Node
from mechsafety.results import Opener

FORMAT, VERSION = "mechsafety.circuit", 5
# the roles of 3 and 4 rested on these measurements, and 3 had a test of equivalence
OLD_EVIDENCE = (
    *("via_instruction", "attention_to_instruction", "attention_within_instruction"),
    *("from_detection", "from_evaluation", "to_decision", "to_evaluation"),
)
# 2 named these two fields of backups otherwise; 1 had neither level, shape nor search
RENAMED = {"behind": "primary", "first": "primary_effect"}
ORDER = (
    *("provenance", "metric", "behaviour", "level", "shape"),
    *("n_candidates", "nodes", "edges", "verification", "search"),
)

C = TypeVar("C", bound=RefusalCircuit)


@dataclass(frozen=True, slots=True)
class StoredMetric:
    """What a circuit's ``metric`` holds; older files lack the ids."""

    name: str
    refusal_tokens: tuple[str, ...]
    comply_tokens: tuple[str, ...]
    refusal_ids: tuple[int, ...] | None = None
    comply_ids: tuple[int, ...] | None = None
    opener: str = ""
    opener_ids: tuple[int, ...] = ()
    tried: tuple[Opener, ...] = ()

    def __post_init__(self) -> None:
        n_ids = [None if ids is None else len(ids) for ids in (self.refusal_ids, self.comply_ids)]
        n_tokens = [len(self.refusal_tokens), len(self.comply_tokens)]
        if n_ids not in (n_tokens, [None, None]):
            raise MechsafetyError(f"{n_ids} refusal_ids, comply_ids of {n_tokens} tokens", expected="one each")


def write(circuit: RefusalCircuit) -> str:
    """The text of ``circuit.json``.

    Raises:
        MechsafetyError: `read` would refuse it.
    """
    data = encode(type(circuit), circuit.without_details())
    data["provenance"]["mechsafety"] = circuit.provenance.versions.get("mechsafety", "")
    data["verification"]["held_out"] = data["verification"].pop("held_out")  # last
    ordered = {"format": FORMAT, "version": VERSION, **{name: data[name] for name in ORDER}}
    text = json.dumps(_rounded(ordered), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    read(type(circuit), text)
    return text


def read(kind: type[C], text: str) -> C:
    """The circuit in the text of a ``circuit.json`` of this or an earlier version.

    Raises:
        MechsafetyError: Not JSON, another format, a newer version, or a wrong or missing field, which is named.
    """
    data = parse(text, FORMAT, 1, VERSION)
    if data["version"] < 3 and "search" in data:
        data["search"] = _renamed(data["search"])
    if data["version"] < 5:
        _without(data.get("verification"), ("equivalence",))
        for row in data["nodes"] if isinstance(data.get("nodes"), list) else ():
            _without(row.get("evidence") if isinstance(row, dict) else None, OLD_EVIDENCE)
    if isinstance(data.get("provenance"), dict):
        decode(str, data["provenance"].pop("mechsafety", ""), "provenance.mechsafety")
    circuit: C = decode(kind, {name: row for name, row in data.items() if name not in ("format", "version")})
    circuit.check_stored()
    return circuit


def check(circuit: RefusalCircuit) -> None:
    """Refuse a circuit that no file may hold.

    Raises:
        MechsafetyError: Its metric has wrong or missing fields, a kind of prompt has no behaviour, a part is there
            twice, or an edge runs between parts that are not in the circuit.
    """
    decode(StoredMetric, circuit.metric, "metric")
    for name in ("harmful", "harmless"):
        if name not in circuit.behaviour:
            raise MechsafetyError(f"behaviour: field {name!r} is missing", expected="harmful and harmless")
    _check_parts(circuit.nodes, circuit.edges)


def _check_parts(nodes: tuple[CircuitNode, ...], edges: tuple[CircuitEdge, ...]) -> None:
    """Every part once, and edges between parts that are there."""
    seen: set[Node] = set()
    for k, member in enumerate(nodes):
        if member.node in seen or member.node.kind in ("embed", "logits"):
            raise MechsafetyError(f"nodes[{k}]: {member.node}", expected="heads, MLPs and neurons, each once")
        seen.add(member.node)
    # neurons that were measured together are connected as their MLP
    seen |= {member.node.home for member in nodes if member.evidence.together}
    paths: set[Edge] = set()
    for k, path in enumerate(edges):
        for name, node in (("from", path.edge.sender), ("to", path.edge.receiver)):
            if node.kind not in ("embed", "logits") and node not in seen:
                raise MechsafetyError(f"edges[{k}].{name}: {node}", expected="a node of this circuit")
        if path.edge in paths:
            raise MechsafetyError(f"edges[{k}]: {path.edge}", expected="each edge once")
        paths.add(path.edge)


def _without(row: Any, names: tuple[str, ...]) -> None:
    for name in names if isinstance(row, dict) else ():
        row.pop(name, None)


def _renamed(value: Any) -> Any:
    if isinstance(value, dict):
        return {RENAMED.get(key, key): _renamed(item) for key, item in value.items()}
    return [_renamed(item) for item in value] if isinstance(value, list) else value


def _rounded(value: Any) -> Any:
    """Six significant digits: what is measured, without the noise of the last bits; null for what is no number."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()} if no_number(value) is None else None
    return [_rounded(item) for item in value] if isinstance(value, list) else value
