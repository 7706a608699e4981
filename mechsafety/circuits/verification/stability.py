"""Attribution pair by pair, and how much a circuit depends on which prompts were drawn."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from mechsafety.attribution.nodes import BATCH_TOKENS, NodeAttribution, mask_gradients
from mechsafety.circuits.budget import Budget
from mechsafety.circuits.faithfulness import FaithfulnessMeter
from mechsafety.circuits.goal import Goal
from mechsafety.circuits.search import PrefixScores, prefix_scores
from mechsafety.circuits.verification.outcome import Stability
from mechsafety.nodes import Part
from mechsafety.patching.masks import PairRuns, pair_batches
from mechsafety.results import Provenance
from mechsafety.scale.work import work


@dataclass(frozen=True, slots=True)
class PairAttributions:
    """Node attribution of every pair by itself, in metric units.

    The sum over pairs, divided by the sum of the gaps, is the attribution of all pairs.

    Attributes:
        heads, mlps: Integrated gradients.
        gaps: Metric of the harmful prompt less that of the harmless one.
        provenance, metric: Provenance and metric of the attribution.
    """

    heads: Float[Tensor, "pair layer head"]
    mlps: Float[Tensor, "pair layer"]
    gaps: Float[Tensor, " pair"]
    provenance: Provenance
    metric: dict[str, object]

    def mean(self, weights: Sequence[int] | None = None) -> NodeAttribution:
        """Attribution over the pairs, each counted ``weights`` times (once by default)."""
        w = torch.ones_like(self.gaps) if weights is None else torch.tensor(weights).to(self.gaps)
        gap = (w * self.gaps).sum()
        heads = einsum(w, self.heads, "pair, pair layer head -> layer head") / gap
        mlps = einsum(w, self.mlps, "pair, pair layer -> layer") / gap
        total = float(heads.sum() + mlps.sum())
        return NodeAttribution(self.provenance, self.metric, heads, mlps, None, total)


def attribute_pairs(meter: FaithfulnessMeter, *, steps: int = 8) -> PairAttributions:
    """`node_attribution` of each pair alone; it gives the attribution of any resample of the pairs without a new run.

    Args:
        meter: Meter on the pairs.
        steps: Number of midpoints of the integral.
    """
    model, n_pairs = meter.model, len(meter.runs.harmful)
    heads = torch.zeros(n_pairs, model.n_layers, model.n_heads, device=model.device)
    mlps = torch.zeros(n_pairs, model.n_layers, device=model.device)
    with meter.bar(n_pairs * steps, "nodes") as bar:

        def attributed(batches: Sequence[Callable[[], PairRuns]], number: int) -> list[Tensor]:
            some, sums = batches[number](), [torch.zeros((), device=model.device)] * 2
            for step in range(steps):
                grads = mask_gradients(model, some, meter.metric, (step + 0.5) / steps, each=True)
                sums = [total + grad / steps for total, grad in zip(sums, grads, strict=True)]
                bar.update(len(some.harmful))
            return sums

        for rows, runs in meter.groups or ((tuple(range(n_pairs)), meter.runs),):
            done, batches = 0, pair_batches(model, runs, BATCH_TOKENS)
            found = work("nodes", range(len(batches)), partial(attributed, batches), tuple[Tensor, ...], of=rows)
            for grads in found:
                chosen = list(rows[done : done + len(grads[0])])
                done += len(chosen)
                heads[chosen], mlps[chosen] = (grad.to(model.device) for grad in grads)
    harmful, harmless = meter.runs.ends(meter.metric)
    provenance = model.provenance(options={"steps": steps, "neurons": False, "pairs": n_pairs})
    return PairAttributions(heads, mlps, harmful - harmless, provenance, meter.metric.to_json())


def bootstrap_stability(
    meter: FaithfulnessMeter,
    ranking_of: Callable[[Sequence[int] | None], Sequence[Part]],
    goal: Goal,
    *,
    n: int = 100,
    seed: int = 0,
    budget: Budget | None = None,
    curve: PrefixScores | None = None,
    runs_model: bool = False,
) -> Stability | None:
    """Jaccard overlap of the circuit with those found on bootstrap resamples of the pairs.

    Each resample ranks all parts again. Its circuit is the first parts of that ranking, as many as the goal needs. How
    many these are is read from the curve of the ranking of all pairs, in which each pair counts as often as it was
    drawn. The curve is taken to be straight between two sizes that were measured. So a resample runs the model only if
    its ranking does. The circuit of all pairs is found in the same way. Exact removal is not repeated; for each
    resample it would take as long as the whole map.

    Args:
        meter: Meter on the pairs that the search ranked on.
        ranking_of: Ranking of all parts if each pair, in the meter's order, counts so many times; None for once each.
        goal: Which faithfulness is good enough.
        n: Number of resamples.
        seed: Seed of the resamples.
        budget: Time budget.
        curve: Metric of prefixes of the ranking of all pairs, on the meter's pairs; measured here by default.
        runs_model: Whether a ranking runs the model. Rankings are then shared work, and each asks for the time.

    Returns:
        The overlaps; None without a resample, or without time for one.
    """
    budget = budget or Budget()
    if not n:
        return None
    ranking = ranking_of(None)
    curve = prefix_scores(meter, ranking) if curve is None else curve
    rng = np.random.default_rng(seed)
    n_pairs = len(meter.runs.harmful)
    size_of = partial(_size_needed, curve, *meter.ends(), len(ranking), goal)
    whole = set(ranking[: size_of(np.ones(n_pairs))])
    jaccards, sizes = [], []
    with meter.bar(n, "resamples") as bar:
        for batch in budget.within(range(n), 1 if runs_model else n, 0.7, "resamples of the prompts"):
            drawn = [np.bincount(rng.integers(n_pairs, size=n_pairs), minlength=n_pairs) for _ in batch]
            again: Iterable[Sequence[Part]] = (ranking_of(weights.tolist()) for weights in drawn)
            if runs_model:
                again = work("rankings", drawn, lambda weights: tuple(ranking_of(weights.tolist())), tuple[Part, ...])
            for weights, other in zip(drawn, again, strict=True):
                found = set(other[: size_of(weights)])
                jaccards.append(len(whole & found) / len(whole | found))
                sizes.append(len(found))
                bar.update(1)
    if not jaccards:
        return None
    return Stability(tuple(jaccards), float(np.mean(jaccards)), tuple(sizes))


def _size_needed(
    curve: PrefixScores, harmful: np.ndarray, harmless: np.ndarray, most: int, goal: Goal, weights: np.ndarray
) -> int:
    """The smallest prefix that meets the goal if pairs count so many times, by a curve that is straight between sizes.

    The whole model meets every goal. A resample in which the metric has no gap to restore needs all parts.
    """
    gap = float(weights @ (harmful - harmless))
    if gap <= 0:
        return most
    sizes, scores = curve
    measured = (scores - harmless) @ weights / gap
    # without parts nothing is restored
    every = np.interp(np.arange(1, most + 1), [0, *sizes], [0.0, *measured])
    return next(size for size, value in enumerate(every.tolist(), 1) if size == most or goal.met(value))
