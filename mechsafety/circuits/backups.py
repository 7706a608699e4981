"""Backups: nodes that hardly matter alone because something else does their work, or that do another's work."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from mechsafety.attribution.nodes import mask_gradients
from mechsafety.circuits.budget import Budget
from mechsafety.circuits.circuit import Backup
from mechsafety.circuits.faithfulness import FaithfulnessMeter, in_order
from mechsafety.circuits.goal import Goal
from mechsafety.circuits.search import SearchResult, marginals, meets
from mechsafety.errors import MechsafetyError
from mechsafety.intervals import mean_interval
from mechsafety.metrics import adjust_p, sign_flip_p
from mechsafety.models import LensModel
from mechsafety.models.engine import base_run
from mechsafety.nodes import Node, Part, head_and_mlp_nodes
from mechsafety.patching.masks import PairRuns, fixed_nodes

# a group is redundant if patched together it loses this share of the gap more than its members do alone
MIN_JOINT = 0.1
# and a node of it is a backup if alone it changes, either way, no more than this share of what the group does
SMALL = 0.25
# a group may become this much less redundant by leaving a member out that is not needed
SLACK = 0.1


def find_backups(
    meter: FaithfulnessMeter,
    circuit: Sequence[Node],
    suspicion: Mapping[Node, float],
    *,
    n_parts: int = 4,
    n_candidates: int = 6,
    steps: int = 3,
    seed: int = 0,
    budget: Budget | None = None,
) -> tuple[Backup, ...]:
    """Nodes whose single effect is small but whose joint effect with a node of the circuit is large.

    For each suspicious node of the circuit: every node is attributed again with it patched; those whose attribution
    rises most, and that lose little alone, are patched together with it, exactly. Where the group loses at least
    `MIN_JOINT` more than its members lose one by one, members that are not needed for that leave it; what is left, and
    every other candidate that can take the place of one of them, is a backup if alone it loses little. Redundancy of
    three and more parts is found as well as of two, because the group is tested as a whole first.

    Args:
        meter: What effects are measured on.
        circuit: Nodes whose backups are looked for.
        suspicion: For each of them how much more it is worth than its single effect shows (its marginal effect in the
            circuit less the single effect): what a backup outside makes up for.
        n_parts: How many of the circuit's nodes to examine, the most suspicious first.
        n_candidates: How many nodes to patch together with each.
        steps: Points of the integrated gradient.
        seed: Of the resampling.
        budget: Time to keep.

    Returns:
        The backups, each with single and joint effects, an interval above 0 and a p value.
    """
    budget = budget or Budget()
    asked = sorted((n for n in circuit if suspicion.get(n, 0.0) >= MIN_JOINT), key=lambda n: (-suspicion[n], n.order))
    if not asked:
        return ()
    effects = _Effects(meter)
    before: Tensor | None = None
    groups: list[tuple[Node, tuple[Node, ...], tuple[Node, ...]]] = []
    settled: set[Node] = set()
    asked = asked[:n_parts]
    batches = budget.within(asked, 1, 0.6, "backups of the circuit's nodes")
    for first in meter.bar(len(asked), "backups", (node for batch in batches for node in batch)):
        if first in settled:
            continue
        before = _attribution(meter, None, steps) if before is None else before
        rise = _attribution(meter, first, steps) - before
        nodes = head_and_mlp_nodes(meter.model.n_layers, meter.model.n_heads)
        ranked = sorted(range(len(nodes)), key=lambda k: (-float(rise[k]), k))
        rising = [nodes[k] for k in ranked if nodes[k] != first and float(rise[k]) > 0][: 2 * n_candidates]
        # what matters by itself is on the way of both, and would hide that the others are redundant
        singles = effects.of([[node] for node in rising])
        small = [node for node, values in zip(rising, singles, strict=True) if abs(float(values.mean())) <= SMALL]
        candidates = small[:n_candidates]
        group = _needed(effects, first, candidates)
        if not group:
            continue
        others = _stand_ins(effects, first, group, [node for node in candidates if node not in group])
        groups.append((first, group, others))
        settled |= {first, *group, *others}
    return _confirmed(effects, groups, seed)


class _Effects:
    """Exact per-prompt effects of sets of nodes, each measured once."""

    def __init__(self, meter: FaithfulnessMeter) -> None:
        self.meter = meter
        harmful, harmless = meter.ends()
        self.harmful, self.gap = harmful, float((harmful - harmless).mean())
        self.known: dict[frozenset[Node], np.ndarray] = {}

    def of(self, sets: Sequence[Sequence[Node]]) -> list[np.ndarray]:
        """Share of the mean gap lost on each prompt when each set is patched."""
        keys = [frozenset(nodes) for nodes in sets]
        new = [key for key in dict.fromkeys(keys) if key not in self.known]
        if new:
            rows = self.meter.removed([list(in_order(list(key))) for key in new])
            self.known |= {key: (self.harmful - row) / self.gap for key, row in zip(new, rows, strict=True)}
        return [self.known[key] for key in keys]

    def excess(self, groups: Sequence[Sequence[Node]]) -> list[np.ndarray]:
        """How much more each group loses together than its members do one by one."""
        self.of([*groups, *([node] for group in groups for node in group)])
        return [self.of([group])[0] - sum(self.of([[node] for node in group])) for group in groups]


def _needed(effects: _Effects, first: Node, candidates: Sequence[Node]) -> tuple[Node, ...]:
    """The candidates that are redundant with ``first``, without those that the redundancy does not need."""
    if not candidates:
        return ()
    group = list(candidates)
    whole = float(effects.excess([[first, *group]])[0].mean())
    if whole < MIN_JOINT:
        return ()
    for node in reversed(candidates):
        rest = [other for other in group if other != node]
        if rest and float(effects.excess([[first, *rest]])[0].mean()) >= (1 - SLACK) * whole:
            group = rest
    return tuple(group)


def _stand_ins(effects: _Effects, first: Node, group: Sequence[Node], rest: Sequence[Node]) -> tuple[Node, ...]:
    """Nodes that can take the place of one of the group: further parts of the same second way."""
    whole = float(effects.excess([[first, *group]])[0].mean())
    found = []
    for node in rest:
        swapped = [[first, node, *(other for other in group if other != gone)] for gone in group]
        if any(float(values.mean()) >= (1 - SLACK) * whole for values in effects.excess(swapped)):
            found.append(node)
    return tuple(found)


def _confirmed(
    effects: _Effects, groups: Sequence[tuple[Node, tuple[Node, ...], tuple[Node, ...]]], seed: int
) -> tuple[Backup, ...]:
    if not groups:
        return ()
    rows = []
    for first, group, others in groups:
        joint = tuple(sorted((first, *group), key=lambda node: node.order))
        for node in (*group, *others):
            rows.append((node, first, joint))
    excess = np.stack([effects.excess([joint])[0] for _, _, joint in rows])
    p_values = adjust_p(sign_flip_p(excess, seed))
    found: dict[Node, Backup] = {}
    for (node, first, joint), values, p_value in zip(rows, excess, p_values, strict=True):
        single, own, together = (float(v.mean()) for v in effects.of([[node], [first], joint]))
        interval = mean_interval(values, seed)
        # one that works against the behaviour by itself is no second way, whatever it does to the others
        if interval[0] > 0 and abs(single) <= SMALL * together and node not in found:
            found[node] = Backup(node, first, joint, single, own, together, interval, float(p_value))
    return tuple(sorted(found.values(), key=lambda backup: backup.node.order))


def _attribution(meter: FaithfulnessMeter, gone: Node | None, steps: int) -> Tensor:
    """Integrated gradient of every head and MLP, as shares of the gap, with one node patched."""
    model, runs = meter.model, meter.runs
    heads, mlps = torch.ones(model.n_layers, model.n_heads), torch.ones(model.n_layers)
    if gone is not None and gone.kind == "head":
        heads[gone.layer, gone.index] = 0.0
    elif gone is not None and gone.kind == "mlp":
        mlps[gone.layer] = 0.0
    elif gone is not None:
        raise MechsafetyError(f"backups of {gone}", expected="a circuit of heads and MLPs")
    total = torch.zeros(model.n_layers, model.n_heads + 1)
    for step in range(steps):
        grads = mask_gradients(model, runs, meter.metric, (step + 0.5) / steps, live=(heads, mlps))
        total[:, :-1] += grads[0].cpu() * heads / steps
        total[:, -1] += grads[1].cpu() * mlps / steps
    harmful, harmless = meter.ends()
    return rearrange(total, "layer part -> (layer part)") / float((harmful - harmless).mean())


def knocked_out(model: LensModel, runs: PairRuns, nodes: Sequence[Node]) -> PairRuns:
    """The pairs' runs with these nodes at their values in the harmless prompts, as in all that goes on from them.

    The harmless runs are as before, since the values are their own. The model itself is not edited.

    Args:
        model: The model.
        runs: Stored runs of the pairs.
        nodes: What is patched.
    """
    if not nodes:
        return runs
    fixed = fixed_nodes(model, runs.source, nodes)
    kinds = tuple(runs.harmful.acts)
    harmful = base_run(model, runs.harmful.tokens, runs.start, kinds, runs.harmful, fixed=fixed)
    return replace(runs, harmful=harmful, harmless=replace(runs.harmless, fixed=fixed))


def backups_of(
    meter: FaithfulnessMeter,
    result: SearchResult,
    known: Mapping[Part, float],
    effects: Mapping[Node, float],
    *,
    n_parts: int,
    seed: int,
    budget: Budget,
) -> tuple[Backup, ...]:
    """Backups of the nodes that are worth more in the circuit than patching them alone in the whole model shows.

    Args:
        meter: On the pairs of the effects.
        result: The circuit.
        known: What each node adds to it, on the same pairs; measured here where it is empty.
        effects: Effect of each node alone, as far as there was time.
        n_parts: How many nodes to examine.
        seed: Of the resampling.
        budget: Time to keep.
    """
    nodes = result.nodes
    if not n_parts or budget.skips("backups of the circuit's nodes", 0.5):
        return ()
    worth = known or marginals(meter, nodes)
    suspicion = {node: worth[node] - effects[node] for node in nodes if node in effects}
    return find_backups(meter, nodes, suspicion, n_parts=n_parts, seed=seed, budget=budget)


def with_backups(
    result: SearchResult,
    backups: Sequence[Backup],
    max_nodes: int | None,
    meters: Sequence[FaithfulnessMeter],
    goal: Goal,
) -> SearchResult:
    """The circuit with the backups that it lacks, the strongest first, as many as it may grow to.

    A node that replaces another in the whole model may work against refusal in the circuit. Where the circuit meets its
    goal, a backup that would make it miss the goal on some of the pairs is left out; it stays listed.
    """
    outside = [backup for backup in backups if backup.node not in result.circuit]
    outside.sort(key=lambda backup: (-backup.joint, backup.node.order))
    room = len(outside) if max_nodes is None else max(0, max_nodes - len(result.circuit))
    circuit, added = result.circuit, list[Node]()
    for backup in outside:
        if len(added) == room:
            break
        larger = in_order([*circuit, backup.node])
        if result.reached and not meets(goal, meters, larger):
            continue
        circuit, added = larger, [*added, backup.node]
    return replace(result, circuit=circuit, added=tuple(added))


def stand_in_neurons(backups: Sequence[Backup], result: SearchResult) -> list[Backup]:
    """The backups of a circuit of neurons: what a backup MLP replaces is what each of its added neurons replaces."""
    found = []
    for backup in backups:
        if backup.node.kind == "head":
            found.append(backup)
            continue
        rest = tuple(node for node in backup.group if node != backup.node)
        own = [part for part in result.added if isinstance(part, Node) and part.kind == "neuron"]
        found += [replace(backup, node=part, group=rest) for part in own if part.layer == backup.node.layer]
    return [backup for backup in found if backup.node in result.circuit]
