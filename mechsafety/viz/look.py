"""What a paper can have its own way: texts for nodes and roles, a font, colours. Each is checked where it is given."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from mechsafety.circuits.circuit import ROLES
from mechsafety.errors import MechsafetyError, did_you_mean
from mechsafety.nodes import Node, NodeLike, as_node
from mechsafety.viz.fonts import SANS, checked_font

# Okabe and Ito's colours, told apart with the common colour-vision deficiencies; the outline is the second cue.
ROLE_COLOURS = {
    "detection": "#0072B2",
    "evaluation": "#E69F00",
    "relay": "#CC79A7",
    "decision": "#D55E00",
    "production": "#009E73",
    "none": "#8A919C",
}
LONGEST = 60  # letters of a text of one's own


@dataclass(frozen=True, slots=True)
class Look:
    """The names, font and colours of a picture.

    Attributes:
        labels: Text drawn in place of a node's name.
        role_names: Word for a role.
        font: ``sans-serif``, ``serif``, ``monospace`` or an installed family.
        colours: Colour of a role, as ``#rrggbb``.
    """

    labels: Mapping[Node, str] = field(default_factory=dict)
    role_names: Mapping[str, str] = field(default_factory=dict)
    font: str = SANS
    colours: Mapping[str, str] = field(default_factory=dict)

    def role(self, role: str) -> str:
        """What a role is called."""
        return self.role_names.get(role, "no role" if role == "none" else role)

    def colour(self, role: str) -> str:
        """The colour of a role."""
        return self.colours.get(role, ROLE_COLOURS[role])

    def short(self, node: Node) -> str:
        """What stands in a node's place in lists: its own text, or its short name."""
        return self.labels.get(node, node.short)

    def mark(self, node: Node) -> str:
        """What stands in a node's mark: its own text, or its short name; a neuron's layer is that of its row."""
        return self.labels.get(node, f"N{node.index}" if node.kind == "neuron" else node.short)

    def full(self, node: Node) -> str:
        """A node's address, after its own text if it has one."""
        return f"{self.labels[node]} ({node})" if node in self.labels else str(node)

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text that the user gave."""
        return (*self.labels.values(), *self.role_names.values())


PLAIN = Look()


def checked_look(
    labels: Mapping[NodeLike, Any] | None,
    role_names: Mapping[str, Any] | None,
    font: str | None,
    colours: Mapping[str, Any] | None,
) -> Look:
    """The look that a user asks for.

    Raises:
        MechsafetyError: A name that is unknown, a text or colour that cannot be drawn, or a font that is not installed.
    """
    return Look(
        _labels(labels or {}), _role_names(role_names or {}), checked_font(font or SANS), _colours(colours or {})
    )


def checked_roles(option: str, roles: Collection[object]) -> None:
    """Refuse what is no role, with the nearest right name.

    Raises:
        MechsafetyError: A name that is not a role.
    """
    for role in roles:
        if role not in ROLES:
            raise MechsafetyError(
                f"{option} names the role {role!r}", expected=f"some of {ROLES}", hint=did_you_mean(role, ROLES)
            )


def _labels(given: Mapping[NodeLike, Any]) -> dict[Node, str]:
    found: dict[Node, str] = {}
    for name, text in given.items():
        node = as_node(name)
        if node in found:
            raise MechsafetyError(f"labels name {node} twice", expected="one text per node")
        found[node] = _text(f"the label of {node}", text)
    return found


def _role_names(given: Mapping[str, Any]) -> dict[str, str]:
    checked_roles("role_names", given)
    found = {role: _text(f"the name of the role {role!r}", text) for role, text in given.items()}
    words: dict[str, str] = {}
    for role in ROLES:
        word = Look(role_names=found).role(role)
        if word in words:
            raise MechsafetyError(
                f"the roles {words[word]!r} and {role!r} are both called {word!r}",
                expected="a name of its own per role",
            )
        words[word] = role
    return found


def _text(what: str, text: Any) -> str:
    if not isinstance(text, str):
        raise MechsafetyError(f"{what} is {text!r}", expected="a text")
    words = " ".join(text.split())
    if not words or not words.isprintable() or len(words) > LONGEST:
        raise MechsafetyError(f"{what} is {text!r}", expected=f"1 to {LONGEST} letters that can be printed")
    return words


def _colours(given: Mapping[str, Any]) -> dict[str, str]:
    checked_roles("colours", given)
    return {role: _colour(role, colour) for role, colour in given.items()}


def _colour(role: str, colour: Any) -> str:
    if isinstance(colour, str) and re.fullmatch("#[0-9a-fA-F]{6}", colour):
        return colour
    from matplotlib.colors import get_named_colors_mapping, to_hex

    try:
        return to_hex(colour)
    except ValueError:
        raise MechsafetyError(
            f"the colour of the role {role!r} is {colour!r}",
            expected="a colour such as '#0072B2' or 'navy'",
            hint=did_you_mean(colour, [str(name) for name in get_named_colors_mapping()]),
        ) from None
