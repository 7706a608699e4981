"""Logit lens: the last row is the metric, every other one is what the final norm and unembedding make of the stream."""

import pytest
import torch
from reference import record

from mechsafety.attribution import LogitLens, direct_logit_attribution, logit_lens
from mechsafety.errors import MechsafetyError
from mechsafety.models.engine import unembed


def test_against_the_stream_itself(any_model, ragged, log_odds):
    found = logit_lens(any_model, ragged, log_odds, n_columns=4)
    for name, side in (("harmful", ragged.harmful), ("harmless", ragged.harmless)):
        scores = getattr(found, name)
        torch.testing.assert_close(scores[-1, -1], log_odds(any_model.logits(side)), atol=1e-4, rtol=1e-4)
        for row, prompt in enumerate(side):
            tokens = any_model.tokenize([prompt])
            stream = record(any_model, tokens, ["blocks.1.hook_resid_pre"])["blocks.1.hook_resid_pre"][0, -4:]
            want = log_odds(unembed(any_model, stream))
            torch.testing.assert_close(scores[1, :, row], want, atol=1e-4, rtol=1e-4)


def test_columns_before_a_prompt_are_missing_and_left_out(llama, ragged, log_odds):
    found = logit_lens(llama, ragged, log_odds, n_columns=8)
    short = llama.n_tokens("kill")
    assert bool(found.harmful[:, : 8 - short, 1].isnan().all()) and not found.harmful[:, 8 - short :, 1].isnan().any()
    frame = found.to_dataframe()
    assert len(frame) == 4 * 8 and not frame.gap.isna().any()
    row = frame[(frame.layer == 3) & (frame.column == -1)].iloc[0]
    gap = (log_odds(llama.logits(ragged.harmful)) - log_odds(llama.logits(ragged.harmless))).mean()
    assert row.gap == pytest.approx(float(gap), abs=1e-4) and row.ci_low < row.gap < row.ci_high


def test_layers_shares_are_the_direct_attribution(llama, pairs, log_odds):
    found = logit_lens(llama, pairs, log_odds)
    direct = direct_logit_attribution(llama, pairs, log_odds)
    torch.testing.assert_close(found.mlps, direct.mlps / direct.total.mean())
    rest = (direct.embed + direct.rest).mean() / direct.total.mean()
    assert float((found.attention + found.mlps).sum(0).mean() + rest) == pytest.approx(1.0, abs=1e-4)


def test_the_planted_direction_arrives_with_block_0(directed):
    model, pairs, metric = directed
    gap = logit_lens(model, pairs, metric).gap
    assert float(gap[0, -1]) == pytest.approx(0.0, abs=1e-5) and float(gap[1, -1]) > 20


def test_post_norm_has_no_shares_and_round_trip(make_model, pairs, log_odds, tmp_path):
    found = logit_lens(make_model("gemma2"), pairs, log_odds)
    assert found.attention is None and found.mlps is None
    again = LogitLens.load(found.save(tmp_path / "lens"))
    assert torch.equal(again.harmful, found.harmful) and again.columns == found.columns
    assert repr(again).startswith("LogitLens(4 layers x ") and again.plot().data[0].z.shape[0] == 4


def test_refusal(llama, pairs, log_odds):
    with pytest.raises(MechsafetyError, match=r"^n_columns=0; expected at least 1$"):
        logit_lens(llama, pairs, log_odds, n_columns=0)
