"""How many rows x columns of variants the engine runs at once: as many as the machine's memory allows, within bounds.

The number depends on the machine's whole memory, not on what other programs use. The same call therefore rounds the
same way every time. Only if too little memory is free are the batches smaller.
"""

import functools
import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mechsafety.models.quantised import stored_tensors
from mechsafety.scale.machine import recorded_batch_bytes

# on a CPU larger batches gain nothing; on a GPU they do
CPU_TOKENS = 2048
GPU_TOKENS = 65536
# share of the whole memory; on a CPU never more than a gibibyte, because other programs need memory too
SHARE = 0.25
CPU_BYTES = 2**30
# share of the free memory, used if SHARE of the whole memory is not free
FREE_SHARE = 0.5

logger = logging.getLogger(__name__)


class Allocated(TorchDispatchMode):
    """Context that counts the bytes of all new tensors, without views: what a run would hold if it freed nothing.

    Args:
        weights: Tensors whose copies are not counted, because their size does not depend on the batch.

    Attributes:
        total: Bytes so far.

    Example:
        >>> with Allocated() as seen:
        ...     _ = torch.zeros(10)[:5] + 1
        >>> seen.total
        60
    """

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.total = 0
        self._weights = {plain.untyped_storage().data_ptr() for own in weights for plain in stored_tensors(own)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
        out = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        if not given or not given <= self._weights:
            new = [tensor.untyped_storage() for tensor in _tensors(out) if not tensor.is_meta]
            self.total += sum(storage.nbytes() for storage in new if storage.data_ptr() not in given)
        return out


def batch_tokens(device: torch.device, bytes_per_token: float) -> int:
    """Rows x columns that fit: the largest power of two within `batch_bytes` and the device's bound.

    Args:
        device: Where the model is.
        bytes_per_token: What one column of one row needs.

    Example:
        >>> batch_tokens(torch.device("cpu"), 1.0)
        2048
    """
    most = GPU_TOKENS if device.type == "cuda" else CPU_TOKENS
    fit = batch_bytes(device) / max(bytes_per_token, 1.0)
    return int(min(most, 2 ** math.floor(math.log2(max(fit, 1.0)))))


def batch_bytes(device: torch.device) -> int:
    """Bytes that a batch may take: a share of the device's memory, or of its free memory if that share is not free.

    A run on several machines, or one that resumes, has recorded the number when it began (`mechsafety.scale`).
    """
    recorded = recorded_batch_bytes(device.type)
    if recorded is not None:
        return recorded
    total, free = _memory(device)
    wanted = SHARE * total if device.type == "cuda" else min(SHARE * total, CPU_BYTES)
    if wanted <= free:
        return int(wanted)
    _warn(device.type)
    return int(FREE_SHARE * free)


@functools.cache
def _warn(device: str) -> None:
    logger.warning("little memory is free on the %s: batches are smaller, last digits may differ between runs", device)


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes that the device has, and how many of them are free."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # torch keeps freed memory reserved for itself
        return total, free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    memory = psutil.virtual_memory()
    return memory.total, memory.available


def _tensors(tree: Any) -> list[Tensor]:
    leaves = (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout is torch.strided)
    return [plain for leaf in leaves for plain in stored_tensors(leaf)]
