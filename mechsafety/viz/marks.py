"""What a picture is made of: shapes, labels, and the fixed colours and outlines of roles and statuses."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mechsafety.circuits.circuit import CircuitEdge, CircuitNode
from mechsafety.viz.look import PLAIN, Look

Command = tuple[str, tuple[float, ...]]

ROLE_OUTLINES = {
    "detection": "ellipse",
    "evaluation": "hexagon",
    "relay": "trapezoid",
    "decision": "rectangle",
    "production": "slanted",
    "none": "rounded",
}
INK, MUTED, FAINT, PAPER, BAR = "#1B1F24", "#5B6470", "#D5D9DF", "#FFFFFF", "#EEF1F4"
# text on a node's fill keeps its colour on a dark page
ON_DARK, ON_LIGHT = "#FEFEFE", "#14181D"
EDGE, NEGATIVE, GUESSED, GUESSED_NEGATIVE, REFUTED = "#3F4956", "#9C2F6B", "#8D96A2", "#C78BAC", "#C3C8CF"
# edges that are kept only so that a node lies on a path: colour, and dashes in line widths
LINK, LINK_DASHES = "#6E9BC5", (5.0, 1.5, 1.0, 1.5)
# by slot: dashes in line widths; the port's place on the receiver's lower rim, as a share of the rim's width
DASHES = {"q": (1.0, 1.6), "k": (4.0, 2.0), "v": (), "mlp": (), "resid": ()}
PORTS = {"q": -0.3, "k": 0.0, "v": 0.3, "mlp": 0.0, "resid": 0.0}
# edges thinner than this have the dashes of this width; widths of the mark's rim and of the bar
THINNEST_DASHED, TIP_RIM, BAR_WIDTH = 1.2, 1.0, 1.5
# the colour on a dark page for each colour on a light page
DARK = {
    INK: "#E8ECF1",
    MUTED: "#9BA6B3",
    FAINT: "#333B45",
    PAPER: "#14181D",
    BAR: "#222932",
    EDGE: "#B4BECA",
    NEGATIVE: "#F08CC0",
    GUESSED: "#6E7A88",
    GUESSED_NEGATIVE: "#95587A",
    REFUTED: "#4A535E",
    LINK: "#4E7CA8",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A filled or stroked path: ``M``, ``L``, ``C`` and ``Z`` commands in pixels, y growing downward."""

    commands: tuple[Command, ...]
    fill: str | None = None
    stroke: str | None = None
    width: float = 1.0
    dashes: tuple[float, ...] = ()
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

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the room that the text takes in any of the fonts."""
        width = text_width(self.text, self.size)
        left = self.x - {"start": 0.0, "middle": width / 2, "end": width}[self.anchor]
        return left, self.y - 0.78 * self.size, left + width, self.y + 0.22 * self.size


@dataclass(frozen=True, slots=True)
class NodeMark:
    """A drawn node, bar, supernode or box.

    Attributes:
        key: Name of the mark, unique in a picture.
        x, y, width, height: Centre and size.
        shapes, labels: What is drawn, from back to front.
        title: Tooltip of the mark.
        member: The circuit's node; None for bars, supernodes and boxes.
        group: The group that the node belongs to; for a supernode, the group that it replaces.
        kind: ``head``, ``mlp``, ``neuron``, ``embed``, ``logits``, ``group``, ``role``, or
            ``weak`` for a mark that counts nodes.
    """

    key: str
    x: float
    y: float
    width: float
    height: float
    shapes: tuple[Shape, ...]
    labels: tuple[Label, ...]
    title: str
    member: CircuitNode | None = None
    group: str = ""
    kind: str = ""


@dataclass(frozen=True, slots=True)
class EdgeMark:
    """A drawn edge: its curve, then its marks; ``sender`` and ``receiver`` are keys of node marks.

    ``n_edges`` is the number of the circuit's edges that it sums. ``linking`` says whether all of these are kept only
    to connect a node.
    """

    sender: str
    receiver: str
    slot: str
    effect: float
    status: str
    shapes: tuple[Shape, ...]
    title: str
    labels: tuple[Label, ...] = ()
    member: CircuitEdge | None = None
    n_edges: int = 1
    linking: bool = False


@dataclass(frozen=True, slots=True)
class Grid:
    """The room that is kept free for edges; edges of folded groups are routed in it after the layout.

    Attributes:
        unit: Number of pixels of a length that is 1 at the 12-pixel font.
        channels: Start and width of the channel left of each column; the last channel is right of all columns.
        gaps: Lower rim and height of the channel below each line, from the bottom up; the last is above all lines.
        cells: Line and column of each node, by the node's key; a supernode has the cell of its anchor.
    """

    unit: float
    channels: tuple[tuple[float, float], ...]
    gaps: tuple[tuple[float, float], ...]
    cells: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Layout:
    """A picture of a circuit in pixels, the same for every output format.

    Attributes:
        width, height: Size of the picture.
        nodes: Marks of the nodes, in the order of computation.
        edges: Marks of the edges, weakest first, so that strong edges are drawn over weak ones.
        n_edges: Number of edges that the circuit has; ``edges`` may hold fewer.
        backdrop: Lanes, row lines and the legend's swatches.
        labels: Row, lane, legend and caption texts.
        title, description: The picture in words, for readers who cannot see it.
        folded: Supernodes that an interactive page shows in place of a group's members; no other medium draws them.
        map_height: Height of the picture without legend and caption.
        grid: The room for edges of folded groups; None for a role diagram.
        look: Names, font and colours.
    """

    width: float
    height: float
    nodes: tuple[NodeMark, ...]
    edges: tuple[EdgeMark, ...]
    n_edges: int
    backdrop: tuple[Shape, ...]
    labels: tuple[Label, ...]
    title: str
    description: str
    folded: tuple[NodeMark, ...] = ()
    map_height: float = 0.0
    grid: Grid | None = None
    look: Look = PLAIN


def magnitude(effect: float | None) -> float:
    """The size of an effect; 0 where it is missing or not finite."""
    return abs(effect) if effect is not None and math.isfinite(effect) else 0.0


def text_width(text: str, size: float) -> float:
    """A safe estimate of a text's width in a sans-serif font."""
    return sum(0.95 if ord(char) > 0x2E7F else 0.57 for char in text) * size


def centred(x: float, y: float, text: str, size: float, colour: str = INK, *, bold: bool = False) -> Label:
    """A label whose middle is at (x, y)."""
    return Label(x, y + 0.35 * size, text, size, "middle", colour, bold)


def small_text(font: float) -> float:
    """The size of secondary texts; it is not below 6 points (8 pixels) where the main texts are not."""
    return max(0.86 * font, min(font, 8.0))


def bar_text(font: float) -> float:
    """The size of the texts in the bars of ``embed`` and ``logits``."""
    return max(0.9 * font, small_text(font))


def turned(shape: Shape, x: float, y: float, towards: int) -> Shape:
    """A shape that points upward at the origin, laid on its side: its head at (x, y), to the right (1) or left (-1)."""
    commands = tuple(
        (letter, tuple(part for i in range(0, len(v), 2) for part in (x - towards * v[i + 1], y + towards * v[i])))
        for letter, v in shape.commands
    )
    return Shape(commands, shape.fill, shape.stroke, shape.width, shape.dashes, shape.opacity)


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
    """Dark or light, whichever has the higher contrast on ``fill``."""
    light = luminance(fill)
    return ON_DARK if 1.05 / (light + 0.05) > (light + 0.05) / (luminance(ON_LIGHT) + 0.05) else ON_LIGHT


def grey(colour: str) -> str:
    """The grey of the same luminance, so that contrasts stay as they are.

    Example:
        >>> grey("#FF0000")
        '#7f7f7f'
    """
    light = luminance(colour)
    part = round(255 * (12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055))
    return f"#{part:02x}{part:02x}{part:02x}"


def band(colour: str) -> str:
    """The tint of the lane of a role of this colour."""
    return blend(colour, 0.07)


def outline(kind: str, x: float, y: float, width: float, height: float, most: float = math.inf) -> tuple[Command, ...]:
    """The closed path of a node centred at (x, y); corners are cut by at most ``most``."""
    left, right, top, bottom = x - width / 2, x + width / 2, y - height / 2, y + height / 2
    if kind == "hexagon":
        cut = min(height / 2, width / 4, most)
        return polygon(
            (left + cut, top), (right - cut, top), (right, y), (right - cut, bottom), (left + cut, bottom), (left, y)
        )
    if kind == "slanted":
        cut = min(height * 0.4, width / 5, most)
        return polygon((left + cut, top), (right, top), (right - cut, bottom), (left, bottom))
    if kind == "trapezoid":
        cut = min(height * 0.3, width / 5, most)
        return polygon((left + cut, top), (right - cut, top), (right, bottom), (left, bottom))
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


def outline_inset(kind: str, width: float, height: float, below: float, side: int, most: float = math.inf) -> float:
    """How far an outline's side (-1 left, 1 right) lies inside its box, at this distance below its middle."""
    share = below / height + 0.5  # 0 at the top, 1 at the bottom
    if kind == "hexagon":
        return min(height / 2, width / 4, most) * abs(2 * share - 1)
    if kind == "slanted":
        return min(height * 0.4, width / 5, most) * (share if side > 0 else 1 - share)
    return min(height * 0.3, width / 5, most) * (1 - share) if kind == "trapezoid" else 0.0


def label_room(kind: str, width: float, height: float, size: float) -> float:
    """The largest width of a text of this size that stands in the middle of an outline."""
    # letters reach about a third of their size above and below the middle
    reach = min(1.0, 2 * 0.36 * size / height)
    if kind == "ellipse":
        return width * math.sqrt(1 - reach**2)
    if kind == "hexagon":
        return width - 2 * min(height / 2, width / 4) * reach
    if kind == "slanted":
        return width - min(height * 0.4, width / 5) * (1 + reach)
    if kind == "trapezoid":
        return width - min(height * 0.3, width / 5) * (1 + reach)
    return width


def polygon(*points: tuple[float, float]) -> tuple[Command, ...]:
    """A closed path through ``points``."""
    return (("M", points[0]), *(("L", point) for point in points[1:]), ("Z", ()))


def line(*points: tuple[float, float]) -> tuple[Command, ...]:
    """An open path through ``points``."""
    return (("M", points[0]), *(("L", point) for point in points[1:]))


def node_shape(
    role: str, colour: str, status: str, strength: float, x: float, y: float, width: float, height: float
) -> Shape:
    """A node's body: hollow where only estimated, dashed where rejected, dark-rimmed where verified."""
    path = outline(ROLE_OUTLINES[role], x, y, width, height)
    if status == "estimated":
        return Shape(path, PAPER, colour, 1.6)
    if status == "rejected":
        return Shape(path, PAPER, MUTED, 1.1, (4.0, 2.4))
    fill = effect_fill(colour, strength)
    return Shape(path, fill, INK, 1.5) if status == "verified" else Shape(path, fill, colour, 1.0)


def opposing_line(x: float, y: float, width: float, height: float, colour: str) -> Shape:
    """The line under the name of a node that works against the behaviour."""
    half, below = 0.28 * width, y + 0.34 * height
    return Shape(line((x - half, below), (x + half, below)), None, colour, 1.5)


def effect_fill(colour: str, strength: float) -> str:
    """A role's colour, deeper for a stronger effect (0 to 1)."""
    return blend(colour, 0.42 + 0.58 * strength)


def node_strength(effect: float | None, largest: float) -> float:
    """How strong an effect looks beside the largest; a square root, since most are small."""
    return math.sqrt(min(1.0, magnitude(effect) / largest))


def edge_colour(effect: float, status: str) -> str:
    """Colour of an edge: lighter where estimated, faint where rejected, another hue where negative."""
    if status == "rejected":
        return REFUTED
    if status == "estimated":
        return GUESSED if effect >= 0 else GUESSED_NEGATIVE
    return EDGE if effect >= 0 else NEGATIVE


def edge_shapes(
    effect: float,
    status: str,
    slot: str,
    strength: float,
    commands: tuple[Command, ...],
    unit: float = 1.0,
    *,
    linking: bool = False,
) -> tuple[Shape, ...]:
    """An edge: its curve, which begins at the receiver, and the marks there.

    - The width grows with ``strength`` (0 to 1).
    - Dashes and mark show the slot. The mark is a circle for q, a square for k, a diamond for v, otherwise a triangle.
    - The mark is filled where the effect was measured, hollow where it is estimated, a cross where it was rejected.
    - A bar before the mark shows a negative effect.
    - An edge that is kept only to connect a node (``linking``) has its own colour and dashes.
    """
    colour = LINK if linking else edge_colour(effect, status)
    width = edge_width(status, strength, unit)
    dashes = tuple(
        round(part * max(width, THINNEST_DASHED * unit), 2) for part in (LINK_DASHES if linking else DASHES[slot])
    )
    x, y = commands[0][1]
    size = _tip_size(width, unit)
    shapes = [Shape(commands, None, colour, width, dashes)]
    if status == "rejected":
        shapes.append(Shape(line((x - size, y - size + 1), (x + size, y + size + 1)), None, colour, 1.1))
        shapes.append(Shape(line((x - size, y + size + 1), (x + size, y - size + 1)), None, colour, 1.1))
        return tuple(shapes)
    fill = PAPER if status == "estimated" else colour
    shapes.append(Shape(edge_tip(slot, width, x, y, unit), fill, colour, TIP_RIM * unit))
    if effect < 0:
        shapes.append(Shape(edge_bar(width, x, y, unit), None, colour, BAR_WIDTH * unit))
    return tuple(shapes)


def edge_width(status: str, strength: float, unit: float = 1.0) -> float:
    """How wide an edge is; estimates are drawn thinner than measurements of the same size."""
    return unit * (0.8 + (2.4 if status in ("measured", "verified") else 1.6) * strength)


def edge_tip(slot: str, width: float, x: float, y: float, unit: float = 1.0) -> tuple[Command, ...]:
    """The mark of an edge at its receiver, (x, y). Its coordinates are linear in ``width``, which a page relies on."""
    size = _tip_size(width, unit)
    if slot == "q":
        return outline("ellipse", x, y + size * 0.8, 1.9 * size, 1.9 * size)
    if slot == "k":
        return outline("rectangle", x, y + size * 0.8, 1.7 * size, 1.7 * size)
    if slot == "v":
        return polygon((x, y), (x + size, y + size), (x, y + 2 * size), (x - size, y + size))
    return polygon((x, y), (x + size, y + 1.7 * size), (x - size, y + 1.7 * size))


def edge_bar(width: float, x: float, y: float, unit: float = 1.0) -> tuple[Command, ...]:
    """The bar before the mark of a negative edge; linear in ``width`` too."""
    size = _tip_size(width, unit)
    bar = y + 2.0 * size + 1.6 * unit
    return line((x - 1.5 * size, bar), (x + 1.5 * size, bar))


def _tip_size(width: float, unit: float) -> float:
    return unit * 2.6 + 0.45 * width


def rounded(points: Sequence[tuple[float, float]], radius: float) -> tuple[Command, ...]:
    """An open path through the points with rounded corners."""
    kept = [points[0]]
    for point in points[1:]:
        if math.dist(point, kept[-1]) > 0.05:
            kept.append(point)
    commands: list[Command] = [("M", kept[0])]
    for before, corner, after in zip(kept, kept[1:], kept[2:], strict=False):
        reach = min(radius, math.dist(before, corner) / 2, math.dist(corner, after) / 2)
        enter, leave = _towards(corner, before, reach), _towards(corner, after, reach)
        near, far = _towards(corner, before, 0.4477 * reach), _towards(corner, after, 0.4477 * reach)
        commands += [("L", enter), ("C", (*near, *far, *leave))]
    return (*commands, ("L", kept[-1])) if len(kept) > 1 else tuple(commands)


def _towards(start: tuple[float, float], end: tuple[float, float], length: float) -> tuple[float, float]:
    share = length / (math.dist(start, end) or 1.0)
    return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])
