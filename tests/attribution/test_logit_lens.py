"""Logit lens: the last row is the metric, every other one is what the final norm and unembedding make of the stream."""

from dataclasses import replace

import pytest
import torch
from reference import record

from mechsafety.attribution import LogitLens, direct_logit_attribution, logit_lens
from mechsafety.attribution.direct import DIRECT_SITES, direct_parts
from mechsafety.errors import MechsafetyError
from mechsafety.models.engine import unembed


def test_against_the_stream_itself(any_model, ragged, log_odds):
    found = logit_lens(any_model, ragged, log_odds, n_positions=4)
    for name, side in (("harmful", ragged.harmful), ("harmless", ragged.harmless)):
        scores = getattr(found, name)
        torch.testing.assert_close(scores[-1, -1], log_odds(any_model.logits(side)), atol=1e-4, rtol=1e-4)
        for row, prompt in enumerate(side):
            tokens = any_model.tokenize([prompt])
            stream = record(any_model, tokens, ["blocks.1.hook_resid_pre"])["blocks.1.hook_resid_pre"][0, -4:]
            want = log_odds(unembed(any_model, stream))
            torch.testing.assert_close(scores[1, :, row], want, atol=1e-4, rtol=1e-4)


def test_columns_before_a_prompt_are_missing_and_left_out(llama, ragged, log_odds):
    found = logit_lens(llama, ragged, log_odds, n_positions=8)
    short = llama.n_tokens("kill")
    assert bool(found.harmful[:, : 8 - short, 1].isnan().all()) and not found.harmful[:, 8 - short :, 1].isnan().any()
    frame = found.to_dataframe()
    assert len(frame) == 4 * 8 and not frame.gap.isna().any()
    row = frame[(frame.layer == 3) & (frame.position == -1)].iloc[0]
    gap = (log_odds(llama.logits(ragged.harmful)) - log_odds(llama.logits(ragged.harmless))).mean()
    assert row.gap == pytest.approx(float(gap), abs=1e-4) and row.ci_low < row.gap < row.ci_high


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_layers_shares_are_the_direct_attribution(kind, shared_model, pairs, log_odds):
    model = shared_model(kind)
    found = logit_lens(model, pairs, log_odds)
    direct = direct_logit_attribution(model, pairs, log_odds)
    assert ("norms after blocks frozen" in repr(found)) == (kind == "gemma2")
    assert found.share_positions == (-1,)
    torch.testing.assert_close(found.mlps[:, 0], direct.mlps / direct.total.mean(), atol=1e-5, rtol=1e-4)
    rest = (direct.embed + direct.rest).mean() / direct.total.mean()
    assert float((found.attention + found.mlps).sum(0).mean() + rest) == pytest.approx(1.0, abs=1e-4)


def test_shares_at_all_columns_sum_to_what_the_lens_shows_there(llama, ragged, log_odds):
    """At every position layers, embedding and rest make the gap that the last row of the lens has there."""
    found = logit_lens(llama, ragged, log_odds, n_positions=8, positions="all")
    assert found.share_positions == found.positions and found.attention.shape == (3, 8, len(ragged))
    last = logit_lens(llama, ragged, log_odds, n_positions=8)
    torch.testing.assert_close(found.mlps[:, -1:], last.mlps)
    gap = found.gap[-1, -1]
    caches = [llama.cache(side, DIRECT_SITES) for side in (ragged.harmful, ragged.harmless)]
    for position in (-1, -3, -5):
        bad, good = (direct_parts(llama, cache, log_odds, position=position) for cache in caches)
        embed, rest = ((bad[k] - good[k]) / gap for k in (2, 3))
        whole = (found.attention + found.mlps)[:, position].sum(0) + embed + rest
        shown = (found.harmful - found.harmless)[-1, position] / gap
        there = ~shown.isnan()
        torch.testing.assert_close(whole[there], shown[there], atol=1e-4, rtol=1e-3)
    short = llama.n_tokens("kill")
    assert bool(found.mlps[:, : 8 - short, 1].isnan().all()) and not found.mlps[:, 8 - short :, 1].isnan().any()
    frame = found.shares_dataframe()
    assert len(frame) == 2 * 3 * 8 and not frame.share.isna().any()
    row = frame[(frame.part == "mlp") & (frame.layer == 2) & (frame.position == -1)].iloc[0]
    assert (
        row.share == pytest.approx(float(found.mlps[2, -1].mean()), abs=1e-5) and row.ci_low <= row.share <= row.ci_high
    )


def test_the_planted_direction_arrives_with_block_0(directed):
    model, pairs, metric = directed
    gap = logit_lens(model, pairs, metric).gap
    assert float(gap[0, -1]) == pytest.approx(0.0, abs=1e-5) and float(gap[1, -1]) > 20


def test_round_trip_also_of_older_results_without_shares(llama, pairs, log_odds, tmp_path):
    found = replace(logit_lens(llama, pairs, log_odds), attention=None, mlps=None)
    again = LogitLens.load(found.save(tmp_path / "lens"))
    with pytest.raises(MechsafetyError) as caught:
        again.shares_dataframe()
    assert str(caught.value) == (
        "a LogitLens without shares, of an older version; call logit_lens(model, pairs, metric) again"
    )
    assert torch.equal(again.harmful, found.harmful) and again.positions == found.positions
    assert repr(again).startswith("LogitLens(4 layers x ") and again.plot().data[0].z.shape[0] == 4


def test_refusal(llama, pairs, log_odds):
    with pytest.raises(MechsafetyError, match=r"^n_positions=0; expected at least 1$"):
        logit_lens(llama, pairs, log_odds, n_positions=0)
    with pytest.raises(MechsafetyError, match=r"^positions='first'; expected one of \('last', 'all'\)$"):
        logit_lens(llama, pairs, log_odds, positions="first")
