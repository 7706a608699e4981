"""The circuit by roles, as papers draw circuits: one box per role, and arrows with slots and summed effects.

It follows figure 2 of Wang et al., Interpretability in the Wild (2023), and is made from the circuit's own roles and
edges. Boxes are stacked. An arrow between neighbours runs straight up where there is room for its label. Every other
arrow leaves its box at the side, runs along a rail, and enters its box at the side; its label lies on that last run.
"""

import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mechsafety.circuits.circuit import ROLES, CircuitEdge, CircuitNode, RefusalCircuit
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Node
from mechsafety.viz.layout import bar_label, in_font, in_grey
from mechsafety.viz.legend import edge_key, edge_legend
from mechsafety.viz.look import Look
from mechsafety.viz.marks import (
    BAR,
    MUTED,
    ROLE_OUTLINES,
    EdgeMark,
    Label,
    Layout,
    NodeMark,
    Shape,
    bar_text,
    blend,
    centred,
    edge_shapes,
    edge_width,
    magnitude,
    outline,
    outline_inset,
    rounded,
    small_text,
    text_width,
    turned,
)
from mechsafety.viz.style import PIXELS_PER_MM, Style
from mechsafety.viz.views import check_labels, chosen_nodes, left_out, part_of
from mechsafety.viz.words import caption, number, plain

ORDER = ("embed", "none", "detection", "relay", "evaluation", "decision", "production", "logits")
NAMED = 6  # number of members named in a box
ARROWS = 18  # largest number of arrows; the strongest are drawn
STRAIGHT = 4  # largest number of straight arrows between two boxes
BOX, NARROWEST_BOX = 270.0, 112.0  # width of a box where there is room, and the least, at the 12-pixel font
MARGIN, RAIL, RUN, TIP = 8.0, 6.0, 6.0, 13.0  # at the rim; between rails; between runs that leave; for an arrow's mark
WIDE = 0.66  # width of a bold letter, as a share of its size
SLOTS = ("q", "k", "v", "mlp", "resid")


@dataclass(slots=True)
class Arrow:
    """Edges from one role into one slot of another; ``side`` is -1, 0 (straight up) or 1, ``track`` counts outward."""

    sender: str
    receiver: str
    slot: str
    members: list[CircuitEdge] = field(default_factory=list)
    side: int = 0
    track: int = 0

    @property
    def key(self) -> tuple[str, str, str]:
        """Sender, receiver and slot."""
        return self.sender, self.receiver, self.slot

    @property
    def effect(self) -> float:
        """Sum of the effects of its edges."""
        return sum(member.effect for member in self.members)

    @property
    def text(self) -> str:
        """Slot and sum, with the number of edges if there are several."""
        words = f"{self.slot} {number(self.effect, 2)}"
        return f"{words} ({len(self.members)})" if len(self.members) > 1 else words


@dataclass(frozen=True, slots=True)
class Content:
    """What a diagram shows.

    Attributes:
        levels: Boxes from the bottom up, by role; ``embed`` first and ``logits`` last.
        members: Nodes of each role, the strongest first.
        arrows: All arrows, the strongest first.
        inside: Edges within each role.
    """

    levels: tuple[str, ...]
    members: Mapping[str, Sequence[CircuitNode]]
    arrows: tuple[Arrow, ...]
    inside: Mapping[str, Sequence[CircuitEdge]]


@dataclass(frozen=True, slots=True)
class Columns:
    """Where boxes, labels and rails stand, from left to right.

    Attributes:
        unit: Number of pixels of a length that is 1 at the 12-pixel font.
        font, small: Sizes of a box's title and of the other texts.
        width: Width of the picture.
        left, right: Sides of the boxes.
        runs: Room for labels between the boxes and the rails, left and right.
    """

    unit: float
    font: float
    small: float
    width: float
    left: float
    right: float
    runs: Mapping[int, float]

    @property
    def middle(self) -> float:
        """Centre of the boxes."""
        return (self.left + self.right) / 2

    @property
    def box(self) -> float:
        """Width of the boxes."""
        return self.right - self.left

    def rail(self, arrow: Arrow) -> float:
        """The place of an arrow's rail."""
        return self.middle + arrow.side * (self.box / 2 + self.runs[arrow.side] + RAIL * self.unit * arrow.track)


def role_diagram(circuit: RefusalCircuit, style: Style | None = None) -> Layout:
    """One box per role that has members, one arrow per pair of roles and slot.

    Args:
        circuit: A circuit with roles and edges.
        style: Options of the picture. ``columns``, ``groups``, ``fold`` and ``max_edges`` do not apply. With a width,
            the titles of boxes have ``font_pt`` (7 points by default), and no other text is smaller than 6 points.

    Returns:
        A layout for `layout_svg`, `layout_pdf`, `layout_png` and `layout_tikz`. At most the 18 strongest arrows are
        drawn, and with a width as many as fit it; the caption counts the others.

    Raises:
        MechsafetyError: The width is too small for the font, or the style chooses no node of the circuit.

    Example:
        >>> layout = ms.viz.role_diagram(circuit)
        >>> path = ms.viz.layout_png(layout, folder / "roles.png")
    """
    style = style or Style()
    check_labels((circuit,), style)
    folded = circuit.by_mlp()
    part = part_of(folded, chosen_nodes((folded,), style))
    content = role_content(part)
    hidden = left_out(circuit, part, style.look)
    for count in range(min(ARROWS, len(content.arrows)), -1, -1):
        arrows = content.arrows[:count]
        columns = _columns(style, content, arrows)
        if columns is None:
            continue
        layout = _draw(circuit, hidden, style, content, arrows, columns)
        if style.height is None or layout.height <= style.height + 0.01:
            layout = in_font(layout)
            return in_grey(layout) if style.grayscale else layout
    assert style.width is not None and style.height is not None
    least = (NARROWEST_BOX + 2 * MARGIN) * style.font_px / 12 / PIXELS_PER_MM
    raise MechsafetyError(
        f"a role diagram of {style.width_mm:g} x {style.height / PIXELS_PER_MM:g} mm with "
        f"{style.font_px * 0.75:g} pt text",
        expected=f"at least {least:.0f} mm of width, and a height for {len(content.levels)} boxes",
        hint="a smaller font_pt, legend=False or caption=False",
    )


def role_content(circuit: RefusalCircuit) -> Content:
    """The roles of a circuit with their nodes, and the sums of the edges between them."""
    members: dict[str, Sequence[CircuitNode]] = {role: sorted(circuit.by_role(role), key=_strength) for role in ROLES}
    role_of = {member.node: member.role for member in circuit.nodes}
    arrows, inside = _arrows(circuit, role_of)
    levels = tuple(name for name in ORDER if name in ("embed", "logits") or members[name])
    return Content(levels, members, tuple(arrows), inside)


def _strength(member: CircuitNode) -> tuple[float, str]:
    return -magnitude(member.effect), str(member.node)


def _arrows(circuit: RefusalCircuit, role_of: Mapping[Node, str]) -> tuple[list[Arrow], dict[str, list[CircuitEdge]]]:
    found: dict[tuple[str, str, str], Arrow] = {}
    inside: dict[str, list[CircuitEdge]] = defaultdict(list)
    for member in circuit.edges:
        ends = [role_of.get(node, node.kind) for node in (member.edge.sender, member.edge.receiver)]
        if any(end not in ORDER for end in ends):
            continue
        if ends[0] == ends[1]:
            inside[ends[0]].append(member)
            continue
        key = (ends[0], ends[1], member.edge.slot)
        found.setdefault(key, Arrow(*key)).members.append(member)
    return sorted(
        found.values(), key=lambda arrow: (-magnitude(arrow.effect), arrow.sender, arrow.receiver, arrow.slot)
    ), inside


def _columns(style: Style, content: Content, arrows: Sequence[Arrow]) -> Columns | None:
    """Columns for these arrows, each of which gets its side; None where the width has no room for them."""
    font = style.font_px
    unit, small = font / 12, small_text(font)
    pitch = max((text_width(arrow.text, small) for arrow in arrows), default=0.0) + 16 * unit
    for straight in range(STRAIGHT, 0, -1):
        _choose_sides(arrows, content.levels, straight)
        runs, taken = {}, {}
        for side in (-1, 1):
            beside = [arrow for arrow in arrows if arrow.side == side]
            texts = max((text_width(arrow.text, small) for arrow in beside), default=0.0)
            tracks = max((arrow.track + 1 for arrow in beside), default=0)
            runs[side] = texts + (TIP + 6) * unit if beside else 0.0
            taken[side] = runs[side] + RAIL * unit * tracks + MARGIN * unit
        least = max(NARROWEST_BOX * unit, pitch * _most_straight(arrows))
        room = style.width or max(360 * unit, taken[-1] + taken[1] + max(BOX * unit, least))
        box = room - taken[-1] - taken[1]
        if box >= least:
            spare = max(0.0, box - max(1.5 * BOX * unit, least)) / 2
            return Columns(unit, font, small, room, taken[-1] + spare, room - taken[1] - spare, runs)
    return None


def _most_straight(arrows: Sequence[Arrow]) -> int:
    together: dict[str, int] = defaultdict(int)
    for arrow in arrows:
        together[arrow.sender] += not arrow.side
    return max(together.values(), default=0)


def _choose_sides(arrows: Sequence[Arrow], levels: Sequence[str], straight: int) -> None:
    """Join neighbours by this many straight arrows; put the others on both sides, on rails that do not overlap."""
    taken: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    joined: dict[str, int] = defaultdict(int)
    place = {name: k for k, name in enumerate(levels)}
    # of arrows of one length, the strongest comes first
    for arrow in sorted(arrows, key=lambda one: abs(place[one.receiver] - place[one.sender])):
        low, high = place[arrow.sender], place[arrow.receiver]
        arrow.side = arrow.track = 0
        if high - low == 1 and joined[arrow.sender] < straight:
            joined[arrow.sender] += 1
            continue
        # a box is left at its upper half and entered at its lower half
        start, stop = sorted((low + 0.2, high - 0.2))
        options = [(track, side) for track in range(ARROWS) for side in (1, -1)]
        arrow.track, arrow.side = next(
            (track, side) for track, side in options if all(stop < a or start > b for a, b in taken[side, track])
        )
        taken[arrow.side, arrow.track].append((start, stop))


def _draw(
    circuit: RefusalCircuit,
    hidden: tuple[str, ...],
    style: Style,
    content: Content,
    arrows: Sequence[Arrow],
    columns: Columns,
) -> Layout:
    unit, unshown = columns.unit, len(content.arrows) - len(arrows)
    marks: dict[str, NodeMark] = {}
    levels: dict[tuple[str, str, str, bool], float] = {}  # the height of each run, by arrow and whether it leaves
    lines = _box_texts(content, columns, style.look)
    y = 8 * unit
    for name in reversed(content.levels):
        top = y
        texts = lines[name]
        sides = [_runs(name, side, arrows, columns, top) for side in (-1, 1)]
        for found, _ in sides:
            levels |= found
        inner = (1.3 * columns.small * len(texts) + 8 * unit) if texts else 1.9 * columns.font
        height = max(inner, *(end - top for _, end in sides))
        marks[name] = _box(name, content, texts, columns, top + height / 2, height, style.look)
        y += height
        if name != content.levels[0]:
            below = content.levels[content.levels.index(name) - 1]
            straight = any(not arrow.side and arrow.sender == below for arrow in arrows)
            y += 1.5 * columns.small + 14 * unit if straight else 12 * unit
    bottom = y + 8 * unit
    largest = max((magnitude(arrow.effect) for arrow in arrows), default=0.0) or 1.0
    edges = [_arrow(arrow, arrows, marks, levels, columns, largest, style.look) for arrow in reversed(arrows)]
    drawn = sum(len(arrow.members) for arrow in arrows) + sum(map(len, content.inside.values()))
    sentences = [*caption(circuit, drawn, "those of the strongest arrows", hidden, style.look, upward=False)]
    sentences.append(
        "An arrow sums the effects of all edges from one role into one slot of another; the number of edges is in "
        "brackets. A filled head: at least half of the sum was measured."
        + (f" {unshown} weaker arrows are left out." if unshown > 1 else "")
        + (" 1 weaker arrow is left out." if unshown == 1 else "")
    )
    drawn_marks = [edge_key(member) for arrow in arrows for member in arrow.members]
    swatches, labels, height = edge_legend(style, columns.font, drawn_marks, sentences, columns.width, bottom)
    return Layout(
        columns.width,
        height,
        tuple(marks[name] for name in content.levels),
        tuple(edges),
        len(content.arrows),
        swatches,
        labels,
        f"Roles in the refusal circuit of {plain(circuit.provenance.model)}",
        " ".join(sentences),
        map_height=bottom,
        look=style.look,
    )


def _runs(
    name: str, side: int, arrows: Sequence[Arrow], columns: Columns, top: float
) -> tuple[dict[tuple[str, str, str, bool], float], float]:
    """The heights of the runs at one side of a box, and where they end. In this order, few runs cross a rail."""
    leaving = sorted((a for a in arrows if a.side == side and a.sender == name), key=lambda one: one.track)
    entering = sorted((a for a in arrows if a.side == side and a.receiver == name), key=lambda one: -one.track)
    found: dict[tuple[str, str, str, bool], float] = {}
    y = top + 2 * columns.unit
    for arrow in leaving:
        y += RUN * columns.unit
        found[*arrow.key, True] = y
    for arrow in entering:
        y += 1.2 * columns.small + 4 * columns.unit
        found[*arrow.key, False] = y
    return found, (y + 7 * columns.unit if found else top)


def _box_texts(content: Content, columns: Columns, look: Look) -> dict[str, list[str]]:
    """The lines of each role's box, its title first; none for the bars of ``embed`` and ``logits``."""
    room = 0.88 * columns.box
    heads: dict[str, tuple[str, str]] = {}
    for name in content.levels[1:-1]:
        members = content.members[name]
        total = number(sum(member.effect or 0.0 for member in members), 2)
        heads[name] = (
            f"{len(members)} nodes, effects sum to {total}" if len(members) > 1 else f"1 node, effect {total}",
            f"{len(members)} nodes, sum {total}" if len(members) > 1 else f"1 node, effect {total}",
        )
    # all boxes begin with one line, or all with two
    one_line = all(len(f"{look.role(name)}: {long}") * WIDE * columns.font <= room for name, (long, _) in heads.items())
    found: dict[str, list[str]] = {name: [] for name in content.levels}
    for name, (long, short) in heads.items():
        members, inside = content.members[name], content.inside.get(name, ())
        title = look.role(name)
        lines = [f"{title}: {long}"] if one_line else [title, *_wrapped(short, columns, room)]
        names = ", ".join(look.short(member.node) for member in members[:NAMED])
        lines += _wrapped(names + (" …" if len(members) > NAMED else ""), columns, room)
        if inside:
            effect = number(sum(member.effect for member in inside), 2)
            both = _wrapped(f"within: {_edges(inside)}, {effect}", columns, room)
            lines += both if len(both) == 1 else _wrapped(f"within: {effect}", columns, room)
        found[name] = lines
    return found


def _wrapped(text: str, columns: Columns, room: float) -> list[str]:
    return textwrap.wrap(text, max(8, int(room / (0.6 * columns.small))), break_on_hyphens=False)


def _box(
    name: str, content: Content, lines: Sequence[str], columns: Columns, y: float, height: float, look: Look
) -> NodeMark:
    x, width = columns.middle, columns.box
    if name in ("embed", "logits"):
        shape = Shape(outline("rounded", x, y, width, height), BAR, MUTED, 0.8)
        label = bar_label(look, name, x, y, bar_text(columns.font), 0.94 * width)
        return NodeMark(name, x, y, width, height, (shape,), (label,), label.text, kind=name)
    colour = look.colour(name)
    shape = Shape(outline(_form(name), x, y, width, height, _cut(columns)), blend(colour, 0.28), colour, 1.6)
    lead = 1.3 * columns.small
    top = y - lead * (len(lines) - 1) / 2
    title = min(columns.font, 0.9 * width / (WIDE * len(lines[0])))
    labels = [centred(x, top, lines[0], title, "#14181D", bold=True)]
    labels += [centred(x, top + lead * k, text, columns.small, "#14181D") for k, text in enumerate(lines[1:], 1)]
    words = f"{look.role(name)}: " + ", ".join(look.full(member.node) for member in content.members[name])
    return NodeMark(name, x, y, width, height, (shape,), tuple(labels), words, kind="role")


def _form(role: str) -> str:
    """A box's outline; an ellipse would have no room for text."""
    return "rounded" if ROLE_OUTLINES.get(role, "ellipse") == "ellipse" else ROLE_OUTLINES[role]


def _cut(columns: Columns) -> float:
    return 0.7 * columns.font


def _edges(members: Sequence[CircuitEdge]) -> str:
    return f"{len(members)} edges" if len(members) > 1 else "1 edge"


def _arrow(
    arrow: Arrow,
    arrows: Sequence[Arrow],
    marks: Mapping[str, NodeMark],
    levels: Mapping[tuple[str, str, str, bool], float],
    columns: Columns,
    largest: float,
    look: Look,
) -> EdgeMark:
    measured = sum(magnitude(member.effect) for member in arrow.members if member.status != "estimated")
    every = sum(magnitude(member.effect) for member in arrow.members)
    status = "measured" if 2 * measured >= every else "estimated"
    strength = magnitude(arrow.effect) / largest
    sender, receiver = marks[arrow.sender], marks[arrow.receiver]
    if arrow.side:
        half = edge_width(status, strength, columns.unit) / 2
        points, label = _side_way(arrow, sender, receiver, levels, columns, half)
        end = points[0]
        # drawn upward, then turned towards the box
        upward = [(arrow.side * (end[1] - y), arrow.side * (x - end[0])) for x, y in points]
        path = rounded(upward, 5 * columns.unit)
        shapes = tuple(
            turned(shape, *end, -arrow.side)
            for shape in edge_shapes(arrow.effect, status, arrow.slot, strength, path, columns.unit)
        )
    else:
        points, label = _straight_way(arrow, arrows, sender, receiver, columns)
        shapes = edge_shapes(arrow.effect, status, arrow.slot, strength, rounded(points, 1.0), columns.unit)
    ends = [look.role(name) if name in ROLES else name for name in (arrow.sender, arrow.receiver)]
    words = f"{ends[0]} to {ends[1]}, slot {arrow.slot}: {_edges(arrow.members)}, sum {number(arrow.effect)}"
    return EdgeMark(arrow.sender, arrow.receiver, arrow.slot, arrow.effect, status, shapes, words, (label,))


def _straight_way(
    arrow: Arrow, arrows: Sequence[Arrow], sender: NodeMark, receiver: NodeMark, columns: Columns
) -> tuple[list[tuple[float, float]], Label]:
    together = [one for one in arrows if not one.side and one.sender == arrow.sender]
    together.sort(key=lambda one: SLOTS.index(one.slot))
    # each arrow has an equal part of the box; several stand left in theirs, so that the label has its room
    taken = text_width(arrow.text, columns.small) + 7 * columns.unit
    x = columns.left + columns.box * (together.index(arrow) + 0.5) / len(together) - taken / 2 * (len(together) > 1)
    x = min(x, columns.right + columns.runs[1] - taken)
    end, start = receiver.y + receiver.height / 2, sender.y - sender.height / 2
    label = Label(x + 7 * columns.unit, (end + start) / 2 + 0.35 * columns.small, arrow.text, columns.small)
    return [(x, end), (x, start)], label


def _side_way(
    arrow: Arrow,
    sender: NodeMark,
    receiver: NodeMark,
    levels: Mapping[tuple[str, str, str, bool], float],
    columns: Columns,
    half: float,
) -> tuple[list[tuple[float, float]], Label]:
    """The way from the receiver back to the sender, and the label over the receiver's run, half as thick as this."""
    low, high = levels[*arrow.key, True], levels[*arrow.key, False]
    rail = columns.rail(arrow)
    start, end = (_rim(mark, y, arrow.side, columns) for mark, y in ((sender, low), (receiver, high)))
    x = columns.middle + arrow.side * (columns.box / 2 + TIP * columns.unit)
    anchor = "start" if arrow.side > 0 else "end"
    label = Label(x, high - half - 2 * columns.unit, arrow.text, columns.small, anchor)
    return [(end, high), (rail, high), (rail, low), (start, low)], label


def _rim(mark: NodeMark, y: float, side: int, columns: Columns) -> float:
    """Where a box's outline stands at a height."""
    inset = outline_inset(_form(mark.key), mark.width, mark.height, y - mark.y, side, _cut(columns))
    return mark.x + side * (mark.width / 2 - inset)
