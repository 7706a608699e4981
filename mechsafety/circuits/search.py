"""Finding the smallest set of parts that carries the metric gap."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np

from mechsafety.attribution.nodes import NodeAttribution
from mechsafety.circuits.budget import Budget
from mechsafety.circuits.faithfulness import FaithfulnessMeter, in_order, order_of
from mechsafety.circuits.goal import Goal, GoalKind
from mechsafety.circuits.verification.outcome import CurvePoint
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Count, public
from mechsafety.nodes import Node, Part, head_and_mlp_nodes, nodes_of

# shares of all parts at which the curve is measured: those of the MIB benchmark, and some between
MIB_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
CURVE_SHARES = (*MIB_SHARES, 0.15, 0.25, 0.3, 0.35, 0.4, 0.6, 0.7, 0.8, 0.9)
# a circuit of more parts than this is not measured part by part, which takes one run per part
MAX_EXACT = 300

SearchKind = Literal["gradient", "masks"]
# sizes of prefixes of a ranking, and the metric [size prompt] of each
PrefixScores = tuple[Sequence[int], np.ndarray]


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What the search found.

    Attributes:
        ranking: All parts, the most wanted first: the largest signed estimate, or the largest absolute one if the
            circuit is to match the whole model.
        curve: Faithfulness of the best k of the ranking, on the search's pairs and on held-out ones.
        circuit: The smallest set found, in the order of computation.
        marginals: Faithfulness that each part adds to the circuit, on held-out pairs; empty where removal was cut
            short.
        reached: Whether the circuit meets the goal on both sets of pairs.
        ranked: Size of the prefix of the ranking that removal began with.
        minimal: Whether no further single part can leave; None where removal ended before that was known.
        added: Backups that were added to the smallest set.
        curve_scores: Metric of each point of the curve on each held-out prompt.
        found_scores: The same on each prompt that was searched on.
        scores: Estimate by which each part was ranked; empty where the ranking came without estimates.

    Example:
        >>> halves = [ms.patching.pair_runs(model, half) for half in pairs.halves()]
        >>> meters = [ms.circuits.FaithfulnessMeter(model, half, metric) for half in halves]
        >>> result = ms.circuits.search_nodes(*meters, ms.node_attribution(model, pairs, metric), target=0.8)
        >>> set(result.circuit) <= set(made.truth.nodes), result.reached
        (True, True)
    """

    ranking: tuple[Part, ...]
    curve: tuple[CurvePoint, ...]
    circuit: tuple[Part, ...]
    marginals: Mapping[Part, float]
    reached: bool
    ranked: int = 0
    minimal: bool | None = None
    added: tuple[Part, ...] = ()
    curve_scores: tuple[tuple[float, ...], ...] = ()
    found_scores: tuple[tuple[float, ...], ...] = ()
    scores: Mapping[Part, float] = field(default_factory=dict)

    @property
    def nodes(self) -> list[Node]:
        """The circuit's heads, MLPs and neurons, or those that its edges run between, in the order of computation."""
        return nodes_of(self.circuit)


def check_search(target: float, max_parts: int | None) -> None:
    """Raise an error that names the option of a search that is out of range, if there is one."""
    if not 0 < target <= 1:
        raise MechsafetyError(f"target {target}", expected="a faithfulness in (0, 1]")
    if max_parts is not None and max_parts < 1:
        raise MechsafetyError(f"a circuit of at most {max_parts} parts", expected="at least 1")


def meets(goal: Goal, meters: Sequence[FaithfulnessMeter], circuit: Sequence[Part]) -> bool:
    """Whether a circuit is good enough on each meter's pairs; after the first meter that says no, none is asked."""
    return all(goal.met(meter.faithfulness([circuit])[0]) for meter in meters)


def ranked(nodes: Sequence[Node], attribution: NodeAttribution, goal: Goal) -> list[Node]:
    """The nodes by how much their estimates count for the goal, the largest first."""
    return sorted(nodes, key=lambda node: (-goal.size(attribution.of(node)), node.order))


@public
def search_nodes(
    found_on: FaithfulnessMeter,
    held_out: FaithfulnessMeter,
    attribution: NodeAttribution,
    target: float,
    *,
    goal: GoalKind = "reach",
    max_nodes: Count | None = None,
    rounds: Count = 3,
    budget: Budget | None = None,
) -> SearchResult:
    """The smallest set of heads and MLPs found whose faithfulness is good enough, on both sets of pairs.

    The order comes from the attribution on the search's pairs; see `search_parts` for what follows.

    Args:
        found_on: Meter on the pairs that were attributed.
        held_out: Meter on other pairs.
        attribution: Estimates to rank by. With the goal ``reach``, nodes that work against refusal come last.
        target: Smallest faithfulness that is good enough.
        goal: ``reach``: at least the target. ``match``: at most ``1 - target`` away from 1, on either side.
        max_nodes: Largest size. Where the target needs more nodes, the circuit misses the target and says so.
        rounds: Largest number of exact measurements of all parts, for removal.
        budget: Time budget.

    Example:
        >>> one, other = (ms.patching.pair_runs(model, half) for half in pairs.halves())
        >>> meters = [ms.circuits.FaithfulnessMeter(model, half, metric) for half in (one, other)]
        >>> estimate = ms.node_attribution(model, pairs, metric)
        >>> ms.circuits.search_nodes(*meters, estimate, target=0.8).reached
        True
    """
    aim = Goal(target, goal)
    nodes = head_and_mlp_nodes(found_on.model.n_layers, found_on.model.n_heads)
    ranking = ranked(nodes, attribution, aim)
    return search_parts(found_on, held_out, ranking, aim, max_parts=max_nodes, rounds=rounds, budget=budget)


def search_parts(
    found_on: FaithfulnessMeter,
    held_out: FaithfulnessMeter,
    ranking: Sequence[Part],
    goal: Goal,
    *,
    max_parts: int | None = None,
    rounds: int = 3,
    budget: Budget | None = None,
    shares: Sequence[float] = CURVE_SHARES,
    tidy: Callable[[Sequence[Part]], list[Part]] = list,
    max_exact: int | None = None,
) -> SearchResult:
    """The smallest prefix of a ranking that meets the goal, without the parts whose exact removal does not matter.

    1. Find the smallest prefix of the ranking that meets the goal on both sets of pairs, by bisection.
    2. Measure exactly what the circuit loses without each part. A part may leave if the circuit still meets the goal on
       both sets of pairs.
    3. Sort the parts that may leave by their cost on the search's pairs, or by its absolute value if the circuit is to
       match the whole model. Remove them together, cheapest first, until one more would make the circuit miss the goal.
    4. Repeat from step 2 until no single part may leave. This is the criterion of ACDC (Conmy et al. 2023), with the
       goal in place of a threshold.

    The held-out pairs set the size of the circuit. That it meets the goal on them is therefore no evidence. An unbiased
    figure needs fresh pairs (`verify`).

    Args:
        found_on: Meter on the pairs that the ranking comes from.
        held_out: Meter on other pairs.
        ranking: All parts, the most important first.
        goal: Which faithfulness is good enough.
        max_parts: Largest size.
        rounds: Largest number of exact measurements of all parts, for removal.
        budget: Time budget.
        shares: Shares of all parts at which the curve is measured.
        tidy: Function that takes away parts of a set that change nothing.
        max_exact: Largest set that removal measures part by part. Of a larger set whole blocks are removed first. A
            set that stays larger is not measured part by part.
    """
    budget = budget or Budget()
    curve, here, there = _curve(found_on, held_out, ranking, shares)
    made = partial(SearchResult, tuple(ranking), curve, found_scores=here, curve_scores=there)

    # on fewer pairs first: a circuit that misses the goal there need not be run on the others
    fewest_first = sorted((found_on, held_out), key=lambda meter: len(meter.runs.harmful))

    def reaches(circuit: Sequence[Part]) -> bool:
        return meets(goal, fewest_first, circuit)

    # the whole model meets every goal, up to rounding
    good = [point.n_nodes for point in curve if goal.met(point.faithfulness, point.held_out)]
    high = good[0] if good else len(ranking)
    low = max((point.n_nodes for point in curve if point.n_nodes < high), default=0)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(ranking[:middle]) else (middle, high)
    circuit, costs, minimal = tidy(ranking[:high]), dict[Part, float](), None
    if max_exact is not None and len(circuit) > max_exact:
        circuit = tidy(_without_blocks(circuit, reaches, max_exact, budget))
    if max_exact is None or len(circuit) <= max_exact:
        circuit, costs, minimal = _eliminate(found_on, held_out, circuit, goal, reaches, rounds, budget)
        circuit = tidy(circuit)
    else:
        budget.left_out(f"removal of parts that do not matter: {len(circuit)} are too many to measure one by one")
    if max_parts is not None and len(circuit) > max_parts:
        # keep what removal would have removed last, by the costs that it measured
        worth = sorted(circuit, key=lambda part: -goal.size(costs.get(part, 0.0))) if costs else list(ranking)
        kept = in_order(tidy(worth[:max_parts]))
        return made(kept, marginals(held_out, kept), reaches(kept), high)
    if len(circuit) == len(ranking):
        # only the whole model meets the goal: say so, and give the smaller set that comes closest
        smaller = [point for point in curve if 0 < point.n_nodes < len(ranking)]
        best = min(smaller, key=lambda point: (goal.missing(point.faithfulness, point.held_out), point.n_nodes))
        kept = in_order(ranking[: best.n_nodes])
        return made(kept, marginals(held_out, kept), False, best.n_nodes)
    return made(in_order(circuit), costs, True, high, minimal)


def faithfulness_curve(
    found_on: FaithfulnessMeter,
    held_out: FaithfulnessMeter,
    ranking: Sequence[Part],
    shares: Sequence[float] = CURVE_SHARES,
) -> tuple[CurvePoint, ...]:
    """Faithfulness of the best k parts, for shares of all of them."""
    return _curve(found_on, held_out, ranking, shares)[0]


def prefix_scores(
    meter: FaithfulnessMeter, ranking: Sequence[Part], shares: Sequence[float] = CURVE_SHARES
) -> PrefixScores:
    """Metric of the best k parts on each prompt, for shares of all of them, and these k."""
    sizes = sorted({round(share * len(ranking)) for share in shares} | {min(10, len(ranking))})
    return sizes, meter.kept([ranking[:size] for size in sizes])


def _curve(
    found_on: FaithfulnessMeter, held_out: FaithfulnessMeter, ranking: Sequence[Part], shares: Sequence[float]
) -> tuple[tuple[CurvePoint, ...], tuple[tuple[float, ...], ...], tuple[tuple[float, ...], ...]]:
    """The curve, and the metric of each point on each prompt that was searched on, and on each held-out one."""
    (sizes, here), (_, there) = (prefix_scores(meter, ranking, shares) for meter in (found_on, held_out))
    values = zip(sizes, found_on.shares(here), held_out.shares(there), strict=True)
    points = tuple(CurvePoint(size / len(ranking), size, a, b) for size, a, b in values)
    return points, tuple(map(tuple, here.tolist())), tuple(map(tuple, there.tolist()))


def _without_blocks(
    circuit: Sequence[Part], reaches: Callable[[Sequence[Part]], bool], most: int, budget: Budget
) -> list[Part]:
    """Remove blocks of a ranked set, the last first, halving their size, until ``most`` parts are left.

    A gradient cannot see a part that has a backup. Such a part stands at the end of the ranking, and a prefix that
    holds it holds everything before it. Removing blocks removes the parts that came along with it (delta debugging,
    Zeller and Hildebrandt 2002).
    """
    left, size = list(circuit), len(circuit) // 2
    smallest = max(1, len(circuit) // BLOCKS)
    while len(left) > most and size >= smallest:
        end = len(left)
        while end > 0:
            if budget.over(SEARCH_SHARE):
                return left
            first = max(0, end - size)
            rest = left[:first] + left[end:]
            if rest and reaches(rest):
                left = rest
            end = first
        size //= 2
    return left


def _eliminate(
    meter: FaithfulnessMeter,
    held_out: FaithfulnessMeter,
    circuit: list[Part],
    goal: Goal,
    reaches: Callable[[Sequence[Part]], bool],
    rounds: int,
    budget: Budget,
) -> tuple[list[Part], dict[Part, float], bool | None]:
    """Remove the cheapest parts together until one more would miss the goal; measure again; repeat.

    The held-out pairs are fewer, so every part is measured on them first. Only parts that may leave there are measured
    on the search's pairs. Between full passes, only the parts that could still be removed are measured again.

    Returns:
        The parts that are left; what each of them costs on held-out pairs (empty if not measured); whether no further
        single part can leave (None where that was not measured to the end).
    """
    some: list[Part] | None = None  # the parts of this pass; all of them where it is None
    while rounds or some:
        if budget.over(SEARCH_SHARE):
            budget.left_out("removal of parts that do not matter: stopped before no part could leave")
            break
        rounds -= some is None
        there, lost = _whole_and_marginals(held_out, circuit, circuit if some is None else some)
        may = [part for part, value in lost.items() if goal.met(there - value)]
        whole, costs = _whole_and_marginals(meter, circuit, may)
        free = sorted(
            (part for part in may if goal.met(whole - costs[part])),
            key=lambda part: (goal.size(costs[part]), order_of(part)),
        )
        dropped = _largest(free, circuit, reaches)
        if not dropped and some is None:
            return circuit, lost, True
        circuit = [part for part in circuit if part not in set(dropped)]
        # a part that costs much more than the circuit can still lose waits for the next full pass
        there = held_out.faithfulness([circuit])[0]
        some = [part for part in free[len(dropped) :] if goal.near(there, lost[part], NEAR)] if dropped else None
        some = some or None
    return circuit, {}, None


def without_free(
    meters: Sequence[FaithfulnessMeter], circuit: Sequence[Part], removable: Sequence[Part], goal: Goal
) -> list[Part]:
    """The circuit without those of some parts that it does not need to meet the goal on each meter's pairs.

    The cheapest parts leave together, as many as may; then all are measured again.
    """
    left = list(circuit)

    while True:
        may, costs = [part for part in removable if part in set(left)], dict[Part, float]()
        for meter in meters:
            whole, costs = _whole_and_marginals(meter, left, may)
            may = [part for part in may if goal.met(whole - costs[part])]
        free = sorted(may, key=lambda part: (goal.size(costs[part]), order_of(part)))
        dropped = set(_largest(free, left, partial(meets, goal, meters)))
        if not dropped:
            return left
        left = [part for part in left if part not in dropped]


# a search may take this share of a time budget
SEARCH_SHARE = 0.4
# the smallest blocks that are tried are this share of a set too large to measure part by part
BLOCKS = 32
# parts that cost up to this multiple of what the circuit can still lose are measured again before the next full pass
NEAR = 2.0


def _largest(free: Sequence[Part], circuit: Sequence[Part], reaches: Callable[[Sequence[Part]], bool]) -> list[Part]:
    """The longest run of ``free``, from its start, that may leave together."""

    def fits(n: int) -> bool:
        gone = set(free[:n])
        return reaches([part for part in circuit if part not in gone])

    # usually few may leave: the search doubles the number from one, then bisects
    low, high = 0, 1
    while high <= len(free) and fits(high):
        low, high = high, 2 * high
    high = min(high, len(free) + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return list(free[:low])


def each_left_out(circuit: Sequence[Part], parts: Sequence[Part]) -> list[list[Part]]:
    """The circuit without each of these parts."""
    return [[part for part in circuit if part != gone] for gone in parts]


def marginals(
    meter: FaithfulnessMeter, circuit: Sequence[Part], parts: Sequence[Part] | None = None
) -> dict[Part, float]:
    """Faithfulness lost when each part alone (of ``parts``; by default of all) leaves the circuit, exact."""
    return _whole_and_marginals(meter, circuit, circuit if parts is None else parts)[1]


def _whole_and_marginals(
    meter: FaithfulnessMeter, circuit: Sequence[Part], parts: Sequence[Part]
) -> tuple[float, dict[Part, float]]:
    """Faithfulness of the circuit, and what is lost of it when each of some parts leaves; nan if there are no parts."""
    order = in_order(parts)
    if not order:
        return math.nan, {}
    scores = meter.faithfulness([circuit, *each_left_out(circuit, order)], near=circuit)
    return scores[0], {part: scores[0] - score for part, score in zip(order, scores[1:], strict=True)}
