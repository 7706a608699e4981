"""Finding the smallest set of nodes that carries the metric gap."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mechsafety.attribution.nodes import NodeAttribution
from mechsafety.circuits.circuit import CurvePoint
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.nodes import Node, head_and_mlp_nodes
from mechsafety.patching.masks import PairRuns, Patch, patched_scores

# shares of all nodes at which the curve is measured: those of the MIB benchmark, and some between
MIB_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
CURVE_SHARES = (*MIB_SHARES, 0.15, 0.25, 0.3, 0.35, 0.4, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, slots=True)
class FaithfulnessMeter:
    """Measures faithfulness f(C) = (m(C) - m(empty)) / (m(model) - m(empty)) of node sets on stored runs.

    m is the mean metric on the harmful prompts with every node outside C given its value from the harmless twin.
    """

    model: LensModel
    runs: PairRuns
    metric: RefusalLogOdds

    def kept(self, circuits: Sequence[Sequence[Node]]) -> np.ndarray:
        """Metric [circuit prompt] with everything outside each circuit patched."""
        nodes = head_and_mlp_nodes(self.model.n_layers, self.model.n_heads)
        return self._scores([[node for node in nodes if node not in keep] for keep in map(set, circuits)])

    def removed(self, circuits: Sequence[Sequence[Node]]) -> np.ndarray:
        """Metric [circuit prompt] with each circuit itself patched and everything else alive."""
        return self._scores(circuits)

    def faithfulness(self, circuits: Sequence[Sequence[Node]]) -> list[float]:
        """F of each circuit."""
        harmful, harmless = self.ends()
        gap = harmful.mean() - harmless.mean()
        return [float(value) for value in (self.kept(circuits).mean(axis=1) - harmless.mean()) / gap]

    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """Metric of the whole model on the (harmful, harmless) prompts; the latter is m(empty)."""
        harmful, harmless = self.runs.scores(self.metric)
        return harmful.cpu().double().numpy(), harmless.cpu().double().numpy()

    def _scores(self, patched: Sequence[Sequence[Node]]) -> np.ndarray:
        patch = Patch.of(self.model, patched)
        scores = patched_scores(self.model, self.runs.harmful, self.runs.harmless.acts, patch, self.metric)
        return scores.cpu().double().numpy()


@dataclass(frozen=True, slots=True)
class Discovery:
    """What the search found.

    Attributes:
        ranking: All nodes, largest signed estimate first.
        curve: Faithfulness of the best k of the ranking, on the search's pairs and on held-out ones.
        circuit: The smallest set found, in the order of computation.
        marginals: Faithfulness each of its nodes adds to it, on the search's pairs.
        reached: Whether the circuit reaches the target on both sets of pairs.
    """

    ranking: tuple[Node, ...]
    curve: tuple[CurvePoint, ...]
    circuit: tuple[Node, ...]
    marginals: Mapping[Node, float]
    reached: bool


def discover(
    found_on: FaithfulnessMeter, held_out: FaithfulnessMeter, attribution: NodeAttribution, target: float
) -> Discovery:
    """The smallest set of heads and MLPs found that reaches ``target`` faithfulness, on both sets of pairs.

    The order comes from the attribution on the search's pairs. The smallest prefix of it that reaches the target is
    found by bisection; then nodes whose exact removal costs least are dropped as long as the target holds. The held-out
    pairs set the size of the circuit and never the order, so their faithfulness lies just above the target by
    construction: an unbiased figure needs fresh pairs (`verify`).

    Args:
        found_on: Meter on the pairs that were attributed.
        held_out: Meter on other pairs.
        attribution: Estimates to rank by, signed: nodes that work against refusal come last.
        target: Faithfulness to reach.
    """
    enough = target - 1e-6  # the whole model's faithfulness is 1 up to rounding
    nodes = head_and_mlp_nodes(found_on.model.n_layers, found_on.model.n_heads)
    ranking = tuple(sorted(nodes, key=lambda node: (-attribution.of(node), node.order)))
    curve = faithfulness_curve(found_on, held_out, ranking)

    def reaches(circuit: Sequence[Node]) -> bool:
        if found_on.faithfulness([circuit])[0] < enough:
            return False
        return held_out.faithfulness([circuit])[0] >= enough

    # the whole model does, up to rounding
    good = [point.n_nodes for point in curve if min(point.faithfulness, point.held_out) >= enough]
    high = good[0] if good else len(ranking)
    low = max((point.n_nodes for point in curve if point.n_nodes < high), default=0)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(ranking[:middle]) else (middle, high)
    circuit, costs = _eliminate(found_on, list(ranking[:high]), reaches)
    if len(circuit) == len(ranking):
        # nothing but the whole model does: say so, with the smaller set that comes closest
        smaller = [point for point in curve if point.n_nodes < len(ranking)]
        best = max(smaller, key=lambda point: (min(point.faithfulness, point.held_out), -point.n_nodes))
        kept = ranking[: best.n_nodes]
        return Discovery(ranking, curve, _ordered(kept), marginals(found_on, kept), False)
    return Discovery(ranking, curve, _ordered(circuit), costs, True)


def faithfulness_curve(
    found_on: FaithfulnessMeter, held_out: FaithfulnessMeter, ranking: Sequence[Node]
) -> tuple[CurvePoint, ...]:
    """Faithfulness of the best k nodes, for `CURVE_SHARES` of all of them."""
    sizes = sorted({round(share * len(ranking)) for share in CURVE_SHARES} | {min(10, len(ranking))})
    circuits = [ranking[:size] for size in sizes]
    here, there = found_on.faithfulness(circuits), held_out.faithfulness(circuits)
    return tuple(CurvePoint(size / len(ranking), size, a, b) for size, a, b in zip(sizes, here, there, strict=True))


def _eliminate(
    meter: FaithfulnessMeter, circuit: list[Node], reaches: Callable[[Sequence[Node]], bool], rounds: int = 3
) -> tuple[list[Node], dict[Node, float]]:
    """Drop the nodes that cost least, as many at once as the target allows; measure again; repeat."""
    costs = marginals(meter, circuit)
    for _ in range(rounds):
        cheapest = sorted(circuit, key=lambda node: (costs[node], node.order))
        low, high = 0, len(cheapest)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if reaches(cheapest[middle:]) else (low, middle)
        if low == 0:
            break
        dropped = set(cheapest[:low])
        circuit = [node for node in circuit if node not in dropped]
        costs = marginals(meter, circuit)
    return circuit, costs


def marginals(meter: FaithfulnessMeter, circuit: Sequence[Node]) -> dict[Node, float]:
    """Faithfulness lost when each node alone leaves the circuit, exact."""
    if not circuit:
        return {}
    order = sorted(circuit, key=lambda node: node.order)
    without = [[node for node in order if node != gone] for gone in order]
    scores = meter.faithfulness([order, *without])
    return {node: scores[0] - score for node, score in zip(order, scores[1:], strict=True)}


def _ordered(nodes: Sequence[Node]) -> tuple[Node, ...]:
    return tuple(sorted(nodes, key=lambda node: node.order))
