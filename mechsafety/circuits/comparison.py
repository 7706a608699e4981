"""What differs between two circuits: of two models, or of one model on two sets of prompts."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from mechsafety.circuits.circuit import CircuitEdge, CircuitNode, RefusalCircuit
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Edge, Node
from mechsafety.results import Provenance, Result

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

CHANGES = ("appears", "vanishes", "changes", "stays")


@dataclass(frozen=True, slots=True)
class PartChange:
    """One part in two circuits.

    Attributes:
        part: A node or an edge.
        change: ``appears`` (in the second only), ``vanishes`` (in the first only), ``changes`` (another role, or
            effects whose intervals do not overlap) or ``stays``.
        roles: Role in each circuit; None for edges, and where the circuit does not hold the part.
        effects: Effect in each circuit; None where the circuit does not hold the part.
        intervals: Intervals of the effects, where they were measured.
        overlap: Whether the intervals overlap; None unless both were measured.
    """

    part: Node | Edge
    change: str
    roles: tuple[str | None, str | None]
    effects: tuple[float | None, float | None]
    intervals: tuple[tuple[float, float] | None, tuple[float, float] | None] = (None, None)
    overlap: bool | None = None


@dataclass(frozen=True, slots=True)
class CircuitComparison(Result):
    """Two circuits side by side.

    Attributes:
        first, second: Provenance of each circuit.
        metrics: Metric of each circuit. Effects are shares of the circuit's own gap.
        nodes: Every node of either circuit, in the order of computation.
        edges: Every edge of either circuit, strongest first.
        jaccard: Number of shared nodes over the number of all nodes.

    Example:
        >>> comparison = ms.circuits.compare_circuits(circuit, circuit.subset(["L0.H1", "L3.MLP"]))
        >>> [str(one.part) for one in comparison.having("vanishes") if isinstance(one.part, ms.Node)]
        ['L0.MLP', 'L1.MLP', 'L3.H1']
    """

    first: Provenance
    second: Provenance
    metrics: tuple[Mapping[str, object], Mapping[str, object]]
    nodes: tuple[PartChange, ...]
    edges: tuple[PartChange, ...]
    jaccard: float

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self.having(change))} {_WORDS[change]}" for change in CHANGES)
        names = f"{self.first.model} -> {self.second.model}"
        return f"CircuitComparison({names}: nodes {counts}; overlap {self.jaccard:.2f})"

    def having(self, change: str) -> tuple[PartChange, ...]:
        """The nodes of one kind of change."""
        if change not in CHANGES:
            raise MechsafetyError(f"change {change!r}", expected=f"one of {CHANGES}")
        return tuple(row for row in self.nodes if row.change == change)

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per node or edge: its change, and its roles and effects in both circuits."""
        import pandas as pd

        rows = []
        for row in (*self.nodes, *self.edges):
            values = asdict(row)
            record: dict[str, object] = {
                "part": str(row.part),
                "kind": "node" if isinstance(row.part, Node) else "edge",
            }
            record |= {"change": row.change, "overlap": row.overlap}
            for k, side in enumerate(("first", "second")):
                low, high = values["intervals"][k] or (None, None)
                record |= {f"role_{side}": row.roles[k], f"effect_{side}": row.effects[k]}
                record |= {f"ci_low_{side}": low, f"ci_high_{side}": high}
            rows.append(record)
        return pd.DataFrame(rows)

    def plot(self) -> "go.Figure":
        """Effect of every node in both circuits, one point per node; on the diagonal, the effect is the same."""
        import plotly.express as px

        frame = self.to_dataframe()
        frame = frame[frame.kind == "node"].fillna({"effect_first": 0.0, "effect_second": 0.0})
        labels = {"effect_first": "effect in the first", "effect_second": "effect in the second"}
        return px.scatter(
            frame,
            x="effect_first",
            y="effect_second",
            color="change",
            hover_name="part",
            labels=labels,
            category_orders={"change": list(CHANGES)},
        )


_WORDS = {"appears": "appear", "vanishes": "vanish", "changes": "change", "stays": "stay"}


def compare_circuits(a: RefusalCircuit, b: RefusalCircuit) -> CircuitComparison:
    """Which parts appear, vanish or change from one circuit to another.

    Effects are shares of each circuit's own metric gap, so they compare across prompts and models. A node changes if
    its role differs or if the 95 % intervals of its effect are apart. Intervals that are apart are a stricter demand
    than a significant difference.

    Args:
        a: The first circuit.
        b: The second circuit, of a model of the same shape, searched at the same level.

    Raises:
        MechsafetyError: The circuits are of models of different shapes, or of different levels.

    Example:
        >>> smaller = circuit.subset(["L0.H1", "L3.MLP"])
        >>> ms.circuits.compare_circuits(circuit, smaller).jaccard
        0.4
    """
    for what, mine, theirs in (
        ("level", a.level, b.level),
        ("shape", _shape(a), _shape(b)),
        ("number of candidates", a.n_candidates, b.n_candidates),
    ):
        # the search of neurons itself finds which MLPs to take apart, so the numbers of candidates may differ
        free = what == "number of candidates" and a.level == "neuron"
        if mine != theirs and not free and not (what == "shape" and None in (mine, theirs)):
            raise MechsafetyError(
                f"circuits of different {what} ({mine} and {theirs})",
                expected="two circuits of one architecture, searched at the same level",
            )
    first, second = {m.node: m for m in a.nodes}, {m.node: m for m in b.nodes}
    every = sorted({*first, *second}, key=lambda node: node.order)
    nodes = tuple(_node_change(node, first.get(node), second.get(node)) for node in every)
    here, there = {m.edge: m for m in a.edges}, {m.edge: m for m in b.edges}
    edges = [_edge_change(edge, here.get(edge), there.get(edge)) for edge in {**here, **there}]
    edges.sort(key=lambda row: (-max(abs(value or 0.0) for value in row.effects), str(row.part)))
    shared = len(first.keys() & second.keys()) / max(1, len(every))
    return CircuitComparison(a.provenance, b.provenance, (dict(a.metric), dict(b.metric)), nodes, tuple(edges), shared)


def _shape(circuit: RefusalCircuit) -> tuple[int, int, int] | None:
    shape = circuit.shape
    return None if shape is None else (shape.n_layers, shape.n_heads, shape.d_mlp)


def _node_change(node: Node, a: CircuitNode | None, b: CircuitNode | None) -> PartChange:
    overlap = None
    if a is not None and b is not None and a.ci is not None and b.ci is not None:
        overlap = a.ci[0] <= b.ci[1] and b.ci[0] <= a.ci[1]
    change = _presence(a, b)
    if a is not None and b is not None and (a.role != b.role or overlap is False):
        change = "changes"
    return PartChange(
        node,
        change,
        (None if a is None else a.role, None if b is None else b.role),
        (None if a is None else a.effect, None if b is None else b.effect),
        (None if a is None else a.ci, None if b is None else b.ci),
        overlap,
    )


def _edge_change(edge: Edge, a: CircuitEdge | None, b: CircuitEdge | None) -> PartChange:
    """Edges have no intervals: they appear, vanish or stay."""
    return PartChange(
        edge, _presence(a, b), (None, None), (None if a is None else a.effect, None if b is None else b.effect)
    )


def _presence(a: object, b: object) -> str:
    if a is None:
        return "appears"
    return "vanishes" if b is None else "stays"
