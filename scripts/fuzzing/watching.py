"""What a loader does besides loading: files outside its folder, processes, sockets, new code, memory and time."""

import inspect
import os
import resource
import signal
import sys
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechsafety.errors import MechsafetyError

SECONDS = 5.0
MEBIBYTES = 512
LONGEST_LINE = 3100
# events of the interpreter that name paths (https://docs.python.org/3/library/audit_events.html)
PATHS = ("open", "os.", "shutil.", "tempfile.", "glob.")
# events that no reading of data needs
NEVER = (
    *(
        "subprocess.",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.fork",
        "os.spawn",
        "os.startfile",
        *(f"socket.{one}" for one in ("connect", "bind", "getaddrinfo", "sendto", "sendmsg")),
    ),
    *("pickle.find_class", "marshal.", "ctypes.", "code.__new__", "builtins.input", "urllib.", "webbrowser.", "pty."),
)
# where installed modules are, of other environments on the path too
LIBRARIES = tuple(
    {str(Path(one).resolve()) for one in (sys.prefix, sys.base_prefix)}
    | {str(Path(one).resolve()) for one in sys.path if one.endswith("-packages")}
)


@dataclass(frozen=True, slots=True)
class Finding:
    """What a loader should not have done.

    Attributes:
        target: Which loader.
        kind: ``exception``, ``message``, ``path``, ``event``, ``time`` or ``memory``.
        what: The exception, the event or the figure.
        where: Last place in the package.
    """

    target: str
    kind: str
    what: str
    where: str

    @property
    def key(self) -> tuple[str, str, str]:
        """Findings of one key have one cause."""
        return (self.target, self.kind, self.where or self.what)


class TooLong(BaseException):
    """A case took too long; no handler of the code under test catches it."""


class Watch:
    """Watches code by Python's audit events; these cannot be switched off again, and outside `on` they are ignored.

    Args:
        packages: Names of packages that may still load modules of their own.
    """

    def __init__(self) -> None:
        self.folder: str | None = None
        self.seen: list[tuple[str, str]] = []
        self.packages: set[str] = set()
        self._inside = False
        sys.addaudithook(self._event)

    @contextmanager
    def on(self, folder: Path) -> Iterator[list[tuple[str, str]]]:
        """Context in which what happens outside a folder is noted: pairs of kind and event."""
        self.seen = []
        self.packages = self.packages or {name.partition(".")[0] for name in sys.modules}
        self.folder = str(folder.resolve())
        try:
            yield self.seen
        finally:
            self.folder = None

    def _event(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None or self._inside:
            return
        self._inside = True
        try:
            if event.startswith(NEVER):
                self.seen.append(("event", f"{event} {args!r}"[:200]))
            elif event == "import" and str(args[0]).partition(".")[0] not in self.packages | sys.stdlib_module_names:
                self.seen.append(("event", f"import {args[0]}"))
            elif event in ("exec", "compile"):
                self._code(event, args)
            elif event.startswith(PATHS):
                self._paths(event, args)
        finally:
            self._inside = False

    def _code(self, event: str, args: tuple[Any, ...]) -> None:
        """Code that is no module of an installed package and no class that the standard library makes."""
        name = getattr(args[0], "co_filename", "") if event == "exec" else str(args[-1])
        if not name.startswith((*LIBRARIES, str(ROOT), "<frozen")) and not importing():
            self.seen.append(("event", f"{event} {args!r}"[:200]))

    def _paths(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], int):
            return
        for one in args[:2] if event in ("os.rename", "os.link", "os.symlink", "shutil.move") else args[:1]:
            if not isinstance(one, str | bytes | os.PathLike):
                continue
            path = os.path.realpath(os.fsdecode(one))
            reading = event in ("os.listdir", "os.scandir", "glob.glob") or (event == "open" and not written(args))
            # modules of libraries are loaded when they are first used; psutil reads /proc and /sys
            library = reading and path.startswith((*LIBRARIES, str(ROOT / "mechsafety"), "/proc/", "/sys/"))
            if path != self.folder and not path.startswith(self.folder + os.sep) and not library and path != os.devnull:
                self.seen.append(("path", f"{event} {path}"))


ROOT = Path(__file__).resolve().parents[2]


def importing() -> bool:
    """Whether an installed module is being imported, which runs code of its own, such as that of dataclasses.

    The tests' checks of annotations (jaxtyping, beartype) compile code too, when a function is first called.
    """
    frame = inspect.currentframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if name.endswith("importlib._bootstrap>") or "/jaxtyping/" in name or "/beartype/" in name:
            return True
        frame = frame.f_back
    return False


def written(args: tuple[Any, ...]) -> bool:
    """Whether an ``open`` event is for writing."""
    mode, flags = args[1], args[2]
    return (isinstance(mode, str) and any(one in mode for one in "wax+")) or bool(
        isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    )


def peak() -> int:
    """Largest memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def judged(
    target: str, load: Callable[[Path], Any], folder: Path, box: Path, watch: Watch, alarm: bool
) -> tuple[str, list[Finding]]:
    """Load a case; the outcome (``loads``, ``refused`` or ``finding``), and the findings.

    Args:
        target: Name of the target.
        load: The loader.
        folder: The case.
        box: What the loader may touch.
        watch: The watch.
        alarm: Whether a case that takes too long is broken off, by the alarm of this process.
    """
    found: list[Finding] = []
    outcome, before, began = "loads", peak(), time.perf_counter()
    if alarm:
        handler = signal.signal(signal.SIGALRM, _too_long)
        signal.setitimer(signal.ITIMER_REAL, 2 * SECONDS)
    try:
        with watch.on(box) as seen:
            load(folder)
    except MechsafetyError as error:
        outcome = "refused"
        if wrong := wrong_line(str(error)):
            found.append(Finding(target, "message", f"{wrong}: {str(error)[:150]!r}", place(error)))
    except (Exception, TooLong) as error:
        found.append(Finding(target, "exception", f"{type(error).__name__}: {str(error)[:150]}", place(error)))
    finally:
        if alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)  # libFuzzer has one of its own
    seconds, grown = time.perf_counter() - began, (peak() - before) >> 20
    found += [Finding(target, kind, what, what if kind == "event" else "") for kind, what in dict.fromkeys(seen)]
    if seconds > SECONDS:
        found.append(Finding(target, "time", f"{seconds:.0f} s", ""))
    if grown > MEBIBYTES:
        found.append(Finding(target, "memory", f"{grown} MiB", ""))
    return ("finding" if found else outcome), found


def _too_long(*_: object) -> None:
    raise TooLong(f"more than {2 * SECONDS:g} s")


def wrong_line(text: str) -> str:
    """What is wrong with an error's line; empty for a line of a length that can be read."""
    if len(text) > LONGEST_LINE:
        return f"{len(text)} characters"
    odd = [char for char in text if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")]
    return f"holds {odd[0]!r}" if odd else ""


def place(error: BaseException) -> str:
    """File and function of the package in which an exception arose, and the last function of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [one for one in frames if "/mechsafety/" in one.filename]
    last = own[-1] if own else frames[-1]
    return f"{Path(last.filename).name}:{last.name} ({type(error).__name__})"
