"""Gradient attribution of every node: an estimate of what patching would measure."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter

import pandas as pd
import plotly.graph_objects as go
import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from mechsafety.inputs import Count, public
from mechsafety.metrics import RefusalLogOdds, check_gap
from mechsafety.models import LensModel
from mechsafety.nodes import Node, NodeLike, as_node, head_and_mlp_nodes
from mechsafety.patching.effects import total_gap
from mechsafety.patching.masks import PairRuns, SoftMask, aligned_pairs, masked_logits, pair_batches
from mechsafety.progress import progress_bar
from mechsafety.prompts import PromptPairs, omissions
from mechsafety.results import Provenance, Result, bars
from mechsafety.scale.work import sweeps, work
from mechsafety.sites import SiteKind

# pairs x columns that are attributed at once; in a 135M model their graph takes about 2 MB per column
BATCH_TOKENS = 256


@dataclass(frozen=True, slots=True)
class NodeAttribution(Result):
    """Estimated share of the metric gap that each node carries; the shares sum to one.

    Attributes:
        provenance: Model, options, versions.
        metric: Name and tokens of the metric.
        heads, mlps: Estimates for heads and MLPs.
        neurons: Estimates for neurons; None if they were not computed. Those of a layer sum to what its MLP carries,
            unless a norm follows the MLP.
        total: Sum over heads and MLPs (or neurons); its distance from 1 is the integration's error.

    Example:
        >>> found = ms.node_attribution(model, pairs, metric)
        >>> [str(node) for node in found.ranked()[:2]]
        ['L0.H1', 'L3.MLP']
        >>> found.of("L0.H1") > 0.5
        True
    """

    provenance: Provenance
    metric: dict[str, object]
    heads: Float[Tensor, "layer head"]
    mlps: Float[Tensor, " layer"]
    neurons: Float[Tensor, "layer d_mlp"] | None
    total: float

    def __repr__(self) -> str:
        return f"NodeAttribution({self.heads.numel()} heads, {self.mlps.numel()} MLPs, sum {self.total:.3f})"

    def of(self, node: NodeLike) -> float:
        """The estimate of one node."""
        node = as_node(node)
        if node.kind == "head":
            return float(self.heads[node.layer, node.index])
        if node.kind == "neuron" and self.neurons is not None:
            return float(self.neurons[node.layer, node.index])
        return float(self.mlps[node.layer])

    def ranked(self) -> list[Node]:
        """Heads and MLPs, largest absolute estimate first."""
        nodes = head_and_mlp_nodes(*self.heads.shape)
        return sorted(nodes, key=lambda node: (-abs(self.of(node)), node.order))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per head or MLP, largest absolute estimate first."""
        rows = [(str(node), node.kind, node.layer, node.index, self.of(node)) for node in self.ranked()]
        frame = pd.DataFrame(rows, columns=["node", "kind", "layer", "index", "estimate"])
        return frame.astype({"index": "Int64"})  # an MLP has none

    def plot(self) -> go.Figure:
        """Bar chart of the 30 largest estimates."""
        return bars(self.to_dataframe(), "node", "estimate", "estimated share of the gap")


@sweeps
@public
def node_attribution(
    model: LensModel,
    pairs: PromptPairs | PairRuns,
    metric: RefusalLogOdds,
    *,
    steps: Count = 8,
    neurons: bool = False,
    progress: bool = True,
) -> NodeAttribution:
    """Integrated gradients over node masks (Sundararajan et al. 2017, eq. 1, with nodes as the features).

    Every node's value is a blend: alpha times the value that it computes in the blended run itself, plus 1 - alpha
    times its value in the harmless run. The score of a node is the integral, over alpha, of the metric's gradient in
    the node's own weight alpha. At alpha = 0 the model computes the harmless run, at alpha = 1 the harmful run. The
    scores therefore sum to the whole gap (completeness).

    Args:
        model: The model.
        pairs: Pairs, of which only those that align are used; or their stored runs.
        metric: What is attributed.
        steps: Number of midpoints of the integral.
        neurons: Attribute neurons instead of whole MLPs. The MLP scores are then the sums of their neurons' scores.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: Neurons of a mixture of experts are wanted, or no pair aligns.

    Example:
        >>> found = ms.node_attribution(model, pairs, metric)
        >>> found.to_dataframe().node.head(2).tolist()
        ['L0.H1', 'L3.MLP']
    """
    if neurons:
        model.check_neurons()
    pairs = aligned_pairs(model, pairs)
    batches = pair_batches(model, pairs, BATCH_TOKENS, [SiteKind.NEURONS] if neurons else [])
    sums, gap, n_pairs, scored = _zero_grads(model, neurons), 0.0, 0, []
    runs_of = lru_cache(maxsize=1)(lambda number: batches[number]())

    def gradients(item: tuple[int, int]) -> tuple[Tensor, ...]:
        runs = runs_of(item[0])
        return (*runs.ends(metric), *mask_gradients(model, runs, metric, (item[1] + 0.5) / steps, neurons=neurons))

    items = [(number, step) for number in range(len(batches)) for step in range(steps)]
    found = work("nodes", items, gradients, tuple[Tensor, ...], group=itemgetter(0))
    with progress_bar(total=len(items), desc="nodes", show=progress) as bar:
        for (_, step), (harmful, harmless, *grads) in zip(items, found, strict=True):
            if not step:
                gap += total_gap(harmful, harmless)
                scored.append((harmful, harmless))
                n_pairs += len(harmful)
            own = [grad.to(model.device) for grad in grads]
            sums = [total + grad * len(harmful) / steps for total, grad in zip(sums, own, strict=True)]
            bar.update()
    check_gap(*(torch.cat(side) for side in zip(*scored, strict=True)))
    heads, parts = (total.detach() / gap for total in sums)
    mlps = parts.sum(-1) if neurons else parts
    options = {"steps": steps, "neurons": neurons, "pairs": n_pairs, **omissions(pairs)}
    total = float(heads.sum() + mlps.sum())
    provenance = model.provenance(options=options)
    return NodeAttribution(provenance, metric.to_json(), heads, mlps, parts if neurons else None, total)


def mask_gradients(
    model: LensModel,
    runs: PairRuns,
    metric: RefusalLogOdds,
    alpha: float,
    *,
    neurons: bool = False,
    live: tuple[Tensor, Tensor] | None = None,
    each: bool = False,
) -> Sequence[Tensor]:
    """Gradient of the mean metric in every node's mask, with all live nodes at ``alpha``.

    Args:
        model: The model.
        runs: Stored runs of the pairs; the harmful ones are edited.
        metric: What is differentiated.
        alpha: Weight of each live node's own value.
        neurons: Put masks on neurons instead of MLP outputs.
        live: Masks ([layer head], [layer] or [layer d_mlp]) of the nodes that are live; the others stay at 0.
        each: Give each pair its own masks, and take the gradients of each pair's own metric.

    Returns:
        Gradients [layer head] and [layer] (or [layer d_mlp]); with ``each`` they have a first axis of pairs.
    """
    shapes = _zero_grads(model, neurons)
    masks = []
    for index, zeros in enumerate(shapes):
        on = torch.ones_like(zeros) if live is None else live[index].to(zeros)
        on = repeat(on, "... -> pair ...", pair=len(runs.harmful)) if each else on
        masks.append((alpha * on).requires_grad_())
    whole = torch.ones(model.n_layers, device=model.device)
    mask = SoftMask(masks[0], whole, masks[1]) if neurons else SoftMask(masks[0], masks[1])
    with torch.enable_grad():
        logits = masked_logits(model, runs.harmful, runs.source, mask)
        scores = metric(logits)
        return torch.autograd.grad(scores.sum() if each else scores.mean(), masks)


def _zero_grads(model: LensModel, neurons: bool) -> list[Tensor]:
    last = (model.n_layers, model.d_mlp) if neurons else (model.n_layers,)
    return [torch.zeros(model.n_layers, model.n_heads, device=model.device), torch.zeros(last, device=model.device)]
