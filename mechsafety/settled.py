"""Torch's switches of the process and the thread, as the analyses need them."""

import functools
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_CPU = torch.device("cpu")


@contextmanager
def settled() -> Iterator[None]:
    """Context in which torch computes as if nobody had touched its switches; all of them are put back at the end.

    Inference mode is off (its tensors have no gradients), so is autocast; new tensors are float32 on the CPU unless
    told otherwise. Grad mode stays as it is: what needs gradients says so. Deterministic algorithms stay as they are
    too.

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

    The default belongs to the whole process. So the first thread that comes in notes it and sets float32; the last one
    that goes puts it back: a thread that ends earlier must not change what another one computes.
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
