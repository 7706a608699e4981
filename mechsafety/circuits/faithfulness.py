"""Faithfulness of a set of parts: the metric with everything outside the set, or the set itself, patched."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.nodes import Node, Part, head_and_mlp_nodes
from mechsafety.patching.masks import (
    Constants,
    PairRuns,
    Patch,
    SoftMask,
    at_constants,
    masked_logits,
    pair_runs,
    patched_scores,
    scores_near,
)
from mechsafety.progress import progress_bar

# rows x columns of a batch that is not worth dividing
SMALL_BATCH = 512
# groups must run at most this share of the rows x columns, because each costs runs of its own
WORTH = 0.8


@dataclass(frozen=True, slots=True)
class FaithfulnessMeter:
    """Measures faithfulness f(C) = (m(C) - m(empty)) / (m(model) - m(empty)) of sets of parts on stored runs.

    m(C) is the mean metric on the harmful prompts when every part outside C has its value from the harmless
    counterfactual prompt, or a constant (`PairRuns.constants`). The parts are heads and MLPs; `NeuronMeter` and
    `EdgeMeter` have other parts.

    Attributes:
        model: The model.
        runs: Stored runs of the pairs.
        metric: The metric m.
        groups: The same pairs in groups by length (see `grouped`): rows and runs of each group. Empty if all pairs are
            run together.
        progress: Whether to show bars.

    Example:
        >>> meter = ms.circuits.FaithfulnessMeter(model, runs, metric)
        >>> whole, planted, nothing = meter.faithfulness([meter.parts, made.truth.nodes, []])
        >>> round(whole, 2), round(abs(nothing), 2), planted > 0.9
        (1.0, 0.0, True)
    """

    model: LensModel
    runs: PairRuns
    metric: RefusalLogOdds
    groups: tuple[tuple[tuple[int, ...], PairRuns], ...] = ()
    progress: bool = False

    def grouped(self, n: int = 3) -> "FaithfulnessMeter":
        """The same meter with its pairs in up to ``n`` groups of similar length, so that fewer columns are run.

        A batch runs every row from the earliest first difference of its pairs to the end of its longest row. Pairs that
        need 8 to 25 columns cost half as much in three groups as in one. The groups are those with the least to run.
        Where they save less than a fifth, the pairs stay together.
        """
        tokens = self.runs.tokens
        if not tokens.common:
            return self  # all pairs run the columns of the suffix
        needed = (tokens.harmful.ids.shape[1] - tokens.first_differences).tolist()
        order = sorted(range(len(needed)), key=lambda k: (needed[k], k))

        cuts = _cuts([needed[k] for k in order], n)
        best = [order[a:b] for a, b in itertools.pairwise((0, *cuts, len(order)))]
        cells = sum(len(rows) * max(needed[k] for k in rows) for rows in best)
        if cells > WORTH * len(needed) * max(needed):
            return self
        kinds = tuple(self.runs.harmful.acts)
        constants = self.runs.constants
        found = [
            (tuple(rows), pair_runs(self.model, tokens.rows(rows), extra=kinds, constants=constants)) for rows in best
        ]
        return replace(self, groups=tuple(found))

    def at_mean(self) -> "FaithfulnessMeter":
        """The same meter, in which patched parts take their mean over the harmless prompts, per column from the end."""
        return self.at_constants(Constants.mean(self.runs.harmless))

    def at_constants(self, constants: Constants) -> "FaithfulnessMeter":
        """The same meter, in which patched parts take constants, per column counted from the end."""
        groups = tuple((rows, at_constants(self.model, runs, constants)) for rows, runs in self.groups)
        return replace(self, runs=at_constants(self.model, self.runs, constants), groups=groups)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Everything that a circuit can be made of, in the order of computation."""
        return head_and_mlp_nodes(self.model.n_layers, self.model.n_heads)

    def kept(self, circuits: Sequence[Sequence[Part]], near: Sequence[Part] | None = None) -> np.ndarray:
        """Metric [circuit prompt] with everything outside each circuit patched.

        Args:
            circuits: Sets of parts.
            near: A set from which the circuits differ little. Whatever lies before the first difference is run once.
        """
        outside = self._outside([*circuits, *([] if near is None else [near])])
        return self._scores(outside[: len(circuits)], None if near is None else outside[-1])

    def removed(self, circuits: Sequence[Sequence[Part]]) -> np.ndarray:
        """Metric [circuit prompt] with each circuit itself patched and everything else live."""
        return self._scores(circuits)

    def soft(self, runs: PairRuns, weights: Float[Tensor, " part"]) -> Float[Tensor, " batch"]:
        """Metric of each pair with every part blended: 1 keeps its own value, 0 takes that of the harmless run.

        Differentiable in the weights.

        Args:
            runs: Runs of some pairs.
            weights: One weight per part, in the order of ``parts``.
        """
        nodes = [part for part in self.parts if isinstance(part, Node)]
        mask = SoftMask.of(self.model, nodes, weights)
        return self.metric(masked_logits(self.model, runs.harmful, runs.source, mask))

    def faithfulness(self, circuits: Sequence[Sequence[Part]], near: Sequence[Part] | None = None) -> list[float]:
        """F of each circuit; ``near`` as in `kept`."""
        return self.shares(self.kept(circuits, near))

    def without(self, circuits: Sequence[Sequence[Part]]) -> list[float]:
        """F of the whole model without each circuit."""
        return self.shares(self.removed(circuits))

    def bar(self, total: int, what: str = "circuits", over: Iterable[Any] | None = None) -> Any:
        """A progress bar, shown after two seconds if the meter shows bars; with ``over``, an iterator."""
        return progress_bar(over, total=total, desc=what, show=self.progress, delay=2)

    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """Metric of the whole model on the harmful prompts, and m(empty): on the harmless prompts, or at constants."""
        harmful, harmless = self.runs.ends(self.metric)
        return harmful.cpu().double().numpy(), harmless.cpu().double().numpy()

    def shares(self, scores: np.ndarray) -> list[float]:
        """F of each row of a metric [circuit prompt]."""
        harmful, harmless = self.ends()
        gap = harmful.mean() - harmless.mean()
        return [float(value) for value in (scores.mean(axis=1) - harmless.mean()) / gap]

    def _outside(self, circuits: Sequence[Sequence[Part]]) -> list[list[Part]]:
        """All parts that are not in each circuit."""
        parts = self.parts
        check_parts(self, circuits, frozenset(parts).__contains__)
        kept = [set(circuit) for circuit in circuits]
        return [[part for part in parts if part not in keep] for keep in kept]

    def _scores(self, patched: Sequence[Sequence[Part]], near: Sequence[Part] | None = None) -> np.ndarray:
        """Metric [variant prompt] with each list of parts patched."""
        check_parts(self, patched, lambda part: isinstance(part, Node))
        variants = [[part for part in parts if isinstance(part, Node)] for parts in patched]
        grouped = bool(self.groups) and not small_batch(self.runs, len(variants))
        with self.bar(len(variants) * (len(self.groups) if grouped else 1)) as bar:
            if not grouped:
                return self._scores_of(self.runs, variants, near, bar.update)
            found = np.zeros((len(variants), len(self.runs.harmful)))
            for rows, runs in self.groups:
                found[:, rows] = self._scores_of(runs, variants, near, bar.update)
        return found

    def _scores_of(
        self,
        runs: PairRuns,
        variants: Sequence[Sequence[Node]],
        near: Sequence[Part] | None,
        report: Callable[[int], object],
    ) -> np.ndarray:
        """Metric [variant prompt] of some of the pairs."""
        base, source = runs.harmful, runs.source
        if near is None:
            patch = Patch.of(self.model, variants)
            scores = patched_scores(self.model, base, source, patch, self.metric, report=report)
            return scores.cpu().double().numpy()
        common = [part for part in near if isinstance(part, Node)]
        scores = scores_near(self.model, base, source, common, variants, self.metric, report=report)
        return scores.cpu().double().numpy()


def small_batch(runs: PairRuns, variants: int) -> bool:
    """Whether so many variants of all pairs take as long as a larger batch, because every run reads all weights."""
    return variants * len(runs.harmful) * runs.harmful.n_pos <= SMALL_BATCH


def check_parts(meter: FaithfulnessMeter, circuits: Sequence[Sequence[Part]], known: Callable[[Part], bool]) -> None:
    """Refuse parts that a meter would not measure.

    Raises:
        MechsafetyError: A circuit holds a part that the meter does not know.
    """
    other = next((part for circuit in circuits for part in circuit if not known(part)), None)
    if other is not None:
        kinds = sorted({stratum(part) for part in meter.parts})
        raise MechsafetyError(f"{other} in a circuit of {type(meter).__name__}", expected=f"its parts: {kinds}")


def _cuts(needed: Sequence[int], groups: int) -> tuple[int, ...]:
    """Where to cut ascending numbers of columns into up to ``groups`` groups, so that the fewest cells are run.

    A group runs, in each row, as many columns as its last row needs. Among equally good ways, the one with the fewest
    cuts is taken, and among those the first. A cut between two rows of the same length never helps. The time therefore
    grows with the number of rows and with the square of the number of lengths.

    Example:
        >>> _cuts([5, 5, 9, 9, 9, 30], 3)
        (2, 5)
    """
    total, last = len(needed), np.asarray(needed)
    ends = np.append(np.flatnonzero(np.diff(last)) + 1, total)  # a group may end there
    begins = np.append(0, ends[:-1])
    cells = (ends[None] - begins[:, None]) * last[ends - 1][None]  # of a group from one beginning to one end
    never = np.iinfo(cells.dtype).max // 4  # a group that would end before it begins
    cells = np.where(ends[None] > begins[:, None], cells, never)
    best = cells[:, -1]  # fewest cells from each beginning on, uncut
    fewest, cuts = best[0], tuple[int, ...]()
    chosen: list[np.ndarray] = []
    for _ in range(min(groups, total) - 1):
        ways = cells[:, :-1] + best[None, 1:]
        if not ways.size:
            break
        best, chosen = np.minimum(ways.min(1), never), [ways.argmin(1), *chosen]
        if best[0] < fewest:
            fewest, place, found = best[0], 0, []
            for choice in chosen:
                place = int(choice[place]) + 1
                found.append(int(begins[place]))
            cuts = tuple(found)
    return cuts


def stratum(part: Part) -> str:
    """Kind of a part; a random circuit has as many parts of each kind as the circuit."""
    return part.kind if isinstance(part, Node) else f"edge {part.slot}"


def order_of(part: Part) -> tuple[int, ...]:
    """Sort key in the order of computation; edges by receiver, then sender."""
    if isinstance(part, Node):
        return part.order
    return (*part.receiver.order, *part.sender.order, "qkv".find(part.slot))


def in_order(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts in the order of computation."""
    return tuple(sorted(parts, key=order_of))
