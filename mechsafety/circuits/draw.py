"""Draws the pairs that a map is made on: pairs that the model treats as expected."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mechsafety.circuits.behaviour import MIN_SHARE, Seen, check_behaviour
from mechsafety.circuits.circuit import Behaviour, Sample
from mechsafety.errors import MechsafetyError, NoRefusal
from mechsafety.inputs import Amount, Count, public
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.prompts import PromptPairs, omissions
from mechsafety.results import Provenance, Result
from mechsafety.scale.work import sweeps

if TYPE_CHECKING:
    import pandas as pd

MIN_PAIRS = 2
# an eighth of the pairs is searched on, and an eighth of those held out sets the circuit's size; but at least so many,
# unless that is more than half
FEW = 8
# pairs are drawn from the shortest ones, this many times as many as are tried
SHORTEST = 1.5
# more pairs are tried where fewer than this share of the requested pairs can be used
ENOUGH = 0.5


@dataclass(frozen=True, slots=True, repr=False)
class Draw(Result):
    """The pairs of a map, and the model's behaviour on all pairs that were tried.

    Attributes:
        provenance: Model, options, versions.
        here, there: Pairs to search on and to hold out: the harmful prompt is refused, the harmless one answered.
        metric: Metric of refusal.
        behaviour: Behaviour on all harmful and harmless prompts that were tried.
        samples: Some replies.

    Example:
        >>> drawn = ms.circuits.draw_pairs(model, made.pairs, metric, limit=8)
        >>> len(drawn.here), len(drawn.there)
        (4, 4)
    """

    provenance: Provenance
    here: PromptPairs
    there: PromptPairs
    metric: RefusalLogOdds
    behaviour: Mapping[str, Behaviour]
    samples: tuple[Sample, ...]

    def __repr__(self) -> str:
        found = f"{len(self.here)} pairs to search on and {len(self.there)} to hold out"
        return f"Draw({self.provenance.model}: {found}, of {self.behaviour['harmful'].n} tried; {self.metric})"

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per kind of prompt: how many were tried, the refusal rate and the mean metric with intervals."""
        import pandas as pd

        rows = [
            (kind, one.n, one.refusal_rate, *one.refusal_ci, one.score_mean, *one.score_ci)
            for kind, one in self.behaviour.items()
        ]
        columns = ["kind", "n", "refusal_rate", "refusal_low", "refusal_high", "score", "score_low", "score_high"]
        return pd.DataFrame(rows, columns=columns)


@sweeps
@public
def draw_pairs(
    model: LensModel,
    pairs: PromptPairs | None = None,
    metric: RefusalLogOdds | None = None,
    *,
    limit: Count = 110,
    seed: Amount = 0,
    progress: bool = True,
) -> Draw:
    """Draw pairs to search on and pairs to hold out until enough of each are treated as expected.

    1. An eighth of ``limit`` pairs is tried to search on (at least 8, unless that is more than half), the rest to hold
       out. Where there are too few to hold out, more are searched on. Within each topic, the pairs are drawn from the
       shorter ones, one and a half times as many as are tried. The length of a pair is the number of tokens from the
       first difference on, because only these are run again and again.
    2. If fewer than half of these can be used, as many more pairs are tried.
    3. Step 2 repeats until half of the first number can be used, the pairs end, or the usable share is too small for a
       map.

    `mechsafety.map_refusal_circuit` draws by itself. Draw beforehand to look at the pairs first, or to make several
    maps of the same pairs. Then give the draw to the map in place of pairs.

    Args:
        model: The model.
        pairs: Pairs; the built-in ones by default. Pairs that do not align under the model's tokenizer are left out.
            The split name ``test`` marks pairs to hold out; otherwise half of the topics (or of the pairs) is held out.
        metric: Metric of refusal; by default it is detected on the pairs to search on.
        limit: Number of pairs to try first.
        seed: Seed of the draw and the intervals.
        progress: Whether to show bars.

    Raises:
        NoRefusal: Too small a share of the pairs can be used; the message gives the rates.
        MechsafetyError: Too few pairs, or too few that align.

    Example:
        >>> drawn = ms.circuits.draw_pairs(model, made.pairs, metric, limit=8)
        >>> drawn.to_dataframe().columns.tolist()
        ['kind', 'n', 'refusal_rate', 'refusal_low', 'refusal_high', 'score', 'score_low', 'score_high']
    """
    check_limit(limit)
    if metric is not None:
        metric.check_one_column()
    pairs = (pairs if pairs is not None else PromptPairs.builtin()).aligned(model, least=2 * MIN_PAIRS)
    sides, seen = two_sides(pairs), Seen()
    first = max(an_eighth(limit), limit - len(sides[1]))
    sizes = first, limit - first
    tried = [_some(model, side, size, seed) for side, size in zip(sides, sizes, strict=True)]
    for part, what in zip(tried, ("to search on", "to hold out"), strict=True):
        if len(part) < MIN_PAIRS:
            raise MechsafetyError(
                f"{pairs.name} leaves {len(part)} pair{'s' * (len(part) != 1)} {what} of {len(pairs)} that align",
                expected=f"at least {MIN_PAIRS}",
                hint="give more pairs (or more topics)",
            )
    while True:
        both = replace(pairs, pairs=(*tried[0].pairs, *tried[1].pairs))
        found, behaviour, samples, keep = check_behaviour(
            model, both, metric, detect_on=len(tried[0]), seen=seen, seed=seed, progress=progress
        )
        flags = keep[: len(tried[0])], keep[len(tried[0]) :]
        wider = [_wider(model, *part, seed) for part in zip(sides, tried, flags, sizes, strict=True)]
        if [len(part) for part in wider] == [len(part) for part in tried]:
            here, there = (_usable(*part, behaviour) for part in zip(tried, flags, strict=True))
            options = {"pairs": pairs.name, "limit": limit, **omissions(pairs)}
            return Draw(model.provenance(seed=seed, options=options), here, there, found, behaviour, samples)
        tried = wider


def check_limit(limit: int) -> None:
    """Refuse a number of pairs that is too small for a map.

    Raises:
        MechsafetyError: It is too small.
    """
    if limit < 2 * MIN_PAIRS:
        raise MechsafetyError(f"limit {limit}", expected=f"at least {2 * MIN_PAIRS} pairs")


def two_sides(pairs: PromptPairs) -> tuple[PromptPairs, PromptPairs]:
    """All pairs to search on, and all to hold out: those of the split ``test``, or half of the topics or pairs."""
    splits = {pair.split for pair in pairs}
    if "test" in splits and len(splits) > 1:
        return pairs.split(*sorted(splits - {"test"})), pairs.split("test")
    return pairs.halves()


def an_eighth(n: int) -> int:
    """An eighth of ``n`` pairs, but at least 8 unless that is more than half."""
    return max(math.ceil(n / 8), min(math.ceil(n / 2), FEW))


def _some(model: LensModel, side: PromptPairs, size: int, seed: int) -> PromptPairs:
    """``size`` pairs: in every topic they are drawn from the shorter ones, half as many again as the topic gives."""
    if not size:
        return replace(side, pairs=())
    if side.align != "tokens":  # at the suffix all run the same columns
        return side.sample(size, seed)
    # rows are padded on the left: a late difference means few columns
    first = model.tokenize_pairs(side).first_differences.tolist()
    even = math.ceil(size / max(1, len(side.topics)))
    gives = Counter(pair.topic for pair in side.sample(size, seed))  # a large topic fills up for small ones
    order = sorted(range(len(side)), key=lambda k: (-first[k], k))
    taken: dict[str, int] = {}
    chosen = set()
    for k in order:
        topic = side.pairs[k].topic
        taken[topic] = taken.get(topic, 0) + 1
        if taken[topic] <= math.ceil(SHORTEST * max(even, gives[topic])):
            chosen.add(k)
    return replace(side, pairs=tuple(pair for k, pair in enumerate(side) if k in chosen)).sample(size, seed)


def _wider(
    model: LensModel, side: PromptPairs, part: PromptPairs, keep: Sequence[bool], size: int, seed: int
) -> PromptPairs:
    """The part; if too few of its pairs can be used, with more pairs of its side."""
    need = math.ceil(ENOUGH * size)
    most = min(len(side), math.ceil(need / MIN_SHARE))  # if so many hold too few usable pairs, give up
    if sum(keep) >= need or len(part) >= most:
        return part
    known = set(part.pairs)
    left = replace(side, pairs=tuple(pair for pair in side if pair not in known))
    more = _some(model, left, min(most, len(part) + size) - len(part), seed)
    return replace(part, pairs=(*part.pairs, *more.pairs))


def _usable(part: PromptPairs, keep: Sequence[bool], behaviour: Mapping[str, Behaviour]) -> PromptPairs:
    """The pairs of a part that the model treats as expected; all other pairs have no refusal to restore."""
    kept = tuple(pair for pair, flag in zip(part, keep, strict=True) if flag)
    if len(kept) < max(MIN_PAIRS, MIN_SHARE * len(part)):
        bad, good = behaviour["harmful"], behaviour["harmless"]
        raise NoRefusal(
            f"the model refuses {bad.refusal_rate:.0%} of {bad.n} harmful and {good.refusal_rate:.0%} of {good.n}"
            f" harmless prompts; only {len(kept)} of {len(part)} pairs have a refused harmful prompt and an answered"
            " harmless one",
            hint="use a model that refuses, or pairs it tells apart",
        )
    return replace(part, pairs=kept)
