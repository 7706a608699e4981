"""Where everything in a circuit's picture stands. Layers go upward; one layout serves SVG, PDF and TikZ."""

import math
from collections import defaultdict
from dataclasses import dataclass

from mechsafety.circuits.circuit import CircuitNode, Node, RefusalCircuit
from mechsafety.errors import MechsafetyError
from mechsafety.viz.curves import edge_marks
from mechsafety.viz.legend import legend_and_caption
from mechsafety.viz.marks import (
    FAINT,
    INK,
    MUTED,
    PAPER,
    Label,
    Layout,
    NodeMark,
    Shape,
    centred,
    line,
    magnitude,
    node_shape,
    outline,
    readable_on,
    text_width,
)

COMPACT_ABOVE = 60
STATIC_EDGES = 60
WIDE_MODEL = 12
NARROW = 46.0
LEFT, RIGHT, TOP, BAR, HEADER, BREAK = 54.0, 30.0, 14.0, 24.0, 24.0, 24.0
BADGE_STEP, BADGE_LINE, BADGES_A_LINE = 46.0, 19.0, 5


@dataclass(frozen=True, slots=True)
class Grid:
    """Cells of the picture.

    Attributes:
        rows: Centre of each drawn layer.
        heads: Centre of each drawn head column.
        mlp: Centre of the MLP column.
        neurons: Centre of the first neuron badge; None without neurons.
        step: Distance of head columns.
        cell: Width and height of the largest node.
        font: Size of node labels.
        logits, embed: Heights of the two bars' centres.
        left, right: Where rows begin and end.
        bottom: Where the map ends.
        breaks: Height and text of each run of left-out layers.
    """

    rows: dict[int, float]
    heads: dict[int, float]
    mlp: float
    neurons: float | None
    step: float
    cell: tuple[float, float]
    font: float
    logits: float
    embed: float
    left: float
    right: float
    bottom: float
    breaks: tuple[tuple[float, str], ...]


def layout_circuit(circuit: RefusalCircuit, *, max_edges: int | None = STATIC_EDGES) -> Layout:
    """Place a circuit's nodes and edges: heads at the left, MLPs at the right, layers upward.

    Up to 60 nodes, layers without a node are left out, with a mark; above, the whole grid is drawn.

    Args:
        circuit: What to draw.
        max_edges: Draw only this many of the strongest edges; None draws all.

    Returns:
        The same layout for the same circuit.

    Raises:
        MechsafetyError: A node is listed twice, or ``max_edges`` is negative.
    """
    if max_edges is not None and max_edges < 0:
        raise MechsafetyError(f"max_edges={max_edges}", expected="None or a number that is not negative")
    members: dict[Node, CircuitNode] = {}
    for member in circuit.nodes:
        if member.node in members:
            raise MechsafetyError(f"the circuit lists {member.node} twice", expected="each node once")
        members[member.node] = member
    grid = _grid(circuit, members)
    nodes = tuple(sorted(_node_marks(grid, members), key=lambda mark: mark.node.order))
    places = {mark.node: mark for mark in nodes}
    lane = None if grid.neurons is None else -1
    edges = edge_marks(circuit.edges, places, grid.step, lane or 1, max_edges)
    backdrop, labels = _decoration(grid, places)
    width = max(grid.right + RIGHT + (60 if lane is None else 0), 660.0)
    swatches, texts, height = legend_and_caption(circuit, len(edges), width, grid.bottom)
    return Layout(width, height, nodes, edges, len(circuit.edges), backdrop + swatches, labels + texts)


def _grid(circuit: RefusalCircuit, members: dict[Node, CircuitNode]) -> Grid:
    used: dict[int, list[Node]] = defaultdict(list)
    for node in members:
        if node.layer is not None:
            used[node.layer].append(node)
    indices = {node.index for node in members if node.kind == "head" and node.index is not None}
    n_layers = max([circuit.details.n_layers if circuit.details else 0, *(layer + 1 for layer in used)])
    n_heads = max([circuit.details.n_heads if circuit.details else 0, *(index + 1 for index in indices)])
    full = len(members) > COMPACT_ABOVE
    columns = [*range(n_heads)] if full or n_heads <= WIDE_MODEL else sorted(indices)
    columns = columns if indices else []
    step = max(32.0, min(58.0 if full else 64.0, 1000.0 / max(len(columns), 1)))
    cell = (step - 10, 21.0 if full else 28.0)
    heads = {index: LEFT + 12 + step * (place + 0.5) for place, index in enumerate(columns)}
    mlp = LEFT + 12 + step * len(columns) + (82.0 if columns else step / 2)
    neurons = mlp + 68.0 if any(node.kind == "neuron" for node in members) else None
    badges = max((sum(node.kind == "neuron" for node in nodes) for nodes in used.values()), default=0)
    right = mlp + max(step / 2, 30.0) if neurons is None else neurons + BADGE_STEP * (min(badges, BADGES_A_LINE) - 0.5)
    y = TOP + BAR + HEADER + 6
    rows: dict[int, float] = {}
    breaks: list[tuple[float, str]] = []
    empty: list[int] = []
    for layer in [*reversed(range(n_layers)), -1]:
        if layer >= 0 and not full and layer not in used:
            empty.append(layer)
            continue
        if empty:
            text = f"L{empty[-1]} to L{empty[0]}: no node of the circuit" if len(empty) > 1 else ""
            height = BREAK if text else BREAK / 2
            breaks.append((y + height / 2, text))
            y, empty = y + height, []
        if layer >= 0:
            lines = math.ceil(sum(node.kind == "neuron" for node in used[layer]) / BADGES_A_LINE)
            height = max(28.0 if full else 46.0, BADGE_LINE * lines + 8)
            rows[layer] = y + height / 2
            y += height
    embed = y + HEADER + BAR / 2
    logits = TOP + BAR / 2
    font = 11.0 if full else 13.0
    return Grid(
        rows, heads, mlp, neurons, step, cell, font, logits, embed, LEFT, right, embed + BAR / 2 + 8, tuple(breaks)
    )


def _node_marks(grid: Grid, members: dict[Node, CircuitNode]) -> list[NodeMark]:
    largest = max((magnitude(member.effect) for member in members.values()), default=0.0) or 1.0
    marks = [_bar(grid, kind, members.get(Node(kind))) for kind in ("embed", "logits")]
    neurons: dict[int, list[CircuitNode]] = defaultdict(list)
    for node, member in members.items():
        strength = math.sqrt(magnitude(member.effect) / largest)
        scale = 0.8 + 0.2 * strength
        width, height = grid.cell[0] * scale, grid.cell[1] * scale
        # In narrow columns the layer is read off the row.
        short = f"{node.index}" if grid.step < NARROW else f"{node.layer}.{node.index}"
        if node.kind == "head" and node.layer is not None and node.index is not None:
            place = grid.heads[node.index], grid.rows[node.layer]
            marks.append(_mark(member, *place, width, height, short, grid.font, strength))
        elif node.kind == "mlp" and node.layer is not None:
            width = max(grid.cell[0], 46.0) * scale
            place = grid.mlp, grid.rows[node.layer]
            marks.append(_mark(member, *place, width, height, f"M{node.layer}", grid.font, strength))
        elif node.kind == "neuron" and node.layer is not None:
            neurons[node.layer].append(member)
    for layer, row in neurons.items():
        row.sort(key=lambda member: member.node.order)
        lines = math.ceil(len(row) / BADGES_A_LINE)
        for position, member in enumerate(row):
            down, across = divmod(position, BADGES_A_LINE)
            x = (grid.neurons or 0.0) + BADGE_STEP * across
            y = grid.rows[layer] + BADGE_LINE * (down - (lines - 1) / 2)
            strength = math.sqrt(magnitude(member.effect) / largest)
            scale = 0.88 + 0.12 * strength
            marks.append(_mark(member, x, y, 42 * scale, 15 * scale, f"N{member.node.index}", 9.0, strength))
    return marks


def _mark(
    member: CircuitNode, x: float, y: float, width: float, height: float, text: str, font: float, strength: float
) -> NodeMark:
    shape = node_shape(member.role, member.status, strength, x, y, width, height)
    size = min(font, font * 0.84 * width / text_width(text, font))
    colour = MUTED if member.status == "rejected" else readable_on(shape.fill or PAPER)
    label = centred(x, y, text, size, colour, bold=True) if size >= 6 else None
    return NodeMark(member.node, member, x, y, width, height, shape, label)


def _bar(grid: Grid, kind: str, member: CircuitNode | None) -> NodeMark:
    words = {"embed": "embed: the prompt's tokens", "logits": "logits: refuse or comply"}
    x, width = (grid.left + grid.right) / 2, grid.right - grid.left
    y = grid.embed if kind == "embed" else grid.logits
    shape = Shape(outline("rounded", x, y, width, BAR), "#EEF1F4", INK if member else MUTED, 1.2 if member else 0.8)
    return NodeMark(Node(kind), member, x, y, width, BAR, shape, centred(x, y, words[kind], 12, INK))


def _decoration(grid: Grid, places: dict[Node, NodeMark]) -> tuple[tuple[Shape, ...], tuple[Label, ...]]:
    shapes, labels = [], []
    for layer, y in grid.rows.items():
        shapes.append(Shape(line((grid.left, y), (grid.right, y)), None, FAINT, 0.6))
        labels.append(Label(grid.left - 10, y + 4, f"L{layer}", 11, "end", MUTED))
        cells = [(x, Node("head", layer, index)) for index, x in grid.heads.items()]
        for x, node in [*cells, (grid.mlp, Node("mlp", layer))]:
            if node not in places:
                shapes.append(Shape(outline("ellipse", x, y, 4, 4), FAINT))
    for y, text in grid.breaks:
        zigzag = [(grid.left + 6 * place, y + (3 if place % 2 else -3)) for place in range(6)]
        shapes.append(Shape(line(*zigzag), None, MUTED, 1.0))
        labels += [Label(grid.left + 42, y + 3.5, text, 10, "start", MUTED)] if text else []
    tops = (grid.logits + BAR / 2 + 17, grid.embed - BAR / 2 - 8)
    for y in tops:
        labels += [Label(x, y, f"H{index}", 11, "middle", MUTED) for index, x in grid.heads.items()]
        labels.append(Label(grid.mlp, y, "MLP", 11, "middle", MUTED))
        if grid.neurons is not None:
            labels.append(Label(grid.neurons - 21, y, "neurons of that MLP", 11, "start", MUTED))
    return tuple(shapes), tuple(labels)
