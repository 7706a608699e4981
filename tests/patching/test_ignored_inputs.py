"""Inputs that would change nothing are refused in one line, where they used to be dropped silently."""

import pytest
import torch

import mechsafety as ms
from mechsafety.circuits.backups import find_backups
from mechsafety.circuits.faithfulness import FaithfulnessMeter
from mechsafety.errors import MechsafetyError
from mechsafety.interventions.batched import PromptBatches, run_added
from mechsafety.models.engine import base_run
from mechsafety.models.shortcuts import Shortcuts
from mechsafety.nodes import Node
from mechsafety.patching import Patch, Projection, pair_runs
from mechsafety.patching.senders import node_outputs
from mechsafety.sites import Site

UNIT = torch.eye(32)[0]


@pytest.mark.parametrize("part", [Node("embed"), Node("logits")], ids=str)
def test_a_patch_of_what_holds_no_value_of_its_own(llama, part):
    with pytest.raises(MechsafetyError) as error:
        Patch.of(llama, [[Node("head", 0, 1)], [part]])
    assert str(error.value) == (
        f"{part} cannot be patched; expected heads, MLPs or neurons; "
        "patch the embedding as Site('resid_pre', 0), by activation_patching(..., nodes=[...])"
    )


@pytest.mark.parametrize("node", [Node("head", 3, 0), Node("head", 0, -1), Node("mlp", -1), Node("neuron", 0, 48)])
def test_a_patch_of_what_the_model_lacks(llama, node):
    with pytest.raises(MechsafetyError, match=r"^L-?\d.* does not exist in Llama"):
        Patch.of(llama, [[node]])


def test_the_rest(llama, pairs, log_odds):
    runs = pair_runs(llama, pairs)
    tokens, prompts = runs.harmful.tokens, PromptBatches.of(llama, pairs.harmful)
    meter, neuron = FaithfulnessMeter(llama, runs, log_odds), Node("neuron", 1, 3)
    cases = [
        (lambda: Shortcuts().without("last_logit"), "shortcuts ['last_logit']; expected some of ('shared_prefix', "),
        (lambda: Shortcuts.only("prefix"), "shortcuts ['prefix']; expected some of ('shared_prefix', "),
        (lambda: base_run(llama, tokens, -1), "runs that begin at column -1; expected 0 to 10"),
        (lambda: pair_runs(llama, pairs, start=11), "runs that begin at column 11; expected 0 to 10"),
        (lambda: node_outputs(llama, runs.harmful, [Node("embed")]), "embed writes nothing of its own; expected heads"),
        (
            lambda: Projection(UNIT, Site("resid_pre", 1), "each"),
            "a projection at positions='each'; expected 'all', one of ('prefix', ",
        ),
        (
            lambda: find_backups(meter, [neuron], {neuron: 1.0}),
            "backups of L1.N3; expected a circuit of heads and MLPs",
        ),
        (
            lambda: list(run_added(llama, prompts, torch.ones(2, 1, 32), [1])),
            "2 rows of vectors for 1 layers; expected",
        ),
    ]
    for call, text in cases:
        with pytest.raises(MechsafetyError) as error:
            call()
        assert str(error.value).startswith(text) and "\n" not in str(error.value)
    with pytest.raises(MechsafetyError, match="each once"), ms.steer(llama, UNIT, 1.0, [1, 1]):
        pass
