"""What senders write to the residual stream, harmful less harmless, a bounded number of them at a time."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from mechsafety.models import LensModel
from mechsafety.nodes import Node
from mechsafety.patching.masks import PairRuns, stored
from mechsafety.sites import SiteKind

# bytes of sender outputs held at once: the 301 senders of a 135M model take 67 MB at 96 columns
SENDER_BYTES = 2**29

Chunks = Callable[[int, int], Iterator[tuple[slice, Tensor]]]


def sender_chunks(model: LensModel, runs: PairRuns, senders: Sequence[Node]) -> Chunks:
    """Changes of the senders from one row to another, in chunks (rows, [sender batch pos d_model]) that fit in memory.

    If all of them fit they are computed once and kept; if not, each call computes its chunks anew.
    """
    row = 4 * model.d_model * len(runs.harmful) * runs.harmful.n_pos
    size = max(1, SENDER_BYTES // row)
    kept = output_changes(model, runs, senders) if len(senders) <= size else None

    def chunks(first: int, last: int) -> Iterator[tuple[slice, Tensor]]:
        if kept is not None:
            yield slice(first, last), kept[first:last]
            return
        for begin in range(first, last, size):
            rows = slice(begin, min(begin + size, last))
            yield rows, output_changes(model, runs, senders[rows])

    return chunks


def output_changes(
    model: LensModel, runs: PairRuns, senders: Sequence[Node]
) -> Float[Tensor, "sender batch pos d_model"]:
    """Output of each sender in the harmful run less that in the harmless one, float32.

    Args:
        model: The model; head outputs must add up (no norm after attention).
        runs: Stored runs; neurons need runs that hold them.
        senders: ``embed``, heads, MLPs and neurons; those of one sublayer side by side.
    """
    parts = []
    for (kind, layer), group in groupby(senders, lambda node: (node.kind, node.layer)):
        indices = [node.index for node in group]
        if kind == "embed":
            parts.append(rearrange(runs.harmful.resid[0] - runs.harmless.resid[0], "b p d -> 1 b p d").float())
        elif kind == "head":
            z = _change(runs, SiteKind.Z, layer)[:, :, indices]
            weight = model.W_O(layer)[indices].float()
            parts.append(einsum(z, weight, "batch pos head d_head, head d_head d -> head batch pos d"))
        elif kind == "neuron":
            activation = _change(runs, SiteKind.NEURONS, layer)[:, :, indices]
            weight = model.W_out(layer)[indices].float()
            parts.append(einsum(activation, weight, "batch pos neuron, neuron d -> neuron batch pos d"))
        else:
            parts.append(rearrange(_change(runs, SiteKind.MLP_OUT, layer), "b p d -> 1 b p d"))
    return torch.cat(parts)


def _change(runs: PairRuns, kind: SiteKind, layer: int) -> Tensor:
    return stored(runs.harmful.acts, kind)[layer].float() - stored(runs.harmless.acts, kind)[layer].float()
