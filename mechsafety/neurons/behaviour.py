"""What patching is judged by: safety scores of prompts, and what it costs on harmless ones."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from mechsafety.errors import MechsafetyError, first_line
from mechsafety.inputs import Count, Prompts, Texts, public, text_list
from mechsafety.intervals import mean_interval
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.neurons.runs import Rows, batches, forced, greedy, greedy_replies, lay_out, prompt_rows
from mechsafety.replies import is_refusal

Judge = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


@dataclass(frozen=True, slots=True)
class ReplyLikelihood:
    """Mean log-probability per token of a given reply to each prompt, in nats.

    Attributes:
        replies: One a prompt, in order; the model's end token is added.
    """

    replies: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "replies", tuple(text_list(self.replies, "replies")))


Score = RefusalLogOdds | ReplyLikelihood | Judge


@public
def phrase_judge(prompts: Prompts, replies: Texts) -> list[float]:  # noqa: ARG001 (a judge gets both)
    """1 where `is_refusal` calls the reply a refusal, else 0.

    Example:
        >>> phrase_judge(["a", "b"], ["Sorry, I can't help with that.", "Sure!"])
        [1.0, 0.0]
    """
    return [float(is_refusal(reply)) for reply in replies]


@public
def text_classifier(name_or_path: str | os.PathLike[str], label: str, *, batch_size: Count = 16) -> Judge:
    """A judge of replies: the probability that a Hugging Face text classifier gives to ``label``.

    Args:
        name_or_path: Hub id or local folder of a sequence classifier.
        label: One of its labels.
        batch_size: Replies in one batch.

    Raises:
        MechsafetyError: The classifier cannot be loaded, or has no such label.
    """
    from transformers import pipeline

    try:
        pipe: Any = pipeline("text-classification", model=os.fspath(name_or_path), top_k=None)
    except Exception as error:  # transformers raises many types; the user needs one line
        raise MechsafetyError(
            f"cannot load the text classifier {os.fspath(name_or_path)!r} ({first_line(error)})",
            expected="a hub id that can be reached or a local folder",
        ) from error
    known = sorted(pipe.model.config.label2id)
    if label not in known:
        raise MechsafetyError(f"the classifier has no label {label!r}", expected=f"one of {known}")

    def judge(_: Sequence[str], replies: Sequence[str]) -> list[float]:
        found = pipe([reply or " " for reply in replies], batch_size=batch_size, truncation=True)
        return [next(row["score"] for row in rows if row["label"] == label) for rows in found]

    return judge


def score_name(score: Score) -> str:
    """What a score is called in results."""
    if isinstance(score, RefusalLogOdds):
        return score.name
    if isinstance(score, ReplyLikelihood):
        return "reply_log_likelihood"
    return getattr(score, "__name__", type(score).__name__)


@public
def measure(
    base: LensModel,
    aligned: LensModel | None,
    masks: Sequence[Bool[Tensor, "layer d_mlp"]],
    prompts: Prompts,
    score: Score,
    *,
    max_new_tokens: Count = 32,
    progress: bool = False,
) -> Float[Tensor, "mask prompt"]:
    """Score of every prompt under dynamic patching with each mask.

    Log-odds and likelihoods need no generation: they are read on given tokens, the aligned model run once for all
    masks. Judges read greedy replies.

    Args:
        base: The model that speaks.
        aligned: The model whose neurons are taken; None for the base model by itself (give one empty mask).
        masks: Neurons taken.
        prompts: Chat prompts.
        score: `RefusalLogOdds`, `ReplyLikelihood`, or a function of prompts and replies to numbers.
        max_new_tokens: Length of the replies that a judge reads.
        progress: Whether to show a bar.
    """
    if isinstance(score, ReplyLikelihood):
        return _likelihood(base, aligned, masks, prompts, score, progress)
    rows = prompt_rows(base, prompts)
    out = torch.zeros(len(masks), len(rows))
    chunks = batches([len(row) for row in rows], None if isinstance(score, RefusalLogOdds) else 16)
    with tqdm(total=len(chunks) * len(masks), desc="measuring", disable=not progress, leave=False) as bar:
        for chunk in chunks:
            if isinstance(score, RefusalLogOdds):
                after = lay_out(base, [[*rows[k], *score.opener_ids] for k in chunk])
                for m, logits in enumerate(forced(base, aligned, masks, after)):
                    out[m, chunk] = score(logits[:, -1]).float().cpu()
                    bar.update()
                continue
            batch = lay_out(base, [rows[k] for k in chunk])
            for m, mask in enumerate(masks):
                donor = aligned if bool(mask.any()) else None
                texts = base.decode(greedy(base, donor, mask, batch, max_new_tokens)[0])
                out[m, chunk] = torch.tensor([float(x) for x in score([prompts[k] for k in chunk], texts)])
                bar.update()
    return out


@dataclass(frozen=True, slots=True)
class Ability:
    """What patching changes on harmless prompts, teacher-forced on the unpatched base model's own greedy replies.

    Rows are the masks, then the aligned model by itself, then the base model by itself.

    Attributes:
        kl: KL(base || patched), mean over the reply's tokens, nats.
        nll: Mean negative log-likelihood of the reply's tokens; ``exp`` of its mean is the perplexity.
        agreement: Share of the reply before the first token that would not be the most probable one: exactly how much
            of the base model's greedy reply the patched model's greedy reply repeats.
    """

    kl: Float[Tensor, "row prompt"]
    nll: Float[Tensor, "row prompt"]
    agreement: Float[Tensor, "row prompt"]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a mask, then the aligned model, then the base: means over prompts with intervals."""
        rows = []
        for kl, nll, agreement in zip(self.kl, self.nll, self.agreement, strict=True):
            row: dict[str, float] = {}
            for name, values in (("kl", kl), ("perplexity", nll), ("agreement", agreement)):
                found = [float(values.double().mean()), *mean_interval(values.double().numpy())]
                found = [math.exp(value) for value in found] if name == "perplexity" else found
                row |= dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))
            rows.append(row)
        return pd.DataFrame(rows)


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
    """General ability on harmless prompts under dynamic patching with each mask."""
    replies = greedy_replies(base, prompts, max_new_tokens)
    none = torch.zeros(base.n_layers, base.d_mlp, dtype=torch.bool)
    kl, nll, agreement = (torch.zeros(len(masks) + 2, len(prompts)) for _ in range(3))
    batch_rows = _reply_batches(base, prompts, replies)
    for chunk, batch, labels, real in tqdm(batch_rows, desc="general ability", disable=not progress, leave=False):
        keep = labels.shape[1]
        own = next(forced(base, None, [none], batch, keep)).log_softmax(-1)
        runs = chain(forced(base, aligned, masks, batch, keep), forced(aligned, None, [none], batch, keep))
        for row, now in enumerate(chain((logits.log_softmax(-1) for logits in runs), [own])):
            kl[row, chunk] = _mean((own.exp() * (own - now.to(own.device))).sum(-1), real)
            nll[row, chunk] = _mean(-_chosen(now, labels), real)
            right = (now.argmax(-1).to(labels.device) == labels) | ~real
            agreement[row, chunk] = _mean(right.long().cumprod(1).float(), real)
    return Ability(kl, nll, agreement)


def _likelihood(
    base: LensModel,
    aligned: LensModel | None,
    masks: Sequence[Bool[Tensor, "layer d_mlp"]],
    prompts: Sequence[str],
    score: ReplyLikelihood,
    progress: bool,
) -> Float[Tensor, "mask prompt"]:
    """Mean log-probability per token of each prompt's reply and its end token."""
    if len(score.replies) != len(prompts):
        raise MechsafetyError(f"{len(score.replies)} replies to {len(prompts)} prompts", expected="one a prompt")
    end = base.tokenizer.eos_token_id
    replies = [base.tokenizer(reply, add_special_tokens=False)["input_ids"] for reply in score.replies]
    out = torch.zeros(len(masks), len(prompts))
    batch_rows = _reply_batches(base, prompts, [reply if end is None else [*reply, end] for reply in replies])
    for chunk, batch, labels, real in tqdm(batch_rows, desc="measuring", disable=not progress, leave=False):
        for row, logits in enumerate(forced(base, aligned, masks, batch, labels.shape[1])):
            out[row, chunk] = _mean(_chosen(logits.log_softmax(-1), labels), real)
    return out


def _reply_batches(
    model: LensModel, prompts: Sequence[str], replies: Sequence[Sequence[int]]
) -> list[tuple[list[int], Rows, Tensor, Tensor]]:
    """Batches of prompt and reply; and for their last columns, the reply token to predict and whether there is one."""
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
