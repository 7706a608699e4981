"""Exact duplicates of prompts, which would count one observation several times."""

import logging
from collections.abc import Hashable, Sequence

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Prompts, prompt_list, public

logger = logging.getLogger(__name__)


def first_of_each(items: Sequence[Hashable]) -> list[int]:
    """Index of the first occurrence of each item, in order.

    Example:
        >>> first_of_each(["tea", "cake", "tea"])
        [0, 1]
    """
    return sorted({item: k for k, item in reversed(list(enumerate(items)))}.values())


@public
def distinct(prompts: Prompts, what: str) -> list[str]:
    """The prompts without exact duplicates, in order; the number left out is logged.

    Args:
        prompts: Texts or lists of chat messages.
        what: Name of the prompts in the log.

    Example:
        >>> distinct(["tea", "cake", "tea"], "prompts")
        ['tea', 'cake']
    """
    given = prompt_list(prompts)
    kept = first_of_each(given)
    if len(kept) < len(given):
        logger.warning("%s: %s", what, duplicates(len(given) - len(kept), "prompt"))
    return [given[k] for k in kept]


@public
def unseen(prompts: Prompts, seen: Prompts, what: str) -> list[int]:
    """Indices of the prompts that are not in ``seen``; the number left out is logged.

    Args:
        prompts: Prompts to judge on.
        seen: Prompts that were learned from.
        what: Name of the prompts in the log and in the error.

    Raises:
        MechsafetyError: All prompts are in ``seen``.

    Example:
        >>> ms.prompts.unseen(["How do I bake bread?", "How do I knit?"], ["How do I knit?"], "test prompts")
        [0]
    """
    known = set(seen)
    kept = [k for k, prompt in enumerate(prompts) if prompt not in known]
    if prompts and not kept:
        raise MechsafetyError(
            f"{what}: all {len(prompts)} prompts are among those that were learned from", expected="others"
        )
    if len(kept) < len(prompts):
        gone = len(prompts) - len(kept)
        logger.warning("%s: %d of %d prompts left out, learned from before", what, gone, len(prompts))
    return kept


def duplicates(n: int, kind: str) -> str:
    """A note about ``n`` duplicates that were left out.

    Example:
        >>> duplicates(1, "pair"), duplicates(2, "prompt")
        ('1 exact duplicate of an earlier pair left out', '2 exact duplicates of earlier prompts left out')
    """
    many = n > 1
    return f"{n} exact duplicate{'s' * many} of {'' if many else 'an '}earlier {kind}{'s' * many} left out"
