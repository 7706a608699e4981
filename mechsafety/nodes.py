"""Parts of a model that can be in a circuit, and connections between them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from mechsafety.codec import REQUIRED, Amount
from mechsafety.errors import MechsafetyError
from mechsafety.sites import SiteKind

KINDS = ("embed", "head", "mlp", "neuron", "logits")
# slots through which a node of each kind reads the residual stream
SLOTS = {"head": ("q", "k", "v"), "mlp": ("mlp",), "neuron": ("mlp",), "logits": ("resid",)}
# site at which the value of a node of each kind is read and edited
NODE_SITES = {"head": SiteKind.Z, "mlp": SiteKind.MLP_OUT, "neuron": SiteKind.NEURONS}
# site of each slot of a head
HEAD_SITES = {"q": SiteKind.Q, "k": SiteKind.K, "v": SiteKind.V}


@dataclass(frozen=True, slots=True)
class Node:
    """A part of the model that can be in a circuit.

    Attributes:
        kind: ``embed``, ``head``, ``mlp``, ``neuron`` or ``logits``.
        layer: Block index; None for ``embed`` and ``logits``.
        index: Head or neuron index; None for the others.

    Example:
        >>> str(Node("head", 4, 3)), str(Node("mlp", 2)), str(Node("logits"))
        ('L4.H3', 'L2.MLP', 'logits')
    """

    kind: str
    layer: Amount | None = field(default=None, metadata=REQUIRED)
    index: Amount | None = field(default=None, metadata=REQUIRED)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise MechsafetyError(f"node kind {self.kind!r}", expected=f"one of {KINDS}")
        needs_layer, needs_index = self.kind in ("head", "mlp", "neuron"), self.kind in ("head", "neuron")
        if needs_layer != (self.layer is not None) or needs_index != (self.index is not None):
            raise MechsafetyError(f"a node of kind {self.kind!r} with layer {self.layer} and index {self.index}")

    def __str__(self) -> str:
        names = {"head": f"L{self.layer}.H{self.index}", "mlp": f"L{self.layer}.MLP"}
        return names.get(self.kind, f"L{self.layer}.N{self.index}" if self.kind == "neuron" else self.kind)

    @property
    def home(self) -> "Node":
        """The head or MLP that holds the node: a neuron's MLP, otherwise the node itself."""
        return Node("mlp", self.layer) if self.kind == "neuron" else self

    @property
    def short(self) -> str:
        """The name in figures: ``14.2`` for a head, ``M26`` for an MLP; others as printed."""
        return {"head": f"{self.layer}.{self.index}", "mlp": f"M{self.layer}"}.get(self.kind, str(self))

    @property
    def order(self) -> tuple[int, int, int]:
        """Sort key in the order of computation: embed, then attention before MLP in each layer, then logits."""
        if self.kind == "embed":
            return (-1, 0, 0)
        if self.layer is None:
            return (1 << 30, 0, 0)
        return (self.layer, 0 if self.kind == "head" else 1, -1 if self.index is None else self.index)


@dataclass(frozen=True, slots=True)
class Edge:
    """A connection from one node's output to another's input slot (``q``, ``k``, ``v``, ``mlp`` or ``resid``).

    Example:
        >>> str(ms.Edge(ms.Node("head", 0, 1), ms.Node("head", 3, 1), "v"))
        'L0.H1 -> L3.H1 (v)'
        >>> ms.Edge(ms.Node("head", 0, 1), ms.Node("mlp", 3), "v")
        Traceback (most recent call last):
        mechsafety.errors.MechsafetyError: edge slot 'v'; expected one of ('mlp',)
    """

    sender: Node = field(metadata={"name": "from"})
    receiver: Node = field(metadata={"name": "to"})
    slot: str

    def __post_init__(self) -> None:
        # heads of one layer run side by side, and so do its neurons
        if self.sender.order[:2] >= self.receiver.order[:2]:
            raise MechsafetyError(f"edge {self.sender} -> {self.receiver} runs against the order of computation")
        if self.slot not in SLOTS[self.receiver.kind]:
            raise MechsafetyError(f"edge slot {self.slot!r}", expected=f"one of {SLOTS[self.receiver.kind]}")

    def __str__(self) -> str:
        return f"{self.sender} -> {self.receiver} ({self.slot})"


EMBED, LOGITS = Node("embed"), Node("logits")
# what a circuit is made of
Part = Node | Edge
NodeLike = Node | str
"""A node, or its name as it is printed: ``L14.H2`` or ``14.2``, ``L26.MLP`` or ``M26``, ``L3.N17``."""
# names as results print them and as figures shorten them
_NAMES = {
    "head": re.compile(r"L?(\d+)\.H?(\d+)", re.IGNORECASE),
    "mlp": re.compile(r"L(\d+)\.MLP|M(\d+)", re.IGNORECASE),
    "neuron": re.compile(r"L?(\d+)\.N(\d+)", re.IGNORECASE),
}


def as_node(given: object) -> Node:
    """A node from its name. A node stays as it is, and a member of a circuit gives its node.

    Raises:
        MechsafetyError: The text is no name of a node. The message proposes the nearest name.

    Example:
        >>> [str(as_node(name)) for name in ("L14.H2", "14.2", "M26", "l3.n17", "logits")]
        ['L14.H2', 'L14.H2', 'L26.MLP', 'L3.N17', 'logits']
        >>> as_node("L14H2")
        Traceback (most recent call last):
        mechsafety.errors.MechsafetyError: no node is named 'L14H2'; expected a name such as 'L14.H2', 'L26.MLP' or \
'L3.N17'; did you mean 'L14.H2'?
    """
    given = getattr(given, "node", given)
    if isinstance(given, Node):
        return given
    if not isinstance(given, str):
        raise MechsafetyError(f"{given!r} is not a node", expected="a Node, or a name such as 'L14.H2'")
    text = given.strip()
    if text.lower() in ("embed", "logits"):
        return Node(text.lower())
    for kind, form in _NAMES.items():
        found = form.fullmatch(text)
        if found:
            return Node(kind, *(int(digits) for digits in found.groups() if digits))
    numbers = [int(digits) for digits in re.findall(r"\d+", text)[:2]]
    kind = "mlp" if len(numbers) == 1 else "neuron" if "n" in text.lower() else "head"
    raise MechsafetyError(
        f"no node is named {given!r}",
        expected="a name such as 'L14.H2', 'L26.MLP' or 'L3.N17'",
        hint=f"did you mean '{Node(kind, *numbers)}'?" if numbers else "",
    )


def as_nodes(given: "NodeLike | Iterable[NodeLike]") -> tuple[Node, ...]:
    """Several nodes, each given as a node, by its name, or as a member of a circuit; a single one counts as one.

    Example:
        >>> [str(node) for node in as_nodes(["M26", Node("head", 14, 2)])]
        ['L26.MLP', 'L14.H2']
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        return (as_node(given),)
    return tuple(map(as_node, given))


def nodes_of(parts: Iterable[Part]) -> list[Node]:
    """The heads, MLPs and neurons among parts, those at the ends of edges included, in the order of computation.

    Example:
        >>> [str(node) for node in nodes_of([Edge(EMBED, Node("mlp", 1), "mlp"), Node("head", 0, 2)])]
        ['L0.H2', 'L1.MLP']
    """
    ends = {end for part in parts for end in ((part,) if isinstance(part, Node) else (part.sender, part.receiver))}
    return sorted((node for node in ends if node.kind in NODE_SITES), key=lambda node: node.order)


def head_and_mlp_nodes(n_layers: int, n_heads: int) -> tuple[Node, ...]:
    """Every head and MLP, in the order of computation.

    Example:
        >>> [str(node) for node in head_and_mlp_nodes(1, 2)]
        ['L0.H0', 'L0.H1', 'L0.MLP']
    """
    nodes: list[Node] = []
    for layer in range(n_layers):
        nodes += [Node("head", layer, head) for head in range(n_heads)]
        nodes.append(Node("mlp", layer))
    return tuple(nodes)
