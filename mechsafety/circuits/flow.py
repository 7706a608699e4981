"""Where the nodes of a circuit get their difference from, and where they pass it on: exact effects of groups of paths.

All runs are of the circuit: whatever is outside it has its value from the harmless prompt. Between the two prompts of a
pair, the input of a node then differs by the embeddings and by what the circuit's own nodes write, and by nothing else.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from mechsafety.circuits.faithfulness import small_batch
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.models.engine import (
    Hook,
    capture,
    expand_rows,
    holding,
    max_variants,
    run_from,
    split_rows,
)
from mechsafety.nodes import EMBED, Node
from mechsafety.patching.masks import PairRuns, Patch, patched_scores
from mechsafety.patching.readout import final_scores
from mechsafety.patching.receivers import ALL_SLOTS, SlotEdit, edit_hooks, live_logits, read_moment, slot_edit
from mechsafety.patching.senders import added_changes, added_sum, entry
from mechsafety.patching.sources import column_masks
from mechsafety.sites import Site, SiteKind

Shares = Mapping[Node, float]
Senders = Sequence[Node] | Mapping[Node, Sequence[Node]]
# nodes whose writing is held at a time
AT_ONCE = 64
# the slot that stands for everything that a node of a kind reads
WHOLE = {"head": ALL_SLOTS, "mlp": "mlp", "neuron": "mlp"}


@dataclass(frozen=True, slots=True, eq=False)
class Flow:
    """Direct paths into and out of the nodes of a circuit, in the circuit's own runs.

    A path's sender takes its harmless value for one receiver alone. MLPs and attention between the two stay as they
    are, and everything after the receiver runs live. Effects are shares of ``gap`` that are lost. With a norm after
    each block (Gemma-2, OLMo-2), what a node writes is its share of the norm of the layer's sum, at each run's scale.

    Attributes:
        model: The model.
        groups: Runs of the circuit, in one or several groups of pairs; see `knocked_out`.
        whole: The same pairs in one group. Few nodes at a time are measured in it, because a small batch takes as long
            as one of several times its size.
        metric: What is measured.
        nodes: The circuit's nodes.
        gap: Mean metric of the harmful prompts less that of the harmless ones, in the whole model.

    Example:
        >>> flow = ms.circuits.Flow(model, [runs], metric, made.truth.nodes, gap=1.0)
        >>> direct = flow.direct([ms.Node("head", 0, 1), ms.Node("mlp", 3)])  # paths to the logits
        >>> [str(node) for node in direct]
        ['L0.H1', 'L3.MLP']
    """

    model: LensModel
    groups: Sequence[PairRuns]
    metric: RefusalLogOdds
    nodes: Sequence[Node]
    gap: float
    whole: PairRuns | None = None

    def effects(self, nodes: Sequence[Node], positions: str = "all") -> Shares:
        """Effect of patching each node alone, at all positions or at those of a span."""
        ordered = sorted(nodes, key=lambda node: node.order)
        found = []
        for runs in self.groups:
            base = runs.harmful
            where = None if positions == "all" else column_masks(base, runs.start, positions)[1][0]
            patch = Patch.of(self.model, [[node] for node in ordered])
            scores = patched_scores(self.model, base, runs.harmless.acts, patch, self.metric, positions=where)
            found.append(self.metric(base.logits) - scores)
        return self._shares(ordered, torch.cat(found, dim=1))

    def direct(self, nodes: Sequence[Node]) -> Shares:
        """Effect of each node's path to the logits."""
        found = [direct_changes(self.model, runs, self.metric, nodes) for runs in self.groups]
        return self._shares(nodes, torch.cat(found, dim=1))

    def from_prompt(self, nodes: Sequence[Node], effects: Shares) -> Shares:
        """Effect of what each node reads of the prompt itself: the path from the embeddings.

        At an aligned suffix the embeddings of both prompts are the same, and a node reads the instruction by attending
        to it. What it reads of the prompt is then whatever the circuit's nodes did not write.

        Args:
            nodes: The nodes that read.
            effects: Effect of each of them alone.
        """
        if self.groups[0].align == "tokens":
            return self.into(nodes, [EMBED])
        written = self.into(nodes, self.nodes)
        return {node: effects[node] - written[node] for node in nodes}

    def into(self, receivers: Sequence[Node], senders: Senders) -> Shares:
        """Effect of all paths together from the senders to each receiver, through all its slots at once.

        Args:
            receivers: Nodes that read.
            senders: Nodes that are read: the same for every receiver, or those of each.
        """
        of = senders if isinstance(senders, Mapping) else dict.fromkeys(receivers, senders)
        asked = [node for node in receivers if of[node]]
        run = partial(self._received, receivers=asked, senders=of)
        found = self._shares(asked, self._lost(self.groups, asked, run)) if asked else {}
        return {node: found.get(node, 0.0) for node in receivers}

    def out_of(self, senders: Sequence[Node], receivers: Sequence[Node]) -> Shares:
        """Effect of all paths together from each sender to the receivers, through all their slots at once.

        What one receiver then writes differently reaches the others as usual. The logits may be a receiver.
        """
        if not senders or not receivers:
            return dict.fromkeys(senders, 0.0)
        run = partial(self._sent, senders=senders, receivers=receivers)
        return self._shares(senders, self._lost(self._fewest(len(senders)), senders, run))

    def repeated(self, receivers: Sequence[Node], least: float) -> Mapping[Node, list[Node]]:
        """The senders whose writing each receiver repeats.

        What it reads of such a sender and what it writes have at least this cosine. Both are differences between the
        prompts of a pair. A head reads the mean over the positions that it attends to, weighted by its attention in
        the harmful prompt.
        """
        products = np.zeros((3, len(receivers), len(self.nodes)))
        for runs in self.groups if receivers else ():
            with holding(self.model, runs.harmful):
                pattern = self.model.cache(runs.harmful.tokens, ["pattern"]).pattern[..., runs.start :, runs.start :]
            for row in range(0, len(receivers), AT_ONCE):
                own = receivers[row : row + AT_ONCE]
                wrote = added_changes(self.model, runs.harmful, runs.harmless, own)
                for column in range(0, len(self.nodes), AT_ONCE):
                    others = self.nodes[column : column + AT_ONCE]
                    every = added_changes(self.model, runs.harmful, runs.harmless, others)
                    for k, node in enumerate(own):
                        reads = every
                        if node.kind == "head":
                            weights = pattern[node.layer, node.index].to(every)
                            shape = "batch query key, sender batch key d -> sender batch query d"
                            reads = einsum(weights, every, shape)
                        into = products[:, row + k, column : column + len(others)]
                        into[0] += einsum(reads, wrote[k], "sender batch pos d, batch pos d -> sender").cpu().numpy()
                        into[1] += reduce(reads.square(), "sender batch pos d -> sender", "sum").cpu().numpy()
                        into[2] += float(wrote[k].square().sum())
        both, read, written = products
        alike = (both >= least * np.sqrt(read * written)) & (read > 0) & (written > 0)
        found: dict[Node, list[Node]] = {}
        for node, row_of in zip(receivers, alike, strict=True):
            moment = read_moment(self.model, node)
            found[node] = [self.nodes[k] for k in np.flatnonzero(row_of).tolist() if entry(self.nodes[k]) <= moment]
        return found

    def _shares(self, nodes: Sequence[Node], changes: Float[Tensor, "node prompt"]) -> Shares:
        return dict(zip(nodes, (reduce(changes, "node prompt -> node", "mean") / self.gap).tolist(), strict=True))

    def _fewest(self, n: int) -> Sequence[PairRuns]:
        """The groups of pairs in which so many variants take the fewest runs."""
        return self.groups if self.whole is None or not small_batch(self.whole, n) else [self.whole]

    def _lost(
        self,
        groups: Sequence[PairRuns],
        nodes: Sequence[Node],
        run: Callable[[PairRuns], Iterator[tuple[list[Node], Tensor]]],
    ) -> Float[Tensor, "node prompt"]:
        """Metric lost on each prompt, from batches of nodes and their metric in each group of pairs."""
        found = []
        for runs in groups:
            rows = {node: row for some, scores in run(runs) for node, row in zip(some, scores, strict=True)}
            found.append(self.metric(runs.harmful.logits) - torch.stack([rows[node] for node in nodes]))
        return torch.cat(found, dim=1)

    def _sum(self, runs: PairRuns, senders: Sequence[Node], moment: int) -> Float[Tensor, "batch pos d_model"]:
        """Sum of the changes of the senders that have entered the residual stream by a moment."""
        return added_sum(
            self.model, runs.harmful, runs.harmless, [node for node in senders if entry(node) <= moment]
        ).to(runs.harmful.resid.dtype)

    def _received(
        self, runs: PairRuns, receivers: Sequence[Node], senders: Mapping[Node, Sequence[Node]]
    ) -> Iterator[tuple[list[Node], Float[Tensor, "receiver batch"]]]:
        """The receivers, and the metric when each alone reads its senders' changes, in batches."""
        base, edits, members = runs.harmful, list[list[SlotEdit]](), list[Node]()
        most = max_variants(base)
        for (moment, kind, _), here in _by_moment(self.model, receivers).items():
            for first in range(0, len(here), most):
                some = here[first : first + most]
                if edits and len(members) + len(some) > most:
                    yield members, self._scores(runs, edits)
                    edits, members = [], []
                with torch.no_grad():
                    sums = {key: self._sum(runs, key, moment) for key in dict.fromkeys(tuple(senders[n]) for n in some)}
                    delta = torch.stack([sums[tuple(senders[node])] for node in some])
                    edits.append([slot_edit(self.model, base, [[(node, WHOLE[kind])] for node in some], delta)])
                members = [*members, *some]
        if edits:
            yield members, self._scores(runs, edits)

    def _sent(
        self, runs: PairRuns, senders: Sequence[Node], receivers: Sequence[Node]
    ) -> Iterator[tuple[list[Node], Float[Tensor, "sender batch"]]]:
        """The senders, and the metric when the receivers read the change of one of them, in batches."""
        base = runs.harmful
        most, ordered = max_variants(base), sorted(senders, key=lambda node: (entry(node), node.order))
        for first in range(0, len(ordered), most):
            some = ordered[first : first + most]
            with torch.no_grad():
                changes = added_changes(self.model, base, runs.harmless, some).to(base.resid.dtype)
            yield some, self._carried(runs, some, changes, receivers)

    def _carried(
        self,
        runs: PairRuns,
        senders: Sequence[Node],
        changes: Float[Tensor, "sender batch pos d"],
        receivers: Sequence[Node],
    ) -> Float[Tensor, "sender batch"]:
        """The metric when all receivers read one sender's change, on top of whatever else they read."""
        model, base, n = self.model, runs.harmful, len(senders)
        layers: dict[int, list[tuple[int, str, list[Node]]]] = {}
        for (moment, kind, layer), here in _by_moment(model, receivers).items():
            if entry(senders[0]) <= moment:
                layers.setdefault(model.n_layers if kind == "logits" else layer, []).append((moment, kind, here))
        if not layers:
            return self.metric(base.logits).expand(n, -1)
        with torch.no_grad():
            hidden = expand_rows(base.resid[min(layers)], n)
            order = sorted(layers)
            for layer, after in zip(order, [*order[1:], None], strict=True):
                hooks: list[Hook] = []
                mlp_reads = None
                for moment, kind, here in layers[layer]:  # heads come before the MLP and its neurons
                    if kind == "logits":
                        hidden = hidden + rearrange(changes, "sender batch pos d -> (sender batch) pos d")
                        continue
                    entered = sum(entry(node) <= moment for node in senders)
                    delta = changes.clone()
                    delta[entered:] = 0
                    if kind == "mlp" and not model.parallel and model.backend.norms(layer, "ln2"):
                        mlp_reads = _plus(rearrange(delta, "sender batch pos d -> (sender batch) pos d"))
                        continue
                    stream = hidden
                    if kind != "head" and not model.parallel:
                        stream = capture(model, base, layer, hidden, Site(SiteKind.RESID_MID, layer), hooks)
                    every = [[(node, WHOLE[kind]) for node in here]] * n
                    edit = slot_edit(model, base, every, delta, stream=stream)
                    hooks += edit_hooks(model, base, hidden, [edit])
                hidden = run_from(model, base, layer, hidden, hooks, stop=after, mlp_reads=mlp_reads)
            return self.metric(split_rows(hidden, n))

    def _scores(self, runs: PairRuns, edits: Sequence[Sequence[SlotEdit]]) -> Float[Tensor, "variant batch"]:
        with torch.no_grad():
            return self.metric(live_logits(self.model, runs.harmful, edits))


def direct_changes(
    model: LensModel, runs: PairRuns, metric: RefusalLogOdds, nodes: Sequence[Node]
) -> Float[Tensor, "node prompt"]:
    """What the metric loses on each prompt through each node's direct path to the logits."""
    with torch.no_grad():
        change = added_changes(model, runs.harmful, runs.harmless, nodes, at=slice(-1, None))[:, :, 0]
        return metric(runs.harmful.logits) - final_scores(model, runs.harmful, change, metric)


def _plus(change: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda stream: stream + change


def _by_moment(model: LensModel, receivers: Sequence[Node]) -> dict[tuple[int, str, int], list[Node]]:
    """The receivers that read at the same moment, by moment, kind and layer, in the order of computation."""
    found: dict[tuple[int, str, int], list[Node]] = {}
    for node in sorted(receivers, key=lambda node: node.order):
        found.setdefault((read_moment(model, node), node.kind, node.layer or 0), []).append(node)
    return found
