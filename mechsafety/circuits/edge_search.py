"""Circuits of edges: the smallest set found that carries the metric gap, and ACDC, which removes edges one by one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from mechsafety.attribution.edges import edge_attribution
from mechsafety.circuits.budget import Budget
from mechsafety.circuits.edge_faithfulness import SENDER_BYTES, EdgeMeter, all_edges, masked_edge_logits, prune
from mechsafety.circuits.faithfulness import FaithfulnessMeter, in_order
from mechsafety.circuits.goal import Goal, GoalKind
from mechsafety.circuits.search import MAX_EXACT, MIB_SHARES, SearchResult, check_search, search_parts
from mechsafety.circuits.verification.outcome import CurvePoint
from mechsafety.circuits.verification.side_effects import next_token_kl
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Count, public
from mechsafety.metrics import RefusalLogOdds, check_gap
from mechsafety.models import LensModel
from mechsafety.models.engine import max_variants
from mechsafety.nodes import EMBED, LOGITS, SLOTS, Edge, Node, Part, head_and_mlp_nodes, nodes_of
from mechsafety.patching import pair_runs
from mechsafety.patching.norms import block_norms_option
from mechsafety.patching.senders import written_changes
from mechsafety.progress import progress_bar
from mechsafety.prompts import PromptPairs, omissions
from mechsafety.results import Provenance, Result, bars, norms_note
from mechsafety.scale.work import once, sweeps

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Measure = Literal["kl", "metric"]


@dataclass(frozen=True, slots=True)
class EdgeCircuit(Result):
    """A circuit of edges, found by either search.

    Attributes:
        provenance: Model, options, versions.
        metric: Name and tokens of the metric.
        edges: Kept edges, in the order of computation by receiver. All lie on paths from ``embed`` to ``logits``.
        scores: One score per edge: the faithfulness lost without it, or its estimate where the circuit is large. Under
            ACDC, the change of the measure because of which the edge was kept.
        n_candidates: Number of edges of the whole model.
        faithfulness: Faithfulness on the pairs that the circuit was found on: (m(C) - m(empty)) / (m(model) -
            m(empty)). Cut edges carry the harmless run.
        held_out_faithfulness: Faithfulness on other pairs; None without other pairs.
        method: ``eap-ig`` or ``acdc``.
        curve: Faithfulness of the best k edges of the ranking. Empty under ACDC, which has no ranking.
        reached: Whether the target is reached. None under ACDC, which has a threshold instead of a target.
        cut: What was left out to keep the time budget.

    Example:
        >>> found = ms.circuits.discover_edges(model, pairs, metric)
        >>> set(found.edges) <= set(made.truth.edges), found.reached
        (True, True)
    """

    provenance: Provenance
    metric: Mapping[str, object]
    edges: tuple[Edge, ...]
    scores: tuple[float, ...]
    n_candidates: int
    faithfulness: float
    held_out_faithfulness: float | None
    method: str
    curve: tuple[CurvePoint, ...] = ()
    reached: bool | None = None
    cut: tuple[str, ...] = ()

    def __repr__(self) -> str:
        size = f"{len(self.edges)} of {self.n_candidates} edges, {len(self.nodes)} nodes"
        norms = norms_note(self.provenance)
        return f"EdgeCircuit({self.method}: {size}, faithfulness {self.faithfulness:.2f}{norms})"

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Heads and MLPs that the edges run between, in the order of computation."""
        return tuple(nodes_of(self.edges))

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per edge."""
        import pandas as pd

        rows = [
            (str(edge.sender), str(edge.receiver), edge.slot, score)
            for edge, score in zip(self.edges, self.scores, strict=True)
        ]
        return pd.DataFrame(rows, columns=["sender", "receiver", "slot", "score"])

    def plot(self) -> "go.Figure":
        """Bar chart of the 30 edges with the largest scores."""
        frame = self.to_dataframe()
        frame["edge"] = frame.sender + " -> " + frame.receiver + " (" + frame.slot + ")"
        return bars(frame, "edge", "score", "score")


@sweeps
@public
def discover_edges(
    model: LensModel,
    pairs: PromptPairs,
    metric: RefusalLogOdds,
    *,
    target: float = 0.8,
    goal: GoalKind = "reach",
    steps: Count | None = None,
    max_edges: Count | None = None,
    budget_seconds: float | None = None,
    progress: bool = True,
) -> EdgeCircuit:
    """The smallest set of edges found whose faithfulness is good enough with every edge outside it cut.

    1. EAP-IG (Hanna et al. 2024) ranks the edges on half of the pairs.
    2. Bisection finds the smallest prefix of the ranking that meets the goal on both halves.
    3. Edges that lie on no path from ``embed`` to ``logits`` are dropped, because they change nothing.
    4. Edges whose exact removal does not matter are removed, where few enough are left to measure them one by one.

    Args:
        model: The model.
        pairs: Pairs, of which those that align are taken. Half of them (other topics, if there are several) set the
            size.
        metric: The metric to measure.
        target: Smallest faithfulness that is good enough.
        goal: ``reach``: at least the target. ``match``: at most ``1 - target`` away from 1, on either side.
        steps: Number of points of EAP-IG; by default as many as its completeness needs (see `edge_attribution`).
        max_edges: Largest number of edges in the circuit.
        budget_seconds: Time budget, in seconds.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: Too few pairs, or options out of range.

    Example:
        >>> found = ms.circuits.discover_edges(model, pairs, metric, target=0.9)
        >>> found.reached, found.faithfulness >= 0.9
        (True, True)
    """
    check_search(target, max_edges)
    budget = Budget(budget_seconds)
    pairs = pairs.aligned(model, least=2)
    here, there = pairs.halves()
    found_on, held_out = (EdgeMeter(model, pair_runs(model, part), metric, progress=progress) for part in (here, there))
    for meter in (found_on, held_out):
        check_gap(*meter.runs.scores(metric))
    scores = edge_scores(found_on, steps=steps, progress=progress)
    aim = Goal(target, goal)
    found = search_edges(found_on, held_out, scores, aim, max_edges=max_edges, budget=budget)
    edges = [part for part in found.circuit if isinstance(part, Edge)]
    options: dict[str, object] = {"target": target, "goal": goal, "steps": steps, "max_edges": max_edges}
    options |= {"pairs": pairs.name, "n_pairs": len(pairs)}
    options |= block_norms_option(model, "recomputed") | omissions(pairs)
    return EdgeCircuit(
        model.provenance(options=options),
        metric.to_json(),
        tuple(edges),
        tuple(float(found.marginals.get(edge, scores[edge])) for edge in edges),
        len(found_on.parts),
        found_on.faithfulness([edges])[0],
        held_out.faithfulness([edges])[0],
        "eap-ig",
        found.curve,
        found.reached,
        budget.cut,
    )


def edge_scores(meter: FaithfulnessMeter, *, steps: int | None = None, progress: bool = False) -> dict[Edge, float]:
    """EAP-IG estimate of every edge on the pairs of a meter whose parts are edges."""
    estimated = edge_attribution(meter.model, meter.runs, meter.metric, method="eap-ig", steps=steps, progress=progress)
    known = dict(estimated.top())
    return {edge: known.get(edge, 0.0) for edge in meter.parts if isinstance(edge, Edge)}


def search_edges(
    found_on: FaithfulnessMeter,
    held_out: FaithfulnessMeter,
    scores: Mapping[Edge, float],
    goal: Goal,
    *,
    ranking: Sequence[Part] | None = None,
    max_edges: int | None = None,
    budget: Budget | None = None,
) -> SearchResult:
    """`search_parts` over edges, ranked by score by default; exact removal where at most `MAX_EXACT` are left."""
    place = {edge: k for k, edge in enumerate(scores)}
    by_score = sorted(scores, key=lambda edge: (-goal.size(scores[edge]), place[edge]))
    found = search_parts(
        found_on,
        held_out,
        by_score if ranking is None else ranking,
        goal,
        max_parts=max_edges,
        rounds=8,
        budget=budget,
        shares=MIB_SHARES,
        tidy=lambda parts: list(prune([part for part in parts if isinstance(part, Edge)])),
        max_exact=MAX_EXACT,
    )
    ranked: dict[Part, float] = {edge: score for edge, score in scores.items()}
    return replace(found, scores=ranked)


@sweeps
@public
def acdc(
    model: LensModel,
    pairs: PromptPairs,
    metric: RefusalLogOdds,
    *,
    threshold: float = 0.01,
    measure: Measure = "kl",
    progress: bool = True,
) -> EdgeCircuit:
    """Automatic circuit discovery (Conmy et al. 2023, algorithm 1), with the harmless prompts as corrupted ones.

    Receivers are visited from the logits back, and the edges of each receiver from the latest sender back. An edge is
    removed if the measure gets worse by less than ``threshold``. The measure ``kl`` is the mean KL divergence of the
    next token, from whole model to circuit, in nats. The measure ``metric`` is the faithfulness, whose change counts in
    either direction.

    Several removals are tried in one batch, each on top of those before it. Everything after the first refused removal
    is tried again. The result is therefore that of one removal at a time.

    Args:
        model: The model.
        pairs: Pairs; all that align are searched on.
        metric: The metric to measure.
        threshold: Loss from which an edge stays; above 0.
        measure: ``kl`` or ``metric``.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: Unknown measure, or a threshold that is not above 0.

    Example:
        >>> found = ms.circuits.acdc(model, pairs.sample(2), metric, threshold=0.5)
        >>> set(found.edges) <= set(made.truth.edges)
        True
    """
    if not threshold > 0:
        raise MechsafetyError(f"threshold {threshold}", expected="above 0")
    pairs = pairs.aligned(model)
    meter = EdgeMeter(model, pair_runs(model, pairs), metric)
    check_gap(*meter.runs.scores(metric))
    every = all_edges(model.n_layers, model.n_heads, model.parallel)
    order = sorted(every, key=lambda edge: (edge.receiver.order, edge.slot, edge.sender.order), reverse=True)
    cuts = _Cuts.of(meter, every)
    kept = set(every)
    now = 0.0 if measure == "kl" else 1.0
    saved: dict[Edge, float] = {}
    fit = SENDER_BYTES // (4 * cuts.changes.numel())
    size, place = max(1, min(fit, max_variants(meter.runs.harmful) // model.n_heads)), 0
    with progress_bar(total=len(order), desc="edges", show=progress) as bar:
        while place < len(order):
            chunk = order[place : place + size]
            values = once("cuts", partial(_measured, meter, partial(cuts.logits, chunk), measure), Values, of=chunk)
            for edge, value in zip(chunk, values, strict=True):
                place += 1
                loss = value - now if measure == "kl" else abs(value - now)
                if loss >= threshold:
                    saved[edge] = loss
                    break
                kept.discard(edge)
                cuts.cut(edge)
                now = value
            bar.update(place - bar.n)
    edges = in_order(prune(kept))
    options = {"threshold": threshold, "measure": measure, "pairs": pairs.name, "n_pairs": len(pairs)}
    options |= block_norms_option(model, "recomputed") | omissions(pairs)
    found = tuple(edge for edge in edges if isinstance(edge, Edge))
    return EdgeCircuit(
        model.provenance(options=options),
        metric.to_json(),
        found,
        tuple(saved[edge] for edge in found),
        len(every),
        meter.faithfulness([found])[0],
        None,
        "acdc",
    )


Values = tuple[float, ...]


def _measured(meter: EdgeMeter, cut: Callable[[], Tensor], measure: Measure) -> Values:
    logits = cut()
    if measure == "metric":
        return tuple(meter.shares(meter.metric(logits).cpu().double().numpy()))
    return tuple(float(next_token_kl(meter.runs.harmful.logits, row).mean()) for row in logits)


@dataclass(frozen=True, slots=True)
class _Cuts:
    """The edges of the whole model that are left, and runs in which more of them are cut.

    The search goes from the last receiver back. All blocks before the receivers of a batch of edges therefore still
    compute what they compute in the harmful run. Those blocks are not run.

    Attributes:
        meter: Meter whose pairs are run.
        senders: The embedding, heads and MLPs, in the order of computation.
        changes: Difference between the two runs in what each sender writes.
        left: For a receiver's slot, True at the senders whose edge is left.
    """

    meter: EdgeMeter
    senders: tuple[Node, ...]
    changes: Float[Tensor, "sender batch pos d_model"]
    left: dict[tuple[Node, str], np.ndarray]

    @classmethod
    def of(cls, meter: EdgeMeter, every: Sequence[Edge]) -> "_Cuts":
        """The start of the search, with no edge cut."""
        model, runs = meter.model, meter.runs
        senders = (EMBED, *head_and_mlp_nodes(model.n_layers, model.n_heads))
        row = {node: k for k, node in enumerate(senders)}
        left: dict[tuple[Node, str], np.ndarray] = {}
        for edge in every:
            left.setdefault((edge.receiver, edge.slot), np.zeros(len(senders), bool))[row[edge.sender]] = True
        with torch.no_grad():
            return cls(meter, senders, written_changes(model, runs.harmless, runs.harmful, senders), left)

    def cut(self, edge: Edge) -> None:
        """Cut an edge from now on."""
        self.left[edge.receiver, edge.slot][self.senders.index(edge.sender)] = False

    def logits(self, chunk: Sequence[Edge]) -> Float[Tensor, "variant batch d_vocab"]:
        """Logits of runs in which the first edge of the chunk is cut, the first two edges are cut, and so on."""
        model, n = self.meter.model, len(chunk)
        ends = [edge.receiver.layer for edge in chunk]
        first = min(model.n_layers if layer is None else layer for layer in ends)
        n_known = sum(node.kind == "embed" or (node.layer or 0) < first for node in self.senders)
        computed = self._computed(first)
        rows = [*range(n_known), *(k for k, node in enumerate(self.senders) if node in computed)]
        senders = [self.senders[k] for k in rows]
        shown: dict[tuple[Node, str], Tensor] = {}
        for place, left in self.left.items():
            if place[0] in computed or place[0].kind == "logits":
                shown[place] = repeat(
                    torch.from_numpy(left[rows]).float(), "sender -> sender variant", variant=n
                ).clone()
        for k, edge in enumerate(chunk):
            if (edge.receiver, edge.slot) in shown and edge.sender in senders:
                shown[edge.receiver, edge.slot][senders.index(edge.sender), k:] = 0.0
        masks = {place: mask.to(model.device) for place, mask in shown.items()}
        known = self.changes[:n_known]
        with torch.no_grad():
            return masked_edge_logits(model, self.meter.runs, senders, masks, n, first=first, known=known)

    def _computed(self, first: int) -> set[Node]:
        """Heads and MLPs, from a block on, that still have an edge in and an edge that leads on to the logits."""
        found: set[Node] = set()
        read = self.left[LOGITS, "resid"].copy()
        for k in range(len(self.senders) - 1, 0, -1):
            node = self.senders[k]
            if (node.layer or 0) < first:
                break
            into = [self.left[node, slot] for slot in SLOTS[node.kind]]
            if read[k] and any(left.any() for left in into):
                found.add(node)
                for left in into:
                    read |= left
        return found
