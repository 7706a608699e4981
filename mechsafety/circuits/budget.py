"""A time budget: stages ask it whether time is left, and it records what they left out."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from mechsafety.scale.work import once

T = TypeVar("T")
LEFT_OUT = "left out"
# the stage without which there is no circuit
WIRING = "edges and roles"


class Budget:
    """Time limit of an analysis, in seconds; without a limit, nothing is cut.

    A stage stops once a given share of the whole time has passed. An early stage can therefore not use up the time that
    the checks at the end need.

    In a run (`mechsafety.scale`), each decision is made once and recorded. A run that goes on after a stop has all the
    time again.

    Args:
        seconds: Limit, from now on; None for no limit.
        clock: Function that gives the time in seconds.
    """

    def __init__(self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._start = clock()
        self._cut: list[str] = []

    @property
    def cut(self) -> tuple[str, ...]:
        """What was left out, one line per item."""
        return tuple(self._cut)

    def over(self, share: float = 1.0) -> bool:
        """Whether more than ``share`` of the seconds have passed."""
        if self.seconds is None:
            return False
        limit = share * self.seconds
        # in a run it is decided once, because all that follows depends on it
        return once("time left", lambda: self._clock() - self._start > limit, bool)

    def left_out(self, what: str) -> None:
        """Note what was cut."""
        if what not in self._cut:
            self._cut.append(what)

    def skips(self, what: str, share: float) -> bool:
        """Whether a stage must be left out entirely; if so, it is noted."""
        if self.over(share):
            self.left_out(f"{what}: {LEFT_OUT}")
            return True
        return False

    def within(self, items: Sequence[T], size: int, share: float, what: str) -> Iterator[Sequence[T]]:
        """The items, a few at a time, as long as time is left; without a limit, all at once."""
        step = max(1, len(items) if self.seconds is None else size)
        for first in range(0, len(items), step):
            if self.over(share):
                self.left_out(f"{what}: {first} of {len(items)} done")
                return
            yield items[first : first + step]
