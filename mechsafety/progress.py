"""Progress bars. One is shown at a time: a bar that opens inside another one becomes words beside it."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm.auto import tqdm

# seconds between two changes of the words beside a bar
EVERY = 0.2
_outer: ContextVar["_Bar | None"] = ContextVar("outer bar", default=None)
# where stages are told instead of shown, by a process that shows nothing itself
_told: ContextVar[Callable[[str], object] | None] = ContextVar("told stages", default=None)


def progress_bar(
    over: Iterable[Any] | None = None, *, desc: str, total: int | None = None, show: bool = True, delay: float = 0.0
) -> Any:
    """A bar of tqdm on stderr or in a notebook, to open with ``with`` or to iterate over.

    Args:
        over: What is iterated over.
        desc: What is counted.
        total: Number of steps; the length of ``over`` by default.
        show: Whether to show it.
        delay: Seconds before it appears.
    """
    outer, show = _outer.get(), show and bars_wanted()
    if show and outer is not None:
        return _Inner(over, outer, desc, total)
    return _Bar(over, total=total, desc=desc, disable=not show, leave=False, delay=delay)


def bars_wanted() -> bool:
    """Whether bars are to be seen: nobody is told of them instead, and tqdm's own switch, TQDM_DISABLE, is not set."""
    return _told.get() is None and os.environ.get("TQDM_DISABLE", "").lower() in ("", "0", "false")


class _Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """A bar that knows when it is open."""

    # time left, in words
    left: Callable[[], str] = staticmethod(lambda: "")

    def __enter__(self) -> "_Bar":
        self._open()
        super().__enter__()
        return self

    def __exit__(self, *about: Any) -> None:
        self._close()
        super().__exit__(*about)

    def __iter__(self) -> Iterator[Any]:
        self._open()
        try:
            yield from super().__iter__()
        finally:
            self._close()

    def _open(self) -> None:
        if not self.disable:
            _outer.set(self)

    def _close(self) -> None:
        if _outer.get() is self:
            _outer.set(None)

    def say(self, words: str) -> None:
        """Show the time left and words beside the bar."""
        self.set_postfix_str(", ".join(part for part in (self.left(), words) if part))


class _Inner:
    """What a bar inside another one does: it counts, and says so beside the outer bar."""

    def __init__(self, over: Iterable[Any] | None, outer: _Bar, desc: str, total: int | None) -> None:
        self.over, self.outer, self.desc = over, outer, desc
        self.total = len(over) if total is None and isinstance(over, Sized) else total
        self.n, self.said = 0, 0.0

    def __enter__(self) -> "_Inner":
        return self

    def __exit__(self, *about: object) -> None:
        self.outer.say("")

    def __iter__(self) -> Iterator[Any]:
        for item in self.over or ():
            yield item
            self.update()
        self.outer.say("")

    def update(self, n: int = 1) -> None:
        """Count some steps."""
        self.n += n
        now = time.monotonic()
        if now - self.said > EVERY:
            self.said = now
            self.outer.say(f"{self.desc} {self.n}" + (f" of {self.total}" if self.total else ""))


class Stages:
    """The stages of a long analysis, on one bar; where nothing can be drawn, one line per stage.

    Stages whose work is known beforehand share one unit of work. What the stages so far took per unit gives the time
    that is left.
    """

    def __init__(self, total: int, show: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.n, self.clock = total, 0, clock
        self.work = self.rest = 0.0
        self.done, self.took, self.since = 0.0, 0.0, clock()
        show = show and bars_wanted()
        self.lines = show and not drawn()
        form = "{desc}: {n_fmt} of {total_fmt} stages done, {elapsed}{postfix}"
        self.bar = _Bar(
            total=total, disable=not show, leave=False, bar_format=form, file=_Nowhere() if self.lines else None
        )
        self.bar.left = self.left

    def begin(self, name: str, work: float = 0.0, rest: float = 0.0) -> None:
        """Begin a stage; the one before it is done.

        Args:
            name: What the stage does.
            work: Work of this stage, in a unit that all stages share; 0 where it is unknown.
            rest: Work of all stages after this one.
        """
        now = self.clock()
        if self.work:
            self.done, self.took = self.done + self.work, self.took + now - self.since
        self.work, self.rest, self.since = work, rest, now
        self.bar.update(min(1, self.n))
        self.n += 1
        tell = _told.get()
        if tell is not None:
            tell(name)
        self.bar.set_description_str(name, refresh=False)
        self.bar.say("")
        if self.lines:
            left = self.left()
            sys.stderr.write(f"[{self.n}/{self.total}] {name}{left and f' ({left})'}\n")
            sys.stderr.flush()

    def seconds_left(self) -> float | None:
        """Seconds until the last stage is done; None where the work or the speed is unknown.

        A stage that takes longer than expected makes the later ones longer too.
        """
        if not self.done or not self.work:
            return None
        here = self.clock() - self.since
        speed = max(self.took / self.done, here / self.work)
        return max(0.0, speed * self.work - here) + speed * self.rest

    def left(self) -> str:
        """The time left in words, empty if unknown."""
        seconds = self.seconds_left()
        if seconds is None:
            return ""
        if seconds < 90:
            return f"about {max(5, 5 * round(seconds / 5))} s left"
        # whole minutes would be a third off at a minute and a half
        return f"about {round(seconds / 30) / 2:g} min left"


@contextmanager
def stages(total: int, show: bool) -> Iterator[Stages]:
    """Open the stages of a long analysis. Bars of the analyses inside it become words beside its own bar."""
    found = Stages(total, show)
    with found.bar:
        yield found


@contextmanager
def telling(tell: Callable[[str], object]) -> Iterator[None]:
    """Context in which nothing is shown, and each stage that begins is told to a function."""
    token = _told.set(tell)
    try:
        yield
    finally:
        _told.reset(token)


class _Nowhere:
    """A stream for a bar that nobody can see."""

    def write(self, text: str) -> None:
        """Drop the text."""

    def flush(self) -> None:
        """Nothing waits."""


def drawn() -> bool:
    """Whether a bar can be drawn over itself: on a terminal, and in a notebook."""
    in_notebook = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)
    return in_notebook or sys.stderr.isatty()
