"""Times, peak memory and the comparison of two ways to the same numbers."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    out = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin, out


def median_time(function: Callable[[], Any], budget: float = 5.0) -> float:
    """Median of up to five runs, no more than fit into ``budget`` seconds after the first."""
    seconds = [timed(function)[0]]
    while len(seconds) < 5 and sum(seconds) < budget:
        seconds.append(timed(function)[0])
    return statistics.median(seconds)


def reset_peak() -> None:
    """Forget the process' peak memory so far (Linux), so that loading the model does not count."""
    Path("/proc/self/clear_refs").write_text("5")


def memory_gib(field: str = "VmHWM") -> float:
    """Peak (VmHWM) or present (VmRSS) resident memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20


def compare(ours: Callable[[], Any], peer: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Interleaved repeats of both; medians, all times, our own peak, and the largest difference of what they return."""
    mine, theirs, gaps, peaks = [], [], [], []
    for _ in range(repeats):
        reset_peak()
        seconds, a = timed(ours)
        mine.append(seconds)
        peaks.append(memory_gib())
        seconds, b = timed(peer)
        theirs.append(seconds)
        gaps.append(float((torch.as_tensor(a) - torch.as_tensor(b)).abs().max()))
    return {
        "ours_s": statistics.median(mine),
        "peer_s": statistics.median(theirs),
        "ratio": statistics.median(theirs) / statistics.median(mine),
        "max_difference": max(gaps),
        "peak_gib": peaks[0],
        "ours_all_s": mine,
        "peer_all_s": theirs,
    }


def alone(ours: Callable[[], Any]) -> tuple[dict[str, Any], Any]:
    """Time and peak of one call without a peer, and what it returns."""
    reset_peak()
    seconds, out = timed(ours)
    return {"ours_s": seconds, "peak_gib": memory_gib()}, out
