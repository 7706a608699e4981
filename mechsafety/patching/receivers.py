"""Receivers of path patching: what a slot computes from a changed input, and what the model then computes."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.models import LensModel
from mechsafety.models.engine import (
    BaseRun,
    Hook,
    capture,
    expand_rows,
    run_from,
    split_rows,
)
from mechsafety.models.parts import check_exists
from mechsafety.nodes import HEAD_SITES, LOGITS, NODE_SITES, SLOTS, Node
from mechsafety.patching.norms import NormOption, block_norms, keep_scales, mlp_norms
from mechsafety.patching.senders import STREAM, behind_norm, entry, mlp_input, neuron_weights
from mechsafety.prompts.spans import SPANS
from mechsafety.sites import Site, SiteKind

Downstream = Literal["live", "frozen"]
# all slots of a head that read the same input together are one edit of what the head then gives
ALL_SLOTS = "z"
_SITES = {**HEAD_SITES, ALL_SLOTS: NODE_SITES["head"], "mlp": NODE_SITES["mlp"], "neuron": NODE_SITES["neuron"]}

Receiver = tuple[Node, str]
INTO_LOGITS: Receiver = (LOGITS, "resid")


@dataclass(frozen=True, slots=True)
class Projection:
    """A direction as a receiver: the residual stream's projection on a unit vector, mean over some positions.

    Attributes:
        vector: Unit vector.
        site: Where in the residual stream: ``resid_pre``, ``resid_mid`` or ``resid_post`` of a layer.
        positions: A span, or positions counted from the end; the last token by default. Positions before the first
            difference of the pairs are left out.

    Example:
        >>> towards = ms.patching.Projection(direction.vector / direction.vector.norm(), ms.Site("resid_post", 3))
        >>> towards.positions
        (-1,)
    """

    vector: Float[Tensor, " d_model"]
    site: Site
    positions: str | tuple[int, ...] = (-1,)

    def __post_init__(self) -> None:
        if self.site.kind not in STREAM:
            raise MechsafetyError(f"a projection at {self.site}", expected=f"one of {[str(kind) for kind in STREAM]}")
        if isinstance(self.positions, str) and self.positions not in ("all", *SPANS):
            raise MechsafetyError(
                f"a projection at positions={self.positions!r}",
                expected=f"'all', one of {SPANS}, or positions from the end",
            )
        length = float(self.vector.float().norm())
        if not abs(length - 1) < 1e-3:
            raise MechsafetyError(
                f"a direction of length {length:.3g}", expected="a unit vector", hint="vector / vector.norm()"
            )

    @property
    def moment(self) -> int:
        """When the residual stream is read (see `mechsafety.patching.senders`)."""
        return entry(self.site)


def read_moment(model: LensModel, receiver: Node) -> int:
    """The moment at which a receiver reads the residual stream."""
    if receiver.kind == "logits":
        return 2 * model.n_layers
    return 2 * (receiver.layer or 0) + (receiver.kind != "head" and not model.parallel)


def reaches(sender: Node, receiver: Node, *, parallel: bool) -> bool:
    """Whether a node's output is part of another's input.

    Args:
        sender: Embedding, head, MLP or neuron.
        receiver: Head, MLP, neuron or logits.
        parallel: Whether attention and MLP of a block read the same stream (GPT-NeoX).
    """
    if receiver.kind == "logits" or sender.kind == "embed":
        return True
    if sender.layer == receiver.layer:
        return sender.kind == "head" and receiver.kind != "head" and not parallel
    return (sender.layer or 0) < (receiver.layer or 0)


def check_receivers(model: LensModel, receivers: Sequence[Receiver]) -> None:
    """Raise a `MechsafetyError` for a node or slot that cannot receive in this model."""
    for node, slot in receivers:
        if slot not in SLOTS.get(node.kind, ()):
            raise MechsafetyError(f"{node} has no slot {slot!r}", expected=f"one of {SLOTS}")
        check_exists(model, node)


@dataclass(frozen=True, slots=True, eq=False)
class SlotEdit:
    """Values of one slot of a layer, in each variant, after the slot has read its changed input.

    Attributes:
        layer: The layer.
        slot: ``q``, ``k``, ``v``, all three together (`ALL_SLOTS`), ``mlp`` or ``neuron``.
        values: Activation at the slot's site, of all its heads or neurons.
        chosen: True at the heads or neurons that receive; an MLP has one entry.
    """

    layer: int
    slot: str
    values: Float[Tensor, "row pos ..."]
    chosen: Bool[Tensor, "variant index"]

    def hook(self, batch: int) -> Hook:
        """Gives the chosen heads or neurons of each row their values."""
        return (
            Site(_SITES[self.slot], self.layer),
            _keep_where(_rows(self.chosen, batch, self.values.ndim), self.values),
        )

    def whole_hook(self) -> Hook:
        """Gives all heads their values."""
        return (Site(_SITES[self.slot], self.layer), lambda tensor: self.values)


def slot_edit(
    model: LensModel,
    base: BaseRun,
    receivers: Sequence[Sequence[Receiver]],
    delta: Float[Tensor, "variant batch pos d_model"],
    norm: NormOption = "recompute",
    stream: Float[Tensor, "row pos d_model"] | None = None,
) -> SlotEdit:
    """Values of a layer's slot when ``delta`` is added to what it reads in the base run.

    Args:
        model: The model.
        base: The run that is edited.
        receivers: Receivers of each variant; all are in one layer and of one slot. The slot `ALL_SLOTS` of heads stands
            for queries, keys and values together: what a head gives when all three read the changed input.
        delta: Change of what the slot reads.
        norm: ``recompute``, or ``freeze``: the norm before the slot keeps the base run's scale.
        stream: The residual stream that the slot reads in each variant, if it is not that of the base run.
    """
    (node, slot), n = receivers[0][0], len(receivers)
    layer, kind = node.layer or 0, "neuron" if node.kind == "neuron" else slot
    rows = rearrange(delta, "variant batch pos d -> (variant batch) pos d").to(base.resid.dtype)
    if kind in ("q", "k", "v", ALL_SLOTS):
        resid, norms, site = base.resid[layer], block_norms(model, layer, "ln1"), Site(_SITES[kind], layer)
        with keep_scales(model, norm, norms, lambda: capture(model, base, layer, resid, site)):
            own = expand_rows(resid, n) if stream is None else stream
            values = capture(model, base, layer, own + rows, site)
    else:
        reads = mlp_input(model, base, layer)
        with keep_scales(model, norm, mlp_norms(model, layer), lambda: model.mlp(layer, reads)):
            own = expand_rows(reads, n) if stream is None else stream
            values = _mlp_values(model, layer, own + rows, kind, _fixed_neurons(base, layer, n))
    sizes = {"mlp": 1, "neuron": model.d_mlp}
    chosen = torch.zeros(n, sizes.get(kind, model.n_heads), dtype=torch.bool)
    for variant, group in enumerate(receivers):
        chosen[variant, [receiver.index or 0 for receiver, _ in group]] = True
    return SlotEdit(layer, kind, values, chosen.to(values.device))


def live_logits(
    model: LensModel, base: BaseRun, groups: Sequence[Sequence[SlotEdit]]
) -> Float[Tensor, "variant batch d_vocab"]:
    """Logits when every edited slot holds its value and everything else runs live.

    Args:
        model: The model.
        base: The run that is edited.
        groups: Groups of edits, each for some variants. A group joins the batch at its first edited layer.

    Returns:
        Logits of the variants of the first group, then of the second group, and so on.
    """
    layers = sorted({edit.layer for group in groups for edit in group})
    hidden, spans = base.resid[layers[0]][:0], dict[int, slice]()
    for layer, after in zip(layers, [*layers[1:], None], strict=True):
        for k, group in enumerate(groups):
            if min(edit.layer for edit in group) == layer:
                own = expand_rows(base.resid[layer], len(group[0].chosen))
                spans[k] = slice(len(hidden), len(hidden) + len(own))
                hidden = torch.cat([hidden, own])
        hooks = []
        for k, span in spans.items():
            edits = [edit for edit in groups[k] if edit.layer == layer]
            hooks += [_at_rows(hook, span) for hook in edit_hooks(model, base, hidden[span], edits)]
        hidden = run_from(model, base, layer, hidden, hooks, stop=after)
    return torch.cat([split_rows(hidden[spans[k]], len(group[0].chosen)) for k, group in enumerate(groups)])


def edit_hooks(
    model: LensModel, base: BaseRun, hidden: Float[Tensor, "row pos d_model"], edits: Sequence[SlotEdit]
) -> list[Hook]:
    """Hooks that put the edits of one layer into a run, each seen by its receivers alone.

    Args:
        model: The model.
        base: The run that is edited.
        hidden: The residual stream before the layer, in that run.
        edits: Edits of one layer, at most one per slot.
    """
    shared = [edit for edit in edits if _is_shared(model, edit)]
    hooks = [edit.hook(len(base)) for edit in edits if not _is_shared(model, edit)]
    direct = tuple(hooks)
    # a shared slot is changed for all heads in a run of its own; only the receivers' z of that run is kept
    for pattern in itertools.product((False, True), repeat=len(shared)):
        if not any(pattern):
            continue
        agree = [edit.chosen == flag for edit, flag in zip(shared, pattern, strict=True)]
        chosen = torch.stack(agree).all(0)
        if bool(chosen.any()):
            layer, site = shared[0].layer, Site(SiteKind.Z, shared[0].layer)
            together = [edit.whole_hook() for edit, flag in zip(shared, pattern, strict=True) if flag]
            z = capture(model, base, layer, hidden, site, [*direct, *together])
            hooks.append((site, _keep_where(_rows(chosen, len(base), z.ndim), z)))
    return hooks


def _is_shared(model: LensModel, edit: SlotEdit) -> bool:
    """Whether a slot's value for one head also acts on others: grouped queries, a norm over all heads (OLMo-2)."""
    if edit.slot not in ("q", "k", "v"):
        return False
    grouped = edit.slot != "q" and model.n_kv_heads != model.n_heads
    return grouped or normed_over_heads(model, edit.layer, edit.slot)


def normed_over_heads(model: LensModel, layer: int, slot: str) -> bool:
    """Whether one norm runs over the queries (or keys) of all heads of a layer together (OLMo-2)."""
    norm = model.backend.head_norm(layer, slot)
    return norm is not None and next(norm.parameters()).shape[-1] != model.d_head


def frozen_change(
    model: LensModel, base: BaseRun, edits: Sequence[SlotEdit], norm: NormOption = "recompute"
) -> Float[Tensor, "variant batch d_model"]:
    """Change of what the edited slots' nodes write at the last column, with everything after them frozen."""
    n, last = edits[0].chosen.shape[0], slice(base.n_pos - 1, base.n_pos)
    total = torch.zeros(n, len(base), 1, model.d_model, device=base.resid.device)
    for layer in sorted({edit.layer for edit in edits}):
        here = {edit.slot: edit for edit in edits if edit.layer == layer}
        heads = [edit for slot, edit in here.items() if slot in ("q", "k", "v")]
        if heads:
            hidden = expand_rows(base.resid[layer], n)
            hooks = edit_hooks(model, base, hidden, heads)
            new = capture(model, base, layer, hidden, Site(SiteKind.Z, layer), hooks)
            change = (new - expand_rows(base.acts[SiteKind.Z][layer], n))[:, last].float()
            written = einsum(change, model.W_O(layer).float(), "row pos head k, head k d_model -> row pos d_model")
            total += behind_norm(model, base, layer, "head", split_rows(written, n), norm, last)
        if "mlp" in here:
            mlp_base = base.acts[SiteKind.MLP_OUT][layer]
            total += split_rows((here["mlp"].values - expand_rows(mlp_base, n))[:, last].float(), n)
        if "neuron" in here:
            edit, reads = here["neuron"], mlp_input(model, base, layer)[:, last]
            before = expand_rows(_mlp_values(model, layer, reads, "neuron"), n)
            change = torch.where(_rows(edit.chosen, len(base), 3), edit.values[:, last] - before, 0.0).float()
            written = einsum(change, neuron_weights(model, layer), "row pos neuron, neuron d_model -> row pos d_model")
            total += behind_norm(model, base, layer, "neuron", split_rows(written, n), norm, last)
    return total[:, :, 0]


def _fixed_neurons(base: BaseRun, layer: int, variants: int) -> list[Hook]:
    """Hooks for the neurons of a layer that have a value of their own in the base run."""
    site = Site(SiteKind.NEURONS, layer)
    return [fixed.hook(variants) for fixed in (*base.fixed, *base.patched) if fixed.site == site]


def _mlp_values(
    model: LensModel, layer: int, reads: Float[Tensor, "row pos d_model"], kind: str, fixed: Sequence[Hook] = ()
) -> Tensor:
    """An MLP's output with its fixed neurons at their values, or its neurons, when it reads ``reads``."""
    seen: list[Tensor] = []
    site = Site(_SITES[kind], layer)
    if kind == "mlp":
        with model.hooks(fixed):
            return model.mlp(layer, reads)
    with model.hooks([(site, lambda tensor: seen.append(tensor))]):
        model.mlp(layer, reads)
    return seen[0]


def _at_rows(hook: Hook, rows: slice) -> Hook:
    """The hook, applied to some rows of the batch only."""
    site, function = hook

    def edit(tensor: Tensor) -> Tensor:
        out, new = tensor.clone(), function(tensor[rows])
        if new is not None:
            out[rows] = new
        return out

    return (site, edit)


def _keep_where(rows: Tensor, values: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tensor: torch.where(rows, values, tensor)


def _rows(chosen: Bool[Tensor, "variant index"], batch: int, ndim: int) -> Tensor:
    """Lines ``chosen`` up with an activation [(variant batch) pos index ...] of ``ndim`` axes."""
    return repeat(chosen, f"variant index -> (variant batch) 1 index{' 1' * (ndim - 3)}", batch=batch)
