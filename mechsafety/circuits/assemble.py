"""From a set of parts to a circuit: effects, edges and roles of its nodes, all measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm.auto import tqdm

from mechsafety.attribution import NodeAttribution
from mechsafety.circuits.backups import knocked_out
from mechsafety.circuits.budget import Budget
from mechsafety.circuits.circuit import (
    Backup,
    CircuitEdge,
    CircuitNode,
    NodeScore,
    RoleEvidence,
)
from mechsafety.circuits.edges import connect, edges_into, estimate_edges, exact_edges, measure_edges
from mechsafety.circuits.faithfulness import FaithfulnessMeter
from mechsafety.circuits.roles import assign_roles, role_evidence
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.nodes import EMBED, Edge, Node
from mechsafety.patching import activation_patching
from mechsafety.patching.effects import effect_intervals, effect_p_values
from mechsafety.patching.masks import PairRuns

# exact effect, its interval, its adjusted p
Measured = tuple[float, tuple[float, float], float]
Roles = dict[Node, tuple[str, RoleEvidence]]


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
    roles: Mapping[Node, tuple[str, RoleEvidence]]
    linked: tuple[Edge, ...] = ()
    dropped: tuple[Node, ...] = ()


def pair_gaps(meters: Sequence[FaithfulnessMeter]) -> np.ndarray:
    """Metric of the harmful prompt less that of the harmless one, pair by pair, one meter's after the other's."""
    return np.concatenate([harmful - harmless for harmful, harmless in (meter.ends() for meter in meters)])


def single_effects(
    meters: Sequence[FaithfulnessMeter], nodes: Sequence[Node], budget: Budget, progress: bool
) -> dict[Node, np.ndarray]:
    """Exact effect of each node alone on every prompt, as a share of the mean gap, as far as time allows.

    Args:
        meters: What to measure on; their prompts follow each other.
        nodes: The most important first.
        budget: Time to keep.
        progress: Whether to show a bar.
    """
    gap = pair_gaps(meters).mean()
    found: dict[Node, np.ndarray] = {}
    with tqdm(total=len(nodes), desc="nodes", disable=not progress, leave=False) as bar:
        for some in budget.within(nodes, 12, 0.5, "exact effects of single nodes"):
            alone = sorted(some, key=lambda node: node.order)
            lost = [meter.ends()[0] - meter.removed([[node] for node in alone]) for meter in meters]
            found |= dict(zip(alone, np.concatenate(lost, axis=1) / gap, strict=True))
            bar.update(len(some))
    return {node: found[node] for node in nodes if node in found}


def with_intervals(effects: Mapping[Node, np.ndarray], gaps: np.ndarray, seed: int) -> dict[Node, Measured]:
    """Mean of each node's effect, its interval, and its sign-flip p adjusted over all nodes.

    Args:
        effects: On every prompt, as shares of the mean gap.
        gaps: Gap of every prompt, in units of the metric.
        seed: Of the resampling.
    """
    if not effects:
        return {}
    rows = torch.from_numpy(np.stack(list(effects.values())))
    intervals = effect_intervals(rows, torch.from_numpy(gaps / gaps.mean()), seed)
    means, p_values = rows.mean(1).tolist(), effect_p_values(rows, seed)
    return dict(zip(effects, zip(means, intervals, p_values, strict=True), strict=True))


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
        elsewhere = {other for other, its in second.items() if its.behind != backup.behind}
        others = {backup.behind, *backup.group, *elsewhere} - {node}
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
        roles[node] = (role, replace(evidence, backup_of=str(backup.behind), joint=backup.joint))
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


def circuit_nodes(
    nodes: Sequence[Node],
    attribution: NodeAttribution,
    measured: Mapping[Node, Measured],
    roles: Mapping[Node, tuple[str, RoleEvidence]],
    minimality: Mapping[str, float] | None,
) -> tuple[CircuitNode, ...]:
    """The circuit's nodes with effect, role and status; estimates where there was no time to measure."""
    rows = []
    for node in nodes:
        role, evidence = roles[node]
        if node not in measured:
            rows.append(CircuitNode(node, role, attribution.of(node), evidence=evidence))
            continue
        effect, ci, p_value = measured[node]
        verified = p_value < 0.05 and effect > 0 and (minimality or {}).get(str(node), 0.0) > 0
        rows.append(CircuitNode(node, role, effect, ci, p_value, "verified" if verified else "measured", evidence))
    return tuple(rows)


def node_scores(
    every: Sequence[Node], inside: Sequence[Node], attribution: NodeAttribution, measured: Mapping[Node, Measured]
) -> tuple[NodeScore, ...]:
    """Estimate and, where there is one, exact effect of every candidate."""
    chosen = set(inside)
    rows = []
    for node in every:
        effect, ci, p_value = measured.get(node, (None, None, None))
        rows.append(NodeScore(node, attribution.of(node), effect, ci, p_value, node in chosen))
    return tuple(rows)
