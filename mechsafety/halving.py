"""Out of memory: a batch is computed in halves, and the work goes on."""

import gc
import logging
import sys
from collections.abc import Callable
from typing import Any

from mechsafety.errors import MechsafetyError, first_line

logger = logging.getLogger(__name__)

# how torch says it of a CPU, in a RuntimeError; of a GPU it has an error of its own
WORDS = ("can't allocate memory", "not enough memory", "out of memory")
_told: list[str] = []


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on the CPU or a GPU.

    Example:
        >>> out_of_memory(MemoryError()), out_of_memory(RuntimeError("CUDA error: out of memory"))
        (True, True)
        >>> out_of_memory(ValueError("out of memory"))
        False
    """
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS))


def exhausted(error: BaseException) -> MechsafetyError:
    """The line for an error that says that there is no memory left."""
    return MechsafetyError(
        f"there is not enough memory ({first_line(error)})",
        expected="memory for a batch",
        hint="pass a smaller batch_size, give shorter prompts, close other programs, or load the model with "
        "dtype='bfloat16'",
    )


def in_halves(compute: Callable[[Any], Any], item: Any) -> Any:
    """What a function makes of an item; of a list for which memory does not suffice, what it makes of its halves.

    The first time, a warning says that batches are smaller from here on. Sums of a smaller batch may round differently.

    Args:
        compute: Function of a list of rows that gives a tensor or a list with one entry per row. Of any other item it
            may give anything.
        item: The item.

    Raises:
        MechsafetyError: A single row needs more memory than there is, or the outcomes of halves cannot be joined.

    Example:
        >>> def compute(rows):
        ...     if len(rows) > 2:
        ...         raise MemoryError
        ...     return [row**2 for row in rows]
        >>> in_halves(compute, [1, 2, 3, 4, 5])
        [1, 4, 9, 16, 25]
    """
    try:
        return compute(item)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        refused = exhausted(error)
    # here the error is gone, and with it the tensors of the frames that it held
    if not isinstance(item, list) or len(item) < 2:
        raise refused
    _free()
    if not _told:
        _told.append("told")
        logger.warning("memory is full: a batch of %d is computed in halves; last digits may differ", len(item))
    half = len(item) // 2
    parts = [item[:half], item[half:]]
    found = [in_halves(compute, part) for part in parts]
    if all(isinstance(one, list) and len(one) == len(part) for one, part in zip(found, parts, strict=True)):
        return [*found[0], *found[1]]
    if all(getattr(one, "shape", ())[:1] == (len(part),) for one, part in zip(found, parts, strict=True)):
        return sys.modules["torch"].cat(found)
    raise refused


def _free() -> None:
    """Give memory back that nothing uses any more."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
