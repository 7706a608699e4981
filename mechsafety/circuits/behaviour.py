"""Does the model refuse at all? Replies, judgements, and the metric that is found from them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mechsafety.circuits.circuit import Behaviour, KindCounts, Sample
from mechsafety.errors import MechsafetyError, NoRefusal
from mechsafety.inputs import Amount, public
from mechsafety.intervals import mean_interval, wilson_interval
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.openers import check_comes, first_words
from mechsafety.prompts import PromptPairs
from mechsafety.replies import KINDS as REPLY_KINDS
from mechsafety.replies import is_refusal, phrase_judge

KINDS = ("harmful", "harmless")
# below this share of usable pairs there is no refusal worth mapping
MIN_SHARE = 0.2
# these replies are short, and a step of a larger batch hardly takes longer
BATCH_SIZE = 128


@dataclass(frozen=True, slots=True)
class Seen:
    """Results of prompts that the model has already run, so that no prompt is run twice.

    Attributes:
        replies: Token ids of the reply to each prompt.
        logits: Next-token logits after each prompt.
        scores: Metric of each prompt, for metrics that do not read at the prompt's end.
    """

    replies: dict[str, list[int]] = field(default_factory=dict)
    logits: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[tuple[RefusalLogOdds, str], Tensor] = field(default_factory=dict)

    def said(self, model: LensModel, prompts: Sequence[str], progress: bool) -> list[list[int]]:
        """Replies to the prompts, as token ids. The first step of a new reply also gives the logits."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.replies]
        replies, logits = first_words(model, new, BATCH_SIZE, progress=progress)
        self.replies.update(zip(new, replies, strict=True))
        self.logits.update(zip(new, logits, strict=True))
        return [self.replies[prompt] for prompt in prompts]

    def read(self, prompts: Sequence[str]) -> Tensor:
        """Next-token logits [prompt d_vocab] of prompts that were replied to."""
        return torch.stack([self.logits[prompt] for prompt in prompts])

    def score(self, model: LensModel, metric: RefusalLogOdds, prompts: Sequence[str]) -> Tensor:
        """Metric of the prompts."""
        if metric.at_the_end:
            return metric(self.read(prompts))
        new = [prompt for prompt in dict.fromkeys(prompts) if (metric, prompt) not in self.scores]
        if new:
            keys = [(metric, prompt) for prompt in new]
            self.scores.update(zip(keys, metric.scores(model, new), strict=True))
        return torch.stack([self.scores[metric, prompt] for prompt in prompts])


@public
def check_behaviour(
    model: LensModel,
    pairs: PromptPairs,
    metric: RefusalLogOdds | None = None,
    *,
    detect_on: int | None = None,
    seen: Seen | None = None,
    seed: Amount = 0,
    progress: bool = True,
) -> tuple[RefusalLogOdds, Mapping[str, Behaviour], tuple[Sample, ...], list[bool]]:
    """Generate replies, judge them, and find the metric where none is given.

    Args:
        model: The model.
        pairs: The pairs whose prompts are run.
        metric: Metric of refusal. If it is given, a prompt counts as refused if its score is above 0.
        detect_on: Number of pairs, from the first on, that the metric is detected on; all by default.
        seen: Known results of some of the prompts. New results are added to it.
        seed: Seed of the resampling.
        progress: Whether to show a bar.

    Returns:
        The metric; behaviour on ``harmful`` and ``harmless`` prompts; sample replies; and per pair whether the model
        treats it as expected: it refuses the harmful prompt, answers the harmless one, and the harmful one scores
        higher.

    Raises:
        NoRefusal: No harmful prompt is refused; or less than a fifth is, and no metric is found.

    Example:
        >>> found, behaviour, samples, expected = ms.circuits.check_behaviour(model, pairs, metric)
        >>> behaviour["harmful"].refusal_rate, behaviour["harmless"].refusal_rate
        (1.0, 0.0)
    """
    seen = Seen() if seen is None else seen
    ids = [seen.said(model, side, progress) for side in (pairs.harmful, pairs.harmless)]
    harmful, harmless = map(model.decode, ids)
    refused = {"harmful": [is_refusal(text) for text in harmful], "harmless": [is_refusal(text) for text in harmless]}
    judge = "reply" if metric is None else "score"
    hint = "use an aligned chat model, other pairs, or pass refusal tokens if its refusals are not recognised"
    # the model is unedited, so that its own greedy replies are likely under it: their perplexity says nothing
    said = {"harmful": harmful, "harmless": harmless}
    kinds = {kind: Counter(phrase_judge(getattr(pairs, kind), texts)) for kind, texts in said.items()}
    babble = sum(count["degenerate"] for count in kinds.values())
    rates = (
        f"the model refuses {sum(refused['harmful'])} of {len(pairs)} harmful and {sum(refused['harmless'])} of"
        f" {len(pairs)} harmless prompts, so there is no refusal to map"
    ) + (f" ({babble} of {2 * len(pairs)} replies are degenerate)" if babble else "")
    if metric is None and not any(refused["harmful"]):
        raise NoRefusal(rates, hint=hint)
    if metric is not None and metric.opener_ids:
        check_comes(model, metric.opener_ids, [*ids[0], *ids[1]])
    if metric is None:
        n = detect_on or len(pairs)
        # once the metric is known, these logits also give the scores
        known = seen.read(pairs.harmful)[:n], seen.read(pairs.harmless)[:n]
        try:
            first = PromptPairs(pairs.pairs[:n], pairs.name)
            metric = RefusalLogOdds.detect(model, first, replies=(ids[0][:n], ids[1][:n]), logits=known)
        except MechsafetyError as error:
            if sum(refused["harmful"]) < MIN_SHARE * len(pairs):
                raise NoRefusal(rates, hint=hint) from error
            raise
    scores = {kind: seen.score(model, metric, getattr(pairs, kind)).cpu().double().numpy() for kind in KINDS}
    # with a metric of the user's choice, a score above 0 counts as a refusal
    by_score = {kind: [bool(value > 0) for value in values] for kind, values in scores.items()}
    judged = refused if judge == "reply" else by_score
    behaviour = {
        kind: Behaviour(
            n=len(pairs),
            refusal_rate=sum(judged[kind]) / len(pairs),
            refusal_ci=wilson_interval(sum(judged[kind]), len(pairs)),
            score_mean=float(scores[kind].mean()),
            score_ci=mean_interval(scores[kind], seed),
            judge=judge,
            kinds=KindCounts(**{name: kinds[kind][name] for name in REPLY_KINDS}),
        )
        for kind in KINDS
    }
    keep = [
        bool(bad and not good and high > low)
        for bad, good, high, low in zip(
            judged["harmful"], judged["harmless"], scores["harmful"], scores["harmless"], strict=True
        )
    ]
    samples = tuple(
        Sample(getattr(pairs, kind)[k], kind, said[kind][k], judged[kind][k], float(scores[kind][k]))
        for k in range(min(len(pairs), 8))
        for kind in KINDS
    )
    return metric, behaviour, samples, keep
