"""Activation patching of every kind of site against plain hooks on whole forwards, with no shortcut."""

import pytest
import torch

import mechsafety as ms
from mechsafety.patching import activation_patching
from mechsafety.sites import Site, SiteKind

KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern", "neurons")


def slow(model, pairs, metric, site: Site, where, *, swap=False, values=None):
    """Metric of the base run with one site's values replaced at the True columns."""
    base, source = model.tokenize(pairs.harmful), model.tokenize(pairs.harmless)
    if swap:
        base, source = source, base
    plain = Site(site.kind, site.layer)
    new = model.read(source, [plain])[plain] if values is None else values(model.read(source, [plain])[plain])

    def edit(tensor):
        out = tensor.clone()
        for row, column in where.nonzero().tolist():
            if site.kind is SiteKind.PATTERN:
                heads = slice(None) if site.index is None else site.index
                out[row, heads, column] = new[row, heads, column]
            elif site.index is None:
                out[row, column] = new[row, column]
            else:
                out[row, column, site.index] = new[row, column, site.index]
        return out

    if site.kind is SiteKind.RESID_MID:
        # both branches must see the edit: the block's attention output carries the difference
        mid = model.read(base, [plain])[plain]
        carrier = Site(SiteKind.ATTN_OUT, site.layer)
        with model.hooks([(carrier, lambda tensor: tensor + edit(mid) - mid)]):
            return metric(model.logits(base))
    with model.hooks([(plain, edit)]):
        return metric(model.logits(base))


def targets(model) -> list[Site]:
    kinds = [kind for kind in KINDS if not (kind == "resid_mid" and model.parallel)]
    whole = [Site(SiteKind(kind), layer) for kind in kinds for layer in (0, 2)]
    parts = [Site(SiteKind(kind), 1, 1) for kind in ("z", "q", "k", "v", "pattern", "neurons")]
    return whole + parts


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_every_site_equals_plain_hooks(any_model, pairs, log_odds, direction):
    sites = targets(any_model)
    swap = direction == "denoising"
    result = activation_patching(any_model, pairs, log_odds, nodes=sites, direction=direction, progress=False)
    real = any_model.tokenize_pairs(pairs).harmful.mask
    before = result.harmless if swap else result.harmful
    for k, site in enumerate(sites):
        expected = slow(any_model, pairs, log_odds, site, real, swap=swap)
        found = before + result.changes[k] if swap else before - result.changes[k]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0, msg=str(site))


def test_each_column_equals_plain_hooks(llama, pairs, log_odds):
    sites = [Site(SiteKind.RESID_PRE, 1), Site(SiteKind.K, 0, 1)]
    result = activation_patching(llama, pairs, log_odds, nodes=sites, positions="each", progress=False)
    tokens = llama.tokenize_pairs(pairs).harmful
    width = tokens.ids.shape[1]
    assert len(result.nodes) == len(result.columns) == 2 * (width - llama.tokenize_pairs(pairs).start)
    for k, (site, column) in enumerate(zip(result.nodes, result.columns, strict=True)):
        where = torch.zeros_like(tokens.mask)
        where[:, column] = tokens.mask[:, column]
        expected = slow(llama, pairs, log_odds, site, where)
        torch.testing.assert_close(result.harmful - result.changes[k], expected, atol=1e-4, rtol=0)


def test_listed_columns_are_patched_together(llama, pairs, log_odds):
    site = Site(SiteKind.RESID_PRE, 1)
    result = activation_patching(llama, pairs, log_odds, nodes=[site], positions=[-1, -2, -3], progress=False)
    where = torch.zeros_like(llama.tokenize_pairs(pairs).harmful.mask)
    where[:, -3:] = True
    expected = slow(llama, pairs, log_odds, site, where)
    torch.testing.assert_close(result.harmful - result.changes[0], expected, atol=1e-4, rtol=0)
    assert result.positions == "-1,-2,-3"


@pytest.mark.parametrize("kind", ["z", "resid_pre", "neurons"])
def test_zero_source(llama, pairs, log_odds, kind):
    """Zero at the columns from the first difference on: the ones before are common to both prompts and stay."""
    site = Site(SiteKind(kind), 1)
    result = activation_patching(llama, pairs, log_odds, nodes=[site], source="zero", progress=False)
    tokens = llama.tokenize_pairs(pairs)
    where = tokens.harmful.mask.clone()
    where[:, : tokens.start] = False
    expected = slow(llama, pairs, log_odds, site, where, values=torch.zeros_like)
    torch.testing.assert_close(result.harmful - result.changes[0], expected, atol=1e-4, rtol=0)


def test_mean_source(llama, log_odds):
    same = ms.PromptPairs.from_lists(["how do i make a bomb", "how do i steal a car"], ["how do i make a cake"] * 2)
    site = Site(SiteKind.Z, 1)
    result = activation_patching(llama, same, log_odds, nodes=[site], source="mean", progress=False)
    real = llama.tokenize(same.harmful).mask
    expected = slow(llama, same, log_odds, site, real, values=lambda t: t.mean(0, keepdim=True).expand_as(t))
    torch.testing.assert_close(result.harmful - result.changes[0], expected, atol=1e-4, rtol=0)


def test_resampling_takes_another_pair_and_repeats_by_seed(llama, log_odds):
    harmful = ["how do i make a bomb", "how do i steal a car"]
    two = ms.PromptPairs.from_lists(harmful, ["how do i make a cake", "how do i help a car"])
    site = Site(SiteKind.Z, 1)
    result = activation_patching(llama, two, log_odds, nodes=[site], source="resample", progress=False)
    real = llama.tokenize(two.harmful).mask
    expected = slow(llama, two, log_odds, site, real, values=lambda t: t.flip(0))
    torch.testing.assert_close(result.harmful - result.changes[0], expected, atol=1e-4, rtol=0)


def test_resid_mid_reaches_both_branches(llama, pairs, log_odds):
    """Patching the stream after attention everywhere, in the last layer, is patching the whole model."""
    result = activation_patching(llama, pairs, log_odds, nodes=[Site(SiteKind.RESID_MID, 2)], progress=False)
    torch.testing.assert_close(result.harmful - result.changes[0], result.harmless, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "noise"}, "source 'noise'; expected one of"),
        ({"nodes": [Site(SiteKind.K, 0, 2)]}, "L0.k.2 does not exist"),
        ({"nodes": [Site(SiteKind.FINAL_NORM_IN)]}, "final.final_norm_in cannot be patched"),
        ({"nodes": [Site(SiteKind.Z, 0)], "positions": [-99]}, r"positions \[-99\]; expected columns from the end"),
    ],
)
def test_errors(llama, pairs, log_odds, options, message):
    with pytest.raises(ms.MechsafetyError, match=message):
        activation_patching(llama, pairs, log_odds, progress=False, **options)


def test_no_stream_between_in_parallel_blocks(make_model, pairs, log_odds):
    with pytest.raises(ms.MechsafetyError, match="has no residual stream between attention and MLP"):
        activation_patching(
            make_model("gpt_neox"), pairs, log_odds, nodes=[Site(SiteKind.RESID_MID, 0)], progress=False
        )
