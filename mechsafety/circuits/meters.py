"""What a set of parts is worth: the metric with everything outside it, or the set itself, patched."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.models.engine import BaseRun, Hook, max_variants
from mechsafety.nodes import Edge, Node, head_and_mlp_nodes
from mechsafety.patching.masks import PairRuns, Patch, pair_runs, patched_scores
from mechsafety.prompts import TokenPairs
from mechsafety.sites import Site, SiteKind

Part = Node | Edge


@dataclass(frozen=True, slots=True)
class FaithfulnessMeter:
    """Measures faithfulness f(C) = (m(C) - m(empty)) / (m(model) - m(empty)) of sets of parts on stored runs.

    m is the mean metric on the harmful prompts with every part outside C given its value from the harmless twin. The
    parts are heads and MLPs; `NeuronMeter` and `EdgeMeter` have other ones.

    Attributes:
        model: The model.
        runs: Stored runs of the pairs.
        metric: What is measured.
        groups: The same pairs by length (see `grouped`), rows and runs; empty where all are run together.
        progress: Whether to show bars.
    """

    model: LensModel
    runs: PairRuns
    metric: RefusalLogOdds
    groups: tuple[tuple[tuple[int, ...], PairRuns], ...] = ()
    progress: bool = False

    def grouped(self, n: int = 3) -> "FaithfulnessMeter":
        """The same meter, its pairs run in up to ``n`` groups of like length, so that few columns are run in vain.

        A batch runs every row from its earliest first difference to its longest row's end; pairs of 8 to 25 such
        columns cost half as much in three groups as in one. The groups are those that leave least to run.
        """
        tokens = TokenPairs.of(self.runs.harmful.tokens, self.runs.harmless.tokens)
        differs = (tokens.harmful.ids != tokens.harmless.ids).int()
        needed = (differs.shape[1] - differs.argmax(1)).tolist()
        order = sorted(range(len(needed)), key=lambda k: (needed[k], k))

        def split(cuts: Sequence[int]) -> list[list[int]]:
            return [order[a:b] for a, b in itertools.pairwise((0, *cuts, len(order)))]

        def columns(cuts: Sequence[int]) -> int:
            return sum(len(rows) * needed[rows[-1]] for rows in split(cuts))

        ways = [w for k in range(n) for w in itertools.combinations(range(1, len(order)), k)]
        best = min(ways, key=columns)
        if not best:
            return self
        kinds = tuple(self.runs.harmful.acts)
        found = [(tuple(rows), pair_runs(self.model, tokens.rows(rows), extra=kinds)) for rows in split(best)]
        return replace(self, groups=tuple(found))

    @property
    def parts(self) -> tuple[Part, ...]:
        """Everything that a circuit can be made of, in the order of computation."""
        return head_and_mlp_nodes(self.model.n_layers, self.model.n_heads)

    def kept(self, circuits: Sequence[Sequence[Part]], near: Sequence[Part] | None = None) -> np.ndarray:
        """Metric [circuit prompt] with everything outside each circuit patched.

        Args:
            circuits: Sets of parts.
            near: A set that the circuits differ little from: what lies before their first difference is run once.
        """
        outside = [self._outside(circuit) for circuit in circuits]
        return self._scores(outside, None if near is None else self._outside(near))

    def removed(self, circuits: Sequence[Sequence[Part]]) -> np.ndarray:
        """Metric [circuit prompt] with each circuit itself patched and everything else alive."""
        return self._scores(circuits)

    def faithfulness(self, circuits: Sequence[Sequence[Part]], near: Sequence[Part] | None = None) -> list[float]:
        """F of each circuit; ``near`` as in `kept`."""
        return self.shares(self.kept(circuits, near))

    def without(self, circuits: Sequence[Sequence[Part]]) -> list[float]:
        """F of the whole model less each circuit."""
        return self.shares(self.removed(circuits))

    def bar(self, total: int, what: str = "circuits", over: Iterable[Any] | None = None) -> Any:
        """A bar over so many things, shown after two seconds if the meter shows any; an iterator where one is given."""
        return tqdm(over, total=total, desc=what, disable=not self.progress, leave=False, delay=2)

    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """Metric of the whole model on the (harmful, harmless) prompts; the latter is m(empty)."""
        harmful, harmless = self.runs.scores(self.metric)
        return harmful.cpu().double().numpy(), harmless.cpu().double().numpy()

    def shares(self, scores: np.ndarray) -> list[float]:
        """F of each row of a metric [circuit prompt]."""
        harmful, harmless = self.ends()
        gap = harmful.mean() - harmless.mean()
        return [float(value) for value in (scores.mean(axis=1) - harmless.mean()) / gap]

    def _outside(self, circuit: Sequence[Part]) -> list[Part]:
        keep = set(circuit)
        return [part for part in self.parts if part not in keep]

    def _scores(self, patched: Sequence[Sequence[Part]], near: Sequence[Part] | None = None) -> np.ndarray:
        """Metric [variant prompt] with each list of parts patched."""
        variants = [[part for part in parts if isinstance(part, Node)] for parts in patched]
        with self.bar(len(variants) * max(1, len(self.groups))) as bar:
            if not self.groups:
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
        base, source = runs.harmful, runs.harmless.acts
        if near is None:
            patch = Patch.of(self.model, variants)
            scores = patched_scores(self.model, base, source, patch, self.metric, report=report)
            return scores.cpu().double().numpy()
        common = {part for part in near if isinstance(part, Node)}
        base = self._base_with(runs, sorted(common, key=lambda node: node.order))
        first = [
            min((node.layer or 0 for node in common.symmetric_difference(nodes)), default=self.model.n_layers - 1)
            for nodes in variants
        ]
        order = sorted(range(len(variants)), key=lambda k: (first[k], k))
        found = np.zeros((len(variants), len(base)))
        most, done = max_variants(base), 0
        while done < len(order):
            start = first[order[done]]
            # a batch starts at its earliest block: past a fair size only variants of that block join it
            fair = [k for k in order[done : done + most] if first[k] == start]
            chunk = order[done : done + max(len(fair), -(-most // 2))]
            done += len(chunk)
            patch = Patch.of(self.model, [[n for n in variants[k] if (n.layer or 0) >= start] for k in chunk])
            scores = patched_scores(self.model, base, source, patch, self.metric, start=start)
            found[chunk] = scores.cpu().double().numpy()
            report(len(chunk))
        return found

    def _base_with(self, runs: PairRuns, patched: Sequence[Node]) -> BaseRun:
        """The harmful run with these nodes patched, as a base to go on from at any block."""
        base = runs.harmful
        seen: dict[int, Tensor] = {0: base.resid[0]}

        def note(layer: int) -> Hook:
            return (Site(SiteKind.RESID_PRE, layer), lambda tensor: seen.__setitem__(layer, tensor.detach()))

        with self.model.hooks([note(layer) for layer in range(self.model.n_layers)]):
            patch = Patch.of(self.model, [patched])
            patched_scores(self.model, base, runs.harmless.acts, patch, self.metric, start=0)
        rows = [seen[layer] for layer in range(self.model.n_layers)]
        return replace(base, resid=torch.stack([*rows, base.resid[-1]]))


def stratum(part: Part) -> str:
    """What kind of part: random circuits have as many of each kind."""
    return part.kind if isinstance(part, Node) else f"edge {part.slot}"


def order_of(part: Part) -> tuple[int, ...]:
    """Sort key in the order of computation; edges by receiver, then sender."""
    if isinstance(part, Node):
        return part.order
    return (*part.receiver.order, *part.sender.order, "qkv".find(part.slot))


def in_order(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts in the order of computation."""
    return tuple(sorted(parts, key=order_of))
