"""Parts whose loss is measured, and random parts like them."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from mechsafety.circuits.circuit import CircuitEdge, RefusalCircuit
from mechsafety.circuits.edge_faithfulness import all_edges
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Prompts, public
from mechsafety.interventions.checks import check_nodes, check_once
from mechsafety.interventions.nodes import reference_values
from mechsafety.interventions.steering import Direction
from mechsafety.models import LensModel
from mechsafety.nodes import NODE_SITES, Edge, Node, NodeLike, head_and_mlp_nodes
from mechsafety.sites import Site


def ranked_parts(model: LensModel, parts: RefusalCircuit | Sequence[NodeLike]) -> tuple[Node, ...]:
    """The parts in the order in which they are ablated: a circuit's by their effect, the largest first.

    Raises:
        MechsafetyError: No parts, one listed twice, or one that the model lacks.
    """
    if isinstance(parts, RefusalCircuit):
        members = [member for member in parts.nodes if member.node.layer is not None]
        parts = [member.node for member in sorted(members, key=lambda member: (-member.effect, member.node.order))]
    return check_nodes(model, parts)


def ranked_edges(model: LensModel, given: Sequence[Edge | CircuitEdge]) -> tuple[Edge, ...]:
    """The edges in the order in which they are cut.

    Raises:
        MechsafetyError: An edge that the model lacks, or that is listed twice.
    """
    edges = tuple(one.edge if isinstance(one, CircuitEdge) else one for one in given)
    known = set(_all_edges(model))
    unknown = [str(edge) for edge in edges if edge not in known]
    if unknown:
        raise MechsafetyError(
            f"{model.name} has no edge {unknown[0]}", expected="edges between its embedding, heads, MLPs and logits"
        )
    check_once([str(edge) for edge in edges], "edges")
    return edges


@public
def matched_ranking(model: LensModel, parts: Sequence[NodeLike], seed: int = 0) -> tuple[Node, ...]:
    """A random part for each of some parts, so that the first k random parts match the first k parts.

    Each random part is of the same kind and, while the layer has parts left that are not among the given ones, of the
    same layer. Otherwise it is of the nearest layer that has some left. A kind that has none left at all (a circuit can
    hold more than half of all MLPs) takes parts that are given themselves, in random order.

    Args:
        model: The model.
        parts: The parts to be matched, in their order.
        seed: Seed of the draw.

    Example:
        >>> [node.kind for node in ms.robustness.matched_ranking(model, ["L0.H1", "L3.MLP"])]
        ['head', 'mlp']
    """
    nodes = ranked_parts(model, parts)
    return _matched(nodes, _all_nodes(model, {node.kind for node in nodes}), _node_place, seed)


def matched_edges(model: LensModel, edges: Sequence[Edge], seed: int = 0) -> tuple[Edge, ...]:
    """A random edge for each of some edges, as in `matched_ranking`.

    Edges are of one kind if their ends are of the same kinds and they enter the same slot. Two edges are as far apart
    in layers as their senders and their receivers together.
    """
    return _matched(edges, _all_edges(model), _edge_place, seed)


# kind of a part, and its layers
_Place = tuple[tuple[str, ...], tuple[int, ...]]
P = TypeVar("P", Node, Edge)


def _matched(parts: Sequence[P], every: Iterable[P], place: Callable[[P], _Place], seed: int) -> tuple[P, ...]:
    rng, given = random.Random(seed), set(parts)
    left: dict[_Place, list[P]] = {}
    for part in every:
        left.setdefault(place(part), []).append(part)
    for pool in left.values():
        rng.shuffle(pool)
        pool.sort(key=lambda part: part not in given)  # drawn from the end: the given parts come last of all
    found = []
    for part in parts:
        kind, own = place(part)
        pools = [
            (pool[-1] in given, sum(abs(a - b) for a, b in zip(layers, own, strict=True)), layers, pool)
            for (other, layers), pool in left.items()
            if other == kind and pool
        ]
        found.append(min(pools, key=lambda row: row[:3])[3].pop())
    return tuple(found)


def _node_place(node: Node) -> _Place:
    return (node.kind,), (node.layer or 0,)


def _edge_place(edge: Edge) -> _Place:
    # the embedding and the logits have no layer; any number that is the same for all will do
    return (edge.sender.kind, edge.receiver.kind, edge.slot), (edge.sender.layer or 0, edge.receiver.layer or 0)


def matched_directions(directions: Sequence[Direction], seed: int = 0) -> tuple[Direction, ...]:
    """A random direction for each of some directions: at the same sites, as long, removed in the same way.

    Each vector is drawn uniformly from all that are as long as the given one.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for direction in directions:
        drawn = torch.randn(direction.vectors.shape, generator=generator)
        length = direction.vectors.norm(dim=-1, keepdim=True).cpu()
        vectors = drawn / drawn.norm(dim=-1, keepdim=True) * length
        found.append(replace(direction, name=f"random for {direction.name}", vectors=vectors))
    return tuple(found)


def mean_values(model: LensModel, nodes: Iterable[Node], prompts: Prompts) -> dict[Site, Tensor]:
    """Mean over all tokens of the prompts at the site of each node, for `mechsafety.ablate`."""
    sites = dict.fromkeys(Site(NODE_SITES[node.kind], node.layer) for node in sorted(nodes, key=lambda n: n.order))
    return {
        site: values.mean(0, keepdim=True) for site, values in reference_values(model, list(sites), prompts).items()
    }


def _all_nodes(model: LensModel, kinds: set[str]) -> list[Node]:
    """All heads, MLPs and neurons of these kinds."""
    whole = [node for node in head_and_mlp_nodes(model.n_layers, model.n_heads) if node.kind in kinds]
    if "neuron" in kinds:
        whole += [Node("neuron", layer, index) for layer in range(model.n_layers) for index in range(model.d_mlp)]
    return whole


def _all_edges(model: LensModel) -> tuple[Edge, ...]:
    return all_edges(model.n_layers, model.n_heads, model.parallel)
