"""`map_refusal_circuit`: from prompts to a verified circuit, in stages that can also be called one by one.

    drawn = draw_pairs(model)                   # does it refuse, and which pairs show it?
    split = split_pairs(model, drawn)           # pairs to rank on, to hold out, and to check on
    ranked = rank_parts(split)                  # gradient estimates of all heads and MLPs
    found = search_circuit(ranked)              # the smallest circuit that meets the goal
    nodes = measure_nodes(found)                # exact effects of single nodes, backups
    measured = measure_parts(found, nodes)      # the circuit with backups, and its neurons
    wired = wire_circuit(measured)              # edges and roles
    checked = verify_circuit(wired)             # every claim
    circuit = assemble_circuit(checked)

Each stage takes what the stage before it returns, and holds it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechsafety.attribution import NodeAttribution
from mechsafety.circuits.assemble import circuit_nodes, node_scores
from mechsafety.circuits.backups import backups_of
from mechsafety.circuits.budget import Budget
from mechsafety.circuits.circuit import Backup, MapDetails, ModelShape, RefusalCircuit, Search
from mechsafety.circuits.costs import Sizes, expected_work
from mechsafety.circuits.draw import MIN_PAIRS, Draw, an_eighth, draw_pairs
from mechsafety.circuits.effects import Measured, on_some, pair_gaps, single_effects, with_intervals
from mechsafety.circuits.faithfulness import FaithfulnessMeter
from mechsafety.circuits.levels import LEVELS, Meters, Refined
from mechsafety.circuits.notes import attention_examples, measure_notes
from mechsafety.circuits.optimal import optimal_constants
from mechsafety.circuits.options import MapOptions
from mechsafety.circuits.search import MAX_EXACT, SearchResult
from mechsafety.circuits.verification.outcome import Stability, Verification
from mechsafety.circuits.verification.stability import PairAttributions, attribute_pairs, bootstrap_stability
from mechsafety.circuits.verification.verify import verify
from mechsafety.circuits.wiring import Wiring, wire
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import public
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.nodes import Node, Part, head_and_mlp_nodes
from mechsafety.patching.norms import block_norms_option
from mechsafety.progress import stages
from mechsafety.prompts import PromptPair, PromptPairs, omissions
from mechsafety.scale.work import sweeps


@sweeps
@public
def map_refusal_circuit(
    model: LensModel,
    pairs: PromptPairs | Draw | None = None,
    metric: RefusalLogOdds | None = None,
    options: MapOptions | None = None,
    *,
    progress: bool = True,
) -> RefusalCircuit:
    """Map which heads and MLPs make the model refuse, how they connect, and verify it.

    1. Check the behaviour: does the model refuse at all? Pairs that it treats as expected are kept.
    2. Split the pairs in three: pairs to rank on; held-out pairs, of other topics where pairs have topics; and, if
       there are at least six held-out pairs, most of them as fresh pairs.
    3. Rank every head and MLP by its gradient attribution on the first part.
    4. Search the smallest circuit whose faithfulness is good enough on the first two parts, measured exactly.
    5. Patch every node of the circuit, and a shortlist of others, one by one on some held-out and fresh pairs. Look for
       nodes that replace others when these are patched (backups), and add them.
    6. Measure edges and roles on held-out pairs.
    7. Verify the circuit (see `verify`), as far as possible on fresh pairs.

    Args:
        model: The model.
        pairs: Pairs, the built-in ones by default. Those that do not align under the model's tokenizer are left out.
            The split name ``test`` marks pairs to hold out; otherwise half of the topics (or of the pairs) can be
            held out. Pairs that `draw_pairs` has drawn already come with their metric and their limit.
        metric: What refusal is measured by; detected from the model's own refusals by default.
        options: What is mapped, how exactly, and within which time.
        progress: Whether to show a bar.

    Raises:
        NoRefusal: The model refuses too few harmful prompts, or too many harmless ones; the rates are in the message.
        MechsafetyError: Too few pairs that align, or a level that this model or these pairs do not have.

    Example:
        >>> circuit = ms.map_refusal_circuit(model, made.pairs, metric, options)
        >>> {one.node for one in circuit.nodes} == set(made.truth.nodes)
        True
    """
    options = options or MapOptions()
    align = "tokens" if pairs is None else (pairs.here if isinstance(pairs, Draw) else pairs).align
    LEVELS[options.level].check(model, align)
    budget = Budget(options.budget_seconds)
    with stages(6, progress) as stage:
        stage.begin("checking whether the model refuses")
        if isinstance(pairs, Draw):
            drawn = _with_metric(pairs, metric)
        else:
            drawn = draw_pairs(model, pairs, metric, limit=options.limit, seed=options.seed, progress=progress)
        split = split_pairs(model, drawn, options, budget=budget, progress=progress)

        def begin(name: str, number: int, circuit: int | None = None) -> None:
            if options.level != "node":  # nobody can tell beforehand how many neurons or edges a search goes through
                return stage.begin(name)
            work = expected_work(_sizes(split, circuit), options)
            return stage.begin(name, work[number], sum(work[number + 1 :]))

        begin("attributing every node", 0)
        ranked = rank_parts(split)
        begin("searching the smallest circuit", 1)
        found = search_circuit(ranked)
        size = len(found.result.circuit)
        begin("patching nodes one by one, looking for backups", 2, size)
        measured = measure_parts(found)
        begin("measuring edges and roles", 3, size)
        wired = wire_circuit(measured)
        begin("checking the circuit", 4, size)
        return assemble_circuit(verify_circuit(wired))


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Pairs by what they are for, run and ready to be measured on.

    Attributes:
        model: The model, read where the metric reads it.
        drawn: The pairs, metric and behaviour.
        options: Of the map.
        budget: Time to keep.
        progress: Whether to show bars.
        held: Pairs that set the circuit's size.
        fresh: Pairs that the search never sees; None where there are too few.
        meters: Faithfulness on the three parts.
        few: Held-out pairs on which roles, edges and backups are measured.
        alone: Meters that patch single nodes, on these pairs and on as many fresh ones as controls are measured on.
    """

    model: LensModel
    drawn: Draw
    options: MapOptions
    budget: Budget
    progress: bool
    held: PromptPairs
    fresh: PromptPairs | None
    meters: Meters
    few: PromptPairs
    alone: tuple[FaithfulnessMeter, ...]


@public
def split_pairs(
    model: LensModel,
    drawn: Draw,
    options: MapOptions | None = None,
    *,
    budget: Budget | None = None,
    progress: bool = True,
) -> Split:
    """Split drawn pairs by what they are for, and run them.

    Args:
        model: The model that drew them.
        drawn: From `draw_pairs`.
        options: Of the map.
        budget: Time to keep; the options' own, from now on, by default.
        progress: Whether to show bars.

    Raises:
        MechsafetyError: Another model drew the pairs.

    Example:
        >>> split = ms.circuits.split_pairs(model, drawn, options)
        >>> len(split.meters.found_on.runs.harmful), len(split.held)
        (4, 4)
    """
    options = options or MapOptions()
    level, metric = LEVELS[options.level], drawn.metric
    _check_drawn_by(model, drawn)
    model = model.reading(metric.opener_ids)
    held, fresh = _held_and_fresh(drawn.there)
    few = held.sample(options.n_role_pairs, options.seed)
    some = None if fresh is None else fresh.sample(options.n_control_pairs, options.seed)
    made: dict[tuple[PromptPair, ...], FaithfulnessMeter] = {}

    def meter(part: PromptPairs) -> FaithfulnessMeter:
        if part.pairs not in made:
            made[part.pairs] = level.meter(model, part, metric, progress)
        return made[part.pairs]

    def single(part: PromptPairs) -> FaithfulnessMeter:
        return meter(part) if level.of_nodes else level.alone(model, part, metric, progress)

    alone = tuple(single(part) for part in (few, some) if part is not None)
    kept = (None if part is None else meter(part) for part in (fresh, some))
    meters = Meters(meter(drawn.here), meter(held), *kept)
    if options.ablation == "mean":
        meters = meters.each(FaithfulnessMeter.at_mean)
    elif options.ablation == "optimal":
        columns = max(one.runs.harmful.n_pos for one in (meters.found_on, *meters.judges))
        constants = optimal_constants(meters.found_on, columns=columns, seed=options.seed)
        meters = meters.each(lambda one: one.at_constants(constants))
    return Split(
        model=model,
        drawn=drawn,
        options=options,
        budget=Budget(options.budget_seconds) if budget is None else budget,
        progress=progress,
        held=held,
        fresh=fresh,
        meters=meters,
        few=few,
        alone=alone,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Ranked:
    """Gradient estimates of every head and MLP.

    Attributes:
        split: The stage before.
        by_pair: Estimates of each pair alone, from which any resample of the pairs is ranked.
        attribution: Their mean.
    """

    split: Split
    by_pair: PairAttributions
    attribution: NodeAttribution


def rank_parts(split: Split) -> Ranked:
    """Attribute every head and MLP on the pairs to rank on.

    Example:
        >>> str(ms.circuits.rank_parts(split).attribution.ranked()[0])
        'L0.H1'
    """
    by_pair = attribute_pairs(split.meters.found_on)
    return Ranked(split, by_pair, by_pair.mean())


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The smallest circuit that meets the goal.

    Attributes:
        ranked: The stage before.
        result: The circuit, the ranking and the curve.
    """

    ranked: Ranked
    result: SearchResult


def search_circuit(ranked: Ranked) -> Found:
    """Search the smallest circuit on the pairs that were ranked on and the held-out ones.

    Example:
        >>> result = ms.circuits.search_circuit(ranked).result
        >>> len(result.circuit), result.reached
        (4, True)
    """
    split = ranked.split
    options = split.options
    result = LEVELS[options.level].search(split.meters, ranked.attribution, options, split.budget)
    return Found(ranked, result)


@dataclass(frozen=True, slots=True, eq=False)
class NodeEffects:
    """Exact effects of single heads and MLPs, and the backups among them: the same for circuits of nodes and neurons.

    Attributes:
        nodes: The nodes that were patched alone.
        effects: Effect of each on every pair of `Split.alone`, as a share of the mean gap; float64.
        backups: All backups that were found.
    """

    nodes: tuple[Node, ...]
    effects: Float[Tensor, "node pair"]
    backups: tuple[Backup, ...]


def measure_nodes(found: Found) -> NodeEffects:
    """Patch the circuit's nodes and a shortlist of others one by one, and look for backups.

    Example:
        >>> alone = ms.circuits.measure_nodes(searched)
        >>> alone.effects.shape  # node, pair
        torch.Size([4, 4])
    """
    split, result = found.ranked.split, found.result
    options, budget = split.options, split.budget
    asked = _to_measure(result, found.ranked.attribution, options.shortlist)
    effects = single_effects(split.alone, asked, budget, split.progress)
    few, n_parts = split.alone[0], options.n_backup_parts
    known = result.marginals if few is split.meters.held_out else {}
    alone = on_some(effects, split.alone, range(len(split.few)))
    backups = backups_of(few, result, known, alone, n_parts=n_parts, seed=options.seed, budget=budget)
    n_pairs = sum(len(meter.runs.harmful) for meter in split.alone)
    rows = np.stack(list(effects.values())) if effects else np.zeros((0, n_pairs))
    return NodeEffects(tuple(effects), torch.from_numpy(rows), backups)


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredParts:
    """The circuit with backups, of the parts that its level asks for, and exact effects of its nodes.

    Attributes:
        found: The stage before.
        circuit: The circuit, its meters, and the backups in it.
        backups: All backups that were found.
        stability: Of the search under resampled prompts; None where it was not measured.
        intervals: Mean exact effect of single nodes, its interval and its p value.
    """

    found: Found
    circuit: Refined
    backups: tuple[Backup, ...]
    stability: Stability | None
    intervals: Mapping[Node, Measured]


def measure_parts(found: Found, nodes: NodeEffects | None = None) -> MeasuredParts:
    """Add backups, repeat the ranking on resampled pairs, and take MLPs apart where the level asks for neurons.

    Args:
        found: The circuit.
        nodes: What `measure_nodes` has measured; by default it is measured here.

    Example:
        >>> measured = ms.circuits.measure_parts(searched)
        >>> len(measured.backups)
        1
    """
    split, result = found.ranked.split, found.result
    options, budget, level = split.options, split.budget, LEVELS[split.options.level]
    nodes = measure_nodes(found) if nodes is None else nodes

    def ranking_of(weights: Sequence[int] | None) -> Sequence[Part]:
        """The search's own ranking, or that of resampled pairs."""
        if weights is None:
            return found.result.ranking
        return level.ranking(split.meters, found.ranked.by_pair.mean(weights), options, weights)

    stability = None
    if level.of_nodes:
        stability = bootstrap_stability(
            split.meters.found_on,
            ranking_of,
            options.aim,
            n=options.resamples,
            seed=options.seed,
            budget=budget,
            curve=([point.n_nodes for point in result.curve], np.array(result.found_scores)),
            runs_model=options.search == "masks",
        )
    result = level.with_backups(result, nodes.backups, split.meters, options, budget)
    inside = tuple(backup for backup in nodes.backups if backup.node in result.nodes)
    coarse = Refined(result, split.meters, found.ranked.attribution, inside)
    circuit = level.refined(coarse, options, budget)
    effects = dict(zip(nodes.nodes, nodes.effects.numpy(), strict=True))
    new = [node for node in circuit.result.nodes if node not in effects]
    if len(new) > MAX_EXACT:
        budget.left_out(f"exact effects of single nodes: {MAX_EXACT} of {len(new)}, those of the largest estimates")
        new = sorted(new, key=lambda node: (-abs(circuit.attribution.of(node)), node.order))[:MAX_EXACT]
    effects |= single_effects(split.alone, new, budget, split.progress)
    intervals = with_intervals(effects, pair_gaps(split.alone), options.seed)
    return MeasuredParts(found, circuit, nodes.backups, stability, intervals)


@dataclass(frozen=True, slots=True, eq=False)
class Wired:
    """The circuit with its edges and roles.

    Attributes:
        measured: The stage before.
        wiring: Edges and roles.
        result: The circuit without nodes that nothing connects.
    """

    measured: MeasuredParts
    wiring: Wiring
    result: SearchResult


def wire_circuit(measured: MeasuredParts) -> Wired:
    """Measure edges and roles, and drop nodes that nothing connects.

    Example:
        >>> wired = ms.circuits.wire_circuit(measured)
        >>> [str(node) for node in wired.result.circuit]
        ['L0.H1', 'L0.MLP', 'L1.MLP', 'L3.H1', 'L3.MLP']
    """
    split, result = measured.found.ranked.split, measured.circuit.result
    options = split.options
    inside = set(result.nodes)
    wiring = wire(
        split.alone[0],
        result.nodes,
        measured.circuit.backups,
        [node for node in LEVELS[options.level].nodes(measured.circuit.meters) if node not in inside],
        n_edges=options.n_edges,
        budget=split.budget,
        own=LEVELS[options.level].own_edges(result),
    )
    wiring = LEVELS[options.level].wired(wiring, result)
    left = tuple(part for part in result.circuit if part not in wiring.dropped)
    added = tuple(part for part in result.added if part not in wiring.dropped)
    return Wired(measured, wiring, replace(result, circuit=left, added=added))


@dataclass(frozen=True, slots=True, eq=False)
class Verified:
    """The circuit with every check of it.

    Attributes:
        wired: The stage before.
        check: The checks and claims.
    """

    wired: Wired
    check: Verification


def verify_circuit(wired: Wired) -> Verified:
    """Check the circuit, as far as possible on fresh pairs.

    Example:
        >>> verified = ms.circuits.verify_circuit(wired)
        >>> verified.check.by_verdict["holds"]
        ('completeness', 'harmless prompts', 'complement')
    """
    measured = wired.measured
    split, meters = measured.found.ranked.split, measured.circuit.meters
    options, drawn = split.options, split.drawn
    check = verify(
        wired.result,
        meters.found_on,
        meters.held_out,
        meters.fresh,
        meters.controls,
        target=options.target,
        goal=options.goal,
        topics=_unseen_topics(drawn.here, drawn.there),
        n_random=options.n_random,
        n_added=options.n_added,
        stability=measured.stability,
        budget=split.budget,
        seed=options.seed,
    )
    return Verified(wired, check)


def assemble_circuit(verified: Verified) -> RefusalCircuit:
    """Put everything that was measured into one result.

    Example:
        >>> ms.circuits.assemble_circuit(verified)
        RefusalCircuit(planted-rmsnorm-4x4-5: 5 of 20 nodes, 7 edges, ...)
    """
    wired, check = verified.wired, verified.check
    measured, wiring, result = wired.measured, wired.wiring, wired.result
    split = measured.found.ranked.split
    model, drawn, attribution = split.model, split.drawn, measured.circuit.attribution
    before = measured.circuit.result
    members = circuit_nodes(
        result.nodes, attribution, measured.intervals, wiring.roles, check.minimality, split.options.aim
    )
    neurons = [node for node in before.nodes if node.kind == "neuron"]
    every = [*head_and_mlp_nodes(model.n_layers, model.n_heads), *neurons]
    return RefusalCircuit(
        provenance=model.provenance(seed=split.options.seed, options=_provenance_options(split)),
        metric=drawn.metric.to_json(),
        behaviour=drawn.behaviour,
        nodes=members,
        edges=wiring.edges,
        verification=check,
        n_candidates=len(measured.circuit.meters.found_on.parts),
        details=MapDetails(
            model.n_layers,
            model.n_heads,
            node_scores(every, result.nodes, attribution, measured.intervals),
            drawn.samples,
            attention_examples(model, drawn.here, members),
            measure_notes(
                model,
                split.alone[0].runs,
                split.few,
                [m.node for m in members if m.ci or not m.evidence.together],
            ),
        ),
        level=split.options.level,
        search=Search(
            ranked=result.ranked,
            removed=before.ranked - (len(before.circuit) - len(before.added)),
            minimal=result.minimal,
            backups=measured.backups,
            linked=wiring.linked,
            dropped=wiring.dropped,
            cut=split.budget.cut,
        ),
        shape=ModelShape(model.n_layers, model.n_heads, model.d_mlp),
    )


def _provenance_options(split: Split) -> dict[str, Any]:
    """The map's options, how many pairs there were, and choices that are fixed."""
    chosen = asdict(split.options)
    del chosen["seed"]  # stands in the provenance itself
    drawn = split.drawn.provenance.options
    return {
        **chosen,
        "n_resamples": split.options.resamples,
        "pairs": drawn["pairs"],
        "limit": drawn["limit"],
        "found_on": len(split.drawn.here),
        "held_out": len(split.held),
        "fresh": 0 if split.fresh is None else len(split.fresh),
        "edge_mlp": "freeze",
        "edge_downstream": "live",
        **block_norms_option(split.model, "recomputed"),
        **omissions(split.drawn.here),
    }


def _sizes(split: Split, circuit: int | None) -> Sizes:
    """How much a map measures, for the time left."""
    n_alone = [len(meter.runs.harmful) for meter in split.alone]
    return Sizes(
        here=len(split.drawn.here),
        held=len(split.held),
        few=n_alone[0],
        controls=n_alone[-1],
        parts=len(split.meters.found_on.parts),
        circuit=circuit,
    )


def _check_drawn_by(model: LensModel, drawn: Draw) -> None:
    """Refuse pairs that another model drew.

    Raises:
        MechsafetyError: Another model drew them.
    """
    other = drawn.provenance.difference(model.provenance())
    if other is not None:
        what, its, mine = other
        raise MechsafetyError(
            f"pairs drawn with other {what} ({its}) than those of {model.name} ({mine})",
            expected="pairs that this model drew",
            hint="draw_pairs(model, pairs)",
        )


def _with_metric(drawn: Draw, metric: RefusalLogOdds | None) -> Draw:
    """Pairs that were drawn before, if no other metric is given.

    Raises:
        MechsafetyError: Another metric is given.
    """
    if metric is not None and metric != drawn.metric:
        raise MechsafetyError(
            "pairs drawn with another metric", expected="theirs, or none", hint="draw_pairs(model, pairs, metric)"
        )
    return drawn


def _held_and_fresh(there: PromptPairs) -> tuple[PromptPairs, PromptPairs | None]:
    """Where there are enough pairs, most of them are kept from the search."""
    if len(there) < 3 * MIN_PAIRS:
        return there, None
    n = an_eighth(len(there))
    held = {math.ceil(k * len(there) / n) for k in range(n)}
    sides = ([pair for k, pair in enumerate(there) if (k in held) == side] for side in (True, False))
    first, rest = (replace(there, pairs=tuple(pairs)) for pairs in sides)
    return first, rest


def _unseen_topics(here: PromptPairs, there: PromptPairs) -> list[str]:
    """Topics of the held-out pairs, if every one has a topic and the search saw none of them."""
    return [] if "" in there.topics or set(here.topics) & set(there.topics) else there.topics


def _to_measure(result: SearchResult, attribution: NodeAttribution, shortlist: int) -> list[Node]:
    """The circuit's nodes, then those outside it with the largest estimates."""
    inside = result.nodes
    outside = [node for node in attribution.ranked() if node not in set(inside)][:shortlist]
    return [*inside, *sorted(outside, key=lambda node: node.order)]
