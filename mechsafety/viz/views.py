"""Which nodes of a circuit are drawn: what a style asks for, and what fits a paper."""

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Node, as_nodes
from mechsafety.viz.look import PLAIN, Look
from mechsafety.viz.marks import magnitude
from mechsafety.viz.style import Style

E = TypeVar("E")


def chosen_nodes(circuits: Sequence[RefusalCircuit], style: Style) -> list[Node]:
    """The nodes that a style asks for, the largest effect first; of several circuits, a node of any of them.

    Raises:
        MechsafetyError: A node that is in no circuit, or nothing is left.
    """
    members = [member for circuit in circuits for member in circuit.nodes if member.node.layer is not None]
    sizes: dict[Node, float] = {}
    for member in members:
        sizes[member.node] = max(sizes.get(member.node, 0.0), magnitude(member.effect))
    asked = None if style.nodes is None else set(as_nodes(style.nodes))
    strange = sorted(str(node) for node in (asked or ()) if node not in sizes)
    if strange:
        raise MechsafetyError(f"{strange[0]} is not in this circuit", expected="nodes of the circuit")
    layers = (style.layers,) if isinstance(style.layers, int) else style.layers
    kept = {
        member.node
        for member in members
        if (asked is None or member.node in asked)
        and (style.roles is None or member.role in style.roles)
        and (layers is None or member.node.layer in layers)
        and (style.min_effect is None or sizes[member.node] >= style.min_effect)
    }
    if members and not kept:
        raise MechsafetyError("a view without nodes", expected="a wider choice of nodes, roles, layers or effects")
    ranked = sorted(kept, key=lambda node: (-sizes[node], node.order))
    return ranked if style.top is None else ranked[: style.top]


def check_labels(circuits: Sequence[RefusalCircuit], style: Style) -> None:
    """Refuse a label of a node that no circuit has, with the nearest node that one has.

    Raises:
        MechsafetyError: Such a label.
    """
    known = {member.node for circuit in circuits for whole in (circuit, circuit.by_mlp()) for member in whole.nodes}
    for node in style.look.labels:
        if node not in known and node.layer is not None:
            alike = min(known, key=lambda one: _distance(one, node), default=None)
            raise MechsafetyError(
                f"labels names {node}, which is not in this circuit",
                expected="nodes of the circuit",
                hint=f"did you mean '{alike}'?" if alike else "",
            )


def _distance(one: Node, other: Node) -> tuple[bool, int, int, tuple[int, int, int]]:
    """How far two names are apart: first the kind counts, then the layer, then the index."""
    return (
        one.kind != other.kind,
        abs((one.layer or 0) - (other.layer or 0)),
        abs((one.index or 0) - (other.index or 0)),
        one.order,
    )


def part_of(circuit: RefusalCircuit, nodes: Collection[Node]) -> RefusalCircuit:
    """The circuit with these nodes alone, and the edges between them, ``embed`` and ``logits``; for drawing only.

    It keeps the whole circuit's verification, which `RefusalCircuit.subset` does not.
    """
    kept = set(nodes)
    inside = {*kept, Node("embed"), Node("logits")}
    return replace(
        circuit,
        nodes=tuple(member for member in circuit.nodes if member.node in inside),
        edges=tuple(m for m in circuit.edges if m.edge.sender in inside and m.edge.receiver in inside),
    )


def strongest_edges(edges: Sequence[E], count: int | None, ends: Callable[[E], tuple[Hashable, Hashable]]) -> list[E]:
    """The strongest edges, and each node's strongest, so that no node is unconnected; all where no number is given.

    Args:
        edges: Edges, the strongest first.
        count: How many of the strongest; 0 for none.
        ends: Sender and receiver of an edge.
    """
    if count is None or not count:
        return list(edges) if count is None else []
    best: dict[Hashable, int] = {}
    for k, edge in enumerate(edges):
        for end in ends(edge):
            best.setdefault(end, k)
    return [edges[k] for k in sorted({*best.values(), *range(min(count, len(edges)))})]


def left_out(
    circuit: RefusalCircuit, drawn: RefusalCircuit, look: Look = PLAIN, folded: Collection[Node] = ()
) -> tuple[str, ...]:
    """Sentences of the caption on nodes that are left out or folded, and on MLPs that stand for neurons.

    Args:
        circuit: The whole circuit.
        drawn: The part that is drawn, folded nodes included.
        look: Names of roles.
        folded: Nodes that are drawn as a number.
    """
    whole = circuit.by_mlp()
    together = [member for member in circuit.nodes if member.evidence.together]
    found = []
    if together:
        mlps = len({member.node.layer for member in together})
        found.append(
            f"The {len(together)} neurons were measured together by MLP: {mlps} MLPs stand for those of their neurons "
            "that are in the circuit."
        )
    hidden: Counter[str] = Counter(member.role for member in whole.nodes)
    hidden.subtract(member.role for member in drawn.nodes)
    parts = []
    if any(hidden.values()):
        n = len(drawn.nodes)
        parts.append(f"{n} of {len(whole.nodes)} nodes {_are(n)} drawn (left out: {_counted(hidden, look)}).")
    if folded:
        weak: Counter[str] = Counter(member.role for member in drawn.nodes if member.node in folded)
        n = len(drawn.nodes) - len(folded)
        weakest = "The weakest is" if len(folded) == 1 else f"The {len(folded)} weakest are"
        parts.append(
            f"{n} of {len(whole.nodes)} nodes {_are(n)} drawn one by one. {weakest} folded into marks with +, "
            f"their edges summed: {_counted(weak, look)}."
        )
    if parts:
        found.append(" ".join([*parts, "All numbers are of the whole circuit."]))
    return tuple(found)


def _are(n: int) -> str:
    return "is" if n == 1 else "are"


def _counted(roles: Mapping[str, int], look: Look) -> str:
    return ", ".join(f"{count} {look.role(role)}" for role, count in roles.items() if count)
