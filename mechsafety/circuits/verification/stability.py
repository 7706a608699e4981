"""Attribution pair by pair, and how much a circuit depends on which prompts were drawn."""

from collections.abc import Callable, Generator, Sequence
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
    n: int = 5,
    seed: int = 0,
    budget: Budget | None = None,
) -> Stability | None:
    """Jaccard overlap of the circuit with those found on bootstrap resamples of the pairs.

    Only the first half of the search is repeated: the smallest prefix of the ranking that meets the goal on the
    (resampled) pairs. Exact removal is not repeated; for each resample it would take as long as the whole map.

    Args:
        meter: Meter on the pairs that the search ranked on.
        ranking_of: Ranking of all parts if each pair, in the meter's order, counts so many times; None for once each.
        goal: Which faithfulness is good enough.
        n: Number of resamples.
        seed: Seed of the resamples.
        budget: Time budget.

    Returns:
        The overlaps; None without a resample, or without time for one.
    """
    budget = budget or Budget()
    if not n:
        return None
    rng = np.random.default_rng(seed)
    n_pairs = len(meter.runs.harmful)
    whole, guess = _prefixes(meter, [(ranking_of(None), np.ones(n_pairs))], goal)[0]
    jaccards, sizes = [], []
    with meter.bar(n, "resamples") as bar:
        for batch in budget.within(range(n), 1, 0.7, "resamples of the prompts"):
            drawn = [np.bincount(rng.integers(n_pairs, size=n_pairs), minlength=n_pairs) for _ in batch]
            ranked = work("rankings", drawn, lambda weights: tuple(ranking_of(weights.tolist())), tuple[Part, ...])
            asked = list(zip(ranked, drawn, strict=True))
            for found, _ in _prefixes(meter, asked, goal, guess):
                jaccards.append(len(whole & found) / len(whole | found))
                sizes.append(len(found))
            bar.update(len(batch))
    if not jaccards:
        return None
    return Stability(tuple(jaccards), float(np.mean(jaccards)), tuple(sizes))


def _prefixes(
    meter: FaithfulnessMeter,
    asked: Sequence[tuple[Sequence[Part], np.ndarray]],
    goal: Goal,
    guess: int | None = None,
) -> list[tuple[set[Part], int]]:
    """The smallest prefix of each ranking that meets the goal on pairs weighted so, and its size.

    The searches go on side by side, so that their next circuits share a batch.
    """
    harmful, harmless = meter.ends()
    searches = [_smallest(len(ranking), guess) for ranking, _ in asked]
    answers: dict[int, bool | None] = dict.fromkeys(range(len(asked)))  # None starts a search
    found: dict[int, int] = {}
    while True:
        sizes: dict[int, int] = {}
        for k, answer in answers.items():
            try:
                sizes[k] = next(searches[k]) if answer is None else searches[k].send(answer)
            except StopIteration as end:
                found[k] = end.value
        if not sizes:
            break
        scores = meter.kept([asked[k][0][:size] for k, size in sizes.items()])
        answers = {}
        for k, row in zip(sizes, scores, strict=True):
            weights = asked[k][1]
            answers[k] = goal.met(float(weights @ (row - harmless) / (weights @ (harmful - harmless))))
    return [(set(asked[k][0][: found[k]]), found[k]) for k in range(len(asked))]


def _smallest(most: int, guess: int | None) -> Generator[int, bool, int]:
    """The smallest size that is good enough, of sizes up to ``most``, which is; each size asked for gets an answer.

    The search starts at a guess with growing steps, then bisects: resampled circuits are about as large as the first.
    """
    low, high = 0, most
    if guess is not None:
        step = max(1, guess // 8)
        if guess >= most or (yield guess):
            high = guess
            while high - step > 0 and (high - step >= most or (yield high - step)):
                high -= step
                step *= 2
            low = max(0, high - step)
        else:
            low = guess
            while low + step < most and not (yield low + step):
                low += step
                step *= 2
            high = min(most, low + step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if (yield middle) else (middle, high)
    return high
