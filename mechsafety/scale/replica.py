"""A replica: one process of a cluster that runs whole calls on its own copy of the model, and computes some items."""

import importlib
import io
import pickle
import queue
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from mechsafety.errors import MechsafetyError
from mechsafety.scale.items import pack, unpack
from mechsafety.scale.machine import Machine, as_on
from mechsafety.scale.work import Sweep, at_work, computed


@dataclass(frozen=True, slots=True)
class Arrived:
    """A replica has come to a sweep, in a stage of the call."""

    sweep: Sweep
    stage: str


@dataclass(frozen=True, slots=True)
class Computed:
    """A replica has computed an item."""

    number: int
    item: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Returned:
    """The call has returned: its result, and the warnings on the way."""

    result: Any
    warned: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Raised:
    """The call has raised an error."""

    error: Exception
    trace: str


@dataclass(frozen=True, slots=True)
class Ready:
    """A replica has loaded its models: the hash of each, and the versions of its packages."""

    weights: tuple[str, ...]
    versions: dict[str, str]
    node: str


Event = Arrived | Computed | Returned | Raised


class _Stopped(BaseException):
    """Ends a call that nobody waits for any more."""


@dataclass(eq=False)
class _Shared:
    """Gives each sweep's items to the driver, computes those that it is told to, and yields what all have computed."""

    run: str
    events: "queue.Queue[Event]"
    commands: "queue.Queue[Any]"
    stage: str = ""
    number: int = 0

    def tell(self, stage: str) -> None:
        """Note the stage that begins."""
        self.stage = stage

    def sweep(
        self, sweep: Callable[[int], Sweep], items: Sequence[Any], compute: Callable[[Any], Any], kind: Any
    ) -> Iterator[Any]:
        """Outcomes of all items, in order."""
        here = sweep(self.number)
        self.number += 1
        if not items:
            return
        self.events.put(Arrived(here, self.stage))
        while True:
            command = self.commands.get()
            if command is None:
                raise _Stopped
            if isinstance(command, int):
                place = here.place(self.run, command)
                data = pack(kind, computed(compute, items[command]), place)
                self.events.put(Computed(here.number, command, data))
                continue
            for k, data in enumerate(command):
                yield unpack(kind, data, here.place(self.run, k))
            return


@dataclass(eq=False)
class Replica:
    """Runs calls in a thread, and talks with the driver by `step`. The class of a Ray actor.

    Attributes:
        models: The loaded models, by key.
    """

    models: dict[str, Any] = field(default_factory=dict)
    _thread: threading.Thread | None = None
    _worker: _Shared | None = None

    def load(self, wanted: Sequence[tuple[str, Any]]) -> Ready:
        """Load models that are not there yet.

        Args:
            wanted: Key and recipe of each; see `mechsafety.scale.shipping`.
        """
        import ray

        from mechsafety.results import package_versions
        from mechsafety.scale.shipping import load

        for key in set(self.models) - {key for key, _ in wanted}:
            del self.models[key]  # room for those of this call
        for key, recipe in wanted:
            if key not in self.models:
                self.models[key] = load(recipe)
        hashes = tuple(self.models[key].weights_sha256 for key, _ in wanted)
        return Ready(hashes, package_versions(), ray.get_runtime_context().get_node_id())

    def begin(self, call: bytes, keys: dict[str, str], run: str, machine: Machine) -> Event:
        """Start a call; the first event of it.

        Args:
            call: From `mechsafety.scale.shipping.pack_call`.
            keys: Key of each of its models among the loaded ones.
            run: Hash that every item carries.
            machine: Settings to compute with.
        """
        if self._thread is not None and self._worker is not None:
            self._worker.commands.put(None)  # of an earlier call that another replica finished
            self._thread.join()
        self._worker = _Shared(run, queue.Queue(), queue.Queue())
        models = {name: self.models[key] for name, key in keys.items()}
        arguments = (self._run, call, models, machine, self._worker)
        self._thread = threading.Thread(target=Context().run, args=arguments, daemon=True)
        self._thread.start()
        return self._worker.events.get()

    def step(self, command: Any) -> Event:
        """Give a command (the number of an item to compute, or all outcomes of the sweep); the next event."""
        if self._worker is None:
            raise MechsafetyError("no call is under way")
        self._worker.commands.put(command)
        return self._worker.events.get()

    def _run(self, call: bytes, models: dict[str, Any], machine: Machine, worker: _Shared) -> None:
        from mechsafety.progress import telling

        event: Event
        try:
            module, name, args, kwargs = _Unpickler(io.BytesIO(call), models).load()
            function = attrgetter(name)(importlib.import_module(module))
            with warnings.catch_warnings(record=True) as seen, telling(worker.tell), as_on(machine), at_work(worker):
                warnings.simplefilter("always")
                found = function(*args, **kwargs)
            event = Returned(found, tuple(dict.fromkeys(str(one.message) for one in seen)))
        except _Stopped:
            return
        except Exception as error:
            # errors of libraries may not be able to travel
            known = error if isinstance(error, MechsafetyError) else RuntimeError(f"{type(error).__name__}: {error}")
            event = Raised(known, traceback.format_exc())
        worker.events.put(event)


class _Unpickler(pickle.Unpickler):
    """Reads a call, with this replica's models in the place of the driver's."""

    def __init__(self, file: Any, models: dict[str, Any]) -> None:
        super().__init__(file)
        self._models = models

    def persistent_load(self, pid: Any) -> Any:
        """A view of a loaded model."""
        key, opener_ids, shortcuts, max_batch_tokens = pid
        model = self._models[key]
        model.shortcuts, model.max_batch_tokens = shortcuts, max_batch_tokens
        view = model.reading(opener_ids)
        view.shortcuts, view.max_batch_tokens = shortcuts, max_batch_tokens
        return view
