"""What is known about a model whose refusal circuit is set by construction or by training."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mechsafety.circuits.circuit import ROLES
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Edge, Node

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class Truth:
    """The known circuit of a model.

    Attributes:
        nodes: Heads and MLPs of the circuit, backups included, in the order of computation.
        neurons: Neurons of the circuit inside those MLPs; empty where only whole MLPs are known.
        edges: Direct paths of the circuit, including those from the token embedding and to the logits.
        roles: Role of every node and neuron (one of `mechsafety.circuits.circuit.ROLES`).
        decoys: Heads, MLPs and neurons whose activations differ between harmful and harmless prompts and that nothing
            reads. An MLP is a decoy if it holds decoy neurons and no neuron of the circuit.
        backups: Groups of nodes that do the same work. One node of a group suffices: patching one alone has hardly any
            effect, patching the whole group has a large one. An MLP in a group stands for its neurons of the circuit.

    Raises:
        MechsafetyError: A role is unknown or missing, a decoy is in the circuit, or a node of a backup group is not.

    Example:
        >>> made.truth
        Truth(5 nodes, 4 neurons, 7 edges, 3 decoys, 1 backed up)
        >>> made.truth.roles[ms.Node("head", 0, 1)]
        'detection'
    """

    nodes: tuple[Node, ...]
    neurons: tuple[Node, ...]
    edges: tuple[Edge, ...]
    roles: Mapping[Node, str]
    decoys: tuple[Node, ...] = ()
    backups: tuple[tuple[Node, ...], ...] = field(default=())

    def __post_init__(self) -> None:
        members = {*self.nodes, *self.neurons}
        if set(self.roles) != members:
            wrong = min(set(self.roles) ^ members, key=lambda node: node.order)
            raise MechsafetyError(f"the role of {wrong}", expected="one for every node of the circuit and no other")
        unknown = sorted(set(self.roles.values()) - set(ROLES))
        if unknown:
            raise MechsafetyError(f"roles {unknown}", expected=f"some of {ROLES}")
        for what, nodes in (("decoy", self.decoys), ("node of the circuit", self.backed_up)):
            wrong_side = [node for node in nodes if (node in members) == (what == "decoy")]
            if wrong_side:
                raise MechsafetyError(f"{wrong_side[0]} is not a {what}", expected="decoys outside, backups inside")

    def __repr__(self) -> str:
        return (
            f"Truth({len(self.nodes)} nodes, {len(self.neurons)} neurons, {len(self.edges)} edges, "
            f"{len(self.decoys)} decoys, {len(self.backups)} backed up)"
        )

    @property
    def backed_up(self) -> tuple[Node, ...]:
        """Every node that is in a backup group."""
        return tuple(node for group in self.backups for node in group)

    def units(self) -> Iterator[Node]:
        """The smallest known parts of the circuit: heads, and neurons where these are known, otherwise MLPs."""
        for node in self.nodes:
            if node.kind == "head" or not self.neurons:
                yield node
        yield from self.neurons

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per node, neuron or decoy: role, whether it is a decoy, whether it is backed up."""
        import pandas as pd

        rows = [(str(node), node.kind, role, False, node in self.backed_up) for node, role in self.roles.items()]
        rows += [(str(node), node.kind, "none", True, False) for node in self.decoys]
        return pd.DataFrame(rows, columns=["node", "kind", "role", "decoy", "backed_up"])
