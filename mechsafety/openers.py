"""Where in its reply a model decides to refuse: after which of its own openers refusals and answers differ."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Prompts, public
from mechsafety.models import LensModel
from mechsafety.models.decode import reply_room
from mechsafety.results import Opener

# tokens of the longest opener that is tried
MAX_OPENER = 4
# tokens of a reply that only has to show whether its prompt is refused, which its first sentence does
JUDGED_TOKENS = 24
# smallest share of the refusals that must begin with an opener; fewer refusals would tell too little
MIN_SHARE = 0.2
# smallest AUROC of an opener that is chosen
FLOOR = 0.8
# how far its AUROC may be below the best one
MARGIN = 0.02


@dataclass(frozen=True, slots=True)
class Candidate:
    """An opener that refusals begin with.

    Attributes:
        opener_ids: Its tokens.
        following: Tokens that follow it in refusals. Each token has the share of all answers that begin with the opener
            and this token.
        share: Share of the refusals that begin with it.
    """

    opener_ids: tuple[int, ...]
    following: dict[int, float]
    share: float

    def kept(self, max_share: float) -> tuple[int, ...]:
        """The following tokens whose share of the answers is at most ``max_share``."""
        return tuple(sorted(token for token, share in self.following.items() if share <= max_share))


def candidates(
    refusals: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], end_ids: Collection[int] = ()
) -> list[Candidate]:
    """The openers of refusals, the shortest first; among equally long ones, the most common first.

    Args:
        refusals: Token ids of the refusals of harmful prompts.
        answers: Token ids of the answers to harmless prompts.
        end_ids: Tokens that end a reply; no opener contains them.

    Example:
        >>> [(c.opener_ids, c.following) for c in candidates([(1, 2, 9), (1, 3)], [(1, 3)], {9})]
        [((), {1: 1.0}), ((1,), {2: 0.0, 3: 1.0})]
    """
    ends = set(end_ids)
    said = [tuple(ids[: next((k for k, token in enumerate(ids) if token in ends), None)]) for ids in refusals]
    found = []
    for length in range(MAX_OPENER + 1):
        counts = Counter(ids[:length] for ids in said if len(ids) > length)
        for opener in sorted(counts, key=lambda one: (-counts[one], one)):
            share = counts[opener] / len(said)
            if share >= MIN_SHARE:
                following = {ids[length] for ids in said if ids[:length] == opener and len(ids) > length}
                shares = {token: _share((*opener, token), answers) for token in sorted(following)}
                found.append(Candidate(opener, shares, share))
    return found


def begins(ids: Sequence[int], opener: Sequence[int]) -> bool:
    """Whether a reply begins with these tokens."""
    return tuple(ids[: len(opener)]) == tuple(opener)


def best(tried: Sequence[Opener]) -> Opener | None:
    """The shortest opener whose AUROC is at least `FLOOR` and within `MARGIN` of the best.

    Among equally long openers, the one with the largest AUROC is taken. If there is no AUROC because no prompt was
    answered, the first opener is taken.

    Returns:
        The opener; None if no opener tells refusals from answers.
    """
    scored = [(one, one.auroc) for one in tried if one.auroc is not None]
    if not scored:
        return tried[0] if tried else None
    least = max(FLOOR, max(auroc for _, auroc in scored) - MARGIN)
    good = [(one, auroc) for one, auroc in scored if auroc >= least]
    return min(good, key=lambda pair: (len(pair[0].opener_ids), -pair[1]), default=(None, 0.0))[0]


def settles(auroc: float | None) -> bool:
    """Whether the search can end, because no longer opener can be better by more than `MARGIN`."""
    return auroc is None or auroc >= 1 - MARGIN


def auroc(scores: Float[Tensor, " prompt"], refused: Sequence[bool]) -> float | None:
    """Probability that a refused prompt scores higher than an answered one (scikit-learn); None without either."""
    from sklearn.metrics import roc_auc_score

    if len(set(refused)) < 2:
        return None
    return round(float(roc_auc_score(list(refused), scores.double().cpu().numpy())), 4)


@public
def first_words(
    model: LensModel, prompts: Prompts, batch_size: int = 48, *, progress: bool = False
) -> tuple[list[list[int]], Float[Tensor, "prompt d_vocab"]]:
    """Token ids of greedy replies that show whether a prompt is refused, and the next-token logits after each prompt.

    A reply has up to 24 tokens, or as many as the positions allow.

    Raises:
        MechsafetyError: After the longest prompt, the model has no room for the longest opener and the token after it.
    """
    longest = max((model.n_tokens(prompt) for prompt in prompts), default=0)
    room = reply_room(model.backend, longest)
    if room <= MAX_OPENER:
        raise MechsafetyError(
            f"a prompt of {longest} tokens, after which {max(room, 0)} tokens of a reply fit into the model's "
            f"{model.backend.sizes.n_ctx} positions",
            expected=f"room for {MAX_OPENER + 1}",
            hint="shorten the prompt, or name the metric's tokens: RefusalLogOdds.of(model, refusal_tokens=[...])",
        )
    return model.replies_and_logits(prompts, min(JUDGED_TOKENS, room), batch_size, progress=progress)


@public
def logits_along(
    model: LensModel, prompts: Prompts, opener_ids: Sequence[int]
) -> Float[Tensor, "prompt after d_vocab"]:
    """Next-token logits of a few prompts after none, one, two ... of an opener's tokens, all from one forward."""
    tokens = model.reading(opener_ids).tokenize(prompts)
    with torch.no_grad():
        return model.forward(tokens, keep=len(opener_ids) + 1).float()


def longest(openers: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The openers that are not the beginning of another opener.

    Example:
        >>> longest([(), (1,), (1, 2), (3,)])
        [(1, 2), (3,)]
    """
    return [one for one in openers if not any(begins(other, one) for other in openers if other != one)]


@public
def opener_ids_of(model: LensModel, opener: str | Sequence[int]) -> tuple[int, ...]:
    """Token ids of an opener that was given as text or as ids.

    Raises:
        MechsafetyError: It has no token.
    """
    return model.reading(
        opener_tokens(model.tokenizer, opener)
    ).opener_ids  # reading refuses tokens that the model lacks


def opener_tokens(tokenizer: Any, opener: str | Sequence[int]) -> tuple[int, ...]:
    """Token ids of an opener under a Hugging Face tokenizer.

    Raises:
        MechsafetyError: It has no token.
    """
    given = tokenizer(opener, add_special_tokens=False)["input_ids"] if isinstance(opener, str) else opener
    ids = tuple(int(token) for token in given)
    if not ids:
        raise MechsafetyError(
            f"the reply opener {opener!r} has no token",
            expected='the first words of a reply, such as "I\'m"',
            hint="leave it out to read the reply's first token",
        )
    return ids


def check_comes(model: LensModel, opener_ids: Sequence[int], replies: Sequence[Sequence[int]]) -> None:
    """Refuse an opener with which no reply begins, because it would tell nothing about this model's replies.

    Raises:
        MechsafetyError: No reply begins with it. The message shows how most replies begin.
    """
    if any(begins(reply, opener_ids) for reply in replies):
        return
    own = Counter(tuple(reply[: len(opener_ids)]) for reply in replies).most_common(1)
    seen = f"; most begin with {model.tokenizer.decode(list(own[0][0]))!r} {list(own[0][0])}" if own else ""
    raise MechsafetyError(
        f"none of {len(replies)} replies begins with the opener {model.tokenizer.decode(list(opener_ids))!r} "
        f"{list(opener_ids)}{seen}",
        expected="tokens that some reply begins with",
        hint="leave the opener out: RefusalLogOdds.detect(model, pairs) finds one",
    )


def _share(beginning: Sequence[int], replies: Sequence[Sequence[int]]) -> float:
    return sum(begins(reply, beginning) for reply in replies) / max(len(replies), 1)
