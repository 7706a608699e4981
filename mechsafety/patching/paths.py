"""Path patching (Wang et al. 2022; Goldowsky-Dill et al. 2023), exact and without sweeps of whole forwards.

A sender's change reaches a receiver along direct paths only: attention between them stays as in the base run. What the
change does on its way is computed in closed form for all senders at once, because with attention frozen everything is
local to a position.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from mechsafety.errors import MechsafetyError
from mechsafety.metrics import RefusalLogOdds, adjust_p, bootstrap_interval, sign_flip_p
from mechsafety.models import LensModel
from mechsafety.models.engine import (
    BaseRun,
    Hook,
    capture,
    expand_rows,
    max_variants,
    run_block,
    run_from,
    split_rows,
    unembed,
)
from mechsafety.nodes import Edge, Node, head_and_mlp_nodes
from mechsafety.patching.masks import PairRuns, pair_runs
from mechsafety.prompts import PromptPairs
from mechsafety.results import Provenance, Result, bars
from mechsafety.sites import Site, SiteKind

MLP_OPTIONS = ("recompute", "freeze")
DOWNSTREAM = ("live", "frozen")
_SLOT_SITE = {"q": SiteKind.Q, "k": SiteKind.K, "v": SiteKind.V}
LOGITS = (Node("logits"), "resid")

Receiver = tuple[Node, str]


@dataclass(frozen=True, slots=True)
class PathMap(Result):
    """Exact effects along direct paths from senders to receivers.

    Attributes:
        provenance: Model, options, versions.
        metric: Name and tokens of the metric.
        senders: Where the changes start.
        receivers: (node, slot) pairs where they end; one entry of several receivers when patched jointly.
        changes: Change of the metric towards the source run, in metric units.
        harmful, harmless: Metric of the unpatched runs.
        direction: ``noising`` or ``denoising``.
        mlp: What MLPs between sender and receiver do: ``recompute`` or ``freeze``. Two different quantities.
        downstream: What happens after the receiver: ``live`` or ``frozen``.
    """

    provenance: Provenance
    metric: dict[str, object]
    senders: tuple[Node, ...]
    receivers: tuple[tuple[Receiver, ...], ...]
    changes: Float[Tensor, "sender receiver prompt"]
    harmful: Float[Tensor, " prompt"]
    harmless: Float[Tensor, " prompt"]
    direction: str
    mlp: str
    downstream: str

    def __repr__(self) -> str:
        return f"PathMap({len(self.senders)} senders -> {len(self.receivers)} receivers, mlp={self.mlp})"

    @property
    def gap(self) -> float:
        """Mean metric on harmful less on harmless prompts."""
        return float((self.harmful - self.harmless).mean())

    @property
    def effects(self) -> Float[Tensor, "sender receiver"]:
        """Share of the gap along each path; 0 where a sender comes after the receiver."""
        return self.changes.mean(-1) / self.gap

    def to_dataframe(self, seed: int = 0) -> pd.DataFrame:
        """One row a path, largest absolute effect first, with interval and adjusted p."""
        flat = rearrange(self.changes.cpu().double(), "sender receiver prompt -> (sender receiver) prompt").numpy()
        names = [" + ".join(f"{node}.{slot}" for node, slot in group) for group in self.receivers]
        p_values = adjust_p(sign_flip_p(flat, seed))
        intervals = [bootstrap_interval(row / self.gap, seed) for row in flat]
        frame = pd.DataFrame(
            {
                "sender": [str(sender) for sender in self.senders for _ in names],
                "receiver": [name for _ in self.senders for name in names],
                "effect": flat.mean(1) / self.gap,
                "ci_low": [low for low, _ in intervals],
                "ci_high": [high for _, high in intervals],
                "p_value": p_values,
            }
        )
        return frame.reindex(frame.effect.abs().sort_values(ascending=False, kind="stable").index)

    def plot(self) -> go.Figure:
        """Bar chart of the 30 strongest paths with intervals."""
        frame = self.to_dataframe()
        frame["path"] = frame.sender + " -> " + frame.receiver
        return bars(frame, "path", "effect", "share of the harmful-harmless gap")


def path_patching(
    model: LensModel,
    pairs: PromptPairs | PairRuns,
    metric: RefusalLogOdds,
    *,
    senders: Sequence[Node] | None = None,
    receivers: str | Sequence[Receiver] = "logits",
    mlp: str = "recompute",
    downstream: str = "live",
    joint: bool = False,
    direction: str = "noising",
    positions: str = "all",
    progress: bool = True,
) -> PathMap:
    """Exact effect of the paths from each sender to each receiver.

    The sender's value from the source run changes what the receiver reads; attention between the two stays as in the
    base run. ``mlp="recompute"`` (the IOI paper's definition) lets the MLPs between them respond;
    ``mlp="freeze"`` keeps them too, so that the receiver's input is the base's plus the sender's change. These are
    different quantities and can disagree in sign; the option is stored in the result.

    Args:
        model: The model; head outputs must add up (no norm after attention).
        pairs: Aligned pairs, or their stored runs.
        metric: What is measured.
        senders: Heads and MLPs; every head by default.
        receivers: ``"logits"``, or (node, slot) pairs: a head's ``q``, ``k`` or ``v``, an MLP's ``mlp``.
        mlp: ``recompute`` or ``freeze``.
        downstream: After a receiver other than the logits: ``live`` runs the rest of the model, ``frozen`` adds the
            receiver's change to the final residual stream only.
        joint: Patch all receivers at once instead of one after the other.
        direction: ``noising``: the harmful run is edited; ``denoising``: the harmless one.
        positions: Where the sender's change enters: ``all``, ``instruction`` or ``suffix``.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: Unknown option, a node that cannot send or receive, or a model whose heads do not add up.
    """
    if model.post_norm:
        raise MechsafetyError(f"{model.name} normalises each block's output", expected="a model whose heads add up")
    for name, value, known in (
        ("mlp", mlp, MLP_OPTIONS),
        ("downstream", downstream, DOWNSTREAM),
        ("direction", direction, ("noising", "denoising")),
    ):
        if value not in known:
            raise MechsafetyError(f"{name}={value!r}", expected=f"one of {known}")
    every = [node for node in head_and_mlp_nodes(model.n_layers, model.n_heads) if node.kind == "head"]
    sending = tuple(senders) if senders is not None else tuple(every)
    groups = _groups(receivers, joint)
    _check_ends(sending, groups)
    runs = pairs if isinstance(pairs, PairRuns) else pair_runs(model, pairs)
    base, source = (runs.harmful, runs.harmless) if direction == "noising" else (runs.harmless, runs.harmful)
    where = None if positions == "all" else base.tokens.span_mask(positions)[:, runs.start :]
    harmful, harmless = runs.scores(metric)
    before = metric(base.logits)
    sign = 1.0 if direction == "noising" else -1.0
    changes = torch.zeros(len(sending), len(groups), len(base), device=before.device)
    with torch.no_grad(), tqdm(total=changes[:, :, 0].numel(), desc="paths", disable=not progress, leave=False) as bar:
        for column, group in enumerate(groups):
            for rows, logits in _paths(model, base, source, sending, group, mlp, downstream, where):
                changes[rows, column] = sign * (before - metric(logits))
                bar.update(len(rows))
    options = {
        "mlp": mlp,
        "downstream": downstream,
        "joint": joint,
        "direction": direction,
        "positions": positions,
        "pairs": len(base),
    }
    return PathMap(
        model.provenance(options=options),
        metric.to_json(),
        sending,
        groups,
        changes,
        harmful,
        harmless,
        direction,
        mlp,
        downstream,
    )


def node_outputs(model: LensModel, run: BaseRun, nodes: Sequence[Node]) -> Float[Tensor, "node batch pos d_model"]:
    """What each head or MLP writes to the residual stream in a stored run, float32."""
    rows = []
    for node in nodes:
        if node.kind == "head":
            z = run.acts[SiteKind.Z][node.layer][:, :, node.index].float()
            weight = model.W_O(node.layer or 0)[node.index].float()
            rows.append(einsum(z, weight, "batch pos d_head, d_head d_model -> batch pos d_model"))
        else:
            rows.append(run.acts[SiteKind.MLP_OUT][node.layer].float())
    return torch.stack(rows)


def edge_logits(
    model: LensModel,
    base: BaseRun,
    receivers: Sequence[Receiver],
    delta: Float[Tensor, "variant batch pos d_model"],
    downstream: str = "live",
) -> Float[Tensor, "variant batch d_vocab"]:
    """Logits when each variant's ``delta`` is added to what its receiver's slot reads, and to nothing else.

    Args:
        model: The model.
        base: The run that is edited.
        receivers: One a variant; all in one layer and one slot.
        delta: Change of the receiver's input.
        downstream: ``live`` or ``frozen``.
    """
    node, slot = receivers[0]
    rows = rearrange(delta, "variant batch pos d -> (variant batch) pos d").to(base.resid.dtype)
    if node.kind == "logits":
        final = expand_rows(base.resid[-1], len(receivers)) + rows
        return split_rows(unembed(model, final[:, -1]), len(receivers))
    layer = node.layer or 0
    resid = expand_rows(base.resid[layer], len(receivers))
    hooks = [_receiver_edit(model, base, layer, slot, [n.index or 0 for n, _ in receivers], resid, rows)]
    if downstream == "frozen":
        changed = run_block(model, base, layer, resid, hooks) - expand_rows(base.resid[layer + 1], len(receivers))
        if slot != "mlp":  # the block's own MLP has seen the change; frozen means that it has not
            changed = _head_change(model, base, layer, receivers, hooks)
        final = expand_rows(base.resid[-1], len(receivers)) + changed
        return split_rows(unembed(model, final[:, -1]), len(receivers))
    return split_rows(run_from(model, base, layer, resid, hooks), len(receivers))


def propagate(
    model: LensModel,
    base: BaseRun,
    source: BaseRun,
    senders: Sequence[Node],
    stop: int,
    *,
    mlp: str,
    at: slice = slice(None),
    positions: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "sender batch column d_model"]:
    """Change of the residual stream before block ``stop`` when each sender alone takes its source value.

    Attention is frozen. With ``mlp="recompute"`` the MLPs on the way respond to the change, all senders in one batch.

    Args:
        model: The model.
        base: The run that is edited.
        source: Where the senders' values come from.
        senders: In any order; those at or after block ``stop`` change nothing.
        stop: Block whose input is asked for; ``n_layers`` for the final residual stream.
        mlp: ``recompute`` or ``freeze``.
        at: Columns to compute (everything is local to a column).
        positions: Columns in which senders change; all by default.
    """
    own = node_outputs(model, source, senders) - node_outputs(model, base, senders)
    if positions is not None:
        own = own * rearrange(positions, "batch pos -> 1 batch pos 1")
    own = own[:, :, at].to(base.resid.dtype)
    layers = torch.tensor([node.layer or 0 for node in senders], device=own.device)
    own = own * rearrange(layers < stop, "sender -> sender 1 1 1")
    if mlp == "freeze":
        return own
    is_head = torch.tensor([node.kind == "head" for node in senders], device=own.device)
    change = torch.zeros_like(own)
    for layer in range(min(stop, model.n_layers)):
        starts_here = (layers == layer) & is_head
        middle = change + own * rearrange(starts_here, "sender -> sender 1 1 1")
        live = ((layers < layer) | starts_here).nonzero().flatten()
        mlp_base = base.acts[SiteKind.MLP_OUT][layer][:, at]
        after_attention = base.resid[layer + 1][:, at] - mlp_base
        reads = base.resid[layer][:, at] if model.parallel else after_attention
        # in a parallel block the MLP reads the stream before attention, so a head of its layer does not reach it
        reached = (change if model.parallel else middle)[live]
        change = middle
        if len(live):
            new = model.mlp(layer, rearrange(reads + reached, "sender batch pos d -> (sender batch) pos d"))
            change[live] = middle[live] + split_rows(new, len(live)) - mlp_base
        change = change + own * rearrange((layers == layer) & ~is_head, "sender -> sender 1 1 1")
    return change


def _paths(
    model: LensModel,
    base: BaseRun,
    source: BaseRun,
    senders: Sequence[Node],
    group: Sequence[Receiver],
    mlp: str,
    downstream: str,
    where: Tensor | None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Sender indices and logits [sender batch d_vocab], in chunks that fit an engine batch."""
    to_logits = group[0] == LOGITS
    last = slice(base.n_pos - 1, base.n_pos)
    columns = 1 if to_logits else base.n_pos
    size = max(1, max_variants(base) * base.n_pos // columns)
    first_reader = min((_stop(model, receiver) for receiver in group), default=0)
    reach = [k for k, node in enumerate(senders) if any(_reaches(model, node, receiver) for receiver in group)]
    reach.sort(key=lambda k: senders[k].order)
    for begin in range(0, len(reach), size):
        rows = reach[begin : begin + size]
        chunk = [senders[k] for k in rows]
        if to_logits:
            change = propagate(model, base, source, chunk, model.n_layers, mlp=mlp, at=last, positions=where)
            final = expand_rows(base.resid[-1][:, -1:], len(rows)) + rearrange(change, "s b p d -> (s b) p d")
            yield rows, split_rows(unembed(model, final)[:, 0], len(rows))
        elif len(group) == 1:
            delta = _delta(model, base, source, chunk, group[0], mlp, where)
            yield rows, edge_logits(model, base, [group[0]] * len(rows), delta, downstream)
        else:
            resid = expand_rows(base.resid[first_reader], len(rows))
            hooks: list[Hook] = []
            for receiver in group:
                delta = _delta(model, base, source, chunk, receiver, mlp, where)
                layer = receiver[0].layer or 0
                own = expand_rows(base.resid[layer], len(rows))
                flat = rearrange(delta, "variant batch pos d -> (variant batch) pos d").to(own.dtype)
                heads = [receiver[0].index or 0] * len(rows)
                hooks.append(_receiver_edit(model, base, layer, receiver[1], heads, own, flat))
            yield rows, split_rows(run_from(model, base, first_reader, resid, hooks), len(rows))


def _delta(
    model: LensModel,
    base: BaseRun,
    source: BaseRun,
    senders: Sequence[Node],
    receiver: Receiver,
    mlp: str,
    where: Tensor | None,
) -> Float[Tensor, "sender batch pos d_model"]:
    """Change of what a receiver reads."""
    node, slot = receiver
    layer = node.layer or 0
    change = propagate(model, base, source, senders, layer, mlp=mlp, positions=where)
    if slot == "mlp" and not model.parallel:
        # heads of the MLP's own layer reach it too
        same = [k for k, sender in enumerate(senders) if sender.kind == "head" and sender.layer == layer]
        if same:
            picked = [senders[k] for k in same]
            own = node_outputs(model, source, picked) - node_outputs(model, base, picked)
            if where is not None:
                own = own * rearrange(where, "batch pos -> 1 batch pos 1")
            change[same] = own.to(change.dtype)
    return change


def _receiver_edit(
    model: LensModel, base: BaseRun, layer: int, slot: str, heads: Sequence[int], resid: Tensor, delta: Tensor
) -> Hook:
    """The hook that gives each row's receiver the output it has when its slot reads ``delta`` more."""
    if slot == "mlp":
        mlp_base = expand_rows(base.acts[SiteKind.MLP_OUT][layer], len(heads))
        reads = resid if model.parallel else expand_rows(base.resid[layer + 1], len(heads)) - mlp_base
        new = model.mlp(layer, reads + delta)
        return (Site(SiteKind.MLP_OUT, layer), lambda tensor: new)
    site, z_site = Site(_SLOT_SITE[slot], layer), Site(SiteKind.Z, layer)
    read = capture(model, base, layer, resid + delta, site)
    # the changed slot may be shared by a group of heads: only the receiver's own z is kept from the run that has it
    mixed = capture(model, base, layer, resid, z_site, [(site, lambda tensor: read)])
    chosen = torch.nn.functional.one_hot(torch.tensor(heads, device=resid.device), model.n_heads).bool()
    rows = repeat(chosen, "variant head -> (variant batch) 1 head 1", batch=len(base))
    return (z_site, lambda tensor: torch.where(rows, mixed, tensor))


def _head_change(
    model: LensModel, base: BaseRun, layer: int, receivers: Sequence[Receiver], hooks: Sequence[Hook]
) -> Float[Tensor, "row pos d_model"]:
    """What the receiving heads write more, alone."""
    before = expand_rows(base.acts[SiteKind.Z][layer], len(receivers))
    edited = hooks[0][1](before)
    change = ((before if edited is None else edited) - before).float()
    weights = model.W_O(layer).float()
    out = einsum(change, weights, "row pos head d_head, head d_head d_model -> row pos d_model")
    return out.to(base.resid.dtype)


def _groups(receivers: str | Sequence[Receiver], joint: bool) -> tuple[tuple[Receiver, ...], ...]:
    if isinstance(receivers, str):
        if receivers != "logits":
            raise MechsafetyError(f"receivers={receivers!r}", expected="'logits' or (node, slot) pairs")
        return ((LOGITS,),)
    listed = tuple((node, slot) for node, slot in receivers)
    if joint and LOGITS in listed:
        raise MechsafetyError("the logits cannot be a joint receiver", cure="patch them in a call of their own")
    return (listed,) if joint else tuple((receiver,) for receiver in listed)


def _check_ends(senders: Sequence[Node], groups: Sequence[Sequence[Receiver]]) -> None:
    for node in senders:
        if node.kind not in ("head", "mlp"):
            raise MechsafetyError(f"{node} cannot send", expected="heads and MLPs")
    slots = {"head": ("q", "k", "v"), "mlp": ("mlp",), "logits": ("resid",)}
    for node, slot in (receiver for group in groups for receiver in group):
        if slot not in slots.get(node.kind, ()):
            raise MechsafetyError(f"{node} has no slot {slot!r}", expected=f"one of {slots}")


def _stop(model: LensModel, receiver: Receiver) -> int:
    return model.n_layers if receiver[0].kind == "logits" else receiver[0].layer or 0


def _reaches(model: LensModel, sender: Node, receiver: Receiver) -> bool:
    """Whether the sender's output is part of what the receiver reads."""
    return reaches(sender, receiver[0], parallel=model.parallel)


def reaches(sender: Node, receiver: Node, *, parallel: bool) -> bool:
    """Whether a node's output is part of another's input.

    Args:
        sender: Embedding, head or MLP.
        receiver: Head, MLP or logits.
        parallel: Whether attention and MLP of a block read the same stream (GPT-NeoX).
    """
    if receiver.kind == "logits" or sender.kind == "embed":
        return True
    if sender.layer == receiver.layer:
        return sender.kind == "head" and receiver.kind == "mlp" and not parallel
    return (sender.layer or 0) < (receiver.layer or 0)


def measured_edges(
    model: LensModel, runs: PairRuns, metric: RefusalLogOdds, edges: Sequence[Edge]
) -> Float[Tensor, "edge prompt"]:
    """Change of the metric along single edges, MLPs frozen between the ends, everything after the receiver live."""
    harmful, _ = runs.scores(metric)
    base, source = runs.harmful, runs.harmless
    order: dict[tuple[int, str], list[int]] = {}
    for index, edge in enumerate(edges):
        order.setdefault((_stop(model, (edge.receiver, edge.slot)), edge.slot), []).append(index)
    changes = torch.zeros(len(edges), len(base), device=harmful.device)
    size = max_variants(base)
    with torch.no_grad():
        for members in order.values():
            for first in range(0, len(members), size):
                chunk = members[first : first + size]
                senders = [edges[k].sender for k in chunk]
                delta = node_outputs(model, source, senders) - node_outputs(model, base, senders)
                receivers = [(edges[k].receiver, edges[k].slot) for k in chunk]
                changes[chunk] = harmful - metric(edge_logits(model, base, receivers, delta))
    return changes
