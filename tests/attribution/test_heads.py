"""The table of all heads: each score against its own function or plain hooks; rank agreement."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference import record, whole_logits
from scipy.stats import spearmanr

from mechsafety.attribution import HeadAttribution, direct_logit_attribution, head_attribution
from mechsafety.attribution.heads import SCORES, path_to_direction
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Node
from mechsafety.patching import Projection, activation_patching, pair_runs, path_projection
from mechsafety.sites import Site, SiteKind


def random_direction(layer=2, position=-1):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(8))
    return SimpleNamespace(vector=vector, layer=layer, position=position)


@pytest.fixture(scope="module")
def table(directed, directed_found):
    model, pairs, metric = directed
    return head_attribution(model, pairs, metric, direction=directed_found, mask="zero", progress=False)


def test_all_scores_find_the_planted_head(table):
    frame = table.to_dataframe().set_index("node")
    assert len(frame) == 12 and frame.index[0] == "L0.H0"
    for name in ("direct", "total", "path"):
        assert frame[name]["L0.H0"] > 0.75 and frame[name].drop("L0.H0").abs().max() < 0.05, name
    for name in ("ships", "sahara"):
        assert frame[name].idxmax() == "L0.H0", name
    spans = frame[[f"attention_{span}" for span in ("prefix", "instruction", "suffix")]]
    np.testing.assert_allclose(spans.sum(axis=1), 1.0, atol=1e-5)
    assert (frame.total_low <= frame.total).all() and (frame.total <= frame.total_high).all()


def test_direct_and_total_are_those_of_their_own_functions(llama, pairs, log_odds):
    found = head_attribution(llama, pairs, log_odds, scores=["direct", "total"], progress=False)
    patched = activation_patching(
        llama, pairs, log_odds, nodes=[Node("head", k, h) for k in range(3) for h in range(4)], progress=False
    )
    torch.testing.assert_close(found.total.flatten(0, 1), patched.changes / patched.gap)
    direct = direct_logit_attribution(llama, pairs, log_odds)
    torch.testing.assert_close(found.direct, direct.heads / direct.total.mean(), atol=1e-4, rtol=1e-4)
    assert found.path is None and found.ships is None and "path" not in found.to_dataframe()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_path_to_the_direction_by_plain_hooks(kind, shared_model, pairs):
    """The sender takes its harmless value, attention patterns and all other heads stay, MLPs respond."""
    model = shared_model(kind)
    direction = random_direction()
    unit = direction.vector / direction.vector.norm()
    tokens = model.tokenize_pairs(pairs)
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(3)] + ["blocks.2.hook_resid_pre"]
    bad, good = (record(model, side, names) for side in (tokens.harmful, tokens.harmless))
    gap = ((bad[names[-1]] - good[names[-1]])[:, -1] @ unit).mean()
    got = path_to_direction(model, pair_runs(model, pairs), direction)
    for layer, head in ((0, 1), (1, 3), (2, 0)):
        edits = []
        for at in range(3):

            def freeze(z, at=at):
                z = bad[names[at]].clone()
                if at == layer:  # noqa: B023
                    z[:, :, head] = good[names[at]][:, :, head]  # noqa: B023
                return z

            edits.append((names[at], freeze))
        seen = {}
        edits.append((names[-1], lambda x: seen.update(resid=x.clone())))  # noqa: B023
        whole_logits(model, tokens.harmful, edits)
        lost = (bad[names[-1]] - seen["resid"])[:, -1] @ unit / gap
        torch.testing.assert_close(got[layer, head], lost, atol=1e-4, rtol=1e-3)
    assert float(got[:2].abs().max()) > 1e-2 and not got[2].any()


def test_rank_agreement(table):
    agreement = table.rank_agreement()
    assert list(agreement.index) == list(agreement.columns) and "ships" in agreement
    np.testing.assert_allclose(np.diag(agreement), 1.0)
    flat = [getattr(table, name).mean(-1).abs().flatten().numpy() for name in ("direct", "total")]
    assert agreement.loc["direct", "total"] == pytest.approx(spearmanr(*flat).statistic)


def test_models_with_norms_after_blocks_have_every_score(shared_model, pairs, log_odds):
    model, direction = shared_model("gemma2"), random_direction()
    found = head_attribution(model, pairs, log_odds, direction=direction, progress=False, rank=2)
    assert all(getattr(found, name) is not None for name in SCORES)
    own = direct_logit_attribution(model, pairs, log_odds, progress=False)
    torch.testing.assert_close(found.direct, own.heads / own.total.mean(), atol=1e-5, rtol=1e-4)
    unit = direction.vector / direction.vector.norm()
    site = Site(SiteKind.RESID_PRE, direction.layer)
    paths = path_projection(model, pairs, Projection(unit, site, (direction.position,)), progress=False)
    torch.testing.assert_close(found.path.flatten(0, 1), paths.changes[:, 0] / paths.gap, atol=1e-5, rtol=1e-4)
    assert "norms after blocks frozen" in repr(found) and found.provenance.options["block_norms"] == "frozen"
    exact = head_attribution(model, pairs, log_odds, scores=["total"], progress=False)
    assert "block_norms" not in exact.provenance.options


def test_sahara_needs_more_prompts_than_its_rank(llama, pairs, log_odds):
    found = head_attribution(llama, pairs, log_odds, n_masked=1, progress=False)
    assert found.sahara is None and found.ships.shape == (3, 4, 1)
    with pytest.raises(MechsafetyError, match="rank=1 of 1 prompts; expected a rank of 1 to 32 and more prompts"):
        head_attribution(llama, pairs, log_odds, scores=["sahara"], n_masked=1, progress=False)
    assert head_attribution(llama, pairs, log_odds, scores=["total"], rank=99, progress=False).sahara is None


def test_a_constant_score_has_no_ranks(llama, pairs, log_odds):
    direction = random_direction(layer=0)  # nothing comes before block 0
    found = head_attribution(llama, pairs, log_odds, scores=["total"], progress=False)
    assert found.rank_agreement().shape == (1, 1)
    runs = pair_runs(llama, pairs)
    assert not path_to_direction(llama, runs, direction).nan_to_num().any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": ["total", "best"]}, "scores ['best']; expected some of ('direct', 'total', 'path', "),
        ({"scores": []}, "scores []; expected some of"),
        ({"scores": ["path"]}, "scores=['path'] without a direction; pass direction=refusal_direction(...)"),
        (
            {"scores": ["path"], "direction": SimpleNamespace(vector=torch.ones(40), layer=1, position=-1)},
            "a direction of width 40; expected this model's d_model, 32",
        ),
        (
            {"scores": ["path"], "direction": random_direction(3)},
            "a direction at layer 3, position -1; expected layers 0",
        ),
        ({"scores": ["ships"], "mask": "half"}, "mask='half'; expected one of ('uniform', 'zero')"),
    ],
)
def test_refusals(llama, pairs, log_odds, options, message):
    with pytest.raises(MechsafetyError) as caught:
        head_attribution(llama, pairs, log_odds, progress=False, **options)
    assert str(caught.value).startswith(message)


def test_table_picture_and_round_trip(table, tmp_path):
    again = HeadAttribution.load(table.save(tmp_path / "heads"))
    assert torch.equal(again.sahara, table.sahara)
    assert repr(again) == (
        "HeadAttribution(3 layers x 4 heads: direct, total, path, attention_prefix, attention_instruction, "
        "attention_suffix, ships, sahara)"
    )
    assert len(table.plot().data) == 8
