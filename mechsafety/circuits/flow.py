"""Where the nodes of a circuit get their difference from, and where they pass it on: exact effects of groups of paths.

All runs are of the circuit: whatever is outside it has its value from the harmless prompt. Between the two prompts of a
pair, the input of a node then differs by the embeddings and by what the circuit's own nodes write, and by nothing else.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from einops import einsum, reduce
from jaxtyping import Float
from torch import Tensor

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
    unembed,
)
from mechsafety.nodes import EMBED, SLOTS, Node
from mechsafety.patching import activation_patching
from mechsafety.patching.masks import PairRuns
from mechsafety.patching.receivers import SlotEdit, edit_hooks, live_logits, read_moment, slot_edit
from mechsafety.patching.senders import added_changes, entry, sender_changes
from mechsafety.sites import Site, SiteKind

Shares = Mapping[Node, float]


@dataclass(slots=True)
class Flow:
    """Direct paths into and out of the nodes of a circuit, in the circuit's own runs.

    A path's sender takes its harmless value for one receiver alone. MLPs and attention between the two stay as they
    are, and everything after the receiver runs live. Effects are shares of ``gap`` that are lost.

    Attributes:
        model: The model.
        groups: Runs of the circuit, in one or several groups of pairs; see `knocked_out`.
        metric: What is measured.
        nodes: The circuit's nodes.
        gap: Mean metric of the harmful prompts less that of the harmless ones, in the whole model.
        progress: Whether to show bars.
    """

    model: LensModel
    groups: Sequence[PairRuns]
    metric: RefusalLogOdds
    nodes: Sequence[Node]
    gap: float
    progress: bool = False
    _changes: dict[int, dict[Node, Tensor]] = field(default_factory=dict)

    def effects(self, positions: str = "all") -> Shares:
        """Effect of patching each node alone, at all positions or at those of a span."""
        found = [
            activation_patching(
                self.model, runs, self.metric, nodes=self.nodes, positions=positions, progress=self.progress
            ).changes
            for runs in self.groups
        ]
        return self._shares(self.nodes, torch.cat(found, dim=1))

    def direct(self) -> Shares:
        """Effect of each node's path to the logits."""
        found = []
        for runs in self.groups:
            with torch.no_grad():
                last = slice(-1, None)
                change = sender_changes(self.model, runs.harmful, runs.harmless, self.nodes, at=last)[:, :, 0]
                final = runs.harmful.resid[-1][:, -1]
                changed = self.metric(unembed(self.model, final + change.to(final.dtype)))
            found.append(self.metric(runs.harmful.logits) - changed)
        return self._shares(self.nodes, torch.cat(found, dim=1))

    def from_prompt(self) -> Shares:
        """Effect of what each node reads of the prompt itself: the path from the embeddings.

        At an aligned suffix the embeddings of both prompts are the same, and a node reads the instruction by attending
        to it. What it reads of the prompt is then whatever the circuit's nodes did not write.
        """
        if self.groups[0].align == "tokens":
            return self.into(self.nodes, [EMBED])
        whole, written = self.effects(), self.into(self.nodes, self.nodes)
        return {node: whole[node] - written[node] for node in self.nodes}

    def into(self, receivers: Sequence[Node], senders: Sequence[Node]) -> Shares:
        """Effect of all paths together from the senders to each receiver, through all its slots at once."""
        if not receivers or not senders:
            return dict.fromkeys(receivers, 0.0)
        return self._shares(receivers, self._lost(receivers, lambda k: self._received(k, receivers, senders)))

    def out_of(self, senders: Sequence[Node], receivers: Sequence[Node]) -> Shares:
        """Effect of all paths together from each sender to the receivers, through all their slots at once.

        What one receiver then writes differently reaches the others as usual.
        """
        if not senders or not receivers:
            return dict.fromkeys(senders, 0.0)
        return self._shares(senders, self._lost(senders, lambda k: self._sent(k, senders, receivers)))

    def repeated(self, least: float) -> Mapping[Node, list[Node]]:
        """The senders whose writing each node repeats: those whose change, as it reads it, has at least this cosine.

        A head reads the mean over the positions that it attends to, weighted by its attention in the harmful prompt.
        """
        products = {node: np.zeros((3, len(self.nodes))) for node in self.nodes}
        for k, runs in enumerate(self.groups):
            with holding(self.model, runs.harmful):
                pattern = self.model.cache(runs.harmful.tokens, ["pattern"]).pattern[..., runs.start :, runs.start :]
            known = self._change(k, self.nodes)
            every = torch.stack([known[node] for node in self.nodes])
            for node in self.nodes:
                wrote, reads = known[node], every
                if node.kind == "head":
                    weights = pattern[node.layer, node.index].to(reads)
                    reads = einsum(weights, reads, "batch query key, sender batch key d -> sender batch query d")
                pairs = ((reads, wrote), (reads, reads), (wrote, wrote))
                shape = "sender batch pos d, sender batch pos d -> sender"
                products[node] += np.stack(
                    [einsum(a.expand_as(reads), b.expand_as(reads), shape).double().cpu().numpy() for a, b in pairs]
                )
        found: dict[Node, list[Node]] = {}
        for node, (both, read, written) in products.items():
            alike = both >= least * np.sqrt(read * written)
            earlier = [entry(sender) <= read_moment(self.model, node) for sender in self.nodes]
            rows = np.flatnonzero(alike & (read > 0) & (written > 0) & earlier)
            found[node] = [self.nodes[row] for row in rows.tolist()]
        return found

    def _shares(self, nodes: Sequence[Node], changes: Float[Tensor, "node prompt"]) -> Shares:
        return dict(zip(nodes, (reduce(changes, "node prompt -> node", "mean") / self.gap).tolist(), strict=True))

    def _lost(
        self, nodes: Sequence[Node], run: Callable[[int], Iterator[tuple[list[Node], Tensor]]]
    ) -> Float[Tensor, "node prompt"]:
        """Metric lost on each prompt, from batches of nodes and their metric in each group of pairs."""
        found = []
        for k, runs in enumerate(self.groups):
            rows = {node: row for some, scores in run(k) for node, row in zip(some, scores, strict=True)}
            found.append(self.metric(runs.harmful.logits) - torch.stack([rows[node] for node in nodes]))
        return torch.cat(found, dim=1)

    def _change(self, k: int, nodes: Sequence[Node]) -> dict[Node, Float[Tensor, "batch pos d_model"]]:
        """Harmless less harmful of what each node adds to the residual stream in one group of pairs."""
        known, runs = self._changes.setdefault(k, {}), self.groups[k]
        new = [node for node in nodes if node not in known]
        if new:
            with torch.no_grad():
                known |= dict(zip(new, added_changes(self.model, runs.harmful, runs.harmless, new), strict=True))
        return known

    def _sum(self, k: int, senders: Sequence[Node], moment: int) -> Float[Tensor, "batch pos d_model"]:
        """Sum of the changes of the senders that have entered the residual stream by a moment."""
        known, total = self._change(k, senders), torch.zeros_like(self.groups[k].harmful.resid[0])
        for node in senders:
            if entry(node) <= moment:
                total = total + known[node].to(total.dtype)
        return total

    def _received(
        self, k: int, receivers: Sequence[Node], senders: Sequence[Node]
    ) -> Iterator[tuple[list[Node], Float[Tensor, "receiver batch"]]]:
        """The receivers, and the metric when each alone reads the senders' changes, in batches."""
        base, edits, members = self.groups[k].harmful, list[list[SlotEdit]](), list[Node]()
        most = max_variants(base)
        for (moment, kind, _), here in _by_moment(self.model, receivers).items():
            for first in range(0, len(here), most):
                some = here[first : first + most]
                if edits and len(members) + len(some) > most:
                    yield members, self._scores(k, edits)
                    edits, members = [], []
                delta = self._sum(k, senders, moment).expand(len(some), -1, -1, -1)
                with torch.no_grad():
                    edits.append([slot_edit(self.model, base, [[(n, s)] for n in some], delta) for s in SLOTS[kind]])
                members = [*members, *some]
        if edits:
            yield members, self._scores(k, edits)

    def _sent(
        self, k: int, senders: Sequence[Node], receivers: Sequence[Node]
    ) -> Iterator[tuple[list[Node], Float[Tensor, "sender batch"]]]:
        """The senders, and the metric when the receivers read the change of one of them, in batches."""
        base = self.groups[k].harmful
        most, ordered = max_variants(base), sorted(senders, key=lambda node: (entry(node), node.order))
        for first in range(0, len(ordered), most):
            some = ordered[first : first + most]
            known = self._change(k, some)
            changes = torch.stack([known[node] for node in some])
            yield some, self._carried(k, some, changes, receivers)

    def _carried(
        self, k: int, senders: Sequence[Node], changes: Float[Tensor, "sender batch pos d"], receivers: Sequence[Node]
    ) -> Float[Tensor, "sender batch"]:
        """The metric when all receivers read one sender's change, on top of whatever else they read."""
        model, base, n = self.model, self.groups[k].harmful, len(senders)
        layers: dict[int, list[tuple[int, str, list[Node]]]] = {}
        for (moment, kind, layer), here in _by_moment(model, receivers).items():
            if entry(senders[0]) <= moment:
                layers.setdefault(layer, []).append((moment, kind, here))
        if not layers:
            return self.metric(base.logits).expand(n, -1)
        with torch.no_grad():
            hidden = expand_rows(base.resid[min(layers)], n)
            order = sorted(layers)
            for layer, after in zip(order, [*order[1:], None], strict=True):
                hooks: list[Hook] = []
                for moment, kind, here in layers[layer]:  # heads come before the MLP and its neurons
                    entered = sum(entry(node) <= moment for node in senders)
                    delta = changes.clone()
                    delta[entered:] = 0
                    stream = hidden
                    if kind != "head" and not model.parallel:
                        stream = capture(model, base, layer, hidden, Site(SiteKind.RESID_MID, layer), hooks)
                    edits = [
                        slot_edit(model, base, [[(node, slot) for node in here]] * n, delta, stream=stream)
                        for slot in SLOTS[kind]
                    ]
                    hooks += edit_hooks(model, base, hidden, edits)
                hidden = run_from(model, base, layer, hidden, hooks, stop=after)
            return self.metric(split_rows(hidden, n))

    def _scores(self, k: int, edits: Sequence[Sequence[SlotEdit]]) -> Float[Tensor, "variant batch"]:
        with torch.no_grad():
            return self.metric(live_logits(self.model, self.groups[k].harmful, edits))


def _by_moment(model: LensModel, receivers: Sequence[Node]) -> dict[tuple[int, str, int], list[Node]]:
    """The receivers that read at the same moment, by moment, kind and layer, in the order of computation."""
    found: dict[tuple[int, str, int], list[Node]] = {}
    for node in sorted(receivers, key=lambda node: node.order):
        found.setdefault((read_moment(model, node), node.kind, node.layer or 0), []).append(node)
    return found
