"""Ways to read a model while parts are ablated: nodes, edges of a circuit, or directions.

Each way gives the same three readings: the metric and next-token logits, replies, and the loss of reference replies.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from mechsafety.circuits.edge_faithfulness import EdgeMeter
from mechsafety.errors import MechsafetyError
from mechsafety.interventions.nodes import by_site, only
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.models.decode import Columns, check_room, decode_replies, loss_along
from mechsafety.patching import pair_runs
from mechsafety.patching.masks import PairRuns, SoftMask, blend, masked_logits
from mechsafety.prompts import PromptPairs, TokenPairs
from mechsafety.replies import reply_loss
from mechsafety.robustness.lockstep import Lockstep, Side
from mechsafety.sites import SiteKind

Source = Literal["mean", "zero", "counterfactual"]
# metric of the harmful prompts, and logits of the first reply token after the harmless ones
Reading = tuple[Float[Tensor, " pair"], Float[Tensor, "pair d_vocab"]]
# pairs that are read side by side in one forward
_BATCH = 16


@dataclass(frozen=True, slots=True)
class InContext:
    """Parts are ablated by a context manager, which holds in every forward.

    Attributes:
        model: The model.
        pairs: Pairs that align.
        metric: The metric.
        context: Function from parts and a strength to the context manager.
    """

    model: LensModel
    pairs: PromptPairs
    metric: RefusalLogOdds
    context: Callable[[Sequence[Any], float], AbstractContextManager[object]]

    def read(self, parts: Sequence[Any], strength: float) -> Reading:
        """Metric of the harmful prompts, and logits of the first reply token after the harmless ones."""
        with self.context(parts, strength):
            scores = self.metric.scores(self.model, self.pairs.harmful)
            return scores, self.model.reading(()).logits(self.pairs.harmless)

    def replies(self, parts: Sequence[Any], strength: float, side: str, n: int) -> list[str]:
        """Greedy replies of at most ``n`` tokens to the prompts of one side."""
        with self.context(parts, strength):
            return self.model.generate(getattr(self.pairs, side), n, progress=False)

    def loss(self, parts: Sequence[Any], strength: float, references: Sequence[str]) -> Float[Tensor, " pair"]:
        """Loss per token of one reference reply per harmless prompt, in nats; NaN for an empty one."""
        with self.context(parts, strength):
            return reply_loss(self.model, self.pairs.harmless, references)


@dataclass(frozen=True, slots=True)
class _OnRuns(ABC):
    """Parts take what they have on the other prompt of the pair, in stored runs of both prompts.

    Attributes:
        model: The model.
        pairs: Pairs of equal length.
        metric: The metric.
        runs: Runs in which the metric is read.
        plain: Runs that end at the prompt's end; the same ones where the metric reads there.
    """

    model: LensModel
    pairs: PromptPairs
    metric: RefusalLogOdds
    runs: PairRuns
    plain: PairRuns

    @classmethod
    def of(cls, model: LensModel, pairs: PromptPairs, metric: RefusalLogOdds, extra: Sequence[SiteKind] = ()) -> Self:
        """Run both prompts of every pair once.

        Raises:
            MechsafetyError: Pairs of unequal length, or a metric of whole openers.
        """
        metric.check_one_column()
        if pairs.align == "suffix":
            raise MechsafetyError(
                "counterfactual values for pairs aligned at the suffix",
                expected="pairs of equal length",
                hint="or source='mean'",
            )
        plain = pair_runs(model.reading(()), pairs, extra=extra)
        opened = metric.opener_ids
        runs = pair_runs(model.reading(opened), pairs, extra=extra) if opened else plain
        return cls(model, pairs, metric, runs, plain)

    def read(self, parts: Sequence[Any], strength: float) -> Reading:
        """See `InContext`; in a harmless prompt's run, parts take what they have on the harmful one."""
        swapped = PairRuns(self.plain.harmless, self.plain.harmful, self.plain.start)
        with torch.no_grad():
            return self.metric(self.logits(self.runs, parts, strength)), self.logits(swapped, parts, strength)

    @abstractmethod
    def logits(self, runs: PairRuns, parts: Sequence[Any], strength: float) -> Float[Tensor, "pair d_vocab"]:
        """Next-token logits of the runs' first side."""


class AtCounterfactual(_OnRuns):
    """Nodes take the values that they have on the other prompt of the pair, along prompt and reply.

    Along a reply, both prompts of a pair are read side by side, each with its own key-value cache, and then the same
    reply tokens. The values of the other prompt's run are therefore known at every token.
    """

    __slots__ = ()

    def logits(self, runs: PairRuns, parts: Sequence[Any], strength: float) -> Float[Tensor, "pair d_vocab"]:
        """See `_OnRuns`."""
        weights = torch.full((len(parts),), 1 - strength, device=self.model.device)
        return masked_logits(self.model, runs.harmful, runs.source, SoftMask.of(self.model, parts, weights))

    def replies(self, parts: Sequence[Any], strength: float, side: str, n: int) -> list[str]:
        """See `InContext`."""
        found, plain = list[list[int]](), self.model.reading(())
        for tokens in self._batches(plain):
            check_room(plain.backend, max(span.length for span in tokens.harmful.spans), n)
            step, prompts = self._begin(plain, tokens, parts, strength, side)
            found += decode_replies(step.last, prompts, plain.end_ids, n)[0]
        return plain.decode(found)

    def loss(self, parts: Sequence[Any], strength: float, references: Sequence[str]) -> Float[Tensor, " pair"]:
        """See `InContext`."""
        plain = self.model.reading(())
        tokens = plain.tokenize_pairs(self.pairs)

        def read(k: int, said: Tensor) -> Tensor:
            step, prompts = self._begin(plain, tokens.rows([k]), parts, strength, "harmless")
            logits = [step.read(*piece)[0, -1:] for piece in prompts][-1:]
            before = said[:, :-1]
            if before.numel():
                logits.append(step.read(before, torch.ones_like(before).bool(), before.shape[1])[0])
            return torch.cat(logits)

        return loss_along(plain.tokenizer, range(len(tokens)), references, read)

    def _batches(self, model: LensModel) -> list[TokenPairs]:
        tokens = model.tokenize_pairs(self.pairs)
        return [tokens.rows(slice(k, k + _BATCH)) for k in range(0, len(tokens), _BATCH)]

    def _begin(
        self, model: LensModel, tokens: TokenPairs, parts: Sequence[Any], strength: float, side: str
    ) -> tuple[Lockstep, list[Columns]]:
        """Lockstep of one side, which takes values of the other, and the columns of its prompts.

        The columns before the first difference are the same in both prompts, so that nothing need be taken there.
        """
        own, other = (tokens.harmful, tokens.harmless) if side == "harmful" else (tokens.harmless, tokens.harmful)
        edits = [(site, _taken(index, strength)) for site, index in by_site(parts).items()]
        start = tokens.start
        step = Lockstep(Side(model), Side(model), edits, (other.ids, other.mask), untouched=start)
        spans = [slice(0, start), slice(start, None)] if start else [slice(None)]
        return step, [(own.ids[:, at], own.mask[:, at]) for at in spans]


def _taken(index: Sequence[int], strength: float) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
    """From the value of the other run to the edit that moves some heads or neurons of a site to it."""
    return lambda value: only(index, blend(value, 1 - strength))


class CutEdges(_OnRuns):
    """Edges carry what their sender writes on the other prompt of the pair; all other edges carry this run's."""

    __slots__ = ()

    def logits(self, runs: PairRuns, parts: Sequence[Any], strength: float) -> Float[Tensor, "pair d_vocab"]:
        """See `_OnRuns`."""
        meter = EdgeMeter(self.model, runs, self.metric)
        place = {edge: k for k, edge in enumerate(meter.parts)}
        weights = torch.ones(len(place), device=self.model.device)
        weights[[place[edge] for edge in parts]] = 1 - strength
        return meter.soft_logits(runs, weights)


Speaking = InContext | AtCounterfactual
Ablating = Speaking | CutEdges
