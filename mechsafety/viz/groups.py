"""Groups of nodes folded into one supernode, with the edges between them summed."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mechsafety.circuits.circuit import CircuitNode
from mechsafety.viz.detours import Ends
from mechsafety.viz.look import Look
from mechsafety.viz.marks import (
    EDGE,
    PAPER,
    Command,
    EdgeMark,
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
from mechsafety.viz.words import filled, number, sum_title


def supernodes(
    nodes: Sequence[NodeMark], titles: Mapping[str, str], cell: float, look: Look, count: str = "<n>\u00d7"
) -> tuple[tuple[NodeMark, str], ...]:
    """One mark per group, ``cell`` wide, and the key of its anchor: the member nearest to the group's weighted mean.

    Args:
        nodes: Marks of the nodes.
        titles: What each group is called, by its name.
        cell: Width of a mark.
        look: Colours of roles.
        count: What a mark says of its number of nodes.
    """
    members: dict[str, list[tuple[NodeMark, CircuitNode]]] = {name: [] for name in titles}
    for mark in nodes:
        if mark.group and mark.member is not None:
            members[mark.group].append((mark, mark.member))
    return tuple(_supernode(name, titles[name], found, cell, look, count) for name, found in members.items() if found)


def _supernode(
    name: str, title: str, members: Sequence[tuple[NodeMark, CircuitNode]], cell: float, look: Look, count: str
) -> tuple[NodeMark, str]:
    weights = [magnitude(member.effect) + 1e-9 for _, member in members]
    mean = sum(weight * mark.y for weight, (mark, _) in zip(weights, members, strict=True)) / sum(weights)
    anchor = min((mark for mark, _ in members), key=lambda mark: (abs(mark.y - mean), mark.key))
    x, y, height, font = anchor.x, anchor.y, anchor.height, anchor.labels[0].size
    roles = {member.role for _, member in members}
    role = roles.pop() if len(roles) == 1 else "none"
    shape = node_shape(role, look.colour(role), "measured", 0.5, x, y, cell, height)
    behind = [Shape(outline("rounded", x + step, y - step, cell, height), PAPER, EDGE, 0.8) for step in (3.0, 1.5)]
    text = filled(count, n=len(members))
    size = min(font, font * 0.8 * cell / text_width(text, font))
    label = centred(x, y, text, size, readable_on(shape.fill or PAPER), bold=True)
    total = number(sum(member.effect for _, member in members))
    listed = ", ".join(mark.key for mark, _ in members)
    words = f"{title}: {len(members)} nodes folded, effects sum to {total}: {listed}"
    shapes = (*behind, shape)
    return NodeMark(f"group:{name}", x, y, cell, height, shapes, (label,), words, None, name, "group"), anchor.key


def weak_marks(
    nodes: Sequence[NodeMark], lanes: Mapping[str, str], cell: float, look: Look
) -> tuple[list[NodeMark], dict[str, str]]:
    """One small mark per lane for the weak nodes that a figure has no room for, and the key of each node's mark.

    Args:
        nodes: Marks of the weak nodes, all of a lane at one place; the ``group`` of each is its lane.
        lanes: What each lane is called.
        cell: Width of the largest node.
        look: Colours of roles.
    """
    found = supernodes(nodes, lanes, 0.9 * cell, look, "+<n>")
    marks = [replace(mark, key=weak_key(mark.group), group="", kind="weak") for mark, _ in found]
    return marks, {mark.key: weak_key(mark.group) for mark in nodes}


def weak_key(lane: str) -> str:
    """The key of the mark of a lane's weak nodes."""
    return f"weak:{lane}"


def folded_edges(
    edges: Sequence[EdgeMark],
    stands_for: Mapping[str, str],
    paths: Mapping[Ends, tuple[Command, ...]],
    unit: float,
) -> list[EdgeMark]:
    """The edges, weakest first; edges of folded groups are summed by ends and slot, and led around the nodes.

    Args:
        edges: All edges, including those that are too weak to be drawn: many weak edges may sum to a strong one.
        stands_for: The supernode of each hidden node.
        paths: The way of each sum, by `mechsafety.viz.detours.detours`.
        unit: Pixels that a length of 1 at the 12-pixel font takes.
    """
    kept: list[EdgeMark] = []
    sums: dict[Ends, list[EdgeMark]] = defaultdict(list)
    for mark in edges:
        sender, receiver = stands_for.get(mark.sender, mark.sender), stands_for.get(mark.receiver, mark.receiver)
        if (sender, receiver) == (mark.sender, mark.receiver):
            kept.append(mark)
        elif sender != receiver:
            sums[sender, receiver, mark.slot].append(mark)
    totals = {ends: sum(mark.effect for mark in marks) for ends, marks in sums.items()}
    largest = max((magnitude(effect) for effect in (*(mark.effect for mark in edges), *totals.values())), default=0.0)
    for ends, marks in sums.items():
        total = totals[ends]
        status = "measured" if all(mark.status != "estimated" for mark in marks) else "estimated"
        linking = all(mark.linking for mark in marks)
        strength = magnitude(total) / (largest or 1.0)
        shapes = edge_shapes(total, status, ends[2], strength, paths[ends], unit, linking=linking)
        title = sum_title(*ends, len(marks), total)
        kept.append(EdgeMark(*ends, total, status, shapes, title, n_edges=len(marks), linking=linking))
    return sorted(kept, key=lambda mark: (magnitude(mark.effect), mark.title))
