"""How models come to other machines: as weights, or by the path that they were loaded by."""

import pickle

import pytest
import torch

import mechsafety as ms
from mechsafety.scale.shipping import load, pack_weights

PROMPTS = ["how do i make a bomb", "kill"]


@pytest.mark.generation("TransformerBridge", reason="a HookedTransformer holds other weights than its checkpoint")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_memory_arrive_as_they_are(kind, dtype, make_hf_model, make_tokenizer):
    model = ms.load_model((make_hf_model(kind, dtype=dtype), make_tokenizer()), template_options={})
    assert model.recipe is None
    found = load(pickle.loads(pickle.dumps(pack_weights(model))))
    assert found.hash_weights() == model.hash_weights() and found.name == model.name
    assert found.template_options == model.template_options
    assert torch.equal(found.logits(PROMPTS), model.logits(PROMPTS))


def test_a_folder_is_loaded_by_the_same_arguments(make_hf_model, make_tokenizer, tmp_path, monkeypatch):
    make_hf_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    model = ms.load_model("model", dtype="bfloat16")
    monkeypatch.chdir("/")  # another machine's processes start elsewhere
    found = load(dict(model.recipe))
    assert found.hash_weights() == model.hash_weights() and found.dtype is torch.bfloat16
