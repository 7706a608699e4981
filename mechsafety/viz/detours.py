"""Paths of the summed edges of folded groups. They run in the channels between rows and columns of nodes."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mechsafety.viz.marks import PORTS, Command, EdgeMark, Grid, NodeMark, rounded

# sender, receiver, slot
Ends = tuple[str, str, str]
# supernodes, and whether each must be folded (True) or open (False)
Fold = frozenset[tuple[str, bool]]


@dataclass(frozen=True, slots=True)
class _Way:
    """The channels that a sum of edges takes, and its ends.

    Attributes:
        into: Receiver, slot and rail. Sums for which these are the same share a track in each channel.
        above: The level channel above the sender; None if the sender is the embedding's bar.
        below: The level channel below the receiver; None if the receiver is the logits' bar.
        rail: The upright channel from one level channel to the other; None if both are the same channel.
        start, stop: Where the sum leaves its sender and enters its receiver.
    """

    into: str
    above: int | None
    below: int | None
    rail: int | None
    start: tuple[float, float]
    stop: tuple[float, float]


@dataclass(slots=True)
class _Run:
    """The part of a channel that a way takes: from where to where, and which foldings show it."""

    low: float = math.inf
    high: float = -math.inf
    folds: set[Fold] = field(default_factory=set)

    def meets(self, other: "_Run", apart: float) -> bool:
        """Whether some folding shows both, and they overlap or come nearer to each other than ``apart``."""
        near = self.low < other.high + apart and other.low < self.high + apart
        return near and any(_together(one, two) for one in self.folds for two in other.folds)


def detours(
    edges: Iterable[EdgeMark], nodes: Sequence[NodeMark], supers: Sequence[NodeMark], grid: Grid
) -> dict[Ends, tuple[Command, ...]]:
    """The path of every sum of edges that can appear when groups are folded. No path runs under a node.

    1. A path leaves its sender upward and runs level above it.
    2. It rises (or falls) in the channel beside its receiver.
    3. It runs level below its receiver and enters it from below.

    Sums into one slot share their way. Ways that would meet in a channel are spread over it.

    A sum's path does not depend on what else is folded. A page can therefore hold the paths of all sums.

    Args:
        edges: All edges between nodes.
        nodes: Marks of all nodes, including those that are folded.
        supers: Marks of all supernodes.
        grid: The channels.
    """
    folds = _possible_sums(edges, {mark.key: f"group:{mark.group}" for mark in nodes if mark.group})
    return paths(folds, [*nodes, *supers], grid)


def paths(folds: Mapping[Ends, Fold], marks: Sequence[NodeMark], grid: Grid) -> dict[Ends, tuple[Command, ...]]:
    """The paths of these sums, with what must be folded for each (`detours`)."""
    places = {mark.key: mark for mark in marks}
    ways = {ends: _way(ends, places, grid) for ends in sorted(folds)}
    # on its rail, a way runs from the row of its one level channel to the row of its other
    top = len(grid.gaps)
    rails = _spread(
        (
            (way.rail, way.into, folds[ends], way.above or 0, top if way.below is None else way.below)
            for ends, way in ways.items()
        ),
        apart=0.5,
    )
    rise = {ends: _rise(way, rails, grid) for ends, way in ways.items()}
    runs = (
        (gap, way.into, folds[ends], rise[ends], x)
        for ends, way in ways.items()
        for gap, x in ((way.above, way.start[0]), (way.below, way.stop[0]))
    )
    levels = _spread(runs, apart=12 * grid.unit)
    return {ends: rounded(_corners(way, rise[ends], levels, grid), 5 * grid.unit) for ends, way in ways.items()}


def _possible_sums(edges: Iterable[EdgeMark], group_of: Mapping[str, str]) -> dict[Ends, Fold]:
    """Every sum of edges that some folding shows, and what must be folded (or open) for it."""
    sums: dict[Ends, Fold] = {}
    for mark in edges:
        for sender, one in _drawn_as(mark.sender, group_of):
            for receiver, other in _drawn_as(mark.receiver, group_of):
                if sender != receiver and (sender, receiver) != (mark.sender, mark.receiver) and _together(one, other):
                    sums[sender, receiver, mark.slot] = one | other
    return sums


def _drawn_as(key: str, group_of: Mapping[str, str]) -> tuple[tuple[str, Fold], ...]:
    """What a node can be drawn as: itself or its supernode, each with what must be open or folded for it."""
    group = group_of.get(key)
    return ((key, Fold()),) if group is None else ((key, Fold({(group, False)})), (group, Fold({(group, True)})))


def _together(one: Fold, other: Fold) -> bool:
    """Whether one folding can meet both conditions."""
    return not any((group, not folded) in other for group, folded in one)


def _way(ends: Ends, places: Mapping[str, NodeMark], grid: Grid) -> _Way:
    sender, receiver = (grid.cells.get(key) for key in ends[:2])
    above = None if sender is None else sender[0] + 1
    below = None if receiver is None else receiver[0]
    if above is not None and above == below:
        rail = None
    elif receiver is None:
        # the bar of the logits is as wide as the picture, so the way rises beside the sender
        rail = 0 if sender is None else sender[1] + 1
    else:
        rail = receiver[1] if sender is not None and sender[1] < receiver[1] else receiver[1] + 1
    start, stop = places[ends[0]], places[ends[1]]
    return _Way(
        f"{ends[1]} {ends[2]} {rail}",
        above,
        below,
        rail,
        # corners are rounded to tenths of a pixel: then most turns are the same text, which a page stores once
        (round(start.x, 1), start.y - start.height / 2),
        (round(stop.x + PORTS[ends[2]] * stop.width, 1), stop.y + stop.height / 2),
    )


def _rise(way: _Way, rails: Mapping[tuple[int, str], float], grid: Grid) -> float:
    if way.rail is None:
        return way.stop[0]
    left, width = grid.channels[way.rail]
    return round(left + width * rails[way.rail, way.into], 1)


def _corners(way: _Way, rise: float, levels: Mapping[tuple[int, str], float], grid: Grid) -> list[tuple[float, float]]:
    """The corners of a way, from its receiver to its sender."""

    def level(gap: int) -> float:
        low, height = grid.gaps[gap]
        return round(low - height * (0.25 + 0.7 * levels[gap, way.into]), 1)

    if way.below is None:
        points = [(rise, way.stop[1])]
    else:
        points = [way.stop, (way.stop[0], level(way.below)), (rise, level(way.below))]
    if way.above is None:
        return [*points, (rise, way.start[1])]
    return [*points, (rise, level(way.above)), (way.start[0], level(way.above)), way.start]


def _spread(runs: Iterable[tuple[int | None, str, Fold, float, float]], apart: float) -> dict[tuple[int, str], float]:
    """Where each way lies across its channel, from 0 to 1. Ways that never meet may lie in the same place.

    Args:
        runs: Channel (None for no channel), way, the folding that shows it, and its two ends along the channel.
        apart: The least distance between the ends of two ways in one place.
    """
    channels: dict[int, dict[str, _Run]] = defaultdict(lambda: defaultdict(_Run))
    for channel, into, fold, *ends in runs:
        if channel is not None:
            run = channels[channel][into]
            run.low, run.high = min(run.low, *ends), max(run.high, *ends)
            run.folds.add(fold)
    shares: dict[tuple[int, str], float] = {}
    for channel, members in channels.items():
        tracks: list[list[_Run]] = []
        place = {}
        for into, run in members.items():
            free = (k for k, taken in enumerate(tracks) if not any(run.meets(other, apart) for other in taken))
            place[into] = next(free, len(tracks))
            if place[into] == len(tracks):
                tracks.append([])
            tracks[place[into]].append(run)
        shares |= {(channel, into): (track + 1) / (len(tracks) + 1) for into, track in place.items()}
    return shares
