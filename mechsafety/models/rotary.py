"""Rotary embeddings whose angles depend on a row's length, computed for each row by itself.

For two kinds of rotary embedding, Hugging Face chooses the angles by the longest row of a batch. ``longrope`` (Phi-3)
takes other frequencies beyond a certain length. ``dynamic`` scales the frequencies with the length, and also remembers
the longest batch so far. A long prompt would therefore change the numbers of a short prompt beside it or after it. This
module computes rows with different angles separately.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

_KINDS = ("dynamic", "longrope")


class RowByRow(nn.Module):
    """Base class that is put before a rotary embedding's own class.

    Attributes:
        row_lengths: Full lengths of the rows, set if a call holds only their first columns. None if a call holds their
            last column.
    """

    row_lengths: Int[Tensor, " batch"] | None = None

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines [batch pos d_rotary], each row's for its own length."""
        whole = position_ids.max(1).values + 1 if self.row_lengths is None else self.row_lengths
        # one more column, which is cut off again, because the class reads the length from the largest position
        positions = torch.cat([position_ids, (whole - 1)[:, None].to(position_ids)], 1)
        keys = _keys(self, layer_type, whole.tolist())
        out: list[Tensor] = []
        for key in dict.fromkeys(keys):
            rows = [row for row, other in enumerate(keys) if other == key]
            self._forget(layer_type)
            options = {} if layer_type is None else {"layer_type": layer_type}
            parts = [part[:, :-1] for part in super().forward(x, positions[rows], **options)]
            if len(rows) == len(keys):
                return parts[0], parts[1]
            out = out or [part.new_empty(len(keys), *part.shape[1:]) for part in parts]
            for whole_part, part in zip(out, parts, strict=True):
                whole_part[rows] = part
        return out[0], out[1]

    def _forget(self, layer_type: str | None) -> None:
        """Reset the module to its first state, because ``dynamic`` keeps the angles of the longest batch so far."""
        start = "" if layer_type is None else f"{layer_type}_"
        own = getattr(self, f"{start}inv_freq")
        setattr(self, f"{start}inv_freq", getattr(self, f"{start}original_inv_freq").to(own.device).clone())
        setattr(self, f"{start}max_seq_len_cached", self.original_max_seq_len)


def row_by_row(model: nn.Module) -> list[RowByRow]:
    """Let the rotary embeddings whose angles depend on the length compute each row by itself; return them."""
    found: list[Any] = [m for m in model.modules() if any(kind in _KINDS for _, kind in _kinds(m))]
    for module in found:
        if not isinstance(module, RowByRow):
            module.__class__ = _with_rows(type(module))  # so that copies of the model have it too
            if "_old_forward" in vars(module):  # accelerate's hook keeps the forward of the class before
                module._old_forward = MethodType(type(module).forward, module)
    return found


@contextmanager
def of_lengths(modules: Sequence[RowByRow], lengths: Int[Tensor, " batch"]) -> Iterator[None]:
    """Context in which the first columns of rows get the angles of these full lengths."""
    try:
        for module in modules:
            module.row_lengths = lengths
        yield
    finally:
        for module in modules:
            module.row_lengths = None


def rotation(modules: Sequence[RowByRow], lengths: Int[Tensor, " batch"]) -> tuple[Any, ...]:
    """One entry per row: what its angles depend on; empty if they never change."""
    rows = lengths.tolist() if modules else []
    return tuple(zip(*(_keys(m, layer_type, rows) for m in modules for layer_type, _ in _kinds(m)), strict=True))


def n_positions(config: Any, n_ctx: int) -> int:
    """Longest row that a model is made for; with ``dynamic`` angles, more than the configuration's positions."""
    rope = getattr(config, "rope_parameters", None) or {}
    return int(n_ctx * rope.get("factor", 1.0)) if rope.get("rope_type") == "dynamic" else n_ctx


def _kinds(module: nn.Module) -> list[tuple[str | None, str]]:
    """Pairs of layer type (None means all layers) and kind of angles; empty if a module is no rotary embedding."""
    kind = vars(module).get("rope_type")  # its own attribute: TransformerLens' wrappers pass on those of their module
    if isinstance(kind, dict):
        return [(layer_type, one) for layer_type, one in kind.items() if one]
    return [(None, kind)] if isinstance(kind, str) else []


def _keys(module: Any, layer_type: str | None, lengths: Sequence[int]) -> list[int]:
    """One key per row; rows with the same key have the same angles."""
    kind = dict(_kinds(module))[layer_type]
    if kind == "longrope":
        rope = module.config.rope_parameters if layer_type is None else module.config.rope_parameters[layer_type]
        return [int(length > rope["original_max_position_embeddings"]) for length in lengths]
    if kind == "dynamic":
        return [max(0, length - module.original_max_seq_len) for length in lengths]
    return [0] * len(lengths)


def _with_rows(kind: type) -> type:
    return type(kind.__name__, (RowByRow, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
