"""How a picture looks: one set of options for every medium."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from mechsafety.circuits.circuit import ROLES, CircuitNode, RefusalCircuit
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Node, NodeLike
from mechsafety.viz.look import Look, checked_look, checked_roles

COLUMNS = ("role", "part", "position")
PIXELS_PER_MM, PIXELS_PER_PT = 96 / 25.4, 96 / 72
SCREEN_PT, PAPER_PT, SMALLEST_PT = 9.0, 7.0, 6.0
SMALLEST_MM = 20  # width and height of a figure
PAGE_MM = 230.0  # height of the text on a page
PART_TITLES = {"head": "heads", "mlp": "MLPs", "neuron": "neurons"}
UNKNOWN = "position not measured"
SPANS = ("instruction", "template after it")


@dataclass(frozen=True, slots=True)
class Positions:
    """The position that each node acts at.

    Attributes:
        labels: Titles of the positions, in reading order; tokens or names of spans.
        of: Index of each node's position among the labels. Nodes without an index stand in a lane of their own.

    Example:
        >>> places = {one.node: 0 if one.role == "detection" else 1 for one in circuit.nodes}
        >>> where = ms.viz.Positions(("instruction", "template after it"), places)
        >>> svg = ms.viz.circuit_svg(circuit, ms.viz.Style(columns="position", positions=where))
        >>> "template after it" in svg
        True
    """

    labels: tuple[str, ...]
    of: Mapping[Node, int]

    def __post_init__(self) -> None:
        outside = sorted({place for place in self.of.values() if not 0 <= place < len(self.labels)})
        if outside:
            raise MechsafetyError(f"positions {outside}", expected=f"0 to {len(self.labels) - 1}, one per label")


@dataclass(frozen=True, slots=True)
class Style:
    """Options of a picture; the defaults are for a screen.

    Attributes:
        columns: What the lanes are: ``role``, ``part`` (heads, MLPs, neurons) or ``position`` (where in the prompt the
            node acts).
        width_mm: Width of the figure, such as a paper's column; None takes what the circuit needs. With a width, the
            nodes of the smallest effects are folded into counted marks until the figure fits, and the caption counts
            them.
        height_mm: Largest height with a width; None is a page of 230 mm.
        font_pt: Size of node labels in points; None is 9 on a screen. With a width it is 7, or 6 where all nodes fit
            only then.
        grayscale: Whether to draw in greys; shapes, dashes and marks tell everything without colour.
        legend, caption: Whether a legend and a caption stand under the picture.
        max_edges: Number of strongest edges to draw. Each node's strongest edge is drawn as well, even if it is weaker.
            0 draws no edges, None all edges.
        groups: Nodes by the name of their group, for folding; None makes one group per role.
        fold: Names of groups that are each drawn as one supernode.
        positions: Positions for ``columns="position"``; None takes each node's span from its role evidence.
        labels: Texts drawn in place of nodes' names, by node or its name. ``embed`` and ``logits`` name the two bars.
        role_names: Words for roles in pictures, legends, diagrams and captions, by role.
        font: ``sans-serif`` (default), ``serif``, ``monospace``, or a family that is installed. LaTeX takes the first
            three from its document, and has no other.
        colours: Colours of roles: ``#rrggbb`` or a name that matplotlib knows.
        top, min_effect, nodes, roles, layers: Which nodes are drawn: this many of the largest effects, those of at
            least this absolute effect, these (also by name), those of these roles, those of these layers; by default
            all. Together they narrow each other. The caption says what is left out and keeps the whole circuit's
            numbers.

    Raises:
        MechsafetyError: A value that cannot be drawn. The message proposes the nearest name for a wrong one.

    Example:
        >>> column = ms.viz.Style(width_mm=86, grayscale=True, caption=False)
        >>> path = ms.viz.circuit_pdf(circuit, folder / "column.pdf", column)
    """

    columns: str = "role"
    width_mm: float | None = None
    height_mm: float | None = None
    font_pt: float | None = None
    grayscale: bool = False
    legend: bool = True
    caption: bool = True
    max_edges: int | None = 60
    groups: Mapping[str, Sequence[Node]] | None = None
    fold: tuple[str, ...] = ()
    positions: Positions | None = None
    top: int | None = None
    min_effect: float | None = None
    nodes: Sequence[NodeLike] | None = None
    roles: str | tuple[str, ...] | None = None
    layers: int | Collection[int] | None = None
    labels: Mapping[NodeLike, str] | None = None
    role_names: Mapping[str, str] | None = None
    font: str | None = None
    colours: Mapping[str, str] | None = None
    look: Look = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.columns not in COLUMNS:
            raise MechsafetyError(f"columns={self.columns!r}", expected=f"one of {COLUMNS}")
        if self.max_edges is not None and self.max_edges < 0:
            raise MechsafetyError(f"max_edges={self.max_edges}", expected="None or a number that is not negative")
        if self.top is not None and self.top < 1:
            raise MechsafetyError(f"top={self.top}", expected="None or at least 1")
        for name in ("grayscale", "legend", "caption"):
            if not isinstance(getattr(self, name), bool):
                raise MechsafetyError(f"{name}={getattr(self, name)!r}", expected="True or False")
        # a frozen dataclass sets what it derives like this
        if isinstance(self.roles, str):
            object.__setattr__(self, "roles", (self.roles,))
        checked_roles("roles", self.roles or ())
        if self.height_mm is not None and self.width_mm is None:
            raise MechsafetyError("height_mm without width_mm", expected="both, or a width alone")
        for name, low, high in (("width_mm", SMALLEST_MM, 2000), ("height_mm", SMALLEST_MM, 2000), ("font_pt", 3, 40)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise MechsafetyError(f"{name}={value}", expected=f"{low} to {high}")
        object.__setattr__(self, "look", checked_look(self.labels, self.role_names, self.font, self.colours))

    @property
    def font_px(self) -> float:
        """Size of node labels in pixels."""
        points = self.font_pt or (SCREEN_PT if self.width_mm is None else PAPER_PT)
        return points * PIXELS_PER_PT

    @property
    def width(self) -> float | None:
        """Width in pixels; None if no width is given."""
        return None if self.width_mm is None else self.width_mm * PIXELS_PER_MM

    @property
    def height(self) -> float | None:
        """Largest height in pixels; None if no width is given."""
        return None if self.width_mm is None else (self.height_mm or PAGE_MM) * PIXELS_PER_MM


def groups(circuit: RefusalCircuit, style: Style) -> dict[str, tuple[Node, ...]]:
    """The groups that can be folded, each with at least two nodes of the circuit.

    Raises:
        MechsafetyError: A node is in two groups, or ``fold`` names an unknown group.
    """
    known = {member.node for member in circuit.nodes}
    named = style.groups
    if named is None:
        named = {role: [member.node for member in circuit.by_role(role)] for role in ROLES if role != "none"}
    found: dict[str, tuple[Node, ...]] = {}
    taken: dict[Node, str] = {}
    for name, nodes in named.items():
        members = sorted({node for node in nodes if node in known}, key=lambda node: node.order)
        for node in members:
            if node in taken:
                raise MechsafetyError(f"{node} is in the groups {taken[node]!r} and {name!r}", expected="one group")
            taken[node] = name
        if len(members) > 1:
            found[name] = tuple(members)
    missing = [name for name in style.fold if name not in named]
    if missing:
        raise MechsafetyError(f"fold={missing}", expected=f"some of {sorted(named)}")
    return found


def group_title(style: Style, name: str) -> str:
    """What a group is called: by default groups are roles."""
    return name if style.groups is not None else style.look.role(name)


def lane_of(style: Style, member: CircuitNode) -> str:
    """The lane that a node stands in."""
    if style.columns == "role":
        return member.role
    if style.columns == "part":
        return member.node.kind
    if style.positions is not None:
        place = style.positions.of.get(member.node)
        return UNKNOWN if place is None else str(place)
    shares = (member.evidence.at_instruction, member.evidence.at_suffix)
    if shares[1] is None:
        return UNKNOWN
    # with pairs aligned at the suffix, nothing is patched in the instruction
    return SPANS[0] if shares[0] is not None and abs(shares[0]) >= abs(shares[1]) else SPANS[1]


def lane_order(style: Style) -> list[tuple[str, str]]:
    """Keys and titles of the possible lanes from left to right."""
    if style.columns == "role":
        return [(role, style.look.role(role)) for role in ("none", *(role for role in ROLES if role != "none"))]
    if style.columns == "part":
        return list(PART_TITLES.items())
    if style.positions is not None:
        return [*((str(place), label) for place, label in enumerate(style.positions.labels)), (UNKNOWN, UNKNOWN)]
    return [(span, span) for span in SPANS] + [(UNKNOWN, UNKNOWN)]
