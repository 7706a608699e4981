"""How patching is judged: safety scores of prompts, and general ability on harmless prompts."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsafety.conversation import PromptLike
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Count, Prompts, prompt_list, public, text_list
from mechsafety.intervals import mean_interval
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.models.rows import Rows, lay_out, prompt_rows
from mechsafety.neurons.runs import batches, forced, greedy, greedy_replies
from mechsafety.progress import progress_bar
from mechsafety.replies import (
    REPLY_TOKENS,
    Judge,
    ReplyKinds,
    ask_judge,
    check_judge,
    loss_limit,
    phrase_judge,
    reply_loss,
    with_loss,
)
from mechsafety.scale.work import sweeps, work


@dataclass(frozen=True, slots=True)
class ReplyLikelihood:
    """Mean log-probability per token of a given reply to each prompt, in nats.

    Attributes:
        replies: One reply per prompt, in order. The model's end token is appended to each.

    Example:
        >>> score = ms.neurons.ReplyLikelihood(["Sorry , I can not help ."] * len(harmful))
        >>> ms.neurons.measure(base, model, [ranking.top(0.05)], harmful, score).scores.shape  # mask, prompt
        torch.Size([1, 8])
    """

    replies: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "replies", tuple(text_list(self.replies, "replies")))


@dataclass(frozen=True, slots=True)
class ReplyScore:
    """A number for each reply: a cost model's, or a classifier's probability of a label.

    Attributes:
        name: What the score is called in results.
        of: Function from prompts and replies to numbers, such as
            ``lambda asked, said: TextClassifier(...).probabilities(asked, said)[:, 1].tolist()``.

    Example:
        >>> words = ms.neurons.ReplyScore("words", lambda prompts, replies: [len(reply.split()) for reply in replies])
        >>> ms.neurons.measure(base, model, [ranking.top(0.05)], harmful[:1], words, max_new_tokens=8).scores
        tensor([[7.]])
    """

    name: str
    of: Callable[[Sequence[str], Sequence[str]], Sequence[float]]


Score = RefusalLogOdds | ReplyLikelihood | ReplyScore | Judge


def score_name(score: Score) -> str:
    """What a score is called in results."""
    if isinstance(score, RefusalLogOdds):
        return score.name
    if isinstance(score, ReplyLikelihood):
        return "reply_log_likelihood"
    if isinstance(score, ReplyScore):
        return score.name
    return getattr(score, "__name__", type(score).__name__)


def judge_of(score: Score) -> Judge | None:
    """The judge that gives the kind of each reply: the score itself, or the phrase judge for a `ReplyScore`.

    None for a score that is read on given tokens, because nothing is generated for it.

    Raises:
        MechsafetyError: A judge that cannot be called with prompts and replies.
    """
    if isinstance(score, RefusalLogOdds | ReplyLikelihood):
        return None
    if isinstance(score, ReplyScore):
        return phrase_judge
    check_judge(score)
    return score


@dataclass(frozen=True, slots=True)
class Measured:
    """Scores under each mask, and the replies that they were read from.

    Attributes:
        scores: The score of each prompt. A judge's score is 1 where it says ``refuses`` and otherwise 0.
        replies, kinds: The replies under each mask, and the kind that the judge gives each. Empty where no reply is
            generated.

    Example:
        >>> measured = ms.neurons.measure(base, model, [ranking.top(0.05)], harmful, metric)
        >>> measured.scores.shape  # mask, prompt
        torch.Size([1, 8])
    """

    scores: Float[Tensor, "mask prompt"]
    replies: tuple[tuple[str, ...], ...] = ()
    kinds: tuple[tuple[str, ...], ...] = ()


@sweeps
@public
def measure(
    base: LensModel,
    aligned: LensModel | None,
    masks: Sequence[Bool[Tensor, "layer d_mlp"]],
    prompts: Prompts,
    score: Score,
    *,
    max_new_tokens: Count = REPLY_TOKENS,
    progress: bool = False,
) -> Measured:
    """Score of every prompt under dynamic patching with each mask.

    Log-odds and likelihoods need no generation. They are read on given tokens, and the aligned model runs once for all
    masks. Judges and reply scores read greedy replies.

    Args:
        base: The model that speaks.
        aligned: The model whose neurons are taken. None for the base model by itself; then give one empty mask.
        masks: The neurons taken, one mask per condition.
        prompts: Chat prompts.
        score: `RefusalLogOdds`, `ReplyLikelihood`, `ReplyScore`, or a `mechsafety.replies.Judge`.
        max_new_tokens: Length of the generated replies, in tokens. Whether a reply answers or babbles shows only after
            its opener.
        progress: Whether to show a bar.

    Example:
        >>> none, some = torch.zeros(4, 30) > 0, ms.neurons.neuron_mask(model, made.truth.neurons)
        >>> scores = ms.neurons.measure(base, model, [none, some], harmful, metric).scores
        >>> bool((scores[1] > scores[0]).all())
        True
    """
    if isinstance(score, ReplyLikelihood):
        return Measured(_likelihood(base, aligned, masks, prompts, score, progress))
    judge = judge_of(score)
    rows = prompt_rows(base, prompts)
    out, texts = torch.zeros(len(masks), len(rows)), [[""] * len(rows) for _ in masks]
    chunks = batches([len(row) for row in rows], None if judge is None else 16)
    with progress_bar(total=len(chunks) * len(masks), desc="measuring", show=progress) as bar:
        if isinstance(score, RefusalLogOdds):

            def scored(chunk: list[int], read: RefusalLogOdds = score) -> Iterator[Tensor]:
                after = lay_out(base, [[*rows[k], *read.opener_ids] for k in chunk])
                return (read(logits[:, -1]).float().cpu() for logits in forced(base, aligned, masks, after))

            found = work("measuring", chunks, scored, tuple[Tensor, ...])
            for chunk, values in zip(chunks, found, strict=True):
                for m, value in enumerate(values):
                    out[m, chunk] = value
                    bar.update()
            return Measured(out)

        def spoken(item: tuple[list[int], int]) -> list[str]:
            batch, mask = lay_out(base, [rows[k] for k in item[0]]), masks[item[1]]
            donor = aligned if bool(mask.any()) else None
            return base.decode(greedy(base, donor, mask, batch, max_new_tokens)[0])

        items = [(chunk, m) for chunk in chunks for m in range(len(masks))]
        for (chunk, m), said in zip(items, work("replies", items, spoken, tuple[str, ...]), strict=True):
            for k, text in zip(chunk, said, strict=True):
                texts[m][k] = text
            bar.update()
    if judge is None:
        return Measured(out)
    kinds = tuple(ask_judge(judge, prompts, replies) for replies in texts)
    for m, replies in enumerate(texts):
        refused = [kind == "refuses" for kind in kinds[m]]
        own = score.of(prompt_list(prompts), replies) if isinstance(score, ReplyScore) else refused
        out[m] = torch.tensor([float(value) for value in own])
    return Measured(out, tuple(map(tuple, texts)), kinds)


@dataclass(frozen=True, slots=True)
class Unedited:
    """The unedited models of a pair, which say how likely a patched reply is.

    A patched reply may be the text of any of the models. It is too unlikely only if all of them find it so.

    Attributes:
        models: The base and the aligned model, or more.
        limit: The largest of their loss limits, in nats per token.
    """

    models: tuple[LensModel, ...]
    limit: float

    @classmethod
    def of(cls, *models: LensModel, limit: float | None = None) -> "Unedited":
        """The models and their loss limit; without ``limit``, each model generates answers to find its own limit."""
        if limit is not None:
            return cls(models, float(limit))
        known = [found for found in map(loss_limit, models) if not math.isnan(found)]
        return cls(models, max(known, default=math.nan))

    def kinds(self, prompts: Sequence[PromptLike], replies: Sequence[str], kinds: Sequence[str]) -> ReplyKinds:
        """A judge's kinds with the smallest loss of any model; degenerate where that loss is above the limit."""
        losses = torch.stack([reply_loss(model, prompts, replies) for model in self.models])
        return with_loss(kinds, losses.amin(0), self.limit)

    def judged(self, prompts: Sequence[PromptLike], found: Measured, count: int) -> tuple[ReplyKinds, ...]:
        """The same for the replies under the first ``count`` masks; empty where the score needed no replies."""
        rows = list(zip(found.replies, found.kinds, strict=True))[:count]
        return tuple(self.kinds(prompts, replies, kinds) for replies, kinds in rows)


def kinds_table(found: Sequence[ReplyKinds]) -> pd.DataFrame:
    """One row per condition: share of degenerate replies with its Wilson interval, and perplexity."""
    rows = [(one.share("degenerate"), *one.interval("degenerate"), one.perplexity) for one in found]
    return pd.DataFrame(rows, columns=["degenerate", "degenerate_low", "degenerate_high", "reply_perplexity"])


@dataclass(frozen=True, slots=True)
class Ability:
    """What patching changes on harmless prompts, teacher-forced on the unpatched base model's own greedy replies.

    Rows are the masks, then the aligned model by itself, then the base model by itself.

    Attributes:
        kl: KL(base || patched), mean over the reply's tokens, in nats.
        nll: Mean negative log-likelihood of the reply's tokens, in nats; ``exp`` of its mean is the perplexity.
        agreement: Share of the base model's reply that the patched model's greedy reply repeats. This is the part
            before the first token that is not the patched model's most probable one.

    Example:
        >>> changed = ms.neurons.ability(base, model, [ranking.top(0.05)], harmless)
        >>> changed.to_dataframe().columns[::3].tolist()
        ['kl', 'perplexity', 'agreement']
    """

    kl: Float[Tensor, "row prompt"]
    nll: Float[Tensor, "row prompt"]
    agreement: Float[Tensor, "row prompt"]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per mask, then the aligned model, then the base model: means over prompts with intervals."""
        rows = []
        for kl, nll, agreement in zip(self.kl, self.nll, self.agreement, strict=True):
            row: dict[str, float] = {}
            for name, values in (("kl", kl), ("perplexity", nll), ("agreement", agreement)):
                found = [float(values.double().mean()), *mean_interval(values.double().numpy())]
                found = [math.exp(value) for value in found] if name == "perplexity" else found
                row |= dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))
            rows.append(row)
        return pd.DataFrame(rows)


@sweeps
@public
def ability(
    base: LensModel,
    aligned: LensModel,
    masks: Sequence[Bool[Tensor, "layer d_mlp"]],
    prompts: Prompts,
    *,
    max_new_tokens: Count = 16,
    progress: bool = False,
) -> Ability:
    """General ability on harmless prompts under dynamic patching with each mask.

    Example:
        >>> changed = ms.neurons.ability(base, model, [ranking.top(0.05)], harmless)
        >>> changed.agreement.shape  # the mask, the whole aligned model and the base itself; prompts
        torch.Size([3, 8])
    """
    replies = greedy_replies(base, prompts, max_new_tokens)
    none = torch.zeros(base.n_layers, base.d_mlp, dtype=torch.bool)
    kl, nll, agreement = (torch.zeros(len(masks) + 2, len(prompts)) for _ in range(3))
    batch_rows = _reply_batches(base, prompts, replies)

    def compared(number: int) -> Iterator[Tensor]:
        _, batch, labels, real = batch_rows[number]
        keep = labels.shape[1]
        own = next(forced(base, None, [none], batch, keep)).log_softmax(-1)
        runs = chain(forced(base, aligned, masks, batch, keep), forced(aligned, None, [none], batch, keep))
        for now in chain((logits.log_softmax(-1) for logits in runs), [own]):
            divergence = _mean((own.exp() * (own - now.to(own.device))).sum(-1), real)
            right = (now.argmax(-1).to(labels.device) == labels) | ~real
            agrees = _mean(right.long().cumprod(1).float(), real)
            yield torch.stack([divergence, _mean(-_chosen(now, labels), real), agrees])

    found = zip(batch_rows, work("ability", range(len(batch_rows)), compared, tuple[Tensor, ...]), strict=True)
    for (chunk, *_), values in progress_bar(found, total=len(batch_rows), desc="general ability", show=progress):
        for row, value in enumerate(values):
            kl[row, chunk], nll[row, chunk], agreement[row, chunk] = value
    return Ability(kl, nll, agreement)


def _likelihood(
    base: LensModel,
    aligned: LensModel | None,
    masks: Sequence[Bool[Tensor, "layer d_mlp"]],
    prompts: Sequence[PromptLike],
    score: ReplyLikelihood,
    progress: bool,
) -> Float[Tensor, "mask prompt"]:
    """Mean log-probability per token of each prompt's reply and its end token."""
    if len(score.replies) != len(prompts):
        raise MechsafetyError(f"{len(score.replies)} replies to {len(prompts)} prompts", expected="one per prompt")
    end = base.tokenizer.eos_token_id
    replies = [base.tokenizer(reply, add_special_tokens=False)["input_ids"] for reply in score.replies]
    out = torch.zeros(len(masks), len(prompts))
    batch_rows = _reply_batches(base, prompts, [reply if end is None else [*reply, end] for reply in replies])

    def scored(number: int) -> Iterator[Tensor]:
        _, batch, labels, real = batch_rows[number]
        for logits in forced(base, aligned, masks, batch, labels.shape[1]):
            yield _mean(_chosen(logits.log_softmax(-1), labels), real)

    found = zip(batch_rows, work("likelihood", range(len(batch_rows)), scored, tuple[Tensor, ...]), strict=True)
    for (chunk, *_), values in progress_bar(found, total=len(batch_rows), desc="measuring", show=progress):
        for row, value in enumerate(values):
            out[row, chunk] = value
    return out


def _reply_batches(
    model: LensModel, prompts: Sequence[PromptLike], replies: Sequence[Sequence[int]]
) -> list[tuple[list[int], Rows, Tensor, Tensor]]:
    """Batches of prompt and reply; each with the reply tokens to predict at its last columns, and where one is real."""
    rows, out = prompt_rows(model, prompts), []
    for chunk in batches([len(row) + len(reply) for row, reply in zip(rows, replies, strict=True)], 16):
        said = [list(replies[k]) for k in chunk]
        tail = max(map(len, said))
        # nothing is read after the last token
        whole = [[*rows[k], *reply][:-1] for k, reply in zip(chunk, said, strict=True)]
        batch = lay_out(model, whole, min(len(rows[k]) for k in chunk) - 1)
        labels = torch.tensor([[0] * (tail - len(reply)) + reply for reply in said], device=model.device)
        real = torch.tensor([[k >= tail - len(reply) for k in range(tail)] for reply in said], device=model.device)
        out.append((chunk, batch, labels, real))
    return out


def _chosen(
    log_probs: Float[Tensor, "batch pos d_vocab"], labels: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    index = rearrange(labels.to(log_probs.device), "batch pos -> batch pos 1")
    return rearrange(log_probs.gather(-1, index), "batch pos 1 -> batch pos")


def _mean(values: Float[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]) -> Float[Tensor, " batch"]:
    real = real.to(values.device)
    return ((values * real).sum(1) / real.sum(1).clamp(min=1)).cpu()
