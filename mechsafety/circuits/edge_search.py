"""Circuits of edges: the smallest set found that carries the metric gap, and ACDC, a peer that removes one by one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from mechsafety.attribution.edges import edge_attribution
from mechsafety.circuits.budget import Budget
from mechsafety.circuits.discover import MIB_SHARES, Discovery, check_search, search_parts
from mechsafety.circuits.edge_meter import EdgeMeter, all_edges, edge_circuit_logits, prune
from mechsafety.circuits.meters import in_order
from mechsafety.circuits.side_effects import next_token_kl
from mechsafety.circuits.verification import CurvePoint
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Count, public
from mechsafety.metrics import RefusalLogOdds, check_gap
from mechsafety.models import LensModel
from mechsafety.models.engine import max_variants
from mechsafety.nodes import Edge, Node
from mechsafety.patching import pair_runs
from mechsafety.prompts import PromptPairs, omissions
from mechsafety.results import Provenance, Result, bars

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

MEASURES = ("kl", "metric")
# a circuit of more edges than this is not measured edge by edge: that takes one run for each
MAX_EXACT = 300


@dataclass(frozen=True, slots=True)
class EdgeCircuit(Result):
    """A circuit of edges, found by either search.

    Attributes:
        provenance: Model, options, versions.
        metric: Name and tokens of the metric.
        edges: What is kept, in the order of computation by receiver; all on paths from ``embed`` to ``logits``.
        scores: One an edge: faithfulness lost without it (its estimate where the circuit is large), or under ACDC the
            change of the measure that saved it.
        n_candidates: Edges of the whole model.
        faithfulness: On the pairs it was found on: (m(C) - m(empty)) / (m(model) - m(empty)), everything cut carrying
            the harmless run.
        held_out_faithfulness: On other pairs; None where there were none.
        method: ``eap-ig`` or ``acdc``.
        curve: Faithfulness of the best k edges of the ranking; empty under ACDC, which has none.
        reached: Whether the target is reached; None under ACDC, which has a threshold in its place.
        cut: What was left out to keep a time budget.
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
        return f"EdgeCircuit({self.method}: {size}, faithfulness {self.faithfulness:.2f})"

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Heads and MLPs that the edges run between, in the order of computation."""
        ends = {end for edge in self.edges for end in (edge.sender, edge.receiver)}
        return tuple(sorted((n for n in ends if n.kind not in ("embed", "logits")), key=lambda n: n.order))

    def to_dataframe(self) -> "pd.DataFrame":
        """One row an edge."""
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


@public
def discover_edges(
    model: LensModel,
    pairs: PromptPairs,
    metric: RefusalLogOdds,
    *,
    target: float = 0.8,
    steps: Count = 5,
    max_edges: Count | None = None,
    budget_seconds: float | None = None,
    progress: bool = True,
) -> EdgeCircuit:
    """The smallest set of edges found that reaches ``target`` faithfulness, every edge outside it cut.

    EAP-IG (Hanna et al. 2024) ranks the edges on half of the pairs; the smallest prefix that reaches the target on
    both halves is found by bisection, what lies on no path from ``embed`` to ``logits`` dropped (it changes nothing);
    then edges whose exact removal does not matter leave, where there are few enough to measure one by one.

    Args:
        model: The model; head outputs must add up (no norm after attention).
        pairs: Aligned pairs; half of them (other topics, where there are several) set the size.
        metric: What is measured.
        target: Faithfulness to reach.
        steps: Points of EAP-IG.
        max_edges: Largest circuit.
        budget_seconds: Time to keep.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: The model has norms after its attention or MLP, too few pairs, or options that make no sense.
    """
    check_search(target, max_edges)
    budget = Budget(budget_seconds)
    here, there = pairs.halves()
    found_on, held_out = (EdgeMeter(model, pair_runs(model, part), metric, progress=progress) for part in (here, there))
    for meter in (found_on, held_out):
        check_gap(*meter.runs.scores(metric))
    scores = edge_scores(found_on, steps=steps, progress=progress)
    found = search_edges(found_on, held_out, scores, target, max_edges=max_edges, budget=budget)
    edges = [part for part in found.circuit if isinstance(part, Edge)]
    options = {"target": target, "steps": steps, "max_edges": max_edges, "pairs": pairs.name, "n_pairs": len(pairs)}
    options |= omissions(pairs)
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


def edge_scores(meter: EdgeMeter, *, steps: int = 5, progress: bool = False) -> dict[Edge, float]:
    """EAP-IG estimate of every edge on the meter's pairs."""
    estimated = edge_attribution(meter.model, meter.runs, meter.metric, method="eap-ig", steps=steps, progress=progress)
    known = dict(estimated.top())
    return {edge: known.get(edge, 0.0) for edge in meter.parts if isinstance(edge, Edge)}


def search_edges(
    found_on: EdgeMeter,
    held_out: EdgeMeter,
    scores: Mapping[Edge, float],
    target: float,
    *,
    max_edges: int | None = None,
    budget: Budget | None = None,
) -> Discovery:
    """`search_parts` over edges ranked by signed score; exact removal where at most `MAX_EXACT` are left."""
    place = {edge: k for k, edge in enumerate(scores)}
    ranking = sorted(scores, key=lambda edge: (-scores[edge], place[edge]))
    return search_parts(
        found_on,
        held_out,
        ranking,
        target,
        max_parts=max_edges,
        rounds=8,
        budget=budget,
        shares=MIB_SHARES,
        tidy=lambda parts: list(prune([part for part in parts if isinstance(part, Edge)])),
        max_exact=MAX_EXACT,
    )


@public
def acdc(
    model: LensModel,
    pairs: PromptPairs,
    metric: RefusalLogOdds,
    *,
    threshold: float = 0.01,
    measure: str = "kl",
    progress: bool = True,
) -> EdgeCircuit:
    """Automatic circuit discovery (Conmy et al. 2023, algorithm 1), with the harmless twins as corrupted prompts.

    Receivers are visited from the logits back, each one's edges from the latest sender back; an edge leaves if what is
    measured gets worse by less than ``threshold``. ``kl``: mean KL divergence of the next token, whole model to
    circuit, in nats. ``metric``: change of faithfulness in either direction.

    Several removals are tried in one batch, each on top of those before it, and everything after the first that is
    refused is tried again: the result is that of one removal at a time.

    Args:
        model: The model; head outputs must add up (no norm after attention).
        pairs: Aligned pairs, all of which are searched on.
        metric: What is measured.
        threshold: Largest loss at which an edge may leave; above 0.
        measure: ``kl`` or ``metric``.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: Unknown measure, a threshold that is not above 0, or a model whose heads do not add up.
    """
    if measure not in MEASURES:
        raise MechsafetyError(f"measure={measure!r}", expected=f"one of {MEASURES}")
    if not threshold > 0:
        raise MechsafetyError(f"threshold {threshold}", expected="above 0")
    meter = EdgeMeter(model, pair_runs(model, pairs), metric)
    check_gap(*meter.runs.scores(metric))
    every = all_edges(model.n_layers, model.n_heads, model.parallel)
    order = sorted(every, key=lambda edge: (edge.receiver.order, edge.slot, edge.sender.order), reverse=True)
    kept = set(every)
    (now,) = _measured(meter, [kept], measure)
    saved: dict[Edge, float] = {}
    size, place = max(1, max_variants(meter.runs.harmful) // model.n_heads), 0
    with tqdm(total=len(order), desc="edges", disable=not progress, leave=False) as bar:
        while place < len(order):
            chunk = order[place : place + size]
            tried = [kept - set(chunk[: k + 1]) for k in range(len(chunk))]
            values = _measured(meter, tried, measure)
            for edge, value in zip(chunk, values, strict=True):
                place += 1
                loss = value - now if measure == "kl" else abs(value - now)
                if loss >= threshold:
                    saved[edge] = loss
                    break
                kept.discard(edge)
                now = value
            bar.update(place - bar.n)
    edges = in_order(prune(kept))
    options = {"threshold": threshold, "measure": measure, "pairs": pairs.name, "n_pairs": len(pairs)}
    options |= omissions(pairs)
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


def _measured(meter: EdgeMeter, circuits: Sequence[set[Edge]], measure: str) -> list[float]:
    if measure == "metric":
        return meter.faithfulness([tuple(circuit) for circuit in circuits])
    with torch.no_grad():
        logits = edge_circuit_logits(meter.model, meter.runs, circuits)
    return [float(next_token_kl(meter.runs.harmful.logits, row).mean()) for row in logits]
