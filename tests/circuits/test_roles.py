"""Roles: each rule by hand-made paths, and on models whose roles are known."""

from dataclasses import replace

import pytest
from made_paths import Made

import mechsafety as ms
from mechsafety import testbed
from mechsafety.circuits.roles import ALIKE, MOST, assign_roles
from mechsafety.nodes import LOGITS, Node

DETECT, RELAY, EVALUATE, DECIDE, PRODUCE = (Node("head", layer, 0) for layer in range(5))
OTHER = Node("mlp", 1)


def assigned(made, spans=(), known=None):
    return assign_roles(made, made.effects(made.nodes), spans, known)


def roles(**made):
    return {node: role for node, (role, _) in assigned(Made(**made)).items()}


def chain(**changes):
    """Detection, evaluation, decision, production, each with half of its effect where the rule asks for it."""
    made = {
        "effects_": {DETECT: 0.4, EVALUATE: 0.4, DECIDE: 0.4, PRODUCE: 0.4},
        "direct_": {PRODUCE: 0.2},
        "embed": {DETECT: 0.2},
        "edges": {(DETECT, EVALUATE): 0.3, (EVALUATE, DECIDE): 0.2, (DECIDE, PRODUCE): 0.2},
    }
    for name, change in changes.items():
        made[name] = {key: value for key, value in {**made.get(name, {}), **change}.items() if value is not None}
    return roles(**made)


def test_a_chain():
    names = {DETECT: "detection", EVALUATE: "evaluation", DECIDE: "decision", PRODUCE: "production"}
    assert chain() == names
    assert (MOST, ALIKE) == (0.5, 0.7), "the shares that the documentation states"


@pytest.mark.parametrize(
    ("changes", "node", "role"),
    [
        ({"direct_": {PRODUCE: 0.19}}, PRODUCE, "none"),
        ({"embed": {DETECT: 0.19}}, DETECT, "evaluation"),  # it feeds an evaluation, and is then between
        ({"edges": {(DECIDE, PRODUCE): 0.19}}, DECIDE, "none"),
        ({"edges": {(EVALUATE, DECIDE): 0.19}}, EVALUATE, "none"),
        # the rest of what a node does may go straight to the logits
        ({"edges": {(DECIDE, PRODUCE): 0.15}, "direct_": {DECIDE: 0.05}}, DECIDE, "decision"),
        # nodes that read the embeddings and write to the logits produce
        ({"embed": {PRODUCE: 0.4}}, PRODUCE, "production"),
        ({"embed": {DECIDE: 0.2}}, DECIDE, "detection"),
    ],
)
def test_each_rule_needs_half(changes, node, role):
    assert chain(**changes)[node] == role


def test_evaluation_may_take_several_steps():
    found = chain(effects_={OTHER: 0.1}, edges={(OTHER, EVALUATE): 0.05})
    assert found[OTHER] == "evaluation"
    assert chain(effects_={OTHER: 0.1}, edges={(OTHER, EVALUATE): 0.04})[OTHER] == "none"
    both = chain(effects_={OTHER: 0.1}, edges={(OTHER, EVALUATE): 0.02, (OTHER, DECIDE): 0.04})
    assert both[OTHER] == "evaluation", "decision and evaluation nodes together"


class Either(Made):
    """Any path of a node to one of its readers is enough: its effect is lost only when all of them are patched."""

    def out_of(self, senders, receivers):
        read = {one: {other for sender, other in self.edges if sender == one} for one in senders}
        return {one: self.effects_[one] if read[one] and read[one] <= set(receivers) else 0.0 for one in senders}


def test_paths_are_patched_together_since_their_effects_do_not_add_up():
    effects = {DETECT: 0.4, RELAY: 0.4, EVALUATE: 0.4, DECIDE: 0.4, PRODUCE: 0.4}
    ways = [
        (DETECT, RELAY),
        (RELAY, EVALUATE),
        (RELAY, DECIDE),
        (EVALUATE, DECIDE),
        (DECIDE, PRODUCE),
        (DECIDE, LOGITS),
    ]
    made = Either(effects, {PRODUCE: 0.4}, {DETECT: 0.4}, dict.fromkeys(ways, 0.4))
    found = {node: role for node, (role, _) in assigned(made).items()}
    assert (found[DECIDE], found[EVALUATE], found[RELAY]) == ("decision", "evaluation", "evaluation")
    made.edges[RELAY, OTHER] = 0.4  # one more reader, which does nothing
    made.effects_[OTHER] = 0.4
    found = {node: role for node, (role, _) in assigned(made).items()}
    assert (found[OTHER], found[RELAY]) == ("none", "none")


def test_a_relay_repeats_what_it_reads():
    made = {"effects_": {RELAY: 0.4}, "edges": {(DETECT, RELAY): 0.2, (RELAY, EVALUATE): 0.4, (DETECT, EVALUATE): None}}
    assert chain(**made, repeats={RELAY: [DETECT]})[RELAY] == "relay"
    assert chain(**made)[RELAY] == "evaluation", "what it writes is something else"
    weak = {**made, "edges": {**made["edges"], (DETECT, RELAY): 0.19}}
    assert chain(**weak, repeats={RELAY: [DETECT]})[RELAY] == "evaluation", "most of its effect comes from elsewhere"
    last = Node("mlp", 2)
    late = {"effects_": {last: 0.4}, "edges": {(EVALUATE, last): 0.4, (last, DECIDE): 0.4, (EVALUATE, DECIDE): None}}
    found = chain(**late, repeats={last: [EVALUATE]})
    assert (found[last], found[EVALUATE]) == ("relay", "evaluation"), "who feeds a relay evaluates"
    assert chain(repeats={DECIDE: [EVALUATE]})[DECIDE] == "decision", "a decision may pass on what was evaluated"


@pytest.mark.parametrize(
    ("direct", "produced", "decided", "role"),
    [
        (0.1, 0.06, 0.06, "production"),
        (0.06, 0.1, 0.05, "decision"),
        (0.0, 0.08, 0.13, "evaluation"),
        (0.1, 0.05, 0.04, "none"),
    ],
)
def test_a_node_of_several_ways_gets_the_role_of_the_largest(direct, produced, decided, role):
    edges = {(OTHER, PRODUCE): produced, (OTHER, DECIDE): decided}
    assert chain(effects_={OTHER: 0.4}, direct_={OTHER: direct}, edges=edges)[OTHER] == role


def test_a_reader_of_several_ways_is_a_reader():
    """It has a role by its largest share alone, and what feeds it is evaluation all the same."""
    edges = {(EVALUATE, DECIDE): 0.13, (EVALUATE, PRODUCE): 0.08, (OTHER, EVALUATE): 0.3}
    found = chain(effects_={OTHER: 0.4}, edges=edges)
    assert (found[EVALUATE], found[OTHER]) == ("evaluation", "evaluation")


def test_what_works_against_the_behaviour_has_a_role_too():
    """All of its paths have the other sign as well."""
    against = chain(effects_={OTHER: -0.4}, edges={(OTHER, PRODUCE): -0.2})
    assert against[OTHER] == "decision"
    assert chain(effects_={OTHER: -0.4}, edges={(OTHER, PRODUCE): 0.2})[OTHER] == "none"
    for effect in (0.0, 1e-7):
        made = {"effects_": {OTHER: effect}, "edges": {(OTHER, PRODUCE): effect}, "embed": {OTHER: effect}}
        assert chain(**made)[OTHER] == "none", "shares of rounding errors say nothing"


def test_the_evidence_is_what_was_measured():
    made = Made(
        {DETECT: 0.4, EVALUATE: 0.4, DECIDE: 0.4, PRODUCE: 0.4},
        {PRODUCE: 0.2},
        {DETECT: 0.2},
        {(DETECT, EVALUATE): 0.3, (EVALUATE, DECIDE): 0.2, (DECIDE, PRODUCE): 0.2},
    )
    found = assigned(made, ("instruction", "suffix"))
    seen = found[EVALUATE][1]
    assert (seen.in_circuit, seen.from_embed, seen.from_detection, seen.to_evaluation_or_decision) == (
        0.4,
        0.0,
        0.3,
        0.2,
    )
    assert (seen.at_instruction, seen.at_suffix) == (0.2, 0.2)
    assert found[DECIDE][1].from_evaluation == 0.2 and found[DECIDE][1].to_production_or_logits == 0.2
    assert found[DETECT][1].from_detection is None and found[DETECT][1].from_embed == 0.2
    assert assigned(made)[EVALUATE][1].at_suffix is None


def test_nodes_of_a_known_role_are_not_measured_again():
    """The others are assigned as if all were, and read those that are known."""
    made = Made(
        dict.fromkeys((DETECT, EVALUATE, DECIDE, PRODUCE, OTHER), 0.4),
        {PRODUCE: 0.2},
        {DETECT: 0.2},
        {(DETECT, EVALUATE): 0.3, (EVALUATE, DECIDE): 0.2, (DECIDE, PRODUCE): 0.2, (OTHER, EVALUATE): 0.2},
    )
    every = assigned(made)
    for node in made.nodes:
        others = {one: role for one, (role, _) in every.items() if one != node}
        assert assigned(made, known=others) == {node: every[node]}


# seeds whose circuits differ in whatever a rule might lean on; see `planted`
VARIED = {
    1: "evaluation by heads, LayerNorm",
    2: "detection by neurons at the harmful word, two kinds of relay",
    5: "seven layers",
    8: "relays after evaluation, ten layers",
    13: "several heads share a role",
    14: "two routes",
}


@pytest.mark.parametrize("seed", VARIED, ids=VARIED.get)
def test_roles_of_varied_circuits(seed):
    layers, heads = 2 + seed % 11, 4
    made = testbed.planted(seed, layers, heads, decoys=seed % 4, varied=True, norm=("rmsnorm", "layernorm")[seed % 2])
    model = ms.load_model((made.model, made.tokenizer))
    options = ms.MapOptions(limit=12, n_random=0, n_resamples=0, n_added=0, shortlist=0)
    for level in ("node", "neuron"):
        circuit = ms.map_refusal_circuit(
            model, made.pairs.sample(12), options=replace(options, level=level), progress=False
        )
        found = testbed.score(circuit, made.truth)
        assert found.found_nodes.f1 == 1.0 and found.decoys_found == () and found.role_accuracy == 1.0
        assert found.found_edges.precision >= 0.95 and found.found_edges.recall >= 0.85
