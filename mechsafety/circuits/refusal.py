"""`map_refusal_circuit`: from prompts to a verified circuit."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mechsafety.attribution import NodeAttribution, node_attribution
from mechsafety.circuits.circuit import (
    AttentionExample,
    Behaviour,
    CircuitEdge,
    CircuitNode,
    MapDetails,
    NodeScore,
    RefusalCircuit,
    RoleEvidence,
    Sample,
)
from mechsafety.circuits.discover import Discovery, FaithfulnessMeter, discover
from mechsafety.circuits.edges import estimate_edges, measure_edges
from mechsafety.circuits.roles import assign_roles, role_evidence
from mechsafety.circuits.verify import verify
from mechsafety.errors import MechsafetyError, NoRefusal
from mechsafety.metrics import (
    RefusalLogOdds,
    bootstrap_interval,
    is_refusal,
    wilson_interval,
)
from mechsafety.models import LensModel
from mechsafety.nodes import Node, head_and_mlp_nodes
from mechsafety.patching import PatchMap, activation_patching, pair_runs
from mechsafety.patching.masks import PairRuns
from mechsafety.prompts import PromptPairs

logger = logging.getLogger(__name__)

# exact effect, its interval, its adjusted p
Measured = tuple[float, tuple[float, float], float]

MIN_PAIRS = 2
# below this share of usable pairs there is no refusal worth mapping
MIN_SHARE = 0.2
REPLY_TOKENS = 24


def map_refusal_circuit(
    model: LensModel,
    pairs: PromptPairs | None = None,
    metric: RefusalLogOdds | None = None,
    *,
    limit: int = 40,
    target: float = 0.8,
    n_random: int = 120,
    n_edges: int = 60,
    n_measured_edges: int = 30,
    n_role_pairs: int = 8,
    shortlist: int = 30,
    seed: int = 0,
    progress: bool = True,
) -> RefusalCircuit:
    """Map which heads and MLPs make the model refuse, how they connect, and verify it.

    Behaviour check (does it refuse at all?); gradient attribution ranks every node; the smallest set found that reaches
    ``target`` faithfulness, measured exactly; every node of it and a shortlist patched one by one; edges and roles;
    then faithfulness, necessity and size-matched random controls on pairs that played no part in the search.

    The pairs fall into three parts: one to rank on; held-out ones, of other topics where pairs have topics, which set
    the circuit's size; and, if the held-out part has at least six, fresh ones taken from it, for the checks alone.
    Effects, roles and edges are measured on the held-out and fresh pairs.

    Args:
        model: The model.
        pairs: Aligned pairs; the built-in ones by default. The split name ``test`` marks pairs to hold out, else half
            of the topics (or of the pairs) is held out.
        metric: What refusal is measured by; detected from the model's own refusals by default.
        limit: Pairs to use at most, half of them held out; pairs the model does not treat as expected drop out.
        target: Faithfulness to reach, in (0, 1].
        n_random: Random circuits; the smallest possible p is 1 / (1 + n_random).
        n_edges: Edges to keep, strongest first.
        n_measured_edges: How many of them to measure exactly; the others stay estimates.
        n_role_pairs: Pairs on which roles and edges are measured.
        shortlist: Nodes outside the circuit to measure as well, largest estimates first.
        seed: Of sampling, bootstrap and random circuits; at least 0.
        progress: Whether to show bars.

    Raises:
        NoRefusal: The model refuses too few harmful prompts, or too many harmless ones; the rates are in the message.
        MechsafetyError: Bad options, too few pairs, or pairs that do not align.
    """
    if not 0 < target <= 1:
        raise MechsafetyError(f"target {target}", expected="a faithfulness in (0, 1]")
    if limit < 2 * MIN_PAIRS:
        raise MechsafetyError(f"limit {limit}", expected=f"at least {2 * MIN_PAIRS} pairs")
    if seed < 0:
        raise MechsafetyError(f"seed {seed}", expected="at least 0")
    chosen = pairs if pairs is not None else PromptPairs.builtin()
    here, there = _two_parts(chosen, limit, seed)
    # alignment is checked before anything slow is run
    model.tokenize_pairs(here)
    model.tokenize_pairs(there)
    both = PromptPairs((*here.pairs, *there.pairs), chosen.name)
    metric, behaviour, samples, keep = check_behaviour(model, both, metric, detect_on=len(here), seed=seed)
    here, there = _usable(here, there, keep, behaviour)
    held, fresh = _held_and_fresh(there)
    runs = pair_runs(model, here)
    found_on = FaithfulnessMeter(model, runs, metric)
    held_out = FaithfulnessMeter(model, pair_runs(model, held), metric)
    untouched = FaithfulnessMeter(model, pair_runs(model, fresh), metric) if fresh is not None else None
    with _Stage(5, progress) as stage:
        stage("attributing every node")
        attribution = node_attribution(model, runs, metric, progress=progress)
        stage("searching the smallest circuit")
        discovery = discover(found_on, held_out, attribution, target)
        stage("patching the circuit's nodes one by one")
        measured_on = pair_runs(model, there)
        patched = activation_patching(
            model, measured_on, metric, nodes=_to_measure(discovery, attribution, shortlist), progress=progress
        )
        stage("measuring edges and roles")
        few = pair_runs(model, there.sample(n_role_pairs, seed))
        edges, roles = _edges_and_roles(model, few, metric, discovery, n_edges, n_measured_edges, progress=progress)
        stage("random control circuits")
        check = verify(
            discovery,
            found_on,
            held_out,
            untouched,
            target=target,
            topics=_unseen_topics(here, there),
            n_random=n_random,
            seed=seed,
        )
    options = {
        "pairs": chosen.name,
        "limit": limit,
        "found_on": len(here),
        "held_out": len(held),
        "fresh": 0 if fresh is None else len(fresh),
        "target": target,
        "n_random": n_random,
        "n_edges": n_edges,
        "n_measured_edges": n_measured_edges,
        "edge_mlp": "freeze",
        "edge_downstream": "live",
        "n_role_pairs": n_role_pairs,
        "shortlist": shortlist,
    }
    measured = _measured(patched, seed)
    nodes = _circuit_nodes(discovery, measured, roles, check.minimality or {})
    return RefusalCircuit(
        provenance=model.provenance(seed=seed, options=options),
        metric=metric.to_json(),
        behaviour=behaviour,
        nodes=nodes,
        edges=tuple(edges),
        verification=check,
        n_candidates=len(discovery.ranking),
        details=MapDetails(
            model.n_layers,
            model.n_heads,
            _scores(discovery, attribution, measured),
            samples,
            _attention_examples(model, here, nodes),
        ),
    )


def check_behaviour(
    model: LensModel,
    pairs: PromptPairs,
    metric: RefusalLogOdds | None = None,
    *,
    detect_on: int | None = None,
    seed: int = 0,
) -> tuple[RefusalLogOdds, Mapping[str, Behaviour], tuple[Sample, ...], list[bool]]:
    """Generate replies, judge them, and find the metric where none is given.

    Args:
        model: The model.
        pairs: Prompts to look at.
        metric: What refusal is measured by; given, a prompt counts as refused if its score is above 0.
        detect_on: Number of pairs, from the first, that the metric is detected on; all by default.
        seed: Of the bootstrap.

    Returns:
        The metric; behaviour on ``harmful`` and ``harmless`` prompts; sample replies; and for each pair whether the
        model treats it as expected (harmful refused, harmless answered, and the metric agrees).

    Raises:
        NoRefusal: No harmful prompt is refused, or hardly any and those with no opener of their own.
    """
    harmful = model.generate(pairs.harmful, REPLY_TOKENS)
    harmless = model.generate(pairs.harmless, REPLY_TOKENS)
    refused = {"harmful": [is_refusal(text) for text in harmful], "harmless": [is_refusal(text) for text in harmless]}
    judge = "reply" if metric is None else "score"
    if metric is None:
        rates = (
            f"the model refuses {sum(refused['harmful'])} of {len(pairs)} harmful and {sum(refused['harmless'])} of"
            f" {len(pairs)} harmless prompts, so there is no refusal to map"
        )
        cure = "use an aligned chat model, or pass refusal tokens if its refusals are not recognised"
        if not any(refused["harmful"]):
            raise NoRefusal(rates, cure=cure)
        n = detect_on or len(pairs)
        try:
            first = PromptPairs(pairs.pairs[:n], pairs.name)
            metric = RefusalLogOdds.detect(model, first, replies=(harmful[:n], harmless[:n]))
        except MechsafetyError as error:
            if sum(refused["harmful"]) < MIN_SHARE * len(pairs):
                raise NoRefusal(rates, cure=cure) from error
            raise
    scores = {kind: _scores_of(model, getattr(pairs, kind), metric) for kind in ("harmful", "harmless")}
    # with tokens of the user's choice, to begin with one of them is to refuse
    by_score = {kind: [bool(value > 0) for value in values] for kind, values in scores.items()}
    judged = refused if judge == "reply" else by_score
    behaviour = {
        kind: Behaviour(
            n=len(pairs),
            refusal_rate=sum(judged[kind]) / len(pairs),
            refusal_ci=wilson_interval(sum(judged[kind]), len(pairs)),
            score_mean=float(scores[kind].mean()),
            score_ci=bootstrap_interval(scores[kind], seed),
            judge=judge,
        )
        for kind in ("harmful", "harmless")
    }
    keep = [
        bool(bad and not good and high > low)
        for bad, good, high, low in zip(
            judged["harmful"], judged["harmless"], scores["harmful"], scores["harmless"], strict=True
        )
    ]
    replies = {"harmful": harmful, "harmless": harmless}
    samples = tuple(
        Sample(getattr(pairs, kind)[k], kind, replies[kind][k], judged[kind][k], float(scores[kind][k]))
        for k in range(min(len(pairs), 8))
        for kind in ("harmful", "harmless")
    )
    return metric, behaviour, samples, keep


def _scores_of(model: LensModel, prompts: Sequence[str], metric: RefusalLogOdds) -> np.ndarray:
    chunks = [model.logits(prompts[k : k + 16]) for k in range(0, len(prompts), 16)]
    return np.concatenate([metric(chunk).cpu().double().numpy() for chunk in chunks])


def _two_parts(pairs: PromptPairs, limit: int, seed: int) -> tuple[PromptPairs, PromptPairs]:
    splits = {pair.split for pair in pairs}
    if "test" in splits and len(splits) > 1:
        here, there = pairs.split(*sorted(splits - {"test"})), pairs.split("test")
    else:
        here, there = pairs.halves()
    parts = here.sample(limit - limit // 2, seed), there.sample(limit // 2, seed)
    for part, what in zip(parts, ("to search on", "to hold out"), strict=True):
        if len(part) < MIN_PAIRS:
            raise MechsafetyError(
                f"{pairs.name} leaves {len(part)} pair {what}",
                expected=f"at least {MIN_PAIRS}",
                cure="give more pairs (or more topics)",
            )
    return parts


def _usable(
    here: PromptPairs, there: PromptPairs, keep: Sequence[bool], behaviour: Mapping[str, Behaviour]
) -> tuple[PromptPairs, PromptPairs]:
    """Only pairs that the model treats as expected: the others have no refusal to restore."""
    parts = []
    for part, flags in ((here, keep[: len(here)]), (there, keep[len(here) :])):
        kept = tuple(pair for pair, flag in zip(part, flags, strict=True) if flag)
        if len(kept) < max(MIN_PAIRS, MIN_SHARE * len(part)):
            bad, good = behaviour["harmful"], behaviour["harmless"]
            raise NoRefusal(
                f"the model refuses {bad.refusal_rate:.0%} of {bad.n} harmful and {good.refusal_rate:.0%} of {good.n}"
                f" harmless prompts; only {len(kept)} of {len(part)} pairs are refused on one side alone",
                cure="use a model that refuses, or pairs it tells apart",
            )
        parts.append(PromptPairs(kept, part.name))
    return parts[0], parts[1]


def _held_and_fresh(there: PromptPairs) -> tuple[PromptPairs, PromptPairs | None]:
    """Every other pair is set aside for the checks alone, where there are enough of them."""
    if len(there) < 3 * MIN_PAIRS:
        return there, None
    return PromptPairs(there.pairs[::2], there.name), PromptPairs(there.pairs[1::2], there.name)


def _unseen_topics(here: PromptPairs, there: PromptPairs) -> list[str]:
    """Topics of the held-out pairs, if every one has a topic and the search saw none of them."""
    return [] if "" in there.topics or set(here.topics) & set(there.topics) else there.topics


def _to_measure(discovery: Discovery, attribution: NodeAttribution, shortlist: int) -> list[Node]:
    inside = set(discovery.circuit)
    outside = [node for node in attribution.ranked() if node not in inside][:shortlist]
    return sorted([*inside, *outside], key=lambda node: node.order)


def _edges_and_roles(
    model: LensModel,
    runs: PairRuns,
    metric: RefusalLogOdds,
    discovery: Discovery,
    n_edges: int,
    n_measured: int,
    *,
    progress: bool,
) -> tuple[list[CircuitEdge], dict[Node, tuple[str, RoleEvidence]]]:
    nodes = list(discovery.circuit)
    # on the same pairs as the evidence: roles compare the two
    whole = activation_patching(model, runs, metric, nodes=nodes, progress=progress)
    effects = dict(zip(nodes, whole.effects.tolist(), strict=True))
    evidence = role_evidence(model, runs, metric, nodes, progress=progress)
    if model.post_norm:
        logger.warning("%s has norms after its attention or MLP: edges are left out", model.name)
        return [], assign_roles(effects, evidence, [])
    every = estimate_edges(model, runs, metric, nodes)
    kept = every[:n_edges]
    measured = measure_edges(model, runs, metric, kept[:n_measured])
    roles = assign_roles(effects, evidence, [*measured, *every[len(measured) :]])
    edges = sorted([*measured, *kept[len(measured) :]], key=lambda edge: -abs(edge.effect))
    return edges, roles


def _circuit_nodes(
    discovery: Discovery,
    measured: Mapping[Node, Measured],
    roles: Mapping[Node, tuple[str, RoleEvidence]],
    minimality: Mapping[str, float],
) -> tuple[CircuitNode, ...]:
    nodes = []
    for node in discovery.circuit:
        effect, ci, p_value = measured[node]
        role, evidence = roles[node]
        verified = p_value < 0.05 and effect > 0 and minimality[str(node)] > 0
        nodes.append(CircuitNode(node, role, effect, ci, p_value, "verified" if verified else "measured", evidence))
    return tuple(nodes)


def _measured(patched: PatchMap, seed: int) -> dict[Node, Measured]:
    rows = zip(patched.effects.tolist(), patched.intervals(seed), patched.p_values(seed), strict=True)
    return {node: row for node, row in zip(patched.nodes, rows, strict=True) if isinstance(node, Node)}


def _scores(
    discovery: Discovery, attribution: NodeAttribution, measured: Mapping[Node, Measured]
) -> tuple[NodeScore, ...]:
    inside = set(discovery.circuit)
    rows = []
    for node in head_and_mlp_nodes(*attribution.heads.shape):
        effect, ci, p_value = measured.get(node, (None, None, None))
        rows.append(NodeScore(node, attribution.of(node), effect, ci, p_value, node in inside))
    return tuple(rows)


def _attention_examples(
    model: LensModel, pairs: PromptPairs, nodes: Sequence[CircuitNode], n_heads: int = 6
) -> tuple[AttentionExample, ...]:
    """Attention of the circuit's strongest heads on the first pair."""
    heads = sorted((member for member in nodes if member.node.kind == "head"), key=lambda m: -abs(m.effect))
    strongest = sorted((member.node for member in heads[:n_heads]), key=lambda node: node.order)
    if not strongest:
        return ()
    examples = []
    for prompt in (pairs.harmful[0], pairs.harmless[0]):
        pattern = model.cache([prompt], sites=["pattern"]).pattern
        rows = torch.stack([pattern[node.layer, node.index, 0] for node in strongest])
        examples.append(AttentionExample(prompt, tuple(model.token_strings(prompt)), tuple(strongest), rows))
    return tuple(examples)


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
