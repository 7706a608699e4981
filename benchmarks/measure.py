"""Times, peak memory and the comparison of two ways to the same numbers."""

import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from targets import TOLERANCE

# a call is timed so often, unless one run takes longer than LONG_S
REPEATS = 3
LONG_S = 20.0


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    out = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin, out


def times(function: Callable[[], Any], budget: float = 5.0) -> list[float]:
    """Seconds of up to five runs, no more than fit into ``budget`` seconds after the first."""
    seconds = [timed(function)[0]]
    while len(seconds) < 5 and sum(seconds) < budget:
        seconds.append(timed(function)[0])
    return seconds


def reset_peak() -> None:
    """Forget the process' peak memory so far (Linux), so that loading the model does not count."""
    Path("/proc/self/clear_refs").write_text("5")


def memory_gib(field: str = "VmHWM") -> float:
    """Peak (VmHWM) or present (VmRSS) resident memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20


def cpu_model() -> str:
    """The processor's name, from Linux' list of them; elsewhere what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def difference(a: Any, b: Any) -> dict[str, Any]:
    """Largest difference of two tensors (None if a value is not finite), and whether it is within ``TOLERANCE``.

    Raises:
        ValueError: Their shapes differ.
    """
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if a.shape != b.shape:
        raise ValueError(f"values of shape {tuple(a.shape)} against {tuple(b.shape)}")
    gap = float((a - b).abs().max())
    size = float(a.abs().max())
    return {
        "max_difference": gap if math.isfinite(gap) else None,
        "max_value": size if math.isfinite(size) else None,
        "equal": gap <= TOLERANCE,
    }


def compare(
    ours: Callable[[], Any],
    peer: Callable[[], Any],
    repeats: int = REPEATS,
    value: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """Interleaved repeats of both; medians, all times, our own peak, and the largest difference of what they return.

    Args:
        ours, peer: What is timed.
        repeats: How often.
        value: What is compared with the peer's values instead of ``ours``' own, made once and not timed.
    """
    mine, theirs, values, peaks = [], [], [], []
    for _ in range(repeats):
        reset_peak()
        seconds, a = timed(ours)
        mine.append(seconds)
        peaks.append(memory_gib())
        seconds, b = timed(peer)
        theirs.append(seconds)
        values.append((a, b))
    if value:
        once = value()
        values = [(once, b) for _, b in values]
    compared = [difference(a, b) for a, b in values]
    sizes = [found["max_difference"] for found in compared]
    return {
        "ours_s": statistics.median(mine),
        "peer_s": statistics.median(theirs),
        "ratio": statistics.median(theirs) / statistics.median(mine),
        "repeats": repeats,
        "max_difference": None if None in sizes else max(sizes),
        "max_value": compared[0]["max_value"],
        "equal": all(found["equal"] for found in compared),
        "peak_gib": peaks[0],
        "ours_all_s": mine,
        "peer_all_s": theirs,
    }


def alone(ours: Callable[[], Any]) -> tuple[dict[str, Any], Any]:
    """Median time of a call without a peer (of one run if that is long), peak memory and value of the first run."""
    reset_peak()
    seconds, out = timed(ours)
    peak, mine = memory_gib(), [seconds]
    while len(mine) < REPEATS and seconds < LONG_S:
        mine.append(timed(ours)[0])
    result = {"ours_s": statistics.median(mine), "repeats": len(mine), "peak_gib": peak, "ours_all_s": mine}
    return result, out
