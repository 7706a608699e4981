"""Models whose weights do not all lie on one device: accelerate's device maps, with offloading to memory or disk.

accelerate puts a hook on every module of such a model. The hook moves the module's inputs to its device. If the
module's weights are offloaded, they are on the meta device (without numbers) until the module runs: the hook then
fetches them, and lets them go afterwards. Code that reads a weight outside a forward fetches it with `fetched`.
"""

import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mechsafety.errors import MechsafetyError, named
from mechsafety.models.quantised import quantised

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
# places of a device map where weights are kept but no module runs, besides torch's devices
STORES = ("cpu", "disk")
# where the Hugging Face module is, inside TransformerLens' wrappers
_INSIDE = "_original_component"

DeviceMap = str | Mapping[str, int | str | torch.device]
MaxMemory = Mapping[int | str, int | str]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the weights of a model shall lie; see `mechsafety.load_model`.

    Attributes:
        device_map: A strategy, or each module's device.
        max_memory: Most bytes per device; None lets accelerate measure what is free.
        folder: Folder for weights that are offloaded to disk and are not in a safetensors file of the checkpoint.
    """

    device_map: DeviceMap
    max_memory: MaxMemory | None = None
    folder: str | None = None

    def arguments(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`."""
        own = self.device_map if isinstance(self.device_map, str) else dict(self.device_map)
        limits = None if self.max_memory is None else dict(self.max_memory)
        return {"device_map": own, "max_memory": limits, "offload_folder": self.folder}

    def dispatch(self, model: Any) -> None:
        """Place the weights of a model that is in memory.

        Raises:
            MechsafetyError: The map does not fit the model.
        """
        from accelerate import dispatch_model, infer_auto_device_map
        from accelerate.utils import get_balanced_memory

        given, limits = self.device_map, None if self.max_memory is None else dict(self.max_memory)
        if isinstance(given, str):
            whole = list(model._no_split_modules or ())
            if given != "sequential":
                low = given == "balanced_low_0"
                limits = get_balanced_memory(model, limits, no_split_module_classes=whole, low_zero=low)
            given = infer_auto_device_map(model, limits, no_split_module_classes=whole)
        if "" in given:  # accelerate writes no weights to disk under this name
            given = {name: given[""] for name, _ in model.named_children()} | {k: v for k, v in given.items() if k}
        folder = self.folder
        if folder is None and "disk" in given.values():
            made = temporary_folder()
            keep_with(model, made)
            folder = made.name
        dispatch_model(model, dict(given), offload_dir=folder, skip_keys=model._skip_keys_device_placement)


def placement(device_map: Any, max_memory: Any, offload_folder: Any, device: str | None) -> Placement | None:
    """The checked placement that was asked for; None if there was none.

    Raises:
        MechsafetyError: The arguments do not fit together, or are of another form.
    """
    if device_map is None:
        for name, value in (("max_memory", max_memory), ("offload_folder", offload_folder)):
            if value is not None:
                raise MechsafetyError(f"{name} without device_map", hint=f"pass device_map='auto' with {name}")
        return None
    from mechsafety.models import hooked

    if device is not None:
        raise MechsafetyError(
            f"device={device!r} together with device_map", expected="one of them", hint="leave device out"
        )
    if hooked.installed():
        raise MechsafetyError(
            "device_map under TransformerLens 3.9, which copies all weights to one device",
            expected="a TransformerBridge",
            hint="install transformer_lens>=4.3",
        )
    if isinstance(device_map, str):
        if device_map not in STRATEGIES:
            raise MechsafetyError(
                f"device_map={device_map!r}",
                expected=f"one of {STRATEGIES}, or a mapping from module names to devices",
                hint=f"device={device_map!r} puts the whole model there",
            )
    elif not (isinstance(device_map, Mapping) and device_map and all(isinstance(name, str) for name in device_map)):
        raise MechsafetyError(
            f"device_map of type {type(device_map).__name__}",
            expected=f"one of {STRATEGIES}, or a mapping from module names to devices",
        )
    else:
        for name, place in device_map.items():
            _check_place(f"device_map[{name!r}]", place)
    return Placement(device_map, _limits(max_memory), None if offload_folder is None else str(offload_folder))


def _limits(max_memory: Any) -> MaxMemory | None:
    from accelerate.utils import convert_file_size_to_int

    if max_memory is None:
        return None
    wanted = "a mapping from devices to bytes, such as {0: '20GiB', 'cpu': '60GiB'}"
    if not isinstance(max_memory, Mapping) or not max_memory:
        raise MechsafetyError(f"max_memory={max_memory!r}", expected=wanted)
    found = {}
    for place, size in max_memory.items():
        _check_place("max_memory", place)
        try:
            found[place] = convert_file_size_to_int(size)
        except (ValueError, TypeError, AttributeError):
            raise MechsafetyError(f"max_memory[{place!r}]={size!r}", expected=wanted) from None
        if found[place] < 0:
            raise MechsafetyError(f"max_memory[{place!r}]={size!r}", expected=wanted)
    return found


def _check_place(what: str, place: Any) -> None:
    """Refuse a place that this machine lacks."""
    if place in STORES:
        return
    known = [*range(torch.cuda.device_count()), *STORES]
    try:
        found = _device(place)
        there = found.type == "cpu" or (found.type == "cuda" and 0 <= (found.index or 0) < torch.cuda.device_count())
        there = there or (found.type == "mps" and torch.backends.mps.is_available())
    except (RuntimeError, TypeError):
        there = False
    if not there or isinstance(place, bool):
        raise MechsafetyError(f"{what}: unknown or unavailable device {place!r}", expected=f"one of {known}")


def temporary_folder() -> "tempfile.TemporaryDirectory[str]":
    """A folder for offloaded weights, which is removed when nothing holds it any more."""
    return tempfile.TemporaryDirectory(prefix="mechsafety-offload-", ignore_cleanup_errors=True)


def keep_with(model: Any, folder: "tempfile.TemporaryDirectory[str]") -> None:
    """Keep a temporary folder until the model is gone, or the process ends."""
    weakref.finalize(model, folder.cleanup)


# --- of a model that is placed ----------------------------------------------------------------------------------------


def hooks_of(module: nn.Module) -> list[Any]:
    """Accelerate's hooks on a module that move its inputs or fetch its weights."""
    from accelerate.hooks import AlignDevicesHook, SequentialHook

    pending, found = [getattr(module, "_hf_hook", None)], []
    while pending:
        hook = pending.pop(0)
        if isinstance(hook, SequentialHook):
            pending.extend(hook.hooks)
        elif isinstance(hook, AlignDevicesHook):
            found.append(hook)
    return found


def is_dispatched(model: nn.Module) -> bool:
    """Whether accelerate has placed the model's weights."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate fetches the module's own weights when it runs."""
    return hasattr(module, "_hf_hook") and any(hook.offload for hook in hooks_of(module))


def offloaded(model: nn.Module) -> list[str]:
    """Names of the parameters that accelerate fetches when their module runs."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if is_offloaded(module)
        for name, tensor in module._parameters.items()
        if tensor is not None and tensor.is_meta
    ]


def home(model: Any) -> torch.device:
    """Device that tokens go to and logits come from: where the embedding runs."""
    embedding = model.get_input_embeddings()
    if embedding is not None:
        for module in embedding.modules():
            for hook in hooks_of(module):
                if hook.execution_device is not None:
                    return _device(hook.execution_device)
    first: torch.Tensor = next(model.parameters())
    return first.device


def devices(model: nn.Module) -> set[torch.device]:
    """Devices on which a dispatched model's modules run."""
    places = [hook.execution_device for module in model.modules() for hook in hooks_of(module)]
    return {_device(place) for place in places if place is not None}


def _device(place: int | str | torch.device) -> torch.device:
    """A device as accelerate names it: a GPU by its number alone."""
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


@contextmanager
def fetched(*modules: nn.Module) -> Iterator[None]:
    """Context in which the weights of modules and of what is inside them have their numbers.

    A tensor that was read inside may be used afterwards. What is written to it is lost.
    """
    with ExitStack() as stack:
        for module in dict.fromkeys(inner for outer in modules for inner in outer.modules()):
            for hook in hooks_of(module):
                # inside a forward the module may have its weights already; they stay until that forward ends
                if hook.offload and any(t is not None and t.is_meta for t in module._parameters.values()):
                    hook.pre_forward(module)
                    stack.callback(hook.post_forward, module, None)
        yield


class Fetching(Mapping[str, Tensor]):
    """A model's state by name, each offloaded tensor fetched when it is asked for, so that one is held at a time.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._state = model.state_dict()

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._state[name]
        return with_numbers(self._model, name) if tensor.is_meta else tensor


def with_numbers(model: nn.Module, name: str) -> Tensor:
    """A parameter by its name, fetched if it is offloaded."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    with fetched(module):
        found: Tensor = getattr(module, own)
    return found.detach()


def kept(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and offloaded tensors that lie in memory; what lies on disk is not read."""
    for module in model.modules():
        yield from (tensor for tensor in module._parameters.values() if tensor is not None and not tensor.is_meta)
        for hook in hooks_of(module):
            store = getattr(getattr(hook.weights_map, "dataset", None), "state_dict", None)
            yield from (store or {}).values()


def check_in_memory(model: nn.Module, what: str) -> None:
    """Refuse a model with offloaded or quantised weights for what needs all numbers as they are.

    Args:
        model: The model.
        what: What needs them.

    Raises:
        MechsafetyError: Some of its weights are offloaded or quantised.
    """
    without_map = "load the model without device_map, or with a map that offloads nothing"
    for kind, names, expected, hint in (
        ("quantised", quantised(model), "float32, bfloat16 or float16", "load the model without quantization_config"),
        ("offloaded", offloaded(model), "all weights in memory", without_map),
    ):
        if names:
            tensors = named([name.replace(f".{_INSIDE}", "") for name in names], "tensor")
            raise MechsafetyError(
                f"{what} with {kind} weights: {tensors}",
                expected=expected,
                hint=hint,
                page="weights-that-are-offloaded",
            )
