"""Stored runs of a model that has changed since are refused, and stored runs of another model."""

import pytest
import torch

import mechsafety as ms
from mechsafety.errors import MechsafetyError
from mechsafety.interventions import orthogonalized
from mechsafety.models.engine import base_run, check_current, run_from
from mechsafety.models.state import ModelState
from mechsafety.nodes import Node
from mechsafety.patching import pair_runs

NODE = [Node("head", 1, 2)]
EDITED = (
    "stored runs that do not fit LlamaForCausalLM: the model was edited, or an edit ended, since they were stored; "
    "expected runs of the model as it is; make them again where they are used: pair_runs(model, pairs)"
)
CALLS = {
    "patching": lambda m, runs, metric: ms.activation_patching(m, runs, metric, nodes=NODE, progress=False),
    "paths": lambda m, runs, metric: ms.path_patching(m, runs, metric, senders=NODE, progress=False),
    "matrix": lambda m, runs, metric: ms.patching.path_matrix(m, runs, progress=False),
    "nodes": lambda m, runs, metric: ms.node_attribution(m, runs, metric, steps=1, progress=False),
    "edges": lambda m, runs, metric: ms.edge_attribution(m, runs, metric, steps=1, progress=False),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_runs_from_before_an_edit_and_from_within_it(call, llama, pairs, log_odds):
    runs = pair_runs(llama, pairs)
    with ms.ablate(llama, [Node("mlp", 0)], source="zero"):
        with pytest.raises(MechsafetyError) as error:
            call(llama, runs, log_odds)
        assert str(error.value) == EDITED
        inside = pair_runs(llama, pairs)
        call(llama, inside, log_odds)
        with ms.steer(llama, torch.ones(32), 1.0, [1]), pytest.raises(MechsafetyError, match="the model was edited"):
            call(llama, inside, log_odds)
    with pytest.raises(MechsafetyError, match="the model was edited, or an edit ended"):
        call(llama, inside, log_odds)
    call(llama, runs, log_odds)


def test_an_edit_through_another_wrapper_is_seen(make_hf_model, make_tokenizer, pairs, log_odds):
    model = ms.load_model((make_hf_model("llama"), make_tokenizer()))
    again = type(model)("again", model.backend, model.tokenizer)
    runs = pair_runs(model, pairs)
    with ms.ablate(again, NODE, source="zero"):
        assert model.edited and again.edited
        with pytest.raises(MechsafetyError, match="the model was edited"):
            ms.activation_patching(model, runs, log_odds, nodes=NODE, progress=False)
    assert not model.edited and not again.edited


def test_changed_weights(make_model, pairs, log_odds):
    model = make_model("gpt2")
    runs, weight = pair_runs(model, pairs), next(model.hf_model.parameters())
    with torch.no_grad():
        weight.mul_(1.5)
    with pytest.raises(MechsafetyError, match="the model's weights changed since they were stored"):
        ms.activation_patching(model, runs, log_odds, nodes=NODE, progress=False)
    again = pair_runs(model, pairs)
    if type(model.bridge).__name__ == "TransformerBridge":
        with orthogonalized(model, torch.ones(32)), pytest.raises(MechsafetyError, match="weights changed"):
            ms.activation_patching(model, again, log_odds, nodes=NODE, progress=False)
    ms.activation_patching(model, again, log_odds, nodes=NODE, progress=False)


def test_another_model(make_model, llama, pairs, log_odds):
    runs = pair_runs(llama, pairs)
    with pytest.raises(
        MechsafetyError, match=r"^stored runs that do not fit .*: another model made them; expected runs"
    ):
        ms.activation_patching(make_model("llama", 1), runs, log_odds, nodes=NODE, progress=False)


def test_a_run_alone(llama, pairs):
    base = base_run(llama, llama.tokenize(pairs.harmful))
    check_current(llama, base)
    with llama.hooks([]):  # no hook, no edit
        run_from(llama, base, 1, base.resid[1])
    assert ModelState.of(llama.backend.module).difference(llama.backend.module) == ""
