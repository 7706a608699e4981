"""Weights that cannot write a direction against the hooks that remove it; the originals come back bit for bit."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import hook_count
from tiny import GENERATION

from mechsafety.errors import MechsafetyError
from mechsafety.interventions import orthogonalized, project_out

PROMPTS = ["how do i make a bomb", "help", "teach me to steal a car please"]
TIED = {
    "gpt2": True,
    "llama": False,
    "gpt_neox": False,
    "qwen2": False,
    "qwen3": False,
    "mistral": False,
    "phi3": False,
}
QUICK = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rows(seed, rank=1):
    return torch.randn(rank, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", list(TIED))
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_equals_the_hooks(kind, strength, make_model):
    model = make_model(kind)
    module, name, _ = model.backend.writers()[0]
    table = getattr(module, name)
    if GENERATION == "TransformerBridge":
        assert model.hf_model.get_input_embeddings().weight is table
        assert (model.hf_model.get_output_embeddings().weight is table) == TIED[kind]
    plain, digest = model.logits(PROMPTS), model.weights_sha256
    with project_out(model, rows(1, 2), strength):
        want, said = model.logits(PROMPTS), model.generate(PROMPTS, 5)
    with orthogonalized(model, rows(1, 2), strength) as edited:
        torch.testing.assert_close(edited.logits(PROMPTS), want, atol=1e-4, rtol=1e-4)
        assert edited.generate(PROMPTS, 5) == said
    assert float((want - plain).abs().max()) > 1e-2
    assert torch.equal(model.logits(PROMPTS), plain)
    model.__dict__.pop("_weights_sha256")
    assert model.weights_sha256 == digest
    assert getattr(module, name) is table


@QUICK
@given(seed=st.integers(0, 10_000), rank=st.integers(1, 3), strength=st.floats(0, 1))
def test_equals_the_hooks_tied_and_untied(llama, gpt2, seed, rank, strength):
    for model in (llama, gpt2):
        with project_out(model, rows(seed, rank), strength):
            want = model.logits(PROMPTS)
        with orthogonalized(model, rows(seed, rank), strength):
            torch.testing.assert_close(model.logits(PROMPTS), want, atol=1e-4, rtol=1e-4)


def test_no_weight_writes_the_direction(gpt2):
    unit = rows(2)[0] / rows(2)[0].norm()
    with orthogonalized(gpt2, rows(2)):
        for layer in range(3):
            assert float((gpt2.W_O(layer) @ unit).abs().max()) < 1e-6
        module, name, _ = gpt2.backend.writers()[0]
        assert float((getattr(module, name) @ unit).abs().max()) < 1e-6
        assert float((unit @ gpt2.backend.W_U).abs().max()) > 0.1  # the readers stay
    assert float((gpt2.W_O(0) @ unit).abs().max()) > 0.1


@pytest.mark.generation("TransformerBridge", reason="a HookedTransformer has no save_pretrained")
def test_such_a_model_is_not_saved(gpt2, tmp_path):
    with orthogonalized(gpt2, rows(3)), pytest.raises(MechsafetyError) as caught:
        gpt2.hf_model.save_pretrained(tmp_path / "model")
    assert str(caught.value) == "a model with a direction removed from its weights is not saved; use it in memory"
    assert not (tmp_path / "model").exists()
    assert "save_pretrained" not in vars(gpt2.hf_model)


def test_an_exception_brings_the_weights_back(llama):
    plain, before = llama.logits(PROMPTS), hook_count(llama)
    with pytest.raises(KeyError), orthogonalized(llama, rows(4)):
        raise KeyError("stop")
    assert torch.equal(llama.logits(PROMPTS), plain) and hook_count(llama) == before


def test_a_norm_after_attention_is_refused(make_model):
    with pytest.raises(MechsafetyError) as caught, orthogonalized(make_model("olmo2"), rows(5)):
        pass
    assert str(caught.value) == (
        "Olmo2ForCausalLM normalises each block's output, so no weights are equivalent to the hooks; "
        "expected a model without a norm after attention or MLP; use project_out"
    )


@pytest.mark.generation("TransformerBridge", reason="TransformerLens 3.9 has one name for each weight")
def test_weights_under_unknown_names_are_refused(make_model, monkeypatch):
    import re

    from mechsafety.models import bridge

    model = make_model("llama")
    plain = model.logits(PROMPTS)
    monkeypatch.setattr(bridge, "_MLP", re.compile("nothing"))
    with pytest.raises(MechsafetyError) as caught, orthogonalized(model, rows(6)):
        pass
    assert str(caught.value).startswith("found 3 output weights and 1 embeddings in LlamaForCausalLM; expected 6")
    assert torch.equal(model.logits(PROMPTS), plain)


def test_weights_that_do_not_equal_the_hooks_are_refused(make_model, monkeypatch):
    from mechsafety.interventions import weights

    model = make_model("llama")
    plain = model.logits(PROMPTS)
    monkeypatch.setattr(weights, "without_directions", lambda weight, basis, share, axis: weight * 0.5)
    message = r"^orthogonalised weights of .* differ from the hooks by"
    with pytest.raises(MechsafetyError, match=message), orthogonalized(model, rows(7)):
        pass
    assert torch.equal(model.logits(PROMPTS), plain)
