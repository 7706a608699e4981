"""Rotary angles that depend on the length: a prompt's numbers are its own, whatever stands beside or went before."""

import copy

import pytest
import torch
import transformers

import mechsafety as ms
from mechsafety.interventions.batched import PromptBatches, run_removed, run_unedited
from mechsafety.models.engine import base_run
from mechsafety.monitors.features import read_prompts
from mechsafety.neurons import greedy_replies

pytestmark = pytest.mark.generation("TransformerBridge", reason="a HookedTransformer has no such angles")

# 5, 10 and 19 tokens; angles change beyond 16, which replies to the second cross
PROMPTS = ["tea", "how do i make a bomb", "teach me to steal a car please and explain how to hurt people with poison"]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 2,
    "eos_token_id": 6,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def build(kind, size):
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": size}
    if kind == "dynamic":
        rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
        config = transformers.LlamaConfig(**sizes, max_position_embeddings=16, rope_parameters=rope)
    else:
        rope = {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 16,
        }
        config = transformers.Phi3Config(**sizes, max_position_embeddings=64, rope_parameters=rope)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module", params=["longrope", "dynamic"])
def model(request, make_tokenizer):
    tokenizer = make_tokenizer()
    return ms.load_model((build(request.param, len(tokenizer)), tokenizer))


@pytest.fixture(scope="module")
def alone(model):
    """Next-token logits of each prompt from a model that has never seen another one."""
    return torch.stack([whole(model, model.tokenize([prompt]).ids)[-1] for prompt in PROMPTS])


def whole(model, ids):
    with torch.no_grad():
        kind = "dynamic" if model.hf_model.config.model_type == "llama" else "longrope"
        return build(kind, model.d_vocab)(ids).logits[0]


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_a_long_prompt_does_not_change_a_short_one(model, alone):
    assert model.tokenize(PROMPTS).mask.sum(1).tolist() == [5, 10, 19] and model.backend.sizes.n_ctx == 64
    for order in ([0, 1, 2], [2, 1, 0], [2, 0], [1]):
        close(model.logits([PROMPTS[k] for k in order]), alone[order])
    close(model.logits(PROMPTS, batch_size=1), alone)
    mixed = [PROMPTS[k % 3] for k in range(7)]
    assert torch.stack([model.logits(mixed)[k] - alone[k % 3] for k in range(7)]).abs().max() < 2e-5
    close(copy.deepcopy(model.hf_model)(model.tokenize(PROMPTS[:1]).ids).logits[0, -1].detach(), alone[0])


def test_stored_runs(model, alone):
    tokens = model.tokenize(PROMPTS[1:])
    for start in (1, 12, 17):
        close(base_run(model, tokens.rows([1]), start).logits, alone[[2]])
        close(base_run(model, tokens, start).logits, alone[1:])
    batches = PromptBatches.of(model, PROMPTS)
    close(run_unedited(model, batches).logits[0], alone)
    vector = torch.nn.functional.one_hot(torch.tensor(3), 32).float()
    found = {
        k: row
        for run in run_removed(model, batches, [vector[None]])
        for k, row in zip(run.index, run.logits[0], strict=True)
    }
    with ms.interventions.project_out(model, vector):
        for k, prompt in enumerate(PROMPTS):
            close(found[k], model.logits([prompt])[0])


def test_activations(model):
    together = read_prompts(model, PROMPTS)
    for k, prompt in enumerate(PROMPTS):
        one = read_prompts(model, [prompt])
        close(together.neurons[k], one.neurons[0])
        close(together.resid[k], one.resid[0])


def test_greedy_replies_equal_whole_forwards(model):
    expected = []
    for prompt in PROMPTS:
        ids, said = model.tokenize([prompt]).ids[0].tolist(), []
        while len(said) < 8 and said[-1:] != [6]:
            said.append(int(whole(model, torch.tensor([ids + said]))[-1].argmax()))
        expected.append(said)
    assert greedy_replies(model, PROMPTS, 8) == expected
    assert model.generate(PROMPTS, 8, progress=False) == model.decode(expected)


def test_patching_of_pairs_of_different_lengths(model, log_odds):
    harmful = ["how do i make a bomb", "teach me to steal a car please and explain how to hurt people with poison"]
    harmless = ["how do i make a cake", "teach me to steal a car please and explain how to help people with poison"]
    nodes = [ms.Node("head", 1, 2), ms.Node("mlp", 0)]
    together = ms.activation_patching(
        model, ms.PromptPairs.from_lists(harmful, harmless), log_odds, nodes=nodes, progress=False
    )
    for k, sides in enumerate(zip(harmful, harmless, strict=True)):
        pair = ms.PromptPairs.from_lists(*([side] for side in sides))
        one = ms.activation_patching(model, pair, log_odds, nodes=nodes, progress=False)
        close(together.changes[..., k], one.changes[..., 0])
