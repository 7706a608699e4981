"""`map_refusal_circuit`: from prompts to a verified circuit."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mechsafety.attribution import NodeAttribution
from mechsafety.circuits.assemble import (
    circuit_nodes,
    node_scores,
    pair_gaps,
    single_effects,
    wire,
    with_intervals,
)
from mechsafety.circuits.backups import find_backups
from mechsafety.circuits.budget import Budget
from mechsafety.circuits.circuit import (
    LEVELS,
    Backup,
    CircuitEdge,
    MapDetails,
    ModelShape,
    RefusalCircuit,
    Search,
)
from mechsafety.circuits.draw import MIN_PAIRS, Draw, draw_pairs
from mechsafety.circuits.edge_faithfulness import EdgeMeter
from mechsafety.circuits.edge_search import edge_scores, search_edges
from mechsafety.circuits.faithfulness import FaithfulnessMeter, in_order
from mechsafety.circuits.neurons import NeuronMeter, refine
from mechsafety.circuits.notes import attention_examples, measure_notes
from mechsafety.circuits.search import ROUNDING, Discovery, check_search, discover, marginals
from mechsafety.circuits.verification.stability import attribute_pairs, bootstrap_stability
from mechsafety.circuits.verification.verify import MARGIN, verify
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Amount, Count, public
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.nodes import Edge, Node, Part, head_and_mlp_nodes
from mechsafety.patching import pair_runs
from mechsafety.patching.norms import block_norms_option
from mechsafety.prompts import PromptPairs, omissions
from mechsafety.sites import SiteKind


@public
def map_refusal_circuit(
    model: LensModel,
    pairs: PromptPairs | Draw | None = None,
    metric: RefusalLogOdds | None = None,
    *,
    level: str = "node",
    limit: Count = 40,
    target: float = 0.8,
    max_nodes: Count | None = None,
    n_random: Amount = 100,
    n_added: Amount = 40,
    n_resamples: Amount = 5,
    n_backup_parts: Amount = 4,
    n_edges: Amount = 60,
    n_measured_edges: Amount = 30,
    n_role_pairs: Count = 8,
    shortlist: Amount = 30,
    budget_seconds: float | None = None,
    seed: Amount = 0,
    progress: bool = True,
) -> RefusalCircuit:
    """Map which heads and MLPs make the model refuse, how they connect, and verify it.

    Behaviour check (does it refuse at all?); gradient attribution ranks every node; the smallest set found that reaches
    ``target`` faithfulness, measured exactly; every node of it and a shortlist patched one by one; nodes that stand in
    for others (backups) searched jointly and added; edges and roles; then every check of `verify`, as far as it can be
    on pairs that played no part in the search.

    The pairs fall into three parts: one to rank on; held-out ones, of other topics where pairs have topics, which set
    the circuit's size; and, if the held-out part has at least six, fresh ones taken from it, for the checks alone.
    Single effects are measured on the held-out and fresh pairs, backups, roles and edges on the held-out ones.

    Args:
        model: The model.
        pairs: Pairs, the built-in ones by default; those that do not align under the model's tokenizer are left out.
            The split name ``test`` marks pairs to hold out, else half of the topics (or of the pairs) is held out. Or
            pairs that `draw_pairs` has drawn already, with their metric; ``limit`` is then theirs.
        metric: What refusal is measured by; detected from the model's own refusals by default.
        level: ``node``: heads and MLPs. ``neuron``: the MLPs of that circuit are then taken apart into neurons.
            ``edge``: the smallest set of edges, everything else cut (as `discover_edges`), and the nodes on it.
        limit: Pairs to try, half of them held out; those that the model does not treat as expected (harmful refused,
            harmless answered) drop out. Where fewer than half of a part are left, more are tried until half as many
            are there, so that a model that refuses a third is mapped on that third. ``speaks_for`` of the result says
            how many of how many.
        target: Faithfulness to reach, in (0, 1].
        max_nodes: Largest circuit, in edges at level ``edge``; where the target needs more, the circuit misses it and
            says so.
        n_random: Random circuits; the smallest possible p is 1 / (1 + n_random).
        n_added: Parts added at random, which minimality is measured against.
        n_resamples: Bootstrap resamples of the prompts on which the search is repeated.
        n_backup_parts: Nodes of the circuit whose backups are looked for, the most suspicious first.
        n_edges: Edges to keep, strongest first; those that a node needs to be connected come on top.
        n_measured_edges: How many of them to measure exactly; the others stay estimates.
        n_role_pairs: Pairs on which roles, edges and backups are measured.
        shortlist: Nodes outside the circuit to measure as well, largest estimates first.
        budget_seconds: Time to keep: later stages are cut short, and ``search.cut`` says which. The behaviour check,
            the attribution and the curve are always run. The same seed gives the same bytes only without it.
        seed: Of sampling, bootstrap and random circuits; at least 0.
        progress: Whether to show bars.

    Raises:
        NoRefusal: The model refuses too few harmful prompts, or too many harmless ones; the rates are in the message.
        MechsafetyError: Bad options, too few pairs that align, or ``neuron`` of a mixture of experts.
    """
    counts = {
        "n_random": n_random,
        "n_added": n_added,
        "n_resamples": n_resamples,
        "n_backup_parts": n_backup_parts,
        "n_edges": n_edges,
        "n_measured_edges": n_measured_edges,
    }
    _check_options(level, budget_seconds)
    if level == "neuron":
        model.check_neurons()
    check_search(target, max_nodes)
    align = (pairs.here if isinstance(pairs, Draw) else pairs).align if pairs is not None else "tokens"
    if level == "edge" and align == "suffix":
        raise MechsafetyError("level 'edge' on pairs aligned at the suffix", expected="'node' or 'neuron'")
    budget = Budget(budget_seconds)
    if isinstance(pairs, Draw):
        drawn = _of_this_model(pairs, model, metric)
    else:
        drawn = draw_pairs(model, pairs, metric, limit=limit, seed=seed, progress=progress)
    here, there, metric = drawn.here, drawn.there, drawn.metric
    model = model.reading(metric.opener_ids)
    held, fresh = _held_and_fresh(there)
    kind = EdgeMeter if level == "edge" else FaithfulnessMeter

    def meter(part: PromptPairs, kind: type[FaithfulnessMeter] = kind) -> FaithfulnessMeter:
        extra = [SiteKind.NEURONS] if level == "neuron" else []
        made = kind(model, pair_runs(model, part, extra=extra), metric, progress=progress)
        return made if kind is EdgeMeter else made.grouped()

    checked_on = [held] if fresh is None else [held, fresh]
    found_on, judges = meter(here), [meter(part) for part in checked_on]
    held_out, untouched = judges[0], judges[1] if fresh is not None else None
    # single nodes are patched on all of these; what decides who is in the circuit may not see the fresh ones
    alone_on = judges if kind is FaithfulnessMeter else [meter(part, FaithfulnessMeter) for part in checked_on]
    some = held.sample(n_role_pairs, seed)
    few = alone_on[0] if len(some) == len(held) else meter(some, FaithfulnessMeter)
    rows_of_some = [held.pairs.index(pair) for pair in some]
    with _Stage(6, progress) as stage:
        stage("attributing every node")
        attributions = attribute_pairs(found_on)
        attribution = attributions.mean()
        stage("searching the smallest circuit")
        if isinstance(found_on, EdgeMeter) and isinstance(held_out, EdgeMeter):
            scores = edge_scores(found_on)
            core = search_edges(found_on, held_out, scores, target, max_edges=max_nodes, budget=budget)
        else:
            core = discover(found_on, held_out, attribution, target, max_nodes=max_nodes, budget=budget)
        stage("patching the circuit's nodes one by one")
        asked = _to_measure(core, attribution, shortlist)
        effects = single_effects(alone_on, asked, budget, progress)
        stage("looking for backups")
        backups: tuple[Backup, ...] = ()
        stability = None
        if level != "edge":
            known = core.marginals if few is held_out else {}
            on_some = _on_some(effects, alone_on, rows_of_some)
            backups = _backups(few, core, known, on_some, n_backup_parts, seed, budget)
            stability = bootstrap_stability(found_on, attributions, target, n=n_resamples, seed=seed, budget=budget)
        final = _with_backups(core, backups, max_nodes, (found_on, held_out), target)
        standing_in = [backup for backup in backups if backup.node in final.circuit]
        if level == "neuron" and not budget.skips("neurons", 0.5):
            final, (found_on, held_out), attribution = refine(found_on, held_out, final, standing_in, target, budget)
            if untouched is not None:
                untouched = NeuronMeter.of(untouched, found_on.layers)
            standing_in = _taken_apart(standing_in, final)
        nodes = _nodes_of(final)
        new = [node for node in nodes if node not in effects]
        effects |= single_effects(alone_on, new, budget, progress)
        measured = with_intervals(effects, pair_gaps(alone_on), seed)
        stage("measuring edges and roles")
        wiring = wire(
            few,
            nodes,
            standing_in,
            n_edges=n_edges,
            n_measured=n_measured_edges,
            budget=budget,
            progress=progress,
            # on the same pairs as the evidence, since roles compare the two
            effects=_on_some(effects, alone_on, rows_of_some),
        )
        stage("checking the circuit")
        if level == "edge":
            wired = {member.edge: member for member in wiring.edges}
            own = [edge for edge in final.circuit if isinstance(edge, Edge)]
            edges = [wired.get(edge, CircuitEdge(edge, scores[edge], "estimated", scores[edge])) for edge in own]
            wiring = replace(wiring, edges=tuple(sorted(edges, key=lambda m: -abs(m.effect))), linked=(), dropped=())
        removed = final.ranked - (len(final.circuit) - len(final.added))
        final = replace(
            final,
            circuit=tuple(part for part in final.circuit if part not in wiring.dropped),
            added=tuple(part for part in final.added if part not in wiring.dropped),
        )
        check = verify(
            final,
            found_on,
            held_out,
            untouched,
            target=target,
            topics=_unseen_topics(here, there),
            n_random=n_random,
            n_added=n_added,
            stability=stability,
            budget=budget,
            seed=seed,
        )
    options = {
        "pairs": drawn.provenance.options["pairs"],
        "level": level,
        "limit": drawn.provenance.options["limit"],
        "found_on": len(here),
        "held_out": len(held),
        "fresh": 0 if fresh is None else len(fresh),
        "target": target,
        "max_nodes": max_nodes,
        **counts,
        "edge_mlp": "freeze",
        "edge_downstream": "live",
        "equivalence_margin": MARGIN,
        "n_role_pairs": n_role_pairs,
        "shortlist": shortlist,
        "budget_seconds": budget_seconds,
        **block_norms_option(model, "recomputed"),
        **omissions(drawn.here),
    }
    members = circuit_nodes(_nodes_of(final), attribution, measured, wiring.roles, check.minimality)
    every = [*head_and_mlp_nodes(model.n_layers, model.n_heads), *(n for n in nodes if n.kind == "neuron")]
    return RefusalCircuit(
        provenance=model.provenance(seed=seed, options=options),
        metric=metric.to_json(),
        behaviour=drawn.behaviour,
        nodes=members,
        edges=wiring.edges,
        verification=check,
        n_candidates=len(found_on.parts),
        details=MapDetails(
            model.n_layers,
            model.n_heads,
            node_scores(every, _nodes_of(final), attribution, measured),
            drawn.samples,
            attention_examples(model, here, members),
            measure_notes(model, few.runs, some, [member.node for member in members]),
        ),
        level=level,
        search=Search(
            ranked=final.ranked,
            removed=removed,
            minimal=final.minimal,
            backups=backups,
            linked=wiring.linked,
            dropped=wiring.dropped,
            cut=budget.cut,
        ),
        shape=ModelShape(model.n_layers, model.n_heads, model.d_mlp),
    )


def _check_options(level: str, budget_seconds: float | None) -> None:
    if level not in LEVELS:
        raise MechsafetyError(f"level {level!r}", expected=f"one of {LEVELS}")
    if budget_seconds is not None and not budget_seconds > 0:
        raise MechsafetyError(f"budget_seconds {budget_seconds}", expected="above 0")


def _of_this_model(drawn: Draw, model: LensModel, metric: RefusalLogOdds | None) -> Draw:
    """Pairs that were drawn before, if this model drew them and no other metric is asked for.

    Raises:
        MechsafetyError: Otherwise.
    """
    other = drawn.provenance.difference(model.provenance())
    if other is not None:
        what, its, mine = other
        raise MechsafetyError(
            f"pairs drawn with other {what} ({its}) than those of {model.name} ({mine})",
            expected="pairs that this model drew",
            cure="draw_pairs(model, pairs)",
        )
    if metric is not None and metric != drawn.metric:
        raise MechsafetyError(
            "pairs drawn with another metric", expected="theirs, or none", cure="draw_pairs(model, pairs, metric)"
        )
    return drawn


def _on_some(
    effects: Mapping[Node, np.ndarray], meters: Sequence[FaithfulnessMeter], rows: Sequence[int]
) -> dict[Node, float]:
    """Mean effect on some of the pairs, as a share of their own gap."""
    gaps = pair_gaps(meters)
    scale = gaps.mean() / gaps[rows].mean()
    return {node: float(values[rows].mean() * scale) for node, values in effects.items()}


def _held_and_fresh(there: PromptPairs) -> tuple[PromptPairs, PromptPairs | None]:
    """Every other pair is set aside for the checks alone, where there are enough of them."""
    if len(there) < 3 * MIN_PAIRS:
        return there, None
    return there[::2], there[1::2]


def _unseen_topics(here: PromptPairs, there: PromptPairs) -> list[str]:
    """Topics of the held-out pairs, if every one has a topic and the search saw none of them."""
    return [] if "" in there.topics or set(here.topics) & set(there.topics) else there.topics


def _nodes_of(discovery: Discovery) -> list[Node]:
    """The nodes of a circuit, or those that its edges run between."""
    nodes = {part for part in discovery.circuit if isinstance(part, Node)}
    for part in discovery.circuit:
        if isinstance(part, Edge):
            nodes |= {part.sender, part.receiver}
    return sorted((n for n in nodes if n.kind not in ("embed", "logits")), key=lambda node: node.order)


def _to_measure(discovery: Discovery, attribution: NodeAttribution, shortlist: int) -> list[Node]:
    """The circuit's nodes, then those outside it with the largest estimates."""
    inside = _nodes_of(discovery)
    outside = [node for node in attribution.ranked() if node not in set(inside)][:shortlist]
    return [*inside, *sorted(outside, key=lambda node: node.order)]


def _backups(
    meter: FaithfulnessMeter,
    core: Discovery,
    known: Mapping[Part, float],
    effects: Mapping[Node, float],
    n_parts: int,
    seed: int,
    budget: Budget,
) -> tuple[Backup, ...]:
    """Backups of the nodes that are worth more in the circuit than patching them alone in the whole model shows.

    Args:
        meter: On the pairs of the effects.
        core: The circuit.
        known: What each node adds to it, on the same pairs; measured here where it is empty.
        effects: Effect of each node alone, as far as there was time.
        n_parts: How many nodes to examine.
        seed: Of the resampling.
        budget: Time to keep.
    """
    nodes = _nodes_of(core)
    if not n_parts or budget.skips("backups of the circuit's nodes", 0.5):
        return ()
    worth = known or marginals(meter, nodes)
    suspicion = {node: worth[node] - effects[node] for node in nodes if node in effects}
    return find_backups(meter, nodes, suspicion, n_parts=n_parts, seed=seed, budget=budget)


def _with_backups(
    discovery: Discovery,
    backups: Sequence[Backup],
    max_nodes: int | None,
    meters: Sequence[FaithfulnessMeter],
    target: float,
) -> Discovery:
    """The circuit with the backups that it lacks, the strongest first, as many as it may grow to.

    A part that stands in for another in the whole model may work against refusal in the circuit. Where the circuit
    reaches the target, a backup that would make it miss the target on some of the pairs is left out; it stays listed.
    """
    outside = [backup for backup in backups if backup.node not in discovery.circuit]
    outside.sort(key=lambda backup: (-backup.joint, backup.node.order))
    room = len(outside) if max_nodes is None else max(0, max_nodes - len(discovery.circuit))
    circuit, added = discovery.circuit, list[Node]()
    for backup in outside:
        if len(added) == room:
            break
        larger = in_order([*circuit, backup.node])
        if discovery.reached and any(meter.faithfulness([larger])[0] < target - ROUNDING for meter in meters):
            continue
        circuit, added = larger, [*added, backup.node]
    return replace(discovery, circuit=circuit, added=tuple(added))


def _taken_apart(backups: Sequence[Backup], discovery: Discovery) -> list[Backup]:
    """The backups of a circuit of neurons: an MLP's role is that of each of its neurons that were added."""
    found = []
    for backup in backups:
        if backup.node.kind == "head":
            found.append(backup)
            continue
        rest = tuple(node for node in backup.group if node != backup.node)
        own = [part for part in discovery.added if isinstance(part, Node) and part.kind == "neuron"]
        found += [replace(backup, node=part, group=rest) for part in own if part.layer == backup.node.layer]
    return [backup for backup in found if backup.node in discovery.circuit]


class _Stage:
    """A bar with one tick a stage, on stderr."""

    def __init__(self, total: int, show: bool) -> None:
        from tqdm.auto import tqdm

        self.bar: Any = tqdm(total=total, desc="mapping", disable=not show, leave=False)
        self.started = False

    def __enter__(self) -> "_Stage":
        return self

    def __call__(self, name: str) -> None:
        if self.started:
            self.bar.update()
        self.started = True
        self.bar.set_description(name)

    def __exit__(self, *error: object) -> None:
        self.bar.close()
