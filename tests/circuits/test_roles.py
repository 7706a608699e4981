"""Roles: each rule by hand-made evidence, and the measurements against slow ones."""

from dataclasses import replace

import pytest
import torch
from reference import PlainModel
from whole_forwards import patched_whole

from mechsafety.circuits.circuit import CircuitEdge, RoleEvidence
from mechsafety.circuits.roles import ATTENDS, MOST, SOME, assign_roles, role_evidence
from mechsafety.nodes import Edge, Node, head_and_mlp_nodes
from mechsafety.patching import pair_runs

DETECT, EVALUATE, DECIDE, PRODUCE = Node("head", 0, 0), Node("mlp", 1), Node("head", 2, 1), Node("mlp", 3)


def edge(sender, receiver, effect, slot="mlp"):
    return CircuitEdge(Edge(sender, receiver, "q" if receiver.kind == "head" else slot), effect, "measured", effect)


def roles(effects, evidence, edges=()):
    return {node: role for node, (role, _) in assign_roles(effects, evidence, edges).items()}


def test_production_has_half_of_its_effect_direct():
    assert roles({PRODUCE: 0.4}, {PRODUCE: RoleEvidence(direct=0.2)}) == {PRODUCE: "production"}
    assert roles({PRODUCE: 0.4}, {PRODUCE: RoleEvidence(direct=0.19)}) == {PRODUCE: "none"}


def test_detection_is_a_head_that_moves_the_instruction():
    seen = RoleEvidence(direct=0.1, via_instruction=0.2, attention_to_instruction=0.1)
    assert roles({DETECT: 0.4}, {DETECT: seen}) == {DETECT: "detection"}
    assert roles({DETECT: 0.4}, {DETECT: replace(seen, via_instruction=0.19)}) == {DETECT: "none"}
    assert roles({DETECT: 0.4}, {DETECT: replace(seen, attention_to_instruction=0.09)}) == {DETECT: "none"}
    inside = replace(seen, attention_to_instruction=0.0, attention_within_instruction=0.1)
    assert roles({DETECT: 0.4}, {DETECT: inside}) == {DETECT: "detection"}, "it may attend from inside the instruction"
    assert roles({EVALUATE: 0.4}, {EVALUATE: seen}) == {EVALUATE: "none"}, "an MLP moves nothing between tokens"


def test_production_comes_before_detection():
    seen = RoleEvidence(direct=0.3, via_instruction=0.3)
    assert roles({DETECT: 0.4}, {DETECT: seen}) == {DETECT: "production"}


def test_decision_acts_at_the_suffix_and_feeds_production():
    effects = {DETECT: 0.4, DECIDE: 0.4, PRODUCE: 0.2}
    evidence = {
        DETECT: RoleEvidence(via_instruction=0.4, attention_to_instruction=0.5),
        DECIDE: RoleEvidence(at_suffix=0.2),
        PRODUCE: RoleEvidence(direct=0.2),
    }
    fed = edge(DETECT, DECIDE, 0.041)
    feeds = [fed, edge(DECIDE, PRODUCE, 0.041)]
    assert roles(effects, evidence, feeds)[DECIDE] == "decision"
    assert roles(effects, evidence, [fed, edge(DECIDE, PRODUCE, 0.039)])[DECIDE] == "none"
    assert roles(effects, evidence, [edge(DETECT, DECIDE, 0.039), feeds[1]])[DECIDE] == "none", "moves nothing on"
    elsewhere = {**evidence, DECIDE: RoleEvidence(at_suffix=0.19)}
    assert roles(effects, elsewhere, feeds)[DECIDE] == "evaluation", "fed by detection and feeding production"
    assert roles(effects, elsewhere, feeds[1:])[DECIDE] == "none"
    # several thin paths count together
    other = Node("mlp", 4)
    thin = [fed, edge(DECIDE, PRODUCE, 0.021), edge(DECIDE, other, 0.021)]
    both = {**evidence, other: RoleEvidence(direct=0.2)}
    assert roles({**effects, other: 0.2}, both, thin)[DECIDE] == "decision"


def test_evaluation_lies_between_detection_and_decision():
    effects = {DETECT: 0.3, EVALUATE: 0.4, DECIDE: 0.4, PRODUCE: 0.2}
    evidence = {
        DETECT: RoleEvidence(via_instruction=0.3, attention_to_instruction=0.5),
        EVALUATE: RoleEvidence(at_instruction=0.4),
        DECIDE: RoleEvidence(at_suffix=0.3),
        PRODUCE: RoleEvidence(direct=0.2),
    }
    paths = [edge(DETECT, EVALUATE, 0.05), edge(EVALUATE, DECIDE, 0.05), edge(DECIDE, PRODUCE, 0.1)]
    expected = {DETECT: "detection", EVALUATE: "evaluation", DECIDE: "decision", PRODUCE: "production"}
    assert roles(effects, evidence, paths) == expected
    assert roles(effects, evidence, paths[1:])[EVALUATE] == "none", "fed by nothing"
    assert roles(effects, evidence, paths[1:])[DECIDE] == "none", "nor is the decision then fed by an evaluation"
    assert roles(effects, evidence, [paths[0], paths[2]])[EVALUATE] == "none", "feeds nothing"
    straight = [paths[0], edge(EVALUATE, PRODUCE, 0.05), paths[2]]
    assert roles(effects, evidence, straight)[EVALUATE] == "evaluation", "feeds production itself"
    named = assign_roles(effects, evidence, paths)
    assert named[EVALUATE][1].from_detection == pytest.approx(0.05)
    assert named[EVALUATE][1].to_decision == pytest.approx(0.05)
    assert named[DECIDE][1].to_decision == pytest.approx(0.1) and named[DECIDE][1].from_detection == 0.0
    assert named[EVALUATE][1].at_instruction == 0.4, "the measurements are kept"


def test_evaluation_and_decision_at_the_same_place_are_told_apart():
    """Both act at the suffix and feed production: the one that detection feeds and that feeds the other evaluates."""
    effects = {DETECT: 0.4, EVALUATE: 0.4, DECIDE: 0.4, PRODUCE: 0.4}
    evidence = {
        DETECT: RoleEvidence(via_instruction=0.4, attention_to_instruction=0.5),
        EVALUATE: RoleEvidence(at_suffix=0.4),
        DECIDE: RoleEvidence(at_suffix=0.4),
        PRODUCE: RoleEvidence(direct=0.4),
    }
    paths = [edge(DETECT, EVALUATE, 0.3), edge(DETECT, DECIDE, 0.05), edge(EVALUATE, DECIDE, 0.2)]
    paths += [edge(EVALUATE, PRODUCE, 0.1), edge(DECIDE, PRODUCE, 0.3)]
    expected = {DETECT: "detection", EVALUATE: "evaluation", DECIDE: "decision", PRODUCE: "production"}
    assert roles(effects, evidence, paths) == expected
    alone = [path for path in paths if EVALUATE not in (path.edge.sender, path.edge.receiver)]
    assert roles(effects, evidence, alone)[DECIDE] == "decision", "detection may feed it straight"


def test_a_node_that_works_against_refusal_has_no_role():
    evidence = {PRODUCE: RoleEvidence(direct=-0.4, via_instruction=0.4, at_suffix=0.4)}
    assert roles({PRODUCE: -0.4}, evidence) == {PRODUCE: "none"}
    assert roles({PRODUCE: 0.0}, {PRODUCE: RoleEvidence(direct=0.4)}) == {PRODUCE: "none"}


def test_roles_do_not_depend_on_depth_or_order():
    """The same evidence in the last layer and in the first gives the same role."""
    for layer in (0, 9):
        head = Node("head", layer, 0)
        seen = RoleEvidence(via_instruction=0.3, attention_to_instruction=0.2)
        assert roles({head: 0.4}, {head: seen}) == {head: "detection"}
    effects = {DETECT: 0.3, EVALUATE: 0.4, DECIDE: 0.4, PRODUCE: 0.2}
    evidence = {
        PRODUCE: RoleEvidence(direct=0.2),
        DECIDE: RoleEvidence(at_suffix=0.3),
        EVALUATE: RoleEvidence(at_instruction=0.4),
        DETECT: RoleEvidence(via_instruction=0.3, attention_to_instruction=0.5),
    }
    paths = [edge(DECIDE, PRODUCE, 0.1), edge(EVALUATE, DECIDE, 0.05), edge(DETECT, EVALUATE, 0.05)]
    backwards = dict(reversed(evidence.items()))
    assert roles(effects, evidence, paths) == roles(effects, backwards, paths[::-1])
    assert (MOST, SOME, ATTENDS) == (0.5, 0.1, 0.1), "the shares that the documentation states"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_measurements(kind, shared_model, make_hf_model, pairs, logit_difference):
    model, plain = shared_model(kind), PlainModel(make_hf_model(kind))
    nodes = [*head_and_mlp_nodes(3, 4)]
    runs, metric = pair_runs(model, pairs), logit_difference
    found = role_evidence(model, runs, metric, nodes, progress=False)
    tokens = model.tokenize_pairs(pairs)
    high, low = (metric(model.logits(side)) for side in (pairs.harmful, pairs.harmless))
    gap = float((high - low).mean())
    rows = [(model.tokenize([p.harmful]), model.tokenize([p.harmless])) for p in pairs]
    clean = [(plain(a.ids[0]), plain(b.ids[0])) for a, b in rows]
    for node in nodes:
        seen = found[node]
        for span, value in (("instruction", seen.at_instruction), ("suffix", seen.at_suffix)):
            where = tokens.harmful.span_mask(span)
            slow = (high - metric(patched_whole(model, tokens.harmful, tokens.harmless, [node], where))).mean() / gap
            assert value == pytest.approx(float(slow), abs=1e-3)
        lost = 0.0
        for (a, _), ((logits, writes), (_, other)) in zip(rows, clean, strict=True):
            delta = other[node.layer, node.index] - writes[node.layer, node.index]
            changed, _ = plain(a.ids[0], {("logits", None, None): delta})
            lost += float(metric(logits) - metric(changed)) / len(rows)
        assert seen.direct == pytest.approx(lost / gap, abs=1e-3)
        assert (seen.via_instruction is None) == (node.kind == "mlp") == (seen.attention_to_instruction is None)
        assert seen.from_detection is None and seen.to_decision is None


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_a_head_moves_from_the_instruction(kind, shared_model, pairs, logit_difference):
    """By hand: z = sum over source tokens of pattern times value; only the instruction's part is exchanged."""
    model, metric = shared_model(kind), logit_difference
    runs, heads = pair_runs(model, pairs), [Node("head", layer, head) for layer in range(3) for head in range(4)]
    found = role_evidence(model, runs, metric, heads, progress=False)
    tokens = model.tokenize_pairs(pairs)
    high, low = (metric(model.logits(side)) for side in (pairs.harmful, pairs.harmless))
    sides = [model.cache(side, ["pattern", "v", "z"]) for side in (tokens.harmful, tokens.harmless)]
    span, group = tokens.harmful.span_mask("instruction"), model.n_heads // model.n_kv_heads
    suffix = tokens.harmful.span_mask("suffix")
    for node in heads:
        layer, head = node.layer, node.index
        parts = []
        for side in sides:
            pattern = side.pattern[layer, head] * span[:, None, :]
            parts.append(pattern @ side.v[layer, head // group])
        new = sides[0].z[layer, head] + parts[1] - parts[0]

        def exchange(tensor, hook, new=new, head=head):
            tensor = tensor.clone()
            tensor[:, :, head] = new
            return tensor

        with model.bridge.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", exchange)]):
            changed = metric(model.logits(tokens.harmful))
        assert found[node].via_instruction == pytest.approx(
            float((high - changed).mean() / (high - low).mean()), abs=1e-3
        )
        mass = (sides[0].pattern[layer, head] * span[:, None, :]).sum(-1)
        assert found[node].attention_to_instruction == pytest.approx(float(mass[suffix].mean()), abs=1e-4)
        inside = span & (torch.arange(span.shape[1]) >= runs.start)
        assert found[node].attention_within_instruction == pytest.approx(float(mass[inside].mean()), abs=1e-4)
    assert torch.tensor([found[n].attention_to_instruction for n in heads]).std() > 0.01
