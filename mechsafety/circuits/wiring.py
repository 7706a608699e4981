"""How the nodes of a circuit connect, and what each does: edges and roles, measured."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from mechsafety.circuits.backups import knocked_out
from mechsafety.circuits.budget import WIRING, Budget
from mechsafety.circuits.circuit import Backup, CircuitEdge, RoleEvidence
from mechsafety.circuits.edges import carrying, connect, edges_into, estimate_edges, measure_edges
from mechsafety.circuits.faithfulness import FaithfulnessMeter
from mechsafety.circuits.flow import Flow
from mechsafety.circuits.roles import Named, assign_roles
from mechsafety.circuits.search import MAX_EXACT
from mechsafety.nodes import EMBED, Edge, Node
from mechsafety.patching.masks import PairRuns


@dataclass(frozen=True, slots=True)
class Wiring:
    """How the nodes of a circuit connect, and what each does.

    Attributes:
        edges: Edges of the circuit, strongest first.
        roles: Role of each node, with its evidence.
        linked: Edges that are kept only to connect a node.
        dropped: Nodes that nothing connects.
        measured: Every edge that was measured, kept or not.
    """

    edges: tuple[CircuitEdge, ...]
    roles: Named
    linked: tuple[Edge, ...] = ()
    dropped: tuple[Node, ...] = ()
    measured: Mapping[Edge, CircuitEdge] = field(default_factory=dict)


def wire(
    meter: FaithfulnessMeter,
    nodes: Sequence[Node],
    backups: Sequence[Backup],
    outside: Sequence[Node],
    *,
    n_edges: int,
    budget: Budget,
    own: Sequence[CircuitEdge] | None = None,
) -> Wiring:
    """Edges and roles of a circuit's nodes, connected from ``embed`` to ``logits``.

    Both are measured in the circuit: every node outside it is patched. A backup masks the node that it replaces. All
    backups are therefore patched too while the other nodes are measured. A backup is measured with its primary node,
    its primary node's other backups, and all backups of other primary nodes patched. An edge between backups of two
    primary nodes carries something only while both primary nodes are patched: each pair of such backups has runs of its
    own.

    Edges are kept if they carry something (see `carrying`), and if a node would not be connected without them.

    In a circuit of more than `MAX_EXACT` nodes, the neurons of each MLP are measured together, as that MLP. The MLP's
    other neurons are patched anyway. Each neuron then has the role and the evidence of all, and edges run between MLPs.

    Args:
        meter: What to measure on.
        nodes: The circuit's, backups included.
        backups: Those among them.
        outside: Every other node.
        n_edges: Edges to measure, those with the largest estimates first.
        budget: Time to keep.
        own: Edges with their estimates, the strongest first, if the circuit has edges of its own; by default all edges
            between the nodes are estimated.
    """
    no_roles: Named = {node: ("none", RoleEvidence()) for node in nodes}
    if not nodes or budget.skips(WIRING, 0.6):
        return Wiring((), no_roles)
    homes = list(dict.fromkeys(node.home for node in nodes))
    if len(nodes) > MAX_EXACT and len(homes) < len(nodes):
        budget.left_out("edges and roles of single neurons: those of an MLP are measured together")
        at_home = {backup.node.home: replace(backup, node=backup.node.home) for backup in backups}
        whole = wire(meter, homes, list(at_home.values()), outside, n_edges=n_edges, budget=budget, own=own)
        return _of_neurons(whole, nodes)
    by_node = {backup.node: backup for backup in backups}
    every: dict[Edge, CircuitEdge] = {}
    kept: dict[Edge, CircuitEdge] = {}
    exact: dict[Edge, CircuitEdge] = {}
    roles = dict(no_roles)
    states: dict[Node, _State] = {}
    align = meter.runs.align
    spans = ("instruction", "suffix") if align == "tokens" else ("suffix",)
    for patched, measured in _patched_sets(nodes, by_node).items():
        # the neurons of a patched MLP are patched with it
        alive = [node for node in nodes if not {node, node.home} & set(patched)]
        state = _State(meter, [*outside, *patched])
        estimated = state.estimated(alive) if own is None else own
        first = estimated[:n_edges]
        needed = alive
        if states:  # backups come after all other nodes: only they and their own edges are measured then
            estimated, first = (_touching(measured, members) for members in (estimated, first))
            near = {node for member in first for node in (member.edge.sender, member.edge.receiver)}
            # another backup of the same primary may be alive; it gets a role here too, which is not kept
            needed = [node for node in alive if node in near or node not in states]
        flow = state.flow(alive)
        effects = flow.effects(needed)
        named = assign_roles(flow, effects, spans, {node: roles[node][0] for node in alive if node in states})
        embedded = [node for node in measured if named[node][0] == "detection"]
        state.measure_from_embed(embedded)
        strongest = [*state.measured(first), *(m for node in embedded for m in state.from_embed(node))]
        for members, into in ((estimated, every), (strongest, exact), (carrying(strongest, effects), kept)):
            for member in members:
                into.setdefault(member.edge, member)
        states |= dict.fromkeys(measured, state)
        roles |= {node: named[node] for node in measured}
    for patched, pairs in _of_two_primaries(by_node).items():
        paths = [edge for one, other in pairs for edge in edges_into(one, [other], parallel=meter.model.parallel)]
        links = [CircuitEdge(edge, 0.0) for edge in paths]
        if own is not None:
            asked_for = set(paths)
            links = [member for member in own if member.edge in asked_for]
        if links and not budget.skips("edges between backups of different nodes", 0.6):
            state = _State(meter, [*outside, *patched])
            carried = state.measured(links)
            alive = [node for node in nodes if not {node, node.home} & set(patched)]
            effects = state.flow(alive).effects(list(dict.fromkeys(node for pair in pairs for node in pair)))
            for members, into in ((carried, exact), (carrying(carried, effects), kept)):
                for member in members:
                    into.setdefault(member.edge, member)
    for node, backup in by_node.items():
        role, evidence = roles[node]
        roles[node] = (role, replace(evidence, backup_of=str(backup.primary), joint=backup.joint))
    # at the suffix, heads read the instruction from tokens that no node there wrote
    sources = [node for node in nodes if node.kind == "head" and align == "suffix"]
    fed = {edge.receiver for edge in kept}
    for state in dict.fromkeys(states.values()):  # those that `connect` may ask for, in one batch
        state.measure_from_embed([node for node in nodes if states.get(node) is state and node not in fed])
    known = [exact.get(edge, member) for edge, member in every.items()]
    edges, linked, dropped = connect(
        nodes, list(kept.values()), known, lambda node: states[node].from_embed(node), sources
    )
    # what only connects a node is measured too, in a state in which both of its ends are alive
    asked: dict[_State, list[CircuitEdge]] = {}
    for edge in linked:
        if edge not in exact:
            ends = [node for node in (edge.receiver, edge.sender) if node in states]
            state = states[min(ends, key=lambda node: node not in by_node)]
            asked.setdefault(state, []).append(every.get(edge, CircuitEdge(edge, 0.0)))
    for state, links in asked.items():
        exact |= {member.edge: member for member in state.measured(links)}
    edges = sorted((exact.get(member.edge, member) for member in edges), key=lambda member: -abs(member.effect))
    return Wiring(tuple(edges), roles, linked, dropped, exact)


def _of_neurons(whole: Wiring, nodes: Sequence[Node]) -> Wiring:
    """The wiring of MLPs, as that of the neurons that were measured together."""
    roles: Named = {}
    for node in nodes:
        role, evidence = whole.roles[node.home]
        roles[node] = (role, evidence if node.home == node else replace(evidence, together=str(node.home)))
    return replace(whole, roles=roles, dropped=tuple(node for node in nodes if node.home in whole.dropped))


def _touching(nodes: Sequence[Node], edges: Sequence[CircuitEdge]) -> list[CircuitEdge]:
    """The edges into or out of these nodes."""
    return [member for member in edges if member.edge.sender in nodes or member.edge.receiver in nodes]


class _State:
    """Runs of the pairs with some nodes patched, and what is measured in them, as shares of the whole model's gap."""

    def __init__(self, meter: FaithfulnessMeter, patched: Sequence[Node]) -> None:
        self.model, self.metric = meter.model, meter.metric
        harmful, harmless = meter.ends()
        parts = meter.groups or ((tuple(range(len(harmful))), meter.runs),)
        self.gaps = np.concatenate([(harmful - harmless)[list(rows)] for rows, _ in parts])
        self.groups = [knocked_out(meter.model, runs, patched) for _, runs in parts]
        self.all_runs, self.patched = meter.runs, patched
        self.known: dict[Node, list[CircuitEdge]] = {}

    @cached_property
    def whole(self) -> PairRuns:
        """All pairs in one run."""
        return knocked_out(self.model, self.all_runs, self.patched) if len(self.groups) > 1 else self.groups[0]

    def flow(self, nodes: Sequence[Node]) -> Flow:
        """Paths among nodes that are not patched."""
        return Flow(self.model, self.groups, self.metric, nodes, float(self.gaps.mean()), self.whole)

    def estimated(self, nodes: Sequence[Node]) -> list[CircuitEdge]:
        """Every edge between nodes that are not patched, the strongest first, by gradients."""
        harmful, harmless = self.whole.scores(self.metric)
        # estimates are shares of the gap that is left
        share = float((harmful - harmless).mean()) / float(self.gaps.mean())
        found = estimate_edges(self.model, self.whole, self.metric, nodes)
        return [CircuitEdge(one.edge, one.effect * share, "estimated", one.effect * share) for one in found]

    def measured(self, edges: Sequence[CircuitEdge]) -> list[CircuitEdge]:
        """Exact effects of single edges; estimates stay as they are."""
        return measure_edges(self.model, self.groups, self.metric, edges, self.gaps.tolist())

    def measure_from_embed(self, nodes: Sequence[Node]) -> None:
        """Measure the edges of some nodes from the embeddings, in one batch."""
        new = [node for node in nodes if node not in self.known]
        self.known |= {node: [] for node in new}
        paths = edges_into(EMBED, new, parallel=self.model.parallel)
        for member in self.measured([CircuitEdge(edge, 0.0) for edge in paths]):
            self.known[member.edge.receiver].append(member)

    def from_embed(self, node: Node) -> list[CircuitEdge]:
        """Exact effects of a node's edges from the embeddings."""
        self.measure_from_embed([node])
        return self.known[node]


def _patched_sets(nodes: Sequence[Node], backups: Mapping[Node, Backup]) -> dict[tuple[Node, ...], list[Node]]:
    """Which nodes are patched at a time, and which nodes are measured then; nodes that are no backups come first."""
    sets = {tuple(backups): [node for node in nodes if node not in backups]}
    for node in backups:
        sets.setdefault(_masking([node], backups), []).append(node)
    return sets


def _masking(live: Sequence[Node], backups: Mapping[Node, Backup]) -> tuple[Node, ...]:
    """What is patched while some backups are measured: their primaries, what else replaces these, all other backups."""
    primaries = {backups[node].primary for node in live}
    groups = {node for one in live for node in backups[one].group}
    of_others = {node for node, backup in backups.items() if backup.primary not in primaries}
    alive = {home for node in live for home in (node, node.home)}
    return tuple(sorted((primaries | groups | of_others) - alive, key=lambda node: node.order))


def _of_two_primaries(backups: Mapping[Node, Backup]) -> dict[tuple[Node, ...], list[tuple[Node, Node]]]:
    """Pairs of backups of different primaries, the earlier one first, by what is patched while they are measured."""
    primary = {node: backup.primary for node, backup in backups.items()}
    found: dict[tuple[Node, ...], list[tuple[Node, Node]]] = {}
    for one, other in itertools.combinations(sorted(backups, key=lambda node: node.order), 2):
        if primary[one] not in (primary[other], other) and primary[other] != one:
            found.setdefault(_masking([one, other], backups), []).append((one, other))
    return found
