"""`work`, which every sweep calls, and `running`, the context of a run."""

import functools
import inspect
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, ParamSpec, Protocol, TypeVar, runtime_checkable

from mechsafety.errors import MechsafetyError
from mechsafety.halving import in_halves
from mechsafety.scale.folder import CallFolder, Header, RunFolder, opened
from mechsafety.scale.identity import identity
from mechsafety.scale.items import Place, pack, unpack
from mechsafety.scale.machine import Machine, as_on

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

# a sweep whose items hold sweeps of their own is shared among replicas itself if it has at least so many items
MANY = 16
# arguments that change no number
NOT_NUMBERS = ("progress", "on_tokenizer")


@dataclass(frozen=True, slots=True)
class Sweep:
    """A list of work items, as all replicas of a run see it.

    Attributes:
        number: How many sweeps of the call came before it.
        name: What is swept.
        n: Number of items.
        sha: Hash of the number, the name and the items: the same in every replica of the call.
        groups: Group of each item; the items of one group share costly preparations.
    """

    number: int
    name: str
    n: int
    sha: str
    groups: tuple[int, ...] = ()

    @property
    def folder(self) -> str:
        """Name of the folder of its items."""
        return f"{self.number:06d}-{'-'.join(self.name.split())}"

    def place(self, run: str, item: int) -> Place:
        """Which item of which run."""
        return Place(run, self.sha, item)


@runtime_checkable
class Worker(Protocol):
    """Who computes the items of the sweeps of a call."""

    def sweep(
        self, sweep: Callable[[int], Sweep], items: Sequence[Any], compute: Callable[[Any], Any], kind: Any
    ) -> Iterator[Any]:
        """Outcomes of all items, in order; ``sweep`` makes the sweep's description from its number."""


@runtime_checkable
class Store(Protocol):
    """Where the outcomes of a call are kept."""

    @property
    def run(self) -> str:
        """Hash that every item carries."""

    @property
    def machine(self) -> Machine:
        """The settings that the call computes with."""

    def bytes_of(self, sweep: str, place: Place) -> bytes | None:
        """The outcome of an item, if it is kept."""

    def put(self, sweep: str, place: Place, data: bytes) -> None:
        """Keep an outcome."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a function that sweeps.

    Attributes:
        function: The function.
        args, kwargs: What it is given.
        show: Whether it may show a bar.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    show: bool = True

    @property
    def name(self) -> str:
        """Module and name of the function."""
        return f"{self.function.__module__}.{self.function.__qualname__}"


@runtime_checkable
class Executor(Protocol):
    """Who computes the calls of a run.

    Example:
        >>> isinstance(ms.RayExecutor(replicas=2), ms.scale.Executor)
        True
    """

    def call(self, call: Call, store: Store) -> Any:
        """What the call returns."""


_running: ContextVar["_Running | None"] = ContextVar("run", default=None)
_worker: ContextVar[Worker | None] = ContextVar("worker", default=None)


def work(
    name: str,
    items: Sequence[T],
    compute: Callable[[T], R],
    kind: Any,
    *,
    of: Any = None,
    group: Callable[[T], int] | None = None,
    nested: bool = False,
) -> Iterator[R]:
    """The outcome of each item, in order; in a run, computed by whoever is free, or read from the run folder.

    Every sweep of the package is a loop over `work`, which merges the outcomes in the order of the items. What
    ``compute`` returns must depend on the item alone, and nothing outside may depend on ``compute`` having run.

    Args:
        name: What is swept, for folders and messages.
        items: The items: the same, in the same order, in every process that makes the same call.
        compute: Function of one item.
        kind: Annotation of what it returns, for `mechsafety.codec`: tensors, numbers, texts, tuples of these, and
            dataclasses. Tensors that come out of a run folder or from another process lie on the CPU.
        of: What else tells this sweep from another one with the same items.
        group: Group of an item: its items share preparations, so that one replica computes them where possible.
        nested: Whether ``compute`` sweeps itself. Then few items are computed one after the other, and each of their
            own sweeps is shared.

    Example:
        >>> list(work("squares", range(3), lambda k: k * k, int))
        [0, 1, 4]
    """

    def described(number: int) -> Sweep:
        sha = identity((number, name, items, of))
        return Sweep(number, name, len(items), sha, () if group is None else tuple(map(group, items)))

    worker = ALONE if nested and len(items) < MANY else _worker.get() or ALONE
    yield from worker.sweep(described, items, compute, kind)


def once(name: str, compute: Callable[[], R], kind: Any, of: Any = None) -> R:
    """A sweep of a single item: what it returns is computed once in a run, and the same for everyone.

    For decisions that depend on the clock, and for steps that cannot be shared.

    Example:
        >>> once("answer", lambda: 42, int)
        42
    """
    (found,) = work(name, (0,), lambda _: compute(), kind, of=of)
    return found


class Alone:
    """Computes every item where it stands: without a run, inside an item, and where a sweep's own sweeps are shared."""

    def sweep(
        self,
        sweep: Callable[[int], Sweep],  # noqa: ARG002
        items: Sequence[Any],
        compute: Callable[[Any], Any],
        kind: Any,  # noqa: ARG002
    ) -> Iterator[Any]:
        """Outcomes of all items, in order."""
        for item in items:
            yield in_halves(compute, item)


ALONE = Alone()


def computed(compute: Callable[[T], Any], item: T) -> Any:
    """One item's outcome, with all sweeps inside it computed here."""
    with at_work(ALONE):
        return in_halves(lambda part: _drawn(compute(part)), item)


def _drawn(value: Any) -> Any:
    """An outcome whose lazy parts, alone or in a tuple, are computed."""
    if hasattr(value, "__next__") or type(value) is tuple:
        return tuple(map(_drawn, value))
    return value


class InProcess:
    """Computes a call in this process, and keeps what its items give."""

    def call(self, call: Call, store: Store) -> Any:
        """What the call returns."""
        with as_on(store.machine), at_work(_Stored(store)):
            return call.function(*call.args, **call.kwargs)


@contextmanager
def at_work(worker: Worker) -> Iterator[None]:
    """Context in which the sweeps of this thread are given to a worker."""
    token = _worker.set(worker)
    try:
        yield
    finally:
        _worker.reset(token)


@dataclass
class _Stored:
    """Reads each outcome from the store, or computes and stores it."""

    store: Store
    number: int = 0

    def sweep(
        self, sweep: Callable[[int], Sweep], items: Sequence[Any], compute: Callable[[Any], Any], kind: Any
    ) -> Iterator[Any]:
        """Outcomes of all items, in order."""
        here = sweep(self.number)
        self.number += 1
        for k, item in enumerate(items):
            place = here.place(self.store.run, k)
            data = self.store.bytes_of(here.folder, place)
            if data is None:
                data = pack(kind, computed(compute, item), place)
                self.store.put(here.folder, place, data)
            # what was just computed is read too, so that both ways give the same
            yield unpack(kind, data, place)


@dataclass(frozen=True)
class Forgotten:
    """The store of a run without a folder: it keeps nothing."""

    machine: Machine
    run: str = field(default_factory=lambda: uuid.uuid4().hex)

    def bytes_of(self, sweep: str, place: Place) -> bytes | None:  # noqa: ARG002
        """Nothing is kept."""
        return None

    def put(self, sweep: str, place: Place, data: bytes) -> None:
        """Nothing is kept."""


@contextmanager
def running(run_dir: str | PathLike[str] | None = None, *, executor: Executor | None = None) -> Iterator[None]:
    """Context whose calls can be resumed, and can be computed on several machines. The numbers stay the same.

    A call that was stopped, even by SIGKILL or a power cut, goes on where it was if it is made again in the same run
    folder: its finished work items are read, checked and used, and only the others are computed. The results are the
    same bytes as those of a run that was never stopped. The calls inside the context must be made again in the same
    order, with the same arguments.

    Calls of these functions take part, and all sweeps inside them: `map_refusal_circuit`, `activation_patching`,
    `path_patching` and the others that docs/howto/clusters.md lists. Anything else inside the context is computed as
    usual.

    Args:
        run_dir: Folder of finished work items; made if it is missing. One process at a time uses it.
        executor: Who computes: a `RayExecutor`; by default this process.

    Raises:
        MechsafetyError: The folder is in use, holds another run or something else, or cannot be written to; or a run is
            open already.

    Example:
        >>> with ms.running(folder / "run"):
        ...     found = ms.activation_patching(model, pairs, metric)
        >>> with ms.running(folder / "run"):  # the same call reads the folder
        ...     again = ms.activation_patching(model, pairs, metric)
        >>> torch.equal(found.changes, again.changes)
        True
    """
    if _running.get() is not None:
        raise MechsafetyError("a run inside a run", expected="one ms.running(...) at a time")
    with ExitStack() as stack:
        folder = None if run_dir is None else stack.enter_context(opened(run_dir))
        token = _running.set(_Running(folder, executor))
        try:
            yield
        finally:
            _running.reset(token)


def sweeps(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function whose calls take part in a run (`running`). Without a run it is called as it is.

    Example:
        >>> @ms.scale.sweeps
        ... def squares(numbers):
        ...     return tuple(ms.scale.work("squares", numbers, lambda number: number**2, int))
        >>> squares((1, 2, 3))
        (1, 4, 9)
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        run = _running.get()
        if run is None or _worker.get() is not None:
            return function(*args, **kwargs)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # Python raises its own error for a wrong call
        bound.apply_defaults()
        found: R = run.call(function, args, kwargs, dict(bound.arguments))
        return found

    return called


@dataclass
class _Running:
    """An open run."""

    folder: RunFolder | None
    executor: Executor | None
    calls: int = 0

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any, arguments: dict[str, Any]) -> Any:
        """What a call returns."""
        if self.folder is None and self.executor is None:
            return function(*args, **kwargs)
        models = {name: value for name, value in arguments.items() if hasattr(value, "hash_weights")}
        for name, model in models.items():
            if model.edited:
                raise MechsafetyError(
                    f"{name} is {model.name} under an intervention, which a run does not see",
                    expected="an unedited model",
                    hint="call inside ms.running(...) functions that intervene themselves, or call outside of it",
                )
        self.calls += 1
        call = Call(function, args, kwargs, bool(arguments.get("progress", True)))
        store: CallFolder | Forgotten = Forgotten(Machine.here())
        if self.folder is not None:
            store = self.folder.call(self.calls, self._header(call, arguments, models))
        return (self.executor or InProcess()).call(call, store)

    def _header(self, call: Call, arguments: dict[str, Any], models: dict[str, Any]) -> Header:
        from mechsafety.results import package_versions

        hashes = {name: identity(value, name) for name, value in arguments.items() if name not in NOT_NUMBERS}
        about: dict[str, Any] = {}
        for name, model in models.items():
            about[name] = {key: value for key, value in model.provenance().to_json().items() if key != "versions"}
        plain = {name: value for name, value in arguments.items() if isinstance(value, bool | int | float | str)}
        return Header(call.name, hashes, {**about, **plain}, package_versions(), Machine.here())
