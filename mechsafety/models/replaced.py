"""Replacing what parts write, and leaving out the work of parts all of whose writing is replaced.

A run of a circuit replaces what most heads and MLPs write. An MLP whose output is replaced need not be computed, nor a
layer's attention if all of its heads are replaced.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsafety.models.backend import Backend, Half, Hook
from mechsafety.sites import SiteKind

# how columns and parts line up with an activation after its batch axis; others are [pos d_model]
_PER_HEAD = ("pos 1 1", "1 part 1")
_LAYOUT = {
    **dict.fromkeys((SiteKind.Z, SiteKind.Q, SiteKind.K, SiteKind.V), _PER_HEAD),
    SiteKind.NEURONS: ("pos 1", "1 part"),
    SiteKind.PATTERN: ("1 pos 1", "part 1 1"),
}
# attention and MLP: kinds whose edits would see fewer rows, and the kind that holds all that the part writes
_PARTS: tuple[tuple[Half, frozenset[SiteKind], SiteKind], ...] = (
    (
        "attn",
        frozenset(
            {SiteKind.Q, SiteKind.K, SiteKind.V, SiteKind.SCORES, SiteKind.PATTERN, SiteKind.Z, SiteKind.ATTN_OUT}
        ),
        SiteKind.Z,
    ),
    ("mlp", frozenset({SiteKind.MLP_IN, SiteKind.NEURONS, SiteKind.MLP_OUT}), SiteKind.MLP_OUT),
)


@dataclass(frozen=True, slots=True, eq=False)
class Replacement:
    """An edit that replaces a site's values in chosen variants, prompts and columns.

    Attributes:
        kind: What is replaced.
        values: New activations, the same for all variants: ``[batch pos ...]`` (``[batch head pos key]`` for
            ``pattern``).
        where: Columns that are replaced.
        parts: Heads (key-value heads, neurons) that are replaced in each variant; None means all.
        rows: Rows ``variant * batch + prompt`` for which the part runs; None means all. The edit sees these rows if its
            hook point stands inside the part, and otherwise all rows.
    """

    kind: SiteKind
    values: Float[Tensor, "batch ..."]
    where: Bool[Tensor, "variant batch pos"]
    parts: Bool[Tensor, "variant part"] | None = None
    rows: Int[Tensor, " row"] | None = None

    def __call__(self, tensor: Float[Tensor, "row ..."]) -> Float[Tensor, "row ..."]:
        """The tensor with its values replaced."""
        columns, part = _LAYOUT.get(self.kind, ("pos 1", ""))
        where = rearrange(self.where, f"variant batch pos -> variant batch {columns}")
        if self.parts is not None:
            where = where & rearrange(self.parts, f"variant part -> variant 1 {part}")
        n, values = len(self.values), self.values.to(tensor.dtype)
        if self.rows is not None and len(tensor) != n * len(self.where):
            return torch.where(where[self.rows // n, self.rows % n], values[self.rows % n], tensor)
        own = rearrange(tensor, "(variant batch) ... -> variant batch ...", variant=len(self.where))
        return rearrange(torch.where(where, values, own), "variant batch ... -> (variant batch) ...")

    @property
    def live(self) -> Int[Tensor, " row"] | None:
        """Rows in which not every value of the site is replaced; the first row if there are none; None if all are."""
        whole = self.where.flatten(1).all(1)
        whole = whole if self.parts is None else whole & self.parts.all(1)
        if not bool(whole.any()):
            return None
        n = self.where.shape[1]
        rows = (~whole).nonzero() * n + torch.arange(n, device=whole.device)
        rows = rearrange(rows, "variant batch -> (variant batch)")
        return rows if len(rows) else rows.new_zeros(1)


@dataclass(frozen=True, slots=True, eq=False)
class Idle:
    """A layer's attention or MLP that runs for some rows only.

    Attributes:
        layer: The layer.
        part: Attention or MLP.
        rows: Rows for which it runs; at least one, because not every model's code accepts none.
        out: What the part writes in the other rows, per prompt.
    """

    layer: int
    part: Half
    rows: Int[Tensor, " row"]
    out: Float[Tensor, "batch pos d_model"]


def leave_out(backend: Backend, edits: Sequence[Hook], layers: Iterable[int]) -> tuple[list[Hook], list[Idle]]:
    """Find attentions and MLPs whose output is replaced in some variants, and that may therefore run for fewer rows.

    Any other edit of the same layer that would see fewer rows prevents this.

    Args:
        backend: The model.
        edits: Edits of a run.
        layers: Layers that run as a whole.

    Returns:
        The edits, some of them for fewer rows; and what runs for fewer rows.
    """
    by_layer: dict[int, list[int]] = {}
    for k, (site, _) in enumerate(edits):
        if site.layer is not None:
            by_layer.setdefault(site.layer, []).append(k)
    found, idle = list(edits), []
    for layer in layers:
        here = by_layer.get(layer, [])
        for part, inside, kind in _PARTS:
            within = [k for k in here if edits[k][0].kind in inside]
            if len(within) != 1 or edits[within[0]][0].kind is not kind or backend.running_module(layer, part) is None:
                continue
            site, edit = edits[within[0]]
            rows = edit.live if isinstance(edit, Replacement) else None
            if isinstance(edit, Replacement) and rows is not None:
                found[within[0]] = (site, replace(edit, rows=rows))
                out = edit.values if part == "mlp" else _written(backend, layer, edit.values)
                idle.append(Idle(layer, part, rows, out))
    return found, idle


def _written(backend: Backend, layer: int, z: Float[Tensor, "batch pos head d_head"]) -> Tensor:
    """What a layer's attention writes, if these are the outputs of its heads."""
    weights = backend.W_O(layer)
    out = einsum(z.to(weights.dtype), weights, "batch pos head d, head d model -> batch pos model")
    return out + backend.b_O(layer)
