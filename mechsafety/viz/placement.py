"""Which row and column each node takes: layers upward, lanes side by side, few crossings."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mechsafety.circuits.circuit import CircuitEdge
from mechsafety.nodes import Node
from mechsafety.viz.marks import magnitude

SWEEPS = 6
COUNTED = 300  # crossings are counted among the strongest edges


@dataclass(frozen=True, slots=True)
class Lane:
    """Columns ``first`` to ``first + width - 1`` that belong together."""

    key: str
    title: str
    first: int
    width: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Cells of the picture.

    Attributes:
        lanes: The lanes, from left to right.
        layers: The layer of each line, from the bottom up; a layer can take several lines.
        cell: Line and column of each node.
    """

    lanes: tuple[Lane, ...]
    layers: tuple[int, ...]
    cell: Mapping[Node, tuple[int, int]]

    @property
    def n_columns(self) -> int:
        """Number of columns of all lanes together."""
        return sum(lane.width for lane in self.lanes)


def place(
    lane: Mapping[Node, str], order: Sequence[tuple[str, str]], edges: Sequence[CircuitEdge], limit: int
) -> Placement:
    """Give each node a cell.

    Heads and MLPs of one layer share a line unless an edge joins them, so that every edge goes upward. Within lanes,
    nodes move to the columns nearest to their neighbours. This is one assignment problem per line, solved exactly. The
    lines are swept up and down, and the sweep with the fewest crossings is kept.

    Args:
        lane: The lane of each node; nodes have layers.
        order: Keys and titles of lanes from left to right; lanes without a node are left out.
        edges: Edges, which pull their ends together.
        limit: Largest number of columns, but at least one per lane. Crowded lanes wrap to further lines.
    """
    blocks = _blocks(lane, edges)
    crowd: dict[str, int] = defaultdict(int)
    for nodes in blocks.values():
        for key in {lane[node] for node in nodes}:
            crowd[key] = max(crowd[key], sum(lane[node] == key for node in nodes))
    width = {key: crowd[key] for key, _ in order if crowd[key]}
    while sum(width.values()) > max(limit, len(width)):
        width[max(width, key=lambda key: width[key])] -= 1
    lanes, first = [], 0
    for key, title in order:
        if key in width:
            lanes.append(Lane(key, title, first, width[key]))
            first += width[key]
    layers: list[int] = []
    cells: list[tuple[list[Node], list[tuple[int, int]]]] = []
    for (layer, _), nodes in sorted(blocks.items()):
        lines = max(math.ceil(sum(lane[node] == one.key for node in nodes) / one.width) for one in lanes)
        for one in lanes:
            members = sorted((node for node in nodes if lane[node] == one.key), key=lambda node: node.order)
            free = [(len(layers) + up, one.first + column) for up in range(lines) for column in range(one.width)]
            if members:
                cells.append((members, free))
        layers += [layer] * lines
    return Placement(tuple(lanes), tuple(layers), _sweep(cells, lanes, edges))


def crossings(cell: Mapping[Node, tuple[int, int]], edges: Sequence[CircuitEdge]) -> int:
    """Number of pairs of edges that cross if they are drawn straight; common ends do not count as a crossing."""
    spans = [
        (*cell[member.edge.sender], *cell[member.edge.receiver])
        for member in edges[:COUNTED]
        if member.edge.sender in cell and member.edge.receiver in cell
    ]
    if len(spans) < 2:
        return 0
    y0, x0, y1, x1 = np.array(spans, dtype=float).T
    low, high = np.maximum(y0[:, None], y0), np.minimum(y1[:, None], y1)
    slope = (x1 - x0) / np.maximum(y1 - y0, 1e-9)
    at = [
        (x0[:, None] + slope[:, None] * (height - y0[:, None])) - (x0 + slope * (height - y0)) for height in (low, high)
    ]
    cross = (high > low) & (at[0] * at[1] < -1e-9)
    return int(np.triu(cross, 1).sum())


def _blocks(lane: Mapping[Node, str], edges: Sequence[CircuitEdge]) -> dict[tuple[int, int], list[Node]]:
    """Nodes by layer and half; a layer has two halves where one of its heads feeds its MLP or neurons."""
    split = {
        member.edge.sender.layer
        for member in edges
        if member.edge.sender.layer == member.edge.receiver.layer
        and member.edge.sender in lane
        and member.edge.receiver in lane
    }
    blocks: dict[tuple[int, int], list[Node]] = defaultdict(list)
    for node in lane:
        layer = node.layer or 0
        blocks[layer, int(layer in split and node.kind != "head")].append(node)
    return blocks


def _sweep(
    cells: Sequence[tuple[list[Node], list[tuple[int, int]]]], lanes: Sequence[Lane], edges: Sequence[CircuitEdge]
) -> dict[Node, tuple[int, int]]:
    from scipy.optimize import linear_sum_assignment

    centre = {column: lane.first + (lane.width - 1) / 2 for lane in lanes for column in _columns(lane)}
    at: dict[Node, tuple[int, int]] = {}
    for nodes, free in cells:
        chosen = sorted(sorted(free, key=lambda spot: (spot[0], abs(spot[1] - centre[spot[1]])))[: len(nodes)])
        at |= dict(zip(nodes, chosen, strict=True))
    largest = max((magnitude(member.effect) for member in edges), default=0.0) or 1.0
    pulls: dict[Node, list[tuple[Node, float]]] = defaultdict(list)
    for member in edges:
        sender, receiver = member.edge.sender, member.edge.receiver
        if sender in at and receiver in at:
            weight = 0.1 + math.sqrt(magnitude(member.effect) / largest)
            pulls[sender].append((receiver, weight))
            pulls[receiver].append((sender, weight))
    best, fewest = dict(at), crossings(at, edges)
    for sweep in range(SWEEPS):
        for nodes, free in cells[:: 1 if sweep % 2 == 0 else -1]:
            columns = np.array([spot[1] for spot in free], dtype=float)
            home = 0.02 * np.abs(columns - centre[free[0][1]])
            home += 0.05 * (np.array([spot[0] for spot in free]) - free[0][0])
            cost = np.stack(
                [
                    home
                    + 1e-4 * rank * -columns
                    + sum((weight * np.abs(columns - at[other][1]) for other, weight in pulls[node]), np.zeros(1))
                    for rank, node in enumerate(nodes)
                ]
            )
            for row, spot in zip(*linear_sum_assignment(cost), strict=True):
                at[nodes[row]] = free[spot]
        count = crossings(at, edges)
        if count < fewest or (sweep == 0 and count <= fewest):
            best, fewest = dict(at), count
    return best


def _columns(lane: Lane) -> range:
    return range(lane.first, lane.first + lane.width)
