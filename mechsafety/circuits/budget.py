"""A time budget: stages that may be cut short ask it, and it keeps what they left out."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


class Budget:
    """Seconds that an analysis may take; without a number it never cuts anything.

    Each stage may use up to a share of the whole, so that an early one cannot eat what the checks at the end need.

    Args:
        seconds: From now on; None for no limit.
        clock: Where the time comes from.
    """

    def __init__(self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._start = clock()
        self._cut: list[str] = []

    @property
    def cut(self) -> tuple[str, ...]:
        """What was left out, a line each."""
        return tuple(self._cut)

    def over(self, share: float = 1.0) -> bool:
        """Whether more than ``share`` of the seconds have passed."""
        return self.seconds is not None and self._clock() - self._start > share * self.seconds

    def left_out(self, what: str) -> None:
        """Note what was cut."""
        if what not in self._cut:
            self._cut.append(what)

    def skips(self, what: str, share: float) -> bool:
        """Whether a stage must be left out whole; notes it."""
        if self.over(share):
            self.left_out(f"{what}: left out")
            return True
        return False

    def within(self, items: Sequence[T], size: int, share: float, what: str) -> Iterator[Sequence[T]]:
        """The items a few at a time, as long as there is time; all at once where there is no limit."""
        step = max(1, len(items) if self.seconds is None else size)
        for first in range(0, len(items), step):
            if self.over(share):
                self.left_out(f"{what}: {first} of {len(items)} done")
                return
            yield items[first : first + step]
