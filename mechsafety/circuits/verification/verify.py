"""Checks of a circuit, on pairs that set its size and on pairs that played no part."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from mechsafety.circuits.budget import Budget
from mechsafety.circuits.faithfulness import FaithfulnessMeter, in_order, stratum
from mechsafety.circuits.goal import Goal, GoalKind
from mechsafety.circuits.search import MAX_EXACT, MIB_SHARES, SearchResult, each_left_out
from mechsafety.circuits.verification.claims import claims
from mechsafety.circuits.verification.outcome import CurvePoint, FreshCheck, RandomControls, Stability, Verification
from mechsafety.circuits.verification.side_effects import side_effects
from mechsafety.circuits.verification.statistics import (
    independence_test,
    prompt_areas,
    rank_p,
    ratio,
)
from mechsafety.inputs import Amount, public
from mechsafety.intervals import ratio_interval, ratio_intervals
from mechsafety.metrics import adjust_p
from mechsafety.nodes import Part
from mechsafety.scale.work import sweeps

# fewer parts than this outside the circuit cannot give a p below 0.05: 19 give one of 0.05
MIN_ADDED = 20


@sweeps
@public
def verify(
    result: SearchResult,
    found_on: FaithfulnessMeter,
    held_out: FaithfulnessMeter,
    fresh: FaithfulnessMeter | None = None,
    controls: FaithfulnessMeter | None = None,
    *,
    target: float,
    goal: GoalKind = "reach",
    topics: Sequence[str] = (),
    n_random: Amount = 40,
    n_added: Amount = 40,
    completeness_steps: int = 3,
    completeness_tries: int = 6,
    stability: Stability | None = None,
    budget: Budget | None = None,
    seed: Amount = 0,
) -> Verification:
    """Run every check of a circuit, and list the claims with the verdict on each.

    The checks are:

    - faithfulness, with its interval;
    - sufficiency and necessity, each against size-matched random circuits;
    - minimality, against parts added at random;
    - completeness, and independence of the complement;
    - side effects on harmless prompts;
    - the areas of the curve.

    A check that the time budget leaves no room for stays None, and the budget notes it.

    Args:
        result: Result of the search.
        found_on: Meter on the search's pairs.
        held_out: Meter on the pairs that set the circuit's size.
        fresh: Meter on pairs that played no part in the search. Checks that do not depend on how the size was set use
            these pairs; without fresh pairs, they use the held-out pairs.
        controls: Meter on some of the fresh pairs, for the checks that take many runs: random circuits, minimality, and
            the subsets that completeness tries. By default they use all of them.
        target: The target faithfulness of the search.
        goal: The goal of the search: ``reach`` or ``match`` (see `MapOptions`).
        topics: Topics of the held-out pairs, if the search saw none of them.
        n_random: Number of random circuits, each with as many parts of each kind as the circuit.
        n_added: Number of parts outside the circuit that are added to it, one at a time, for minimality.
        completeness_steps: Number of greedy steps towards the least complete subset.
        completeness_tries: Number of parts tried at each step, those with the largest marginal effect first.
        stability: Result of `bootstrap_stability`.
        budget: Time budget.
        seed: Seed of everything random.

    Example:
        >>> one, other = split.meters.found_on, split.meters.held_out
        >>> found = ms.circuits.verify(searched.result, one, other, target=0.8, n_random=9)
        >>> found.reached, found.held_out_faithfulness > 0.8
        (True, True)
    """
    budget, aim = budget or Budget(), Goal(target, goal)
    circuit, judge = result.circuit, fresh or held_out
    some = controls or judge
    faithful, interval = faithfulness_of(held_out, circuit, seed)
    judged, judged_interval = faithfulness_of(judge, circuit, seed)
    harmful, harmless = judge.ends()
    gap = harmful - harmless
    removed = judge.removed([circuit])[0]
    necessity = ratio(harmful - removed, gap)
    random = random_circuits(some, circuit, n_random, seed)
    sufficient = _random_values(some, some.faithfulness, random, budget, 0.8, "random circuits, kept")
    lost = 1.0 - _random_values(some, some.without, random, budget, 0.88, "random circuits, removed")
    # what the random circuits are compared with: the circuit on the same pairs
    own_kept, own_lost = some.faithfulness([circuit])[0], 1.0 - some.without([circuit])[0]
    costs = cost_ci = null = complete = None
    if not budget.skips("minimality", 0.88):
        # a primary node and its backup make each other superfluous: minimality is of the circuit without backups
        core = [part for part in circuit if part not in result.added]
        tested = drawn(core, MAX_EXACT, seed)
        costs, cost_ci = marginal_intervals(some, core, seed, tested)
        if len(tested) < len(core):
            budget.left_out(f"minimality: measured for {len(tested)} of {len(core)} parts, drawn at random")
        null = added_effects(some, core, n_added, seed, leave=result.added)
    if costs is not None and not budget.skips("completeness", 0.95):
        tries = sorted(circuit, key=lambda part: -abs(costs.get(part, 0.0)))
        grown = completeness(some, circuit, tries, steps=completeness_steps, width=completeness_tries)[1]
        # the subset found on some pairs, and the two that are always tried, on all pairs
        complete = max(completeness_gaps(judge, circuit, [grown, (), circuit]), key=lambda found: found[0])
    effects = None if budget.skips("side effects on harmless prompts", 0.97) else side_effects(judge, circuit, seed)
    cmd, cpr = curve_areas(mib_points(result.curve))
    areas = area_intervals(result, held_out, seed)
    found = found_on.faithfulness([circuit])[0]
    check = Verification(
        faithfulness=found,
        held_out_faithfulness=faithful,
        held_out_ci=interval,
        held_out_topics=tuple(topics),
        necessity=necessity,
        random_controls=_controls(sufficient, own_kept, some),
        curve=result.curve,
        cmd=cmd,
        cpr=cpr,
        cmd_ci=areas[0],
        cpr_ci=areas[1],
        target=target,
        # measured again: since the search, backups may have joined and unconnected nodes may have left
        reached=aim.met(found, faithful),
        completeness=None if complete is None else complete[0],
        completeness_ci=None if complete is None else gap_interval(judge, circuit, complete[1], seed),
        minimality=None if costs is None else {str(part): value for part, value in costs.items()},
        fresh=None if fresh is None else FreshCheck(len(harmful), judged, judged_interval),
        completeness_without=None if complete is None else tuple(str(part) for part in complete[1]),
        necessity_controls=_controls(lost, own_lost, some),
        minimality_p=None if costs is None or null is None else minimality_p(costs, null, aim),
        independence=independence_test(harmful, removed, seed),
        stability=stability,
        side_effects=effects,
        goal=goal,
        minimality_ci=None if cost_ci is None else {str(part): ends for part, ends in cost_ci.items()},
        minimality_null=None if null is None or len(null) < MIN_ADDED else _most_of(null, aim),
    )
    necessity_ci = ratio_interval(harmful - removed, gap, seed)
    stated = claims(check, len(harmful), necessity_ci, n_parts=len(circuit) - len(result.added))
    return replace(check, claims=stated)


def faithfulness_of(meter: FaithfulnessMeter, circuit: Sequence[Part], seed: int) -> tuple[float, tuple[float, float]]:
    """Faithfulness of a circuit, and its 95 % interval over pairs."""
    harmful, harmless = meter.ends()
    part, whole = meter.kept([circuit])[0] - harmless, harmful - harmless
    return ratio(part, whole), ratio_interval(part, whole, seed)


def marginal_intervals(
    meter: FaithfulnessMeter, circuit: Sequence[Part], seed: int, parts: Sequence[Part] | None = None
) -> tuple[dict[Part, float], dict[Part, tuple[float, float]]]:
    """Faithfulness lost when each part alone leaves the circuit, exact, and its 95 % interval over pairs.

    Args:
        meter: Meter to measure on.
        circuit: The circuit.
        seed: Seed of the intervals.
        parts: The parts that leave; by default all of the circuit.
    """
    order = in_order(circuit if parts is None else parts)
    if not order:
        return {}, {}
    scores = meter.kept([circuit, *each_left_out(circuit, order)], near=circuit)
    harmful, harmless = meter.ends()
    lost, gap = scores[0] - scores[1:], harmful - harmless
    values = {part: ratio(row, gap) for part, row in zip(order, lost, strict=True)}
    return values, dict(zip(order, ratio_intervals(lost, gap, seed), strict=True))


def random_circuits(meter: FaithfulnessMeter, circuit: Sequence[Part], n: int, seed: int) -> list[list[Part]]:
    """``n`` random circuits with as many parts of each kind as ``circuit``, drawn without replacement."""
    rng = np.random.default_rng(seed)
    pools: dict[str, list[Part]] = {}
    for part in meter.parts:
        pools.setdefault(stratum(part), []).append(part)
    sizes = {kind: sum(stratum(part) == kind for part in circuit) for kind in pools}
    return [
        [pool[k] for kind, pool in pools.items() for k in rng.choice(len(pool), sizes[kind], replace=False)]
        for _ in range(n)
    ]


def _random_values(
    meter: FaithfulnessMeter,
    measure: Callable[[Sequence[Sequence[Part]]], list[float]],
    circuits: Sequence[Sequence[Part]],
    budget: Budget,
    share: float,
    what: str,
) -> np.ndarray:
    found: list[float] = []
    with meter.bar(len(circuits), what) as bar:
        for batch in budget.within(circuits, 10, share, what):
            for first in range(0, len(batch), 10):
                found += measure(batch[first : first + 10])
                bar.update(len(found) - bar.n)
    return np.asarray(found)


def _controls(values: np.ndarray, observed: float, meter: FaithfulnessMeter) -> RandomControls:
    n_pairs = len(meter.runs.harmful)
    if not len(values):
        return RandomControls(0, float("nan"), float("nan"), float("nan"), n_pairs, observed)
    mean, highest, p_value = float(values.mean()), float(values.max()), rank_p(observed, values)
    return RandomControls(len(values), mean, highest, p_value, n_pairs, observed)


def added_effects(
    meter: FaithfulnessMeter, circuit: Sequence[Part], n: int, seed: int, leave: Sequence[Part] = ()
) -> np.ndarray:
    """Change of faithfulness when parts outside the circuit are added to it, one at a time.

    Args:
        meter: Meter to measure on.
        circuit: The circuit.
        n: Number of parts to add, drawn at random.
        seed: Seed of the draw.
        leave: Parts that are not drawn.
    """
    inside = {*circuit, *leave}
    outside = [part for part in meter.parts if part not in inside]
    added = [[*circuit, part] for part in drawn(outside, n, seed)]
    values = meter.faithfulness([circuit, *added], near=circuit)
    return np.asarray(values[1:]) - values[0]


def drawn(parts: Sequence[Part], n: int, seed: int) -> list[Part]:
    """Up to ``n`` of the parts, drawn at random without replacement, in their own order."""
    picked = np.random.default_rng(seed).permutation(len(parts))[:n]
    return [parts[k] for k in sorted(picked.tolist())]


def minimality_p(costs: Mapping[Part, float], null: np.ndarray, goal: Goal) -> dict[str, float] | None:
    """The p of each part's effect against parts added at random (Shi et al. 2024), Benjamini-Hochberg adjusted.

    To reach the target, a part counts by what it adds; to match the model, by what it changes in either direction. So
    do the parts added at random. A part that is like them therefore has a p below 0.05 in one case of twenty.
    """
    if len(null) < MIN_ADDED:
        return None
    sizes = np.array([goal.size(value) for value in null])
    raw = np.array([rank_p(goal.size(value), sizes) for value in costs.values()])
    return {str(part): float(p) for part, p in zip(costs, adjust_p(raw), strict=True)}


def _most_of(null: np.ndarray, goal: Goal) -> float:
    """What 95 % of the parts added at random stay below."""
    return float(np.quantile([goal.size(value) for value in null], 0.95))


def completeness(
    meter: FaithfulnessMeter, circuit: Sequence[Part], pool: Sequence[Part], *, steps: int, width: int
) -> tuple[float, tuple[Part, ...]]:
    """Largest |F(C without K) - F(M without K)| found over subsets K of the circuit (Wang et al. 2022, section 4.1).

    K is empty, the whole circuit, or grown greedily. A greedy step tries the first ``width`` parts of the pool that are
    not in K yet, and adds the one that makes the difference largest. The result is a lower bound of the true maximum.

    Args:
        meter: Meter to measure on.
        circuit: The circuit C.
        pool: Parts of the circuit, in the order in which they are tried.
        steps: Largest number of parts in a grown K.
        width: Number of parts tried at each step.

    Returns:
        The largest difference, and the K that has it.
    """

    def gaps(subsets: Sequence[Sequence[Part]]) -> list[float]:
        return [gap for gap, _ in completeness_gaps(meter, circuit, subsets)]

    tried: list[tuple[Part, ...]] = [(), tuple(circuit)]
    values = gaps(tried)
    grown: tuple[Part, ...] = ()
    for _ in range(min(steps, len(circuit) - 1)):
        further = [(*grown, part) for part in [part for part in pool if part not in grown][:width]]
        found = gaps(further)
        tried, values = [*tried, *further], [*values, *found]
        grown = further[int(np.argmax(found))]
    best = int(np.argmax(values))
    return values[best], in_order(tried[best])


def completeness_gaps(
    meter: FaithfulnessMeter, circuit: Sequence[Part], subsets: Sequence[Sequence[Part]]
) -> list[tuple[float, tuple[Part, ...]]]:
    """|F(C without K) - F(M without K)| of each subset K of the circuit C, with the subset."""
    rest = [[part for part in circuit if part not in set(gone)] for gone in subsets]
    kept, removed = meter.faithfulness(rest, near=circuit), meter.without(subsets)
    return [(abs(a - b), in_order(gone)) for a, b, gone in zip(kept, removed, subsets, strict=True)]


def gap_interval(
    meter: FaithfulnessMeter, circuit: Sequence[Part], gone: Sequence[Part], seed: int
) -> tuple[float, float]:
    """Interval over prompts of |F(C without K) - F(M without K)|: the sign is turned so that the mean is positive."""
    harmful, harmless = meter.ends()
    rest = [part for part in circuit if part not in set(gone)]
    gap = meter.kept([rest])[0] - meter.removed([gone])[0]
    return ratio_interval(gap * (1 if gap.mean() >= 0 else -1), harmful - harmless, seed)


def area_intervals(
    result: SearchResult, held_out: FaithfulnessMeter, seed: int
) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
    """95 % intervals over prompts of CMD and CPR (see `curve_areas`); None without scores."""
    grid = mib_points(result.curve)
    harmful, harmless = held_out.ends()
    if len(result.curve_scores) != len(result.curve) or len(harmful) < 2:
        return None, None
    rows = zip(result.curve, result.curve_scores, strict=True)
    scores = np.array([row for point, row in rows if point in grid])
    beside, under = prompt_areas(np.array([point.k for point in grid]), scores, harmful, harmless)
    low, high = ratio_interval(beside, harmful - harmless, seed)
    return (max(low, 0.0), high), ratio_interval(under, harmful - harmless, seed)


def mib_points(curve: Sequence[CurvePoint]) -> list[CurvePoint]:
    """The points of a curve that lie on the MIB benchmark's grid of shares."""
    total = max((point.n_nodes for point in curve), default=0)
    return [point for point in curve if point.n_nodes in {round(share * total) for share in MIB_SHARES}]


def curve_areas(curve: Sequence[CurvePoint]) -> tuple[float, float]:
    """CMD, the area between the held-out curve and 1, and CPR, the area under it, over the share of parts (trapezoid).

    Mueller et al. 2025 (MIB) define both areas for edges. Here they are over the parts that the circuit is made of.
    """
    k = np.array([point.k for point in curve])
    f = np.array([point.held_out for point in curve])
    return float(np.trapezoid(np.abs(1 - f), k)), float(np.trapezoid(f, k))
