"""Two circuits: side by side at the same places, or one picture of what differs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.viz.layout import drawn_edges, fit, in_grey, layouts_of
from mechsafety.viz.legend import keys
from mechsafety.viz.marks import (
    INK,
    PAPER,
    ROLE_OUTLINES,
    EdgeMark,
    Label,
    Layout,
    NodeMark,
    Shape,
    blend,
    edge_shapes,
    label_room,
    magnitude,
    readable_on,
    text_width,
)
from mechsafety.viz.style import Style
from mechsafety.viz.words import number, plain

DASHED = (4.0, 2.4)
# brackets mark a node that one circuit lacks: a sign before a number would look like part of the number
ONLY_FIRST, ONLY_SECOND = "({})", "[{}]"
Names = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Tones:
    """The colours of a difference: of what the first or the second circuit has alone, and of what both have.

    Attributes:
        first, both, second: Fills of nodes.
        rims: Rims of nodes that the first, or the second, has alone.
        lines: Edges: first, both, second.
        words: What the first and the last tone are called.
    """

    first: str
    both: str
    second: str
    rims: tuple[str, str]
    lines: tuple[str, str, str]
    words: tuple[str, str]


COLOURS = Tones(
    "#D55E00",
    blend("#8A919C", 0.3),
    "#0072B2",
    ("#D55E00", "#0072B2"),
    ("#D55E00", "#8A919C", "#0072B2"),
    ("orange", "blue"),
)
# the two hues have one lightness: greys go from light over middle to dark instead
GREYS = Tones(PAPER, "#B0B0B0", "#2E2E2E", (INK, INK), ("#BDBDBD", "#858585", "#141414"), ("light", "dark"))


@dataclass(frozen=True, slots=True, repr=False)
class Comparison:
    """Layouts of two circuits and of their difference; shared parts stand in the same place in all three.

    Example:
        >>> comparison = ms.viz.compare_layouts(circuit, circuit.subset(["L0.H1", "L3.MLP"]), ("whole", "part"))
        >>> path = ms.viz.layout_pdf(comparison.difference, folder / "difference.pdf")
        >>> comparison.names
        ('whole', 'part')
    """

    names: Names
    first: Layout
    second: Layout
    difference: Layout

    def __repr__(self) -> str:
        return f"Comparison({self.difference.title}: .first, .second, .difference)"


def compare_layouts(
    first: RefusalCircuit, second: RefusalCircuit, names: Names, style: Style | None = None
) -> Comparison:
    """Lay out two circuits and their difference.

    In the difference, a node's fill shows the change of its effect. It is blue where the effect is larger in the second
    circuit, orange where it is smaller; in greys it is dark or light. A node with its name in square brackets is only
    in the second circuit, one with round brackets only in the first. The width of an edge shows the change of its
    effect. The ``effect`` of a mark is the change.

    Raises:
        MechsafetyError: As `layout_circuit`.

    Example:
        >>> found = ms.viz.compare_layouts(circuit, circuit.subset(["L0.H1", "L3.MLP"]), ("whole", "part"))
        >>> ms.viz.layout_svg(found.difference)
        '<svg ...'
    """
    style = style or Style()
    # colours become grey last, because the difference is drawn from the colours
    coloured = replace(style, grayscale=False)
    coloured, nodes, (a, b) = fit((first, second), coloured, every_edge=True)
    names = (plain(names[0], 40), plain(names[1], 40))
    # an edge that is too weak to be drawn in one circuit still counts as an edge of that circuit
    every_a, every_b = layouts_of((first, second), replace(coloured, max_edges=None), nodes, every_edge=True)
    difference = _difference(every_a, every_b, names, style)
    done = [in_grey(layout) if style.grayscale else layout for layout in (a, b, difference)]
    return Comparison(names, done[0], done[1], done[2])


def _difference(a: Layout, b: Layout, names: Names, style: Style) -> Layout:
    tones = GREYS if style.grayscale else COLOURS
    in_a, in_b = ({mark.key: mark for mark in layout.nodes} for layout in (a, b))
    order = [*in_a, *(key for key in in_b if key not in in_a)]
    changes = {key: _effect(in_b, key) - _effect(in_a, key) for key in order}
    largest = max(map(magnitude, changes.values()), default=0.0) or 1.0
    nodes = [_node(key, in_a.get(key), in_b.get(key), changes[key], largest, names, tones) for key in order]
    edges_a, edges_b = ({(e.sender, e.receiver, e.slot): e for e in layout.edges} for layout in (a, b))
    pairs = [(edges_a.get(key), edges_b.get(key)) for key in {**edges_a, **edges_b}]
    widest = max((magnitude((y.effect if y else 0.0) - (x.effect if x else 0.0)) for x, y in pairs), default=0.0)
    edges = [_edge(x, y, widest or 1.0, names, tones, style.font_px / 12) for x, y in pairs]
    edges.sort(key=lambda mark: (magnitude(mark.effect), mark.title))
    shown = drawn_edges(edges, style.max_edges)
    only_a = sum(key not in in_b for key in order)
    only_b = sum(key not in in_a for key in order)
    shared = len(order) - only_a - only_b - sum(mark.member is None for mark in b.nodes)
    title = f"{names[0]} against {names[1]}"
    sentence = (
        f"{title}: {shared} nodes in both, {only_a} only in {names[0]} ({tones.words[0]}, in round brackets), "
        f"{only_b} only in {names[1]} ({tones.words[1]}, in square brackets)."
    )
    items = [
        (tones.second, (), f"{ONLY_SECOND.format('4.3')} only in {names[1]}"),
        (tones.first, DASHED, f"{ONLY_FIRST.format('4.3')} only in {names[0]}"),
        (blend(tones.second, 0.75, tones.both), (), f"in both, larger effect in {names[1]}"),
        (blend(tones.first, 0.75, tones.both), (), f"in both, larger effect in {names[0]}"),
        (tones.both, (), "the same in both"),
    ]
    lines = [
        (tones.lines[2], f"edge only in {names[1]}, or stronger there"),
        (tones.lines[0], f"edge only in {names[0]}, or stronger there"),
        (blend(tones.lines[2], 0.25, tones.lines[1]), "in both, small change; width: |change|"),
    ]
    swatches, texts, height = keys(style, items, lines, (sentence,), b.width, b.map_height)
    bare = without_legend(b)
    return replace(
        bare,
        height=height,
        nodes=tuple(nodes),
        edges=tuple(shown),
        n_edges=len(edges),
        backdrop=bare.backdrop + swatches,
        labels=bare.labels + texts,
        title=title,
        description=sentence,
        folded=(),
        grid=None,
    )


def _effect(marks: Mapping[str, NodeMark], key: str) -> float:
    mark = marks.get(key)
    effect = mark.member.effect if mark and mark.member else None
    return effect if magnitude(effect) and effect is not None else 0.0


def _node(
    key: str, a: NodeMark | None, b: NodeMark | None, change: float, largest: float, names: Names, tones: Tones
) -> NodeMark:
    mark = b or a
    assert mark is not None
    if mark.member is None:
        return mark
    base, strength = mark.shapes[0], magnitude(change) / largest
    if a is None or b is None:
        fill = blend(tones.second if a is None else tones.first, 0.2 + 0.8 * strength)
    else:
        fill = blend(tones.second if change > 0 else tones.first, 0.75 * strength, tones.both)
    shape = Shape(base.commands, fill, INK if a and b else tones.rims[b is not None], 1.3, () if b else DASHED)
    label = mark.labels[0]
    words = label.text if a and b else (ONLY_SECOND if b else ONLY_FIRST).format(label.text)
    room = 0.96 * label_room(ROLE_OUTLINES[mark.member.role], mark.width, mark.height, label.size)
    size = label.size * min(1.0, room / text_width(words, label.size))
    text = replace(label, text=words, size=size, colour=readable_on(fill), bold=True)
    values = [number(part.member.effect) if part and part.member else "not in this circuit" for part in (a, b)]
    title = f"{key}: effect {values[0]} in {names[0]}, {values[1]} in {names[1]}"
    # the page filters by the change
    member = replace(mark.member, effect=change)
    return replace(mark, shapes=(shape,), labels=(text,), title=title, group="", member=member)


def _edge(a: EdgeMark | None, b: EdgeMark | None, largest: float, names: Names, tones: Tones, unit: float) -> EdgeMark:
    mark = b or a
    assert mark is not None
    change = (b.effect if b else 0.0) - (a.effect if a else 0.0)
    strength = magnitude(change) / largest
    if a and b:
        stronger = tones.lines[2 if magnitude(b.effect) >= magnitude(a.effect) else 0]
        colour = blend(stronger, 0.25 + 0.75 * strength, tones.lines[1])
    else:
        colour = tones.lines[2 if b else 0]
    # dashes and mark are those of the slot; the mark is filled if no circuit only estimates it; the width is the change
    guessed = any(part is not None and part.status == "estimated" for part in (a, b))
    drawn = edge_shapes(
        mark.effect, "estimated" if guessed else "measured", mark.slot, strength, mark.shapes[0].commands, unit
    )
    shapes = tuple(
        replace(one, stroke=colour if one.stroke else None, fill=one.fill and (PAPER if one.fill == PAPER else colour))
        for one in drawn
    )
    values = [number(part.effect) if part else "not in this circuit" for part in (a, b)]
    title = f"{mark.sender} → {mark.receiver}, slot {mark.slot}: {values[0]} in {names[0]}, {values[1]} in {names[1]}"
    return replace(mark, shapes=shapes, title=title, effect=change, member=None)


@dataclass(frozen=True, slots=True)
class Sides:
    """A sheet with pictures beside each other, each under its name.

    Attributes:
        width: Of the sheet.
        height: Of the sheet.
        names: The pictures' names.
        places: The index of each picture, and its left upper corner.
    """

    width: float
    height: float
    names: tuple[Label, ...]
    places: tuple[tuple[int, float, float], ...]


def side_by_side(panes: Sequence[tuple[str, Layout]], first: int = 0) -> Sides:
    """A sheet for named pictures, whose indices begin at ``first``."""
    gap, head = 20.0, 24.0
    x, places, names = 0.0, [], []
    for index, (name, layout) in enumerate(panes, first):
        places.append((index, round(x, 1), head))
        names.append(Label(x + 12, 16.0, name, 13.0, bold=True))
        x += layout.width + gap
    height = head + max(layout.height for _, layout in panes)
    return Sides(x - gap, height, tuple(names), tuple(places))


def without_legend(layout: Layout) -> Layout:
    """The map without its legend and caption."""
    return replace(
        layout,
        height=layout.map_height,
        backdrop=tuple(shape for shape in layout.backdrop if _top(shape) < layout.map_height),
        labels=tuple(label for label in layout.labels if label.y < layout.map_height),
    )


def _top(shape: Shape) -> float:
    return min(values[1] for _, values in shape.commands if values)
