"""The whole map: on a planted tiny model, on a model that does not refuse, and on the demo model."""

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import mechsafety as ms
import mechsafety.metrics
from mechsafety.circuits import FaithfulnessMeter, check_behaviour
from mechsafety.circuits import map as mapping
from mechsafety.circuits.backups import with_backups
from mechsafety.circuits.budget import Budget
from mechsafety.circuits.circuit import Backup
from mechsafety.circuits.edges import on_a_path
from mechsafety.circuits.goal import Goal
from mechsafety.circuits.search import SearchResult
from mechsafety.errors import MechsafetyError, NoRefusal
from mechsafety.nodes import Node, head_and_mlp_nodes
from mechsafety.patching import pair_runs
from mechsafety.replies import KINDS, phrase_judge

TRUE = {Node("head", 0, 1), Node("head", 1, 2), Node("mlp", 1), Node("head", 2, 0)}
SMALL = ms.MapOptions(limit=8, n_random=20)
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def circuit(planted):
    return ms.map_refusal_circuit(*planted, options=SMALL, **QUIET)


def test_the_planted_circuit(circuit):
    nodes = {member.node for member in circuit.nodes}
    assert {Node("head", 0, 1), Node("head", 2, 0)} <= nodes and len(nodes & TRUE) >= 3 and len(nodes) <= 5
    assert circuit.n_candidates == 15
    check = circuit.verification
    assert check.reached and min(check.faithfulness, check.held_out_faithfulness) >= check.target == 0.8
    assert check.random_controls.n == 20 and check.random_controls.p_value < 0.1
    assert check.held_out_topics == ("explosives",)
    assert circuit.behaviour["harmful"].refusal_rate == 7 / 8 and circuit.behaviour["harmless"].refusal_rate == 0.0
    assert circuit.behaviour["harmful"].n == 8
    assert circuit.speaks_for == (7, 8) and repr(circuit).endswith(", speaks for 7 of 8 pairs tried)")
    assert circuit.metric["refusal_tokens"] == ["sorry"]
    assert [abs(e.effect) for e in circuit.edges] == sorted((abs(e.effect) for e in circuit.edges), reverse=True)
    assert {e.status for e in circuit.edges} == {"measured"}
    inside = {*nodes, Node("embed"), Node("logits")}
    assert all(e.edge.sender in inside and e.edge.receiver in inside for e in circuit.edges)
    assert all(member.p_value is not None and member.ci[0] <= member.effect <= member.ci[1] for member in circuit.nodes)
    assert circuit.provenance.seed == 0 and circuit.provenance.options["limit"] == 8
    rows = {row.node: row for row in circuit.details.scores}
    assert len(rows) == 15 and {node for node, row in rows.items() if row.in_circuit} == nodes
    assert len(circuit.details.samples) == 16 and circuit.details.samples[0].reply.startswith("sorry")
    example = circuit.details.attention[0]
    assert example.patterns.shape == (len(example.heads), len(example.tokens), len(example.tokens))


def test_every_check_is_there_and_has_its_verdict(circuit):
    claims = {claim.name: claim for claim in circuit.verification.claims}
    assert list(claims) == [
        "faithfulness",
        "fresh pairs",
        "sufficiency",
        "necessity",
        "minimality",
        "completeness",
        "independence",
        "stability",
        "harmless prompts",
        "complement",
    ]
    for claim in claims.values():
        assert claim.passed is not None or claim.reason, claim
        assert claim.passed is None or claim.value is not None
    assert claims["faithfulness"].verdict == "holds by construction"
    assert [claim.name for claim in circuit.verification.tested] == list(claims)[1:]
    assert circuit.verification.random_p == claims["sufficiency"].p_value
    assert claims["fresh pairs"].reason == "too few pairs to set any aside"
    check = circuit.verification
    assert check.stability.mean > 0.5 and len(check.stability.jaccards) == 100
    assert check.side_effects.circuit_ablated >= 0 and check.completeness is not None
    assert len(circuit.claims_dataframe()) == 10 and "claims hold" in repr(circuit)


def test_every_node_lies_on_a_path_from_embed_to_logits(circuit):
    nodes = {member.node for member in circuit.nodes}
    assert nodes <= on_a_path([member.edge for member in circuit.edges])
    assert circuit.search.minimal and circuit.search.dropped == () and circuit.search.cut == ()
    assert circuit.search.ranked - circuit.search.removed + len(circuit.search.backups) == len(nodes)
    from_embed = {member.edge.receiver for member in circuit.edges if member.edge.sender.kind == "embed"}
    assert {member.node for member in circuit.by_role("detection")} <= from_embed


def test_a_circuit_of_neurons(planted):
    found = ms.map_refusal_circuit(*planted, options=replace(SMALL, level="neuron"), **QUIET)
    kinds = {member.node.kind for member in found.nodes}
    assert found.level == "neuron" and kinds <= {"head", "neuron"} and found.shape.d_mlp == 48
    check = found.verification
    assert check.reached and check.held_out_faithfulness >= 0.8
    mlps = len({member.node.layer for member in found.nodes if member.node.kind == "neuron"})
    assert found.n_candidates == 15 + mlps * 47 or mlps == 0
    assert {member.node for member in found.nodes} <= on_a_path([member.edge for member in found.edges])
    assert ms.RefusalCircuit.from_json(found.to_json()).to_json() == found.to_json()


def test_a_circuit_of_edges(planted):
    options = replace(SMALL, n_random=3, n_added=3, level="edge")
    found = ms.map_refusal_circuit(*planted, options=options, **QUIET)
    assert found.level == "edge" and found.n_candidates == 262 and 0 < len(found.edges) < 60
    assert found.verification.reached and found.verification.side_effects is None
    nodes = {member.node for member in found.nodes}
    assert nodes | {Node("embed"), Node("logits")} == on_a_path([member.edge for member in found.edges])
    assert repr(found).startswith(f"RefusalCircuit({found.provenance.model}: {len(nodes)} nodes, {len(found.edges)} of")


class Clock:
    """Time that passes by one second a variant that the meter runs, and not by itself."""

    def __init__(self, monkeypatch):
        self.now, real = 0.0, FaithfulnessMeter._scores

        def scores(meter, patched, near=None):
            self.now += len(patched)
            return real(meter, patched, near)

        monkeypatch.setattr(FaithfulnessMeter, "_scores", scores)
        monkeypatch.setattr(mapping, "Budget", lambda seconds: Budget(seconds, clock=lambda: self.now))


def test_a_time_budget_is_kept(planted, monkeypatch):
    clock = Clock(monkeypatch)
    fast = ms.map_refusal_circuit(*planted, options=replace(SMALL, budget_seconds=1e-6), **QUIET)
    least = clock.now  # what is always run
    longer = replace(SMALL, n_random=2000, budget_seconds=least + 400)
    found = ms.map_refusal_circuit(*planted, options=longer, **QUIET)
    assert clock.now - least < least + 600, "what began in time is brought to an end"
    assert any(line.startswith("random circuits, kept: ") for line in found.search.cut)
    assert 0 < found.verification.random_controls.n < 2000
    assert "edges and roles: left out" in fast.search.cut and fast.edges == ()
    assert {member.status for member in fast.nodes} == {"estimated"}
    assert fast.verification.held_out_faithfulness >= 0.8 and fast.verification.stability is None
    unmeasured = {claim.name for claim in fast.verification.claims if claim.passed is None}
    assert {"sufficiency", "necessity", "minimality", "stability"} <= unmeasured
    assert ms.RefusalCircuit.from_json(fast.to_json()).search == fast.search


def test_behaviour_runs_every_prompt_once(planted, monkeypatch):
    model, pairs = planted
    seen, real = [], type(model).replies_and_logits
    monkeypatch.setattr(
        type(model),
        "replies_and_logits",
        lambda self, prompts, *a, **k: (seen.extend(prompts), real(self, prompts, *a, **k))[1],
    )
    check_behaviour(model, pairs)
    assert sorted(seen) == sorted([*pairs.harmful, *pairs.harmless])


def test_same_seed_same_bytes(planted, circuit):
    assert ms.map_refusal_circuit(*planted, options=SMALL, **QUIET).to_json() == circuit.to_json()
    other = json.loads(ms.map_refusal_circuit(*planted, options=replace(SMALL, seed=1), **QUIET).to_json())
    assert other["provenance"]["seed"] == 1
    assert other["verification"]["random_controls"] != json.loads(circuit.to_json())["verification"]["random_controls"]


def test_round_trip(circuit, tmp_path):
    path = circuit.save(tmp_path / "circuit.json")
    back = ms.RefusalCircuit.load(path)
    assert back.to_json() == circuit.to_json() == path.read_text(encoding="utf-8")
    assert back.speaks_for == circuit.speaks_for
    assert [member.node for member in back.nodes] == [member.node for member in circuit.nodes]
    assert {member.role for member in back.nodes} == {member.role for member in circuit.nodes}


def test_edge_limits(planted):
    options = replace(SMALL, n_edges=3, shortlist=0)
    few = ms.map_refusal_circuit(*planted, options=options, **QUIET)
    kept = [e for e in few.edges if e.edge not in few.search.linked and e.edge.sender.kind != "embed"]
    assert 1 <= len(kept) <= 3 and {e.status for e in few.edges} == {"measured"}, "what only connects is measured too"
    effects = {m.node: m.evidence.in_circuit for m in few.nodes}
    for edge in kept:
        low, high = edge.ci
        least = min(abs(effects[end]) for end in (edge.edge.sender, edge.edge.receiver) if end in effects)
        assert (low > 0 or high < 0) and abs(edge.effect) >= 0.1 * least and low <= edge.effect <= high
    measured = [row.node for row in few.details.scores if row.effect is not None]
    assert set(measured) == {member.node for member in few.nodes}


def test_a_map_that_matches(planted):
    options = replace(SMALL, goal="match", target=0.9)
    found = ms.map_refusal_circuit(*planted, options=options, **QUIET)
    check = found.verification
    assert check.reached and (check.goal, check.target) == ("match", 0.9) == (check.aim.kind, check.aim.target)
    assert all(0.9 - 1e-6 <= value <= 1.1 + 1e-6 for value in (check.faithfulness, check.held_out_faithfulness))
    assert found.provenance.options["goal"] == "match"
    assert next(claim for claim in check.claims if claim.name == "faithfulness").criterion == "0.9 to 1.1 on both"
    part = found.subset([found.nodes[0].node])
    assert (part.verification.goal, part.verification.target) == ("match", 0.9)
    assert ms.RefusalCircuit.from_json(found.to_json()).verification.goal == "match"


def test_a_map_of_no_edge_at_all(planted):
    """One edge of this model is on no path to the logits: nothing is left to draw, and nothing reaches the target."""
    options = replace(SMALL, level="edge", max_nodes=1, n_random=2, n_resamples=0)
    found = ms.map_refusal_circuit(*planted, options=options, **QUIET)
    assert (found.nodes, found.edges) == ((), ()) and not found.verification.reached


@pytest.mark.parametrize("level", ["node", "edge"])
def test_norms_after_blocks(level, make_hf_model, make_tokenizer, pairs, monkeypatch):
    """Gemma-2, whose heads share a norm: its circuit has edges, and the result says how the norms were taken."""
    monkeypatch.setattr("mechsafety.attribution.steps.SERIES", (2,))
    model = ms.load_model((make_hf_model("gemma2", seed=3, layers=2), make_tokenizer()))
    high, low = model.logits(pairs.harmful), model.logits(pairs.harmless)
    refuse, comply = split_tokens(high, low)
    metric = ms.RefusalLogOdds((refuse,), ("x",), (comply,), ("y",))
    options = ms.MapOptions(
        level=level,
        limit=4,
        target=0.5,
        max_nodes=12,
        n_random=2,
        n_added=0,
        n_resamples=1,
        shortlist=0,
        n_backup_parts=0,
        n_edges=6,
        n_role_pairs=1,
    )
    found = ms.map_refusal_circuit(model, pairs, metric, options, **QUIET)
    assert found.nodes and found.edges and found.provenance.options["block_norms"] == "recomputed"
    assert {member.status for member in found.edges} <= {"measured", "estimated"} and found.verification.measured
    assert all(note.promotes for note in found.details.notes.values())


def split_tokens(high, low):
    """Two tokens of which the first leads after all harmful prompts, and the second after all harmless ones."""
    worst = ((high[:, :, None] - high[:, None, :]).amin(0)).minimum((low[:, None, :] - low[:, :, None]).amin(0))
    best = int(worst.argmax())
    assert float(worst.max()) > 0, "some two tokens tell the prompts of this seed apart"
    return divmod(best, high.shape[1])


def test_a_random_model_does_not_refuse(llama, pairs):
    with pytest.raises(NoRefusal) as caught:
        ms.map_refusal_circuit(llama, pairs, options=SMALL, **QUIET)
    assert str(caught.value) == (
        "the model refuses 0 of 4 harmful and 0 of 4 harmless prompts, so there is no refusal to map; "
        "use an aligned chat model, other pairs, or pass refusal tokens if its refusals are not recognised"
    )


def test_a_model_that_refuses_everything(planted):
    """By a metric that counts both of its answers as refusals."""
    model, pairs = planted
    with pytest.raises(NoRefusal, match=r"refuses \d+% of 8 harmful and \d+% of 8 harmless prompts; only 0 of 4 pairs"):
        ms.map_refusal_circuit(model, pairs, ms.RefusalLogOdds.of(model, ["sorry", "sure"]), SMALL, **QUIET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.0}, r"target 0.0; expected a faithfulness in \(0, 1\]"),
        ({"target": 1.2}, r"target 1.2; expected a faithfulness"),
        ({"limit": 3}, "limit 3; expected at least 4 pairs"),
        ({"level": "nodes"}, r"level='nodes'; expected one of \('node', 'neuron', 'edge'\)"),
        ({"n_edges": -1}, "n_edges=-1; expected at least 0"),
        ({"n_role_pairs": 0}, "n_role_pairs=0; expected at least 1"),
    ],
)
def test_options(planted, options, message):
    with pytest.raises(MechsafetyError, match=message):
        ms.map_refusal_circuit(*planted, options=replace(SMALL, **options), **QUIET)


def test_pairs_that_do_not_align_stop_before_anything_slow(planted, monkeypatch):
    model, _ = planted
    monkeypatch.setattr(type(model), "generate", lambda *args, **kwargs: pytest.fail("ran before the check"))
    crooked = ms.PromptPairs.from_lists(
        [f"make a {word} bomb" for word in "abcd"],
        ["make a big cake", "make tea", "make a blue cake", "make a new cake"],
    )
    with pytest.raises(
        MechsafetyError, match=r"^0 of 4 pairs of lists align under the tokenizer .* of pairs 1-4 differ"
    ):
        ms.map_refusal_circuit(model, crooked, options=SMALL, **QUIET)


def test_behaviour(planted):
    model, pairs = planted
    metric, behaviour, samples, keep = check_behaviour(model, pairs)
    replies = model.generate(pairs.harmful, 24), model.generate(pairs.harmless, 24)
    assert keep == [reply == "sorry" for reply in replies[0]] and keep.count(True) == 7, "one is not refused"
    assert not any("sorry" in reply for reply in replies[1]) and metric.refusal_tokens == ("sorry",)
    scores = metric(model.logits(pairs.harmful))
    assert behaviour["harmful"].score_mean == pytest.approx(float(scores.mean()), abs=1e-4)
    assert behaviour["harmful"].refusal_ci == pytest.approx(ms.intervals.wilson_interval(7, 8))
    kinds = {side: asdict(behaviour[side].kinds) for side in ("harmful", "harmless")}
    assert kinds["harmful"]["refuses"] == 7 and kinds["harmless"]["refuses"] == 0
    for side, said in zip(kinds, replies, strict=True):
        judged = phrase_judge(getattr(pairs, side), said)
        assert kinds[side] == {kind: judged.count(kind) for kind in KINDS}
    assert samples[0].prompt == pairs.harmful[0] and samples[1].prompt == pairs.harmless[0]
    assert samples[0].refused and not samples[1].refused
    turned = ms.PromptPairs.from_lists(pairs.harmless, pairs.harmful)
    given = ms.RefusalLogOdds.of(model, ["sorry"], ["sure"])
    assert check_behaviour(model, turned, given)[3] == [False] * 8


@pytest.mark.demo
def test_the_committed_map_holds_on_the_demo_model(demo):
    """`make demo` draws the whole map; here its nodes carry the gap on six pairs, and others as many do not.

    Single pairs differ widely: the circuit keeps 0.12 to 1.28 of the gap on these.
    """
    found = ms.RefusalCircuit.load(Path(__file__).parents[2] / "docs" / "gallery" / "demo.json")
    assert found.provenance.weights_sha256 == demo.weights_sha256
    test = ms.PromptPairs.builtin("test").pairs
    metric, behaviour, _, keep = check_behaviour(demo, ms.PromptPairs(test[:10]), progress=False)
    assert metric == ms.RefusalLogOdds.from_json(found.metric, demo)
    assert (behaviour["harmful"].refusal_rate, behaviour["harmless"].refusal_rate) == (0.8, 0.2)
    pairs = ms.PromptPairs(tuple(pair for pair, flag in zip(test[:10], keep, strict=True) if flag))
    assert len(pairs) == 6
    nodes = [member.node for member in found.nodes]
    every = head_and_mlp_nodes(demo.n_layers, demo.n_heads)
    assert found.n_candidates == len(every) == 300 and set(nodes) < set(every)
    others = [random.Random(seed).sample(every, len(nodes)) for seed in range(3)]
    meter = FaithfulnessMeter(demo, pair_runs(demo, pairs), metric, progress=False)
    kept, *drawn = meter.faithfulness([nodes, *others])
    assert kept > 0.5 > max(drawn)


def test_pairs_too_few_to_hold_any_out(planted):
    model, pairs = planted
    three = ms.PromptPairs.from_lists(pairs.harmful[:3], pairs.harmless[:3])
    with pytest.raises(MechsafetyError, match=r"^3 of 3 pairs of lists align under .*; expected at least 4; add pairs"):
        ms.map_refusal_circuit(model, three, options=SMALL, **QUIET)


def test_seed_below_zero(planted):
    with pytest.raises(MechsafetyError, match="seed=-1; expected at least 0"):
        replace(SMALL, seed=-1)


class Scored(FaithfulnessMeter):
    """Stands for a meter: what a set of nodes is worth is a sum over its nodes."""

    def __init__(self, worth):
        object.__setattr__(self, "worth", worth)

    def faithfulness(self, circuits):
        return [sum(self.worth[node] for node in nodes) for nodes in circuits]


def test_a_backup_that_makes_the_circuit_miss_its_target_is_left_out():
    """One that works against refusal in the circuit would undo what the search has found, on either set of pairs."""
    head, good, bad, late = (Node("head", layer, 0) for layer in range(4))
    found = SearchResult((), (), (head,), {}, True)
    pairs = [
        Scored({head: 0.9, good: 0.0, bad: -0.2, late: 0.05}),
        Scored({head: 0.85, good: -0.01, bad: 0.1, late: 0}),
    ]
    some = [
        Backup(node, head, (node, head), 0.0, 0.1, joint, (0.0, 1.0), 0.01)
        for node, joint in ((bad, 0.9), (good, 0.8), (late, 0.7))
    ]
    kept = with_backups(found, some, None, pairs, Goal(0.8))
    assert kept.added == (good, late) and set(kept.circuit) == {head, good, late}
    assert with_backups(found, some, 2, pairs, Goal(0.8)).added == (good,)
    missed = replace(found, reached=False)
    assert with_backups(missed, some, None, pairs, Goal(0.8)).added == (bad, good, late), "there is nothing to undo"
