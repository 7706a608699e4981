"""Path patching (Wang et al. 2022; Goldowsky-Dill et al. 2023), exact and without a whole forward per path.

A sender's change reaches a receiver along direct paths only: attention between them stays as in the base run. With
attention frozen, everything is local to a position. The change is therefore computed in closed form for all senders at
once.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import public
from mechsafety.metrics import RefusalLogOdds, check_gap
from mechsafety.models import LensModel
from mechsafety.models.engine import BaseRun, max_variants
from mechsafety.nodes import Edge, Node, NodeLike, as_node, head_and_mlp_nodes
from mechsafety.patching.activation import PatchDirection
from mechsafety.patching.masks import PairRuns, pair_runs
from mechsafety.patching.norms import NormOption
from mechsafety.patching.path_map import PathMap
from mechsafety.patching.readout import final_scores
from mechsafety.patching.receivers import (
    INTO_LOGITS,
    Downstream,
    Projection,
    Receiver,
    check_receivers,
    frozen_change,
    live_logits,
    read_moment,
    slot_edit,
)
from mechsafety.patching.senders import (
    At,
    MlpOption,
    Sender,
    as_senders,
    check_senders,
    entry,
    extra_kinds,
    propagate,
    stream,
)
from mechsafety.patching.sources import check_start, column_masks
from mechsafety.progress import progress_bar
from mechsafety.prompts import PromptPairs, omissions
from mechsafety.scale.work import sweeps, work
from mechsafety.sites import Site, SiteKind


@sweeps
@public
def path_patching(
    model: LensModel,
    pairs: PromptPairs | PairRuns,
    metric: RefusalLogOdds,
    *,
    senders: Sender | str | Sequence[Sender | str] | None = None,
    receivers: str | Sequence[tuple[NodeLike, str]] = "logits",
    mlp: MlpOption = "recompute",
    norm: NormOption = "recompute",
    downstream: Downstream = "live",
    joint: bool = False,
    direction: PatchDirection = "noising",
    positions: str | Sequence[int] = "all",
    progress: bool = True,
) -> PathMap:
    """Exact effect of the paths from each sender to each receiver.

    The sender takes its value from the source run, which changes what the receiver reads. Attention between the two
    stays as in the base run. With ``mlp="recompute"`` (the IOI paper's definition), the MLPs between them respond. With
    ``mlp="freeze"``, these MLPs stay as in the base run too. The receiver's input is then the base's plus the sender's
    change. The two options are different quantities and can disagree in sign. The result stores the option. Formulas:
    docs/methods.md.

    Args:
        model: The model.
        pairs: Pairs, of which only those that align are used; or their stored runs, which must hold ``neurons`` if
            neurons send.
        metric: What is measured.
        senders: The embedding, heads, MLPs and neurons (a `Node` or its name), or the whole residual stream at a layer
            (`Site` of kind ``resid_pre``, ``resid_mid`` or ``resid_post``). Any of these may be `At` some positions. By
            default every head sends.
        receivers: ``"logits"``, or (node, slot) pairs: a head's ``q``, ``k`` or ``v``, an MLP's or neuron's ``mlp``.
            For a direction (`Projection`) see `path_projection`, which needs no metric.
        mlp: ``recompute`` or ``freeze``.
        norm: What the norms do that read the change (the receiver's included) and the norms after attention and MLP.
            ``recompute`` takes the exact norm of the changed input. ``freeze`` keeps the base run's scale, which makes
            the norms linear. Norms of queries and keys (Qwen-3) are part of the head and always recomputed.
        downstream: What happens after a receiver other than the logits. ``live`` runs the rest of the model.
            ``frozen`` only adds the receiver's change to the final residual stream.
        joint: Patch all receivers at once instead of one after the other.
        direction: ``noising``: the harmful run is edited; ``denoising``: the harmless run is.
        positions: Where the senders' changes enter: ``all``, ``prefix``, ``instruction``, ``suffix``, positions
            counted from the end, or ``each``. With ``each``, every sender is measured once per position, as `At`.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: An option is unknown, or a node cannot send or receive.

    Example:
        >>> found = ms.path_patching(model, pairs, metric, senders=["L1.H3", "L3.MLP"])
        >>> decoy, production = found.effects[:, 0].tolist()  # paths to the logits
        >>> abs(decoy) < 0.1, production > 0.9
        (True, True)
    """
    groups = _groups(receivers, joint)
    for group in groups:
        check_receivers(model, group)
    neurons = any(node.kind == "neuron" for group in groups for node, _ in group)
    task = _task(model, pairs, senders, mlp, norm, direction, positions, (SiteKind.NEURONS,) if neurons else ())
    check_gap(*task.runs.scores(metric))
    before = metric(task.base.logits)
    changes = torch.zeros(len(task.senders), len(groups), len(task.base), device=before.device)
    stops = Counter(_stop(model, group) for group in groups)
    total = sum(times * len(task.reaching(stop)) for stop, times in stops.items())
    with torch.no_grad(), progress_bar(total=total, desc="paths", show=progress) as bar:
        for column, group in enumerate(groups):
            for rows, scores in _paths(task, group, metric, downstream):
                changes[rows, column] = task.sign * (before - scores.to(before.device))
                bar.update(len(rows))
    return task.result(metric.to_json(), groups, changes, task.runs.scores(metric), downstream, joint)


@sweeps
@public
def path_projection(
    model: LensModel,
    pairs: PromptPairs | PairRuns,
    projection: Projection,
    *,
    senders: Sender | str | Sequence[Sender | str] | None = None,
    mlp: MlpOption = "recompute",
    norm: NormOption = "recompute",
    direction: PatchDirection = "noising",
    positions: str | Sequence[int] = "all",
    progress: bool = True,
) -> PathMap:
    """How far each sender's direct paths move the residual stream along a direction; no metric is needed.

    This is `path_patching` with the direction as the receiver. The result's ``changes`` are changes of the projection,
    in units of the residual stream. Its ``harmful`` and ``harmless`` are the projections of the unpatched runs.

    Args:
        model: The model.
        pairs: Pairs, of which only those that align are used; or their stored runs.
        projection: The unit vector, and where in the residual stream it is read.
        senders: As for `path_patching`; those after the projection's site change nothing.
        mlp: ``recompute`` or ``freeze``.
        norm: ``recompute`` or ``freeze``, for the norms of MLPs on the way and the norms after attention and MLP.
        direction: ``noising`` or ``denoising``.
        positions: As for `path_patching`.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: An option is unknown, a node cannot send, or the site or the vector does not fit the model.

    Example:
        >>> towards = ms.patching.Projection(direction.vector / direction.vector.norm(), ms.Site("resid_post", 3))
        >>> ms.patching.path_projection(model, pairs, towards, senders=["L3.H1"]).effects.shape
        torch.Size([1, 1])
    """
    check_senders(model, [projection.site])
    if len(projection.vector) != model.d_model:
        raise MechsafetyError(f"a direction of {len(projection.vector)} numbers", expected=f"d_model = {model.d_model}")
    task = _task(model, pairs, senders, mlp, norm, direction, positions, ())
    vector = projection.vector.to(model.device).float()
    (columns,) = column_masks(task.base, task.runs.start, projection.positions)[1]
    if not bool(columns.any(1).all()):
        raise MechsafetyError(f"positions={projection.positions!r}", expected="positions from the first difference on")
    weight = columns.float() / columns.sum(1, keepdim=True)

    def project(resid: Tensor) -> Tensor:
        return einsum(resid.float(), vector, weight, "... batch pos d, d, batch pos -> ... batch")

    changes = torch.zeros(len(task.senders), 1, len(task.base), device=model.device)
    size = max_variants(task.base)
    kind, layer = projection.site.kind, projection.site.layer or 0
    harmful, harmless = (project(stream(run, kind, layer)) for run in (task.runs.harmful, task.runs.harmless))
    total = len(task.reaching(projection.moment))
    with torch.no_grad(), progress_bar(total=total, desc="paths", show=progress) as bar:
        chunks = list(task.chunks(projection.moment, size))
        found = work("paths", chunks, lambda rows: project(task.change(rows, projection.moment)), Tensor)
        for rows, moved in zip(chunks, found, strict=True):
            changes[rows, 0] = -task.sign * moved.to(changes.device)
            bar.update(len(rows))
    about: dict[str, object] = {
        "name": "projection",
        "site": str(projection.site),
        "positions": _shown(projection.positions),
    }
    groups = (((projection.site, "resid"),),)
    return task.result(about, groups, changes, (harmful, harmless), "frozen", False)


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """Input of both kinds of path patching: the runs, the senders, and how changes travel."""

    model: LensModel
    runs: PairRuns
    base: BaseRun
    source: BaseRun
    senders: tuple[Sender, ...]
    mlp: MlpOption
    norm: NormOption
    direction: PatchDirection
    positions: str
    where: Bool[Tensor, "batch pos"] | None

    @property
    def sign(self) -> float:
        """Sign that makes changes count towards the source run."""
        return 1.0 if self.direction == "noising" else -1.0

    def reaching(self, stop: int) -> list[int]:
        """Indices of the senders whose changes have entered by moment ``stop``, earliest first."""
        reach = [k for k, sender in enumerate(self.senders) if entry(sender) <= stop]
        return sorted(reach, key=lambda k: entry(self.senders[k]))

    def chunks(self, stop: int, size: int) -> Iterator[list[int]]:
        """The same indices, at most ``size`` at a time."""
        reach = self.reaching(stop)
        for begin in range(0, len(reach), size):
            yield reach[begin : begin + size]

    def change(self, rows: Sequence[int], stop: int, at: slice = slice(None)) -> Float[Tensor, "s batch column d"]:
        """Change of the residual stream at a moment."""
        return propagate(
            self.model,
            self.base,
            self.source,
            [self.senders[k] for k in rows],
            stop,
            mlp=self.mlp,
            norm=self.norm,
            at=at,
            positions=self.where,
        )

    def result(
        self,
        metric: dict[str, object],
        groups: tuple[tuple[tuple[Node | Site, str], ...], ...],
        changes: Tensor,
        scores: tuple[Tensor, Tensor],
        downstream: str,
        joint: bool,
    ) -> PathMap:
        """The result with its provenance."""
        options = {
            "mlp": self.mlp,
            "norm": self.norm,
            "downstream": downstream,
            "joint": joint,
            "direction": self.direction,
            "positions": self.positions,
            "pairs": len(self.base),
            **omissions(self.runs),
        }
        return PathMap(
            self.model.provenance(options=options),
            metric,
            self.senders,
            groups,
            changes,
            *scores,
            self.direction,
            self.mlp,
            downstream,
            self.norm,
            self.positions,
        )


def _task(
    model: LensModel,
    pairs: PromptPairs | PairRuns,
    senders: Sender | str | Sequence[Sender | str] | None,
    mlp: MlpOption,
    norm: NormOption,
    direction: PatchDirection,
    positions: str | Sequence[int],
    kinds: tuple[SiteKind, ...],
) -> _Task:
    """Checked options and stored runs."""
    heads = [node for node in head_and_mlp_nodes(model.n_layers, model.n_heads) if node.kind == "head"]
    sending: tuple[Sender, ...] = tuple(heads) if senders is None else as_senders(senders)
    check_senders(model, sending)
    kinds = (*kinds, *extra_kinds(sending))
    runs = pairs if isinstance(pairs, PairRuns) else pair_runs(model, pairs, extra=kinds)
    base, source = (runs.harmful, runs.harmless) if direction == "noising" else (runs.harmless, runs.harmful)
    check_start(runs, positions, "other")
    for sender in sending:
        check_start(runs, sender.positions if isinstance(sender, At) else "all", "other")
    columns, masks = column_masks(base, runs.start, positions)
    if positions == "each":
        if any(isinstance(sender, At) for sender in sending):
            raise MechsafetyError("positions='each' and a sender with positions of its own", hint="give one of them")
        sending = tuple(At(sender, (column,)) for sender in sending for column in columns)  # type: ignore[arg-type]
    where = None if positions in ("all", "each") else masks[0]
    return _Task(model, runs, base, source, sending, mlp, norm, direction, _shown(positions), where)


def _paths(
    task: _Task, group: Sequence[Receiver], metric: RefusalLogOdds, downstream: str
) -> Iterator[tuple[list[int], Float[Tensor, "sender batch"]]]:
    """Sender indices and the metric, in chunks that fit an engine batch."""
    model, base = task.model, task.base
    last = slice(base.n_pos - 1, base.n_pos)
    moments = {receiver: read_moment(model, receiver[0]) for receiver in group}
    to_logits = group[0] == INTO_LOGITS
    size = max(1, max_variants(base) * (base.n_pos if to_logits else 1))

    def scored(rows: list[int]) -> Float[Tensor, "sender batch"]:
        if to_logits:
            change = task.change(rows, 2 * model.n_layers, last)
            return final_scores(model, base, change[:, :, 0], metric, task.norm)
        edits = []
        # receivers of one slot and layer read the same change
        for slot in dict.fromkeys((moments[receiver], receiver[0].kind, receiver[1]) for receiver in group):
            here = [one for one in group if (moments[one], one[0].kind, one[1]) == slot]
            delta = task.change(rows, slot[0])
            edits.append(slot_edit(model, base, [here] * len(rows), delta, task.norm))
        if downstream == "frozen":
            change = frozen_change(model, base, edits, task.norm)
            return final_scores(model, base, change, metric, task.norm)
        return metric(live_logits(model, base, [edits]))

    chunks = list(task.chunks(_stop(model, group), size))
    yield from zip(chunks, work("paths", chunks, scored, Tensor, of=group), strict=True)


def _stop(model: LensModel, group: Sequence[Receiver]) -> int:
    """The last moment at which a group of receivers reads."""
    return max(read_moment(model, node) for node, _ in group)


def _groups(receivers: str | Sequence[tuple[NodeLike, str]], joint: bool) -> tuple[tuple[Receiver, ...], ...]:
    if isinstance(receivers, str):
        if receivers != "logits":
            raise MechsafetyError(
                f"receivers={receivers!r}",
                expected="'logits' or (node, slot) pairs",
                hint="write [('L14.H2', 'q')] or [('L26.MLP', 'mlp')]",
            )
        return ((INTO_LOGITS,),)
    listed = tuple((as_node(node), slot) for node, slot in map(_pair, receivers))
    if not listed:
        raise MechsafetyError("no receivers", expected="'logits' or (node, slot) pairs")
    if joint and INTO_LOGITS in listed:
        raise MechsafetyError("the logits cannot be a joint receiver", hint="patch them in a call of their own")
    whole = {node.layer for node, _ in listed if node.kind == "mlp"}
    parts = [node for node, _ in listed if node.kind == "neuron" and node.layer in whole]
    if joint and parts:
        raise MechsafetyError(f"{parts[0]} and the whole MLP of its layer as joint receivers", hint="give one of them")
    return (listed,) if joint else tuple((receiver,) for receiver in listed)


def _pair(receiver: tuple[NodeLike, str]) -> tuple[NodeLike, str]:
    if isinstance(receiver, tuple | list) and len(receiver) == 2:
        return receiver
    raise MechsafetyError(
        f"the receiver {receiver!s}",
        expected="a node and the slot that it reads",
        hint="write [('L14.H2', 'q')] or [('L26.MLP', 'mlp')]",
    )


def _shown(columns: str | Sequence[int]) -> str:
    return columns if isinstance(columns, str) else ",".join(map(str, columns))


def measured_edges(
    model: LensModel, runs: PairRuns, metric: RefusalLogOdds, edges: Sequence[Edge], *, progress: bool = False
) -> Float[Tensor, "edge prompt"]:
    """Change of the metric along single edges: MLPs between the ends are frozen, all after the receiver is live."""
    harmful, _ = runs.scores(metric)
    base, source = runs.harmful, runs.harmless
    order = sorted(range(len(edges)), key=lambda k: edges[k].receiver.order)
    scores = torch.zeros(len(edges), len(base), device=harmful.device)
    with torch.no_grad(), progress_bar(total=len(edges), desc="edges", show=progress) as bar:

        def scored(chunk: list[int]) -> Float[Tensor, "edge batch"]:
            row, out = {k: row for row, k in enumerate(chunk)}, torch.zeros_like(scores[: len(chunk)])
            for members, found in _edge_scores(model, base, source, metric, [(k, edges[k]) for k in chunk]):
                out[[row[k] for k in members]] = found
            return out

        size = max_variants(base)
        chunks = [order[first : first + size] for first in range(0, len(order), size)]
        for chunk, found in zip(chunks, work("edges", chunks, scored, Tensor, of=edges), strict=True):
            scores[chunk] = found.to(scores.device)
            bar.update(len(chunk))
    return harmful - scores


def _edge_scores(
    model: LensModel, base: BaseRun, source: BaseRun, metric: RefusalLogOdds, edges: Sequence[tuple[int, Edge]]
) -> Iterator[tuple[list[int], Float[Tensor, "edge batch"]]]:
    """Edge numbers, and the metric when each edge alone is patched; the edges into blocks run as one batch."""
    groups: dict[tuple[int, str, str], list[int]] = {}
    of = dict(edges)
    for k, edge in edges:
        groups.setdefault((read_moment(model, edge.receiver), edge.receiver.kind, edge.slot), []).append(k)
    edits, members = [], list[int]()
    for (moment, kind, _), numbers in groups.items():
        delta = propagate(model, base, source, [of[k].sender for k in numbers], moment, mlp="freeze")
        if kind == "logits":
            yield numbers, final_scores(model, base, delta[:, :, -1], metric)
            continue
        edits.append([slot_edit(model, base, [[(of[k].receiver, of[k].slot)] for k in numbers], delta)])
        members += numbers
    if edits:
        yield members, metric(live_logits(model, base, edits))
