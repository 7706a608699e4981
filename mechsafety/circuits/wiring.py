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
        edges: Strongest first.
        roles: With evidence.
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

    Where there are backups, everything is measured with them patched, since what they stand in for shows no effect
    while they do; a backup's own edges and roles with what it stands in for, and the backups of other nodes, patched.

    Args:
        meter: What to measure on.
        nodes: The circuit's, backups included.
        backups: Those among them.
        n_edges: Edges to keep, strongest first (links come on top).
        n_measured: How many of them to measure exactly.
        budget: Time to keep.
        progress: Whether to show bars.
        effects: Exact effect of each node on these pairs, where it is known; measured here else.
    """
    no_roles: Roles = {node: ("none", RoleEvidence()) for node in nodes}
    if budget.skips("edges and roles", 0.6):
        return Wiring((), no_roles)
    second = {backup.node: backup for backup in backups}
    ways: dict[tuple[Node, ...], list[Node]] = {tuple(second): [node for node in nodes if node not in second]}
    for node, backup in second.items():
        # one way at each doubled stage: this one here, the first one at the others
        elsewhere = {other for other, its in second.items() if its.primary != backup.primary}
        others = {backup.primary, *backup.group, *elsewhere} - {node}
        ways.setdefault(tuple(sorted(others, key=lambda n: n.order)), []).append(node)
    every: dict[Edge, CircuitEdge] = {}
    kept: dict[Edge, CircuitEdge] = {}
    roles = dict(no_roles)
    from_embed: dict[Node, list[CircuitEdge]] = {}
    model, metric = meter.model, meter.metric
    for gone, asked in ways.items():
        alive = [node for node in nodes if node not in gone]
        here = knocked_out(model, meter.runs, gone)
        # the runs by length are of the model as it is
        groups = [here] if gone or not meter.groups else [group for _, group in meter.groups]
        found, strongest, named = _one_way(
            model, here, groups, metric, alive, n_edges, n_measured, progress, None if gone else effects
        )
        paths = edges_into(EMBED, _unfed(asked, strongest), parallel=model.parallel)
        for member in measure_edges(model, groups, metric, [CircuitEdge(edge, 0.0) for edge in paths]):
            from_embed.setdefault(member.edge.receiver, []).append(member)
        first = not every
        mine = set(asked)
        for members, into in ((found, every), (strongest, kept)):
            for member in members:
                if first or {member.edge.sender, member.edge.receiver} & mine:
                    into.setdefault(member.edge, member)
        roles |= {node: named[node] for node in asked}
    for node, backup in second.items():
        role, evidence = roles[node]
        roles[node] = (role, replace(evidence, backup_of=str(backup.primary), joint=backup.joint))
    # at the suffix, heads read the instruction from tokens that no node there wrote
    sources = [node for node in nodes if node.kind == "head" and meter.runs.align == "suffix"]
    edges, linked, dropped = connect(
        nodes, list(kept.values()), list(every.values()), lambda node: from_embed.get(node, []), sources
    )
    return Wiring(tuple(edges), roles, linked, dropped)


def _one_way(
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
    """Every edge, the strongest (measured as far as asked), and the roles, in one state of the model."""
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
