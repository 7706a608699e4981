"""How much of an alignment's effect a share of neurons restores, against random neurons of the same layers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Amount, Count, Prompts, public
from mechsafety.intervals import ratio_intervals
from mechsafety.models import LensModel
from mechsafety.neurons.behaviour import (
    Ability,
    Score,
    Unedited,
    ability,
    judge_of,
    kinds_table,
    measure,
    score_name,
)
from mechsafety.neurons.masks import check_ranking, random_masks, share_count, top_mask
from mechsafety.neurons.runs import check_pair
from mechsafety.neurons.scores import NeuronScores, digest
from mechsafety.prompts import distinct
from mechsafety.replies import REPLY_TOKENS, ReplyKinds
from mechsafety.results import Provenance, Result
from mechsafety.scale.work import sweeps

SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, slots=True, repr=False)
class CausalCurve(Result):
    """Causal effect C(k) of the top share k of neurons, compared with random neurons.

    ``C = (F(patched) - F(base)) / (F(aligned) - F(base))``, where F is the mean score over prompts (Chen et al. 2024).

    Attributes:
        provenance: The base model, options, versions.
        aligned: The aligned model.
        score: Name of F.
        shares, counts: Share and number of neurons of each point.
        base_scores, aligned_scores: Score of each prompt for the two models by themselves.
        patched: Score of each prompt with the top neurons taken from the aligned model.
        random: Score of each prompt with a random set instead of the top. A set has as many neurons in each layer as
            the top. It is disjoint from the top where every layer has room for that. NaN at a share of 1.
        overlaps: Share of the random neurons that are in the top; 0 where the sets are disjoint. If a layer has too
            little room, a random set holds all its neurons outside the top, and as few of the top as possible.
        harmless: General ability on harmless prompts. The rows of each field are the shares, then the aligned model by
            itself, then the base model by itself. None unless harmless prompts were given.
        kinds: Kinds of the replies to the harmful prompts, where the score reads replies: at each share, then of the
            aligned model by itself, then of the base model by itself. Empty for other scores, and in results saved by
            earlier versions. A reply that both unedited models find too unlikely is degenerate here, whatever the
            judge says of its text. F and C count the judge's verdict alone.

    Example:
        >>> curve = ms.neurons.causal_effect_curve(
        ...     base, model, ranking, harmful, metric, shares=[0.01, 0.05], n_random=2
        ... )
        >>> [round(effect, 1) for effect in curve.effects]
        [0.0, 1.0]
    """

    provenance: Provenance
    aligned: Provenance
    score: str
    shares: tuple[float, ...]
    counts: tuple[int, ...]
    base_scores: Float[Tensor, " prompt"]
    aligned_scores: Float[Tensor, " prompt"]
    patched: Float[Tensor, "share prompt"]
    random: Float[Tensor, "share set prompt"]
    overlaps: tuple[float, ...]
    harmless: Ability | None
    kinds: tuple[ReplyKinds, ...] = ()

    def __repr__(self) -> str:
        found = ", ".join(f"{share:.1%}: {effect:.2f}" for share, effect in zip(self.shares, self.effects, strict=True))
        babble = max((one.share("degenerate") for one in self.kinds[: len(self.shares)]), default=None)
        said = "" if babble is None else f"; at most {babble:.0%} of replies degenerate"
        return f"CausalCurve({self.score}, {len(self.base_scores)} prompts; {found}{said})"

    @property
    def gap(self) -> float:
        """Mean score of the aligned model less that of the base model."""
        return float((self.aligned_scores - self.base_scores).mean())

    @property
    def effects(self) -> list[float]:
        """C at every share."""
        return ((self.patched - self.base_scores).mean(-1) / self.gap).tolist()

    @property
    def random_effects(self) -> Float[Tensor, "share set"]:
        """C of every random set."""
        return (self.random - self.base_scores).mean(-1) / self.gap

    def intervals(self, seed: int = 0, n: int = 2000) -> list[tuple[float, float]]:
        """95 % interval of C over prompts (`ratio_intervals`), which includes the variation of the gap."""
        base, aligned = self.base_scores.double().numpy(), self.aligned_scores.double().numpy()
        return ratio_intervals(self.patched.double().numpy() - base, aligned - base, seed, n)

    def smallest(self, effect: float = 0.9) -> float | None:
        """The smallest measured share with C of at least ``effect``; None if no share reaches it."""
        reached = [share for share, found in zip(self.shares, self.effects, strict=True) if found >= effect]
        return min(reached, default=None)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per share: C with its interval, the random sets' mean, range and p, and general ability.

        Where the score reads replies, a row also has the share of degenerate replies with its Wilson interval, and the
        replies' perplexity. General ability has intervals. ``random_low`` and ``random_high`` are the 2.5 and 97.5
        percentiles of the random sets.
        ``p_value = (1 + number of random sets with C at least the top's) / (1 + number of sets)``.
        """
        chosen, control = np.array(self.effects), self.random_effects.double().numpy()
        intervals = self.intervals()
        frame = pd.DataFrame({"share": self.shares, "neurons": self.counts, "effect": chosen})
        frame["ci_low"], frame["ci_high"] = zip(*intervals, strict=True)
        known = ~np.isnan(control).any(axis=1)
        columns = ("random_mean", "random_low", "random_high", "p_value")
        for name in columns:
            frame[name] = np.nan
        for k in np.flatnonzero(known):
            low, high = np.percentile(control[k], [2.5, 97.5])
            p = (1 + (control[k] >= chosen[k]).sum()) / (1 + control.shape[1])
            frame.loc[k, list(columns)] = [control[k].mean(), low, high, p]
        frame["random_overlap"] = self.overlaps
        if self.kinds:
            frame = frame.join(kinds_table(self.kinds[: len(self.shares)]))
        if self.harmless is not None:
            frame = frame.join(self.harmless.to_dataframe().iloc[: len(self.shares)])
        return frame

    def plot(self) -> go.Figure:
        """C against the share of neurons, with its interval and the band of the random sets."""
        frame = self.to_dataframe()
        percent = frame.share * 100
        known = frame[frame.random_mean.notna()]
        figure = go.Figure()
        if len(known):
            band = [*(known.share * 100), *(known.share * 100)[::-1]]
            edge = [*known.random_high, *known.random_low[::-1]]
            name = "random neurons of the same layers (95 %)"
            figure.add_scatter(
                x=band, y=edge, fill="toself", mode="none", fillcolor="rgba(128,128,128,0.35)", name=name
            )
        bars = {
            "type": "data",
            "symmetric": False,
            "array": frame.ci_high - frame.effect,
            "arrayminus": frame.effect - frame.ci_low,
        }
        figure.add_scatter(x=percent, y=frame.effect, error_y=bars, mode="lines+markers", name="top neurons")
        figure.update_xaxes(
            type="log", title="share of all neurons, %", tickvals=percent, ticktext=[f"{x:g}" for x in percent]
        )
        figure.update_yaxes(title=f"causal effect C on {self.score}")
        return figure


@sweeps
@public
def causal_effect_curve(
    base: LensModel,
    aligned: LensModel,
    ranking: NeuronScores | Float[Tensor, "layer d_mlp"],
    prompts: Prompts,
    score: Score,
    *,
    shares: Sequence[float] = SHARES,
    n_random: Count = 20,
    harmless: Prompts | None = None,
    max_new_tokens: Count = REPLY_TOKENS,
    limit: float | None = None,
    seed: Amount = 0,
    progress: bool = True,
) -> CausalCurve:
    """C(k) of dynamic patching for growing shares of the ranked neurons (Chen et al. 2024).

    C at a share of 1 is the ceiling of the pair of models. It is exactly 1 if the models differ only in their MLPs.

    Args:
        base: The model that is patched.
        aligned: The model whose neurons are taken.
        ranking: Scores that rank the neurons.
        prompts: Harmful prompts, other than those that the ranking comes from.
        score: `RefusalLogOdds` or `ReplyLikelihood`, which generate nothing; a judge of replies, whose refusals are
            counted (`phrase_judge`, a `TextClassifier`, or any function from prompts and replies to kinds); or a
            `ReplyScore`.
        shares: Shares of all neurons.
        n_random: Number of random sets per share. Each set has as many neurons in each layer as the top, and none of
            the top. Where more than half of a layer is in the top, it has as few of the top as possible.
        harmless: Prompts on which general ability is measured; none by default.
        max_new_tokens: Length, in tokens, of the replies that a judge reads and that ability is measured on. 100 as in
            published protocols, because whether a reply answers or babbles shows only after its opener.
        limit: Loss per token above which a reply is degenerate, in nats. By default the larger
            `mechsafety.replies.loss_limit` of the two models.
        seed: Seed of the random sets.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: Models that are not a pair, a ranking of another shape, or a share that is missing or out of
            range. Also no random sets, no prompts, or a score on which the two models do not differ.

    Example:
        >>> curve = ms.neurons.causal_effect_curve(base, model, ranking, harmful, metric, shares=[0.05], n_random=2)
        >>> curve.effects[0] > 0.9  # six of 120 neurons carry the change
        True
    """
    check_pair(base, aligned)
    judge_of(score)  # a judge that cannot be called is refused before anything runs
    prompts = distinct(prompts, "harmful prompts")
    harmless = None if harmless is None else distinct(harmless, "harmless prompts")
    if not shares:
        raise MechsafetyError("no shares", expected="at least one, above 0 and at most 1")
    values = check_ranking(base, ranking.scores if isinstance(ranking, NeuronScores) else ranking)
    order = sorted(set(shares))
    counts = [share_count(share, values.numel()) for share in order]
    chosen = [top_mask(values, count) for count in counts]
    none = torch.zeros_like(chosen[0])
    controls = [random_masks(mask, n_random, seed + k, fill=True) for k, mask in enumerate(chosen)]
    overlaps = [
        float((sets[0] & mask).sum() / mask.sum()) if sets else 1.0 for sets, mask in zip(controls, chosen, strict=True)
    ]
    masks = [*chosen, *(mask for sets in controls for mask in sets or [])]
    ends = [measure(model, None, [none], prompts, score, max_new_tokens=max_new_tokens) for model in (base, aligned)]
    alone = [end.scores[0] for end in ends]
    gap = float((alone[1] - alone[0]).mean())
    if abs(gap) < 1e-6:
        raise MechsafetyError(
            f"{base.name} and {aligned.name} have the same mean {score_name(score)}",
            expected="a score in which alignment shows",
        )
    found = measure(base, aligned, masks, prompts, score, max_new_tokens=max_new_tokens, progress=progress)
    control = torch.full((len(order), n_random, len(prompts)), float("nan"))
    at = len(order)
    for k, sets in enumerate(controls):
        if sets is not None:
            control[k] = found.scores[at : at + n_random]
            at += n_random
    cost = None
    if harmless is not None:
        cost = ability(base, aligned, chosen, harmless, max_new_tokens=max_new_tokens, progress=progress)
    kinds: tuple[ReplyKinds, ...] = ()
    if found.replies:
        unedited = Unedited.of(base, aligned, limit=limit)
        kinds = tuple(
            row
            for one, count in ((found, len(order)), (ends[1], 1), (ends[0], 1))
            for row in unedited.judged(prompts, one, count)
        )
    options = {
        "score": score_name(score),
        "random_sets": n_random,
        "max_new_tokens": max_new_tokens,
        "prompts_sha256": digest(prompts),
        "harmless_sha256": None if harmless is None else digest(harmless),
    }
    return CausalCurve(
        base.provenance(seed=seed, options=options),
        aligned.provenance(),
        score_name(score),
        tuple(order),
        tuple(counts),
        alone[0],
        alone[1],
        found.scores[: len(order)],
        control,
        tuple(overlaps),
        cost,
        kinds,
    )
