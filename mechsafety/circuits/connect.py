"""A circuit is connected if every node lies on a path of kept edges from the embedding to the logits."""

from collections.abc import Callable, Collection, Sequence

import networkx as nx

from mechsafety.circuits.circuit import CircuitEdge
from mechsafety.circuits.edges import EMBED, LOGITS
from mechsafety.nodes import Edge, Node

FromEmbed = Callable[[Node], Sequence[CircuitEdge]]


def on_a_path(edges: Sequence[Edge]) -> set[Node]:
    """The nodes that lie on a path of these edges from ``embed`` to ``logits``, both ends included."""
    graph = nx.DiGraph()
    graph.add_nodes_from([EMBED, LOGITS])
    graph.add_edges_from((edge.sender, edge.receiver) for edge in edges)
    forward = nx.descendants(graph, EMBED) | {EMBED}
    backward = nx.ancestors(graph, LOGITS) | {LOGITS}
    return forward & backward


def connect(
    nodes: Sequence[Node],
    kept: Sequence[CircuitEdge],
    every: Sequence[CircuitEdge],
    from_embed: FromEmbed,
    sources: Collection[Node] = (),
) -> tuple[list[CircuitEdge], tuple[Edge, ...], tuple[Node, ...]]:
    """Keep the edges that connect every node, and drop the nodes that nothing connects.

    A node that no kept edge feeds (or that feeds nothing) gets its strongest edge from (or to) a node of the circuit,
    ``embed`` or ``logits``. One whose edges all carry nothing leaves the circuit.

    Args:
        nodes: The circuit's.
        kept: Edges that are kept anyway.
        every: All edges between the nodes and into the logits, measured or estimated.
        from_embed: Measures a node's edges from ``embed``; asked for nodes that no other feeds.
        sources: Nodes that need no edge in, because they read what no edge carries.

    Returns:
        The edges; those kept only as links; the nodes that were dropped.
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
    """Add the missing links; the nodes that have none to add."""
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
