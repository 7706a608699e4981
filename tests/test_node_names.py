"""Nodes by their names: a printed name is taken wherever a node is; a wrong one is answered with the nearest."""

import pytest

import mechsafety as ms
from mechsafety.attribution import node_attribution
from mechsafety.nodes import EMBED, LOGITS, Node, as_node, as_nodes, head_and_mlp_nodes
from mechsafety.patching import At, pair_runs
from mechsafety.patching.senders import as_sender
from mechsafety.sites import Site

QUIET = {"progress": False}
NAMES = ["L1.H2", "M0"]
NODES = [Node("head", 1, 2), Node("mlp", 0)]


def test_every_printed_name_is_read_again():
    every = [EMBED, *head_and_mlp_nodes(3, 4), Node("neuron", 2, 47), LOGITS]
    assert [as_node(str(node)) for node in every] == every == list(as_nodes(every))
    assert [as_node(node.short) for node in every] == every, "figures shorten names"
    assert as_nodes("l2.mlp") == (Node("mlp", 2),)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("L14H2", "did you mean 'L14.H2'?"),
        ("head 14, 2", "did you mean 'L14.H2'?"),
        ("layer 3 mlp", "did you mean 'L3.MLP'?"),
        ("L3N17", "did you mean 'L3.N17'?"),
        ("unembed", ""),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(given, meant):
    with pytest.raises(ms.MechsafetyError) as caught:
        as_node(given)
    text = f"no node is named {given!r}; expected a name such as 'L14.H2', 'L26.MLP' or 'L3.N17'"
    assert str(caught.value) == (f"{text}; {meant}" if meant else text)


def test_what_is_no_name():
    with pytest.raises(ms.MechsafetyError, match=r"^3 is not a node; expected a Node, or a name such as 'L14\.H2'$"):
        as_node(3)


@pytest.mark.parametrize(
    ("name", "nearest"), [("L9.H1", "L2.H1"), ("L1.H7", "L1.H3"), ("M9", "L2.MLP"), ("L0.N48", "L0.N47")]
)
def test_a_node_that_the_model_lacks(llama, pairs, log_odds, name, nearest):
    calls = [
        lambda: ms.ablate(llama, name, source="zero").__enter__(),
        lambda: ms.activation_patching(llama, pairs, log_odds, nodes=[name], **QUIET),
        lambda: ms.path_patching(llama, pairs, log_odds, senders=[name], **QUIET),
        lambda: ms.edge_attribution(llama, pairs, log_odds, nodes=[name], **QUIET),
    ]
    for call in calls:
        with pytest.raises(ms.MechsafetyError, match=rf"(?m)does not exist in .*; the nearest is {nearest}$"):
            call()


def test_names_give_the_same_numbers_as_nodes(llama, pairs, log_odds):
    runs = pair_runs(llama, pairs)
    for call in (
        lambda nodes: ms.activation_patching(llama, runs, log_odds, nodes=nodes, **QUIET).changes,
        lambda nodes: ms.path_patching(llama, runs, log_odds, senders=nodes, **QUIET).changes,
        lambda nodes: ms.edge_attribution(llama, runs, log_odds, nodes=nodes, **QUIET).scores,
    ):
        assert call(NAMES).equal(call(NODES))
    into = [
        ms.path_patching(llama, runs, log_odds, receivers=[(node, "q")], **QUIET)
        for node in ("2.1", Node("head", 2, 1))
    ]
    assert into[0].changes.equal(into[1].changes) and into[0].receivers == into[1].receivers
    with ms.ablate(llama, NAMES, source="zero"):
        named = llama.logits(pairs.harmful)
    with ms.ablate(llama, NODES, source="zero"):
        assert llama.logits(pairs.harmful).equal(named)
    found = node_attribution(llama, runs, log_odds, **QUIET)
    assert found.of("M0") == found.of(Node("mlp", 0))


def test_senders_at_positions_and_sites():
    assert At("L1.H2", "suffix") == At(Node("head", 1, 2), "suffix")
    assert as_sender(Site("resid_pre", 1)) == Site("resid_pre", 1)
