"""The circuit: its parts, its roles, its verification, and the file that holds them."""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from mechsafety.circuits.budget import LEFT_OUT, WIRING
from mechsafety.circuits.verification.outcome import CurvePoint, FreshCheck, RandomControls, Verification
from mechsafety.codec import INLINE, REQUIRED, SPARSE, Amount, PValue
from mechsafety.conversation import Conversation
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Edge, Node, NodeLike, as_node, as_nodes
from mechsafety.results import Provenance, Result

if TYPE_CHECKING:
    import networkx as nx
    import pandas as pd
    import plotly.graph_objects as go
    from matplotlib.axes import Axes
    from torch import Tensor

    from mechsafety.models import LensModel
    from mechsafety.prompts import PromptPairs
    from mechsafety.replies import ReplyKinds
    from mechsafety.viz import Style

__all__ = [
    "Ablation",
    "AttentionExample",
    "Backup",
    "Behaviour",
    "CircuitEdge",
    "CircuitNode",
    "CurvePoint",
    "FreshCheck",
    "KindCounts",
    "MapDetails",
    "NodeScore",
    "Notes",
    "RandomControls",
    "RefusalCircuit",
    "RoleEvidence",
    "Sample",
    "Search",
    "ModelShape",
    "Verification",
]
Level = Literal["node", "neuron", "edge"]
Role = Literal["detection", "relay", "evaluation", "decision", "production", "none"]
Status = Literal["estimated", "measured", "verified", "rejected"]
ROLES: tuple[Role, ...] = get_args(Role)
NODE_STATUS: tuple[Status, ...] = get_args(Status)


@dataclass(frozen=True, slots=True)
class RoleEvidence:
    """The measurements a node's role rests on; each a share of the harmful-harmless metric gap unless said otherwise.

    All are measured in the circuit: every node outside it has its value from the harmless prompt.

    Attributes:
        in_circuit: Exact effect of patching the node in the circuit.
        direct: Exact effect of its path to the logits.
        from_embed: Exact effect of what it reads straight from the embeddings.
        from_detection, from_evaluation: Exact effect of what it reads from the detection (evaluation) nodes together.
        to_evaluation_or_decision: Exact effect of what the evaluation nodes, decision nodes and relays read from it,
            together.
        to_production: Exact effect of what the production nodes read from it, together. Measured only where no share of
            the others is at least half of the node's effect.
        to_production_or_logits: Exact effect of what the production nodes and the logits read from it, together.
        alike: Exact effect of what it reads from the nodes whose writing it repeats.
        at_instruction, at_suffix: Exact effect of patching it at instruction (suffix) positions only. No role rests on
            these two.
        backup_of: Name of the primary node, for a backup. Everything above was then measured with that node and its
            other backups patched.
        joint: Effect of patching both, and its other backups, together (backups only).
        together: Name of the MLP whose neurons in the circuit were measured together, for a neuron of a circuit that is
            too large to measure each neuron. Everything above is then of all of them.

    Example:
        >>> detection = circuit.nodes[0]
        >>> detection.evidence.from_embed > 0.9  # its effect comes straight from the prompt
        True
    """

    in_circuit: float | None = field(default=None, metadata=SPARSE)
    direct: float | None = field(default=None, metadata=SPARSE)
    from_embed: float | None = field(default=None, metadata=SPARSE)
    from_detection: float | None = field(default=None, metadata=SPARSE)
    from_evaluation: float | None = field(default=None, metadata=SPARSE)
    to_evaluation_or_decision: float | None = field(default=None, metadata=SPARSE)
    to_production: float | None = field(default=None, metadata=SPARSE)
    to_production_or_logits: float | None = field(default=None, metadata=SPARSE)
    alike: float | None = field(default=None, metadata=SPARSE)
    at_instruction: float | None = field(default=None, metadata=SPARSE)
    at_suffix: float | None = field(default=None, metadata=SPARSE)
    backup_of: str | None = field(default=None, metadata=SPARSE)
    joint: float | None = field(default=None, metadata=SPARSE)
    together: str | None = field(default=None, metadata=SPARSE)


@dataclass(frozen=True, slots=True)
class CircuitNode:
    """A node of a circuit with its role and effect.

    Attributes:
        node: Which part.
        role: One of `ROLES`.
        effect: Share of the metric gap that is lost when this node alone gets its values from the harmless run.
        ci: 95 % interval of ``effect`` over prompts; None where only estimated.
        p_value: Sign-flip permutation p over prompts, Benjamini-Hochberg adjusted over all measured nodes.
        status: ``estimated`` (gradient), ``measured`` (exact), ``verified`` (measured, significant, and the circuit
            without it is less faithful on pairs that played no part); ``rejected`` only in files made elsewhere.
        evidence: What the role rests on.

    Example:
        >>> for one in circuit.nodes:
        ...     print(one.node, one.role)
        L0.H1 detection
        L0.MLP evaluation
        L1.MLP evaluation
        L3.H1 decision
        L3.MLP production
    """

    node: Node = field(metadata=INLINE)
    role: Role = field(default="none", metadata=REQUIRED)
    effect: float = field(default=0.0, metadata=REQUIRED)
    ci: tuple[float, float] | None = field(default=None, metadata=REQUIRED)
    p_value: PValue | None = field(default=None, metadata=REQUIRED)
    status: Status = field(default="estimated", metadata=REQUIRED)
    evidence: RoleEvidence = field(default_factory=RoleEvidence)

    @property
    def opposes(self) -> bool:
        """Whether the node works against the behaviour: the interval of its effect lies below 0."""
        return self.ci is not None and self.ci[1] < 0


@dataclass(frozen=True, slots=True)
class CircuitEdge:
    """An edge of a circuit with its effect (share of the metric gap along this direct path).

    Attributes:
        edge: From where to where.
        effect: The measured effect where there is one, else the estimate.
        status: ``measured`` (exact direct-path patch) or ``estimated`` (gradient).
        estimate: The gradient estimate, also where a measurement replaced it.
        ci: 95 % interval of a measured effect, over prompts.

    Example:
        >>> one = circuit.edges[0]
        >>> str(one.edge), one.status
        ('embed -> L0.H1 (v)', 'measured')
    """

    edge: Edge = field(metadata=INLINE)
    effect: float
    status: Status = field(default="estimated", metadata=REQUIRED)
    estimate: float | None = None
    ci: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Backup:
    """A node that replaces a primary node when that is patched.

    Patched alone, a backup hardly matters. Patched together with its primary node, it does.

    Attributes:
        node: The backup.
        primary: The node that it replaces.
        group: Everything patched for the joint effect: ``primary`` and its backups.
        single: Effect of patching the backup alone (share of the gap).
        primary_effect: Effect of patching ``primary`` alone.
        joint: Effect of patching the group.
        ci: 95 % interval, over prompts, of the joint effect less the effects of the members alone.
        p_value: Sign-flip permutation p of the same, Benjamini-Hochberg adjusted over the backups that were found. They
            were chosen on the same prompts, so it is optimistic, and nothing is decided by it.
    """

    node: Node
    primary: Node
    group: tuple[Node, ...]
    single: float
    primary_effect: float
    joint: float
    ci: tuple[float, float]
    p_value: PValue


@dataclass(frozen=True, slots=True)
class Search:
    """How a circuit was found.

    Attributes:
        ranked: Size of the smallest prefix of the ranking that meets the goal (or fits the requested size).
        removed: How many of these exact removal took away again.
        minimal: Whether no further single part can be removed without missing the goal; None where the search was
            cut short.
        backups: Parts added because they replace others when those are patched.
        linked: Edges kept only to connect a node that would otherwise lie on no path from ``embed`` to ``logits``.
        dropped: Nodes taken out because none of their edges carries anything.
        cut: What was left out, to keep the time budget or because there are too many parts, one line each.
    """

    ranked: int
    removed: int
    minimal: bool | None = None
    backups: tuple[Backup, ...] = ()
    linked: tuple[Edge, ...] = ()
    dropped: tuple[Node, ...] = ()
    cut: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Size of the model that a circuit belongs to."""

    n_layers: int
    n_heads: int
    d_mlp: int


@dataclass(frozen=True, slots=True)
class KindCounts:
    """How many replies are of each of `mechsafety.replies.KINDS`."""

    refuses: Amount
    answers: Amount
    degenerate: Amount
    neither: Amount

    def share(self, kind: str) -> tuple[float, float, float]:
        """Share of a kind with its Wilson 95 % interval."""
        from mechsafety.intervals import wilson_interval

        count, n = getattr(self, kind), self.refuses + self.answers + self.degenerate + self.neither
        return (count / n, *wilson_interval(count, n))


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What the model does with one kind of prompt.

    Attributes:
        n: Prompts.
        refusal_rate: Share of prompts judged refused.
        refusal_ci: Wilson 95 % interval of it.
        score_mean: Mean metric.
        score_ci: 95 % interval of it.
        judge: ``reply`` (a refusal phrase in the greedy reply's first sentence) or ``score`` (metric above 0, where the
            user chose the refusal tokens).
        kinds: How many of the greedy replies are of each kind by the phrase judge; None in files of earlier versions.

    Example:
        >>> circuit.behaviour["harmful"].refusal_rate, circuit.behaviour["harmless"].refusal_rate
        (1.0, 0.0)
    """

    n: int
    refusal_rate: float
    refusal_ci: tuple[float, float]
    score_mean: float
    score_ci: tuple[float, float]
    judge: str = "reply"
    kinds: KindCounts | None = field(default=None, metadata=SPARSE)

    def __post_init__(self) -> None:
        counts = list(asdict(self.kinds).values()) if self.kinds else [self.n]
        if sum(counts) != self.n:
            raise MechsafetyError(f"kinds of reply {counts}", expected=f"counts that sum to {self.n}")


@dataclass(frozen=True, slots=True)
class Sample:
    """One generated reply, for the report."""

    prompt: str | Conversation
    kind: str
    reply: str
    refused: bool
    score: float


@dataclass(frozen=True, slots=True)
class AttentionExample:
    """Attention of found heads on one prompt: ``tokens`` [pos], ``patterns`` [head query key], ``heads`` [head]."""

    prompt: str | Conversation
    tokens: tuple[str, ...]
    heads: tuple[Node, ...]
    patterns: "Tensor"


@dataclass(frozen=True, slots=True)
class Notes:
    """What a node writes and reads, for its card.

    Attributes:
        promotes, suppresses: Tokens that its output raises and lowers most, strongest first (see
            `mechsafety.circuits.notes.measure_notes`).
        spans: Mean attention to each span of the prompt, 0 to 1, by the span's name (heads).
        texts: Tokens and, for each, the activation there (neurons).

    Example:
        >>> notes = {ms.Node("mlp", 3): ms.viz.Notes(promotes=("Sorry",))}
        >>> "Sorry" in ms.viz.circuit_html(circuit, notes=notes)
        True
    """

    promotes: tuple[str, ...] = ()
    suppresses: tuple[str, ...] = ()
    spans: Mapping[str, float] | None = None
    texts: tuple[tuple[tuple[str, ...], tuple[float, ...]], ...] = ()

    def __post_init__(self) -> None:
        for tokens, values in self.texts:
            if len(tokens) != len(values):
                raise MechsafetyError(f"{len(values)} activations of {len(tokens)} tokens", expected="one per token")


@dataclass(frozen=True, slots=True)
class Ablation:
    """A measured before and after.

    Attributes:
        name: What was done, in words.
        nodes: What was ablated.
        score: Mean metric on harmful prompts before and after.
        effects: Effect of each node measured again in the ablated model; nodes left out show as not measured again.
        replies: What the replies to the harmful prompts are before and after, where measured.

    Example:
        >>> ablation = ms.circuits.measure_ablation(model, pairs, metric, "L3.MLP", replies=True, reply_tokens=8)
        >>> ablation.name, ablation.refusal_rate
        ('without L3.MLP', (1.0, 0.0))
    """

    name: str
    nodes: tuple[Node, ...]
    score: tuple[float, float]
    effects: Mapping[Node, float]
    replies: "tuple[ReplyKinds, ReplyKinds] | None" = None

    @property
    def refusal_rate(self) -> tuple[float, float] | None:
        """Share of harmful prompts refused before and after, where measured; ``replies`` says what the others are."""
        return None if self.replies is None else (self.replies[0].share("refuses"), self.replies[1].share("refuses"))


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
        notes: What the circuit's nodes write and read.
    """

    n_layers: int
    n_heads: int
    scores: tuple[NodeScore, ...]
    samples: tuple[Sample, ...] = ()
    attention: tuple[AttentionExample, ...] = ()
    notes: Mapping[Node, Notes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RefusalCircuit(Result):
    """The parts of a model that carry its refusal, how they connect, and how well that was verified.

    Attributes:
        provenance: Model, weights, options, versions, seed.
        metric: ``{"name", "refusal_tokens", "comply_tokens", "refusal_ids", "comply_ids"}``; older files lack the ids.
            Where it was detected, ``tried`` lists the reply openers tried; one that reads after an opener has
            ``opener`` and ``opener_ids``.
        behaviour: ``harmful`` and ``harmless``.
        nodes: The circuit's nodes in the order of computation.
        edges: Its edges, strongest first.
        verification: Faithfulness, controls, curve.
        n_candidates: Parts the search could choose from.
        details: For the report; None after loading from ``circuit.json`` (a folder holds them). Not compared by ``==``.
        level: What the search chose: ``node`` (heads and MLPs), ``edge`` or ``neuron`` (heads and neurons).
        search: How the circuit was found; None in files of version 1.
        shape: Size of the model; None in files of version 1.

    Example:
        >>> [str(one.node) for one in circuit.by_role("evaluation")]
        ['L0.MLP', 'L1.MLP']
        >>> path = circuit.save(folder / "circuit.json")
        >>> ms.RefusalCircuit.load(path)
        RefusalCircuit(planted-rmsnorm-4x4-5: 5 of 20 nodes, 7 edges, ...)
    """

    provenance: Provenance
    metric: Mapping[str, Any]
    behaviour: Mapping[str, Behaviour]
    nodes: tuple[CircuitNode, ...]
    edges: tuple[CircuitEdge, ...]
    verification: Verification
    n_candidates: Amount
    details: MapDetails | None = field(default=None, compare=False)
    level: Level = "node"
    search: Search | None = None
    shape: ModelShape | None = None

    def __repr__(self) -> str:
        check = self.verification
        size = f"{len(self.nodes)} of {self.n_candidates} nodes, {len(self.edges)} edges"
        if self.level == "edge":
            size = f"{len(self.nodes)} nodes, {len(self.edges)} of {self.n_candidates} edges"
        checked = "not verified"
        if check.measured:
            checked = f"held-out faithfulness {check.held_out_faithfulness:.2f}"
            checked += f", p = {check.random_p:.3g}" if check.random_controls.n else ""
        held = f", {check.tally} claims hold" if check.measured and check.tested else ""
        first = "unfinished: " * self.unfinished + "preliminary: " * self.preliminary
        pairs = "" if self.speaks_for is None else ", speaks for {} of {} pairs tried".format(*self.speaks_for)
        return f"RefusalCircuit({first}{self.provenance.model}: {size}, {checked}{held}{pairs})"

    @property
    def speaks_for(self) -> tuple[int, int] | None:
        """How many pairs the map is of, and how many the model was tried on; None where a file does not say.

        The others are not treated as expected: the harmful prompt is answered, or the harmless one refused.
        """
        parts = [self.provenance.options.get(name) for name in ("found_on", "held_out", "fresh")]
        used = sum(part for part in parts if isinstance(part, int))
        tried = self.behaviour["harmful"].n if "harmful" in self.behaviour else 0
        return (used, tried) if used and tried else None

    @property
    def preliminary(self) -> bool:
        """Whether the map is only a first look (`MapOptions.quick`)."""
        return bool(self.provenance.options.get("preliminary", False))

    @property
    def unfinished(self) -> bool:
        """Whether the time budget ended before any edge was there: the parts are then a ranking and no circuit."""
        cut = () if self.search is None else self.search.cut
        return not self.edges and f"{WIRING}: {LEFT_OUT}" in cut

    @property
    def ablation(self) -> str:
        """What everything outside a circuit took while its faithfulness was measured (see `MapOptions`)."""
        return str(self.provenance.options.get("ablation", "counterfactual"))

    @property
    def linked(self) -> frozenset[Edge]:
        """Edges that are kept only because a node would otherwise lie on no path from ``embed`` to ``logits``."""
        return frozenset(self.search.linked if self.search else ())

    def __iter__(self) -> Iterator[CircuitNode]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def __contains__(self, part: object) -> bool:
        """Whether a node (also by its name) or an edge is in it; members (with role, effect) count as they are."""
        if isinstance(part, CircuitNode | CircuitEdge):
            return part in self.nodes or part in self.edges
        if isinstance(part, str):
            part = as_node(part)
        return any(member.node == part for member in self.nodes) or any(member.edge == part for member in self.edges)

    def by_role(self, role: str) -> tuple[CircuitNode, ...]:
        """The nodes of one role."""
        if role not in ROLES:
            raise MechsafetyError(f"role {role!r}", expected=f"one of {ROLES}")
        return tuple(member for member in self.nodes if member.role == role)

    def by_mlp(self) -> Self:
        """The circuit with the neurons that were measured together replaced by their MLP; it is drawn so.

        Only circuits of hundreds of neurons have such neurons (``evidence.together``). Their MLP stands for the
        circuit's neurons alone, and its effect is that of all of them together, in the circuit. Edges run between such
        MLPs in any case. Any other circuit is returned as it is.
        """
        if not any(member.evidence.together for member in self.nodes):
            return self
        rows: dict[Node, CircuitNode] = {}
        for member in self.nodes:
            evidence, home = member.evidence, member.node.home
            if evidence.together is None:
                rows[member.node] = member
            elif home not in rows:
                own, effect = replace(evidence, together=None), evidence.in_circuit or 0.0
                rows[home] = CircuitNode(home, member.role, effect, status="measured", evidence=own)
        return replace(self, nodes=tuple(rows.values()))

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per node, with its role evidence."""
        import pandas as pd

        rows = []
        for member in self.nodes:
            low, high = member.ci or (math.nan, math.nan)
            row = {**asdict(member.node), "name": str(member.node), "role": member.role, "effect": member.effect}
            row |= {"ci_low": low, "ci_high": high, "p_value": member.p_value, "status": member.status}
            rows.append(row | asdict(member.evidence))
        return pd.DataFrame(rows)

    def edges_dataframe(self) -> "pd.DataFrame":
        """One row per edge, strongest first: its ends, slot, effect, status, and whether it only connects a node."""
        import pandas as pd

        linked = self.linked
        rows = [
            {
                "sender": str(member.edge.sender),
                "receiver": str(member.edge.receiver),
                "slot": member.edge.slot,
                "effect": member.effect,
                "status": member.status,
                "estimate": member.estimate,
                "links": member.edge in linked,
            }
            for member in self.edges
        ]
        columns = ["sender", "receiver", "slot", "effect", "status", "estimate", "links"]
        return pd.DataFrame(rows, columns=columns).sort_values("effect", key=abs, ascending=False, ignore_index=True)

    def to_networkx(self) -> "nx.MultiDiGraph[str]":
        """The circuit as a directed graph of networkx; neurons that were measured together are their MLP (`by_mlp`).

        Nodes are named as they are printed and have the attributes ``kind``, ``layer``, ``index``, ``role``,
        ``effect`` and ``status``; ``embed`` and ``logits`` have ``kind`` alone. Several edges can run between two
        nodes. An edge's key is its slot, and it has the attributes ``slot``, ``effect`` and ``status``.
        """
        import networkx as nx

        graph: nx.MultiDiGraph[str] = nx.MultiDiGraph(model=self.provenance.model, level=self.level)
        for member in self.by_mlp().nodes:
            own = {"role": member.role, "effect": member.effect, "status": member.status}
            graph.add_node(str(member.node), **asdict(member.node), **own)
        for path in self.edges:
            for end in (path.edge.sender, path.edge.receiver):
                if str(end) not in graph:
                    graph.add_node(str(end), kind=end.kind)
            ends = str(path.edge.sender), str(path.edge.receiver)
            graph.add_edge(*ends, key=path.edge.slot, slot=path.edge.slot, effect=path.effect, status=path.status)
        return graph

    def scores_dataframe(self) -> "pd.DataFrame":
        """One row per candidate node: estimate, exact effect where measured, whether it is in the circuit.

        Raises:
            MechsafetyError: The circuit was loaded from ``circuit.json``, which does not hold them.
        """
        import pandas as pd

        if self.details is None:
            raise MechsafetyError("this circuit has no scores of its candidates", hint="run map_refusal_circuit again")
        rows = []
        for score in self.details.scores:
            low, high = score.ci or (math.nan, math.nan)
            row = {**asdict(score.node), "name": str(score.node), "estimate": score.estimate, "effect": score.effect}
            row |= {"ci_low": low, "ci_high": high, "p_value": score.p_value, "in_circuit": score.in_circuit}
            rows.append(row)
        return pd.DataFrame(rows)

    def claims_dataframe(self) -> "pd.DataFrame":
        """One row per claim: its figure, interval, p, criterion, whether it holds, and the circuit's ablation."""
        import pandas as pd

        rows = []
        for claim in self.verification.claims:
            low, high = claim.interval or (math.nan, math.nan)
            row = {**asdict(claim), "ci_low": low, "ci_high": high, "ablation": self.ablation}
            del row["interval"]
            rows.append(row)
        return pd.DataFrame(rows)

    def subset(self, keep: Collection[NodeLike]) -> Self:
        """Only these nodes, and the edges between them, ``embed`` and ``logits``.

        The verification was of the whole circuit, so the part has none: it says that it was not measured, and nodes
        that were verified as members of the whole are ``measured``.

        Raises:
            MechsafetyError: A node that is not in the circuit, or none at all.
        """
        chosen = as_nodes(keep)
        strange = [str(node) for node in chosen if node not in self]
        if strange or not chosen:
            raise MechsafetyError(
                f"{strange[0]} is not in this circuit" if strange else "no nodes to keep",
                expected="nodes of the circuit",
            )
        inside = [member for member in self.nodes if member.node in set(chosen)]
        ends = {*chosen, Node("embed"), Node("logits")}
        ends |= {member.node.home for member in inside if member.evidence.together}
        return replace(
            self,
            nodes=tuple(map(_unverified, inside)),
            edges=tuple(e for e in self.edges if e.edge.sender in ends and e.edge.receiver in ends),
            verification=Verification.not_measured(self.verification.aim, "part of a circuit, not checked alone"),
            details=None,
            search=None,
        )

    def merge(self, other: Self) -> Self:
        """The parts of both circuits of one model; where both have one, this circuit's measurements of it are kept.

        Neither verification is of the union, so it has none: it says that it was not measured. The behaviour is this
        circuit's.

        Raises:
            MechsafetyError: The circuits are of different models, metrics or levels.
        """
        for what, mine, theirs in (
            self.provenance.difference(other.provenance) or ("weights", "", ""),
            ("metric", *_in_both(_read_there(self.metric), _read_there(other.metric))),
            ("level", self.level, other.level),
            ("candidates", self.n_candidates, other.n_candidates),
        ):
            # which MLPs a circuit of neurons takes apart is found, not given
            if mine != theirs and not (what == "candidates" and self.level == "neuron"):
                raise MechsafetyError(
                    f"circuits with different {what} ({mine} and {theirs})",
                    expected="two circuits of one model",
                    hint="compare_circuits(a, b) sets them side by side",
                )
        known, edges = {member.node for member in self.nodes}, {member.edge for member in self.edges}
        nodes = [*self.nodes, *(member for member in other.nodes if member.node not in known)]
        paths = [*self.edges, *(member for member in other.edges if member.edge not in edges)]
        merged = {"merged_with": {"pairs": other.provenance.options.get("pairs"), "seed": other.provenance.seed}}
        return replace(
            self,
            provenance=replace(self.provenance, options={**self.provenance.options, **merged}),
            nodes=tuple(_unverified(member) for member in sorted(nodes, key=lambda member: member.node.order)),
            edges=tuple(sorted(paths, key=lambda member: -abs(member.effect))),
            n_candidates=max(self.n_candidates, other.n_candidates),
            verification=Verification.not_measured(self.verification.aim, "merged, not checked as one circuit"),
            details=None,
            search=None,
        )

    def check_stored(self) -> None:
        """Refuse a circuit that no file may hold (see `mechsafety.circuits.files.check`)."""
        from mechsafety.circuits.files import check

        check(self)

    def to_json(self) -> str:
        """The text of ``circuit.json``, which `save` writes where a path ends in ``.json``; without the details."""
        from mechsafety.circuits.files import write

        return write(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverse of `to_json`; reads files of versions 1 and 2 too.

        Raises:
            MechsafetyError: Not JSON, another format, a newer version, or a wrong or missing field, which is named.
        """
        from mechsafety.circuits.files import read

        return read(cls, text)

    @classmethod
    def builtin(cls) -> Self:
        """The whole map of the demo model, as ``mechsafety map demo`` made it: a circuit to look at without a model.

        Like every circuit from a file it has no details, such as attention over prompts.

        Example:
            >>> RefusalCircuit.builtin().by_role("detection")[0].node
            Node(kind='mlp', layer=0, index=None)
        """
        stored = resources.files("mechsafety.circuits") / "data" / "demo.json"
        return cls.from_json(stored.read_text(encoding="utf-8"))

    def plot(self) -> "go.Figure":
        """Heatmap of every node's effect (see `mechsafety.viz` for the circuit's picture, which Jupyter shows)."""
        from mechsafety.viz.charts import node_heatmap

        return node_heatmap(self)

    def draw(self, ax: "Axes | None" = None, style: "Style | None" = None) -> "Axes":
        """Draw the picture into axes of matplotlib (see `mechsafety.viz.draw_circuit`).

        Example:
            >>> import matplotlib.pyplot as plt
            >>> figure, (left, right) = plt.subplots(1, 2, figsize=(7, 6))
            >>> axes = circuit.draw(left)
            >>> plt.close(figure)
        """
        from mechsafety.viz import draw_circuit

        return draw_circuit(self, ax, style)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:  # noqa: ARG002 (Jupyter gives both)
        # the one result that reaches up to viz: Jupyter asks the object itself
        from mechsafety.viz.html import mimebundle

        return mimebundle(self)

    def widget(
        self,
        model: "LensModel | None" = None,
        pairs: "PromptPairs | None" = None,
        *,
        replies: bool = False,
        **options: Any,
    ) -> Any:
        """The picture as a notebook widget (see `mechsafety.viz.circuit_widget`).

        Args:
            model: The model that was mapped. With it the cards get boxes "ablate", which rerun it.
            pairs: What to run it on; eight of the built-in pairs by default. Each adds to the time that a box takes.
            replies: Whether a box also generates replies, to count refusals and babble.
            options: As `mechsafety.viz.circuit_widget`.

        Raises:
            MechsafetyError: ``model`` is not the one that was mapped; else as `mechsafety.viz.circuit_widget`.
        """
        from mechsafety.viz.widget import circuit_widget

        if model is not None:
            from mechsafety.circuits.ablations import rerun

            options["on_ablate"] = rerun(self, model, pairs, replies=replies)
        return circuit_widget(self, **options)

    def without_details(self) -> Self:
        """The part that ``circuit.json`` holds."""
        return replace(self, details=None)


def _in_both(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both mappings have keys for: older files hold less."""
    kept = [key for key in one if key in other]
    first, second = ({key: row[key] for key in kept} for row in (one, other))
    return first, second


def _read_there(metric: Mapping[str, Any]) -> dict[str, Any]:
    """What a metric is, without what was tried to find it; older files say nothing of an opener, and have none."""
    return {"opener_ids": [], **{key: value for key, value in metric.items() if key != "tried"}}


def _unverified(member: CircuitNode) -> CircuitNode:
    """A node whose place in a circuit has not been checked."""
    return replace(member, status="measured") if member.status == "verified" else member
