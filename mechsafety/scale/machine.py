"""What of the machine changes the last digits: threads and the size of batches. A run records it and keeps to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

_recorded: ContextVar["Machine | None"] = ContextVar("recorded machine", default=None)


@dataclass(frozen=True, slots=True)
class Machine:
    """Settings under which a run computes, on whichever machine.

    Attributes:
        threads: Number of torch's threads.
        batch_bytes: Bytes that a batch may take, by kind of device.
    """

    threads: int
    batch_bytes: dict[str, int]

    @classmethod
    def here(cls) -> "Machine":
        """The settings of this process."""
        import torch

        from mechsafety.models.memory import batch_bytes

        accelerator = torch.accelerator.current_accelerator()
        devices = [torch.device("cpu"), *([] if accelerator is None else [accelerator])]
        return cls(torch.get_num_threads(), {device.type: batch_bytes(device) for device in devices})


def recorded_batch_bytes(device: str) -> int | None:
    """What the run that is open has recorded for a kind of device; None without one."""
    machine = _recorded.get()
    return None if machine is None else machine.batch_bytes.get(device)


@contextmanager
def as_on(machine: Machine) -> Iterator[None]:
    """Context that computes with a run's settings."""
    import torch

    before, token = torch.get_num_threads(), _recorded.set(machine)
    if before != machine.threads:
        torch.set_num_threads(machine.threads)
    try:
        yield
    finally:
        _recorded.reset(token)
        if before != machine.threads:
            torch.set_num_threads(before)
