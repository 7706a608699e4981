"""Groups of nodes folded into one supernode, with the edges between them summed."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from mechsafety.circuits.circuit import CircuitNode
from mechsafety.viz.marks import (
    EDGE,
    PAPER,
    Command,
    EdgeMark,
    Layout,
    NodeMark,
    Shape,
    centred,
    edge_shapes,
    magnitude,
    node_shape,
    outline,
    readable_on,
    text_width,
)
from mechsafety.viz.words import number


def supernodes(layout: Layout, names: Iterable[str], cell: float) -> tuple[NodeMark, ...]:
    """One mark a group, ``cell`` wide, at the place of the member nearest to their weighted mean height."""
    members: dict[str, list[tuple[NodeMark, CircuitNode]]] = {name: [] for name in names}
    for mark in layout.nodes:
        if mark.group and mark.member is not None:
            members[mark.group].append((mark, mark.member))
    return tuple(_supernode(name, found, cell) for name, found in members.items() if found)


def _supernode(name: str, members: Sequence[tuple[NodeMark, CircuitNode]], cell: float) -> NodeMark:
    weights = [magnitude(member.effect) + 1e-9 for _, member in members]
    mean = sum(weight * mark.y for weight, (mark, _) in zip(weights, members, strict=True)) / sum(weights)
    anchor = min((mark for mark, _ in members), key=lambda mark: (abs(mark.y - mean), mark.key))
    x, y, height, font = anchor.x, anchor.y, anchor.height, anchor.labels[0].size
    roles = {member.role for _, member in members}
    shape = node_shape(roles.pop() if len(roles) == 1 else "none", "measured", 0.5, x, y, cell, height)
    behind = [Shape(outline("rounded", x + step, y - step, cell, height), PAPER, EDGE, 0.8) for step in (3.0, 1.5)]
    text = f"{len(members)}\u00d7"
    size = min(font, font * 0.8 * cell / text_width(text, font))
    label = centred(x, y, text, size, readable_on(shape.fill or PAPER), bold=True)
    total = number(sum(member.effect for _, member in members))
    listed = ", ".join(mark.key for mark, _ in members)
    title = f"{name}: {len(members)} nodes folded, effects sum to {total}: {listed}"
    shapes = (*behind, shape)
    return NodeMark(f"group:{name}", x, y, cell, height, shapes, (label,), title, None, name, "group")


def fold(layout: Layout, names: Collection[str]) -> Layout:
    """The layout with these groups folded; nothing else moves."""
    stands_for = {mark.key: f"group:{mark.group}" for mark in layout.nodes if mark.group in names}
    shown = [mark for mark in layout.folded if mark.group in names]
    nodes = tuple(mark for mark in layout.nodes if mark.key not in stands_for) + tuple(shown)
    places = {mark.key: mark for mark in nodes}
    kept: list[EdgeMark] = []
    sums: dict[tuple[str, str, str], list[EdgeMark]] = defaultdict(list)
    for mark in layout.edges:
        sender, receiver = stands_for.get(mark.sender, mark.sender), stands_for.get(mark.receiver, mark.receiver)
        if (sender, receiver) == (mark.sender, mark.receiver):
            kept.append(mark)
        elif sender != receiver:
            sums[sender, receiver, mark.slot].append(mark)
    largest = max((magnitude(mark.effect) for mark in layout.edges), default=0.0)
    totals = {key: sum(mark.effect for mark in marks) for key, marks in sums.items()}
    largest = max([largest, *(magnitude(total) for total in totals.values())]) or 1.0
    for (sender, receiver, slot), marks in sums.items():
        total = totals[sender, receiver, slot]
        status = "measured" if all(mark.status != "estimated" for mark in marks) else "estimated"
        path = bow(places[sender], places[receiver])
        title = f"{sender} to {receiver}, slot {slot}: {len(marks)} edges, effects sum to {number(total)}"
        shapes = edge_shapes(total, status, slot, magnitude(total) / largest, path)
        kept.append(EdgeMark(sender, receiver, slot, total, status, shapes, title))
    folded = tuple(mark for mark in layout.folded if mark.group not in names)
    return replace(layout, nodes=nodes, edges=tuple(kept), folded=folded)


def bow(sender: NodeMark, receiver: NodeMark) -> tuple[Command, ...]:
    """The curve of a summed edge, from the receiver's lower rim to the sender's upper one."""
    x, y = _near(receiver, sender.x), receiver.y + receiver.height / 2
    start_x, start_y = _near(sender, receiver.x), sender.y - sender.height / 2
    reach = max(14.0, 0.4 * abs(start_y - y))
    return (("M", (x, y)), ("C", (x, y + reach, start_x, start_y - reach, start_x, start_y)))


def _near(mark: NodeMark, x: float) -> float:
    """Where a curve meets a bar: above or below its other end."""
    if mark.kind not in ("embed", "logits"):
        return mark.x
    return min(max(x, mark.x - mark.width / 2 + 8), mark.x + mark.width / 2 - 8)
