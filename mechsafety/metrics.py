"""Logits to one score per prompt, and p values over prompts."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Texts, public
from mechsafety.models import LensModel
from mechsafety.prompts import PromptPairs
from mechsafety.replies import is_refusal

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RefusalLogOdds:
    """How strongly a model leans to refusing, read from its next-token logits after the chat prompt.

    Without a comply set: log P_R - log(1 - P_R), where P_R sums the probabilities of the refusal tokens, computed in
    log space so that it does not saturate. With one: mean logit of the refusal tokens less that of the comply tokens.
    In nats; above 0 the model is more likely than not to begin with a refusal token.

    Attributes:
        refusal_ids, comply_ids: Token ids.
        refusal_tokens, comply_tokens: The same as text.

    Example:
        >>> import torch
        >>> metric = RefusalLogOdds((0,), ("Sorry",))
        >>> metric(torch.tensor([[0.0, 0.0, 0.0]])).exp().round(decimals=3)  # P_R = 1/3
        tensor([0.5000])
    """

    refusal_ids: tuple[int, ...]
    refusal_tokens: tuple[str, ...]
    comply_ids: tuple[int, ...] = ()
    comply_tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.refusal_ids:
            raise MechsafetyError("no refusal tokens", expected="at least one", cure="RefusalLogOdds.detect(...)")
        both = set(self.refusal_ids) & set(self.comply_ids)
        if both:
            raise MechsafetyError(f"tokens {sorted(both)} are in the refusal and the comply set")
        for ids in (self.refusal_ids, self.comply_ids):
            twice = sorted(token for token, n in Counter(ids).items() if n > 1)
            if twice:
                raise MechsafetyError(f"tokens {twice} are given twice", expected="each once")

    def __call__(self, logits: Float[Tensor, "*rows d_vocab"]) -> Float[Tensor, "*rows"]:
        """Score of each row of next-token logits."""
        logits = logits.float()
        chosen = logits[..., list(self.refusal_ids)]
        if self.comply_ids:
            return chosen.mean(-1) - logits[..., list(self.comply_ids)].mean(-1)
        ids = torch.tensor(self.refusal_ids, device=logits.device)
        return chosen.logsumexp(-1) - logits.index_fill(-1, ids, -torch.inf).logsumexp(-1)

    @property
    def name(self) -> str:
        """``refusal_log_odds``, or ``logit_difference`` with a comply set."""
        return "logit_difference" if self.comply_ids else "refusal_log_odds"

    @property
    def is_linear(self) -> bool:
        """Whether the score is linear in the logits."""
        return bool(self.comply_ids)

    def to_json(self) -> dict[str, Any]:
        """Name, token texts and token ids, as stored in results."""
        return {
            "name": self.name,
            "refusal_tokens": list(self.refusal_tokens),
            "comply_tokens": list(self.comply_tokens),
            "refusal_ids": list(self.refusal_ids),
            "comply_ids": list(self.comply_ids),
        }

    @classmethod
    @public
    def from_json(cls, data: Mapping[str, Any], model: LensModel) -> "RefusalLogOdds":
        """Inverse of `to_json`, for the model that the metric was made for.

        A token's text does not always lead back to it (decoding may drop a space, or join bytes), so the ids count.
        Results stored without ids are read by the texts.

        Raises:
            MechsafetyError: Another kind of metric, ids beyond the model's vocabulary, or as `of`.
        """
        if data.get("name") not in ("refusal_log_odds", "logit_difference"):
            raise MechsafetyError(f"the metric {data.get('name')!r}", expected="one that a RefusalLogOdds stored")
        refusal, comply = tuple(data["refusal_tokens"]), tuple(data["comply_tokens"])
        if "refusal_ids" not in data:
            return cls.of(model, refusal, comply)
        ids = tuple(data["refusal_ids"]), tuple(data["comply_ids"])
        strange = [token for token in (*ids[0], *ids[1]) if not 0 <= token < model.d_vocab]
        if strange:
            raise MechsafetyError(f"token {strange[0]}", expected=f"ids of {model.name}, below {model.d_vocab}")
        return cls(ids[0], refusal, ids[1], comply)

    @classmethod
    @public
    def of(cls, model: LensModel, refusal_tokens: Texts, comply_tokens: Texts = ()) -> "RefusalLogOdds":
        """Metric from token texts.

        Raises:
            MechsafetyError: A text is not exactly one token (its tokens are in the message).
        """
        refusal = tuple(_single_token(model, text) for text in refusal_tokens)
        comply = tuple(_single_token(model, text) for text in comply_tokens)
        return cls(refusal, tuple(refusal_tokens), comply, tuple(comply_tokens))

    @classmethod
    @public
    def detect(
        cls,
        model: LensModel,
        pairs: PromptPairs,
        *,
        replies: tuple[Sequence[str], Sequence[str]] | None = None,
        openers: tuple[Sequence[int], Sequence[int]] | None = None,
        max_harmless_share: float = 0.05,
    ) -> "RefusalLogOdds":
        """Find the tokens with which this model begins its refusals.

        The first tokens of the greedy replies to harmful prompts that `is_refusal` judges refusals; kept are those
        that begin at most ``max_harmless_share`` of the compliant replies to harmless prompts, so that an ambiguous
        opener ("I") does not count.

        Args:
            model: The model.
            pairs: Prompts to look at.
            replies: Replies to (harmful, harmless) prompts if they are known already.
            openers: Their first token ids; read from the model's logits by default, because a reply's text does not
                tell whether it began with a space.
            max_harmless_share: How often a refusal token may begin a compliant reply.

        Raises:
            MechsafetyError: The model refuses none of the harmful prompts, or only with ambiguous openers.
        """
        harmful, harmless = replies or (model.generate(pairs.harmful, 24), model.generate(pairs.harmless, 24))
        sides = (pairs.harmful, pairs.harmless)
        first = openers or tuple(model.logits(side).argmax(-1).tolist() for side in sides)
        found = Counter(token for token, reply in zip(first[0], harmful, strict=True) if is_refusal(reply))
        if not found:
            raise MechsafetyError(
                f"none of {len(harmful)} harmful prompts was refused",
                cure="choose them: RefusalLogOdds.of(model, refusal_tokens=[...])",
            )
        compliant = [token for token, reply in zip(first[1], harmless, strict=True) if not is_refusal(reply)]
        share = {token: compliant.count(token) / max(len(compliant), 1) for token in found}
        kept = sorted(token for token in found if share[token] <= max_harmless_share)
        if not kept:
            texts = {model.tokenizer.decode([token]): round(share[token], 3) for token in found}
            raise MechsafetyError(
                f"the refusals begin like compliant replies {texts}",
                cure="choose them: RefusalLogOdds.of(model, refusal_tokens=[...])",
            )
        return cls(tuple(kept), tuple(model.tokenizer.decode([token]) for token in kept))


def _single_token(model: LensModel, text: str) -> int:
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        parts = [model.tokenizer.decode([token]) for token in ids]
        raise MechsafetyError(f"{text!r} is {len(ids)} tokens {parts}", expected="one token", cure="pass its first one")
    return int(ids[0])


def check_gap(harmful: Float[Tensor, " prompt"], harmless: Float[Tensor, " prompt"]) -> None:
    """Raise an error unless shares of the mean gap between harmful and harmless prompts mean something.

    Raises:
        MechsafetyError: The metric is not finite on a prompt, or the mean gap is 0.
    """
    for name, side in (("harmful", harmful), ("harmless", harmless)):
        bad = int((~side.isfinite()).sum())
        if bad:
            raise MechsafetyError(
                f"the metric is NaN or infinite on {bad} of {len(side)} {name} prompts",
                expected="finite logits",
                cure="load the model in float32, or leave those prompts out",
            )
    gap = float((harmful.double() - harmless.double()).mean())
    if not gap:
        raise MechsafetyError(
            f"the metric of {len(harmful)} pair{'s' * (len(harmful) > 1)} has a mean gap of 0, so nothing has a share",
            expected="harmful prompts that score otherwise than their harmless twins",
        )
    if gap < 0:
        logger.warning("the harmless prompts score higher than the harmful ones: shares are of a gap of %.3g", gap)


def sign_flip_p(values: np.ndarray, seed: int = 0, n: int = 10_000) -> np.ndarray:
    """Two-sided sign-flip permutation p of a zero mean, for each row of ``values`` [row prompt].

    All 2**prompts sign patterns where those are at most ``n``, else ``n`` random ones; the observed one is counted.

    Raises:
        MechsafetyError: No prompt, or a value that is not finite.
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
    return hits / len(signs) if exact else (hits + 1) / (len(signs) + 1)


def adjust_p(p_values: np.ndarray) -> np.ndarray:
    """Benjamini-Hochberg adjusted p values (scipy)."""
    from scipy.stats import false_discovery_control

    return false_discovery_control(p_values) if len(p_values) else np.asarray(p_values)
