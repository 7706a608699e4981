"""Parts whose loss is measured, and random parts like them."""

import random
from collections.abc import Iterable, Sequence

from torch import Tensor

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.inputs import Prompts, public
from mechsafety.interventions.checks import check_nodes
from mechsafety.interventions.nodes import reference_values
from mechsafety.models import LensModel
from mechsafety.nodes import NODE_SITES, Node, NodeLike, head_and_mlp_nodes
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

    Example::

        matched_ranking(model, ["L4.H2", "L4.H3"])  # two other heads of layer 4
    """
    nodes, rng = ranked_parts(model, parts), random.Random(seed)
    given = set(nodes)
    left: dict[tuple[str, int], list[Node]] = {}
    for node in _all_of(model, {node.kind for node in nodes}):
        left.setdefault((node.kind, node.layer or 0), []).append(node)
    for pool in left.values():
        rng.shuffle(pool)
        pool.sort(key=lambda node: node not in given)  # drawn from the end: the given parts come last of all
    found = []
    for node in nodes:
        pools = [
            (pool[-1] in given, abs(layer - (node.layer or 0)), layer, pool)
            for (kind, layer), pool in left.items()
            if kind == node.kind and pool
        ]
        found.append(min(pools, key=lambda row: row[:3])[3].pop())
    return tuple(found)


def mean_values(model: LensModel, nodes: Iterable[Node], prompts: Prompts) -> dict[Site, Tensor]:
    """Mean over all tokens of the prompts at the site of each node, for `mechsafety.ablate`."""
    sites = dict.fromkeys(Site(NODE_SITES[node.kind], node.layer) for node in sorted(nodes, key=lambda n: n.order))
    return {
        site: values.mean(0, keepdim=True) for site, values in reference_values(model, list(sites), prompts).items()
    }


def _all_of(model: LensModel, kinds: set[str]) -> list[Node]:
    """All heads, MLPs and neurons of these kinds."""
    whole = [node for node in head_and_mlp_nodes(model.n_layers, model.n_heads) if node.kind in kinds]
    if "neuron" in kinds:
        whole += [Node("neuron", layer, index) for layer in range(model.n_layers) for index in range(model.d_mlp)]
    return whole
