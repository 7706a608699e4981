"""Logits to one score per prompt, and p values over prompts."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechsafety.codec import SPARSE, decode, encode
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Count, Prompts, Texts, public
from mechsafety.models import LensModel
from mechsafety.openers import (
    FLOOR,
    Candidate,
    auroc,
    begins,
    best,
    candidates,
    check_comes,
    first_words,
    logits_along,
    longest,
    opener_ids_of,
    opener_tokens,
    settles,
)
from mechsafety.prompts import PromptPairs
from mechsafety.replies import is_refusal
from mechsafety.results import Opener, reads_where

logger = logging.getLogger(__name__)

BATCH = 16  # prompts per batch
CHOOSE = "choose refusal tokens yourself: RefusalLogOdds.of(model, refusal_tokens=[...])"


@dataclass(frozen=True, slots=True, repr=False)
class RefusalLogOdds:
    """How strongly a model leans to refusing, read from its next-token logits.

    The metric is read after the chat prompt. With an opener, it is read after the prompt and the reply's first tokens,
    which are appended to the prompt. A model whose every reply begins with ``I'm`` decides one token later, so that an
    opener is needed. Analyses read at that place by themselves.

    - Without comply tokens, the score is log P_R - log(1 - P_R), in nats. P_R is the sum of the refusal tokens'
      probabilities. The score is computed in log space, so that it does not saturate. Above 0, the model is more likely
      than not to continue with a refusal token.
    - With comply tokens, the score is the mean logit of the refusal tokens minus that of the comply tokens.
    - With whole openers (`whole`), P_R is the probability that the reply begins with one of them. The probability of an
      opener is the product of its tokens' probabilities. This needs the logits of several positions. `scores` computes
      it, and so do the analyses that score prompts. Analyses that read one position refuse it.

    Attributes:
        refusal_ids, comply_ids: Token ids.
        refusal_tokens, comply_tokens: The same tokens as text.
        opener_ids: First tokens of the reply, after which the metric is read; empty if it is read at the prompt's end.
        opener: The same tokens as text.
        whole_ids: Token ids of whole refusal openers; none of them begins with another.
        whole_texts: The same openers as text.
        tried: The openers that `detect` tried, with their AUROC. They do not count when metrics are compared.

    Example:
        >>> import torch
        >>> metric = RefusalLogOdds((0,), ("Sorry",))
        >>> metric(torch.tensor([[0.0, 0.0, 0.0]])).exp().round(decimals=3)  # P_R = 1/3
        tensor([0.5000])
        >>> RefusalLogOdds((7,), (" sorry",), opener_ids=(40, 2776), opener="I'm")
        RefusalLogOdds(read after `I'm`: next token ` sorry`)
    """

    refusal_ids: tuple[int, ...]
    refusal_tokens: tuple[str, ...]
    comply_ids: tuple[int, ...] = ()
    comply_tokens: tuple[str, ...] = ()
    opener_ids: tuple[int, ...] = field(default=(), metadata=SPARSE)
    opener: str = field(default="", metadata=SPARSE)
    whole_ids: tuple[tuple[int, ...], ...] = field(default=(), metadata=SPARSE)
    whole_texts: tuple[str, ...] = field(default=(), metadata=SPARSE)
    tried: tuple[Opener, ...] = field(default=(), compare=False, metadata=SPARSE)

    def __post_init__(self) -> None:
        if not self.refusal_ids:
            raise MechsafetyError("no refusal tokens", expected="at least one", hint="RefusalLogOdds.detect(...)")
        both = set(self.refusal_ids) & set(self.comply_ids)
        if both:
            raise MechsafetyError(f"tokens {sorted(both)} are in the refusal and the comply set")
        for ids in (self.refusal_ids, self.comply_ids):
            twice = sorted(token for token, n in Counter(ids).items() if n > 1)
            if twice:
                raise MechsafetyError(f"tokens {twice} are given twice", expected="each once")
        if self.whole_ids and (self.comply_ids or self.opener_ids):
            raise MechsafetyError("whole openers with comply tokens or an opener", expected="whole openers alone")
        if len(longest(self.whole_ids)) < len(self.whole_ids) or not all(self.whole_ids):
            raise MechsafetyError(
                f"the whole openers {self.whole_texts}", expected="some, none of which begins with another"
            )

    def __repr__(self) -> str:
        chosen = next((one for one in self.tried if one.opener_ids == self.opener_ids), None)
        shown = ""
        if chosen is not None and chosen.auroc is not None:
            shown = f"; AUROC {chosen.auroc:.3f} of {chosen.refused} refused and {chosen.answered} answered prompts"
        return f"RefusalLogOdds({reads_where(self.to_json())}{shown})"

    def __call__(self, logits: Float[Tensor, "*rows d_vocab"]) -> Float[Tensor, "*rows"]:
        """Score of each row of next-token logits, taken at the position where the metric reads.

        Raises:
            MechsafetyError: The metric has whole openers, which need the logits of several positions.
        """
        self.check_one_column()
        logits = logits.float()
        chosen = logits[..., list(self.refusal_ids)]
        if self.comply_ids:
            return chosen.mean(-1) - logits[..., list(self.comply_ids)].mean(-1)
        ids = torch.tensor(self.refusal_ids, device=logits.device)
        return chosen.logsumexp(-1) - logits.index_fill(-1, ids, -torch.inf).logsumexp(-1)

    def check_one_column(self) -> None:
        """Refuse whole openers, for an analysis that reads the logits of one position.

        Raises:
            MechsafetyError: The metric has whole openers.
        """
        if self.whole_ids:
            raise MechsafetyError(
                "log-odds of whole openers, which are not read from one column's logits",
                expected="a metric of one next token",
                hint="use RefusalLogOdds.detect(model, pairs) here, or score prompts: metric.scores(model, prompts)",
            )

    @public
    def scores(self, model: LensModel, prompts: Prompts, batch_size: Count = BATCH) -> Float[Tensor, " prompt"]:
        """Score of each prompt where the metric reads: at the prompt's end, after its opener, or along whole openers.

        Args:
            model: The model.
            prompts: Requests.
            batch_size: Prompts per batch.

        Raises:
            MechsafetyError: As `LensModel.tokenize`.
        """
        if not self.whole_ids:
            return self(model.reading(self.opener_ids).logits(prompts, batch_size))
        parts = [prompts[k : k + batch_size] for k in range(0, len(prompts) or 1, batch_size)]
        return torch.cat([self.along(partial(logits_along, model, part)) for part in parts])

    def along(self, read: Callable[[tuple[int, ...]], Float[Tensor, "row after d_vocab"]]) -> Float[Tensor, " row"]:
        """Log-odds of whole openers, from the logits along each.

        The openers form a tree of tokens. Every reply leaves the tree at exactly one place: at the end of an opener, or
        before it. The log-odds compare the total probabilities of these two cases. Each total is summed in log space.
        The log-odds therefore do not saturate, and no reply counts twice.

        Args:
            read: Function of an opener's tokens except the last one. It returns the next-token logits after none, one,
                two ... of these tokens.
        """
        begun: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}  # log-probability of reaching it, and of what follows
        ends = []
        for ids in self.whole_ids:
            steps = read(ids[:-1]).log_softmax(-1)
            reach = torch.zeros_like(steps[:, 0, 0])
            for k, token in enumerate(ids):
                begun.setdefault(ids[:k], (reach, steps[:, k]))
                reach = reach + steps[:, k, token]
            ends.append(reach)
        left = []
        for prefix, (reach, follows) in begun.items():
            inside = {ids[len(prefix)] for ids in self.whole_ids if begins(ids, prefix)}
            index = torch.tensor(sorted(inside), device=follows.device)
            left.append(reach + follows.index_fill(-1, index, -torch.inf).logsumexp(-1))
        return torch.stack(ends).logsumexp(0) - torch.stack(left).logsumexp(0)

    @property
    def name(self) -> str:
        """``refusal_log_odds``; ``logit_difference`` with comply tokens; ``whole_opener_log_odds`` of whole openers."""
        if self.whole_ids:
            return "whole_opener_log_odds"
        return "logit_difference" if self.comply_ids else "refusal_log_odds"

    @property
    def at_the_end(self) -> bool:
        """Whether it reads only the logits at the prompt's end."""
        return not self.opener_ids and not self.whole_ids

    @property
    def is_linear(self) -> bool:
        """Whether the score is linear in the logits."""
        return bool(self.comply_ids)

    def to_json(self) -> dict[str, Any]:
        """Name, token texts and token ids, as stored in results, and its openers if it has any."""
        return {"name": self.name, **encode(RefusalLogOdds, self)}

    @classmethod
    @public
    def from_json(cls, data: Mapping[str, Any], model: LensModel) -> "RefusalLogOdds":
        """Inverse of `to_json`, for the model that the metric was made for.

        The ids count, because a token's text does not always lead back to the token (decoding may drop a space, or join
        bytes). Results stored without ids are read by the texts.

        Raises:
            MechsafetyError: The metric is of another kind, or an id is beyond the model's vocabulary; or as `of`.
        """
        if data.get("name") not in ("refusal_log_odds", "logit_difference", "whole_opener_log_odds"):
            raise MechsafetyError(f"the metric {data.get('name')!r}", expected="one that a RefusalLogOdds stored")
        if "refusal_ids" not in data:
            return cls.of(model, tuple(data["refusal_tokens"]), tuple(data["comply_tokens"]))
        found: RefusalLogOdds = decode(cls, {key: item for key, item in data.items() if key != "name"}, "metric")
        ids = (*found.refusal_ids, *found.comply_ids, *found.opener_ids, *chain.from_iterable(found.whole_ids))
        strange = [token for token in ids if not 0 <= token < model.d_vocab]
        if strange:
            raise MechsafetyError(f"token {strange[0]}", expected=f"ids of {model.name}, below {model.d_vocab}")
        return found

    @classmethod
    @public
    def of(
        cls,
        model: LensModel,
        refusal_tokens: Texts,
        comply_tokens: Texts = (),
        *,
        opener: str | Sequence[int] | None = None,
    ) -> "RefusalLogOdds":
        """Metric from token texts.

        Args:
            model: The model.
            refusal_tokens: Tokens with which a refusal continues at the place where the metric reads.
            comply_tokens: Tokens with which an answer continues there. They turn the metric into a logit difference.
            opener: First words (or token ids) of the reply, after which the metric is read. If it is None, the metric
                is read at the prompt's end.

        Raises:
            MechsafetyError: A text is not exactly one token (the message shows its tokens), or the opener has no token.
        """
        found = cls.of_tokenizer(model.tokenizer, refusal_tokens, comply_tokens, opener=opener)
        model.reading(found.opener_ids)  # refuses tokens that the model lacks
        return found

    @classmethod
    @public
    def of_tokenizer(
        cls,
        tokenizer: Any,
        refusal_tokens: Texts,
        comply_tokens: Texts = (),
        *,
        opener: str | Sequence[int] | None = None,
    ) -> "RefusalLogOdds":
        """As `of`, from a Hugging Face tokenizer alone, for checks before a model's weights are read.

        Raises:
            MechsafetyError: As `of`.
        """
        refusal = tuple(_single_token(tokenizer, text) for text in refusal_tokens)
        comply = tuple(_single_token(tokenizer, text) for text in comply_tokens)
        ids = () if opener is None else opener_tokens(tokenizer, opener)
        text = tokenizer.decode(list(ids)) if ids else ""
        return cls(refusal, tuple(refusal_tokens), comply, tuple(comply_tokens), ids, text)

    @classmethod
    @public
    def whole(cls, model: LensModel, openers: Texts) -> "RefusalLogOdds":
        """Metric of late refusals: the log-odds that a reply begins with one of several whole refusal openers.

        The score is log P - log(1 - P). P is the sum of the openers' probabilities. The probability of an opener is the
        product of its tokens' probabilities, each read after the prompt and the tokens before it (teacher-forced). An
        opener that begins with another opener adds nothing to P and is left out.

        Args:
            model: The model.
            openers: Openers such as ``["I'm sorry", "As an AI"]``.

        Raises:
            MechsafetyError: There is no opener, or an opener has no token.
        """
        found = {opener_ids_of(model, text): text for text in openers}
        kept = [ids for ids in found if not any(begins(ids, other) for other in found if other != ids)]
        first = tuple(dict.fromkeys(ids[0] for ids in kept))
        texts = tuple(model.tokenizer.decode([token]) for token in first)
        return cls(first, texts, whole_ids=tuple(kept), whole_texts=tuple(found[ids] for ids in kept))

    @classmethod
    @public
    def detect(
        cls,
        model: LensModel,
        pairs: PromptPairs,
        *,
        replies: tuple[Sequence[Any], Sequence[Any]] | None = None,
        logits: tuple[Float[Tensor, "harmful d_vocab"], Float[Tensor, "harmless d_vocab"]] | None = None,
        opener: str | Sequence[int] | None = None,
        max_harmless_share: float = 0.05,
    ) -> "RefusalLogOdds":
        """Find where this model's refusals and answers part: after which opener, and which tokens refuse there.

        1. The model replies to all prompts greedily, with 24 tokens, or as many as fit. `is_refusal` judges
           which replies are refusals.
        2. Candidate openers are no opener (the prompt's end) and the first one to four tokens of the refusals of
           harmful prompts. At least a fifth of these refusals must begin with a candidate.
        3. After each candidate, the refusal tokens are those that follow it in these refusals. A token is kept if at
           most ``max_harmless_share`` of the answers to harmless prompts begin with the candidate and this token. An
           ambiguous token ("I") therefore does not count.
        4. All prompts are read after the candidate, whatever their own replies were. The AUROC of the log-odds measures
           how well they tell refused prompts from answered ones. If the prompt's end reaches 0.98, no other candidate
           is tried.
        5. The shortest candidate is chosen whose AUROC is at least 0.8 and at most 0.02 below the best. ``tried`` lists
           all candidates that were read.

        Args:
            model: The model.
            pairs: Prompts on which the opener is chosen.
            replies: Token ids of the greedy replies to (harmful, harmless) prompts (`LensModel.reply_ids`), if they are
                known already.
            logits: Next-token logits at the ends of these prompts, if they are known already.
            opener: First words (or token ids) of the reply, if the metric must be read after these and nowhere else.
            max_harmless_share: Largest share of answers that may begin as the refusals with a refusal token begin.

        Raises:
            MechsafetyError: The model refuses none of the harmful prompts; no opener tells refusals from answers; no
                reply begins with the given opener; or a prompt leaves no room for a reply of five tokens.
        """
        said = replies or tuple(first_words(model, side)[0] for side in (pairs.harmful, pairs.harmless))
        if any(isinstance(reply, str) for side in said for reply in side):
            raise MechsafetyError("replies as text", expected="token ids", hint="pass model.reply_ids(prompts)")
        refused = [[is_refusal(text) for text in model.decode(side)] for side in said]
        refusals = [ids for ids, no in zip(said[0], refused[0], strict=True) if no]
        if not refusals:
            raise MechsafetyError(
                f"none of {len(said[0])} harmful prompts was refused", hint=CHOOSE, page="no-prompt-is-refused"
            )
        answers = [ids for ids, no in zip(said[1], refused[1], strict=True) if not no]
        found = candidates(refusals, answers, model.end_ids)
        if opener is not None:
            given = opener_ids_of(model, opener)
            check_comes(model, given, [*said[0], *said[1]])
            found = [one for one in found if one.opener_ids == given]
        usable = [one for one in found if one.kept(max_harmless_share)]
        if not usable:
            raise _nothing_parts(model, found, opener)
        metrics = {one.opener_ids: _reading(cls, model, one, max_harmless_share) for one in usable}
        judged = [*refused[0], *refused[1]]
        scores = _scores(model, metrics, [*pairs.harmful, *pairs.harmless], judged, logits)
        n = sum(judged)
        tried = [
            Opener(ids, own.opener, own.refusal_tokens, scores[ids], n, len(judged) - n, share)
            for ids, share in ((one.opener_ids, one.share) for one in usable)
            if (own := metrics[ids]) and ids in scores
        ]
        chosen = best(tried) if opener is None else tried[0]
        if chosen is None:
            most = max(tried, key=lambda one: one.auroc or 0.0)
            where = f"after {most.opener!r}" if most.opener_ids else "at the prompt's end"
            raise MechsafetyError(
                f"no reply opener parts {most.refused} refused from {most.answered} answered prompts: "
                f"the best AUROC of {len(tried)} is {most.auroc:.2f}, {where}",
                expected=f"at least {FLOOR}",
                hint="give other prompts, or " + CHOOSE,
                page="refusals-and-answers-begin-alike",
            )
        return replace(metrics[chosen.opener_ids], tried=tuple(tried))


def _reading(kind: type[RefusalLogOdds], model: LensModel, one: Candidate, max_share: float) -> RefusalLogOdds:
    """The metric that reads after an opener."""
    kept = one.kept(max_share)
    texts = tuple(model.tokenizer.decode([token]) for token in kept)
    return kind(kept, texts, opener_ids=one.opener_ids, opener=model.tokenizer.decode(list(one.opener_ids)))


def _scores(
    model: LensModel,
    metrics: Mapping[tuple[int, ...], RefusalLogOdds],
    prompts: Sequence[str],
    refused: Sequence[bool],
    logits: Sequence[Tensor] | None,
) -> dict[tuple[int, ...], float | None]:
    """AUROC of each opener's metric; only of the prompt's end, if no opener can be better by enough."""
    if () in metrics:
        own = metrics[()]
        first = auroc(own.scores(model, prompts) if logits is None else own(torch.cat(list(logits))), refused)
        if settles(first):
            return {(): first}
    scores: dict[tuple[int, ...], list[Tensor]] = {ids: [] for ids in metrics}
    for part in (prompts[k : k + BATCH] for k in range(0, len(prompts), BATCH)):
        found: dict[tuple[int, ...], Tensor] = {}
        for whole in longest(list(metrics)):
            along = logits_along(model, part, whole)
            found |= {whole[:k]: along[:, k] for k in range(len(whole) + 1)}
        for ids, values in scores.items():
            values.append(metrics[ids](found[ids]))
    return {ids: auroc(torch.cat(values), refused) for ids, values in scores.items()}


def _nothing_parts(model: LensModel, found: Sequence[Candidate], opener: Any) -> MechsafetyError:
    """The error if no token follows an opener in refusals alone."""
    if not found:
        return MechsafetyError(f"no refusal goes on after the opener {opener!r}", hint=CHOOSE)
    texts = {model.tokenizer.decode([token]): round(share, 3) for token, share in found[0].following.items()}
    return MechsafetyError(f"the refusals begin like compliant replies {texts}", hint=CHOOSE)


def _single_token(tokenizer: Any, text: str) -> int:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        parts = [tokenizer.decode([token]) for token in ids]
        raise MechsafetyError(
            f"{text!r} is {len(ids)} tokens {parts}",
            expected="one token",
            hint="pass its first one",
            page="a-text-is-not-one-token",
        )
    if ids[0] == getattr(tokenizer, "unk_token_id", None) and text != tokenizer.unk_token:
        raise MechsafetyError(f"the tokenizer does not know {text!r}", expected="one of its tokens")
    return int(ids[0])


def check_gap(harmful: Float[Tensor, " prompt"], harmless: Float[Tensor, " prompt"]) -> None:
    """Check that shares of the mean gap between harmful and harmless prompts are defined.

    Raises:
        MechsafetyError: The metric is not finite on a prompt, or the mean gap is 0.
    """
    for name, side in (("harmful", harmful), ("harmless", harmless)):
        bad = int((~side.isfinite()).sum())
        if bad:
            raise MechsafetyError(
                f"the metric is NaN or infinite on {bad} of {len(side)} {name} prompts",
                expected="finite logits",
                hint="load the model in float32, or leave those prompts out",
            )
    gap = float((harmful.double() - harmless.double()).mean())
    if not gap:
        raise MechsafetyError(
            f"the metric of {len(harmful)} pair{'s' * (len(harmful) > 1)} has a mean gap of 0, so nothing has a share",
            expected="harmful prompts that score otherwise than their harmless counterfactuals",
            page="the-gap-is-0",
        )
    if gap < 0:
        logger.warning("the harmless prompts score higher than the harmful ones: shares are of a gap of %.3g", gap)


def sign_flip_p(values: np.ndarray, seed: int = 0, n: int = 10_000) -> np.ndarray:
    """Two-sided sign-flip permutation p of a zero mean, for each row of ``values`` [row prompt].

    If there are at most ``n`` sign patterns (2**prompts), all are used. Otherwise ``n`` random patterns are used. The
    observed pattern is counted in both cases.

    Raises:
        MechsafetyError: There is no prompt, or a value is not finite.

    Example:
        >>> import numpy as np
        >>> from mechsafety.metrics import sign_flip_p
        >>> sign_flip_p(np.array([[1.0, 2.0, 3.0], [1.0, -2.0, 1.0]])).tolist()  # 2 and 8 of 8 sign patterns
        [0.25, 1.0]
    """
    values = np.atleast_2d(np.asarray(values, dtype=np.float64))
    prompts = values.shape[1]
    if not prompts or not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise MechsafetyError(
            f"{bad} of {values.size} values are not finite", expected="numbers, of at least one prompt"
        )
    if 2**prompts <= n:
        bits = (np.arange(2**prompts)[:, None] >> np.arange(prompts)) & 1
        signs, exact = 1.0 - 2.0 * bits, True
    else:
        signs, exact = np.random.default_rng(seed).choice([-1.0, 1.0], size=(n, prompts)), False
    null = np.abs(values @ signs.T)
    observed = np.abs(values.sum(axis=1, keepdims=True)) * (1 - 1e-12)
    hits = (null >= observed).sum(axis=1)
    p_values: np.ndarray = hits / len(signs) if exact else (hits + 1) / (len(signs) + 1)
    return p_values


def adjust_p(p_values: np.ndarray) -> np.ndarray:
    """Benjamini-Hochberg adjusted p values (scipy).

    Example:
        >>> import numpy as np
        >>> from mechsafety.metrics import adjust_p
        >>> adjust_p(np.array([0.01, 0.02, 0.5])).round(2).tolist()
        [0.03, 0.03, 0.5]
    """
    from scipy.stats import false_discovery_control

    return false_discovery_control(p_values) if len(p_values) else np.asarray(p_values)
