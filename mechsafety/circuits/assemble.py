"""Rows of a circuit's result: its nodes, and every candidate."""

from collections.abc import Mapping, Sequence

from mechsafety.attribution import NodeAttribution
from mechsafety.circuits.circuit import CircuitNode, NodeScore, Role, RoleEvidence
from mechsafety.circuits.effects import Measured
from mechsafety.circuits.goal import Goal
from mechsafety.nodes import Node


def circuit_nodes(
    nodes: Sequence[Node],
    attribution: NodeAttribution,
    measured: Mapping[Node, Measured],
    roles: Mapping[Node, tuple[Role, RoleEvidence]],
    minimality: Mapping[str, float] | None,
    goal: Goal,
) -> tuple[CircuitNode, ...]:
    """The circuit's nodes with effect, role and status; estimates where there was no time to measure."""
    rows = []
    for node in nodes:
        role, evidence = roles[node]
        if node not in measured:
            rows.append(CircuitNode(node, role, attribution.of(node), evidence=evidence))
            continue
        effect, ci, p_value = measured[node]
        marginal = (minimality or {}).get(str(node), 0.0)
        # a circuit that matches the model also needs the nodes that work against the behaviour
        needed = min(effect, marginal) > 0 or (goal.kind == "match" and max(effect, marginal) < 0)
        verified = p_value < 0.05 and needed
        rows.append(CircuitNode(node, role, effect, ci, p_value, "verified" if verified else "measured", evidence))
    return tuple(rows)


def node_scores(
    every: Sequence[Node], inside: Sequence[Node], attribution: NodeAttribution, measured: Mapping[Node, Measured]
) -> tuple[NodeScore, ...]:
    """Estimate of every candidate, and its exact effect where that was measured."""
    chosen = set(inside)
    rows = []
    for node in every:
        effect, ci, p_value = measured.get(node, (None, None, None))
        rows.append(NodeScore(node, attribution.of(node), effect, ci, p_value, node in chosen))
    return tuple(rows)
