"""How the nodes of a circuit connect, and what each does: edges and roles, measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mechsafety.circuits.backups import knocked_out
from mechsafety.circuits.budget import Budget
from mechsafety.circuits.circuit import Backup, CircuitEdge, Role, RoleEvidence
from mechsafety.circuits.edges import connect, edges_into, estimate_edges, exact_edges, measure_edges
from mechsafety.circuits.faithfulness import FaithfulnessMeter
from mechsafety.circuits.roles import assign_roles, role_evidence
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.nodes import EMBED, Edge, Node
from mechsafety.patching import activation_patching
from mechsafety.patching.masks import PairRuns

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
    *,
    n_edges: int,
    n_measured: int,
    budget: Budget,
    progress: bool,
    effects: Mapping[Node, float] | None = None,
) -> Wiring:
    """Edges and roles of a circuit's nodes, connected from ``embed`` to ``logits``.

    A backup masks the node that it replaces. All backups are therefore patched while the other nodes are measured. A
    backup is measured with its primary node, its primary node's other backups, and all backups of other primary nodes
    patched.

    Args:
        meter: What to measure on.
        nodes: The circuit's, backups included.
        backups: Those among them.
        n_edges: Edges to keep, strongest first. Edges that only connect a node come on top.
        n_measured: How many of them to measure exactly.
        budget: Time to keep.
        progress: Whether to show bars.
        effects: Exact effect of each node on these pairs, if it is known; otherwise it is measured here.
    """
    no_roles: Roles = {node: ("none", RoleEvidence()) for node in nodes}
    if budget.skips("edges and roles", 0.6):
        return Wiring((), no_roles)
    by_node = {backup.node: backup for backup in backups}
    every: dict[Edge, CircuitEdge] = {}
    kept: dict[Edge, CircuitEdge] = {}
    roles = dict(no_roles)
    from_embed: dict[Node, list[CircuitEdge]] = {}
    model, metric = meter.model, meter.metric
    for patched, measured in _patched_sets(nodes, by_node).items():
        alive = [node for node in nodes if node not in patched]
        here = knocked_out(model, meter.runs, patched)
        # the runs by length are of the model without patches
        groups = [here] if patched or not meter.groups else [group for _, group in meter.groups]
        found, strongest, named = _edges_and_roles(
            model, here, groups, metric, alive, n_edges, n_measured, progress, None if patched else effects
        )
        paths = edges_into(EMBED, _unfed(measured, strongest), parallel=model.parallel)
        for member in measure_edges(model, groups, metric, [CircuitEdge(edge, 0.0) for edge in paths]):
            from_embed.setdefault(member.edge.receiver, []).append(member)
        first = not every
        mine = set(measured)
        for members, into in ((found, every), (strongest, kept)):
            for member in members:
                if first or {member.edge.sender, member.edge.receiver} & mine:
                    into.setdefault(member.edge, member)
        roles |= {node: named[node] for node in measured}
    for node, backup in by_node.items():
        role, evidence = roles[node]
        roles[node] = (role, replace(evidence, backup_of=str(backup.primary), joint=backup.joint))
    # at the suffix, heads read the instruction from tokens that no node there wrote
    sources = [node for node in nodes if node.kind == "head" and meter.runs.align == "suffix"]
    edges, linked, dropped = connect(
        nodes, list(kept.values()), list(every.values()), lambda node: from_embed.get(node, []), sources
    )
    return Wiring(tuple(edges), roles, linked, dropped)


def _patched_sets(nodes: Sequence[Node], backups: Mapping[Node, Backup]) -> dict[tuple[Node, ...], list[Node]]:
    """Which nodes are patched at a time, and which nodes are measured then; nodes that are no backups come first."""
    sets = {tuple(backups): [node for node in nodes if node not in backups]}
    for node, backup in backups.items():
        of_others = {other for other, its in backups.items() if its.primary != backup.primary}
        patched = {backup.primary, *backup.group, *of_others} - {node}
        sets.setdefault(tuple(sorted(patched, key=lambda n: n.order)), []).append(node)
    return sets


def _edges_and_roles(
    model: LensModel,
    runs: PairRuns,
    groups: Sequence[PairRuns],
    metric: RefusalLogOdds,
    nodes: Sequence[Node],
    n_edges: int,
    n_measured: int,
    progress: bool,
    effects: Mapping[Node, float] | None,
) -> tuple[list[CircuitEdge], list[CircuitEdge], Roles]:
    """Every edge between nodes, the strongest of them, and the nodes' roles, with the same nodes patched throughout.

    The strongest edges are measured exactly, up to ``n_measured`` of them. The effects of the others are estimates.
    """
    if effects is None or not effects.keys() >= set(nodes):
        whole = activation_patching(model, runs, metric, nodes=nodes, progress=progress)
        effects = dict(zip(nodes, whole.effects.tolist(), strict=True))
    evidence = role_evidence(model, runs, metric, nodes, groups=groups, progress=progress)
    if any(node.kind == "neuron" for node in nodes):
        known = exact_edges(model, groups, metric, nodes)
        return known, known[:n_edges], assign_roles(effects, evidence, known)
    every = estimate_edges(model, runs, metric, nodes)
    measured = measure_edges(model, groups, metric, every[: min(n_edges, n_measured)])
    known = [*measured, *every[len(measured) :]]
    return known, known[:n_edges], assign_roles(effects, evidence, known)


def _unfed(nodes: Sequence[Node], edges: Sequence[CircuitEdge]) -> list[Node]:
    fed = {member.edge.receiver for member in edges}
    return [node for node in nodes if node not in fed]
