"""What senders write to the residual stream, harmful minus harmless, for a bounded number of senders at a time."""

from collections.abc import Callable, Iterator, Sequence

from jaxtyping import Float
from torch import Tensor

from mechsafety.models import LensModel
from mechsafety.nodes import Node
from mechsafety.patching.masks import PairRuns
from mechsafety.patching.senders import added_changes

# bytes of sender outputs held at once: the 301 senders of a 135M model take 67 MB at 96 columns
SENDER_BYTES = 2**29

Chunks = Callable[[int, int], Iterator[tuple[slice, Tensor]]]


def sender_chunks(model: LensModel, runs: PairRuns, senders: Sequence[Node]) -> Chunks:
    """Function that yields the changes of a range of senders in chunks (rows, [sender batch pos d_model]).

    A chunk fits into memory. If all senders fit, their changes are computed once and kept. Otherwise each call computes
    its chunks again.
    """
    row = 4 * model.d_model * len(runs.harmful) * runs.harmful.n_pos
    size = max(1, SENDER_BYTES // row)

    def changes(part: Sequence[Node]) -> Float[Tensor, "sender batch pos d_model"]:
        return added_changes(model, runs.harmless, runs.harmful, part)

    kept = changes(senders) if len(senders) <= size else None

    def chunks(first: int, last: int) -> Iterator[tuple[slice, Tensor]]:
        if kept is not None:
            yield slice(first, last), kept[first:last]
            return
        for begin in range(first, last, size):
            rows = slice(begin, min(begin + size, last))
            yield rows, changes(senders[rows])

    return chunks
