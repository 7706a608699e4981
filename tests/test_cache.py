"""The typed cache: shapes, sums, what is stored, and that it is nobody else's memory."""

import re

import pytest
import torch
from reference import record

from mechsafety.errors import MechsafetyError

PROMPTS = ["how do i make a bomb", "help", "teach me to steal a car please"]
SITES = ["resid", "z", "head_out", "q", "k", "v", "pattern", "neurons", "attn_out", "mlp_out"]


@pytest.fixture
def cache(any_model):
    return any_model.cache(PROMPTS, SITES)


def test_shapes(any_model, architecture, make_hf_model, cache):
    batch, pos = cache.tokens.ids.shape
    layers, heads, kv_heads = any_model.n_layers, any_model.n_heads, any_model.n_kv_heads
    shapes = {
        "resid": (layers + 1, batch, pos, any_model.d_model),
        "z": (layers, heads, batch, pos, any_model.d_head),
        "head_out": (layers, heads, batch, pos, any_model.d_model),
        "q": (layers, heads, batch, pos, any_model.d_head),
        "k": (layers, kv_heads, batch, pos, any_model.d_head),
        "v": (layers, kv_heads, batch, pos, any_model.d_head),
        "pattern": (layers, heads, batch, pos, pos),
        "neurons": (layers, batch, pos, any_model.d_mlp),
        "attn_out": (layers, batch, pos, any_model.d_model),
        "mlp_out": (layers, batch, pos, any_model.d_model),
    }
    assert set(shapes) == set(SITES)
    for name, shape in shapes.items():
        assert tuple(getattr(cache, name).shape) == shape, name
    config = make_hf_model(architecture).config
    assert kv_heads == getattr(config, "num_key_value_heads", heads)


def test_parts_sum_to_the_residual_stream(any_model, cache):
    real = cache.tokens.mask
    for layer in range(any_model.n_layers):
        if any_model.post_norm:  # they add up to what a norm reads, whose output is what attention adds
            (norm,) = any_model.backend.norms(layer, "ln1_post")
            heads = norm(cache.head_out[layer].sum(0))
            torch.testing.assert_close(heads[real], cache.attn_out[layer][real], atol=1e-4, rtol=1e-4)
            continue
        bias = cache.attn_out[layer] - cache.head_out[layer].sum(0)
        # what the heads do not write is the output bias: the same at every token
        flat = bias[real]
        torch.testing.assert_close(flat, flat[:1].expand_as(flat), atol=1e-4, rtol=1e-4)
        b_o = any_model.bridge.blocks[layer].attn.b_O
        expected = torch.zeros(any_model.d_model) if b_o is None else b_o
        torch.testing.assert_close(flat[0], expected, atol=1e-4, rtol=1e-4)
    embed = record(any_model, cache.tokens, ["blocks.0.hook_resid_pre"])["blocks.0.hook_resid_pre"]
    for layer in range(any_model.n_layers + 1):
        parts = embed + cache.attn_out[:layer].sum(0) + cache.mlp_out[:layer].sum(0)
        torch.testing.assert_close(parts[real], cache.resid[layer][real], atol=1e-4, rtol=1e-4)


def test_a_head_alone_writes_its_head_out(llama):
    """Setting all other heads to zero leaves this head's part of what attention writes."""
    cache = llama.cache(PROMPTS, ["head_out"])
    for layer, head in ((0, 3), (2, 1)):

        def only(tensor, hook, head=head):
            out = torch.zeros_like(tensor)
            out[:, :, head] = tensor[:, :, head]
            return out

        with llama.bridge.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", only)]):
            found = record(llama, cache.tokens, [f"blocks.{layer}.hook_attn_out"])[f"blocks.{layer}.hook_attn_out"]
        torch.testing.assert_close(cache.head_out[layer, head], found, atol=1e-5, rtol=1e-5)


def test_pattern(any_model, cache):
    real = cache.tokens.mask
    sums = cache.pattern.sum(-1)[:, :, real]
    torch.testing.assert_close(sums, torch.ones_like(sums))
    for row, mask in enumerate(real):
        rows = cache.pattern[:, :, row][:, :, mask]
        assert not bool(rows[..., ~mask].any()), "no attention to padding"
        later = torch.ones(int(mask.sum()), int(mask.sum()), dtype=torch.bool).triu(1)
        assert not bool(rows[..., mask][:, :, later].any()), "no attention to later tokens"


def test_the_last_residual_is_the_final_norms_input(any_model, cache):
    final = cache.resid[-1][:, -1]
    norm = any_model.frozen_final_norm(final)
    logits = norm(final) @ any_model.W_U.float()
    bias = getattr(any_model.bridge.unembed, "b_U", None)
    logits = logits if bias is None else logits + bias
    cap = any_model.bridge.cfg.output_logits_soft_cap
    logits = cap * torch.tanh(logits / cap) if cap > 0 else logits
    torch.testing.assert_close(logits, any_model.logits(PROMPTS), atol=1e-4, rtol=1e-4)


def test_only_asked_for_sites_are_stored(llama):
    cache = llama.cache(PROMPTS, ["pattern", "head_out"])
    assert set(cache.acts) == {"pattern", "z"} and cache.head_out.shape[0] == 3
    with pytest.raises(
        MechsafetyError, match=re.escape("'resid' was not stored; expected one of ['pattern', 'z']; ask for")
    ):
        _ = cache.resid
    with pytest.raises(MechsafetyError, match=r"'head_out' was not stored; ask for it: sites=\['head_out'\]"):
        _ = llama.cache(PROMPTS, ["z"]).head_out
    assert repr(cache).startswith("ActivationCache(3 prompts: pattern (3, 3, 4, ")


@pytest.mark.parametrize("sites", [["z", "zz"], "z"])
def test_unknown_sites(llama, sites):
    with pytest.raises(MechsafetyError, match=r"unknown sites .*expected a list of some of \['resid', 'z'"):
        llama.cache(PROMPTS, sites)


def test_stored_tensors_are_read_only(any_model):
    cache = any_model.cache(PROMPTS, SITES)
    for name in cache.acts:  # head_out is computed anew each time
        with pytest.raises(RuntimeError, match=r"[Ii]nplace update to inference tensor"):
            getattr(cache, name).zero_()
    own = cache.resid.clone().requires_grad_()
    own.sum().backward()
    assert bool((own.grad == 1).all())


def test_stored_tensors_share_nothing_with_the_model(any_model):
    before = any_model.logits(PROMPTS)
    cache = any_model.cache(PROMPTS, SITES)
    with torch.inference_mode():
        for name in SITES:
            getattr(cache, name).fill_(3.0)
    assert torch.equal(any_model.logits(PROMPTS), before)
    again = any_model.cache(PROMPTS, SITES)
    assert not any(bool((getattr(again, name) == 3.0).all()) for name in SITES)


def test_nothing_can_be_put_into_a_cache(llama):
    cache = llama.cache(["help"], sites=["z"])
    with pytest.raises(TypeError, match="does not support item assignment"):
        cache.acts["z"] = torch.zeros(1)


def test_a_single_site_is_named_as_it_was_given(llama):
    with pytest.raises(MechsafetyError, match=r"^unknown sites \['z'\]; expected a list of some of \['resid', 'z'"):
        llama.cache(["make tea"], sites="z")
