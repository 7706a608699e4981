"""Set torch's switches, of the process and of the thread, as the analyses need them."""

import functools
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_CPU = torch.device("cpu")


@contextmanager
def settled() -> Iterator[None]:
    """Context in which torch's switches have their usual values; the user's values come back at the end.

    Inference mode is off, because its tensors have no gradients. Autocast is off too. New tensors are float32 on the
    CPU unless told otherwise. Grad mode stays as the user set it: code that needs gradients switches it on itself. The
    switch for deterministic algorithms stays as well.

    Example:
        >>> with torch.inference_mode(), settled():
        ...     torch.zeros(1).is_inference()
        False
    """
    with _FLOAT32, ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            grad = torch.is_grad_enabled()
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(grad))  # leaving inference mode turns it on
        for device in _devices():
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device() != _CPU:
            stack.enter_context(_CPU)
        yield


@functools.cache
def _devices() -> tuple[str, ...]:
    """Kinds of devices that this machine has."""
    accelerator = torch.accelerator.current_accelerator()
    return (_CPU.type,) if accelerator is None else (_CPU.type, accelerator.type)


class _Float32:
    """Context in which new tensors are float32.

    The default dtype belongs to the whole process. The first thread that enters stores it and sets float32. The last
    thread that leaves restores it, because a thread that leaves earlier must not change what another thread computes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._found = torch.float32

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._found = torch.get_default_dtype()
                if self._found != torch.float32:
                    torch.set_default_dtype(torch.float32)
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._found != torch.float32:
                torch.set_default_dtype(self._found)


_FLOAT32 = _Float32()
