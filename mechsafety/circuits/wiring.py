"""How the nodes of a circuit connect, and what each does: edges and roles, measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from mechsafety.circuits.backups import knocked_out
from mechsafety.circuits.budget import Budget
from mechsafety.circuits.circuit import Backup, CircuitEdge, Role, RoleEvidence
from mechsafety.circuits.edges import carrying, connect, edges_into, estimate_edges, measure_edges
from mechsafety.circuits.faithfulness import FaithfulnessMeter
from mechsafety.circuits.flow import Flow
from mechsafety.circuits.roles import assign_roles
from mechsafety.nodes import EMBED, Edge, Node

Roles = dict[Node, tuple[Role, RoleEvidence]]


@dataclass(frozen=True, slots=True)
class Wiring:
    """How the nodes of a circuit connect, and what each does.

    Attributes:
        edges: Edges of the circuit, strongest first.
        roles: Role of each node, with its evidence.
        linked: Edges that are kept only to connect a node.
        dropped: Nodes that nothing connects.
    """

    edges: tuple[CircuitEdge, ...]
    roles: Mapping[Node, tuple[Role, RoleEvidence]]
    linked: tuple[Edge, ...] = ()
    dropped: tuple[Node, ...] = ()


def wire(
    meter: FaithfulnessMeter,
    nodes: Sequence[Node],
    backups: Sequence[Backup],
    outside: Sequence[Node],
    *,
    n_edges: int,
    budget: Budget,
    progress: bool,
) -> Wiring:
    """Edges and roles of a circuit's nodes, connected from ``embed`` to ``logits``.

    Both are measured in the circuit: every node outside it is patched. A backup masks the node that it replaces. All
    backups are therefore patched too while the other nodes are measured. A backup is measured with its primary node,
    its primary node's other backups, and all backups of other primary nodes patched.

    Edges are kept if they carry something (see `carrying`), and if a node would not be connected without them.

    Args:
        meter: What to measure on.
        nodes: The circuit's, backups included.
        backups: Those among them.
        outside: Every other node.
        n_edges: Edges to measure, those with the largest estimates first.
        budget: Time to keep.
        progress: Whether to show bars.
    """
    no_roles: Roles = {node: ("none", RoleEvidence()) for node in nodes}
    if budget.skips("edges and roles", 0.6):
        return Wiring((), no_roles)
    by_node = {backup.node: backup for backup in backups}
    every: dict[Edge, CircuitEdge] = {}
    kept: dict[Edge, CircuitEdge] = {}
    roles = dict(no_roles)
    states: dict[Node, _State] = {}
    align = meter.runs.align
    spans = ("instruction", "suffix") if align == "tokens" else ("suffix",)
    for patched, measured in _patched_sets(nodes, by_node).items():
        alive = [node for node in nodes if node not in patched]
        state = _State(meter, [*outside, *patched])
        named = assign_roles(state.flow(alive, progress), spans)
        effects = {node: evidence.in_circuit or 0.0 for node, (_, evidence) in named.items()}
        estimated = state.estimated(alive)
        embedded = [node for node in measured if named[node][0] == "detection"]
        strongest = [*state.measured(estimated[:n_edges]), *(m for node in embedded for m in state.from_embed(node))]
        mine = set(measured)
        for members, into in ((estimated, every), (carrying(strongest, effects), kept)):
            for member in members:
                if not states or {member.edge.sender, member.edge.receiver} & mine:
                    into.setdefault(member.edge, member)
        every |= {m.edge: m for m in strongest if m.edge in every}
        states |= dict.fromkeys(measured, state)
        roles |= {node: named[node] for node in measured}
    for node, backup in by_node.items():
        role, evidence = roles[node]
        roles[node] = (role, replace(evidence, backup_of=str(backup.primary), joint=backup.joint))
    # at the suffix, heads read the instruction from tokens that no node there wrote
    sources = [node for node in nodes if node.kind == "head" and align == "suffix"]
    edges, linked, dropped = connect(
        nodes, list(kept.values()), list(every.values()), lambda node: states[node].from_embed(node), sources
    )
    # what only connects a node is measured too, where the node is
    exact = {}
    for edge in linked:
        end = edge.receiver if edge.receiver in states else edge.sender
        exact[edge] = states[end].measured([every.get(edge, CircuitEdge(edge, 0.0))])[0]
    edges = sorted((exact.get(member.edge, member) for member in edges), key=lambda member: -abs(member.effect))
    return Wiring(tuple(edges), roles, linked, dropped)


class _State:
    """Runs of the pairs with some nodes patched, and what is measured in them, as shares of the whole model's gap."""

    def __init__(self, meter: FaithfulnessMeter, patched: Sequence[Node]) -> None:
        self.model, self.metric = meter.model, meter.metric
        harmful, harmless = meter.ends()
        self.gap = float((harmful - harmless).mean())
        parts = [runs for _, runs in meter.groups] or [meter.runs]
        self.groups = [knocked_out(meter.model, runs, patched) for runs in parts]
        self.whole = knocked_out(meter.model, meter.runs, patched) if meter.groups else self.groups[0]
        rest = torch.cat([a - b for a, b in (runs.scores(meter.metric) for runs in self.groups)]).mean()
        # edges are measured as shares of the gap that is left
        self.left = float(rest) / self.gap
        self.known: dict[Node, list[CircuitEdge]] = {}

    def flow(self, nodes: Sequence[Node], progress: bool) -> Flow:
        """Paths among nodes that are not patched."""
        return Flow(self.model, self.groups, self.metric, nodes, self.gap, progress)

    def estimated(self, nodes: Sequence[Node]) -> list[CircuitEdge]:
        """Every edge between nodes that are not patched, the strongest first, by gradients."""
        return [one.scaled(self.left) for one in estimate_edges(self.model, self.whole, self.metric, nodes)]

    def measured(self, edges: Sequence[CircuitEdge]) -> list[CircuitEdge]:
        """Exact effects of single edges; estimates stay as they are."""
        found = measure_edges(self.model, self.groups, self.metric, edges)
        return [
            replace(one.scaled(self.left), estimate=given.estimate) for one, given in zip(found, edges, strict=True)
        ]

    def from_embed(self, node: Node) -> list[CircuitEdge]:
        """Exact effects of a node's edges from the embeddings."""
        if node not in self.known:
            paths = edges_into(EMBED, [node], parallel=self.model.parallel)
            self.known[node] = self.measured([CircuitEdge(edge, 0.0) for edge in paths])
        return self.known[node]


def _patched_sets(nodes: Sequence[Node], backups: Mapping[Node, Backup]) -> dict[tuple[Node, ...], list[Node]]:
    """Which nodes are patched at a time, and which nodes are measured then; nodes that are no backups come first."""
    sets = {tuple(backups): [node for node in nodes if node not in backups]}
    for node, backup in backups.items():
        of_others = {other for other, its in backups.items() if its.primary != backup.primary}
        patched = {backup.primary, *backup.group, *of_others} - {node}
        sets.setdefault(tuple(sorted(patched, key=lambda n: n.order)), []).append(node)
    return sets
