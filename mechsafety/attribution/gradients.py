"""Gradients of the metric in what every receiver reads, taken at points between the two runs of each pair.

All gradients come from autograd's graph of the model itself. Grouped queries, rotary embeddings, query-key norms and
parallel blocks therefore need no code of their own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal, get_args

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.models.engine import Hook, run_from
from mechsafety.nodes import NODE_SITES, Node
from mechsafety.patching.masks import PairRuns, blend
from mechsafety.patching.receivers import Receiver, normed_over_heads
from mechsafety.sites import Site, SiteKind

Grid = Literal["midpoint", "left", "gauss"]
GRIDS: tuple[Grid, ...] = get_args(Grid)
EMBEDDING = (Site(SiteKind.RESID_PRE, 0),)
# bytes of the neurons' derivatives that are held at once
DERIVATIVE_BYTES = 2**27

# function from the senders' changes [sender batch pos d_model] to their scores into some receivers [sender receiver]
Score = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Point:
    """A state of the model at which gradients are taken: the harmful run with some activations blended.

    Attributes:
        alpha: Weight of the harmful value; the harmless value has the weight 1 - alpha.
        sites: Activations that are blended; none at the harmful run itself.
        live: Whether the harmful value is what the run computes there, as with node masks, instead of the harmful run's
            stored value.
        senders: Rows of senders that are scored at this point: (first, one past the last).
        weight: Weight of this point in those rows' average.
    """

    alpha: float
    sites: tuple[Site, ...]
    live: bool
    senders: tuple[int, int]
    weight: float

    @property
    def whole(self) -> bool:
        """Whether the path that the point lies on leads from the harmless run to the harmful one."""
        return self.live or not self.sites or self.sites == EMBEDDING


def quadrature(grid: str, steps: int) -> list[tuple[float, float]]:
    """Points of an integral from 0 to 1, and their weights.

    Args:
        grid: ``midpoint``: the middles of equal parts; ``left``: their left ends, as in the code of Hanna et al. 2024;
            ``gauss``: Gauss-Legendre.
        steps: Number of points.

    Example:
        >>> quadrature("midpoint", 2), quadrature("left", 2)
        ([(0.25, 0.5), (0.75, 0.5)], [(0.0, 0.5), (0.5, 0.5)])
    """
    if grid == "gauss":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        return [((1 + float(x)) / 2, float(w) / 2) for x, w in zip(nodes, weights, strict=True)]
    shift = 0.5 if grid == "midpoint" else 0.0
    return [((step + shift) / steps, 1.0 / steps) for step in range(steps)]


def integration_points(
    model: LensModel, method: str, steps: int, senders: Sequence[Node], grid: Grid = "midpoint"
) -> list[Point]:
    """The points at which a method takes its gradients.

    Args:
        model: The model.
        method: ``eap``: the harmful run; ``eap-ig``: blends of the embeddings; ``mask-ig``: blends of all nodes;
            ``ig-activations``: for each sublayer that sends, blends of what it writes and of nothing else.
        steps: Number of points of each integral; ``eap`` has one.
        senders: The senders, in the order of computation.
        grid: As for `quadrature`.
    """
    every = (0, len(senders))
    if method == "eap":
        return [Point(1.0, (), False, every, 1.0)]
    nodes = quadrature(grid, steps)
    if method == "eap-ig":
        return [Point(alpha, EMBEDDING, False, every, weight) for alpha, weight in nodes]
    if method == "mask-ig":
        sites = [Site(kind, layer) for layer in range(model.n_layers) for kind in (SiteKind.Z, SiteKind.MLP_OUT)]
        return [Point(alpha, tuple(sites), True, every, weight) for alpha, weight in nodes]
    found, first = [], 0
    for site, group in groupby(senders, lambda node: written_at(model, node)):
        last = first + len(list(group))
        found += [Point(alpha, (site,), False, (first, last), weight) for alpha, weight in nodes]
        first = last
    return found


def written_at(model: LensModel, node: Node) -> Site:
    """The activation of the whole sublayer to which a sender belongs.

    The residual stream must be linear in this activation. If a norm follows the heads, it is therefore the norm's
    output.
    """
    if node.kind == "embed":
        return Site(SiteKind.RESID_PRE, 0)
    heads = SiteKind.ATTN_OUT if model.post_norm else SiteKind.Z
    return Site(heads if node.kind == "head" else SiteKind.MLP_OUT, node.layer)


def receiver_scores(
    model: LensModel,
    runs: PairRuns,
    metric: RefusalLogOdds,
    receivers: Sequence[Receiver],
    reached: Sequence[int],
    point: Point,
) -> tuple[float, Iterator[tuple[list[int], Score]]]:
    """The slope at one point (see `slope`), and functions that score senders into each receiver there.

    The functions come as (columns, score), one per slot of a layer. ``columns`` are indices of ``receivers``.
    ``score(change)`` is the first-order change of the summed metric when each sender's ``change`` [sender batch pos
    d_model] is added to what the receivers read.

    Args:
        model: The model.
        runs: Stored runs of the pairs.
        metric: What is differentiated.
        receivers: (node, slot) pairs.
        reached: For each receiver, how many of the first senders write into its input. Receivers that no sender of the
            point reaches are left out.
        point: Where the gradient is taken.
    """
    groups: dict[tuple[str, int | None, str], list[int]] = {}
    for column, (node, slot) in enumerate(receivers):
        if reached[column] > point.senders[0]:
            groups.setdefault((node.kind, node.layer, slot), []).append(column)
    graph = _graph(model, runs, metric, groups, point)
    return graph.slope, _scores(model, graph, groups, receivers, point)


def _scores(
    model: LensModel,
    graph: "_Graph",
    groups: Mapping[tuple[str, int | None, str], list[int]],
    receivers: Sequence[Receiver],
    point: Point,
) -> Iterator[tuple[list[int], Score]]:
    # a live blend scales a receiver's own output by alpha, which is not part of the edge's effect
    scale = 1.0 / point.alpha if point.live else 1.0
    for (kind, layer, slot), columns in groups.items():
        indices = [receivers[column][0].index or 0 for column in columns]
        if layer is None:
            # only the last position's logits are read
            final = graph.grads[Site(SiteKind.FINAL_NORM_IN)][:, -1:]
            yield columns, _product(rearrange(final, "batch pos d -> 1 batch pos d"))
        elif kind == "head":
            yield columns, _product(scale * _slot_gradient(graph, layer, slot, indices, model))
        elif kind == "mlp":
            mlp, read = Site(SiteKind.MLP_OUT, layer), Site(_middle(model), layer)
            (gradient,) = torch.autograd.grad(graph.acts[mlp], graph.acts[read], graph.grads[mlp], retain_graph=True)
            yield columns, _product(scale * rearrange(gradient, "batch pos d -> 1 batch pos d"))
        else:
            yield columns, _neuron_score(graph, model, layer, indices, scale)


@dataclass(frozen=True, slots=True)
class _Graph:
    """Activations of one run in autograd's graph, the summed metric's gradients in them, and the path's slope."""

    acts: Mapping[Site, Tensor]
    grads: Mapping[Site, Tensor]
    slope: float


def _graph(
    model: LensModel,
    runs: PairRuns,
    metric: RefusalLogOdds,
    groups: Mapping[tuple[str, int | None, str], Sequence[int]],
    point: Point,
) -> _Graph:
    acts: dict[Site, Tensor] = {}

    def keep(site: Site) -> Callable[[Tensor], Tensor]:
        def function(tensor: Tensor) -> Tensor:
            acts[site] = tensor
            return tensor  # without this return, the hook may have seen a reshaped copy that is not on the graph

        return function

    wanted = [Site(SiteKind.FINAL_NORM_IN)]
    for kind, layer, _ in groups:
        if layer is not None:
            wanted += [Site(part, layer) for part in _parts(model, kind)]
    hooks: list[Hook] = [(site, keep(site)) for site in dict.fromkeys(wanted)]
    with torch.enable_grad():
        step = torch.zeros((), device=model.device, requires_grad=True)
        first, start, blends = _at(runs, point, step)
        start = start.clone().requires_grad_()
        logits = run_from(model, runs.harmful, first, start, [*hooks, *blends])
        # the slope comes with the same backward pass
        leaves = [*acts.values(), step]
        *grads, along = torch.autograd.grad(metric(logits).sum(), leaves, retain_graph=True, allow_unused=True)
    return _Graph(acts, dict(zip(acts, grads, strict=True)), float(along))


def _at(
    runs: PairRuns, point: Point, step: Tensor | None = None
) -> tuple[int, Float[Tensor, "batch pos d_model"], list[Hook]]:
    """A point of a path: first block to run, its input, and the edits of what follows.

    Args:
        runs: Stored runs of the pairs.
        point: The point. If it names no site, it is the end of the embeddings' path.
        step: Moves the point along the path by this much. It is a zero, and the derivative in it is the path's slope.
    """
    base, source = runs.harmful, runs.harmless
    first = min((site.layer or 0 for site in point.sites), default=0)
    start, hooks = base.resid[first], list[Hook]()
    for site in point.sites or EMBEDDING:
        if site.kind is SiteKind.RESID_PRE:
            low, high = source.resid[first], start
            start = low + point.alpha * (high - low) if point.sites else high
            start = start if step is None else start + step * (high - low)
        else:
            own = None if point.live else base.acts[site.kind][site.layer]
            hooks.append((site, _blended(source.acts[site.kind][site.layer], point.alpha, own, step)))
    return first, start, hooks


def _blended(values: Tensor, alpha: float, own: Tensor | None, step: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The edit that blends (see `blend`), and then moves along the path by ``step``."""
    mix = blend(values, alpha, own)
    if step is None:
        return mix
    return lambda tensor: mix(tensor) + (step * ((tensor if own is None else own) - values)).to(tensor.dtype)


def slope(model: LensModel, runs: PairRuns, metric: RefusalLogOdds, point: Point) -> float:
    """Derivative of the summed metric along a point's path, which is the embeddings' path if it names no site."""
    with torch.enable_grad():
        step = torch.zeros((), device=model.device, requires_grad=True)
        first, start, blends = _at(runs, point, step)
        (found,) = torch.autograd.grad(metric(run_from(model, runs.harmful, first, start, blends)).sum(), step)
    return float(found)


def path_start(model: LensModel, runs: PairRuns, metric: RefusalLogOdds, point: Point) -> Float[Tensor, " batch"]:
    """Metric where the path begins: blended activations have their harmless values, all else is the harmful run's."""
    first, start, blends = _at(runs, replace(point, alpha=0.0))
    with torch.no_grad():
        return metric(run_from(model, runs.harmful, first, start, blends))


def _parts(model: LensModel, kind: str) -> tuple[SiteKind, ...]:
    """The activations of a layer that its receivers of one kind need."""
    if kind == "head":
        return (SiteKind.RESID_PRE, SiteKind.Q, SiteKind.K, SiteKind.V, SiteKind.SCORES, SiteKind.Z)
    return (_middle(model), NODE_SITES[kind])


def _middle(model: LensModel) -> SiteKind:
    """The stream that the MLP reads."""
    return SiteKind.RESID_PRE if model.parallel else SiteKind.RESID_MID


def _product(gradient: Float[Tensor, "receiver batch pos d_model"]) -> Score:
    # a gradient of the last columns alone is multiplied with the senders' last columns
    return lambda change: einsum(
        change[:, :, -gradient.shape[2] :],
        gradient.float(),
        "sender batch pos d, receiver batch pos d -> sender receiver",
    )


def _slot_gradient(
    graph: _Graph, layer: int, slot: str, heads: Sequence[int], model: LensModel
) -> Float[Tensor, "head batch pos d_model"]:
    """Gradient in the block's input through one slot of each head alone; one backward pass serves all heads."""
    # several heads share a key-value head, or a norm over all queries; their shares are separated at an activation in
    # which each head has a tensor of its own
    q_via = SiteKind.SCORES if normed_over_heads(model, layer, "q") else None
    kind, via = {"q": (SiteKind.Q, q_via), "k": (SiteKind.K, SiteKind.SCORES), "v": (SiteKind.V, SiteKind.Z)}[slot]
    resid, target = graph.acts[Site(SiteKind.RESID_PRE, layer)], graph.acts[Site(kind, layer)]
    source = Site(via or kind, layer)
    pick = torch.nn.functional.one_hot(torch.tensor(list(heads), device=resid.device), model.n_heads).to(resid.dtype)
    shape = "variant head -> variant 1 head 1 1" if via is SiteKind.SCORES else "variant head -> variant 1 1 head 1"
    per_head = rearrange(pick, shape) * graph.grads[source]
    if via is not None:
        (per_head,) = torch.autograd.grad(
            graph.acts[source], target, per_head, retain_graph=True, is_grads_batched=True
        )
    (gradient,) = torch.autograd.grad(target, resid, per_head, retain_graph=True, is_grads_batched=True)
    return gradient


def _neuron_score(graph: _Graph, model: LensModel, layer: int, neurons: Sequence[int], scale: float) -> Score:
    """Score into single neurons: the derivative of every neuron along a sender's change, times the neuron's gradient.

    A gradient in the MLP's input for each neuron alone would be a tensor [neuron batch pos d_model]. The derivative
    along a sender's change is only [batch pos neuron]. The pull-back is linear in what is pulled back. The derivative
    of the pull-back is therefore the push-forward.
    """
    out, read = graph.acts[Site(SiteKind.NEURONS, layer)], graph.acts[Site(_middle(model), layer)]
    probe = torch.zeros_like(out).requires_grad_()
    with torch.enable_grad():
        (pulled,) = torch.autograd.grad(out, read, probe, create_graph=True)
    chosen = torch.tensor(list(neurons), device=out.device)
    weight = scale * graph.grads[Site(SiteKind.NEURONS, layer)].float()[..., chosen]
    size = max(1, DERIVATIVE_BYTES // (4 * out.numel()))

    def score(change: Tensor) -> Tensor:
        rows = []
        for part in change.to(pulled.dtype).split(size):
            (moved,) = torch.autograd.grad(pulled, probe, part, retain_graph=True, is_grads_batched=True)
            rows.append(
                einsum(moved[..., chosen].float(), weight, "sender batch pos neuron, batch pos neuron -> sender neuron")
            )
        return torch.cat(rows)

    return score
