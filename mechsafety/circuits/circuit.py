"""The circuit: its parts, its roles, its verification, and the file that holds them."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Edge, Node
from mechsafety.results import Provenance, Result

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from torch import Tensor

FORMAT, VERSION = "mechsafety.circuit", 1
ROLES = ("detection", "evaluation", "decision", "production", "none")
NODE_STATUS = ("estimated", "measured", "verified", "rejected")


@dataclass(frozen=True, slots=True)
class RoleEvidence:
    """The measurements a node's role rests on; each a share of the harmful-harmless metric gap unless said otherwise.

    Attributes:
        direct: Direct effect on the metric through the logits.
        at_instruction: Exact effect of patching the node at instruction positions only.
        at_suffix: The same at suffix positions only.
        via_instruction: Exact effect of replacing only what a head moves from instruction tokens (heads only).
        attention_to_instruction: Mean attention from suffix positions to the instruction span, 0 to 1 (heads only).
        from_detection: Summed direct paths it receives from detection nodes, measured or estimated.
        to_decision: The same of what it sends to nodes with a decision or production role.
    """

    direct: float | None = None
    at_instruction: float | None = None
    at_suffix: float | None = None
    via_instruction: float | None = None
    attention_to_instruction: float | None = None
    from_detection: float | None = None
    to_decision: float | None = None


@dataclass(frozen=True, slots=True)
class CircuitNode:
    """A node of a circuit with its role and effect.

    Attributes:
        node: Which part.
        role: One of `ROLES`.
        effect: Share of the metric gap that is lost when this node alone is given its harmless-run values.
        ci: 95 % bootstrap interval of ``effect`` over prompts; None where only estimated.
        p_value: Sign-flip permutation p over prompts, Benjamini-Hochberg adjusted over all measured nodes.
        status: ``estimated`` (gradient), ``measured`` (exact), ``verified`` (measured, significant, and the circuit
            without it is less faithful on pairs that played no part), ``rejected``.
        evidence: What the role rests on.
    """

    node: Node
    role: str = "none"
    effect: float = 0.0
    ci: tuple[float, float] | None = None
    p_value: float | None = None
    status: str = "estimated"
    evidence: RoleEvidence = field(default_factory=RoleEvidence)


@dataclass(frozen=True, slots=True)
class CircuitEdge:
    """An edge of a circuit with its effect (share of the metric gap along this direct path).

    Attributes:
        edge: From where to where.
        effect: The measured effect where there is one, else the estimate.
        status: ``measured`` (exact direct-path patch) or ``estimated`` (gradient).
        estimate: The gradient estimate, also where a measurement replaced it.
    """

    edge: Edge
    effect: float
    status: str = "estimated"
    estimate: float | None = None


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Faithfulness of the best ``n_nodes`` nodes found; ``k`` is their share of all candidate nodes."""

    k: float
    n_nodes: int
    faithfulness: float
    held_out: float


@dataclass(frozen=True, slots=True)
class RandomControls:
    """Size-matched random circuits on held-out pairs.

    Attributes:
        n: How many were drawn.
        mean: Their mean faithfulness.
        highest: The best of them.
        p_value: (1 + number at least as faithful as the circuit) / (1 + n).
    """

    n: int
    mean: float
    highest: float
    p_value: float


@dataclass(frozen=True, slots=True)
class FreshCheck:
    """The circuit on pairs that played no part in finding it, not even in deciding its size.

    Attributes:
        n: Pairs.
        faithfulness: On them.
        ci: 95 % bootstrap interval of it over pairs.
    """

    n: int
    faithfulness: float
    ci: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked about a circuit. None means: not measured.

    Attributes:
        faithfulness: On the pairs it was found on: (m(C) - m(empty)) / (m(model) - m(empty)).
        held_out_faithfulness: The same on held-out pairs, which set the size of the circuit and nothing else.
        held_out_ci: 95 % bootstrap interval of it over pairs.
        held_out_topics: Their topics, where none of them is among the search's; else empty.
        fresh: The same on pairs that played no part at all; None where there were too few pairs to set any aside.
        necessity: Share of the gap lost when the whole circuit gets its harmless-run values, on fresh pairs (on
            held-out ones where there are none; so are the random controls and the minimality).
        random_controls: Size-matched random circuits.
        curve: Faithfulness over circuit size.
        cmd: Area between the held-out curve and 1 over k (0 is best).
        cpr: Area under the held-out curve over k.
        target: The faithfulness that was asked for.
        reached: Whether the circuit shown reaches it on held-out pairs.
        minimality: Faithfulness lost when one node alone leaves the circuit, by node name.
        completeness: Not measured by this version.
    """

    faithfulness: float
    held_out_faithfulness: float
    held_out_ci: tuple[float, float]
    held_out_topics: tuple[str, ...]
    necessity: float
    random_controls: RandomControls
    curve: tuple[CurvePoint, ...]
    cmd: float
    cpr: float
    target: float
    reached: bool
    completeness: float | None = None
    minimality: Mapping[str, float] | None = None
    fresh: FreshCheck | None = None


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What the model does with one kind of prompt.

    Attributes:
        n: Prompts.
        refusal_rate: Share of prompts judged refused.
        refusal_ci: Wilson 95 % interval of it.
        score_mean: Mean metric.
        score_ci: 95 % bootstrap interval of it.
        judge: ``reply`` (a refusal phrase in the greedy reply's first sentence) or ``score`` (metric above 0, where the
            user chose the refusal tokens).
    """

    n: int
    refusal_rate: float
    refusal_ci: tuple[float, float]
    score_mean: float
    score_ci: tuple[float, float]
    judge: str = "reply"


@dataclass(frozen=True, slots=True)
class Sample:
    """One generated reply, for the report."""

    prompt: str
    kind: str
    reply: str
    refused: bool
    score: float


@dataclass(frozen=True, slots=True)
class AttentionExample:
    """Attention of found heads on one prompt: ``tokens`` [pos], ``patterns`` [head query key], ``heads`` [head]."""

    prompt: str
    tokens: tuple[str, ...]
    heads: tuple[Node, ...]
    patterns: "Tensor"


@dataclass(frozen=True, slots=True)
class NodeScore:
    """One candidate node: the gradient estimate and, where it was measured, the exact effect."""

    node: Node
    estimate: float
    effect: float | None = None
    ci: tuple[float, float] | None = None
    p_value: float | None = None
    in_circuit: bool = False


@dataclass(frozen=True, slots=True)
class MapDetails:
    """What the report shows beyond the circuit itself; not part of ``circuit.json``.

    Attributes:
        n_layers, n_heads: Size of the model.
        scores: Every candidate node.
        samples: Generated replies.
        attention: Attention of found heads on example prompts.
    """

    n_layers: int
    n_heads: int
    scores: tuple[NodeScore, ...]
    samples: tuple[Sample, ...] = ()
    attention: tuple[AttentionExample, ...] = ()


@dataclass(frozen=True, slots=True)
class RefusalCircuit(Result):
    """The parts of a model that carry its refusal, how they connect, and how well that was verified.

    Attributes:
        provenance: Model, weights, options, versions, seed.
        metric: ``{"name", "refusal_tokens", "comply_tokens"}``.
        behaviour: ``harmful`` and ``harmless``.
        nodes: The circuit's nodes in the order of computation.
        edges: Its edges, strongest first.
        verification: Faithfulness, controls, curve.
        n_candidates: Nodes the search could choose from.
        details: For the report; None after loading from ``circuit.json``.
    """

    provenance: Provenance
    metric: Mapping[str, Any]
    behaviour: Mapping[str, Behaviour]
    nodes: tuple[CircuitNode, ...]
    edges: tuple[CircuitEdge, ...]
    verification: Verification
    n_candidates: int
    details: MapDetails | None = None

    def __repr__(self) -> str:
        check = self.verification
        return (
            f"RefusalCircuit({self.provenance.model}: {len(self.nodes)} of {self.n_candidates} nodes, "
            f"{len(self.edges)} edges, held-out faithfulness {check.held_out_faithfulness:.2f}, "
            f"p = {check.random_controls.p_value:.3g})"
        )

    def __iter__(self) -> Iterator[CircuitNode]:
        return iter(self.nodes)

    def __contains__(self, node: Node) -> bool:
        return any(member.node == node for member in self.nodes)

    def by_role(self, role: str) -> tuple[CircuitNode, ...]:
        """The nodes of one role."""
        if role not in ROLES:
            raise MechsafetyError(f"role {role!r}", expected=f"one of {ROLES}")
        return tuple(member for member in self.nodes if member.role == role)

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a node, with its role evidence."""
        import pandas as pd

        rows = []
        for member in self.nodes:
            low, high = member.ci or (math.nan, math.nan)
            row = {**asdict(member.node), "name": str(member.node), "role": member.role, "effect": member.effect}
            row |= {"ci_low": low, "ci_high": high, "p_value": member.p_value, "status": member.status}
            rows.append(row | asdict(member.evidence))
        return pd.DataFrame(rows)

    def scores_dataframe(self) -> "pd.DataFrame":
        """One row a candidate node: estimate, exact effect where measured, whether it is in the circuit.

        Raises:
            MechsafetyError: The circuit was loaded from ``circuit.json``, which does not hold them.
        """
        import pandas as pd

        if self.details is None:
            raise MechsafetyError("this circuit has no scores of its candidates", cure="run map_refusal_circuit again")
        rows = []
        for score in self.details.scores:
            low, high = score.ci or (math.nan, math.nan)
            row = {**asdict(score.node), "name": str(score.node), "estimate": score.estimate, "effect": score.effect}
            row |= {"ci_low": low, "ci_high": high, "p_value": score.p_value, "in_circuit": score.in_circuit}
            rows.append(row)
        return pd.DataFrame(rows)

    def to_json(self) -> str:
        """The text of ``circuit.json``. The same circuit gives the same bytes."""
        check = asdict(self.verification)
        held_out = {
            "faithfulness": check.pop("held_out_faithfulness"),
            "ci": check.pop("held_out_ci"),
            "topics": check.pop("held_out_topics"),
        }
        provenance = self.provenance.to_json()
        provenance["mechsafety"] = provenance["versions"].get("mechsafety", "")
        data = {
            "format": FORMAT,
            "version": VERSION,
            "provenance": provenance,
            "metric": dict(self.metric),
            "behaviour": {kind: asdict(value) for kind, value in self.behaviour.items()},
            "n_candidates": self.n_candidates,
            "nodes": [_node_row(member) for member in self.nodes],
            "edges": [_edge_row(member) for member in self.edges],
            "verification": {**check, "held_out": held_out},
        }
        return json.dumps(_rounded(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverse of `to_json`.

        Raises:
            MechsafetyError: Not JSON, another format, a newer version, or a wrong or missing field, which is named.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise MechsafetyError(f"malformed JSON ({error})", expected="a circuit.json") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise MechsafetyError("not a circuit file", expected=f'"format": "{FORMAT}"')
        if not isinstance(data.get("version"), int) or data["version"] > VERSION:
            raise MechsafetyError(f"circuit format version {data.get('version')!r}", expected=f"at most {VERSION}")
        where = "the file"
        try:
            where = "provenance"
            provenance = {key: value for key, value in data["provenance"].items() if key != "mechsafety"}
            where = "verification"
            check = dict(data["verification"])
            held_out = check.pop("held_out")
            check["held_out_faithfulness"] = held_out["faithfulness"]
            check["held_out_ci"] = tuple(held_out["ci"])
            check["held_out_topics"] = tuple(held_out["topics"])
            check["random_controls"] = RandomControls(**check["random_controls"])
            fresh = check.get("fresh")
            check["fresh"] = (
                None
                if fresh is None
                else FreshCheck(fresh["n"], fresh["faithfulness"], (fresh["ci"][0], fresh["ci"][1]))
            )
            check["curve"] = tuple(CurvePoint(**point) for point in check["curve"])
            verification = Verification(**check)
            where = "behaviour"
            behaviour = {kind: _behaviour(value) for kind, value in data["behaviour"].items()}
            where = "nodes"
            nodes = tuple(_node(row) for row in data["nodes"])
            where = "edges"
            edges = tuple(_edge(row) for row in data["edges"])
            where = "the file"
            return cls(
                provenance=Provenance.from_json(provenance),
                metric=data["metric"],
                behaviour=behaviour,
                nodes=nodes,
                edges=edges,
                verification=verification,
                n_candidates=data["n_candidates"],
            )
        except (LookupError, TypeError, AttributeError) as error:
            reason = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
            raise MechsafetyError(f"{where}: {reason}", expected="a circuit.json of this format") from None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``circuit.json`` to the file ``path`` (its details are not part of that format)."""
        target = Path(path)
        scratch = target.with_name(f".{target.name}.part")
        scratch.write_text(self.to_json(), encoding="utf-8")
        scratch.replace(target)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a ``circuit.json``.

        Raises:
            MechsafetyError: As `from_json`, or the file is missing.
        """
        if not Path(path).is_file():
            raise MechsafetyError(f"no such file: {path}", expected="a circuit.json")
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise MechsafetyError(f"{path} is not UTF-8 text", expected="a circuit.json") from None
        return cls.from_json(text)

    def plot(self) -> "go.Figure":
        """Heatmap of every node's effect (see `mechsafety.viz` for the circuit's picture, which Jupyter shows)."""
        from mechsafety.viz.charts import node_heatmap

        return node_heatmap(self)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        # the one result that reaches up to viz: Jupyter asks the object itself
        from mechsafety.viz.html import mimebundle

        return mimebundle(self)

    def widget(self, **options: Any) -> Any:
        """The picture as a notebook widget (see `mechsafety.viz.circuit_widget`)."""
        from mechsafety.viz.widget import circuit_widget

        return circuit_widget(self, **options)

    def without_details(self) -> Self:
        """The part that ``circuit.json`` holds."""
        return replace(self, details=None)


def _node_row(member: CircuitNode) -> dict[str, Any]:
    evidence = {key: value for key, value in asdict(member.evidence).items() if value is not None}
    row = {**asdict(member.node), "role": member.role, "effect": member.effect, "ci": member.ci}
    return row | {"p_value": member.p_value, "status": member.status, "evidence": evidence}


def _edge_row(member: CircuitEdge) -> dict[str, Any]:
    ends = {"from": asdict(member.edge.sender), "to": asdict(member.edge.receiver), "slot": member.edge.slot}
    return ends | {"effect": member.effect, "status": member.status, "estimate": member.estimate}


def _node(row: Mapping[str, Any]) -> CircuitNode:
    for name, known in (("role", ROLES), ("status", NODE_STATUS)):
        if row[name] not in known:
            raise MechsafetyError(f"nodes: {name} {row[name]!r}", expected=f"one of {known}")
    if not isinstance(row["effect"], int | float) or not isinstance(row["p_value"], int | float | None):
        raise MechsafetyError(f"nodes: effect {row['effect']!r}, p_value {row['p_value']!r}", expected="numbers")
    return CircuitNode(
        node=Node(row["kind"], row["layer"], row["index"]),
        role=row["role"],
        effect=row["effect"],
        ci=None if row["ci"] is None else (row["ci"][0], row["ci"][1]),
        p_value=row["p_value"],
        status=row["status"],
        evidence=RoleEvidence(**row.get("evidence", {})),
    )


def _edge(row: Mapping[str, Any]) -> CircuitEdge:
    if not isinstance(row["effect"], int | float):
        raise MechsafetyError(f"edges: effect {row['effect']!r}", expected="a number")
    if row["status"] not in NODE_STATUS:
        raise MechsafetyError(f"edges: status {row['status']!r}", expected=f"one of {NODE_STATUS}")
    edge = Edge(Node(**row["from"]), Node(**row["to"]), row["slot"])
    return CircuitEdge(edge, row["effect"], row["status"], row.get("estimate"))


def _behaviour(row: Mapping[str, Any]) -> Behaviour:
    values = dict(row)
    for name in ("refusal_ci", "score_ci"):
        values[name] = (values[name][0], values[name][1])
    return Behaviour(**values)


def _rounded(value: Any) -> Any:
    """Six significant digits: what is measured, without the noise of the last bits."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
