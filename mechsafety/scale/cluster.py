"""`RayExecutor`: the calls of a run on the replicas of a Ray cluster."""

import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mechsafety.errors import MechsafetyError, first_line

if TYPE_CHECKING:
    from mechsafety.scale.board import Board
    from mechsafety.scale.work import Call, Store

# a new replica is started in place of a lost one, up to so many times per replica
RESTARTS = 3
# seconds without any replica after which a call gives up
PATIENCE = 120.0
# seconds between two looks at slow items and at lost replicas
EVERY = 0.5
# room that a replica takes besides its weights, as a share of them
ROOM = 0.3

logger = logging.getLogger(__name__)

WeightsFrom = Literal["auto", "path", "store"]


@dataclass(eq=False)
class RayExecutor:
    """Computes the calls of a run (`mechsafety.running`) on several processes, and machines, of a Ray cluster.

    Each replica is a Ray actor that loads the model once. At every sweep the replicas share the items. The results are
    those of this process alone, bit for bit, if all machines have processors of one kind and the same versions of all
    packages. A replica that dies is replaced, and what it computed is computed again. An item that takes much longer
    than others is given to a second replica.

    It needs the extra ``ray`` (``pip install mechsafety[ray]``), on every machine.

    Args:
        address: Address of the cluster, as for ``ray.init``: ``"auto"``, ``"10.0.0.1:6379"`` or ``"ray://..."``; by
            default a cluster that is connected already, or a new one on this machine.
        replicas: Number of replicas.
        cpus: Processors per replica; by default the number of torch's threads in this process, which is also the
            number of threads in each replica.
        gpus: GPUs per replica; by default 1 if the model is on a GPU here.
        weights: How the replicas get the model. ``path``: each loads it by the name or path that it was loaded by here,
            which every machine must see. ``store``: this process puts the weights into Ray's object store. ``auto``:
            ``path`` where the model was loaded by name or path, otherwise ``store``.

    Example:
        >>> executor = ms.RayExecutor("auto", replicas=8)  # for ms.running(run_dir, executor=executor)
        >>> executor.replicas, executor.weights
        (8, 'auto')
    """

    address: str | None = None
    replicas: int = 2
    cpus: float | None = None
    gpus: float | None = None
    weights: WeightsFrom = "auto"
    _actors: dict[int, Any] = field(default_factory=dict, init=False, repr=False)
    _started: int = field(default=0, init=False, repr=False)
    _options: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        from mechsafety.inputs import one_of, whole_number

        self.replicas = whole_number("replicas", self.replicas)
        one_of("weights", self.weights, ("auto", "path", "store"))

    def call(self, call: "Call", store: "Store") -> Any:
        """What a call returns.

        Raises:
            MechsafetyError: Ray is missing or has no such cluster; the cluster is too small; the model or an argument
                cannot be sent; replicas compute different numbers; or too many died.
        """
        from mechsafety.scale.board import Board
        from mechsafety.scale.shipping import pack_call

        ray = _ray()
        _connect(ray, self.address)
        packed, models = pack_call(call.function, call.args, call.kwargs)
        options = self._needs(store, models)
        if options != self._options:
            self.close()
            self._options = options
        _check_fits(ray, options, self.replicas)
        wanted = ray.put([(_key(model), self._recipe(model)) for model in models.values()])
        names = dict(zip(models, (_key(model) for model in models.values()), strict=True))
        job = _Job(self, ray, Board(store), wanted, [model.weights_sha256 for model in models.values()], packed, names)
        with _bar(call.show) as shown:
            return job.run(shown)

    def close(self) -> None:
        """End the replicas; the next call starts new ones."""
        if self._actors:
            ray = _ray()
            for actor in self._actors.values():
                with suppress(Exception):
                    ray.kill(actor)
        self._actors.clear()

    def start(self, ray: Any) -> tuple[int, Any]:
        """Start one more replica: its number and the actor."""
        from mechsafety.scale.replica import Replica

        actor = ray.remote(Replica).options(max_restarts=0, **self._options).remote()
        self._started += 1
        self._actors[self._started] = actor
        return self._started, actor

    def _needs(self, store: "Store", models: Mapping[str, Any]) -> dict[str, Any]:
        """What Ray reserves for a replica."""
        on_gpu = any(model.device.type != "cpu" for model in models.values())
        size = sum(sum(tensor.nbytes for tensor in model.backend.weights().values()) for model in models.values())
        cpus = self.cpus if self.cpus is not None else store.machine.threads
        gpus = self.gpus if self.gpus is not None else float(on_gpu)
        needs = {"num_cpus": cpus, "num_gpus": gpus}
        return needs if on_gpu else needs | {"memory": int((1 + ROOM) * size)}

    def _recipe(self, model: Any) -> Any:
        from mechsafety.scale.shipping import pack_weights

        if self.weights == "store" or (self.weights == "auto" and model.recipe is None):
            return pack_weights(model)
        if model.recipe is None:
            raise MechsafetyError(f"{model.name} was not loaded by name or path", hint="pass weights='store'")
        return dict(model.recipe)


@dataclass(eq=False)
class _Job:
    """One call on the replicas: the driver's loop.

    Attributes:
        executor: Whose replicas compute.
        ray: The module.
        board: Which items are done.
        wanted: Reference to the models' recipes.
        hashes: What the loaded models must hash to.
        packed: The call.
        keys: Key of each model in the packed call.
    """

    executor: RayExecutor
    ray: Any
    board: "Board"
    wanted: Any
    hashes: list[str]
    packed: bytes
    keys: dict[str, str]
    pending: dict[Any, int] = field(default_factory=dict)
    idle: dict[int, int] = field(default_factory=dict)
    outcomes: dict[int, Any] = field(default_factory=dict)
    lost: int = 0
    last_seen: float = 0.0

    def run(self, shown: "_Shown") -> Any:
        """Go on until a replica returns."""
        self.last_seen = time.monotonic()
        for number in list(self.executor._actors):
            self._load(number)
        self._fill()
        try:
            while True:
                ready, _ = self.ray.wait(list(self.pending), num_returns=1, timeout=EVERY) if self.pending else ([], [])
                for reference in ready:
                    found = self._handle(self.pending.pop(reference), reference, shown)
                    if found is not None:
                        return found[0]
                if not self.pending and not self.idle:
                    self._wait_for_replicas()
                self._wake(slow=True)
        except BaseException:
            self.executor.close()  # replicas in the middle of a call are of no use for another
            raise

    def _fill(self) -> None:
        while len(self.executor._actors) < self.executor.replicas:
            number, _ = self.executor.start(self.ray)
            self._load(number)

    def _load(self, number: int) -> None:
        self.pending[self.executor._actors[number].load.remote(self.wanted)] = number

    def _handle(self, number: int, reference: Any, shown: "_Shown") -> tuple[Any] | None:
        """Answer an event of a replica; the result in a tuple if the call has returned."""
        from mechsafety.scale import replica as told

        try:
            event = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            raise self._unloadable(error.cause) from error
        except self.ray.exceptions.RayError as error:
            self._bury(number, error)
            return None
        self.last_seen = time.monotonic()
        if isinstance(event, told.Ready):
            self._check(event)
            actor, store = self.executor._actors[number], self.board.store
            self.pending[actor.begin.remote(self.packed, self.keys, store.run, store.machine)] = number
        elif isinstance(event, told.Arrived):
            here = self.board.seen(event.sweep)
            shown.at(event.stage, here)
            self._answer(number, event.sweep.number)
        elif isinstance(event, told.Computed):
            self.board.put(event.number, event.item, number, event.data, time.monotonic())
            shown.at(None, self.board.sweeps[event.number])
            self._answer(number, event.number)
            self._wake()
        elif isinstance(event, told.Raised):
            event.error.add_note(f"on a replica:\n{event.trace}")
            raise event.error
        elif isinstance(event, told.Returned):
            for text in event.warned:
                warnings.warn(text, stacklevel=2)
            return (event.result,)
        return None

    def _answer(self, number: int, sweep: int) -> None:
        """Give a free replica an item, or all outcomes if the sweep is complete; otherwise let it wait."""
        actor = self.executor._actors[number]
        if self.board.sweeps[sweep].complete:
            self.pending[actor.step.remote(self._outcomes(sweep))] = number
            return
        item = self.board.take(sweep, number, time.monotonic())
        if item is None:
            self.idle[number] = sweep
        else:
            self.pending[actor.step.remote(item)] = number

    def _outcomes(self, sweep: int) -> Any:
        """Reference to all outcomes of a sweep, sent to each node once."""
        if sweep not in self.outcomes:
            here = self.board.sweeps[sweep]
            self.outcomes[sweep] = self.ray.put([here.done[k] for k in range(here.sweep.n)])
        return self.outcomes[sweep]

    def _wake(self, slow: bool = False) -> None:
        """Give waiting replicas what there is to do now."""
        for number, sweep in list(self.idle.items()):
            if slow or self.board.sweeps[sweep].complete:
                del self.idle[number]
                self._answer(number, sweep)

    def _bury(self, number: int, error: Exception) -> None:
        """Take a dead replica off the list, and start another one."""
        self.executor._actors.pop(number, None)
        self.idle.pop(number, None)
        self.lost += 1
        logger.warning("a replica was lost (%s): its item is computed again", type(error).__name__)
        self.board.lost(number)
        if self.lost > RESTARTS * self.executor.replicas:
            raise MechsafetyError(
                f"{self.lost} replicas were lost, the last one by: {first_line(error)}",
                expected="a cluster whose workers live",
                hint="look into Ray's logs; if memory was short, use fewer replicas per node",
            )
        self._fill()
        self._wake(slow=True)

    def _wait_for_replicas(self) -> None:
        if time.monotonic() - self.last_seen > PATIENCE:
            raise MechsafetyError("no replica is left, and the cluster starts none", expected="nodes with room")
        time.sleep(EVERY)

    def _check(self, event: Any) -> None:
        """Refuse replicas with another model or other packages."""
        from mechsafety.results import package_versions

        mine = package_versions()
        other = {name: was for name, was in event.versions.items() if mine.get(name) != was}
        if other:
            name, was = next(iter(other.items()))
            raise MechsafetyError(
                f"a replica has {name} {was}", expected=f"{mine.get(name)} as here", hint="install the same versions"
            )
        if list(event.weights) != self.hashes:
            raise MechsafetyError(
                "a replica loaded other weights by the same name or path",
                expected="the weights that are loaded here",
                hint="pass RayExecutor(weights='store')",
            )

    def _unloadable(self, error: Any) -> Exception:
        if isinstance(error, MechsafetyError):
            hint = error.hint or "see that every machine has the model at this place, or pass weights='store'"
            return MechsafetyError(f"on a replica: {error.problem}", expected=error.expected, hint=hint)
        return error if isinstance(error, Exception) else RuntimeError(str(error))


class _Shown:
    """One bar for the whole call: stage, sweep and items."""

    def __init__(self, bar: Any) -> None:
        self.bar, self.stage, self.sweep = bar, "", -1

    def at(self, stage: str | None, here: Any) -> None:
        """Show how far a sweep is; an earlier one, which a late replica comes to, is not shown."""
        if here.sweep.number < self.sweep:
            return
        self.stage = self.stage if stage is None else stage
        if here.sweep.number > self.sweep:
            self.sweep = here.sweep.number
            self.bar.reset(total=here.sweep.n)
            words = ": ".join(part for part in (self.stage, here.sweep.name) if part)
            self.bar.set_description_str(words, refresh=False)
        self.bar.update(len(here.done) - self.bar.n)


@contextmanager
def _bar(show: bool) -> Iterator[_Shown]:
    from tqdm.auto import tqdm

    from mechsafety.progress import bars_wanted

    with tqdm(total=0, disable=not (show and bars_wanted()), leave=False, delay=1) as bar:
        yield _Shown(bar)


def _key(model: Any) -> str:
    """Key of a loaded model in the replicas: by weights, template and place."""
    from mechsafety.scale.identity import identity

    template = (model.tokenizer.chat_template, dict(model.template_options))
    return identity((model.name, model.hash_weights(), model.dtype_name, str(model.device), template))


def _ray() -> Any:
    """The module.

    Raises:
        MechsafetyError: It is not installed.
    """
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise MechsafetyError(
            "the package ray is not installed", expected="the extra ray", hint="pip install 'mechsafety[ray]'"
        ) from error
    return ray


def _connect(ray: Any, address: str | None) -> None:
    if ray.is_initialized():
        return
    try:
        ray.init(
            address=address or "local",  # without it, Ray may look for a cluster of long ago
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False if address is None else None,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise MechsafetyError(
            f"no Ray cluster at {address or 'local'!r} ({first_line(error)})",
            expected="the address of a running cluster",
            hint="start one (ray start --head), or leave the address out for one on this machine",
        ) from error


def _check_fits(ray: Any, needs: Mapping[str, Any], replicas: int) -> None:
    """Refuse a cluster without room for all replicas.

    Raises:
        MechsafetyError: It has room for fewer.
    """
    asked = {"CPU": needs["num_cpus"], "GPU": needs["num_gpus"], "memory": needs.get("memory", 0)}
    room = 0
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            fits = [int(has.get(name, 0) // amount) for name, amount in asked.items() if amount]
            room += min(fits, default=replicas)
    if room < replicas:
        each = f"{asked['CPU']:g} processors"
        each += f", {asked['GPU']:g} GPUs" if asked["GPU"] else f" and {asked['memory'] / 2**30:.1f} GiB"
        raise MechsafetyError(
            f"the Ray cluster has room for {room} of {replicas} replicas ({each} each)",
            expected="a node, or nodes, with room for all",
            hint=f"pass replicas={room}" if room else "add nodes, or pass fewer cpus per replica",
            page="cluster-too-small",
        )
