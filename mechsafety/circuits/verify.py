"""Checks of a circuit, on pairs that set its size and on pairs that played no part."""

from collections.abc import Sequence

import numpy as np

from mechsafety.circuits.circuit import CurvePoint, FreshCheck, RandomControls, Verification
from mechsafety.circuits.discover import Discovery, FaithfulnessMeter, marginals
from mechsafety.nodes import Node, head_and_mlp_nodes


def verify(
    discovery: Discovery,
    found_on: FaithfulnessMeter,
    held_out: FaithfulnessMeter,
    fresh: FaithfulnessMeter | None = None,
    *,
    target: float,
    topics: Sequence[str] = (),
    n_random: int = 120,
    seed: int = 0,
) -> Verification:
    """Faithfulness with interval, necessity, size-matched random controls, minimality, and the areas of the curve.

    Args:
        discovery: What was found.
        found_on: Meter on the search's pairs.
        held_out: Meter on the pairs that set the circuit's size.
        fresh: Meter on pairs that played no part; what does not depend on the size is measured on them. On the held-out
            pairs where there are none.
        target: The faithfulness that was asked for.
        topics: Topics of the held-out pairs, if the search saw none of them.
        n_random: Random circuits with as many heads and as many MLPs as the circuit.
        seed: Of the random circuits and the bootstrap.
    """
    circuit = discovery.circuit
    judge = fresh or held_out
    faithful, interval = _faithfulness(held_out, circuit, seed)
    judged, judged_interval = _faithfulness(judge, circuit, seed)
    harmful, harmless = judge.ends()
    random = random_faithfulness(judge, circuit, n_random, seed)
    p_value = float((1 + (random >= judged).sum()) / (1 + n_random))
    cmd, cpr = curve_areas(discovery.curve)
    return Verification(
        faithfulness=found_on.faithfulness([circuit])[0],
        held_out_faithfulness=faithful,
        held_out_ci=interval,
        held_out_topics=tuple(topics),
        necessity=_ratio(harmful - judge.removed([circuit])[0], harmful - harmless),
        random_controls=RandomControls(n_random, float(random.mean()), float(random.max()), p_value),
        curve=discovery.curve,
        cmd=cmd,
        cpr=cpr,
        target=target,
        reached=discovery.reached,
        minimality={str(node): value for node, value in marginals(judge, circuit).items()},
        fresh=None if fresh is None else FreshCheck(len(harmful), judged, judged_interval),
    )


def _faithfulness(meter: FaithfulnessMeter, circuit: Sequence[Node], seed: int) -> tuple[float, tuple[float, float]]:
    harmful, harmless = meter.ends()
    kept = meter.kept([circuit])[0]
    part, whole = kept - harmless, harmful - harmless
    return _ratio(part, whole), _ratio_interval(part, whole, seed)


def random_faithfulness(
    meter: FaithfulnessMeter,
    circuit: Sequence[Node],
    n: int,
    seed: int,
) -> np.ndarray:
    """Faithfulness of ``n`` random circuits with as many heads and as many MLPs as ``circuit``."""
    rng = np.random.default_rng(seed)
    nodes = head_and_mlp_nodes(meter.model.n_layers, meter.model.n_heads)
    found: list[float] = []
    while len(found) < n:
        batch = []
        for _ in range(min(10, n - len(found))):
            drawn: list[Node] = []
            for kind in ("head", "mlp"):
                pool = [node for node in nodes if node.kind == kind]
                size = sum(node.kind == kind for node in circuit)
                drawn += [pool[k] for k in rng.choice(len(pool), size, replace=False)]
            batch.append(drawn)
        found += meter.faithfulness(batch)
    return np.asarray(found)


def curve_areas(curve: Sequence[CurvePoint]) -> tuple[float, float]:
    """CMD, the area between the held-out curve and 1, and CPR, the area under it, over the share of nodes (trapezoid).

    Mueller et al. 2025 (MIB), here over nodes where they take edges.
    """
    k = np.array([point.k for point in curve])
    f = np.array([point.held_out for point in curve])
    return float(np.trapezoid(np.abs(1 - f), k)), float(np.trapezoid(f, k))


def _ratio(part: np.ndarray, whole: np.ndarray) -> float:
    return float(part.mean() / whole.mean())


def _ratio_interval(part: np.ndarray, whole: np.ndarray, seed: int) -> tuple[float, float]:
    from scipy.stats import bootstrap

    found = bootstrap(
        (part, whole),
        lambda a, b, axis: a.mean(axis=axis) / b.mean(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)
