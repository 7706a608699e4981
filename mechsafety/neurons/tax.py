"""The alignment tax: what two alignments' common neurons do to safety and to helpfulness."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Amount, Count, Prompts, public
from mechsafety.intervals import mean_interval
from mechsafety.models import LensModel
from mechsafety.neurons.agreement import NeuronAgreement, compare_neurons
from mechsafety.neurons.behaviour import Measured, Score, Unedited, judge_of, kinds_table, measure, score_name
from mechsafety.neurons.masks import check_ranking, random_masks
from mechsafety.neurons.runs import check_pair
from mechsafety.neurons.scores import NeuronScores, digest
from mechsafety.prompts import distinct
from mechsafety.replies import REPLY_TOKENS, ReplyKinds
from mechsafety.results import Provenance, Result
from mechsafety.scale.work import sweeps

ROWS = ("base", "safe", "helpful", "safe <- helpful", "helpful <- safe")


@dataclass(frozen=True, slots=True, repr=False)
class AlignmentTax(Result):
    """Safety and helpfulness of two aligned models, and of each with the other's common neurons.

    Attributes:
        provenance, safe, helpful: The base model and its two alignments.
        agreement: Overlap and rank correlation of the two alignments' neuron scores.
        common: Mask of the neurons that are in the top of both rankings.
        scores: Names of the safety and the helpfulness score.
        safety: Safety score of each harmful prompt. The rows are those of `ROWS`: the base model; the safe model; the
            helpful model; the safe model with the helpful model's activations on the common neurons; and the reverse.
        helpfulness: Helpfulness score of each harmless prompt, with the same rows.
        random_safety, random_helpfulness: The two patched rows with random neurons instead of the common ones, as many
            in each layer. None of them is common where every layer has room for that. NaN if all neurons are common.
        random_overlap: Share of the random neurons that are common; 0 where every layer had room.
        safety_kinds, helpfulness_kinds: Kinds of the replies of each row, where the score reads replies. Empty for
            other scores, and in results saved by earlier versions. A reply that all three unedited models find too
            unlikely is degenerate here; the scores count the judge's verdict alone.

    Example:
        >>> rankings = ranking, ms.safety_neurons(helpful, base, harmless)
        >>> score = ms.neurons.ReplyLikelihood(["Sure ! here is how ."] * len(harmless))
        >>> tax = ms.neurons.alignment_tax(
        ...     base, model, helpful, rankings, harmful, harmless, metric, score,
        ...     bins=5, n_random=2, n_permutations=99,
        ... )
        >>> tax.to_dataframe().model.tolist()
        ['base', 'safe', 'helpful', 'safe <- helpful', 'helpful <- safe']
    """

    provenance: Provenance
    safe: Provenance
    helpful: Provenance
    agreement: NeuronAgreement
    common: Bool[Tensor, "layer d_mlp"]
    scores: tuple[str, ...]
    safety: Float[Tensor, "5 harmful"]
    helpfulness: Float[Tensor, "5 harmless"]
    random_safety: Float[Tensor, "2 set harmful"]
    random_helpfulness: Float[Tensor, "2 set harmless"]
    random_overlap: float
    safety_kinds: tuple[ReplyKinds, ...] = ()
    helpfulness_kinds: tuple[ReplyKinds, ...] = ()

    def __repr__(self) -> str:
        return f"AlignmentTax({int(self.common.sum())} common neurons; {self.agreement!r})"

    def to_dataframe(self) -> pd.DataFrame:
        """One row per model: mean safety and helpfulness with intervals, and the effect of random sets.

        ``*_random_low`` and ``*_random_high`` are the lowest and highest mean of the random sets. ``*_p`` is two-sided:
        (1 + number of sets that move the model's mean at least as far) / (1 + number of sets). Where the score reads
        replies, ``*_degenerate`` is the share of degenerate replies, with its Wilson interval. ``*_reply_perplexity``
        is the replies' perplexity.
        """
        rows = []
        for k, name in enumerate(ROWS):
            row: dict[str, float | str] = {"model": name}
            for kind, values, control in (
                ("safety", self.safety, self.random_safety),
                ("helpfulness", self.helpfulness, self.random_helpfulness),
            ):
                low, high = mean_interval(values[k].double().numpy())
                row |= {kind: float(values[k].mean()), f"{kind}_low": low, f"{kind}_high": high}
                draws = control[k - 3].mean(-1) if k >= 3 else torch.full((1,), float("nan"))
                row |= {f"{kind}_random_low": float(draws.min()), f"{kind}_random_high": float(draws.max())}
                # the patched rows 3 and 4 belong to the unpatched rows 1 and 2, the safe and the helpful model
                own = values[k - 2].mean()
                far = (draws - own).abs() >= (values[k].mean() - own).abs()
                known = not bool(draws.isnan().any())
                row[f"{kind}_p"] = (1 + int(far.sum())) / (1 + len(draws)) if known else float("nan")
            rows.append(row)
        frame = pd.DataFrame(rows)
        for kind, found in (("safety", self.safety_kinds), ("helpfulness", self.helpfulness_kinds)):
            if found:
                frame = frame.join(kinds_table(found).add_prefix(f"{kind}_"))
        return frame

    def plot(self) -> go.Figure:
        """Helpfulness against safety, one point per model."""
        import plotly.express as px

        frame = self.to_dataframe()
        names = {"safety": self.scores[0] + ", harmful prompts", "helpfulness": self.scores[1] + ", harmless prompts"}
        return px.scatter(frame, x="safety", y="helpfulness", text="model", labels=names)


@sweeps
@public
def alignment_tax(
    base: LensModel,
    safe: LensModel,
    helpful: LensModel,
    rankings: tuple[NeuronScores, NeuronScores],
    harmful: Prompts,
    harmless: Prompts,
    safety: Score,
    helpfulness: Score,
    *,
    share: float = 0.05,
    bins: int = 20,
    n_random: Count = 20,
    n_permutations: Count = 1000,
    max_new_tokens: Count = REPLY_TOKENS,
    limit: float | None = None,
    seed: Amount = 0,
    progress: bool = True,
) -> AlignmentTax:
    """Compare two alignments of one base model neuron by neuron (Chen et al. 2024).

    1. Compare the two rankings of neurons by overlap and rank correlation.
    2. Let each aligned model speak with the other's activations on the common neurons: those in both tops.
    3. Measure safety and helpfulness of the base model, of both aligned models, and of both patched models.

    Args:
        base: The base model.
        safe: An alignment for safety.
        helpful: An alignment for helpfulness.
        rankings: Neuron scores of ``safe`` and of ``helpful``, both against ``base``.
        harmful: Prompts for the safety score, other than those of the rankings.
        harmless: Prompts for the helpfulness score.
        safety: Score of harmful prompts, as for `causal_effect_curve`.
        helpfulness: Score of harmless prompts.
        share: Share of the neurons that counts as the top of a ranking.
        bins: Number of groups of similar base activation in each layer, as for `compare_neurons`.
        n_random: Number of random sets to compare the common neurons with. Where more than half of a layer is common, a
            set has all its other neurons and as few common ones as possible.
        n_permutations: Number of draws of each permutation null.
        max_new_tokens: Length of the replies that a judge reads, in tokens; 100 as in published protocols.
        limit: Loss per token above which a reply is degenerate, in nats. By default the largest
            `mechsafety.replies.loss_limit` of the three models.
        seed: Seed of the permutations and the random sets.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: Models that are not a pair, rankings that do not fit, no random sets, or tops without a common
            neuron.

    Example:
        >>> rankings = ranking, ms.safety_neurons(helpful, base, harmless)
        >>> score = ms.neurons.ReplyLikelihood(["Sure ! here is how ."] * len(harmless))
        >>> tax = ms.neurons.alignment_tax(
        ...     base, model, helpful, rankings, harmful, harmless, metric, score,
        ...     bins=5, n_random=2, n_permutations=99,
        ... )
        >>> int(tax.common.sum())  # neurons among the top 5 % of both rankings
        4
    """
    for aligned in (safe, helpful):
        check_pair(base, aligned)
    check_pair(safe, helpful)
    for score in (safety, helpfulness):
        judge_of(score)  # a judge that cannot be called is refused before anything runs
    harmful, harmless = distinct(harmful, "harmful prompts"), distinct(harmless, "harmless prompts")
    for ranking in rankings:
        check_ranking(base, ranking.scores)
    agreement = compare_neurons(*rankings, share=share, bins=bins, n_permutations=n_permutations, seed=seed)
    common = rankings[0].top(share) & rankings[1].top(share)
    if not bool(common.any()):
        raise MechsafetyError(
            f"the top {share:.1%} of the two rankings have no neuron in common", hint="take a larger share"
        )
    sets = random_masks(common, n_random, seed, fill=True)
    overlap = float((sets[0] & common).sum() / common.sum()) if sets else 1.0
    masks = [common, *(sets or [])]
    found, said = {}, {}
    unedited: Unedited | None = None
    for kind, prompts, score in (("safety", harmful, safety), ("helpfulness", harmless, helpfulness)):
        runs = _five_models(base, safe, helpful, masks, prompts, score, max_new_tokens, progress)
        control = torch.stack([one.scores[1:] for one in runs[3:]])
        if not sets:
            control = torch.full((2, n_random, len(prompts)), torch.nan)
        found[kind] = torch.cat([one.scores[:1] for one in runs]), control
        if runs[0].replies and unedited is None:
            unedited = Unedited.of(base, safe, helpful, limit=limit)
        said[kind] = tuple(row for one in runs if unedited for row in unedited.judged(prompts, one, 1))
    options = {
        "share": share,
        "common": int(common.sum()),
        "random_sets": n_random,
        "max_new_tokens": max_new_tokens,
        "harmful_sha256": digest(harmful),
        "harmless_sha256": digest(harmless),
    }
    return AlignmentTax(
        base.provenance(seed=seed, options=options),
        safe.provenance(),
        helpful.provenance(),
        agreement,
        common,
        (score_name(safety), score_name(helpfulness)),
        found["safety"][0],
        found["helpfulness"][0],
        found["safety"][1],
        found["helpfulness"][1],
        overlap,
        said["safety"],
        said["helpfulness"],
    )


def _five_models(
    base: LensModel,
    safe: LensModel,
    helpful: LensModel,
    masks: Sequence[Bool[Tensor, "layer d_mlp"]],
    prompts: Sequence[str],
    score: Score,
    max_new_tokens: int,
    progress: bool,
) -> list[Measured]:
    """The three models as they are, then each aligned one with the other's activations on every set of neurons."""
    none = torch.zeros_like(masks[0])
    return [
        *(
            measure(model, None, [none], prompts, score, max_new_tokens=max_new_tokens)
            for model in (base, safe, helpful)
        ),
        *(
            measure(model, donor, masks, prompts, score, max_new_tokens=max_new_tokens, progress=progress)
            for model, donor in ((safe, helpful), (helpful, safe))
        ),
    ]
