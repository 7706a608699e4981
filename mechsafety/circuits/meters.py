"""What a set of parts is worth: the metric with everything outside it, or the set itself, patched."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.models.engine import BaseRun, Hook, max_variants
from mechsafety.nodes import Edge, Node, head_and_mlp_nodes
from mechsafety.patching.masks import PairRuns, Patch, patched_scores
from mechsafety.sites import Site, SiteKind

Part = Node | Edge


@dataclass(frozen=True, slots=True)
class FaithfulnessMeter:
    """Measures faithfulness f(C) = (m(C) - m(empty)) / (m(model) - m(empty)) of sets of parts on stored runs.

    m is the mean metric on the harmful prompts with every part outside C given its value from the harmless twin. The
    parts are heads and MLPs; `NeuronMeter` and `EdgeMeter` have other ones.
    """

    model: LensModel
    runs: PairRuns
    metric: RefusalLogOdds

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
        return self._shares(self.kept(circuits, near))

    def without(self, circuits: Sequence[Sequence[Part]]) -> list[float]:
        """F of the whole model less each circuit."""
        return self._shares(self.removed(circuits))

    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """Metric of the whole model on the (harmful, harmless) prompts; the latter is m(empty)."""
        harmful, harmless = self.runs.scores(self.metric)
        return harmful.cpu().double().numpy(), harmless.cpu().double().numpy()

    def _shares(self, scores: np.ndarray) -> list[float]:
        harmful, harmless = self.ends()
        gap = harmful.mean() - harmless.mean()
        return [float(value) for value in (scores.mean(axis=1) - harmless.mean()) / gap]

    def _outside(self, circuit: Sequence[Part]) -> list[Part]:
        keep = set(circuit)
        return [part for part in self.parts if part not in keep]

    def _scores(self, patched: Sequence[Sequence[Part]], near: Sequence[Part] | None = None) -> np.ndarray:
        """Metric [variant prompt] with each list of parts patched."""
        variants = [[part for part in parts if isinstance(part, Node)] for parts in patched]
        base, source = self.runs.harmful, self.runs.harmless.acts
        if near is None:
            scores = patched_scores(self.model, base, source, Patch.of(self.model, variants), self.metric)
            return scores.cpu().double().numpy()
        common = {part for part in near if isinstance(part, Node)}
        base = self._base_with(sorted(common, key=lambda node: node.order))
        first = [
            min((node.layer or 0 for node in common.symmetric_difference(nodes)), default=self.model.n_layers - 1)
            for nodes in variants
        ]
        order = sorted(range(len(variants)), key=lambda k: (first[k], k))
        found = np.zeros((len(variants), len(base)))
        for begin in range(0, len(order), max_variants(base)):
            chunk = order[begin : begin + max_variants(base)]
            start = first[chunk[0]]
            patch = Patch.of(self.model, [[n for n in variants[k] if (n.layer or 0) >= start] for k in chunk])
            scores = patched_scores(self.model, base, source, patch, self.metric, start=start)
            found[chunk] = scores.cpu().double().numpy()
        return found

    def _base_with(self, patched: Sequence[Node]) -> BaseRun:
        """The harmful run with these nodes patched, as a base to go on from at any block."""
        base = self.runs.harmful
        seen: dict[int, Tensor] = {0: base.resid[0]}

        def note(layer: int) -> Hook:
            return (Site(SiteKind.RESID_PRE, layer), lambda tensor: seen.__setitem__(layer, tensor.detach()))

        with self.model.hooks([note(layer) for layer in range(self.model.n_layers)]):
            patch = Patch.of(self.model, [patched])
            patched_scores(self.model, base, self.runs.harmless.acts, patch, self.metric, start=0)
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
