"""Edges of a circuit: estimates of every direct path between its nodes, measurements of the strongest."""

from collections.abc import Sequence

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from mechsafety.attribution.edges import edge_attribution
from mechsafety.circuits.circuit import CircuitEdge
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.models.engine import run_from
from mechsafety.nodes import Edge, Node
from mechsafety.patching.masks import PairRuns, stored
from mechsafety.patching.paths import edge_logits, measured_edges, reaches
from mechsafety.sites import Site, SiteKind

EMBED, LOGITS = Node("embed"), Node("logits")
SLOTS = {"head": ("q", "k", "v"), "mlp": ("mlp",), "neuron": ("mlp",), "logits": ("resid",)}


def estimate_edges(
    model: LensModel, runs: PairRuns, metric: RefusalLogOdds, nodes: Sequence[Node], *, steps: int = 5
) -> list[CircuitEdge]:
    """All edges between the given nodes and into the logits, strongest first, by `edge_attribution`.

    The gradient is averaged over blends of all nodes (``mask-ig``), the path along which the nodes were ranked.
    """
    scores = edge_attribution(model, runs, metric, method="mask-ig", steps=steps, nodes=nodes, progress=False)
    return [CircuitEdge(edge, score, "estimated", score) for edge, score in scores.top()]


def measure_edges(
    model: LensModel, runs: PairRuns, metric: RefusalLogOdds, edges: Sequence[CircuitEdge]
) -> list[CircuitEdge]:
    """Exact effect of single edges (path patching, Wang et al. 2022, with everything else frozen up to the receiver).

    Sender u's change (harmless less harmful) is added to the input of receiver v's slot alone; v's output is recomputed
    from it; the rest of the model runs on live. The effect is the share of the gap lost.
    """
    harmful, harmless = runs.scores(metric)
    gap = float((harmful - harmless).mean())
    whole = {"head", "mlp", "logits"}
    plain = [k for k, m in enumerate(edges) if {m.edge.sender.kind, m.edge.receiver.kind} <= whole]
    effects = [0.0] * len(edges)
    found = measured_edges(model, runs, metric, [edges[k].edge for k in plain]).mean(1) / gap
    for k, value in zip(plain, found.tolist(), strict=True):
        effects[k] = value
    for k in sorted(set(range(len(edges))) - set(plain)):
        with torch.no_grad():
            changed = metric(_single_edge(model, runs, edges[k].edge))
        effects[k] = float((harmful - changed).mean()) / gap
    return [
        CircuitEdge(member.edge, effect, "measured", member.estimate)
        for member, effect in zip(edges, effects, strict=True)
    ]


def exact_edges(model: LensModel, runs: PairRuns, metric: RefusalLogOdds, nodes: Sequence[Node]) -> list[CircuitEdge]:
    """Every edge between the given nodes and into the logits, each measured, strongest first."""
    paths = [edge for node in nodes for edge in edges_into(node, [*nodes, LOGITS], parallel=model.parallel)]
    found = measure_edges(model, runs, metric, [CircuitEdge(edge, 0.0) for edge in paths])
    return sorted(found, key=lambda member: (-abs(member.effect), str(member.edge)))


def edges_into(sender: Node, nodes: Sequence[Node], *, parallel: bool) -> list[Edge]:
    """Every edge from a node to the given ones."""
    return [
        Edge(sender, node, slot)
        for node in nodes
        if sender.order[:2] < node.order[:2] and reaches(_whole(sender), _whole(node), parallel=parallel)
        for slot in SLOTS[node.kind]
    ]


def _whole(node: Node) -> Node:
    """The MLP of a neuron: both read and write the same streams."""
    return Node("mlp", node.layer) if node.kind == "neuron" else node


def output_change(model: LensModel, runs: PairRuns, node: Node) -> Float[Tensor, "batch pos d_model"]:
    """What a node writes to the residual stream, harmless less harmful; float32."""
    if node.kind == "embed":
        return (runs.harmless.resid[0] - runs.harmful.resid[0]).float()
    kind = {"head": SiteKind.Z, "mlp": SiteKind.MLP_OUT, "neuron": SiteKind.NEURONS}[node.kind]
    layer, index = node.layer or 0, node.index or 0
    change = (stored(runs.harmless.acts, kind)[layer] - stored(runs.harmful.acts, kind)[layer]).float()
    if node.kind == "head":
        weight = model.W_O(layer)[index].float()
        return einsum(change[:, :, index], weight, "batch pos d_head, d_head d_model -> batch pos d_model")
    if node.kind == "neuron":
        weight = model.W_out(layer)[index].float()
        return einsum(change[:, :, index], weight, "batch pos, d_model -> batch pos d_model")
    return change


def _single_edge(model: LensModel, runs: PairRuns, edge: Edge) -> Float[Tensor, "batch d_vocab"]:
    """Logits of the harmful run when the sender's change reaches the receiver's slot alone."""
    delta, base = output_change(model, runs, edge.sender), runs.harmful
    if edge.receiver.kind != "neuron":
        return edge_logits(model, base, [(edge.receiver, edge.slot)], rearrange(delta, "b p d -> 1 b p d"))[0]
    layer, index = edge.receiver.layer or 0, edge.receiver.index
    reads = base.resid[layer] if model.parallel else base.resid[layer + 1] - base.acts[SiteKind.MLP_OUT][layer]
    site, seen = Site(SiteKind.NEURONS, layer), list[Tensor]()
    with model.hooks([(site, lambda tensor: seen.append(tensor))]):
        model.mlp(layer, reads + delta.to(reads.dtype))

    def only(tensor: Tensor) -> Tensor:
        out = tensor.clone()
        out[:, :, index] = seen[0][:, :, index]
        return out

    return run_from(model, base, layer, base.resid[layer], [(site, only)])
