"""How far an integral of gradients is from what it should sum to, and how many points make it close enough."""

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby
from operator import itemgetter

import numpy as np
from jaxtyping import Float

from mechsafety.attribution.gradients import Grid, Point, integration_points, path_start, slope
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.nodes import Node
from mechsafety.patching.effects import total_gap
from mechsafety.patching.masks import PairRuns
from mechsafety.scale.work import once, work

# numbers of points that are tried in turn, and how far from 1 the completeness may be
SERIES = (5, 10, 20, 40, 80)
TOLERANCE = 0.05
# number of batches whose runs are held while numbers of points are tried, so that memory does not grow with prompts
KEPT = 4

logger = logging.getLogger(__name__)

Batches = Sequence[Callable[[], PairRuns]]


def choose_points(
    model: LensModel, batches: Batches, metric: RefusalLogOdds, method: str, grid: Grid, senders: Sequence[Node]
) -> tuple[list[Point], float]:
    """The points for the first number in `SERIES` that is complete within `TOLERANCE`, and their completeness.

    If no number is, the largest one is taken, and a warning is logged.
    """
    points, found = [], 0.0
    for steps in SERIES:
        points = integration_points(model, method, steps, senders, grid)
        found = completeness(model, batches, metric, points)
        if abs(found - 1) <= TOLERANCE or found != found:  # NaN: there is no gap, and the caller raises the error
            return points, found
    logger.warning("%s of %s sums to %.2f of the gap at %d steps", method, model.name, found, SERIES[-1])
    return points, found


def completeness(model: LensModel, batches: Batches, metric: RefusalLogOdds, points: Sequence[Point]) -> float:
    """What the gradients at ``points`` sum to, as a share of the gap; 1 is exact.

    Along a path from the harmless run to the harmful run, the derivative of the metric integrates to the gap. The
    weighted sum of the derivative over the points approximates this integral. Its share of the gap is 1 if there are
    enough points.

    With ``ig-activations``, each sublayer has a path of its own, which integrates to the exact effect of patching the
    sublayer. The completeness is then 1 plus the largest difference between sum and effect, as a share of the gap.

    The cost is a forward and a backward pass per point, and one more forward per sublayer.
    """
    gap, missed, slopes = 0.0, np.zeros(1), list[float]()
    runs_of = lru_cache(maxsize=1)(lambda number: batches[number]())

    def measured(item: tuple[int, int]) -> tuple[float, float]:
        runs = runs_of(item[0])
        harmful, harmless = runs.scores(metric)
        return slope(model, runs, metric, points[item[1]]), total_gap(harmful, harmless)

    items = [(number, k) for number in range(len(batches)) for k in range(len(points))]
    found = work("slopes", items, measured, tuple[float, float], group=itemgetter(0))
    for (number, k), (own, part) in zip(items, found, strict=True):
        slopes = [own] if k == 0 else [*slopes, own]
        if k == len(points) - 1:
            gap += part
            missed = missed + np.array(missed_by(model, runs_of, number, metric, points, slopes))
    return share(missed, gap)


def missed_by(
    model: LensModel,
    runs_of: Callable[[int], PairRuns],
    number: int,
    metric: RefusalLogOdds,
    points: Sequence[Point],
    slopes: Sequence[float],
) -> tuple[float, ...]:
    """`misses` of one batch, as a step of a run."""
    return once(
        "misses", lambda: tuple(misses(model, runs_of(number), metric, points, slopes).tolist()), tuple[float, ...]
    )


def kept_runs(batches: Batches) -> list[Callable[[], PairRuns]]:
    """The same batches; the first `KEPT` of them run only once, however often they are called."""
    return [lru_cache(maxsize=1)(batch) if k < KEPT else batch for k, batch in enumerate(batches)]


def misses(
    model: LensModel, runs: PairRuns, metric: RefusalLogOdds, points: Sequence[Point], slopes: Sequence[float]
) -> Float[np.ndarray, " path"]:
    """For each path, the weighted sum of the slopes at its points minus the exact value, summed over pairs."""
    found = []
    harmful, harmless = runs.scores(metric)
    for _, same in groupby(zip(points, slopes, strict=True), key=lambda row: row[0].sites):
        path = list(same)
        first = path[0][0]
        low = harmless if first.whole else path_start(model, runs, metric, first)
        total = sum(point.weight * own for point, own in path)
        found.append(total - total_gap(harmful, low))
    return np.array(found)


def share(missed: Float[np.ndarray, " path"], gap: float) -> float:
    """Completeness of the path that misses most; NaN if there is no gap."""
    return float("nan") if gap == 0 else 1.0 + float(max(missed, key=abs)) / gap
