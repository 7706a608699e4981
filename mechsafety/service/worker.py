"""The one thread that runs the model, and the bounded queue before it."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class Busy(Exception):
    """The queue is full."""


class Closing(Exception):
    """The service stops, and takes nothing new."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a job whose work raised an exception.

    One that is no `Exception`, such as `KeyboardInterrupt`, becomes a `RuntimeError` with the name of its type: the
    thread goes on, and the event loop must not stop either.
    """

    error: Exception


@dataclass(frozen=True, slots=True)
class Done:
    """The last event of a job whose work is done."""

    value: Any


class Job:
    """One piece of work for the model, and the events that it sends to the event loop that asked for it.

    Args:
        work: What the thread calls. It may `emit` events, and should return soon after the job is cancelled.
        loop: The event loop that reads ``events``.
    """

    def __init__(self, work: Callable[["Job"], Any], loop: asyncio.AbstractEventLoop) -> None:
        self.work = work
        self.events: asyncio.Queue[Any] = asyncio.Queue()
        self._loop = loop
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the job any more."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Let the work end at its next look at ``cancelled``."""
        self._cancelled.set()

    def emit(self, event: Any) -> None:
        """Send an event from the thread."""
        try:
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody reads any more
            self.cancel()


class Worker:
    """Runs jobs one after the other, in the order in which they came, in a thread of its own.

    Tokenizers and models are used by this thread alone, so that no answer depends on what else is asked at the time.

    Args:
        waiting: Number of jobs that may wait for the one that runs.
    """

    def __init__(self, waiting: int) -> None:
        self._room = waiting + 1
        self._queue: deque[Job] = deque()
        self._running: Job | None = None
        self._closing = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="mechsafety-model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of jobs that wait."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """1 while a job runs."""
        return int(self._running is not None)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, work: Callable[[Job], Any]) -> Job:
        """Queue a job; to be called in the event loop that reads its events.

        Raises:
            Busy: The queue is full.
            Closing: `close` was called.
        """
        job = Job(work, asyncio.get_running_loop())
        with self._change:
            if self._closing:
                raise Closing
            if len(self._queue) + self.running >= self._room:
                raise Busy
            self._queue.append(job)
            self._change.notify()
        return job

    def cancel(self, job: Job) -> None:
        """End a job that nobody waits for; one that has not begun frees its place at once."""
        job.cancel()
        with self._change:
            if job in self._queue:
                self._queue.remove(job)

    def close(self) -> None:
        """Take no further job, finish those that are queued, and end the thread."""
        with self._change:
            self._closing = True
            self._change.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._change:
                self._running = None
                while not self._queue and not self._closing:
                    self._change.wait()
                if not self._queue:
                    return
                job = self._running = self._queue.popleft()
            try:
                job.emit(Done(job.work(job)))
            except Exception as error:
                job.emit(Failed(error))
            except BaseException as error:
                job.emit(Failed(RuntimeError(type(error).__name__)))
