"""Edges of a circuit: estimates between its nodes, exact effects of the strongest, and the edges that connect it.

A circuit is connected if every node lies on a path of kept edges from ``embed`` to ``logits``.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import networkx as nx
import numpy as np
import torch

from mechsafety.attribution.edges import edge_attribution
from mechsafety.circuits.circuit import CircuitEdge
from mechsafety.inputs import Count, public
from mechsafety.intervals import ratio_intervals
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.nodes import EMBED, LOGITS, SLOTS, Edge, Node
from mechsafety.patching.masks import PairRuns
from mechsafety.patching.paths import measured_edges
from mechsafety.patching.receivers import reaches
from mechsafety.scale.work import sweeps

FromEmbed = Callable[[Node], Sequence[CircuitEdge]]
# an edge carries something if it has at least this share of the effect of one of its ends
SOME = 0.1


@public
def estimate_edges(
    model: LensModel, runs: PairRuns, metric: RefusalLogOdds, nodes: Sequence[Node], *, steps: Count = 5
) -> list[CircuitEdge]:
    """All edges between the given nodes and into the logits, strongest first, by `edge_attribution`.

    The gradient is averaged over blends of all nodes (``mask-ig``). The nodes were ranked along the same path.

    Example:
        >>> edges = ms.circuits.estimate_edges(model, runs, metric, made.truth.nodes)
        >>> str(edges[0].edge), edges[0].status
        ('L3.H1 -> L3.MLP (mlp)', 'estimated')
    """
    scores = edge_attribution(model, runs, metric, method="mask-ig", steps=steps, nodes=nodes, progress=False)
    return [CircuitEdge(edge, score, "estimated", score) for edge, score in scores.top()]


@sweeps
@public
def measure_edges(
    model: LensModel,
    runs: Sequence[PairRuns],
    metric: RefusalLogOdds,
    edges: Sequence[CircuitEdge],
    gaps: Sequence[float] | None = None,
) -> list[CircuitEdge]:
    """Exact effect of single edges (path patching, Wang et al. 2022, with everything else frozen up to the receiver).

    1. The change of the sender (harmless less harmful) is added to the input of the receiver's slot alone.
    2. The receiver's output is recomputed from this input.
    3. The rest of the model runs live. The effect is the share of the gap that is lost, with its interval over pairs.

    Args:
        model: The model.
        runs: Stored runs of the pairs, in one or several groups.
        metric: The metric to measure.
        edges: The edges to measure.
        gaps: Gap of each pair that effects are shares of; by default that of the runs.

    Example:
        >>> edges = ms.circuits.estimate_edges(model, runs, metric, made.truth.nodes)
        >>> exact = ms.circuits.measure_edges(model, [runs], metric, edges[:1])
        >>> exact[0].status
        'measured'
    """
    if not edges:
        return []
    paths = [member.edge for member in edges]
    own = torch.cat([harmful - harmless for harmful, harmless in (group.scores(metric) for group in runs)])
    whole = own.cpu().double().numpy() if gaps is None else np.asarray(gaps, dtype=np.float64)
    changes = torch.cat([measured_edges(model, group, metric, paths) for group in runs], dim=1).cpu().double().numpy()
    effects = (changes.mean(1) / whole.mean()).tolist()
    intervals = ratio_intervals(changes, whole)
    return [
        CircuitEdge(member.edge, effect, "measured", member.estimate, ends)
        for member, effect, ends in zip(edges, effects, intervals, strict=True)
    ]


def carrying(edges: Sequence[CircuitEdge], effects: Mapping[Node, float]) -> list[CircuitEdge]:
    """The measured edges that carry something.

    The interval of such an edge's effect does not hold 0. And the effect is at least a tenth of that of the sender or
    of the receiver.

    Args:
        edges: Measured edges.
        effects: Effect of each node in the same runs.
    """
    return [
        member
        for member in edges
        if member.ci is not None
        and not member.ci[0] <= 0 <= member.ci[1]
        and abs(member.effect)
        >= SOME
        * min(
            (abs(effects[node]) for node in (member.edge.sender, member.edge.receiver) if node in effects),
            default=0.0,  # from the embedding straight to the logits
        )
    ]


def edges_into(sender: Node, nodes: Sequence[Node], *, parallel: bool) -> list[Edge]:
    """Every edge from a node to the given ones."""
    return [
        Edge(sender, node, slot)
        for node in nodes
        if sender.order[:2] < node.order[:2] and reaches(sender, node, parallel=parallel)
        for slot in SLOTS[node.kind]
    ]


def on_a_path(edges: Sequence[Edge]) -> set[Node]:
    """The nodes that lie on a path of these edges from ``embed`` to ``logits``, both ends included."""
    graph = nx.DiGraph()
    graph.add_nodes_from([EMBED, LOGITS])
    graph.add_edges_from((edge.sender, edge.receiver) for edge in edges)
    forward = nx.descendants(graph, EMBED) | {EMBED}
    backward = nx.ancestors(graph, LOGITS) | {LOGITS}
    between: set[Node] = forward & backward
    return between


def connect(
    nodes: Sequence[Node],
    kept: Sequence[CircuitEdge],
    every: Sequence[CircuitEdge],
    from_embed: FromEmbed,
    sources: Collection[Node] = (),
) -> tuple[list[CircuitEdge], tuple[Edge, ...], tuple[Node, ...]]:
    """Keep the edges that connect every node, and drop the nodes that nothing connects.

    A node that no kept edge feeds gets its strongest edge from a node of the circuit or from ``embed``. A node that
    feeds nothing gets its strongest edge to a node of the circuit or to ``logits``. A node all of whose edges have the
    effect 0 leaves the circuit.

    Args:
        nodes: The nodes of the circuit.
        kept: Edges that are kept in any case.
        every: All edges between the nodes and into the logits, measured or estimated.
        from_embed: Function that measures a node's edges from ``embed``; called for nodes that no kept edge feeds.
        sources: Nodes that need no incoming edge, because they read something that no edge carries.

    Returns:
        The edges; those among them that were kept only as links; the nodes that were dropped.
    """
    alive = sorted(nodes, key=lambda node: node.order)
    dropped: list[Node] = []
    known: dict[Node, Sequence[CircuitEdge]] = {}
    links: dict[Edge, CircuitEdge] = {}
    while True:
        inside = {*alive, EMBED, LOGITS}
        edges = {member.edge: member for member in kept if _within(member, inside)}
        links = {}
        lost = _link(alive, edges, links, every, inside, known, from_embed, sources)
        if not lost:
            break
        dropped += lost
        alive = [node for node in alive if node not in lost]
    rest = sorted({**edges, **links}.values(), key=lambda member: -abs(member.effect))
    return rest, tuple(links), tuple(sorted(dropped, key=lambda node: node.order))


def _link(
    alive: Sequence[Node],
    edges: dict[Edge, CircuitEdge],
    links: dict[Edge, CircuitEdge],
    every: Sequence[CircuitEdge],
    inside: set[Node],
    known: dict[Node, Sequence[CircuitEdge]],
    from_embed: FromEmbed,
    sources: Collection[Node],
) -> list[Node]:
    """Add the missing links; stop at a node without a possible link and return it."""
    for incoming in (True, False):
        for node in alive if incoming else reversed(alive):
            have = [e for e in (*edges, *links) if (e.receiver if incoming else e.sender) == node]
            if have or (incoming and node in sources):
                continue
            choices = [m for m in every if (m.edge.receiver if incoming else m.edge.sender) == node]
            choices = [m for m in choices if _within(m, inside) and m.effect != 0.0]
            if incoming:
                if node not in known:
                    known[node] = [m for m in from_embed(node) if m.effect != 0.0]
                choices += known[node]
            if not choices:
                return [node]
            best = max(choices, key=lambda m: abs(m.effect))
            links[best.edge] = best
    return []


def _within(member: CircuitEdge, inside: set[Node]) -> bool:
    return member.edge.sender in inside and member.edge.receiver in inside
