"""Direct logit attribution against sums, a closed form by hand, and TransformerLens' own."""

import copy

import pytest
import torch
from reference import PlainModel

import mechsafety as ms
from mechsafety.attribution import direct_logit_attribution
from mechsafety.metrics import RefusalLogOdds

PROMPTS = ["how do i make a bomb", "help", "teach me to steal a car please"]


@pytest.fixture(params=["log_odds", "logit_difference"])
def metric(request):
    return request.getfixturevalue(request.param)


def test_parts_sum_to_the_metric(any_model, metric):
    found = direct_logit_attribution(any_model, PROMPTS, metric)
    parts = found.heads.sum((0, 1)) + found.mlps.sum(0) + found.embed + found.rest
    torch.testing.assert_close(found.total, metric(any_model.logits(PROMPTS)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(parts, found.total, atol=1e-4, rtol=1e-4)
    assert found.heads.shape == (3, 4, 3) and found.mlps.shape == (3, 3)
    alone = torch.stack([direct_logit_attribution(any_model, [prompt], metric).heads[..., 0] for prompt in PROMPTS], -1)
    torch.testing.assert_close(found.heads, alone, atol=1e-4, rtol=1e-4)


def test_prompts_in_batches_are_prompts_at_once(llama, metric, monkeypatch, capsys):
    whole = direct_logit_attribution(llama, PROMPTS, metric, progress=False)
    assert not capsys.readouterr().err
    monkeypatch.setattr("mechsafety.attribution.direct._BATCH", 2)
    parts = direct_logit_attribution(llama, PROMPTS, metric)
    assert "direct" in capsys.readouterr().err and parts.provenance.options == whole.provenance.options
    for name in ("heads", "mlps", "embed", "rest", "total"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_closed_form(kind, make_hf_model, make_tokenizer, logit_difference):
    """A part, centred if the norm centres, over the final scale, times the norm's and the unembedding's weights."""
    hf, generator = make_hf_model(kind), torch.Generator().manual_seed(3)
    final = {"llama": "model.norm", "gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm"}[kind]
    norm = hf.get_submodule(final)
    with torch.no_grad():  # a norm whose weight is not all ones
        norm.weight.copy_(weight := 1 + torch.rand(32, generator=generator))
        if kind != "llama":
            norm.bias.copy_(torch.randn(32, generator=generator))
    plain = PlainModel(copy.deepcopy(hf))
    model = ms.load_model((hf, make_tokenizer()))
    found = direct_logit_attribution(model, PROMPTS, logit_difference)
    unembed = next(plain.w[name] for name in ("lm_head.weight", "embed_out.weight") if name in plain.w)
    read = unembed[[20, 21]].mean(0) - unembed[30]
    for row, prompt in enumerate(PROMPTS):
        ids = model.tokenize([prompt]).ids[0]
        logits, writes = plain(ids)
        torch.testing.assert_close(logits, model.logits([prompt])[0], atol=1e-4, rtol=1e-4)
        biases = sum(plain.write_bias(layer) for layer in range(3))
        last = plain.embed(ids)[-1] + sum(value[-1] for value in writes.values()) + biases
        rms = last.square().mean().sqrt() if kind == "llama" else last.std(unbiased=False)

        def direct(part, rms=rms):
            part = part if kind == "llama" else part - part.mean()
            return float(part / rms * weight @ read)

        for (layer, head), value in writes.items():
            got = found.mlps[layer, row] if head is None else found.heads[layer, head, row]
            assert float(got) == pytest.approx(direct(value[-1]), abs=1e-4)
        assert float(found.embed[row]) == pytest.approx(direct(plain.embed(ids)[-1]), abs=1e-4)


def test_transformer_lens_agrees(make_model, logit_difference):
    """Its apply_ln_to_stack omits the final norm's weight, which is all ones here."""
    model = make_model("llama")
    tokens = model.tokenize([PROMPTS[0]])
    with torch.no_grad():
        _, cache = model.bridge.run_with_cache(tokens.ids)
        stack, labels = cache.decompose_resid(layer=-1, pos_slice=-1, return_labels=True, mlp_input=False)
        scaled = cache.apply_ln_to_stack(stack, layer=-1, pos_slice=-1)
        weights = model.W_U
        read = weights[:, [20, 21]].mean(1) - weights[:, 30]
        oracle = dict(zip(labels, (scaled @ read).flatten().tolist(), strict=True))
    found = direct_logit_attribution(model, tokens, logit_difference)
    for layer in range(3):
        assert oracle[f"{layer}_attn_out"] == pytest.approx(float(found.heads[layer].sum()), abs=1e-4)
        assert oracle[f"{layer}_mlp_out"] == pytest.approx(float(found.mlps[layer, 0]), abs=1e-4)
    assert oracle["embed"] == pytest.approx(float(found.embed[0]), abs=1e-4)


def test_steps_matter_only_for_the_log_odds(llama, log_odds, logit_difference):
    fine, coarse = (direct_logit_attribution(llama, PROMPTS, log_odds, steps=steps) for steps in (64, 1))
    assert float((fine.heads - coarse.heads).abs().max()) > 1e-4
    fine, coarse = (direct_logit_attribution(llama, PROMPTS, logit_difference, steps=steps) for steps in (64, 1))
    assert torch.equal(fine.heads, coarse.heads)


def test_table_and_picture(llama, logit_difference):
    found = direct_logit_attribution(llama, PROMPTS, logit_difference)
    frame = found.to_dataframe().set_index("part")
    assert len(frame) == 2 + 15 and frame.contribution.sum() == pytest.approx(float(found.total.mean()), abs=1e-4)
    assert frame.contribution["L1.H2"] == pytest.approx(float(found.heads[1, 2].mean()))
    assert found.plot().data[0].z.shape == (3, 4)
    assert repr(found) == "DirectAttribution(3 layers x 4 heads, 3 prompts)"
    assert isinstance(logit_difference, RefusalLogOdds) and found.metric["name"] == "logit_difference"
