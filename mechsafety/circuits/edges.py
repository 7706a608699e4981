"""Edges between nodes: gradient estimates of every direct path, exact measurements of the strongest.

Both work on the model's own graph (no weight is read), so grouped queries, rotary embeddings, query-key norms and
parallel blocks need no cases of their own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from mechsafety.circuits.circuit import CircuitEdge
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.models.engine import (
    Hook,
    run_from,
)
from mechsafety.nodes import Edge, Node
from mechsafety.patching.masks import PairRuns
from mechsafety.patching.paths import measured_edges, node_outputs, reaches
from mechsafety.sites import Site, SiteKind


def estimate_edges(
    model: LensModel, runs: PairRuns, metric: RefusalLogOdds, nodes: Sequence[Node], *, steps: int = 5
) -> list[CircuitEdge]:
    """Edge attribution (EAP, Syed et al. 2023) between the given nodes and into the logits.

    Score of u -> v: (output of u, harmful less harmless) . (gradient of the metric in v's input), summed over
    positions, averaged over prompts, as a share of the gap. The gradient is averaged over ``steps`` blends of the two
    runs, every node's value interpolated (as in `node_attribution`), which is steadier than one gradient at the
    harmful run.

    Args:
        model: The model; head outputs must add up (no norm after attention).
        runs: Stored runs.
        metric: What is attributed.
        nodes: Heads and MLPs; edges among them and from them to the logits are scored.
        steps: Blends.

    Returns:
        All edges that run with the order of computation, strongest first.
    """
    ordered = sorted(nodes, key=lambda node: node.order)
    change = node_outputs(model, runs.harmful, ordered) - node_outputs(model, runs.harmless, ordered)
    harmful, harmless = runs.scores(metric)
    gap = float((harmful - harmless).mean()) * len(harmful)
    slots = [("logits", Node("logits"))] + [
        (slot, node) for node in ordered for slot in (("q", "k", "v") if node.kind == "head" else ("mlp",))
    ]
    totals: dict[Edge, float] = {}
    for step in range(steps):
        alpha = (step + 0.5) / steps
        inputs = _input_gradients(model, runs, metric, slots, alpha)
        for (slot, node), gradient in inputs.items():
            earlier = [k for k, sender in enumerate(ordered) if reaches(sender, node, parallel=model.parallel)]
            if not earlier:
                continue
            scores = einsum(change[earlier], gradient.float(), "node batch pos d, batch pos d -> node") / gap / steps
            if slot != "logits":
                scores = scores / alpha  # the receiver's own output is blended too, which an edge's effect is not
            for k, score in zip(earlier, scores.tolist(), strict=True):
                edge = Edge(ordered[k], node, "resid" if slot == "logits" else slot)
                totals[edge] = totals.get(edge, 0.0) + score
    found = [CircuitEdge(edge, score, "estimated", score) for edge, score in totals.items()]
    return sorted(found, key=lambda e: (-abs(e.effect), e.edge.sender.order, e.edge.receiver.order, e.edge.slot))


def measure_edges(
    model: LensModel, runs: PairRuns, metric: RefusalLogOdds, edges: Sequence[CircuitEdge]
) -> list[CircuitEdge]:
    """Exact effect of single edges (path patching, Wang et al. 2022, with everything else frozen up to the receiver).

    Sender u's change (harmless less harmful) is added to the input of receiver v's slot alone; v's output is recomputed
    from it; the rest of the model runs on live. The effect is the share of the gap lost.
    """
    harmful, harmless = runs.scores(metric)
    gap = float((harmful - harmless).mean())
    effects = (measured_edges(model, runs, metric, [member.edge for member in edges]).mean(1) / gap).tolist()
    return [
        CircuitEdge(member.edge, effect, "measured", member.estimate)
        for member, effect in zip(edges, effects, strict=True)
    ]


def _one_hot(indices: Sequence[int], size: int, like: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(indices, device=like.device), size).to(like.dtype)


@dataclass(frozen=True, slots=True)
class _Graph:
    """Activations of one blended run, attached to autograd."""

    acts: Mapping[Site, Tensor]
    grads: Mapping[Site, Tensor]


def _input_gradients(
    model: LensModel,
    runs: PairRuns,
    metric: RefusalLogOdds,
    slots: Sequence[tuple[str, Node]],
    alpha: float,
) -> dict[tuple[str, Node], Float[Tensor, "batch pos d_model"]]:
    """Gradient of the summed metric in the residual input of each (slot, node), at one blend of the two runs."""
    base, source = runs.harmful, runs.harmless.acts
    middle = SiteKind.RESID_PRE if model.parallel else SiteKind.RESID_MID
    acts: dict[Site, Tensor] = {}
    hooks: list[Hook] = []

    def keep(site: Site) -> None:
        def function(tensor: Tensor) -> Tensor:
            acts[site] = tensor
            return tensor  # a hook that returns nothing may have seen a reshaped copy that is off the graph

        hooks.append((site, function))

    def blend(site: Site, values: Tensor) -> None:
        def function(tensor: Tensor) -> Tensor:
            acts[site] = tensor
            return values + alpha * (tensor - values)

        hooks.append((site, function))

    for layer in range(model.n_layers):
        for kind in {SiteKind.RESID_PRE, middle, SiteKind.Q, SiteKind.K, SiteKind.V, SiteKind.SCORES}:
            keep(Site(kind, layer))
        blend(Site(SiteKind.Z, layer), source[SiteKind.Z][layer])
        blend(Site(SiteKind.MLP_OUT, layer), source[SiteKind.MLP_OUT][layer])
    final = Site(SiteKind.FINAL_NORM_IN)
    keep(final)
    with torch.enable_grad():
        resid = base.resid[0].clone().requires_grad_()
        score = metric(run_from(model, base, 0, resid, hooks)).sum()
        grads = torch.autograd.grad(score, list(acts.values()), retain_graph=True, allow_unused=True)
    graph = _Graph(acts, dict(zip(acts, grads, strict=True)))
    out: dict[tuple[str, Node], Tensor] = {}
    by_layer: dict[int, list[tuple[str, Node]]] = {}
    for slot, node in slots:
        if node.kind == "logits":
            out[slot, node] = torch.nn.functional.pad(graph.grads[final], (0, 0, base.n_pos - 1, 0))
        else:
            by_layer.setdefault(node.layer or 0, []).append((slot, node))
    for layer, wanted in by_layer.items():
        heads = [node.index or 0 for slot, node in wanted if slot == "q"]
        for slot in ("q", "k", "v") if heads else ():
            gradient = _slot_gradient(graph, layer, slot, heads, model)
            for row, head in enumerate(heads):
                out[slot, Node("head", layer, head)] = gradient[row]
        if any(slot == "mlp" for slot, _ in wanted):
            mlp, mid = Site(SiteKind.MLP_OUT, layer), Site(middle, layer)
            (out["mlp", Node("mlp", layer)],) = torch.autograd.grad(
                graph.acts[mlp], graph.acts[mid], graph.grads[mlp], retain_graph=True
            )
    return out


def _slot_gradient(
    graph: _Graph, layer: int, slot: str, heads: Sequence[int], model: LensModel
) -> Float[Tensor, "head batch pos d_model"]:
    """Gradient in the block's input through one slot of each head alone, one backward pass for all heads."""
    # a key-value head serves several heads: their shares are told apart where each head has its own tensor
    kind, via = {"q": (SiteKind.Q, None), "k": (SiteKind.K, SiteKind.SCORES), "v": (SiteKind.V, SiteKind.Z)}[slot]
    resid, target = graph.acts[Site(SiteKind.RESID_PRE, layer)], graph.acts[Site(kind, layer)]
    source = Site(via or kind, layer)
    pick = _one_hot(list(heads), model.n_heads, resid)
    shape = "variant head -> variant 1 head 1 1" if via is SiteKind.SCORES else "variant head -> variant 1 1 head 1"
    per_head = rearrange(pick, shape) * graph.grads[source]
    if via is not None:
        (per_head,) = torch.autograd.grad(
            graph.acts[source], target, per_head, retain_graph=True, is_grads_batched=True
        )
    (gradient,) = torch.autograd.grad(target, resid, per_head, retain_graph=True, is_grads_batched=True)
    return gradient
