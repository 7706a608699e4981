"""What a picture is made of: shapes, labels, and the fixed colours and outlines of roles and statuses."""

import math
from dataclasses import dataclass

from mechsafety.circuits.circuit import CircuitEdge, CircuitNode, Node

Command = tuple[str, tuple[float, ...]]

# Okabe and Ito's colours, told apart with the common colour-vision deficiencies; the outline is the second cue.
ROLE_COLOURS = {
    "detection": "#0072B2",
    "evaluation": "#E69F00",
    "decision": "#D55E00",
    "production": "#009E73",
    "none": "#8A919C",
}
ROLE_OUTLINES = {
    "detection": "ellipse",
    "evaluation": "hexagon",
    "decision": "rectangle",
    "production": "slanted",
    "none": "rounded",
}
INK, MUTED, FAINT, PAPER = "#1B1F24", "#5B6470", "#D5D9DF", "#FFFFFF"
MEASURED_EDGE, NEGATIVE_EDGE = "#3F4956", "#9C2F6B"


@dataclass(frozen=True, slots=True)
class Shape:
    """A filled or stroked path: ``M``, ``L``, ``C`` and ``Z`` commands in pixels, y growing downward."""

    commands: tuple[Command, ...]
    fill: str | None = None
    stroke: str | None = None
    width: float = 1.0
    dashed: bool = False
    opacity: float = 1.0


@dataclass(frozen=True, slots=True)
class Label:
    """A line of text; ``y`` is its baseline, ``anchor`` is ``start``, ``middle`` or ``end``."""

    x: float
    y: float
    text: str
    size: float
    anchor: str = "start"
    colour: str = INK
    bold: bool = False


@dataclass(frozen=True, slots=True)
class NodeMark:
    """A drawn node. ``member`` is None for ``embed`` and ``logits`` where the circuit does not list them."""

    node: Node
    member: CircuitNode | None
    x: float
    y: float
    width: float
    height: float
    shape: Shape
    label: Label | None


@dataclass(frozen=True, slots=True)
class EdgeMark:
    """A drawn edge."""

    member: CircuitEdge
    shape: Shape


@dataclass(frozen=True, slots=True)
class Layout:
    """A picture of a circuit in pixels, the same for every output format.

    Attributes:
        width, height: Size of the picture.
        nodes: In the order of computation.
        edges: Weakest first, so that strong ones are drawn over weak ones.
        n_edges: How many edges the circuit has; ``edges`` may hold fewer.
        backdrop: Row lines, empty cells and the legend's swatches.
        labels: Row, column, legend and caption texts.
    """

    width: float
    height: float
    nodes: tuple[NodeMark, ...]
    edges: tuple[EdgeMark, ...]
    n_edges: int
    backdrop: tuple[Shape, ...]
    labels: tuple[Label, ...]


def magnitude(effect: float | None) -> float:
    """The size of an effect; 0 where it is missing or not finite."""
    return abs(effect) if effect is not None and math.isfinite(effect) else 0.0


def text_width(text: str, size: float) -> float:
    """A safe estimate of a text's width in a sans-serif font."""
    return sum(0.95 if ord(char) > 0x2E7F else 0.57 for char in text) * size


def centred(x: float, y: float, text: str, size: float, colour: str = INK, *, bold: bool = False) -> Label:
    """A label whose middle is at (x, y)."""
    return Label(x, y + 0.35 * size, text, size, "middle", colour, bold)


def blend(colour: str, strength: float, paper: str = PAPER) -> str:
    """``colour`` mixed into ``paper``; strength 1 is the pure colour.

    Example:
        >>> blend("#000000", 0.5)
        '#808080'
    """
    mixed = [
        round(strength * int(colour[i : i + 2], 16) + (1 - strength) * int(paper[i : i + 2], 16)) for i in (1, 3, 5)
    ]
    return "#" + "".join(f"{value:02x}" for value in mixed)


def luminance(colour: str) -> float:
    """Relative luminance by WCAG 2.1, 0 (black) to 1 (white)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def readable_on(fill: str) -> str:
    """Ink or paper, whichever has the higher contrast on ``fill``."""
    light = luminance(fill)
    on_ink = (light + 0.05) / (luminance(INK) + 0.05)
    return PAPER if 1.05 / (light + 0.05) > on_ink else INK


def outline(kind: str, x: float, y: float, width: float, height: float) -> tuple[Command, ...]:
    """The closed path of a node centred at (x, y)."""
    left, right, top, bottom = x - width / 2, x + width / 2, y - height / 2, y + height / 2
    if kind == "hexagon":
        cut = min(height / 2, width / 4)
        return polygon(
            (left + cut, top), (right - cut, top), (right, y), (right - cut, bottom), (left + cut, bottom), (left, y)
        )
    if kind == "slanted":
        cut = min(height * 0.4, width / 5)
        return polygon((left + cut, top), (right, top), (right - cut, bottom), (left, bottom))
    if kind == "rectangle":
        return polygon((left, top), (right, top), (right, bottom), (left, bottom))
    radius_x, radius_y = (width / 2, height / 2) if kind == "ellipse" else (min(6.0, height / 3),) * 2
    bend = 0.5523  # control-point distance of a quarter circle
    near_x, near_y = radius_x * (1 - bend), radius_y * (1 - bend)
    return (
        ("M", (left + radius_x, top)),
        ("L", (right - radius_x, top)),
        ("C", (right - near_x, top, right, top + near_y, right, top + radius_y)),
        ("L", (right, bottom - radius_y)),
        ("C", (right, bottom - near_y, right - near_x, bottom, right - radius_x, bottom)),
        ("L", (left + radius_x, bottom)),
        ("C", (left + near_x, bottom, left, bottom - near_y, left, bottom - radius_y)),
        ("L", (left, top + radius_y)),
        ("C", (left, top + near_y, left + near_x, top, left + radius_x, top)),
        ("Z", ()),
    )


def polygon(*points: tuple[float, float]) -> tuple[Command, ...]:
    """A closed path through ``points``."""
    return (("M", points[0]), *(("L", point) for point in points[1:]), ("Z", ()))


def line(*points: tuple[float, float]) -> tuple[Command, ...]:
    """An open path through ``points``."""
    return (("M", points[0]), *(("L", point) for point in points[1:]))


def node_shape(role: str, status: str, strength: float, x: float, y: float, width: float, height: float) -> Shape:
    """A node's body: hollow where only estimated, dashed where rejected, dark-rimmed where verified."""
    colour = ROLE_COLOURS[role]
    path = outline(ROLE_OUTLINES[role], x, y, width, height)
    if status == "estimated":
        return Shape(path, PAPER, colour, 1.6)
    if status == "rejected":
        return Shape(path, PAPER, MUTED, 1.1, dashed=True)
    fill = blend(colour, 0.42 + 0.58 * strength)
    return Shape(path, fill, INK, 1.5) if status == "verified" else Shape(path, fill, colour, 1.0)


def edge_shape(effect: float, status: str, strength: float, commands: tuple[Command, ...]) -> Shape:
    """An edge's curve: wider with ``strength`` (0 to 1), lighter where estimated, dashed where negative."""
    measured = status != "estimated"
    colour = MEASURED_EDGE if effect >= 0 else NEGATIVE_EDGE
    width = 0.7 + 4.3 * strength
    opacity = 0.42 + 0.38 * strength if measured else 0.3 + 0.25 * strength
    return Shape(commands, None, colour if measured else blend(colour, 0.55), width, effect < 0, opacity)
