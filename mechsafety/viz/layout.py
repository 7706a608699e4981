"""Where everything in a circuit's picture stands: layers go upward, and one layout serves every medium."""

import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from mechsafety.circuits.circuit import CircuitEdge, CircuitNode, RefusalCircuit
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Edge, Node
from mechsafety.viz.detours import Fold, detours, paths
from mechsafety.viz.fitting import fitted_sizes
from mechsafety.viz.fonts import SANS
from mechsafety.viz.groups import folded_edges, supernodes, weak_marks
from mechsafety.viz.legend import edge_key, legend_and_caption
from mechsafety.viz.look import Look
from mechsafety.viz.marks import (
    BAR,
    FAINT,
    INK,
    MUTED,
    PORTS,
    ROLE_OUTLINES,
    EdgeMark,
    Grid,
    Label,
    Layout,
    NodeMark,
    Shape,
    band,
    bar_text,
    centred,
    edge_shapes,
    grey,
    label_room,
    line,
    magnitude,
    node_shape,
    node_strength,
    opposing_line,
    outline,
    readable_on,
    rounded,
    small_text,
    text_width,
)
from mechsafety.viz.placement import Placement, place
from mechsafety.viz.routing import Bundle, Routes, route
from mechsafety.viz.style import PAPER_PT, PIXELS_PER_MM, SMALLEST_PT, Style, group_title, groups, lane_of, lane_order
from mechsafety.viz.views import check_labels, chosen_nodes, left_out, part_of, strongest_edges
from mechsafety.viz.words import caption, edge_title, node_title, plain

WIDEST, NARROWEST, PER_ROOT_NODE = 1080.0, 560.0, 76.0
TRACK, LEVEL, CHANNEL = 4.6, 4.4, 44.0  # distances of tracks and levels, and the most room for all
SMALLEST_NODE, NODE_HEIGHT = 0.86, 1.6  # width of the weakest node, of the strongest's; height, of the font
WEAK_SUMS = 12  # number of sums of folded nodes' edges that are drawn
BARS = {"embed": "embed: the prompt's tokens", "logits": "logits: refuse or comply"}


@dataclass(frozen=True, slots=True)
class Frame:
    """Coordinates of the cells and of the channels between them.

    Attributes:
        unit: Number of pixels of a length that is 1 at the 12-pixel font.
        columns: Centre of each column.
        lines: Height of each line's centre, from the bottom up.
        channels: For the channel left of each column: where it begins, its width, and the distance of its tracks.
        gaps: For the channel below each line: its lower rim, its height, and the distance of its tracks.
        logits, embed: Heights of the bars' centres.
        left, right: Where the lanes begin and end.
        top, bottom: Where the map begins and ends.
        cell: Width and height of the largest node.
        bar: Height of a bar.
    """

    unit: float
    columns: tuple[float, ...]
    lines: tuple[float, ...]
    channels: tuple[tuple[float, float, float], ...]
    gaps: tuple[tuple[float, float, float], ...]
    logits: float
    embed: float
    left: float
    right: float
    top: float
    bottom: float
    cell: tuple[float, float]
    bar: float


def layout_circuit(circuit: RefusalCircuit, style: Style | None = None) -> Layout:
    """Place a circuit's nodes and edges: layers upward, lanes side by side, edges in the channels between.

    Layers without a node are left out. With a width, the nodes of the smallest effects for which the figure has no room
    are folded into one counted mark per lane. They are left out where not even the lanes have room.

    Args:
        circuit: The circuit to draw.
        style: Options of the picture.

    Returns:
        The layout. The same circuit and style always give the same layout. Without a width, a style that differs only
        in ``max_edges`` or ``fold`` leaves every node where it is.

    Raises:
        MechsafetyError: A node is listed twice, the style chooses no node of the circuit, or not even the node of the
            largest effect fits the width at that font.

    Example:
        >>> layout = ms.viz.layout_circuit(circuit)
        >>> len(layout.nodes), len(layout.edges)
        (7, 7)
    """
    return layout_circuits((circuit,), style)[0]


def layout_circuits(circuits: Sequence[RefusalCircuit], style: Style | None = None) -> tuple[Layout, ...]:
    """Lay out several circuits together: shared parts stand in the same place in each picture.

    Where a node's roles differ, its role in the last circuit decides the lane.

    Raises:
        MechsafetyError: As `layout_circuit`.
    """
    return fit(circuits, style or Style())[2]


def fit(
    circuits: Sequence[RefusalCircuit], style: Style, *, every_edge: bool = False
) -> tuple[Style, list[Node], tuple[Layout, ...]]:
    """The style with its font, the nodes that are drawn, and the layouts with them.

    They are all nodes that the style chooses, or as many of the largest effects as fit its width. In the picture of one
    circuit the others are folded by lane. They are left out of pictures of several circuits, which share their nodes,
    and where the width has no room for every lane.

    Args:
        circuits: The circuits.
        style: Options of the picture.
        every_edge: Whether room is needed for all edges, and not only for those that are drawn.

    Raises:
        MechsafetyError: As `layout_circuit`.
    """
    for circuit in circuits:
        listed = [member.node for member in circuit.nodes]
        twice = next((node for k, node in enumerate(listed) if node in listed[:k]), None)
        if twice is not None:
            raise MechsafetyError(f"the circuit lists {twice} twice", expected="each node once")
    check_labels(circuits, style)
    nodes = chosen_nodes([circuit.by_mlp() for circuit in circuits], style)
    limit = style.height
    if limit is None:
        return style, nodes, layouts_of(circuits, style, nodes)
    sizes = (style.font_pt,) if style.font_pt else (PAPER_PT, SMALLEST_PT)
    styles = [replace(style, font_pt=size) for size in sizes]

    def tried(chosen: Style, count: int, fold: bool) -> tuple[Layout, ...] | None:
        """The layouts with the first nodes, and the others folded, if they fit."""
        try:
            folded = nodes[count:] if fold else ()
            drawn = layouts_of(circuits, chosen, nodes[:count], every_edge=every_edge, folded=folded)
        except MechsafetyError:
            return None
        return drawn if max(layout.height for layout in drawn) <= limit + 0.01 else None

    for chosen in styles:
        whole = tried(chosen, len(nodes), fold=False)
        if whole is not None:
            return chosen, nodes, whole
    for fold in (True, False) if len(circuits) == 1 else (False,):
        low, high, best = 0, len(nodes), tuple[Layout, ...]()
        while high - low > 1:
            middle = (low + high) // 2
            drawn = tried(styles[-1], middle, fold)
            low, high, best = (low, middle, best) if drawn is None else (middle, high, drawn)
        if low:
            return styles[-1], nodes[:low], best
    layouts_of(circuits, styles[-1], nodes[:1], every_edge=every_edge)  # says what is too narrow
    raise MechsafetyError(
        f"height_mm={limit / PIXELS_PER_MM:g} with {styles[-1].font_px * 0.75:g} pt labels",
        expected="a greater height",
        hint="legend=False or caption=False",
    )


def layouts_of(
    circuits: Sequence[RefusalCircuit],
    style: Style,
    nodes: Collection[Node],
    *,
    every_edge: bool = False,
    folded: Sequence[Node] = (),
) -> tuple[Layout, ...]:
    """Layouts of the circuits with these nodes, whatever height they take.

    Args:
        circuits: The circuits.
        style: Options of the picture.
        nodes: Nodes that are drawn one by one.
        every_edge: Whether room is needed for all edges, and not only for those that are drawn.
        folded: Nodes that are drawn as one counted mark per lane.

    Raises:
        MechsafetyError: They do not fit the style's width.
    """
    drawn = [part_of(circuit.by_mlp(), [*nodes, *folded]) for circuit in circuits]
    members = {member.node: member for circuit in drawn for member in circuit.nodes}
    weak = _weak(style, [members[node] for node in folded])
    places = set(weak.values())
    edges = _ranked(
        {
            member.edge: member
            for circuit in drawn
            for member in circuit.edges
            if member.edge.sender not in weak and member.edge.receiver not in weak
        }.values()
    )
    members = {node: member for node, member in members.items() if node not in weak or node in places}
    if style.width is not None and not every_edge:
        # on paper, edges that are not drawn take no room
        edges = strongest_edges(edges, style.max_edges, lambda member: (member.edge.sender, member.edge.receiver))
    placement, routes, frame = _fit(members, edges, style)
    return tuple(
        _finish(whole, part, style, placement, routes, frame, weak) for whole, part in zip(circuits, drawn, strict=True)
    )


def _weak(style: Style, members: Sequence[CircuitNode]) -> dict[Node, Node]:
    """For each folded node, the node of its lane at whose place they are drawn: the one nearest to their weighted mean.

    A node that is alone in its lane is not folded, since its mark would be as large.
    """
    lanes: dict[str, list[CircuitNode]] = defaultdict(list)
    for member in members:
        lanes[lane_of(style, member)].append(member)
    found: dict[Node, Node] = {}
    for some in lanes.values():
        if len(some) > 1:
            sizes = [magnitude(member.effect) + 1e-9 for member in some]
            layers = [member.node.layer or 0 for member in some]
            mean = sum(size * layer for size, layer in zip(sizes, layers, strict=True)) / sum(sizes)
            place = min((m.node for m in some), key=lambda node: (abs((node.layer or 0) - mean), node.order))
            found |= {member.node: place for member in some}
    return found


def _ranked(edges: Iterable[CircuitEdge]) -> list[CircuitEdge]:
    return sorted(edges, key=lambda member: (-magnitude(member.effect), str(member.edge)))


def _finish(
    whole: RefusalCircuit,
    drawn: RefusalCircuit,
    style: Style,
    placement: Placement,
    routes: Routes,
    frame: Frame,
    weak: Mapping[Node, Node],
) -> Layout:
    layout = in_font(_draw(whole, drawn, style, placement, routes, frame, weak))
    return in_grey(layout) if style.grayscale else layout


def _fit(
    members: Mapping[Node, CircuitNode], edges: list[CircuitEdge], style: Style
) -> tuple[Placement, Routes, Frame]:
    """Placement, routes and frame, with as many columns as fit the width."""
    unit = style.font_px / 12
    inner = {node: member for node, member in members.items() if node.layer is not None}
    lanes = {node: lane_of(style, member) for node, member in inner.items()}
    cell = _cell(style, [member for node, member in inner.items() if node not in style.look.labels])
    room = style.width or max(WIDEST, PER_ROOT_NODE * math.sqrt(len(inner))) * unit
    limit = max(1, int((room - 70 * unit) // (cell + 8 * unit)))
    used = len(set(lanes.values()))
    while True:
        placement = place(lanes, lane_order(style), edges, limit)
        routes = route(placement.cell, edges, len(placement.layers), placement.n_columns)
        frame = _frame(placement, routes, style, unit, _widths(placement, inner, style, cell))
        if frame.right + 14 * unit <= room + 0.01 or (style.width is None and limit <= used):
            return placement, routes, frame
        if placement.n_columns <= used:
            raise MechsafetyError(
                f"width_mm={style.width_mm:g} with {style.font_px * 0.75:g} pt labels",
                expected=f"at least {(frame.right + 14 * unit) * 25.4 / 96:.0f} mm for this circuit",
                hint="a smaller font_pt, or columns='part'",
            )
        over = (frame.right + 14 * unit - room) / (cell + 8 * unit)
        limit = max(used, placement.n_columns - max(1, int(0.6 * over)))


def _cell(style: Style, members: Collection[CircuitNode]) -> float:
    """The width of the largest node. With a width, no name is drawn smaller than the font."""
    unit = style.font_px / 12
    texts = max((text_width(style.look.mark(member.node), style.font_px) for member in members), default=0.0)
    cell = max(30 * unit, texts / SMALLEST_NODE + 8 * unit)
    if style.width is not None:
        height = SMALLEST_NODE * NODE_HEIGHT * style.font_px
        forms = {ROLE_OUTLINES[member.role] for member in members}
        while any(_name_room(style, form, SMALLEST_NODE * cell, height) < texts for form in forms):
            cell += unit
    return cell


def _name_room(style: Style, form: str, width: float, height: float) -> float:
    """The room for a name in an outline."""
    return min(0.84 * width, 0.96 * label_room(form, width, height, style.font_px))


def _own_width(style: Style, member: CircuitNode, cell: float) -> float:
    """The width of a node; a label of the user's own may be wider than all names."""
    return max(cell, _cell(style, [member])) if member.node in style.look.labels else cell


def _widths(
    placement: Placement, members: Mapping[Node, CircuitNode], style: Style, cell: float
) -> tuple[float, list[float]]:
    """The width of a node and of each column: a wide label widens its own column."""
    widths = [cell] * placement.n_columns
    for node, (_, column) in placement.cell.items():
        widths[column] = max(widths[column], _own_width(style, members[node], cell))
    return cell, widths


def _frame(
    placement: Placement, routes: Routes, style: Style, unit: float, widths: tuple[float, Sequence[float]]
) -> Frame:
    cell, wide = widths
    title_size = small_text(style.font_px)
    firsts = {lane.first: lane for lane in placement.lanes}
    # a crowded channel packs its tracks closer
    steps = [min(TRACK * unit, CHANNEL * unit / max(tracks, 1)) for tracks in routes.tracks]
    before = [
        (8 if column in firsts or column == placement.n_columns else 5) * unit + steps[column] * tracks
        for column, tracks in enumerate(routes.tracks)
    ]
    after = [0.0] * (placement.n_columns + 1)  # room between a lane's last column and the lane's end
    for lane in placement.lanes:
        last = lane.first + lane.width
        have = sum(before[lane.first : last]) + sum(wide[lane.first : last])
        lack = max(0.0, text_width(lane.title, title_size) + 8 * unit - have) / 2
        before[lane.first] += lack
        after[last] += lack
    left = 38 * unit
    taken = left + sum(before) + sum(after) + sum(wide)
    spare = max(0.0, (style.width or NARROWEST * unit) - 14 * unit - taken)
    half = spare / (2 * max(1, placement.n_columns))
    for column in range(placement.n_columns):
        before[column] += half
        # within a lane, the room right of a column belongs to the next column
        (after if column + 1 in firsts or column + 1 == placement.n_columns else before)[column + 1] += half
    x = left
    columns: list[float] = []
    channels: list[tuple[float, float, float]] = []
    for column in range(placement.n_columns + 1):
        x += after[column]
        channels.append((x, before[column], steps[column]))
        x += before[column]
        if column < placement.n_columns:
            columns.append(x + wide[column] / 2)
            x += wide[column]
    right = x if placement.n_columns else NARROWEST * unit - 14 * unit
    top = 10 * unit
    height, bar = NODE_HEIGHT * style.font_px, 1.9 * style.font_px
    logits = top + 1.7 * title_size + bar / 2
    y = logits + bar / 2
    lines = [0.0] * len(placement.layers)
    gaps = [(0.0, 0.0, 0.0)] * (len(lines) + 1)
    for gap in range(len(lines), -1, -1):
        levels = routes.levels[gap]
        step = min(LEVEL * unit, 1.2 * CHANNEL * unit / max(levels, 1))
        room = (11 if levels else 8) * unit + step * max(0, levels - 1)
        above, below = gap < len(lines), gap > 0
        if above and below and placement.layers[gap] == placement.layers[gap - 1]:
            room -= 2 * unit
        if above and below and placement.layers[gap] - placement.layers[gap - 1] > 1:
            room += 6 * unit
        if not above or not below:
            room += 5 * unit
        y += room
        gaps[gap] = (y, room, step)
        if below:
            lines[gap - 1] = y + height / 2
            y += height
    return Frame(
        unit=unit,
        columns=tuple(columns),
        lines=tuple(lines),
        channels=tuple(channels),
        gaps=tuple(gaps),
        logits=logits,
        embed=y + bar / 2,
        left=left,
        right=right,
        top=top,
        bottom=y + bar + 4 * unit,
        cell=(cell, height),
        bar=bar,
    )


def _draw(
    whole: RefusalCircuit,
    circuit: RefusalCircuit,
    style: Style,
    placement: Placement,
    routes: Routes,
    frame: Frame,
    weak: Mapping[Node, Node],
) -> Layout:
    members = {member.node: member for member in circuit.nodes}
    edges = _ranked(circuit.edges)
    named = groups(circuit, style)
    group_of = {node: name for name, nodes in named.items() for node in nodes}
    nodes = [
        replace(_node(frame, style, placement, member, members), group=group_of.get(member.node, ""))
        for member in sorted(members.values(), key=lambda member: member.node.order)
        if member.node in placement.cell and member.node not in weak
    ]
    weak_nodes, stands = _weak_marks(frame, style, placement, members, weak)
    titles = {name: group_title(style, name) for name in named}
    supers = supernodes(nodes, titles, frame.cell[0], style.look)
    cells = {str(node): cell for node, cell in placement.cell.items()}
    cells |= {mark.key: cells[anchor] for mark, anchor in supers}
    cells |= {stands[str(node)]: placement.cell[place] for node, place in weak.items()}
    channels, gaps = (tuple((a, b) for a, b, _ in rows) for rows in (frame.channels, frame.gaps))
    grid = Grid(frame.unit, channels, gaps, cells)
    bars = [_bar(frame, style, kind, members.get(Node(kind))) for kind in ("embed", "logits")]
    places = {mark.key: mark for mark in [*bars, *nodes]}
    nodes += weak_nodes
    # an edge of one circuit may end at a node that only another circuit has
    known = [m for m in edges if str(m.edge.sender) in places and str(m.edge.receiver) in places]
    drawn = [member for member in known if member.edge in routes.bundle]
    largest = max((magnitude(member.effect) for member in edges), default=0.0) or 1.0
    linked = circuit.linked
    # weakest first; edges of folded groups are summed before weak edges are left out
    curves = [
        _edge(frame, places, member, routes.bundle[member.edge], largest, placement, member.edge in linked)
        for member in reversed(drawn)
    ]
    curves = _with_weak(
        curves, [m for m in edges if m.edge not in routes.bundle], [*bars, *nodes], stands, linked, grid
    )
    if style.fold:
        shown = [mark for mark, _ in supers if mark.group in style.fold]
        ways = detours(curves, [*bars, *nodes], [mark for mark, _ in supers], grid)
        stands_for = {mark.key: f"group:{mark.group}" for mark in nodes if mark.group in style.fold}
        nodes = [*(mark for mark in nodes if mark.key not in stands_for), *shown]
        curves = folded_edges(curves, stands_for, ways, grid.unit)
    curves = drawn_edges(curves, style.max_edges)
    backdrop, labels = _decoration(frame, style, placement)
    width = style.width or max(frame.right + 14 * frame.unit, NARROWEST * frame.unit)
    sentences = caption(
        whole,
        sum(mark.n_edges for mark in curves),
        left_out=left_out(whole, circuit, style.look, weak),
        look=style.look,
        upward=not weak,
    )
    swatches, texts, height = legend_and_caption(style, sentences, members.values(), curves, width, frame.bottom)
    return Layout(
        width,
        height,
        (bars[0], *nodes, bars[1]),
        tuple(curves),
        len(whole.edges),
        backdrop + swatches,
        labels + texts,
        f"Refusal circuit of {plain(circuit.provenance.model)}",
        " ".join(sentences),
        folded=tuple(mark for mark, _ in supers if mark.group not in style.fold),
        map_height=frame.bottom,
        grid=grid,
        look=style.look,
    )


def _weak_marks(
    frame: Frame,
    style: Style,
    placement: Placement,
    members: Mapping[Node, CircuitNode],
    weak: Mapping[Node, Node],
) -> tuple[list[NodeMark], dict[str, str]]:
    """The marks of folded nodes, and the key of the mark that stands for each."""
    lanes = {key: plain(title) for key, title in lane_order(style)}
    at = {place: _node(frame, style, placement, members[place], members) for place in weak.values()}
    nodes = [
        replace(at[place], key=str(node), member=members[node], group=lane_of(style, members[node]))
        for node, place in weak.items()
    ]
    return weak_marks(nodes, lanes, frame.cell[0], style.look)


def _with_weak(
    curves: list[EdgeMark],
    edges: Collection[CircuitEdge],
    nodes: Sequence[NodeMark],
    stands: Mapping[str, str],
    linked: Collection[Edge],
    grid: Grid,
) -> list[EdgeMark]:
    """The edges with those of folded nodes, summed by ends and slot."""
    known = {mark.key for mark in nodes} | set(stands)
    hidden = [
        edge_key(member, linked)
        for member in edges
        for ends in [(str(member.edge.sender), str(member.edge.receiver))]
        if known.issuperset(ends) and not stands.keys().isdisjoint(ends)
    ]
    if not hidden:
        return curves
    sums = {
        (stands.get(mark.sender, mark.sender), stands.get(mark.receiver, mark.receiver), mark.slot) for mark in hidden
    }
    ways = paths({ends: Fold() for ends in sorted(sums) if ends[0] != ends[1]}, nodes, grid)
    summed = folded_edges([*curves, *hidden], stands, ways, grid.unit)
    # only the strongest sums, and those without which a node would have no edge: they would cover the other edges
    joined = {key for mark in curves for key in (mark.sender, mark.receiver)}
    kept, left = [], WEAK_SUMS
    for mark in reversed(summed):
        if mark.member is None:
            if left <= 0 and joined.issuperset((mark.sender, mark.receiver)):
                continue
            left -= 1
        kept.append(mark)
        joined |= {mark.sender, mark.receiver}
    return kept[::-1]


def drawn_edges(curves: Sequence[EdgeMark], count: int | None) -> list[EdgeMark]:
    """Marks of the edges that are drawn (`strongest_edges`), the weakest first, so that strong ones lie on top."""
    return strongest_edges(curves[::-1], count, lambda mark: (mark.sender, mark.receiver))[::-1]


def _node(
    frame: Frame, style: Style, placement: Placement, member: CircuitNode, members: Mapping[Node, CircuitNode]
) -> NodeMark:
    up, column = placement.cell[member.node]
    x, y = frame.columns[column], frame.lines[up]
    largest = max((magnitude(other.effect) for other in members.values()), default=0.0) or 1.0
    strength = node_strength(member.effect, largest)
    scale = SMALLEST_NODE + (1 - SMALLEST_NODE) * strength
    width, height = _own_width(style, member, frame.cell[0]) * scale, frame.cell[1] * scale
    colour = style.look.colour(member.role)
    shape = node_shape(member.role, colour, member.status, strength, x, y, width, height)
    colour = {"rejected": MUTED, "estimated": INK}.get(member.status) or readable_on(shape.fill or BAR)
    text = style.look.mark(member.node)
    room = _name_room(style, ROLE_OUTLINES[member.role], width, height)
    size = style.font_px * min(1.0, room / text_width(text, style.font_px))
    label = centred(x, y, text, size, colour, bold=True)
    shapes = (shape, opposing_line(x, y, width, height, colour)) if member.opposes else (shape,)
    return NodeMark(
        str(member.node),
        x,
        y,
        width,
        height,
        shapes,
        (label,),
        node_title(member, style.look),
        member,
        "",
        member.node.kind,
    )


def _bar(frame: Frame, style: Style, kind: str, member: CircuitNode | None) -> NodeMark:
    x, width = (frame.left + frame.right) / 2, frame.right - frame.left
    y = frame.embed if kind == "embed" else frame.logits
    rim = (INK, 1.2) if member else (MUTED, 0.8)
    shape = Shape(outline("rounded", x, y, width, frame.bar), BAR, *rim)
    title = node_title(member, style.look) if member else f"{kind}: drawn for orientation, not a node of the circuit"
    label = bar_label(style.look, kind, x, y, bar_text(style.font_px), width - 8)
    return NodeMark(kind, x, y, width, frame.bar, (shape,), (label,), title, member, "", kind)


def bar_label(look: Look, kind: str, x: float, y: float, size: float, room: float) -> Label:
    """The text of the bar of ``embed`` or ``logits``: a user's own, its words, or its name where a bar is narrow."""
    words = look.labels.get(Node(kind), BARS[kind])
    if Node(kind) not in look.labels and text_width(words, size) >= room:
        words = kind
    return centred(x, y, words, size * min(1.0, room / text_width(words, size)), INK)


def _edge(
    frame: Frame,
    places: Mapping[str, NodeMark],
    member: CircuitEdge,
    bundle: Bundle,
    largest: float,
    placement: Placement,
    linking: bool,
) -> EdgeMark:
    edge = member.edge
    sender, receiver = places[str(edge.sender)], places[str(edge.receiver)]
    rise = None
    if bundle.trunk is not None and bundle.in_channel:
        start, width, step = frame.channels[bundle.trunk]
        rise = start + min(width / 2, 5 * frame.unit) + step * bundle.track
    elif bundle.trunk is not None:
        rise = frame.columns[bundle.trunk]
    lines = len(frame.lines)
    if bundle.receiver is None:
        end, gap = (rise or 0.0, receiver.y + receiver.height / 2), lines
    else:
        end = (receiver.x + PORTS[edge.slot] * receiver.width, receiver.y + receiver.height / 2)
        gap = bundle.receiver[0]
        if not bundle.in_channel and rise is not None:
            rise = end[0]
    if rise is None:
        rise = end[0]

    def level(which: int) -> float:
        low, height, step = frame.gaps[which]
        return low - min(4 * frame.unit, 0.4 * height) - step * bundle.levels.get(which, 0)

    points = [end]
    if end[0] != rise:
        points += [(end[0], level(gap)), (rise, level(gap))]
    if edge.sender.kind == "embed":
        points.append((rise, sender.y - sender.height / 2))
    else:
        out = placement.cell[edge.sender][0] + 1
        if out == gap and end[0] != rise:
            points = points[:2]  # no trunk is needed to the row just above
            rise = end[0]
        points += [(rise, level(out)), (sender.x, level(out)), (sender.x, sender.y - sender.height / 2)]
    points = [point for k, point in enumerate(points) if k == 0 or point != points[k - 1]]
    commands = rounded(_straight(points), 5 * frame.unit)
    strength = magnitude(member.effect) / largest
    shapes = edge_shapes(member.effect, member.status, edge.slot, strength, commands, frame.unit, linking=linking)
    return EdgeMark(
        sender.key,
        receiver.key,
        edge.slot,
        member.effect,
        member.status,
        shapes,
        edge_title(member, linking),
        (),
        member,
        linking=linking,
    )


def _straight(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points without those in the middle of straight runs."""
    kept = points[:1]
    for before, point, after in zip(points, points[1:], points[2:], strict=False):
        if not (before[0] == point[0] == after[0] or before[1] == point[1] == after[1]):
            kept.append(point)
    return [*kept, points[-1]]


def _decoration(frame: Frame, style: Style, placement: Placement) -> tuple[tuple[Shape, ...], tuple[Label, ...]]:
    shapes, labels = [], []
    size = small_text(style.font_px)
    top, bottom = frame.top - 2 * frame.unit, frame.embed - frame.bar / 2
    for lane in placement.lanes:
        start = frame.channels[lane.first][0]
        end = frame.channels[lane.first + lane.width][0]
        if lane is placement.lanes[-1]:
            end = frame.right
        rectangle = outline(
            "rectangle", (start + end) / 2, (top + bottom) / 2, end - start - 2 * frame.unit, bottom - top
        )
        shapes.append(Shape(rectangle, band(style.look.colour(lane.key if style.columns == "role" else "none"))))
        title = plain(lane.title)
        while text_width(title, size) > end - start - 4 * frame.unit and len(title) > 2:
            title = title[:-2] + "…"
        labels.append(centred((start + end) / 2, top + 0.85 * size, title, size, MUTED, bold=True))
    for layer, group in itertools.groupby(range(len(placement.layers)), key=lambda up: placement.layers[up]):
        ups = list(group)
        y = (frame.lines[ups[0]] + frame.lines[ups[-1]]) / 2
        labels.append(Label(frame.left - 6 * frame.unit, y + 0.35 * size, f"L{layer}", size, "end", MUTED))
        shapes += [
            Shape(line((frame.left, frame.lines[up]), (frame.right, frame.lines[up])), None, FAINT, 0.6) for up in ups
        ]
        before = placement.layers[ups[0] - 1] if ups[0] else -1
        if layer - before > 1:
            middle, room = frame.gaps[ups[0]][0] - frame.gaps[ups[0]][1] / 2, 3.2 * frame.unit
            x = frame.left - 12 * frame.unit
            shapes += [Shape(outline("ellipse", x, middle + k * room, 1.6, 1.6), MUTED) for k in (-1, 0, 1)]
    return tuple(shapes), tuple(labels)


def in_font(layout: Layout) -> Layout:
    """The layout with texts that fit their rooms in its font. The layout was made for a sans-serif one."""
    if layout.look.font == SANS:
        return layout
    sizes = fitted_sizes(layout)

    def labels(given: tuple[Label, ...]) -> tuple[Label, ...]:
        return tuple(replace(one, size=sizes[one]) for one in given)

    return replace(
        layout,
        nodes=tuple(replace(mark, labels=labels(mark.labels)) for mark in layout.nodes),
        folded=tuple(replace(mark, labels=labels(mark.labels)) for mark in layout.folded),
        edges=tuple(replace(mark, labels=labels(mark.labels)) for mark in layout.edges),
        labels=labels(layout.labels),
    )


def in_grey(layout: Layout) -> Layout:
    """The layout in greys of the same luminance."""

    def shapes(given: tuple[Shape, ...]) -> tuple[Shape, ...]:
        return tuple(
            replace(one, fill=grey(one.fill) if one.fill else None, stroke=grey(one.stroke) if one.stroke else None)
            for one in given
        )

    def labels(given: tuple[Label, ...]) -> tuple[Label, ...]:
        return tuple(replace(one, colour=grey(one.colour)) for one in given)

    def marks(given: tuple[NodeMark, ...]) -> tuple[NodeMark, ...]:
        return tuple(replace(one, shapes=shapes(one.shapes), labels=labels(one.labels)) for one in given)

    return replace(
        layout,
        nodes=marks(layout.nodes),
        folded=marks(layout.folded),
        edges=tuple(replace(one, shapes=shapes(one.shapes), labels=labels(one.labels)) for one in layout.edges),
        backdrop=shapes(layout.backdrop),
        labels=labels(layout.labels),
    )
