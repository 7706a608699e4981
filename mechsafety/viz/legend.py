"""The legend and the caption under a circuit's picture."""

import textwrap

from mechsafety.circuits.circuit import ROLES, RefusalCircuit
from mechsafety.viz.marks import (
    FAINT,
    INK,
    MUTED,
    Label,
    Shape,
    edge_shape,
    line,
    node_shape,
    text_width,
)
from mechsafety.viz.words import caption

MARGIN, SIZE, LEAD = 24.0, 11.0, 20.0
STATUSES = ("verified", "measured", "estimated", "rejected")
EDGES = (("measured", 0.2, "measured"), ("estimated", 0.2, "estimated"), ("negative", -0.2, "measured"))


def legend_and_caption(
    circuit: RefusalCircuit, drawn: int, width: float, top: float
) -> tuple[tuple[Shape, ...], tuple[Label, ...], float]:
    """Shapes, texts and the picture's full height."""
    shapes: list[Shape] = [Shape(line((MARGIN, top + 8), (width - MARGIN, top + 8)), None, FAINT, 0.8)]
    labels: list[Label] = []
    y = top + 26
    rows = (
        ("role", [(role, "role", role) for role in ROLES]),
        ("node", [(status, "status", status) for status in STATUSES]),
        ("edge", [(name, "edge", name) for name, _, _ in EDGES]),
    )
    for title, items in rows:
        labels.append(Label(MARGIN, y + 4, title, SIZE, "start", MUTED))
        x = MARGIN + 42
        for name, kind, key in items:
            text = {"none": "none assigned", "negative": "negative effect"}.get(name, name)
            room = 34 + text_width(text, SIZE) + 18
            if x + room > width - MARGIN:
                x, y = MARGIN + 42, y + LEAD
            shapes += _swatch(kind, key, x + 13, y)
            labels.append(Label(x + 32, y + 4, text, SIZE, "start", INK))
            x += room
        if title == "edge":
            note = "width, size and depth of colour: |effect|"
            if x + text_width(note, SIZE) > width - MARGIN:
                x, y = MARGIN + 42, y + LEAD
            labels.append(Label(x, y + 4, note, SIZE, "start", MUTED))
        y += LEAD
    y += 8
    letters = int((width - 2 * MARGIN) / (0.57 * SIZE))
    for place, sentence in enumerate(caption(circuit, drawn)):
        for text in textwrap.wrap(sentence, letters):
            labels.append(Label(MARGIN, y + 4, text, SIZE, "start", INK if place < 2 else MUTED, place == 0))
            y += 16
    return tuple(shapes), tuple(labels), y + 8


def _swatch(kind: str, key: str, x: float, y: float) -> list[Shape]:
    if kind == "role":
        return [node_shape(key, "measured", 1.0, x, y, 26, 14)]
    if kind == "status":
        return [node_shape("none", key, 0.7, x, y, 26, 14)]
    effect, status = next((effect, status) for name, effect, status in EDGES if name == key)
    return [edge_shape(effect, status, 0.45, line((x - 14, y), (x + 14, y)))]
