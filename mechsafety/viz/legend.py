"""The legend and the caption under a circuit's picture."""

import math
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import replace

from mechsafety.circuits.circuit import NODE_STATUS, ROLES, CircuitEdge, CircuitNode, RefusalCircuit
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Edge
from mechsafety.viz.fonts import family
from mechsafety.viz.look import ROLE_COLOURS, Look
from mechsafety.viz.marks import (
    BAR,
    FAINT,
    INK,
    MUTED,
    PAPER,
    TIP_RIM,
    EdgeMark,
    Label,
    Layout,
    Shape,
    edge_colour,
    edge_shapes,
    edge_tip,
    edge_width,
    line,
    node_shape,
    opposing_line,
    outline,
    readable_on,
    small_text,
    text_width,
    turned,
)
from mechsafety.viz.style import PIXELS_PER_MM, Style

# a title, and (kind of swatch, its key, text) per item
Row = tuple[str, list[tuple[str, str, str]]]
STATUSES = ("verified", "measured", "estimated", "rejected")
SLOT_TITLES = (("q", "query"), ("k", "key"), ("v", "value"), ("mlp", "MLP input, logits"))


def legend_and_caption(
    style: Style,
    sentences: Sequence[str],
    nodes: Collection[CircuitNode],
    edges: Collection[EdgeMark],
    width: float,
    top: float,
) -> tuple[tuple[Shape, ...], tuple[Label, ...], float]:
    """Shapes, texts and the picture's full height; the legend names only what the picture has."""
    rows = [*node_rows(nodes, style.look), *edge_rows(edges)] if nodes else []
    return _under(style, style.font_px, rows, sentences, width, top)


def legend_alone(style: Style, circuits: Sequence[RefusalCircuit], width: float) -> Layout:
    """The legend of several circuits as a picture of its own."""
    nodes = [member for circuit in circuits for member in circuit.by_mlp().nodes]
    edges = [edge_key(member, circuit.linked) for circuit in circuits for member in circuit.edges]
    shown = replace(style, legend=True, caption=False)
    shapes, labels, height = legend_and_caption(shown, (), nodes, edges, width, 0.0)
    return Layout(
        width, height, (), (), 0, shapes, labels, "Legend", "What shapes, colours and lines mean.", look=style.look
    )


def edge_legend(
    style: Style,
    font: float,
    edges: Collection[EdgeMark],
    sentences: Sequence[str],
    width: float,
    top: float,
) -> tuple[tuple[Shape, ...], tuple[Label, ...], float]:
    """The same without the legend of nodes, for a picture whose nodes explain themselves."""
    return _under(style, font, edge_rows(edges), sentences, width, top)


def _under(
    style: Style, font: float, rows: Sequence[Row], sentences: Sequence[str], width: float, top: float
) -> tuple[tuple[Shape, ...], tuple[Label, ...], float]:
    unit, size = font / 12, small_text(font)
    margin, lead = 12 * unit, 1.75 * size
    shapes: list[Shape] = []
    labels: list[Label] = []
    y = top + 6 * unit
    if style.legend and rows:
        shapes.append(Shape(line((margin, y), (width - margin, y)), None, FAINT, 0.8))
        y += lead
        start = margin + text_width("status", size) + 10 * unit
        entries = (
            (30 * unit if kind else 0.0) + text_width(text, size) for _, items in rows for kind, _, text in items
        )
        _check_width(style, start + max(entries, default=0.0) + margin)
        for title, items in rows:
            labels.append(Label(margin, y + 0.35 * size, title, size, "start", MUTED))
            x = start
            for kind, key, text in items:
                glyph = 30 * unit if kind else 0.0
                room = glyph + text_width(text, size) + 14 * unit
                if x + room > width - margin and x > start:
                    x, y = start, y + lead
                shapes += swatch(kind, key, x + 12 * unit, y, unit, style.look)
                labels.append(Label(x + glyph, y + 0.35 * size, text, size, "start", INK if kind else MUTED))
                x += room
            y += lead
        y += 2 * unit
    captions, height = _caption(style, font, sentences, width, y)
    return tuple(shapes), (*labels, *captions), height


def _check_width(style: Style, needed: float) -> None:
    """Refuse a legend whose entry is wider than a figure of a given width.

    Raises:
        MechsafetyError: It is wider.
    """
    if style.width is not None and needed > style.width + 0.01:
        raise MechsafetyError(
            f"width_mm={style.width_mm:g} with {style.font_px * 0.75:g} pt labels and a legend",
            expected=f"at least {math.ceil(needed / PIXELS_PER_MM)} mm for this legend",
            hint="legend=False, or a smaller font_pt",
        )


def keys(
    style: Style,
    items: Sequence[tuple[str, tuple[float, ...], str]],
    lines: Sequence[tuple[str, str]],
    sentences: Sequence[str],
    width: float,
    top: float,
) -> tuple[tuple[Shape, ...], tuple[Label, ...], float]:
    """A legend of plain colours (fill, dashes of the rim, text) and of lines (colour, text), and a caption."""
    unit, size = style.font_px / 12, small_text(style.font_px)
    margin = 12 * unit
    shapes, labels = [], []
    y = top + 6 * unit
    x, rows = margin, []
    for colour, dashes, text in items:
        body = outline("rounded", 0, 0, 24 * unit, 13 * unit)
        rows.append((Shape(body, colour, INK, 1.0, dashes), text))
    rows += [(Shape(line((-12 * unit, 0), (12 * unit, 0)), None, colour, 2.0 * unit), text) for colour, text in lines]
    for k, (shape, text) in enumerate(rows if style.legend else ()):
        room = 32 * unit + text_width(text, size) + 14 * unit
        if k == 0 or k == len(items) or x + room > width - margin:
            x, y = margin, y + 1.75 * size
        shapes.append(moved(shape, x + 12 * unit, y))
        labels.append(Label(x + 32 * unit, y + 0.35 * size, text, size))
        x += room
    captions, height = _caption(style, style.font_px, sentences, width, y + (1.75 * size if style.legend else 0.0))
    return tuple(shapes), (*labels, *captions), height


def moved(shape: Shape, x: float, y: float) -> Shape:
    """The shape with its origin at (x, y)."""
    steps = (x, y)
    commands = tuple(
        (letter, tuple(value + steps[k % 2] for k, value in enumerate(values))) for letter, values in shape.commands
    )
    return replace(shape, commands=commands)


def _caption(style: Style, font: float, sentences: Sequence[str], width: float, y: float) -> tuple[list[Label], float]:
    unit, size = font / 12, small_text(font)
    labels = []
    if style.caption:
        y += 0.6 * size
        letters = max(20, int((width - 24 * unit) / (family(style.look.font).letter * size)))
        for place, sentence in enumerate(sentences):
            for text in textwrap.wrap(sentence, letters):
                colour = INK if place < 2 else MUTED
                labels.append(Label(12 * unit, y + 0.35 * size, text, size, "start", colour, place == 0))
                y += 1.45 * size
    return labels, y + 4 * unit


def node_rows(nodes: Collection[CircuitNode], look: Look) -> list[Row]:
    """The legend of nodes: their roles, and what a rim and a line mean, as far as the circuit has them."""
    roles, statuses = {member.role for member in nodes}, {member.status for member in nodes}
    marks: list[tuple[str, str, str]] = [("status", key, key) for key in STATUSES if key in statuses]
    marks += [("opposing", "opposing", "works against refusal")] * any(member.opposes for member in nodes)
    return [
        ("role", [("role", role, look.role(role)) for role in ROLES if role in roles]),
        ("node", [*marks, ("", "", "depth of colour: |effect|")]),
    ]


def edge_key(member: CircuitEdge, linked: Collection[Edge] = ()) -> EdgeMark:
    """An edge as the legend reads it, without a curve."""
    edge = member.edge
    ends = (str(edge.sender), str(edge.receiver))
    return EdgeMark(*ends, edge.slot, member.effect, member.status, (), "", linking=edge in linked)


def edge_rows(edges: Collection[EdgeMark]) -> list[Row]:
    """The legend of edges: their slots, and what marks and dashes mean, as far as the picture has them."""
    if not edges:
        return []
    slots = {"mlp" if mark.slot == "resid" else mark.slot for mark in edges}
    marks: list[tuple[str, str, str]]
    marks = [
        ("edge" if status == "rejected" else "marks", status, status)
        for status in NODE_STATUS
        if any(mark.status == status for mark in edges)
    ]
    if any(mark.effect < 0 for mark in edges):
        marks.append(("edge", "negative", "negative effect"))
    if any(mark.linking for mark in edges):
        marks.append(("edge", "linking", "kept only to connect a node"))
    return [
        ("into", [("slot", slot, text) for slot, text in SLOT_TITLES if slot in slots]),
        ("edge", [*marks, ("", "", "width: |effect|")]),
    ]


def swatch(kind: str, key: str, x: float, y: float, unit: float, look: Look) -> list[Shape]:
    """The glyph of a legend's entry, centred at (x, y). No two entries have the same glyph, in colour or in greys.

    What nodes or edges of any kind can have is shown on several kinds at once: the status of a node on an ellipse and
    a rectangle, that of an edge on three marks.
    """
    if kind == "role":
        return [node_shape(key, look.colour(key), "measured", 1.0, x, y, 24 * unit, 13 * unit)]
    if kind in ("status", "opposing"):
        status = "measured" if kind == "opposing" else key
        size, shapes = 12 * unit, list[Shape]()
        for role, middle in (("detection", x - 7 * unit), ("decision", x + 7 * unit)):
            shapes.append(node_shape(role, ROLE_COLOURS["none"], status, 0.7, middle, y, size, size))
            if kind == "opposing":
                shapes.append(opposing_line(middle, y, size, size, readable_on(shapes[-1].fill or BAR)))
        return shapes
    if kind == "marks":
        colour, width = edge_colour(0.2, key), edge_width(key, 0.25, unit)
        fill = PAPER if key == "estimated" else colour
        tips = [edge_tip(slot, width, 9 * unit * place, 0, unit) for place, slot in enumerate(("q", "k", "mlp"), -1)]
        return [moved(Shape(tip, fill, colour, TIP_RIM * unit), x, y - 3 * unit) for tip in tips]
    if not kind:
        return []
    status = key if key == "rejected" else "measured"
    slot = key if kind == "slot" else "mlp"
    effect, stroke = -0.2 if key == "negative" else 0.2, line((0, 0), (0, 26 * unit))
    shapes = list(edge_shapes(effect, status, slot, 0.25, stroke, unit, linking=key == "linking"))
    return [turned(shape, x + 12 * unit, y, 1) for shape in shapes]
