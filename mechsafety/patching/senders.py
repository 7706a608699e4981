"""Senders of path patching: what changes, and how the change travels along the residual stream with attention frozen.

A *moment* is the number of a place in the residual stream: ``2 * layer`` before a block, ``2 * layer + 1`` after its
attention, ``2 * n_layers`` before the final norm. A sender's change enters at one moment. A receiver reads at one.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.models import LensModel
from mechsafety.models.engine import BaseRun, check_current, split_rows
from mechsafety.models.parts import check_exists
from mechsafety.nodes import Node, as_node
from mechsafety.patching.masks import stored
from mechsafety.patching.norms import NormOption, at_own_scale, keep_scales, mlp_norms, norm_behind, through_norm
from mechsafety.patching.sources import column_masks
from mechsafety.prompts.spans import SPANS
from mechsafety.sites import Site, SiteKind

MlpOption = Literal["recompute", "freeze"]
STREAM = (SiteKind.RESID_PRE, SiteKind.RESID_MID, SiteKind.RESID_POST)


@dataclass(frozen=True, slots=True)
class At:
    """A sender that changes at some positions only.

    Attributes:
        part: A node, or the whole residual stream at a site.
        positions: A span (``prefix``, ``instruction``, ``suffix``), or positions counted from the end (-1 is the last).

    Example:
        >>> str(At(Node("head", 0, 1), "instruction")), str(At(Site("resid_pre", 2), (-3, -1)))
        ('L0.H1 @ instruction', 'L2.resid_pre @ -3,-1')
    """

    part: Node | Site
    positions: str | tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.part, Site):
            object.__setattr__(self, "part", as_node(self.part))
        if isinstance(self.positions, str) and self.positions not in SPANS:
            raise MechsafetyError(
                f"positions={self.positions!r}", expected=f"one of {SPANS}, or positions from the end"
            )

    def __str__(self) -> str:
        shown = self.positions if isinstance(self.positions, str) else ",".join(map(str, self.positions))
        return f"{self.part} @ {shown}"


Sender = Node | Site | At


def as_sender(given: "Sender | str") -> Sender:
    """A sender; a text is the name of a node."""
    return given if isinstance(given, Site | At) else as_node(given)


def as_senders(given: "Sender | str | Iterable[Sender | str]") -> tuple[Sender, ...]:
    """Several senders; a single one counts as one."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        return (as_sender(given),)
    return tuple(map(as_sender, given))


def part_of(sender: Sender) -> Node | Site:
    """The node or site of a sender, without its positions."""
    return sender.part if isinstance(sender, At) else sender


def entry(sender: Sender) -> int:
    """The moment at which a sender's change enters the residual stream."""
    part = part_of(sender)
    layer = part.layer or 0
    if part.kind == "embed":
        return 0
    if part.kind in (SiteKind.RESID_PRE, SiteKind.RESID_MID):
        return 2 * layer + (part.kind is SiteKind.RESID_MID)
    return 2 * layer + (1 if part.kind == "head" else 2)


def check_senders(model: LensModel, senders: Sequence[Sender]) -> None:
    """Raise a `MechsafetyError` for a sender that cannot send in this model."""
    if not senders:
        raise MechsafetyError("no senders", expected="at least one")
    for sender in senders:
        part = part_of(sender)
        if (isinstance(part, Node) and part.kind == "logits") or (isinstance(part, Site) and part.kind not in STREAM):
            raise MechsafetyError(
                f"{sender} cannot send",
                expected="the embedding, heads, MLPs, neurons, or a site of the residual stream",
            )
        if part.kind is SiteKind.RESID_MID and model.parallel:
            raise MechsafetyError(f"{model.name} has no residual stream between attention and MLP")
        if isinstance(part, Node):
            check_exists(model, part)
        elif not 0 <= (part.layer or 0) < model.n_layers:
            raise MechsafetyError(
                f"{part} does not exist in {model.name}", expected=f"layers 0 to {model.n_layers - 1}"
            )


def extra_kinds(senders: Sequence[Sender]) -> tuple[SiteKind, ...]:
    """Site kinds that runs must hold for these senders, besides the outputs of heads and MLPs."""
    return (SiteKind.NEURONS,) if any(part_of(sender).kind == "neuron" for sender in senders) else ()


def node_outputs(
    model: LensModel, run: BaseRun, nodes: Sequence[Node], at: slice = slice(None)
) -> Float[Tensor, "node batch column d_model"]:
    """What each head, MLP or neuron adds to the residual stream in a stored run, float32.

    If a norm follows attention or MLP (Gemma-2, OLMo-2), a node adds its share of the norm of the layer's sum. The
    norm's scale is the run's own. The outputs of a layer's heads (neurons) and its bias thus add up to what the layer
    adds.

    Args:
        model: The model.
        run: A run that holds what the nodes need; for neurons, ``neurons``.
        nodes: The nodes, in any order.
        at: Columns to compute.

    Raises:
        MechsafetyError: A node is ``embed`` or ``logits``.
    """
    strange = next((node for node in nodes if node.kind not in ("head", "mlp", "neuron")), None)
    if strange is not None:
        raise MechsafetyError(f"{strange} writes nothing of its own", expected="heads, MLPs or neurons")
    resid = run.resid[0][:, at]
    out = torch.zeros(len(nodes), *resid.shape, device=resid.device)
    for (kind, layer), rows in _by_sublayer(nodes).items():
        if kind == "mlp":
            out[rows] = run.acts[SiteKind.MLP_OUT][layer][:, at].float()
        else:
            indices = [nodes[row].index or 0 for row in rows]
            written = _through_weights(model, kind, layer, indices, _values(run, kind, layer, indices, at))
            out[rows] = own_share(model, run, layer, kind, at)(written)
    return out


def sender_changes(
    model: LensModel,
    base: BaseRun,
    source: BaseRun,
    senders: Sequence[Sender],
    *,
    norm: NormOption = "recompute",
    at: slice = slice(None),
    positions: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "sender batch column d_model"]:
    """What each sender adds to the residual stream when it alone takes its source value; float32.

    If a norm follows attention or MLP (Gemma-2, OLMo-2), a head's or neuron's change is the norm of the changed sum
    minus the norm of the base's sum.

    Args:
        model: The model.
        base: The run that is edited.
        source: Where the senders' values come from.
        senders: The senders, in any order.
        norm: ``recompute`` or ``freeze``, for norms after attention and MLP.
        at: Columns to compute.
        positions: Columns in which senders change; all by default.
    """
    out = written_changes(model, base, source, senders, at=at, positions=positions)
    for (kind, layer), rows in _by_sublayer(senders).items():
        if kind in ("head", "neuron"):
            out[rows] = behind_norm(model, base, layer, kind, out[rows], norm, at)
    return out


def written_changes(
    model: LensModel,
    base: BaseRun,
    source: BaseRun,
    senders: Sequence[Sender],
    *,
    at: slice = slice(None),
    positions: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "sender batch column d_model"]:
    """Source minus base of what each sender itself writes, before any norm after it; arguments as `sender_changes`."""
    check_current(model, base, source)
    resid = base.resid[0][:, at]
    out = torch.zeros(len(senders), *resid.shape, device=resid.device)
    for (kind, layer), rows in _by_sublayer(senders).items():
        indices = [part_of(senders[row]).index or 0 for row in rows]
        out[rows] = _own_changes(model, base, source, kind, layer, indices, at)
        for row in rows:
            for where in _limits(base, senders[row], positions):
                out[row] *= rearrange(where[:, at], "batch pos -> batch pos 1")
    return out


def added_changes(
    model: LensModel, base: BaseRun, source: BaseRun, nodes: Sequence[Node], *, at: slice = slice(None)
) -> Float[Tensor, "node batch pos d_model"]:
    """Source minus base of what each node adds to the residual stream, as in `node_outputs`; float32.

    The changes of a layer's heads (neurons) add up to the change of the layer. This holds with a norm after them too,
    because the norm keeps each run's own scale. Patching one node alone then has another effect (see `sender_changes`).

    Args:
        model: The model.
        base: The run that is edited.
        source: Where the nodes' values come from.
        nodes: The embedding, heads, MLPs and neurons, in any order.
        at: Columns to compute.
    """
    out = written_changes(model, base, source, nodes, at=at)
    for (kind, layer), rows in _by_sublayer(nodes).items():
        if kind in ("head", "neuron") and norm_behind(model, layer, kind) is not None:
            some = [nodes[row] for row in rows]
            out[rows] = node_outputs(model, source, some, at) - node_outputs(model, base, some, at)
    return out


def added_sum(
    model: LensModel, base: BaseRun, source: BaseRun, nodes: Sequence[Node]
) -> Float[Tensor, "batch pos d_model"]:
    """Sum of `added_changes` over nodes; one tensor is held per kind and layer, however many neurons there are."""
    check_current(model, base, source)
    total = torch.zeros_like(base.resid[0], dtype=torch.float32)
    for (kind, layer), rows in _by_sublayer(nodes).items():
        if kind not in ("head", "neuron"):
            total += _own_changes(model, base, source, kind, layer, [0], slice(None))[0]
            continue
        indices = [nodes[row].index or 0 for row in rows]
        written = []
        for run in (base, source):
            values = _values(run, kind, layer, indices, slice(None))
            if kind == "head":
                weights = model.W_O(layer)[indices].float()
                own = einsum(values, weights, "batch pos node d_head, node d_head d_model -> batch pos d_model")
            else:
                own = values @ neuron_weights(model, layer)[indices]
            written.append(own_share(model, run, layer, kind)(own))
        total += written[1] - written[0]
    return total


def _by_sublayer(senders: Sequence[Sender]) -> dict[tuple[str, int], list[int]]:
    """Rows of the senders of each kind and layer."""
    groups: dict[tuple[str, int], list[int]] = {}
    for row, sender in enumerate(senders):
        groups.setdefault((part_of(sender).kind, part_of(sender).layer or 0), []).append(row)
    return groups


def propagate(
    model: LensModel,
    base: BaseRun,
    source: BaseRun,
    senders: Sequence[Sender],
    stop: int,
    *,
    mlp: str,
    norm: NormOption = "recompute",
    at: slice = slice(None),
    positions: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "sender batch column d_model"]:
    """Change of the residual stream at moment ``stop`` when each sender alone takes its source value.

    Attention is frozen. With ``mlp="recompute"`` the MLPs on the way respond to the change, all senders in one batch.

    Args:
        model: The model.
        base: The run that is edited.
        source: Where the senders' values come from.
        senders: The senders, in any order; those that enter after ``stop`` change nothing.
        stop: Moment at which the change is read.
        mlp: ``recompute`` or ``freeze``.
        norm: ``recompute``, or ``freeze`` for norms on the way that keep the base run's scale.
        at: Columns to compute (everything is local to a column).
        positions: Columns in which senders change; all by default.

    Raises:
        MechsafetyError: ``mlp`` is ``recompute``, and the run holds nodes at fixed values.
    """
    if base.fixed and mlp == "recompute":
        raise MechsafetyError("runs in which nodes are knocked out", expected="mlp='freeze' on such runs")
    # sort senders by the moment at which they enter, so that those that have entered are the first rows
    order = sorted(range(len(senders)), key=lambda row: entry(senders[row]))
    ordered = [senders[row] for row in order]
    enters = [entry(sender) for sender in ordered]
    change = sender_changes(model, base, source, ordered, norm=norm, at=at, positions=positions).to(base.resid.dtype)
    change[sum(moment <= stop for moment in enters) :] = 0
    if mlp == "recompute":
        for layer in range(enters[0] // 2, model.n_layers):
            # in a parallel block the MLP reads the stream before attention, so a head of its layer does not reach it
            reads = 2 * layer + (0 if model.parallel else 1)
            live = sum(moment <= reads for moment in enters)
            if 2 * layer + 2 > stop:
                break
            if live:
                change[:live] += _mlp_response(model, base, layer, change[:live], norm, at)
    back = torch.empty(len(order), dtype=torch.long, device=change.device)
    back[torch.tensor(order, device=change.device)] = torch.arange(len(order), device=change.device)
    return change[back]


def mlp_input(model: LensModel, base: BaseRun, layer: int, at: slice = slice(None)) -> Float[Tensor, "batch pos d"]:
    """The residual stream that a layer's MLP reads in the base run."""
    if model.parallel:
        return base.resid[layer][:, at]
    return base.resid[layer + 1][:, at] - base.acts[SiteKind.MLP_OUT][layer][:, at]


def behind_norm(
    model: LensModel,
    base: BaseRun,
    layer: int,
    kind: str,
    change: Float[Tensor, "variant batch column d_model"],
    norm: str,
    at: slice = slice(None),
) -> Float[Tensor, "variant batch column d_model"]:
    """Change of the residual stream when the sum of what a layer's heads (neurons) write changes; float32.

    Without a norm after the sum, it is the change itself.
    """
    module = norm_behind(model, layer, kind)
    if module is None:
        return change
    total = written_sum(model, base, layer, kind, at)
    return through_norm(model, module, total.to(base.resid.dtype), change, norm).float()


def written_sum(
    model: LensModel, run: BaseRun, layer: int, kind: str, at: slice = slice(None)
) -> Float[Tensor, "batch column d_model"]:
    """Sum of what all heads (neurons) of a layer and its bias write, before any norm after them; float32."""
    if kind == "head":
        z, weights, bias = run.acts[SiteKind.Z][layer], model.W_O(layer), model.backend.b_O(layer)
        total = einsum(z[:, at].float(), weights.float(), "batch pos head k, head k d_model -> batch pos d_model")
    else:
        total = stored(run.acts, SiteKind.NEURONS)[layer][:, at].float() @ neuron_weights(model, layer)
        bias = model.backend.b_out(layer)
    return total + bias.float()


def own_share(
    model: LensModel, run: BaseRun, layer: int, kind: str, at: slice = slice(None)
) -> Callable[[Tensor], Tensor]:
    """Function from a part of what a layer's heads (neurons) write to what the stream gets, at the run's own scale."""
    module = norm_behind(model, layer, kind)
    if module is None:
        return lambda part: part
    return at_own_scale(model, module, written_sum(model, run, layer, kind, at))


def _values(run: BaseRun, kind: str, layer: int, indices: Sequence[int], at: slice) -> Float[Tensor, "batch pos ..."]:
    """The input of the output weights of some heads (neurons) of a layer in a run; float32."""
    if kind == "head":
        return run.acts[SiteKind.Z][layer][:, at][:, :, indices].float()
    return stored(run.acts, SiteKind.NEURONS)[layer][:, at][..., indices].float()


def _through_weights(
    model: LensModel, kind: str, layer: int, indices: Sequence[int], values: Float[Tensor, "batch pos ..."]
) -> Float[Tensor, "node batch pos d_model"]:
    """What some heads (neurons) of a layer write with such values, before any norm after them; float32."""
    if kind == "head":
        weights = model.W_O(layer)[indices].float()
        return einsum(values, weights, "batch pos node d_head, node d_head d_model -> node batch pos d_model")
    return einsum(
        values, neuron_weights(model, layer)[indices], "batch pos node, node d_model -> node batch pos d_model"
    )


def neuron_weights(model: LensModel, layer: int) -> Float[Tensor, "d_mlp d_model"]:
    """What each neuron of a layer writes per unit of its activation; float32."""
    return model.W_out(layer).float()


def _mlp_response(
    model: LensModel, base: BaseRun, layer: int, change: Float[Tensor, "s batch pos d"], norm: str, at: slice
) -> Float[Tensor, "s batch pos d"]:
    """Change of an MLP's output when what it reads changes."""
    reads = mlp_input(model, base, layer, at)
    rows = rearrange(reads + change, "sender batch pos d -> (sender batch) pos d")
    with keep_scales(model, norm, mlp_norms(model, layer), lambda: model.mlp(layer, reads)):
        new = model.mlp(layer, rows)
    return split_rows(new, len(change)) - base.acts[SiteKind.MLP_OUT][layer][:, at]


def _own_changes(
    model: LensModel, base: BaseRun, source: BaseRun, kind: str, layer: int, indices: Sequence[int], at: slice
) -> Float[Tensor, "sender batch column d_model"]:
    """Source minus base of what senders of one kind and layer write."""
    if kind in ("head", "neuron"):
        old, new = (_values(run, kind, layer, indices, at) for run in (base, source))
        return _through_weights(model, kind, layer, indices, new - old)
    whole = [stream(run, kind, layer)[:, at].float() for run in (base, source)]
    return rearrange(whole[1] - whole[0], "batch pos d -> 1 batch pos d").expand(len(indices), -1, -1, -1)


def stream(run: BaseRun, kind: str, layer: int) -> Float[Tensor, "batch pos d_model"]:
    """Stored output of an MLP, or the residual stream at a site."""
    if kind == "mlp":
        return run.acts[SiteKind.MLP_OUT][layer]
    if kind == SiteKind.RESID_MID:
        return run.resid[layer + 1] - run.acts[SiteKind.MLP_OUT][layer]
    return run.resid[layer + (kind == SiteKind.RESID_POST)]


def _limits(
    base: BaseRun, sender: Sender, positions: Bool[Tensor, "batch pos"] | None
) -> list[Bool[Tensor, "batch pos"]]:
    """Masks of the columns in which a sender may change: those of the call, and the sender's own."""
    masks = [] if positions is None else [positions]
    if isinstance(sender, At):
        masks += column_masks(base, base.start, sender.positions)[1]
    return masks
