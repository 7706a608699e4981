"""Edge attribution (EAP, EAP-IG): a gradient estimate for every direct path between two nodes.

It works on the model's own graph (no weight is read), so grouped queries, rotary embeddings, query-key norms and
parallel blocks need no cases of their own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from mechsafety.errors import MechsafetyError
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.models.engine import Hook, run_from
from mechsafety.nodes import Edge, Node, head_and_mlp_nodes
from mechsafety.patching.masks import PairRuns, pair_runs
from mechsafety.patching.paths import Receiver, node_outputs, reaches
from mechsafety.prompts import PromptPairs
from mechsafety.results import Provenance, Result, bars
from mechsafety.sites import Site, SiteKind

METHODS = ("eap", "eap-ig", "mask-ig")
EMBED = Node("embed")
# pairs x columns whose sender outputs are held at once: 300 senders of a 135M model take 100 MB at 150
BATCH_TOKENS = 96


@dataclass(frozen=True, slots=True)
class EdgeScores(Result):
    """Estimated share of the metric gap along every edge.

    Attributes:
        provenance: Model, options, versions.
        metric: Name and tokens of the metric.
        senders: Rows: ``embed``, heads and MLPs in the order of computation.
        receivers: Columns: (node, slot).
        scores: Signed; 0 where the sender does not reach the receiver.
        method: ``eap``, ``eap-ig`` or ``mask-ig``.
        steps: Points at which the gradient was taken.
    """

    provenance: Provenance
    metric: dict[str, object]
    senders: tuple[Node, ...]
    receivers: tuple[Receiver, ...]
    scores: Float[Tensor, "sender receiver"]
    method: str
    steps: int

    def __repr__(self) -> str:
        return f"EdgeScores({self.n_edges:,} edges, {self.method}, {self.steps} steps)"

    @property
    def n_edges(self) -> int:
        """Number of edges that run with the order of computation."""
        parallel = bool(self.provenance.options.get("parallel"))
        return sum(reaches(a, b, parallel=parallel) for a in self.senders for b, _ in self.receivers)

    def top(self, n: int | None = None) -> list[tuple[Edge, float]]:
        """The strongest edges by absolute score, ties in the order of computation."""
        flat = rearrange(self.scores, "sender receiver -> (sender receiver)").abs()
        order = flat.argsort(descending=True, stable=True)[:n].tolist()
        width = len(self.receivers)
        found = []
        for index in order:
            sender, (receiver, slot) = self.senders[index // width], self.receivers[index % width]
            if flat[index] > 0:
                found.append((Edge(sender, receiver, slot), float(self.scores[index // width, index % width])))
        return found

    def node_scores(self) -> dict[Node, float]:
        """Sum of each sender's outgoing edges."""
        return dict(zip(self.senders, self.scores.sum(1).tolist(), strict=True))

    def to_dataframe(self, n: int | None = 1000) -> pd.DataFrame:
        """The ``n`` strongest edges, one a row."""
        rows = [(str(edge.sender), str(edge.receiver), edge.slot, score) for edge, score in self.top(n)]
        return pd.DataFrame(rows, columns=["sender", "receiver", "slot", "score"])

    def plot(self) -> go.Figure:
        """Bar chart of the 30 strongest edges."""
        frame = self.to_dataframe(30)
        frame["edge"] = frame.sender + " -> " + frame.receiver + " (" + frame.slot + ")"
        return bars(frame, "edge", "score", "estimated share of the gap")


def edge_attribution(
    model: LensModel,
    pairs: PromptPairs | PairRuns,
    metric: RefusalLogOdds,
    *,
    method: str = "eap-ig",
    steps: int = 5,
    nodes: Sequence[Node] | None = None,
    progress: bool = True,
) -> EdgeScores:
    """Score every edge u -> v by (output of u, harmful less harmless) . (gradient of the metric in v's input).

    ``eap`` (Syed et al. 2023) takes the gradient at the harmful run; ``eap-ig`` (Hanna et al. 2024) averages it over
    ``steps`` midpoints between the two runs' embeddings; ``mask-ig`` over points at which every node is a blend of its
    two values, as in `node_attribution`. Sums over positions, averages over prompts. Scores are estimates: measure the
    ones that matter with `path_patching`. Sender outputs are held for a few prompts at a time, so that memory does not
    grow with the number of prompts.

    Args:
        model: The model; head outputs must add up (no norm after attention).
        pairs: Aligned pairs, or their stored runs.
        metric: What is attributed.
        method: ``eap``, ``eap-ig`` or ``mask-ig``.
        steps: Points of the average; ``eap`` has one.
        nodes: Heads and MLPs to score edges among (and to the logits); all of them, and ``embed``, by default.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: Unknown method, or a model whose head outputs do not add up.
    """
    if method not in METHODS:
        raise MechsafetyError(f"method={method!r}", expected=f"one of {METHODS}")
    if model.post_norm:
        raise MechsafetyError(f"{model.name} normalises each block's output", expected="a model whose heads add up")
    listed = head_and_mlp_nodes(model.n_layers, model.n_heads) if nodes is None else nodes
    ordered = tuple(sorted(listed, key=lambda node: node.order))
    senders = (EMBED, *ordered) if nodes is None else ordered
    receivers = tuple(
        (node, slot) for node in ordered for slot in (("q", "k", "v") if node.kind == "head" else ("mlp",))
    )
    receivers = (*receivers, (Node("logits"), "resid"))
    points = [1.0] if method == "eap" else [(step + 0.5) / steps for step in range(steps)]
    batches = list(_batches(model, pairs))
    n_pairs = sum(len(runs.harmful) for runs in batches)
    ends = [runs.scores(metric) for runs in batches]
    gap = sum(float((a - b).sum()) for a, b in ends)
    scores = torch.zeros(len(senders), len(receivers), device=model.device)
    with tqdm(total=len(batches) * len(points), desc="edges", disable=not progress, leave=False) as bar:
        for runs in batches:
            change = _sender_changes(model, runs, senders)
            for alpha in points:
                for columns, gradient in _input_gradients(model, runs, metric, receivers, method, alpha):
                    scores[:, columns] += (
                        einsum(change, gradient.float(), "sender batch pos d, receiver batch pos d -> sender receiver")
                        / gap
                        / len(points)
                    )
                bar.update()
    allowed = [[reaches(u, v, parallel=model.parallel) for v, _ in receivers] for u in senders]
    scores = scores * torch.tensor(allowed, device=scores.device)
    options = {"method": method, "steps": len(points), "pairs": n_pairs, "parallel": model.parallel}
    provenance = model.provenance(options=options)
    return EdgeScores(provenance, metric.to_json(), senders, receivers, scores.cpu(), method, len(points))


def _batches(model: LensModel, pairs: PromptPairs | PairRuns) -> Iterator[PairRuns]:
    """Runs of a few pairs at a time, all from the same first column."""
    if isinstance(pairs, PairRuns):
        yield pairs
        return
    tokens = model.tokenize_pairs(pairs)
    columns = tokens.harmful.ids.shape[1] - tokens.start
    size = max(1, BATCH_TOKENS // columns)
    for first in range(0, len(tokens), size):
        yield pair_runs(model, tokens.rows(slice(first, first + size)))


def _sender_changes(
    model: LensModel, runs: PairRuns, senders: Sequence[Node]
) -> Float[Tensor, "sender batch pos d_model"]:
    """Output of each sender, harmful less harmless."""
    parts = [node for node in senders if node.kind != "embed"]
    change = node_outputs(model, runs.harmful, parts) - node_outputs(model, runs.harmless, parts)
    if len(parts) == len(senders):
        return change
    embed = (runs.harmful.resid[0] - runs.harmless.resid[0]).float()
    return torch.cat([rearrange(embed, "batch pos d -> 1 batch pos d"), change])


@dataclass(frozen=True, slots=True)
class _Graph:
    """Activations of one run, attached to autograd, and the metric's gradients in them."""

    acts: Mapping[Site, Tensor]
    grads: Mapping[Site, Tensor]


def _input_gradients(
    model: LensModel,
    runs: PairRuns,
    metric: RefusalLogOdds,
    receivers: Sequence[Receiver],
    method: str,
    alpha: float,
) -> Iterator[tuple[list[int], Float[Tensor, "receiver batch pos d_model"]]]:
    """Gradient of the summed metric in what each receiver reads, layer by layer: (columns, gradients)."""
    graph = _graph(model, runs, metric, method, alpha)
    column = {receiver: k for k, receiver in enumerate(receivers)}
    # under mask-ig a receiver's own output is scaled by alpha on its way on, which is no part of the edge's effect
    scale = 1.0 / alpha if method == "mask-ig" else 1.0
    final = graph.grads[Site(SiteKind.FINAL_NORM_IN)]
    for node, slot in receivers:
        if node.kind == "logits":
            at_last = torch.nn.functional.pad(final[:, -1:], (0, 0, runs.harmful.n_pos - 1, 0))
            yield [column[node, slot]], rearrange(at_last, "batch pos d -> 1 batch pos d")
    for layer in range(model.n_layers):
        heads = [node.index or 0 for node, slot in receivers if node.layer == layer and slot == "q"]
        for slot in ("q", "k", "v") if heads else ():
            columns = [column[Node("head", layer, head), slot] for head in heads]
            yield columns, scale * _slot_gradient(graph, layer, slot, heads, model)
        if (Node("mlp", layer), "mlp") in column:
            mlp, read = Site(SiteKind.MLP_OUT, layer), Site(_middle(model), layer)
            (gradient,) = torch.autograd.grad(graph.acts[mlp], graph.acts[read], graph.grads[mlp], retain_graph=True)
            yield [column[Node("mlp", layer), "mlp"]], scale * rearrange(gradient, "batch pos d -> 1 batch pos d")


def _graph(model: LensModel, runs: PairRuns, metric: RefusalLogOdds, method: str, alpha: float) -> _Graph:
    base, source = runs.harmful, runs.harmless
    acts: dict[Site, Tensor] = {}
    hooks: list[Hook] = []

    def keep(site: Site, change: Callable[[Tensor], Tensor] | None = None) -> None:
        def function(tensor: Tensor) -> Tensor:
            acts[site] = tensor
            # a hook that returns nothing may have seen a reshaped copy that is off the graph
            return tensor if change is None else change(tensor)

        hooks.append((site, function))

    def blend(values: Tensor) -> Callable[[Tensor], Tensor] | None:
        return (lambda tensor: values + alpha * (tensor - values)) if method == "mask-ig" else None

    for layer in range(model.n_layers):
        for kind in (SiteKind.RESID_PRE, _middle(model), SiteKind.Q, SiteKind.K, SiteKind.V, SiteKind.SCORES):
            if Site(kind, layer) not in {site for site, _ in hooks}:
                keep(Site(kind, layer))
        keep(Site(SiteKind.Z, layer), blend(source.acts[SiteKind.Z][layer]))
        keep(Site(SiteKind.MLP_OUT, layer), blend(source.acts[SiteKind.MLP_OUT][layer]))
    keep(Site(SiteKind.FINAL_NORM_IN))
    with torch.enable_grad():
        start = base.resid[0] if method != "eap-ig" else source.resid[0] + alpha * (base.resid[0] - source.resid[0])
        score = metric(run_from(model, base, 0, start.clone().requires_grad_(), hooks)).sum()
        grads = torch.autograd.grad(score, list(acts.values()), retain_graph=True, allow_unused=True)
    return _Graph(acts, dict(zip(acts, grads, strict=True)))


def _middle(model: LensModel) -> SiteKind:
    """What the MLP reads."""
    return SiteKind.RESID_PRE if model.parallel else SiteKind.RESID_MID


def _slot_gradient(
    graph: _Graph, layer: int, slot: str, heads: Sequence[int], model: LensModel
) -> Float[Tensor, "head batch pos d_model"]:
    """Gradient in the block's input through one slot of each head alone, one backward pass for all heads."""
    # a key-value head serves several heads: their shares are told apart where each head has its own tensor
    kind, via = {"q": (SiteKind.Q, None), "k": (SiteKind.K, SiteKind.SCORES), "v": (SiteKind.V, SiteKind.Z)}[slot]
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
