"""Groups of nodes folded into one supernode, with the edges between them summed."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from mechsafety.circuits.circuit import CircuitNode
from mechsafety.viz.marks import (
    EDGE,
    PAPER,
    PORTS,
    Command,
    EdgeMark,
    Grid,
    NodeMark,
    Shape,
    centred,
    edge_shapes,
    magnitude,
    node_shape,
    outline,
    readable_on,
    rounded,
    text_width,
)
from mechsafety.viz.words import number

# sender, receiver, slot
Ends = tuple[str, str, str]


def supernodes(nodes: Sequence[NodeMark], names: Iterable[str], cell: float) -> tuple[tuple[NodeMark, str], ...]:
    """One mark per group, ``cell`` wide, and the key of its anchor: the member nearest to the group's weighted mean."""
    members: dict[str, list[tuple[NodeMark, CircuitNode]]] = {name: [] for name in names}
    for mark in nodes:
        if mark.group and mark.member is not None:
            members[mark.group].append((mark, mark.member))
    return tuple(_supernode(name, found, cell) for name, found in members.items() if found)


def _supernode(name: str, members: Sequence[tuple[NodeMark, CircuitNode]], cell: float) -> tuple[NodeMark, str]:
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
    return NodeMark(f"group:{name}", x, y, cell, height, shapes, (label,), title, None, name, "group"), anchor.key


def folded_edges(
    edges: Sequence[EdgeMark], stands_for: Mapping[str, str], places: Mapping[str, NodeMark], grid: Grid
) -> list[EdgeMark]:
    """The edges, weakest first; edges of folded groups are summed by ends and slot, and led around the nodes.

    Args:
        edges: All edges, including those that are too weak to be drawn: many weak edges may sum to a strong one.
        stands_for: The supernode of each hidden node.
        places: Marks of everything that is drawn.
        grid: Where edges may run.
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
    paths = detours(list(sums), places, grid)
    for ends, marks in sums.items():
        total = totals[ends]
        status = "measured" if all(mark.status != "estimated" for mark in marks) else "estimated"
        linking = all(mark.linking for mark in marks)
        strength = magnitude(total) / (largest or 1.0)
        shapes = edge_shapes(total, status, ends[2], strength, paths[ends], grid.unit, linking=linking)
        effect = "effects sum to" if len(marks) > 1 else "effect"
        words = f"{count_of(len(marks), 'edge')}, {effect} {number(total)}"
        title = f"{ends[0]} to {ends[1]}, slot {ends[2]}: {words}"
        kept.append(EdgeMark(*ends, total, status, shapes, title, n_edges=len(marks), linking=linking))
    return sorted(kept, key=lambda mark: (magnitude(mark.effect), mark.title))


def detours(ends: Sequence[Ends], places: Mapping[str, NodeMark], grid: Grid) -> dict[Ends, tuple[Command, ...]]:
    """Paths of edges in the channels alone, upward or downward, so that no edge runs under a node.

    1. An edge leaves its sender upward and runs level above it.
    2. It rises (or falls) in the channel beside its receiver.
    3. It runs level below its receiver and enters it from below.

    Edges into one slot share their way. Ways that share a channel are spread over it. The page's script does the same
    (``detours`` in ``circuit.js``); a test keeps the two alike.
    """
    rails: dict[int, list[str]] = defaultdict(list)
    levels: dict[int, list[str]] = defaultdict(list)
    ways: dict[Ends, tuple[str, int | None, int | None, int | None]] = {}
    for one in sorted(ends):
        sender, receiver = (grid.cells.get(key) for key in one[:2])
        into = f"{one[1]} {one[2]}"
        above = None if sender is None else sender[0] + 1
        below = None if receiver is None else receiver[0]
        rail: int | None
        if above is not None and above == below:
            rail = None
        elif receiver is None:
            # the bar of the logits is as wide as the picture, so the edge rises beside the sender
            rail = 0 if sender is None else sender[1] + 1
            into += f" {rail}"
        else:
            rail = receiver[1] if sender is not None and sender[1] < receiver[1] else receiver[1] + 1
            into += f" {rail}"
        ways[one] = (into, rail, above, below)
        if rail is not None and into not in rails[rail]:
            rails[rail].append(into)
        for gap in (above, below):
            if gap is not None and into not in levels[gap]:
                levels[gap].append(into)

    def rail_at(rail: int, into: str) -> float:
        start, width = grid.channels[rail]
        return start + width * (rails[rail].index(into) + 1) / (len(rails[rail]) + 1)

    def level_at(gap: int, into: str) -> float:
        low, height = grid.gaps[gap]
        return low - height * (0.25 + 0.7 * (levels[gap].index(into) + 1) / (len(levels[gap]) + 1))

    paths = {}
    for one, (into, rail, above, below) in ways.items():
        start, stop = places[one[0]], places[one[1]]
        end = stop.x + PORTS[one[2]] * stop.width
        foot, head = stop.y + stop.height / 2, start.y - start.height / 2
        x = end if rail is None else rail_at(rail, into)
        points = (
            [(x, foot)] if below is None else [(end, foot), (end, level_at(below, into)), (x, level_at(below, into))]
        )
        points += [(x, head)] if above is None else [(x, level_at(above, into)), (start.x, level_at(above, into))]
        points += [] if above is None else [(start.x, head)]
        paths[one] = rounded(points, 5 * grid.unit)
    return paths


def count_of(n: int, what: str) -> str:
    """A number with its noun, in the plural unless the number is 1."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
