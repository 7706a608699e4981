"""The circuit by roles, as papers draw circuits: one box per role, and arrows with slots and summed effects.

It follows figure 2 of Wang et al., Interpretability in the Wild (2023), and is made from the circuit's own roles and
edges.
"""

import itertools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mechsafety.circuits.circuit import ROLES, CircuitEdge, CircuitNode, RefusalCircuit
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Node
from mechsafety.viz.layout import in_grey
from mechsafety.viz.legend import edge_legend
from mechsafety.viz.marks import (
    BAR,
    MUTED,
    ROLE_COLOURS,
    ROLE_OUTLINES,
    EdgeMark,
    Label,
    Layout,
    NodeMark,
    Shape,
    blend,
    centred,
    edge_shapes,
    magnitude,
    outline,
    rounded,
    text_width,
)
from mechsafety.viz.style import Style
from mechsafety.viz.views import chosen_nodes, left_out, part_of
from mechsafety.viz.words import caption, number, plain, role_name

ORDER = ("embed", "none", "detection", "relay", "evaluation", "decision", "production", "logits")
NAMED = 6  # number of members named in a box
ARROWS = 18  # largest number of arrows; the strongest are drawn
TITLES = {"none": role_name("none"), "embed": "embed: the prompt's tokens", "logits": "logits: refuse or comply"}


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
    def effect(self) -> float:
        """Sum of the effects of its edges."""
        return sum(member.effect for member in self.members)

    @property
    def text(self) -> str:
        """Slot and sum, with the number of edges if there are several."""
        words = f"{self.slot} {number(self.effect, 2)}"
        return f"{words} ({len(self.members)})" if len(self.members) > 1 else words


def role_diagram(circuit: RefusalCircuit, style: Style | None = None) -> Layout:
    """One box per role that has members, one arrow per pair of roles and slot.

    Args:
        circuit: A circuit with roles and edges.
        style: Options of the picture. ``columns``, ``groups``, ``fold`` and ``max_edges`` do not apply. With
            ``width_mm`` alone, the whole diagram is scaled to the width. With ``width_mm`` and ``font_pt``, it is
            widened to the width at that font.

    Returns:
        A layout for `layout_svg`, `layout_pdf`, `layout_png` and `layout_tikz`. Arrows beyond the 18 strongest are left
        out; the caption counts them.

    Raises:
        MechsafetyError: The width is too small for the font.
    """
    style = style or Style()
    fixed = style.width is None or style.font_pt is not None
    font = style.font if fixed else 12.0
    whole, folded = circuit, circuit.by_mlp()
    circuit = part_of(folded, chosen_nodes((folded,), style))
    members: dict[str, list[CircuitNode]] = {role: sorted(circuit.by_role(role), key=_strength) for role in ROLES}
    levels = [name for name in ORDER if name in ("embed", "logits") or members[name]]
    role_of = {member.node: member.role for member in circuit.nodes}
    arrows, inside = _arrows(circuit, role_of)
    kept = arrows[:ARROWS]
    _choose_sides(kept, levels)
    layout = _draw(whole, left_out(whole, circuit), style, font, levels, members, kept, inside, len(arrows) - len(kept))
    if style.width is not None and not fixed:
        layout = scaled(layout, style.width / layout.width)
    elif style.width is not None and layout.width > style.width + 0.01:
        raise MechsafetyError(
            f"width_mm={style.width_mm:g} with {font * 0.75:g} pt text",
            expected=f"at least {layout.width * 25.4 / 96:.0f} mm for this diagram",
            hint="a smaller font_pt, or none, which scales the diagram to the width",
        )
    return in_grey(layout) if style.grayscale else layout


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


def _choose_sides(arrows: list[Arrow], levels: list[str]) -> None:
    """Join neighbours straight; put other arrows alternately on both sides, on tracks that do not overlap."""
    taken: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for arrow in sorted(arrows, key=lambda one: (abs(levels.index(one.receiver) - levels.index(one.sender)), one.text)):
        low, high = levels.index(arrow.sender), levels.index(arrow.receiver)
        if high - low == 1:
            continue
        run = (low + 0.2, high - 0.2) if high > low else (high - 0.8, low + 0.8)
        options = [(track, side) for track in range(ARROWS) for side in (1, -1)]
        arrow.track, arrow.side = next(
            (track, side) for track, side in options if all(run[1] < a or run[0] > b for a, b in taken[side, track])
        )
        taken[arrow.side, arrow.track].append(run)


def _draw(
    circuit: RefusalCircuit,
    hidden: tuple[str, ...],
    style: Style,
    font: float,
    levels: list[str],
    members: dict[str, list[CircuitNode]],
    arrows: list[Arrow],
    inside: dict[str, list[CircuitEdge]],
    unshown: int,
) -> Layout:
    unit, small = font / 12, 0.86 * font
    texts = max((text_width(arrow.text, small) for arrow in arrows), default=0.0)
    pitch = texts + 16 * unit
    tracks = {side: max((arrow.track + 1 for arrow in arrows if arrow.side == side), default=0) for side in (-1, 1)}
    straight = {name: [arrow for arrow in arrows if arrow.sender == name and not arrow.side] for name in levels}
    box = max(270 * unit, *(pitch * (len(some) + 1) for some in straight.values()))
    left = 14 * unit + pitch * tracks[-1] + (10 * unit if tracks[-1] else 0)
    width = max(left + box + pitch * tracks[1] + 24 * unit, 360 * unit)
    if style.width is not None and style.font_pt is not None and style.width > width:
        # spare width goes to both sides
        left, width = left + (style.width - width) / 2, style.width
    middle = left + box / 2
    # heights, from the top down
    marks: dict[str, NodeMark] = {}
    leaving = {name: [arrow for arrow in arrows if arrow.side and arrow.sender == name] for name in levels}
    entering = {name: [arrow for arrow in arrows if arrow.side and arrow.receiver == name] for name in levels}
    y = 12 * unit
    out_y: dict[tuple[str, str, str], float] = {}
    in_y: dict[tuple[str, str, str], float] = {}
    step = 5 * unit
    for name in reversed(levels):
        for place, arrow in enumerate(leaving[name]):
            out_y[arrow.sender, arrow.receiver, arrow.slot] = y - 7 * unit - step * place
        height = (26 if name in ("embed", "logits") else 58) * unit
        marks[name] = _box(name, members.get(name, []), inside.get(name, []), middle, y + height / 2, box, height, font)
        y += height
        below = levels[levels.index(name) - 1] if name != levels[0] else None
        for place, arrow in enumerate(entering[name]):
            in_y[arrow.sender, arrow.receiver, arrow.slot] = y + 15 * unit + step * place
        room = 20 * unit + step * len(entering[name]) + (7 * unit + step * len(leaving[below]) if below else 0)
        y += room + (small * 1.4 if below and straight[below] else 0.0)
    bottom = y
    largest = max((magnitude(arrow.effect) for arrow in arrows), default=0.0) or 1.0
    edges = [
        _arrow(arrow, marks, straight, leaving, entering, out_y, in_y, (middle, box, pitch, small, unit), largest)
        for arrow in reversed(arrows)
    ]
    edges = _spread_labels(edges)
    drawn = sum(len(arrow.members) for arrow in arrows) + sum(map(len, inside.values()))
    sentences = [*caption(circuit, drawn, "those of the strongest arrows", hidden)]
    sentences.append(
        "An arrow sums the effects of all edges from one role into one slot of another; the number of edges is in "
        "brackets. A filled head: at least half of the sum was measured."
        + (f" {unshown} weaker arrows are left out." if unshown else "")
    )
    swatches, labels, height = edge_legend(
        style, font, [member for one in arrows for member in one.members], sentences, width, bottom
    )
    return Layout(
        width,
        height,
        tuple(marks[name] for name in levels),
        tuple(edges),
        len(arrows) + unshown,
        swatches,
        labels,
        f"Roles in the refusal circuit of {plain(circuit.provenance.model)}",
        " ".join(sentences),
        map_height=bottom,
    )


def _box(
    name: str,
    members: list[CircuitNode],
    inside: list[CircuitEdge],
    x: float,
    y: float,
    width: float,
    height: float,
    font: float,
) -> NodeMark:
    title = TITLES.get(name, name)
    if name in ("embed", "logits"):
        shape = Shape(outline("rounded", x, y, width, height), BAR, MUTED, 0.8)
        return NodeMark(name, x, y, width, height, (shape,), (centred(x, y, title, 0.9 * font),), title, kind=name)
    form = "rounded" if ROLE_OUTLINES[name] == "ellipse" else ROLE_OUTLINES[name]
    shape = Shape(
        outline(form, x, y, width, height, 0.7 * font), blend(ROLE_COLOURS[name], 0.28), ROLE_COLOURS[name], 1.6
    )
    total = number(sum(member.effect for member in members), 2)
    count = f"{len(members)} nodes" if len(members) > 1 else "1 node"
    names = ", ".join(member.node.short for member in members[:NAMED]) + (" …" if len(members) > NAMED else "")
    lines = [f"{title}: {count}, {'effects sum to' if len(members) > 1 else 'effect'} {total}", names]
    if inside:
        lines.append(f"within: {_edges(inside)}, {number(sum(member.effect for member in inside), 2)}")
    lead = 1.3 * font
    top = y - lead * (len(lines) - 1) / 2
    labels = []
    for place, text in enumerate(lines):
        size = (font if place == 0 else 0.9 * font) * min(1.0, 0.88 * width / (text_width(text, font) or 1.0))
        labels.append(centred(x, top + lead * place, text, size, "#14181D", bold=place == 0))
    words = f"{title}: " + ", ".join(str(member.node) for member in members)
    return NodeMark(name, x, y, width, height, (shape,), tuple(labels), words, kind="role")


def _edges(members: list[CircuitEdge]) -> str:
    return f"{len(members)} edges" if len(members) > 1 else "1 edge"


def _arrow(
    arrow: Arrow,
    marks: dict[str, NodeMark],
    straight: dict[str, list[Arrow]],
    leaving: dict[str, list[Arrow]],
    entering: dict[str, list[Arrow]],
    out_y: dict[tuple[str, str, str], float],
    in_y: dict[tuple[str, str, str], float],
    sizes: tuple[float, float, float, float, float],
    largest: float,
) -> EdgeMark:
    middle, box, pitch, small, unit = sizes
    sender, receiver = marks[arrow.sender], marks[arrow.receiver]
    key = (arrow.sender, arrow.receiver, arrow.slot)
    end_y, start_y = receiver.y + receiver.height / 2, sender.y - sender.height / 2
    if not arrow.side:
        together = sorted(straight[arrow.sender], key=lambda one: ("q", "k", "v", "mlp", "resid").index(one.slot))
        x = middle - box / 2 + box * (together.index(arrow) + 1) / (len(together) + 1)
        points = [(x, end_y), (x, start_y)]
        # the label lies below the runs of side arrows that enter, and above the runs of those that leave
        label = Label(x + 6 * unit, start_y - 9 * unit - 5 * unit * len(leaving[arrow.sender]), arrow.text, small)
    else:
        rail = middle + arrow.side * (box / 2 + 12 * unit + pitch * arrow.track)
        port = [one for one in entering[arrow.receiver] if one.side == arrow.side].index(arrow)
        exit_ = [one for one in leaving[arrow.sender] if one.side == arrow.side].index(arrow)
        end_x = middle + arrow.side * (box / 2 - 12 * unit - 9 * unit * port)
        start_x = middle + arrow.side * (box / 2 - 16 * unit - 9 * unit * exit_)
        points = [
            (end_x, end_y),
            (end_x, in_y[key]),
            (rail, in_y[key]),
            (rail, out_y[key]),
            (start_x, out_y[key]),
            (start_x, start_y),
        ]
        label = Label(
            rail + arrow.side * 5 * unit,
            (in_y[key] + out_y[key]) / 2 + 0.35 * small,
            arrow.text,
            small,
            "start" if arrow.side > 0 else "end",
        )
    sizes_measured = sum(magnitude(member.effect) for member in arrow.members if member.status != "estimated")
    all_sizes = sum(magnitude(member.effect) for member in arrow.members)
    status = "measured" if 2 * sizes_measured >= all_sizes else "estimated"
    shapes = edge_shapes(
        arrow.effect, status, arrow.slot, magnitude(arrow.effect) / largest, rounded(points, 7 * unit), unit
    )
    words = (
        f"{arrow.sender} to {arrow.receiver}, slot {arrow.slot}: {_edges(arrow.members)}, sum {number(arrow.effect)}"
    )
    return EdgeMark(arrow.sender, arrow.receiver, arrow.slot, arrow.effect, status, shapes, words, (label,))


def _spread_labels(edges: list[EdgeMark]) -> list[EdgeMark]:
    """Move the labels beside rails up or down to where the fewest level runs and labels cross them."""
    levels: list[tuple[float, float, float]] = []
    for mark in edges:
        points = [values[-2:] for _, values in mark.shapes[0].commands]
        levels += [(min(a[0], b[0]), max(a[0], b[0]), a[1]) for a, b in itertools.pairwise(points) if a[1] == b[1]]
    boxes = [
        label.box
        for mark in edges
        for label in mark.labels
        if label.anchor == "start" and len(mark.shapes[0].commands) == 2
    ]
    placed = []
    for mark in edges:
        label, commands = mark.labels[0], mark.shapes[0].commands
        if len(commands) > 2:
            heights = [values[-1] for _, values in commands]
            low, high = min(heights) + 2 * label.size, max(heights) - 2 * label.size
            options = [
                replace(label, y=low + share * (high - low)) for share in (0.5, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8, 0.1, 0.9)
            ]
            label = min(options, key=lambda one: _covered(one.box, levels, boxes))
            boxes.append(label.box)
        placed.append(replace(mark, labels=(label,)))
    return placed


def _covered(
    box: tuple[float, float, float, float],
    levels: list[tuple[float, float, float]],
    boxes: list[tuple[float, float, float, float]],
) -> int:
    left, top, right, bottom = box
    lines = sum(a < right and b > left and top - 2 < y < bottom + 2 for a, b, y in levels)
    return lines + 3 * sum(a < right and c > left and b < bottom and d > top for a, b, c, d in boxes)


def scaled(layout: Layout, factor: float) -> Layout:
    """The whole picture, scaled by a factor."""

    def shapes(given: tuple[Shape, ...]) -> tuple[Shape, ...]:
        return tuple(
            replace(
                one,
                commands=tuple((letter, tuple(value * factor for value in values)) for letter, values in one.commands),
                width=one.width * factor,
                dashes=tuple(part * factor for part in one.dashes),
            )
            for one in given
        )

    def labels(given: tuple[Label, ...]) -> tuple[Label, ...]:
        return tuple(replace(one, x=one.x * factor, y=one.y * factor, size=one.size * factor) for one in given)

    return replace(
        layout,
        width=layout.width * factor,
        height=layout.height * factor,
        map_height=layout.map_height * factor,
        nodes=tuple(
            replace(
                one,
                x=one.x * factor,
                y=one.y * factor,
                width=one.width * factor,
                height=one.height * factor,
                shapes=shapes(one.shapes),
                labels=labels(one.labels),
            )
            for one in layout.nodes
        ),
        edges=tuple(replace(one, shapes=shapes(one.shapes), labels=labels(one.labels)) for one in layout.edges),
        backdrop=shapes(layout.backdrop),
        labels=labels(layout.labels),
    )
