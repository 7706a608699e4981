"""Exact runs of circuits of edges: every slot of every node reads an input of its own.

A kept edge carries what its sender computes in this run. A cut edge carries what the sender computes in the harmless
run. A slot therefore reads the harmless run's residual stream plus a change: the sum, over its kept edges, of the
difference between what the sender writes in this run and in the harmless run.

In some models (Gemma-2, OLMo-2), a norm stands between a layer's heads and the stream. There, a slot reads the norm of
the sum that its own kept and cut heads give.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import groupby

import numpy as np
import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from mechsafety.circuits.edges import on_a_path
from mechsafety.circuits.faithfulness import FaithfulnessMeter, check_parts
from mechsafety.errors import MechsafetyError
from mechsafety.models import LensModel
from mechsafety.models.engine import BaseRun, capture, max_variants, unembed
from mechsafety.nodes import EMBED, HEAD_SITES, LOGITS, SLOTS, Edge, Node, Part, head_and_mlp_nodes
from mechsafety.patching.masks import PairRuns
from mechsafety.patching.receivers import reaches
from mechsafety.patching.senders import behind_norm
from mechsafety.scale.work import work
from mechsafety.sites import Site, SiteKind

# bytes of sender outputs held at once
SENDER_BYTES = 2**29


@dataclass(frozen=True, slots=True)
class EdgeMeter(FaithfulnessMeter):
    """`FaithfulnessMeter` whose parts are edges: ``embed``, heads and MLPs into the slots of heads, MLPs and logits.

    Example:
        >>> meter = ms.circuits.EdgeMeter(model, runs, metric)
        >>> [round(abs(share), 2) for share in meter.faithfulness([meter.parts, []])]
        [1.0, 0.0]
    """

    def __post_init__(self) -> None:
        if self.runs.align == "suffix":
            raise MechsafetyError(
                "a circuit of edges on pairs aligned at the suffix (no edge carries what heads read before it)",
                expected="pairs of equal length, or the level 'node' or 'neuron'",
            )

    def at_mean(self) -> "EdgeMeter":
        """Edges have no mean ablation: they carry what differs between the two prompts of a pair.

        Raises:
            MechsafetyError: Always.
        """
        raise MechsafetyError("edges at the mean", expected="a meter of nodes or neurons")

    @property
    def parts(self) -> tuple[Part, ...]:
        """Every edge that follows the order of computation, sorted by receiver."""
        return all_edges(self.model.n_layers, self.model.n_heads, self.model.parallel)

    def kept(self, circuits: Sequence[Sequence[Part]], near: Sequence[Part] | None = None) -> np.ndarray:  # noqa: ARG002
        """Metric [circuit prompt] with every edge outside each circuit cut; ``near`` has no use here."""
        base = self.runs.harmful
        check_parts(self, circuits, lambda part: isinstance(part, Edge))
        size = max(1, max_variants(base) // max(1, self.model.n_heads))

        def scored(first: int) -> Float[Tensor, "circuit prompt"]:
            some = [[part for part in parts if isinstance(part, Edge)] for parts in circuits[first : first + size]]
            return self.metric(edge_circuit_logits(self.model, self.runs, some))

        done = []
        with self.bar(len(circuits)) as bar:
            for found in work("edges kept", range(0, len(circuits), size), scored, Tensor, of=circuits):
                done.append(found)
                bar.update(len(found))
        return torch.cat(done).cpu().double().numpy() if done else np.zeros((0, len(base)))

    def soft(self, runs: PairRuns, weights: Float[Tensor, " part"]) -> Float[Tensor, " batch"]:
        """Metric of each pair with every edge carrying a share of its sender's difference; see `FaithfulnessMeter`."""
        return self.metric(self.soft_logits(runs, weights))

    def soft_logits(self, runs: PairRuns, weights: Float[Tensor, " part"]) -> Float[Tensor, "batch d_vocab"]:
        """Next-token logits that `soft` reads the metric from."""
        senders = (EMBED, *head_and_mlp_nodes(self.model.n_layers, self.model.n_heads))
        row = {node: k for k, node in enumerate(senders)}
        places: dict[tuple[Node, str], tuple[list[int], list[int]]] = {}
        for k, edge in enumerate(self.parts):
            if isinstance(edge, Edge):
                at, own = places.setdefault((edge.receiver, edge.slot), ([], []))
                at.append(row[edge.sender])
                own.append(k)
        nothing = weights.new_zeros(len(senders))
        masks = {
            place: nothing.index_put((torch.tensor(at, device=weights.device),), weights[own])[:, None]
            for place, (at, own) in places.items()
        }
        return masked_edge_logits(self.model, runs, senders, masks, 1)[0]

    def removed(self, circuits: Sequence[Sequence[Part]]) -> np.ndarray:
        """Metric [circuit prompt] with each circuit itself cut and every other edge kept."""
        check_parts(self, circuits, lambda part: isinstance(part, Edge))
        return self.kept(self._outside(circuits))


@lru_cache(maxsize=4)
def all_edges(n_layers: int, n_heads: int, parallel: bool) -> tuple[Edge, ...]:
    """Every edge of a model with this many layers and heads, by receiver, in the order of computation.

    Example:
        >>> len(all_edges(1, 2, False))  # 6 from embed into q, k, v; 3 into the MLP; 4 into the logits
        13
    """
    nodes = head_and_mlp_nodes(n_layers, n_heads)
    found = []
    for receiver in (*nodes, LOGITS):
        senders = [n for n in (EMBED, *nodes) if n.order[:2] < receiver.order[:2]]
        senders = [n for n in senders if reaches(n, receiver, parallel=parallel)]
        found += [Edge(sender, receiver, slot) for slot in SLOTS[receiver.kind] for sender in senders]
    return tuple(found)


def prune(edges: Collection[Edge]) -> list[Edge]:
    """Only edges on a path from ``embed`` to ``logits``; the others change nothing.

    A node that no kept path from the embedding reaches computes the same as in the harmless run. A node without a kept
    path to the logits is not read.
    """
    nodes = on_a_path(list(edges))
    return [edge for edge in edges if edge.sender in nodes and edge.receiver in nodes]


def edge_circuit_logits(
    model: LensModel, runs: PairRuns, circuits: Sequence[Collection[Edge]]
) -> Float[Tensor, "variant batch d_vocab"]:
    """Exact next-token logits of the harmful prompts when every edge outside each circuit is cut.

    Args:
        model: The model.
        runs: Stored runs of the pairs.
        circuits: Edges that are kept; one collection per variant.

    Raises:
        MechsafetyError: Runs in which nodes are knocked out.
    """
    if runs.harmful.fixed:
        raise MechsafetyError("runs in which nodes are knocked out", expected="runs of the model as it is")
    kept = [prune(circuit) for circuit in circuits]
    senders = sorted({edge.sender for edges in kept for edge in edges}, key=lambda node: node.order)
    row_bytes = 4 * runs.harmful.resid[0].numel() * max(1, len(senders))
    size = max(1, SENDER_BYTES // row_bytes)
    with torch.no_grad():
        parts = [_run(model, runs, kept[first : first + size]) for first in range(0, len(kept), size)]
    return torch.cat(parts)


def _run(model: LensModel, runs: PairRuns, kept: Sequence[Collection[Edge]]) -> Float[Tensor, "variant batch d_vocab"]:
    senders = sorted({edge.sender for edges in kept for edge in edges}, key=lambda node: node.order)
    row = {node: k for k, node in enumerate(senders)}
    masks: dict[tuple[Node, str], Tensor] = {}
    for variant, edges in enumerate(kept):
        for edge in edges:
            place = (edge.receiver, edge.slot)
            if place not in masks:
                masks[place] = torch.zeros(len(senders), len(kept), device=model.device)
            masks[place][row[edge.sender], variant] = 1.0
    return masked_edge_logits(model, runs, senders, masks, len(kept))


def masked_edge_logits(
    model: LensModel,
    runs: PairRuns,
    senders: Sequence[Node],
    masks: Mapping[tuple[Node, str], Float[Tensor, "sender variant"]],
    n: int,
    *,
    first: int = 0,
    known: Float[Tensor, "known batch pos d_model"] | None = None,
) -> Float[Tensor, "variant batch d_vocab"]:
    """Next-token logits of the harmful prompts when slots read what their masks let through.

    Args:
        model: The model.
        runs: Stored runs of the pairs.
        senders: The senders, in the order of computation. Heads and MLPs that are not among them are not computed.
        masks: For a receiver's slot, 1 at the senders whose edge is kept. A slot without a mask reads the harmless run.
        n: Number of variants.
        first: Block before which no variant differs from the harmful run.
        known: Needed with ``first``: the difference between the two runs in what the senders before that block write
            (see `written_changes`).
    """
    source = runs.harmless
    row = {node: k for k, node in enumerate(senders)}
    nothing = torch.zeros(len(senders), n, device=model.device)
    n_known = 0 if known is None else len(known)
    sums = _sums(model, senders)
    # change from the harmless run in what each other sender writes in this run, in the order of computation
    change = torch.zeros(len(senders) - n_known, n, *source.resid[0].shape, device=model.device)
    done = 0
    if EMBED in row and known is None:
        change[0], done = (runs.harmful.resid[0] - source.resid[0]).float(), 1

    def written(mask: Tensor, rows: slice, at: slice) -> Tensor:
        """Sum of the changes of the senders in some rows, as far as a mask lets them through."""
        begin = max(rows.start, n_known)
        end = max(begin, min(rows.stop, n_known + done))
        axes = "place sender variant, sender variant b p d -> place variant b p d"
        own = change[begin - n_known : end - n_known, :, :, at]
        # a gradient needs these changes as they are now; later senders are written beside them
        own = own.clone() if torch.is_grad_enabled() else own
        total = einsum(mask[:, begin:end], own, axes)
        if known is not None:
            before = slice(rows.start, min(rows.stop, n_known))
            axes = "place sender variant, sender b p d -> place variant b p d"
            total = total + einsum(mask[:, before], known[before, :, at], axes)
        return total

    def read(stream: Tensor, places: Sequence[tuple[Node, str]], at: slice = slice(None)) -> Tensor:
        """What each slot reads: [place variant batch pos d_model]."""
        mask = torch.stack([masks.get(place, nothing) for place in places])
        parts = list[Tensor]()
        for layer, rows in sums:
            if parts and rows.start >= n_known + done:
                break  # not computed yet: no slot reads it
            part = written(mask, rows, at)
            parts.append(part if layer is None else _behind_norm(model, source, layer, part, at))
        extra = reduce(torch.add, parts)
        return (stream[:, at].float() + extra).to(stream.dtype)

    for layer in range(first, model.n_layers):
        heads = [node for node in senders if node.kind == "head" and node.layer == layer]
        if heads:
            inputs = {slot: read(source.resid[layer], [(head, slot) for head in heads]) for slot in HEAD_SITES}
            change[done : done + len(heads)] = _head_changes(model, runs.harmful, source, layer, heads, inputs)
            done += len(heads)
        mlp = Node("mlp", layer)
        if mlp in row:
            own = source.acts[SiteKind.MLP_OUT][layer]
            stream = source.resid[layer] if model.parallel else source.resid[layer + 1] - own
            # a parallel block's MLP reads what its heads read, and no edge from them is kept
            reads = read(stream, [(mlp, "mlp")])[0]
            out = model.mlp(layer, rearrange(reads, "variant b p d -> (variant b) p d"))
            change[done] = (rearrange(out, "(variant b) p d -> variant b p d", variant=n) - own).float()
            done += 1
    final = read(source.resid[-1], [(LOGITS, "resid")], slice(-1, None))[0]
    return unembed(model, final[:, :, 0])


def _sums(model: LensModel, senders: Sequence[Node]) -> list[tuple[int | None, slice]]:
    """Rows of senders whose writes are summed before they reach the stream, and the layer of the norm after the sum.

    The layer is None if no norm follows. Without norms after blocks, all senders form one sum.
    """
    if not model.post_norm or not senders:
        return [(None, slice(0, len(senders)))]
    found, start = list[tuple[int | None, slice]](), 0
    for layer, same in groupby(senders, key=lambda node: node.layer if node.kind == "head" else None):
        stop = start + len(list(same))
        found.append((layer, slice(start, stop)))
        start = stop
    return found


def _behind_norm(
    model: LensModel, source: BaseRun, layer: int, part: Float[Tensor, "place variant b p d_model"], at: slice
) -> Float[Tensor, "place variant b p d_model"]:
    """Change of what reaches the stream when the sum of a layer's heads changes by ``part``."""
    rows = rearrange(part, "place variant b p d -> (place variant) b p d")
    out = behind_norm(model, source, layer, "head", rows, "recompute", at)
    return rearrange(out, "(place variant) b p d -> place variant b p d", place=len(part))


def _head_changes(
    model: LensModel,
    base: BaseRun,
    source: BaseRun,
    layer: int,
    heads: Sequence[Node],
    inputs: dict[str, Float[Tensor, "head variant batch pos d_model"]],
) -> Float[Tensor, "head variant batch pos d_model"]:
    """What each head writes, given its own inputs to q, k and v, less what it writes in the harmless run; float32."""
    # each row belongs to one head: it computes all heads, but only that head's values are used
    rows = {slot: rearrange(x, "head variant b p d -> (head variant b) p d") for slot, x in inputs.items()}
    read = {kind: capture(model, base, layer, rows[slot], Site(kind, layer)) for slot, kind in HEAD_SITES.items()}
    hooks = [(Site(kind, layer), lambda tensor, value=value: value) for kind, value in read.items()]
    z = capture(model, base, layer, rows["q"], Site(SiteKind.Z, layer), hooks)
    per_head = rearrange(z, "(head row) p index d -> head row p index d", head=len(heads))
    indices = [node.index or 0 for node in heads]
    own = torch.stack([per_head[k, :, :, index] for k, index in enumerate(indices)])
    variants = own.shape[1] // len(base)
    before = repeat(source.acts[SiteKind.Z][layer][:, :, indices], "b p head d -> head (v b) p d", v=variants)
    weight = model.W_O(layer)[indices].float()
    out = einsum((own - before).float(), weight, "head row p d_head, head d_head d -> head row p d")
    return rearrange(out, "head (variant b) p d -> head variant b p d", b=len(base))
