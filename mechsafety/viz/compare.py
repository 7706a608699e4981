"""Two circuits: side by side at the same places, or one picture of what differs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.viz.layout import in_grey, layout_circuits
from mechsafety.viz.legend import keys
from mechsafety.viz.marks import (
    INK,
    MUTED,
    PAPER,
    EdgeMark,
    Label,
    Layout,
    NodeMark,
    Shape,
    blend,
    magnitude,
    readable_on,
)
from mechsafety.viz.style import Style
from mechsafety.viz.words import number, plain

FIRST, SECOND, BOTH = "#D55E00", "#0072B2", "#8A919C"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Layouts of two circuits and of their difference; what they share stands in the same place in all three."""

    names: tuple[str, str]
    first: Layout
    second: Layout
    difference: Layout


def compare_layouts(
    first: RefusalCircuit, second: RefusalCircuit, names: tuple[str, str], style: Style | None = None
) -> Comparison:
    """Lay out two circuits and their difference.

    In the difference a node's fill is the change of its effect: blue where it is larger in the second circuit, orange
    where smaller. A name with ``+`` is in the second circuit only, one with a minus sign in the first only.

    Raises:
        MechsafetyError: As `layout_circuit`.
    """
    style = style or Style()
    # greys come last, so that the difference is drawn from the colours
    a, b = layout_circuits((first, second), replace(style, grayscale=False))
    names = (plain(names[0], 40), plain(names[1], 40))
    difference = _difference(a, b, names, style)
    done = [in_grey(layout) if style.grayscale else layout for layout in (a, b, difference)]
    return Comparison(names, done[0], done[1], done[2])


def _difference(a: Layout, b: Layout, names: tuple[str, str], style: Style) -> Layout:
    in_a, in_b = ({mark.key: mark for mark in layout.nodes} for layout in (a, b))
    order = [*in_a, *(key for key in in_b if key not in in_a)]
    changes = {key: _effect(in_b, key) - _effect(in_a, key) for key in order}
    largest = max(map(magnitude, changes.values()), default=0.0) or 1.0
    nodes = [_node(key, in_a.get(key), in_b.get(key), changes[key] / largest, names) for key in order]
    edges_a, edges_b = ({(e.sender, e.receiver, e.slot): e for e in layout.edges} for layout in (a, b))
    edges = [_edge(edges_a.get(key), edges_b.get(key), names) for key in {**edges_a, **edges_b}]
    only_a = sum(key not in in_b for key in order)
    only_b = sum(key not in in_a for key in order)
    shared = len(order) - only_a - only_b - sum(mark.member is None for mark in b.nodes)
    title = f"{names[0]} against {names[1]}"
    sentence = (
        f"{title}: {shared} nodes in both, {only_a} only in {names[0]} (orange, \u2212), {only_b} only in {names[1]} "
        "(blue, +)."
    )
    items = [
        (blend(SECOND, 0.75), f"+ only in {names[1]}, or larger there"),
        (blend(FIRST, 0.75), f"\u2212 only in {names[0]}, or larger there"),
        (blend(BOTH, 0.3), "the same in both"),
    ]
    swatches, texts, height = keys(style, items, (sentence,), b.width, b.map_height)
    backdrop = tuple(shape for shape in b.backdrop if _top(shape) < b.map_height)
    labels = tuple(label for label in b.labels if label.y < b.map_height)
    return replace(
        b,
        height=height,
        nodes=tuple(nodes),
        edges=tuple(sorted(edges, key=lambda mark: magnitude(mark.effect))),
        n_edges=len(edges),
        backdrop=backdrop + swatches,
        labels=labels + texts,
        title=title,
        description=sentence,
        folded=(),
    )


def _effect(marks: Mapping[str, NodeMark], key: str) -> float:
    mark = marks.get(key)
    effect = mark.member.effect if mark and mark.member else None
    return effect if magnitude(effect) and effect is not None else 0.0


def _node(key: str, a: NodeMark | None, b: NodeMark | None, change: float, names: tuple[str, str]) -> NodeMark:
    mark = b or a
    assert mark is not None
    if mark.member is None:
        return mark
    base = mark.shapes[0]
    if a is None or b is None:
        fill = blend(SECOND if a is None else FIRST, 0.2 + 0.8 * magnitude(change))
    else:
        fill = blend(SECOND if change > 0 else FIRST, 0.75 * magnitude(change), blend(BOTH, 0.3))
    shape = Shape(base.commands, fill, INK if a and b else (SECOND if b else FIRST), 1.3, () if b else (4.0, 2.4))
    sign = "" if a and b else ("+" if b else "\u2212")
    label = mark.labels[0]
    size = label.size * (len(label.text) / len(sign + label.text) if sign else 1.0) ** 0.8
    text = Label(label.x, label.y, sign + label.text, size, label.anchor, readable_on(fill), bold=True)
    values = [number(part.member.effect) if part and part.member else "not in it" for part in (a, b)]
    title = f"{key}: effect {values[0]} in {names[0]}, {values[1]} in {names[1]}"
    return replace(mark, shapes=(shape,), labels=(text,), title=title, group="")


def _edge(a: EdgeMark | None, b: EdgeMark | None, names: tuple[str, str]) -> EdgeMark:
    mark = b or a
    assert mark is not None
    colour = MUTED if a and b else (SECOND if b else FIRST)
    shapes = tuple(
        replace(
            shape,
            stroke=colour if shape.stroke else None,
            fill=shape.fill and (PAPER if shape.fill == PAPER else colour),
        )
        for shape in mark.shapes
    )
    values = [number(part.effect) if part else "not in it" for part in (a, b)]
    title = f"{mark.sender} → {mark.receiver}, slot {mark.slot}: {values[0]} in {names[0]}, {values[1]} in {names[1]}"
    return replace(mark, shapes=shapes, title=title)


def _top(shape: Shape) -> float:
    return min(values[1] for _, values in shape.commands if values)
