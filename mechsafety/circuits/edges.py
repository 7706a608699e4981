"""Edges of a circuit: estimates of every direct path between its nodes, measurements of the strongest."""

from collections.abc import Sequence

import torch

from mechsafety.attribution.edges import edge_attribution
from mechsafety.circuits.circuit import CircuitEdge
from mechsafety.inputs import Count, public
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.nodes import Edge, Node
from mechsafety.patching.masks import PairRuns
from mechsafety.patching.paths import measured_edges
from mechsafety.patching.receivers import SLOTS, reaches

EMBED, LOGITS = Node("embed"), Node("logits")


@public
def estimate_edges(
    model: LensModel, runs: PairRuns, metric: RefusalLogOdds, nodes: Sequence[Node], *, steps: Count = 5
) -> list[CircuitEdge]:
    """All edges between the given nodes and into the logits, strongest first, by `edge_attribution`.

    The gradient is averaged over blends of all nodes (``mask-ig``), the path along which the nodes were ranked.
    """
    scores = edge_attribution(model, runs, metric, method="mask-ig", steps=steps, nodes=nodes, progress=False)
    return [CircuitEdge(edge, score, "estimated", score) for edge, score in scores.top()]


@public
def measure_edges(
    model: LensModel, runs: Sequence[PairRuns], metric: RefusalLogOdds, edges: Sequence[CircuitEdge]
) -> list[CircuitEdge]:
    """Exact effect of single edges (path patching, Wang et al. 2022, with everything else frozen up to the receiver).

    Sender u's change (harmless less harmful) is added to the input of receiver v's slot alone; v's output is recomputed
    from it; the rest of the model runs on live. The effect is the share of the gap lost.

    Args:
        model: The model.
        runs: Stored runs of the pairs, in one or several groups.
        metric: What is measured.
        edges: What to measure.
    """
    paths = [member.edge for member in edges]
    gap = torch.cat([harmful - harmless for harmful, harmless in (group.scores(metric) for group in runs)]).mean()
    changes = torch.cat([measured_edges(model, group, metric, paths) for group in runs], dim=1)
    effects = (changes.mean(1) / gap).tolist()
    return [
        CircuitEdge(member.edge, effect, "measured", member.estimate)
        for member, effect in zip(edges, effects, strict=True)
    ]


def exact_edges(
    model: LensModel, runs: Sequence[PairRuns], metric: RefusalLogOdds, nodes: Sequence[Node]
) -> list[CircuitEdge]:
    """Every edge between the given nodes and into the logits, each measured, strongest first."""
    paths = [edge for node in nodes for edge in edges_into(node, [*nodes, LOGITS], parallel=model.parallel)]
    found = measure_edges(model, runs, metric, [CircuitEdge(edge, 0.0) for edge in paths])
    return sorted(found, key=lambda member: (-abs(member.effect), str(member.edge)))


def edges_into(sender: Node, nodes: Sequence[Node], *, parallel: bool) -> list[Edge]:
    """Every edge from a node to the given ones."""
    return [
        Edge(sender, node, slot)
        for node in nodes
        if sender.order[:2] < node.order[:2] and reaches(sender, node, parallel=parallel)
        for slot in SLOTS[node.kind]
    ]
