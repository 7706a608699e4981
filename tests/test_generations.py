"""The same weights give the same numbers through either generation of TransformerLens (see `generations`)."""

import generations
import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def stored():
    return load_file(generations.FILE)


def of(stored, model):
    return {name.partition(".")[2]: value for name, value in stored.items() if name.startswith(f"{model}.")}


@pytest.mark.parametrize("kind", generations.TINY)
def test_tiny_models(kind, stored, make_hf_model, shared_model, pairs, logit_difference):
    expected = of(stored, kind)
    assert torch.equal(generations.weights_hash(make_hf_model(kind)), expected.pop("weights"))
    found = generations.tiny_results(shared_model(kind), pairs, logit_difference)
    assert set(found) == set(expected) and len(found) > 15
    for name, tensor in found.items():
        assert float(tensor.abs().max()) > 1e-3, name
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.demo
def test_the_demo_model(stored, demo):
    expected = of(stored, "demo")
    found = generations.demo_results(demo)
    assert set(found) == set(expected)
    for name, tensor in found.items():
        gap = float((tensor - expected[name]).abs().max() / expected[name].abs().max())
        assert gap <= 1e-3, f"{name} is off by {gap:.1e} of its largest value"


def test_the_file_is_small():
    assert generations.FILE.stat().st_size < 300_000
