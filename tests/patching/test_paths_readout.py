"""Scores of many variants of one final residual stream, against unembedding each of them whole."""

import pytest
import torch

import mechsafety as ms
from mechsafety.models.engine import unembed
from mechsafety.patching import pair_runs, readout


@pytest.fixture(scope="module")
def peaked(make_hf_model, make_tokenizer):
    """A model that is nearly sure of its next token, as chat models are."""
    hf = make_hf_model("llama")
    with torch.no_grad():
        hf.lm_head.weight *= 20
    return ms.load_model((hf, make_tokenizer()))


@pytest.fixture
def few(monkeypatch):
    """Only 12 of the tiny vocabulary are kept; counts the variants that were unembedded whole."""
    whole = []
    monkeypatch.setattr(readout, "KEPT", 12)
    bound = readout._bound

    def spy(*args):
        out = bound(*args)
        whole.append(out)
        return out

    monkeypatch.setattr(readout, "_bound", spy)
    return whole


def changes(base, sizes, seed=0):
    noise = torch.randn(len(sizes), *base.resid[-1][:, -1].shape, generator=torch.Generator().manual_seed(seed))
    return noise * torch.tensor(sizes)[:, None, None]


def exact(model, base, change, metric):
    with torch.no_grad():
        logits = unembed(model, (base.resid[-1][:, -1] + change).double().float()).double()
    ids = list(metric.refusal_ids)
    rest = [token for token in range(logits.shape[-1]) if token not in ids]
    return (logits[..., ids].logsumexp(-1) - logits[..., rest].logsumexp(-1)).float()


@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.3, 5.0])
def test_leaving_tokens_out_changes_nothing_beyond_the_bound(peaked, pairs, log_odds, few, size):
    base = pair_runs(peaked, pairs).harmful
    change = changes(base, [size * (1 + k / 20) for k in range(20)])
    with torch.no_grad():
        found = readout.final_scores(peaked, base, change, log_odds)
    assert len(few) == len(pairs), "the bound was asked for"
    # float32 logits of this size are rounded at 1e-5
    torch.testing.assert_close(found, exact(peaked, base, change, log_odds), atol=1e-4, rtol=1e-6)


def test_the_bound_holds_and_decides(peaked, pairs):
    base = pair_runs(peaked, pairs).harmful
    weights, logits = peaked.W_U.T, base.logits[0]
    moved = changes(base, [1e-4 * 1.5**k for k in range(24)])[:, 0]
    others = logits.argsort(descending=True)[12:]
    bound = readout._bound(logits[others], weights[others].norm(dim=1), moved)
    truth = (logits[others] + moved @ weights[others].T).logsumexp(-1)
    assert bool((truth <= bound + 1e-5).all())
    assert bool((bound.diff() >= -1e-5).all()), "larger changes are less sure"
    kept = logits.argsort(descending=True)[:12]
    rest = (logits[kept] + moved @ weights[kept].T).logsumexp(-1)
    decided = bound <= rest - 6
    assert bool(decided[0]) and not bool(decided[-1])


def test_few_variants_and_linear_metrics_need_no_bound(peaked, pairs, log_odds, logit_difference, few):
    base = pair_runs(peaked, pairs).harmful
    change = changes(base, [0.5] * 20)
    with torch.no_grad():
        linear = readout.final_scores(peaked, base, change, logit_difference)
        some = readout.final_scores(peaked, base, change[:3], log_odds)
        logits = unembed(peaked, base.resid[-1][:, -1] + change)
    assert few == []
    torch.testing.assert_close(linear, logit_difference(logits), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(some, log_odds(logits[:3]), atol=1e-4, rtol=1e-5)


def test_soft_caps_and_coarse_types_are_read_whole(make_model, make_hf_model, make_tokenizer, pairs, log_odds, few):
    coarse = ms.load_model((make_hf_model("llama", dtype=torch.bfloat16), make_tokenizer()))
    for model in (make_model("gemma2"), coarse):
        base = pair_runs(model, pairs).harmful
        change = changes(base, [0.5] * 20)
        with torch.no_grad():
            found = readout.final_scores(model, base, change, log_odds)
            expected = log_odds(unembed(model, base.resid[-1][:, -1] + change.to(base.resid.dtype)))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert few == []
