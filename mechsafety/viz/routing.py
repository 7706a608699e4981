"""How edges run: in the channels between rows and columns, bundled by the slot that they enter.

1. An edge leaves its sender upward and runs level in the channel above it.
2. It rises in a trunk. All edges into one slot of one receiver share one trunk.
3. It enters the receiver from below.

A trunk takes the receiver's own column if no node stands in its way, otherwise the nearest channel. Trunks that share a
channel get their own tracks. The only nodes that an edge touches are its ends.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from mechsafety.circuits.circuit import CircuitEdge
from mechsafety.nodes import Edge, Node

Cell = tuple[int, int]


@dataclass(slots=True)
class Bundle:
    """Edges into one slot of one receiver.

    Attributes:
        slot: The slot that the edges enter.
        receiver: Line and column of the receiver; None for the logits' bar.
        senders: Line and column of each sender; None for the embedding's bar.
        trunk: Column in which the bundle rises, or the column right of the channel in which it rises. None where the
            bundle is too short for a trunk.
        in_channel: Whether the trunk is in a channel.
        track: Index of the trunk's track in the channel.
        levels: By the index of each line: the level on which the bundle runs in the channel below that line.
    """

    slot: str
    receiver: Cell | None
    senders: list[Cell | None] = field(default_factory=list)
    trunk: int | None = None
    in_channel: bool = False
    track: int = 0
    levels: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Routes:
    """Bundles of all edges, and the number of tracks that each channel needs.

    Attributes:
        bundle: The bundle of each edge whose ends are drawn.
        levels: Number of levels of the channel below each line; the last channel is above all lines.
        tracks: Number of tracks of the channel left of each column; the last channel is right of all columns.
    """

    bundle: Mapping[Edge, Bundle]
    levels: tuple[int, ...]
    tracks: tuple[int, ...]


def route(cell: Mapping[Node, Cell], edges: Sequence[CircuitEdge], n_lines: int, n_columns: int) -> Routes:
    """Choose trunks, tracks and levels; an edge with an end that is not drawn gets no route."""
    taken: dict[int, set[int]] = defaultdict(set)
    for line, column in cell.values():
        taken[column].add(line)

    def free(column: int, low: int, high: int) -> bool:
        return not any(line in taken[column] for line in range(low, high))

    bundles: dict[tuple[object, ...], Bundle] = {}
    found: dict[Edge, Bundle] = {}
    for member in edges:
        edge = member.edge
        sender, receiver = cell.get(edge.sender), cell.get(edge.receiver)
        if (sender is None and edge.sender.kind != "embed") or (receiver is None and edge.receiver.kind != "logits"):
            continue
        key: tuple[object, ...] = (edge.receiver, edge.slot)
        trunk, in_channel = None, False
        if receiver is None:
            if sender is None:
                trunk, in_channel = 0, True
            else:
                in_channel = not free(sender[1], sender[0] + 1, n_lines)
                trunk = sender[1] + 1 if in_channel else sender[1]
            key = (*key, trunk, in_channel)
        bundle = bundles.setdefault(key, Bundle(edge.slot, receiver, [], trunk, in_channel))
        bundle.senders.append(sender)
        found[edge] = bundle
    for bundle in bundles.values():
        if bundle.receiver is not None:
            _choose_trunk(bundle, free)
    ordered = sorted(bundles.values(), key=_rank)
    tracks = _tracks(ordered, n_lines, n_columns)
    return Routes(found, _levels(ordered, n_lines), tracks)


def span(bundle: Bundle, n_lines: int) -> tuple[int, int]:
    """The lowest and the highest channel that the trunk runs through."""
    low = min(0 if sender is None else sender[0] + 1 for sender in bundle.senders)
    return low, n_lines if bundle.receiver is None else bundle.receiver[0]


def _choose_trunk(bundle: Bundle, free: Callable[[int, int, int], bool]) -> None:
    assert bundle.receiver is not None
    line, column = bundle.receiver
    low = min(0 if sender is None else sender[0] + 1 for sender in bundle.senders)
    if low == line and None not in bundle.senders:
        return
    if free(column, low, line):
        bundle.trunk = column
        return
    columns = [sender[1] for sender in bundle.senders if sender is not None]
    mean = sum(columns) / len(columns) if columns else column
    bundle.trunk, bundle.in_channel = (column if mean < column else column + 1), True


def _rank(bundle: Bundle) -> tuple[int, int, int, str]:
    line, column = bundle.receiver or (1 << 20, bundle.trunk or 0)
    return line, column, bundle.trunk or 0, bundle.slot


def _tracks(bundles: Sequence[Bundle], n_lines: int, n_columns: int) -> tuple[int, ...]:
    """Give the trunks of each channel tracks, so that trunks on one track do not overlap."""
    channels: dict[int, list[Bundle]] = defaultdict(list)
    for bundle in bundles:
        if bundle.in_channel and bundle.trunk is not None:
            channels[bundle.trunk].append(bundle)
    counts = [0] * (n_columns + 1)
    for channel, members in channels.items():
        ends: list[list[tuple[int, int]]] = []
        # short trunks lie nearest to the nodes that they serve
        for bundle in sorted(members, key=lambda one: (span(one, n_lines)[1] - span(one, n_lines)[0], _rank(one))):
            low, high = span(bundle, n_lines)
            track = next(
                (k for k, busy in enumerate(ends) if all(high < a or low > b for a, b in busy)),
                len(ends),
            )
            if track == len(ends):
                ends.append([])
            ends[track].append((low, high))
            bundle.track = track
        counts[channel] = len(ends)
    return tuple(counts)


def _levels(bundles: Sequence[Bundle], n_lines: int) -> tuple[int, ...]:
    """Give each bundle a level in every channel between rows in which it runs horizontally."""
    # fractions of a column, so that a port, a trunk in a column and a channel have different places
    runs: dict[int, list[tuple[Bundle, float, float, set[float], set[float]]]] = defaultdict(list)
    for bundle in bundles:
        rise = None if bundle.trunk is None else bundle.trunk - 0.5 * bundle.in_channel
        out: dict[int, set[float]] = defaultdict(set)
        into: dict[int, set[float]] = defaultdict(set)
        points: dict[int, set[float]] = defaultdict(set)
        for sender in bundle.senders:
            if sender is not None:
                gap = sender[0] + 1
                out[gap].add(float(sender[1]))
                points[gap].add(float(sender[1]))
                if rise is not None:
                    points[gap].add(rise)
                if bundle.trunk is not None and not bundle.in_channel:
                    # the trunk rises from here, in a column that an edge of a node below may leave
                    into[gap].add(float(bundle.trunk))
        if bundle.receiver is not None:
            gap, port = bundle.receiver[0], bundle.receiver[1] + {"q": -0.2, "v": 0.2}.get(bundle.slot, 0.0)
            into[gap].add(float(bundle.receiver[1]))
            points[gap].add(port)
            # a trunk in the receiver's own column goes straight to the port
            if rise is not None and bundle.in_channel:
                points[gap].add(rise)
            if rise is not None and not bundle.in_channel:
                for other in points:
                    points[other] = {port if place == rise else place for place in points[other]}
        for gap, places in points.items():
            if max(places) - min(places) > 1e-6:
                runs[gap].append((bundle, min(places), max(places), out[gap], into[gap]))
    counts = [0] * (n_lines + 1)
    for gap, members in runs.items():
        counts[gap] = _stack(gap, members)
    return tuple(counts)


def _stack(gap: int, members: Sequence[tuple[Bundle, float, float, set[float], set[float]]]) -> int:
    """Fill levels from the bottom up; runs that leave a column lie below those that enter it, or they look joined."""
    waiting = sorted(members, key=lambda run: (run[2] - run[1], run[1]))
    placed: list[tuple[int, float, float]] = []
    while waiting:
        ready = [
            run for run in waiting if not any(other is not run and run[4] & other[3] for other in waiting)
        ] or waiting[:1]
        for run in ready:
            bundle, low, high, _, entered = run
            below = [other.levels[gap] for other, _, _, left, _ in members if gap in other.levels and entered & left]
            level = max(below, default=-1) + 1
            while any(level == taken and not (high < a or low > b) for taken, a, b in placed):
                level += 1
            placed.append((level, low, high))
            bundle.levels[gap] = level
            waiting.remove(run)
    return 1 + max(level for level, _, _ in placed)
