"""Pairs that do not align under a tokenizer are left out, counted and said, in every analysis alike."""

import inspect
import logging
import re

import pytest
import torch
from test_inputs import PUBLIC

import mechsafety as ms
from mechsafety.attribution import describe_nodes
from mechsafety.circuits import measure_ablation
from mechsafety.directions import direction_io
from mechsafety.errors import MechsafetyError
from mechsafety.models.chat import ChatTokenizer
from mechsafety.patching import PairRuns, Projection, pair_runs, path_matrix, path_projection
from mechsafety.prompts import PromptPair, PromptPairs
from mechsafety.sites import Site, SiteKind

QUIET = {"progress": False}
NOTE = "2 of 6 pairs left out, which do not align under the tokenizer of LlamaForCausalLM (pairs 2, 6)"


@pytest.fixture(autouse=True)
def _warnings(caplog):
    caplog.set_level(logging.WARNING, logger="mechsafety")


@pytest.fixture(scope="module")
def crooked(pairs) -> PromptPairs:
    """The usual pairs, and two that do not align: the second and the last."""
    bad = PromptPair("make a bomb", "make a big cake"), PromptPair("how do i steal", "how do i steal my own car")
    return PromptPairs((pairs[0], bad[0], *pairs.pairs[1:], bad[1]), "mine")


def test_pairs_that_do_not_align_are_left_out_and_said_once(llama, pairs, crooked, caplog):
    found = crooked.aligned(llama)
    assert found.pairs == pairs.pairs and found.left_out == (NOTE,)
    assert [record.getMessage() for record in caplog.records] == [f"mine: {NOTE}"]
    assert repr(found) == f"PromptPairs(mine: 4 pairs, 1 topics; {NOTE})"
    assert found.aligned(llama) is found and pairs.aligned(llama) is pairs and len(caplog.records) == 1
    llama.tokenize_pairs(found)


def test_no_weights_are_needed(llama, crooked):
    chat = ChatTokenizer("LlamaForCausalLM", llama.tokenizer, {})
    assert crooked.aligned(chat) == crooked.aligned(llama)
    table = crooked.alignment(chat)
    assert table["pair"].tolist() == [1, 2, 3, 4, 5, 6] and table["aligned"].tolist() == [True, False] + [True] * 3 + [
        False
    ]
    assert table["harmful"].tolist() == [llama.n_tokens(prompt) for prompt in crooked.harmful]
    assert table["harmless"].tolist() == [llama.n_tokens(prompt) for prompt in crooked.harmless]
    assert chat.rows([]) == ([], [])


def test_too_few_that_align_is_an_error_with_every_pair(llama, crooked):
    with pytest.raises(MechsafetyError) as caught:
        crooked.aligned(llama, least=5)
    assert str(caught.value) == (
        "4 of 6 pairs of mine align under the tokenizer of LlamaForCausalLM; the two chat prompts of pairs 2, 6 differ "
        "in their number of tokens; expected at least 5; change a word in one of the two (model.tokenize_pairs shows a "
        "pair's token rows), add pairs, pair prompts with PromptPairs.matched(harmful, harmless, model.n_tokens), or "
        "patch at the template's suffix alone: align='suffix'"
    )
    many = PromptPairs.from_lists([f"make {'a ' * k}bomb" for k in range(39)], ["make tea"] * 39)
    with pytest.raises(MechsafetyError, match=r"^1 of 39 pairs of lists align .* prompts of pairs 1-3, 5-39 differ"):
        PromptPairs((*many.pairs[1:4], many[0], *many.pairs[4:]), "lists").aligned(llama, least=2)
    noted = many.aligned(llama).left_out[0]
    assert noted.endswith("(pairs 2-13 and 26 more)"), "a note that provenance keeps stays short"


def test_what_is_no_model_is_told_so(pairs):
    with pytest.raises(MechsafetyError, match=r"^model is the string 'demo'; expected a LensModel; pass load_model"):
        pairs.aligned("demo")


# every public function that takes pairs or their stored runs, by name: how to call it
FLAT = ms.Node("head", 0, 1)
CALLS = {
    "activation_patching": lambda m, p, o, _: ms.activation_patching(m, p, o, nodes=[FLAT], **QUIET),
    "path_patching": lambda m, p, o, _: ms.path_patching(m, p, o, senders=[FLAT], **QUIET),
    "path_projection": lambda m, p, _, d: path_projection(
        m, p, Projection(d.vector / d.vector.norm(), Site("resid_post", 1)), senders=[FLAT], **QUIET
    ),
    "path_matrix": lambda m, p, _o, _d: path_matrix(m, p, **QUIET),
    "node_attribution": lambda m, p, o, _: ms.node_attribution(m, p, o, steps=1, **QUIET),
    "edge_attribution": lambda m, p, o, _: ms.edge_attribution(m, p, o, method="eap", **QUIET),
    "head_attribution": lambda m, p, o, _: ms.head_attribution(m, p, o, scores=["total"], **QUIET),
    "describe_nodes": lambda m, p, _o, _d: describe_nodes(m, [FLAT], p),
    "direction_io": lambda m, p, o, d: direction_io(m, d, p, o, nodes=[FLAT], **QUIET),
}


def test_the_calls_are_all_functions_that_take_pairs_or_runs():
    takes = {
        name
        for name, function in PUBLIC.items()
        for parameter in inspect.signature(function).parameters.values()
        if re.search(r"PromptPairs\b.*PairRuns", str(parameter.annotation))
    }
    assert takes == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_analyses_leave_them_out_and_say_so(name, llama, pairs, crooked, log_odds, directed_found):
    call, direction = CALLS[name], directed_found  # of a model of the same width
    found, clean = (call(llama, given, log_odds, direction) for given in (crooked, pairs))
    assert found.provenance.options["left_out"] == [NOTE] and "left_out" not in clean.provenance.options
    for key in ("changes", "q", "heads", "scores", "total", "writes"):
        if torch.is_tensor(getattr(clean, key, None)):
            torch.testing.assert_close(getattr(found, key), getattr(clean, key), rtol=0, atol=0)
    runs = pair_runs(llama, crooked, extra=[SiteKind.NEURONS] if name == "direction_io" else [])
    assert isinstance(runs, PairRuns) and len(runs.harmful) == 4
    assert call(llama, runs, log_odds, direction).provenance.options["left_out"] == [NOTE], "also of stored runs"


def test_circuits_leave_them_out(planted, llama, log_odds, crooked, monkeypatch):
    class Stop(Exception):
        pass

    def stop(pairs, *_args, **_options):
        raise Stop(pairs)

    model, pairs = planted
    bad = PromptPair("make a bomb", "make a big cake", "bombs")
    monkeypatch.setattr(ms.circuits.draw, "two_sides", stop)
    with pytest.raises(Stop) as stopped:
        ms.map_refusal_circuit(model, PromptPairs((bad, *pairs.pairs), "mixed"), **QUIET)
    drawn_from = stopped.value.args[0]
    assert drawn_from.pairs == pairs.pairs and drawn_from.left_out == (
        f"1 of 9 pairs left out, which do not align under the tokenizer of {model.name} (pair 1)",
    )
    ablated = measure_ablation(llama, crooked, log_odds, [FLAT], **QUIET)
    assert ablated == measure_ablation(llama, crooked.aligned(llama), log_odds, [FLAT], **QUIET)
    few = PromptPairs((bad, pairs[0]), "few")
    metric = ms.RefusalLogOdds.of(model, ["sorry"])
    for search in (ms.circuits.discover_edges, ms.map_refusal_circuit):
        with pytest.raises(MechsafetyError, match=r"^1 of 2 pairs of few align under the tokenizer of .* of pair 1 di"):
            search(model, few, metric, **QUIET)
    made = ms.circuits.acdc(model, few, metric, threshold=1.0, **QUIET)
    assert made.provenance.options["left_out"][0].startswith("1 of 2 pairs left out")
