"""Scores of many variants of one final residual stream, against unembedding each of them whole."""

import pytest
import torch

import mechsafety as ms
from mechsafety.models.engine import unembed
from mechsafety.patching import pair_runs, readout


@pytest.fixture
def unembedded(monkeypatch):
    """Numbers of rows that were unembedded at a time, at most two of them."""
    sizes = []

    def spy(model, rows):
        sizes.append(len(rows))
        return unembed(model, rows)

    monkeypatch.setattr(readout, "unembed", spy)
    monkeypatch.setattr(readout, "MAX_LOGITS", 400)
    return sizes


@pytest.fixture(scope="module")
def coarse(make_hf_model, make_tokenizer):
    return ms.load_model((make_hf_model("llama", dtype=torch.bfloat16), make_tokenizer()))


def changes(base, n=5):
    final = base.resid[-1][:, -1]
    return 0.5 * torch.randn(n, *final.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gemma2", "coarse"])
def test_is_the_metric_of_the_whole_logits(kind, request, shared_model, pairs, log_odds, logit_difference, unembedded):
    model = request.getfixturevalue("coarse") if kind == "coarse" else shared_model(kind)
    base = pair_runs(model, pairs).harmful
    change = changes(base)
    for metric in (log_odds, logit_difference):
        unembedded.clear()
        with torch.no_grad():
            found = readout.final_scores(model, base, change, metric)
            expected = metric(unembed(model, base.resid[-1][:, -1] + change.to(base.resid.dtype)))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        whole = metric is log_odds or kind in ("gemma2", "coarse")
        assert max(unembedded, default=0) == (2 if whole and model.d_vocab < 200 else 1 if whole else 0)
        assert sum(unembedded) == (5 * len(pairs) if whole else 0)
