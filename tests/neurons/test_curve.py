"""C(k): its ends, its controls, its intervals; and the alignment tax."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import mechsafety as ms
from mechsafety.intervals import mean_interval, ratio_interval
from mechsafety.neurons import (
    AlignmentTax,
    CausalCurve,
    ReplyLikelihood,
    alignment_tax,
    causal_effect_curve,
    compare_neurons,
    dynamic_patching,
    measure,
    random_masks,
    safety_neurons,
)
from mechsafety.neurons.agreement import _size_groups, _within
from mechsafety.replies import reply_loss

SHARES = (0.05, 0.3, 1.0)


@pytest.fixture(scope="module")
def ranking(pair, prompts):
    return safety_neurons(pair[1], pair[0], prompts, max_new_tokens=4)


@pytest.fixture(scope="module")
def curve(pair, prompts, ranking, log_odds):
    options = {"shares": SHARES, "n_random": 20, "harmless": prompts[:3], "max_new_tokens": 4, "progress": False}
    return causal_effect_curve(*pair, ranking, prompts, log_odds, **options)


def test_by_hand(pair, prompts, ranking, log_odds, curve):
    base, aligned = (log_odds(model.logits(prompts)) for model in pair)
    masks = [ranking.top(share) for share in SHARES]
    patched = measure(*pair, masks, prompts, log_odds).scores
    expected = (patched.mean(1) - base.mean()) / (aligned.mean() - base.mean())
    assert curve.effects == pytest.approx(expected.tolist(), abs=1e-3)
    assert curve.effects[-1] == pytest.approx(1.0, abs=1e-3), "the ceiling of a pair that differs in MLPs alone"
    assert curve.counts == (7, 43, 144) and curve.shares == SHARES
    drawn = measure(*pair, random_masks(masks[1], 20, 1)[:2], prompts, log_odds).scores
    torch.testing.assert_close(curve.random[1, :2], drawn, atol=1e-4, rtol=1e-4)


def test_random_sets_where_there_is_room(curve):
    frame = curve.to_dataframe()
    assert curve.random.shape == (3, 20, 5)
    assert frame.random_mean.notna().tolist() == [True, True, False], "nothing is left beside all neurons"
    assert frame.random_overlap[0] == 0 and frame.random_overlap[2] == 1
    beaten = [(curve.random_effects[k] < curve.effects[k]).sum().item() for k in (0, 1)]
    assert np.isnan(frame.p_value[2]) and frame.p_value[:2].tolist() == pytest.approx([(21 - n) / 21 for n in beaten])
    low, high = np.percentile(curve.random_effects[0].numpy(), [2.5, 97.5])
    assert (frame.random_low[0], frame.random_high[0]) == pytest.approx((low, high), rel=1e-4)


def test_intervals_hold_the_effect(curve):
    for (low, high), effect in zip(curve.intervals(), curve.effects, strict=True):
        assert low <= effect + 1e-3 and effect - 1e-3 <= high
    assert curve.intervals() == curve.intervals()


def hand_made(curve, base, aligned, patched):
    values = {"base_scores": base, "aligned_scores": aligned, "patched": patched, "random": [[base]] * len(patched)}
    return replace(curve, **{name: torch.tensor(value) for name, value in values.items()})


def test_p_by_hand(curve):
    """Of four random sets one does as much as the top, one more."""
    made = hand_made(curve, [0.0, 0.0], [1.0, 3.0], [[0.5, 0.5], [0.5, 0.5], [1.0, 3.0]])
    sets = torch.tensor([[0.0, 0.0], [0.5, 0.5], [0.9, 0.9], [0.1, 0.0]])
    made = replace(made, random=torch.stack([sets, sets - 1, sets * torch.nan]))
    assert made.to_dataframe().p_value[:2].tolist() == pytest.approx([3 / 5, 1 / 5])


def test_smallest_share_and_exact_ends(curve):
    made = hand_made(curve, [0.0, 1.0], [2.0, 5.0], [[0.0, 1.0], [1.8, 4.7], [2.0, 5.0]])
    assert made.effects == pytest.approx([0.0, 5.5 / 6, 1.0])
    assert made.smallest(0.9) == 0.3 and made.smallest(0.95) == 1.0 and made.smallest(1.1) is None
    assert made.intervals()[0] == (0.0, 0.0) and made.intervals()[2] == (1.0, 1.0)
    assert made.intervals()[1] == (-math.inf, math.inf), "two prompts whose gaps are 2 and 4 bound no ratio"
    more = hand_made(curve, [0.0, 1.0] * 4, [2.0, 5.0] * 4, [[0.0, 1.0] * 4, [1.8, 4.7] * 4, [2.0, 5.0] * 4])
    assert more.intervals()[1] == pytest.approx(ratio_interval([1.8, 3.7] * 4, [2.0, 4.0] * 4), abs=1e-6)


def test_general_ability_stands_beside(curve):
    frame = curve.to_dataframe()
    assert curve.harmless.kl.shape == (5, 3)
    assert frame.kl[2] == pytest.approx(float(curve.harmless.kl[3].mean()), abs=1e-4), "all neurons: the aligned model"
    assert (frame.agreement <= 1).all() and (frame.perplexity >= 1).all()
    whole = curve.harmless.to_dataframe()
    assert len(whole) == 5 and whole.kl[4] == pytest.approx(0, abs=1e-6), "last is the base against itself"
    for name in ("kl", "perplexity", "agreement"):
        assert (frame[f"{name}_low"] <= frame[name]).all() and (frame[name] <= frame[f"{name}_high"]).all()
    nll = curve.harmless.nll[0].double()
    assert frame.perplexity[0] == pytest.approx(float(nll.mean().exp()))
    low, high = mean_interval(nll.numpy())
    assert (frame.perplexity_low[0], frame.perplexity_high[0]) == pytest.approx((math.exp(low), math.exp(high)))


def test_curve_saves_and_plots(curve, tmp_path):
    again = CausalCurve.load(curve.save(tmp_path / "curve"))
    assert again.effects == curve.effects and torch.equal(again.harmless.nll, curve.harmless.nll)
    assert repr(again).startswith("CausalCurve(refusal_log_odds, 5 prompts; 5.0%: ")
    assert [trace.name for trace in curve.plot().data] == ["random neurons of the same layers (95 %)", "top neurons"]
    axis = curve.plot().layout.xaxis
    assert axis.type == "log" and list(axis.tickvals) == [100 * share for share in curve.shares]


def test_a_score_without_difference(pair, prompts, ranking):
    def constant(asked, replies):
        return ["refuses"] * len(asked)

    with pytest.raises(ms.MechsafetyError, match=r"have the same mean constant; expected a score in which alignment"):
        causal_effect_curve(*pair, ranking, prompts, constant, shares=(1.0,), max_new_tokens=1)


def test_what_a_curve_cannot_be_drawn_from(pair, prompts, ranking, log_odds):
    wrong = [
        ({"ranking": ranking.scores.T}, r"^a ranking of shape \(48, 3\); expected \(3, 48\), as LensModel\("),
        ({"shares": []}, r"^no shares; expected at least one, above 0 and at most 1$"),
        ({"n_random": 0}, r"^n_random=0; expected at least 1$"),
    ]
    for given, message in wrong:
        options = {"ranking": ranking, "prompts": prompts, "score": log_odds, **given}
        with pytest.raises(ms.MechsafetyError, match=message):
            causal_effect_curve(*pair, **options)


# --- agreement and tax ------------------------------------------------------------------------------------------------


def with_scores(ranking, values):
    return replace(ranking, scores=values)


def test_agreement_with_itself_and_with_chance(ranking):
    same = compare_neurons(ranking, ranking, share=0.1, n_permutations=99)
    assert same.observed == pytest.approx({"overlap": 1.0, "spearman_top": 1.0, "spearman_all": 1.0})
    assert [same.p_value(name, null) for name in same.observed for null in ("free", "layered", "sized")] == [0.01] * 9
    noise = with_scores(ranking, torch.rand(3, 48, generator=torch.Generator().manual_seed(11)))
    other = with_scores(ranking, torch.rand(3, 48, generator=torch.Generator().manual_seed(12)))
    chance = compare_neurons(noise, other, share=0.1, n_permutations=199)
    frame = chance.to_dataframe().set_index("measure")
    assert ((frame.free_low <= frame.observed) & (frame.observed <= frame.free_high)).all()
    assert frame.free_mean["overlap"] == pytest.approx(0.1, abs=0.02)
    assert frame.free_mean["spearman_top"] < -0.3, "the union of two tops is anticorrelated by its choice"


def test_layers_alone_do_not_count_as_agreement(ranking):
    """Two rankings that share nothing but the layers: the free null calls it agreement, the layered one does not."""
    level = torch.tensor([[0.0], [1.0], [2.0]])
    one, two = (
        with_scores(ranking, level + torch.rand(3, 48, generator=torch.Generator().manual_seed(k))) for k in (3, 5)
    )
    found = compare_neurons(one, two, share=0.2, n_permutations=199)
    assert found.p_value("spearman_all", "free") == 1 / 200
    assert found.p_value("spearman_all", "layered") > 0.05
    with pytest.raises(ms.MechsafetyError, match=r"^'overlap' against 'none'; expected one of"):
        found.p_value("overlap", "none")
    assert len(found.plot().data) == 2 and repr(found).startswith("NeuronAgreement(top 20.0%: overlap ")


def test_size_alone_does_not_count_as_agreement(ranking):
    """Two changes that share nothing but the neurons' size, which no null but that within sizes leaves out."""
    size = torch.rand(3, 48, generator=torch.Generator().manual_seed(2)) ** 4 * 100

    def changed(seed):
        change = size * (0.5 + torch.rand(3, 48, generator=torch.Generator().manual_seed(seed)))
        return replace(ranking, scores=change, base_rms=size)

    found = compare_neurons(changed(3), changed(4), share=0.2, bins=16, n_permutations=199)
    assert found.p_value("overlap", "layered") == 1 / 200
    assert found.p_value("overlap") == found.p_value("overlap", "sized") > 0.05
    frame = found.to_dataframe().set_index("measure")
    assert frame.sized_low["overlap"] <= frame.observed["overlap"] <= frame.sized_high["overlap"]
    # beyond size: the same neurons of each size are changed most
    same = compare_neurons(changed(3), changed(3), share=0.2, bins=16, n_permutations=199)
    assert same.p_value("overlap") == 1 / 200
    for bins in (0, 25):
        with pytest.raises(ms.MechsafetyError, match=rf"^bins={bins}; expected 1 to 24, half of a layer's neurons$"):
            compare_neurons(ranking, ranking, bins=bins)


def test_orders_within_sizes(ranking):
    """Every neuron stays in its layer and among as many of like size; one group is the whole layer."""
    rng = np.random.default_rng(0)
    for bins in (1, 6):
        groups = _size_groups(ranking, ranking, bins)
        assert np.unique(groups, return_counts=True)[1].tolist() == [48 // bins] * (3 * bins)
        order = _within(rng, groups)
        assert (groups[order] == groups).all() and sorted(order) == list(range(144)) and (order != range(144)).any()
    sizes = ranking.base_rms.numpy().ravel()
    assert all(sizes[groups == k].max() <= sizes[groups == k + 1].min() for k in range(5)), "of the first layer"


def test_rankings_that_do_not_fit(ranking):

    with pytest.raises(ms.MechsafetyError, match=r"expected scores of the same kind for models of the same shape$"):
        compare_neurons(ranking, replace(ranking, score="ratio"))


@pytest.fixture(scope="module")
def helpful(make_pair):
    return make_pair("llama", low=0.2, high=2.0)[1]


def test_tax(pair, helpful, prompts, ranking, log_odds, tmp_path):
    base, safe = pair
    other = safety_neurons(helpful, base, prompts, max_new_tokens=4)
    said = ReplyLikelihood(("sure here", "yes", "no"))
    options = {"share": 0.3, "n_random": 3, "n_permutations": 20, "progress": False}
    found = alignment_tax(base, safe, helpful, (ranking, other), prompts, prompts[:3], log_odds, said, **options)
    common = ranking.top(0.3) & other.top(0.3)
    assert torch.equal(found.common, common) and 0 < int(common.sum()) < 43
    for k, model in enumerate((base, safe, helpful)):
        torch.testing.assert_close(found.safety[k], log_odds(model.logits(prompts)), atol=1e-4, rtol=1e-4)
    swapped = measure(safe, helpful, [common], prompts, log_odds).scores[0]
    torch.testing.assert_close(found.safety[3], swapped, atol=1e-4, rtol=1e-4)
    back = measure(helpful, safe, [common], prompts[:3], said).scores[0]
    torch.testing.assert_close(found.helpfulness[4], back, atol=1e-4, rtol=1e-4)
    assert found.random_safety.shape == (2, 3, 5) and not found.random_safety.isnan().any()
    frame = found.to_dataframe()
    assert frame.model.tolist() == ["base", "safe", "helpful", "safe <- helpful", "helpful <- safe"]
    assert frame.safety_random_low.notna().tolist() == [False, False, False, True, True]
    moved, own = (found.random_safety[0].mean(-1), found.safety[3].mean()), found.safety[1].mean()
    far = int(((moved[0] - own).abs() >= (moved[1] - own).abs()).sum())
    assert frame.safety_p[3] == pytest.approx((1 + far) / 4) and frame.safety_p[:3].isna().all()
    assert found.random_overlap == 0
    again = AlignmentTax.load(found.save(tmp_path / "tax"))
    assert again.agreement.observed == found.agreement.observed and torch.equal(again.helpfulness, found.helpfulness)
    assert found.plot().data and repr(found).startswith(f"AlignmentTax({int(common.sum())} common neurons")
    assert found.safety_kinds == found.helpfulness_kinds == () and "safety_degenerate" not in frame


def test_a_judged_curve_and_tax_say_what_the_replies_are(pair, helpful, prompts, ranking, tmp_path):
    """Each share's replies are patched replies; the limit is one for all."""
    base, aligned = pair

    said = {model: model.generate(prompts, 4) for model in pair}

    def as_aligned(asked, replies):
        known = dict(zip(prompts, said[aligned], strict=True))
        return ["refuses" if known[p] == reply else "answers" for p, reply in zip(asked, replies, strict=True)]

    limit = float(torch.cat([reply_loss(model, prompts, said[model]) for model in pair]).median())
    options = {"max_new_tokens": 4, "limit": limit, "progress": False}
    curve = causal_effect_curve(base, aligned, ranking, prompts, as_aligned, shares=(0.3, 1.0), n_random=2, **options)
    patched = dynamic_patching(base, aligned, ranking.top(0.3), prompts, judge=as_aligned, **options)
    assert [len(one.kinds) for one in curve.kinds] == [5] * 4, "two shares, then the aligned and the base model"
    assert curve.kinds[0].kinds == patched.judged.kinds
    torch.testing.assert_close(curve.kinds[0].loss, patched.judged.loss)
    assert curve.kinds[1].kinds == curve.kinds[2].kinds and "degenerate" in curve.kinds[3].kinds + curve.kinds[2].kinds
    assert curve.aligned_scores.tolist() == [float(kind == "refuses") for kind in as_aligned(prompts, said[aligned])]
    frame = curve.to_dataframe()
    assert frame.degenerate.tolist() == [one.share("degenerate") for one in curve.kinds[:2]]
    assert (frame.degenerate_low[0], frame.degenerate_high[0]) == curve.kinds[0].interval("degenerate")
    assert frame.reply_perplexity[1] == curve.kinds[1].perplexity and "of replies degenerate)" in repr(curve)
    assert CausalCurve.load(curve.save(tmp_path / "judged")).to_dataframe().equals(frame)
    other = safety_neurons(helpful, base, prompts, max_new_tokens=4)
    options |= {"share": 0.3, "n_random": 1, "n_permutations": 20}
    sure = ReplyLikelihood(("sure here", "yes", "no"))
    tax = alignment_tax(base, aligned, helpful, (ranking, other), prompts, prompts[:3], as_aligned, sure, **options)
    assert len(tax.safety_kinds) == 5 and tax.helpfulness_kinds == ()
    assert tax.to_dataframe().safety_degenerate.tolist() == [one.share("degenerate") for one in tax.safety_kinds]
    assert AlignmentTax.load(tax.save(tmp_path / "tax")).safety_kinds[3].kinds == tax.safety_kinds[3].kinds


def test_tax_of_tops_that_fill_a_layer(pair, helpful, prompts, ranking, log_odds):
    """Random sets share what they must, and say how much; they are not left blank."""
    scores = torch.zeros(3, 48)
    scores[0, :40] = 1 + torch.arange(40.0)
    full = with_scores(ranking, scores)
    found = alignment_tax(
        *pair,
        helpful,
        (full, full),
        prompts,
        prompts,
        log_odds,
        log_odds,
        share=40 / 144,
        n_random=2,
        n_permutations=2,
        progress=False,
    )
    assert int(found.common.sum()) == 40 and found.random_overlap == pytest.approx(32 / 40)
    assert not found.random_safety.isnan().any()


def test_a_tax_that_cannot_be_measured(pair, helpful, prompts, ranking, log_odds):
    from dataclasses import replace

    names = ("scores", "change", "base_rms", "mean_change")
    turned = replace(ranking, halves=ranking.halves.mT, **{name: getattr(ranking, name).T for name in names})
    for rankings, n_random, message in (
        ((turned, turned), 2, r"^a ranking of shape \(48, 3\); expected \(3, 48\)"),
        ((ranking, ranking), 0, r"^n_random=0; expected at least 1$"),
    ):
        with pytest.raises(ms.MechsafetyError, match=message):
            alignment_tax(*pair, helpful, rankings, prompts, prompts, log_odds, log_odds, n_random=n_random)


def test_tops_without_a_common_neuron(pair, helpful, prompts, ranking, log_odds):
    opposite = with_scores(ranking, -ranking.scores)
    message = r"^the top 5.0% of the two rankings have no neuron in common; take a larger share$"
    with pytest.raises(ms.MechsafetyError, match=message):
        alignment_tax(
            *pair, helpful, (ranking, opposite), prompts, prompts, log_odds, log_odds, n_permutations=2, progress=False
        )
