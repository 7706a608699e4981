"""The curves of a circuit's edges."""

from collections.abc import Mapping, Sequence

from mechsafety.circuits.circuit import CircuitEdge, Node
from mechsafety.viz.marks import Command, EdgeMark, NodeMark, edge_shape, magnitude


def edge_marks(
    edges: Sequence[CircuitEdge], places: Mapping[Node, NodeMark], step: float, lane: int, limit: int | None
) -> tuple[EdgeMark, ...]:
    """The strongest ``limit`` edges between drawn nodes, weakest first.

    Args:
        edges: All edges of the circuit.
        places: Where the nodes are; edges with an end elsewhere are left out.
        step: Distance of head columns; curves run in the gaps between them.
        lane: Side on which edges within the MLP column bulge, 1 right, -1 left.
        limit: How many at most; None for all.
    """
    known = [member for member in edges if member.edge.sender in places and member.edge.receiver in places]
    ranked = sorted(known, key=lambda member: (-magnitude(member.effect), str(member.edge)))[:limit]
    largest = max((magnitude(member.effect) for member in edges), default=0.0) or 1.0
    return tuple(
        EdgeMark(member, edge_shape(member.effect, member.status, magnitude(member.effect) / largest, path))
        for member in reversed(ranked)
        for path in [_curve(places[member.edge.sender], places[member.edge.receiver], step, lane)]
    )


def _curve(sender: NodeMark, receiver: NodeMark, step: float, lane: int) -> tuple[Command, ...]:
    """A cubic from the sender's top to the receiver's bottom that stays in the gaps between columns where it can."""
    if sender.y == receiver.y:
        return _sideways(sender, receiver)
    start_y, end_y = sender.y - sender.height / 2, receiver.y + receiver.height / 2
    rise = start_y - end_y
    start_x, end_x, bars = sender.x, receiver.x, ("embed", "logits")
    # A bar spans the picture, so an edge meets it in the gap beside the other end's column.
    if sender.node.kind in bars:
        start_x = (receiver.x if receiver.node.kind not in bars else sender.x) - 0.5 * step
    if receiver.node.kind in bars:
        end_x = start_x + (0.5 * step if sender.node.kind not in bars else 0)
    if sender.node.kind in bars or receiver.node.kind in bars:
        gap = start_x if sender.node.kind in bars else end_x
        first, second = (gap, start_y - 0.4 * rise), (gap, end_y + 0.4 * rise)
    elif start_x == end_x:
        reach = 0.66 * step
        if sender.node.kind == receiver.node.kind == "mlp":
            reach = lane * min(100.0, 30 + 0.22 * rise)
        first, second = (start_x + reach, start_y - 0.25 * rise), (end_x + reach, end_y + 0.25 * rise)
    else:
        side = 0.5 * step if end_x > start_x else -0.5 * step
        first, second = (start_x + side, start_y - 0.3 * rise), (end_x - side, end_y + 0.3 * rise)
    return (("M", (start_x, start_y)), ("C", (*first, *second, end_x, end_y)))


def _sideways(sender: NodeMark, receiver: NodeMark) -> tuple[Command, ...]:
    """Within a layer: a shallow arc over the nodes between a head and its MLP, or an MLP and a neuron."""
    side = 1 if receiver.x > sender.x else -1
    start = (sender.x + side * sender.width * 0.3, sender.y - sender.height / 2)
    end = (receiver.x - side * receiver.width * 0.3, receiver.y - receiver.height / 2)
    top = min(start[1], end[1]) - 10
    span = end[0] - start[0]
    return (("M", start), ("C", (start[0] + 0.15 * span, top, end[0] - 0.15 * span, top, *end)))
