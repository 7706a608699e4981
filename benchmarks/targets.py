"""What the cases with a peer are to reach, and whether they did."""

from dataclasses import dataclass
from typing import Any

# two ways to the same numbers differ by no more
TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Target:
    """Limits of a case; None where none is set.

    Attributes:
        ratio: Least ratio of the peer's time to ours.
        seconds: Most time of ours.
        gib: Most peak memory.
    """

    ratio: float | None = None
    seconds: float | None = None
    gib: float | None = None

    def __str__(self) -> str:
        limits = (
            (self.ratio, f"at least {self.ratio:g}x, within {TOLERANCE:g}" if self.ratio else ""),
            (self.seconds, f"under {self.seconds} s"),
            (self.gib, f"under {self.gib} GiB"),
        )
        return ", ".join(text for limit, text in limits if limit is not None) or "none set"

    def verdict(self, case: dict[str, Any]) -> str:
        """``FAILED`` if the values differ, else ``met`` or ``missed``; a dash where nothing is asked for."""
        if case.get("equal") is False:
            return "FAILED: values differ"
        met = [
            *([case["ratio"] >= self.ratio] if self.ratio is not None else []),
            *([case["ours_s"] < self.seconds] if self.seconds is not None else []),
            *([case["peak_gib"] < self.gib] if self.gib is not None else []),
        ]
        return ("met" if all(met) else "missed") if met else "-"
