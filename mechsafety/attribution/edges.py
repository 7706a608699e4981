"""Edge attribution (EAP, EAP-IG, IG-activations): a gradient estimate for every direct path between two nodes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mechsafety.attribution.gradients import GRIDS, Grid, integration_points, receiver_scores
from mechsafety.attribution.senders import Chunks, sender_chunks
from mechsafety.attribution.steps import choose_points, kept_runs, missed_by, share
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Count, public
from mechsafety.metrics import RefusalLogOdds, check_gap
from mechsafety.models import LensModel
from mechsafety.models.parts import check_exists
from mechsafety.nodes import EMBED, NODE_SITES, SLOTS, Edge, Node, NodeLike, as_nodes, head_and_mlp_nodes
from mechsafety.patching.effects import total_gap
from mechsafety.patching.masks import PairRuns, aligned_pairs, pair_batches
from mechsafety.patching.norms import block_norms_option
from mechsafety.patching.receivers import INTO_LOGITS, Receiver, reaches
from mechsafety.progress import progress_bar
from mechsafety.prompts import PromptPairs, omissions
from mechsafety.results import Provenance, Result, bars, norms_note
from mechsafety.scale.work import sweeps, work
from mechsafety.sites import SiteKind

Method = Literal["eap", "eap-ig", "ig-activations", "mask-ig"]
METHODS: tuple[Method, ...] = get_args(Method)
# pairs x columns that are attributed at once, because autograd's graph holds all their activations
BATCH_TOKENS = 96
# first sender, receivers, and what is added to their scores
Block = tuple[int, tuple[int, ...], Tensor]


@dataclass(frozen=True, slots=True)
class EdgeScores(Result):
    """Estimated share of the metric gap along every edge.

    Attributes:
        provenance: Model, options, versions.
        metric: Name and tokens of the metric.
        senders: Rows of ``scores``: ``embed``, heads, MLPs and neurons in the order of computation.
        receivers: Columns of ``scores``: (node, slot) pairs.
        scores: Signed scores; 0 if the sender does not reach the receiver.
        method: ``eap``, ``eap-ig``, ``ig-activations`` or ``mask-ig``.
        steps: Number of points of each integral.
        completeness: What the gradients sum to, as a share of the gap; 1 would be exact (see `attribution.steps`). None
            in results of older versions.

    Example:
        >>> found = ms.edge_attribution(model, pairs, metric)
        >>> [str(edge) for edge, share in found.top(1)]
        ['L3.H1 -> L3.MLP (mlp)']
    """

    provenance: Provenance
    metric: dict[str, object]
    senders: tuple[Node, ...]
    receivers: tuple[Receiver, ...]
    scores: Float[Tensor, "sender receiver"]
    method: str
    steps: int
    completeness: float | None = None

    def __repr__(self) -> str:
        sums = "" if self.completeness is None else f", completeness {self.completeness:.2f}"
        return (
            f"EdgeScores({self.n_edges:,} edges, {self.method}, {self.steps} steps{sums}{norms_note(self.provenance)})"
        )

    @property
    def n_edges(self) -> int:
        """Number of edges that run with the order of computation."""
        parallel = bool(self.provenance.options.get("parallel"))
        return sum(_reached(self.senders, self.receivers, parallel=parallel))

    def top(self, n: int | None = None) -> list[tuple[Edge, float]]:
        """The ``n`` strongest edges by absolute score (all by default), ties in the order of computation."""
        flat = rearrange(self.scores, "sender receiver -> (sender receiver)")
        found = flat.nonzero().flatten()
        order = found[flat[found].abs().argsort(descending=True, stable=True)][:n]
        width = len(self.receivers)
        return [
            (Edge(self.senders[index // width], *self.receivers[index % width]), score)
            for index, score in zip(order.tolist(), flat[order].tolist(), strict=True)
        ]

    def node_scores(self) -> dict[Node, float]:
        """Sum of each sender's outgoing edges."""
        return dict(zip(self.senders, self.scores.sum(1).tolist(), strict=True))

    def to_dataframe(self, n: int | None = 1000) -> pd.DataFrame:
        """The ``n`` strongest edges, one per row."""
        rows = [(str(edge.sender), str(edge.receiver), edge.slot, score) for edge, score in self.top(n)]
        return pd.DataFrame(rows, columns=["sender", "receiver", "slot", "score"])

    def plot(self) -> go.Figure:
        """Bar chart of the 30 strongest edges."""
        frame = self.to_dataframe(30)
        frame["edge"] = frame.sender + " -> " + frame.receiver + " (" + frame.slot + ")"
        return bars(frame, "edge", "score", "estimated share of the gap")


@sweeps
@public
def edge_attribution(
    model: LensModel,
    pairs: PromptPairs | PairRuns,
    metric: RefusalLogOdds,
    *,
    method: Method = "eap-ig",
    steps: Count | None = None,
    grid: Grid = "midpoint",
    nodes: Sequence[NodeLike] | None = None,
    neurons: Sequence[int] = (),
    progress: bool = True,
) -> EdgeScores:
    """Score every edge u -> v by (output of u, harmful minus harmless) . (gradient of the metric in v's input).

    The methods differ in where they take the gradient, and therefore in which sums are exact. With every method but
    ``ig-activations``, the scores into one receiver sum to the first-order effect of its input: (its input, harmful
    minus harmless) . (its gradient).

    - ``eap`` (Syed et al. 2023): at the harmful run.
    - ``eap-ig`` (Hanna et al. 2024): averaged over blends of the two runs' embeddings. As ``steps`` grow, the scores
      that ``embed`` sends sum to the whole gap.
    - ``ig-activations`` (Mueller et al. 2025): for each sublayer in turn (embedding, attention or MLP of a layer),
      averaged over blends of what that sublayer alone writes. As ``steps`` grow, the scores that its nodes send sum to
      the exact effect of patching the sublayer. It costs as many passes as ``eap-ig``, times about the number of
      layers.
    - ``mask-ig``: averaged over blends of every node's value, as in `node_attribution`.

    If a norm follows attention or MLP (Gemma-2, OLMo-2), the output of a head or neuron is its share of the norm of the
    layer's sum. The norm's scale is frozen at each run's own. All senders then add up to what the receivers read, and
    the sums above hold there too. The result says so (``block_norms`` among its options, and its ``repr``).

    Scores are summed over positions and averaged over prompts. They are estimates: measure the ones that matter with
    `path_patching`. Prompts are attributed a few at a time, and so are senders. Memory therefore grows neither with the
    number of prompts nor with that of neurons, except for the scores themselves.

    Args:
        model: The model.
        pairs: Pairs, of which only those that align are used; or their stored runs. If these are many, they are run
            again, a few at a time.
        metric: What is attributed.
        method: ``eap``, ``eap-ig``, ``ig-activations`` or ``mask-ig``.
        steps: Number of points of each integral; ``eap`` has one. The default is the first of 5, 10, 20, 40, 80 whose
            sum is within 5 % of its exact value. To find it costs a forward and a backward pass per point tried, before
            the points that are taken. The result holds the number and the sum.
        grid: ``midpoint``, ``left`` (the grid of the code published with EAP-IG) or ``gauss`` (Gauss-Legendre).
        nodes: Heads, MLPs and neurons to score edges among (and to the logits); all heads and MLPs, and ``embed``, by
            default. A neuron sends along its output weights and receives through the slot ``mlp``.
        neurons: Layers whose MLP is replaced by its single neurons.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: The method is unknown; the model lacks a node or a layer; or neurons of a mixture of experts
            are wanted.

    Example:
        >>> found = ms.edge_attribution(model, pairs, metric)
        >>> {edge for edge, share in found.top(7)} == set(made.truth.edges)
        True
    """
    # at alpha = 0 a live blend hides what its receivers compute
    grids = tuple(name for name in GRIDS if name != "left" or method != "mask-ig")
    if grid not in grids:
        raise MechsafetyError(f"grid={grid!r} with method={method!r}", expected=f"one of {grids}")
    ordered = _nodes(model, nodes, neurons)
    senders = (EMBED, *ordered) if nodes is None else ordered
    receivers = (*((node, slot) for node in ordered for slot in SLOTS[node.kind]), INTO_LOGITS)
    reached = _reached(senders, receivers, parallel=model.parallel)
    extra = [SiteKind.NEURONS] if any(node.kind == "neuron" for node in ordered) else []
    if method == "ig-activations" and model.post_norm:
        extra.append(SiteKind.ATTN_OUT)
    pairs = aligned_pairs(model, pairs)
    if pairs.align == "suffix" and method == "eap-ig":
        raise MechsafetyError(
            "method='eap-ig' on pairs aligned at the suffix, whose embeddings are the same there",
            expected="a method whose path leads through the nodes' values",
            hint="pass method='mask-ig', 'ig-activations' or 'eap'",
        )
    batches = pair_batches(model, pairs, BATCH_TOKENS, extra)
    complete: float | None = None
    if steps is None and method != "eap":
        batches = kept_runs(batches)  # these batches are run through more than once
        points, complete = choose_points(model, batches, metric, method, grid, senders)
    else:
        points = integration_points(model, method, steps or 1, senders, grid)
    scores = torch.zeros(len(senders), len(receivers), device=model.device)
    gap, missed, n_pairs, scored, slopes = 0.0, np.zeros(1), 0, [], list[float]()

    @lru_cache(maxsize=1)
    def prepared(number: int) -> tuple[PairRuns, Chunks]:
        runs = batches[number]()
        return runs, sender_chunks(model, runs, senders)

    def scored_at(item: tuple[int, int]) -> tuple[float, Tensor, Tensor, Iterator[Block]]:
        (runs, chunks), point = prepared(item[0]), points[item[1]]
        slope, into = receiver_scores(model, runs, metric, receivers, reached, point)

        def blocks() -> Iterator[Block]:
            for columns, score in into:
                first, last = point.senders
                for rows, change in chunks(first, min(last, reached[columns[0]])):
                    yield rows.start, tuple(columns), point.weight * score(change)

        return slope, *runs.scores(metric), blocks()

    items = [(number, k) for number in range(len(batches)) for k in range(len(points))]
    kind = tuple[float, Tensor, Tensor, tuple[Block, ...]]
    with progress_bar(total=len(items), desc="edges", show=progress) as bar:
        found = work("edges", items, scored_at, kind, group=itemgetter(0))
        for (number, k), (slope, harmful, harmless, parts) in zip(items, found, strict=True):
            if k == 0:
                n_pairs += len(harmful)
                gap += total_gap(harmful, harmless)
                scored.append((harmful, harmless))
                slopes = []
            slopes.append(slope)
            for first, columns, part in parts:
                scores[first : first + len(part), columns] += part.to(scores.device)
            bar.update()
            if complete is None and k == len(points) - 1:
                missed = missed + np.array(missed_by(model, lambda k: prepared(k)[0], number, metric, points, slopes))
    check_gap(*(torch.cat(side) for side in zip(*scored, strict=True)))
    shown = len({point.alpha for point in points})
    options: dict[str, Any] = {
        "method": method,
        "steps": shown,
        "grid": grid,
        "pairs": n_pairs,
        "parallel": model.parallel,
    }
    options |= {"chosen": steps is None} | block_norms_option(model, "frozen") | omissions(pairs)
    complete = share(missed, gap) if complete is None else complete
    if neurons:
        options["neurons"] = list(neurons)
    provenance = model.provenance(options=options)
    shares = (scores / gap).cpu()
    return EdgeScores(provenance, metric.to_json(), senders, receivers, shares, method, shown, complete)


def _nodes(model: LensModel, nodes: Sequence[NodeLike] | None, neurons: Sequence[int]) -> tuple[Node, ...]:
    """The nodes that send and receive, in the order of computation."""
    if neurons:
        model.check_neurons()
    wrong = [layer for layer in neurons if not 0 <= layer < model.n_layers]
    if wrong or (nodes is not None and neurons):
        raise MechsafetyError(
            f"neurons={list(neurons)}" + (" beside nodes" if nodes is not None else ""),
            expected=f"layers 0 to {model.n_layers - 1}, without nodes",
            hint='list single neurons as nodes: Node("neuron", layer, index)',
        )
    if nodes is None:
        whole = head_and_mlp_nodes(model.n_layers, model.n_heads)
        listed = [node for node in whole if node.kind == "head" or node.layer not in neurons]
        listed += [Node("neuron", layer, index) for layer in set(neurons) for index in range(model.d_mlp)]
    else:
        listed = list(dict.fromkeys(as_nodes(nodes)))
    for node in listed:
        if node.kind not in NODE_SITES:
            raise MechsafetyError(f"{node} among the nodes", expected="heads, MLPs and neurons")
        check_exists(model, node)
    return tuple(sorted(listed, key=lambda node: node.order))


def _reached(senders: Sequence[Node], receivers: Sequence[Receiver], *, parallel: bool) -> list[int]:
    """For each receiver, how many senders write into its input; these come first in the order of computation."""
    sublayers = [(node, len(list(same))) for node, same in groupby(map(_sublayer, senders))]
    counts: dict[Node, int] = {}
    for node in {_sublayer(receiver) for receiver, _ in receivers}:
        counts[node] = sum(n for sender, n in sublayers if reaches(sender, node, parallel=parallel))
    return [counts[_sublayer(receiver)] for receiver, _ in receivers]


def _sublayer(node: Node) -> Node:
    """A node that represents all nodes that read and write at the same places."""
    if node.kind == "head":
        return Node("head", node.layer, 0)
    return Node("mlp", node.layer) if node.kind == "neuron" else node
