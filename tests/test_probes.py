"""Probes on a model whose refusal is one direction: folds that leak nothing, controls, and what erasing does."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from einops import rearrange, repeat

from mechsafety.errors import MechsafetyError
from mechsafety.interventions import project_out
from mechsafety.probes import ProbeReport, _Folds, _groups, _lexical, _linear, probe_layers, span_means
from mechsafety.prompts import PromptPairs

HARD = ["explain the python process", "kill a python process", "poison tea", "is the bomb blue"]


@pytest.fixture(scope="module")
def report(directed):
    model, pairs, metric = directed
    return probe_layers(
        model,
        pairs,
        metric,
        layers=[0, 2],
        spans=["last", "instruction"],
        hard=HARD,
        erase_on=pairs.harmful[:4],
        harmless_on=pairs.harmless[:3],
        n_shuffled=2,
        outer=3,
        inner=2,
        progress=False,
    )


def test_what_is_there_is_found_and_what_is_not_is_not(report):
    frame = report.to_dataframe().set_index(["layer", "span"])
    assert frame.accuracy[2, "last"] == 1.0 and frame.auroc[2, "last"] == 1.0
    # the last token before block 0 is the same in all prompts
    assert frame.accuracy[0, "last"] == 0.5 and frame.auroc[0, "last"] == 0.5
    assert not report.directions[0, 0].any() and report.erased[0, 0].isnan().all()
    assert (frame.accuracy_low <= frame.accuracy).all()
    assert frame.lexical.iloc[0] == 1.0  # one word tells these prompts apart: text alone does as well


def test_shuffled_probes_are_scored_against_their_own_labels(report):
    """Not against the true ones, which they were never shown: those give an artefact in place of chance."""
    own = report.shuffled_labels
    assert own.shape == (2, len(report.labels)) and not torch.equal(own[0], own[1])
    pairs = rearrange(own, "draw (side pair) -> draw side pair", side=2)
    assert bool((pairs.sum(1) == 1).all()), "swapped within pairs"
    perfect = repeat(2 * own - 1, "draw prompt -> draw 2 2 prompt")
    learned = replace(report, shuffled=perfect)
    assert learned.shuffled_accuracies(2, "last") == [1.0, 1.0]
    frame = learned.to_dataframe()
    assert (frame.shuffled == 1.0).all() and (frame.shuffled_low == 1.0).all()
    half = replace(report, shuffled=torch.stack([perfect[0], -perfect[1]]))
    row = half.to_dataframe().iloc[0]
    assert row.shuffled == 0.5 and row.shuffled_low < 0.5 < row.shuffled_high
    with pytest.raises(MechsafetyError, match=r"^layer 1, 'last'; expected one of \(0, 2\) and of \('last', 'inst"):
        report.shuffled_accuracies(1, "last")


def test_labels_without_meaning_are_read_at_chance(directed):
    """The interval of thirty draws holds one half; the texts alone tell the true labels without a mistake.

    One draw has a standard deviation of .15, since twelve pairs leave few independent labels.
    """
    model, pairs, _ = directed
    plain = PromptPairs.from_lists(pairs.harmful, pairs.harmless)
    found = probe_layers(
        model, plain, layers=[2], spans=["last"], hard=HARD, n_shuffled=30, outer=3, inner=2, progress=False
    )
    row = found.to_dataframe().iloc[0]
    assert row.accuracy == 1.0 and row.shuffled_low <= 0.5 <= row.shuffled_high


def test_erasing_costs_what_it_does_to_harmless_prompts(report, directed):
    model, pairs, _ = directed
    texts = pairs.harmless[:3]
    before = model.logits(texts).log_softmax(-1)
    with project_out(model, report.patterns[1, 0]):
        after = model.logits(texts).log_softmax(-1)
    want = (before.exp() * (before - after)).sum(-1)
    torch.testing.assert_close(report.pattern_erased_kl[1, 0], want, atol=1e-3, rtol=1e-3)
    assert report.erased_kl[0, 0].isnan().all(), "no direction was found there"
    frame = report.to_dataframe().set_index(["layer", "span"])
    assert frame.pattern_erased_kl[2, "last"] == pytest.approx(float(want.mean()), rel=1e-3)
    assert frame.random_erased_kl.iloc[0] == pytest.approx(float(report.random_erased_kl.mean()), rel=1e-5)
    assert report.random_erased_kl.shape == (8, 3)


def test_erasing_is_the_removal_of_the_stored_direction(report, directed):
    model, pairs, metric = directed
    torch.testing.assert_close(report.unedited, metric(model.logits(pairs.harmful[:4])), atol=1e-4, rtol=1e-4)
    for name, rows in (("erased", report.directions), ("pattern_erased", report.patterns)):
        with project_out(model, rows[1, 0]):
            want = metric(model.logits(pairs.harmful[:4]))
        torch.testing.assert_close(getattr(report, name)[1, 0], want, atol=1e-3, rtol=1e-3)


def test_the_pattern_is_the_refusal_direction_and_its_removal_matters(report):
    assert abs(float(report.patterns[1, 0, 0])) > 0.95
    frame = report.to_dataframe().set_index(["layer", "span"])
    assert frame.pattern_erased[2, "last"] < -20 < frame.random_erased[2, "last"]
    assert report.random_erased.shape == (8, 4)
    change = report.random_erased - report.unedited
    row = frame.iloc[0]
    assert row.random_erased == pytest.approx(float(change.mean()), abs=1e-5)
    assert row.random_erased_low <= row.random_erased <= row.random_erased_high
    assert abs(row.random_erased_most) == pytest.approx(float(change.mean(1).abs().max()), abs=1e-5)


def test_erasing_by_default_is_on_prompts_of_all_topics(directed):
    model, pairs, metric = directed
    topical = PromptPairs(tuple(replace(pair, topic=f"t{k // 4}") for k, pair in enumerate(pairs)))
    few = probe_layers(
        model, topical, metric, layers=[2], spans=["last"], hard=HARD, n_random=1, n_shuffled=2, progress=False
    )
    want = metric(model.logits(topical.sample(16, 0).harmful))
    torch.testing.assert_close(few.unedited, want, atol=1e-4, rtol=1e-4)
    assert few.provenance.options["held_out"] is False


def test_no_group_is_on_both_sides():
    """Labels that only the group tells cannot be predicted for a group that was left out."""
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), 5)
    labels = groups % 2
    data = np.eye(12)[groups] + 0.01 * generator.normal(size=(60, 12))
    values = _Folds(groups, 3, 3).out_of_fold(_linear(), data, labels)
    assert float(((values > 0).numpy() == labels).mean()) < 0.7
    leaking = _Folds(np.arange(60), 3, 3).out_of_fold(_linear(), data, labels)
    assert float(((leaking > 0).numpy() == labels).mean()) == 1.0


def test_the_lexical_baseline_knows_words_and_nothing_else():
    texts = [f"make a bomb number {k}" for k in range(8)] + [f"make a cake number {k}" for k in range(8)]
    labels = np.repeat([1, 0], 8)
    folds = _Folds(np.tile(np.arange(8), 2), 4, 2)
    assert bool(((folds.out_of_fold(_lexical(), texts, labels) > 0).numpy() == labels).all())
    fitted = folds.fit(_lexical(), texts, labels)
    assert fitted.decision_function(["a bomb"])[0] > fitted.decision_function(["a cake"])[0]


def test_topics_are_the_groups_where_there_are_enough(directed):
    _, pairs, _ = directed
    assert set(_groups(pairs)) == {"make", "explain", "write"}
    plain = PromptPairs.from_lists(pairs.harmful, pairs.harmless)
    assert list(_groups(plain)) == list(range(12))


def test_span_means_by_hand(llama):
    prompts = ["kill", "how do i bake bread"]
    found = span_means(llama, prompts, [1, 3], ["instruction", "suffix", "last"])
    for row, prompt in enumerate(prompts):
        resid = llama.cache([prompt], ["resid"]).resid[[1, 3], 0]
        start, end = llama.tokenize([prompt]).spans[0].instruction
        want = torch.stack([resid[:, start:end].mean(1), resid[:, end:].mean(1), resid[:, -1]], 1)
        torch.testing.assert_close(found[:, :, row], want, atol=1e-5, rtol=1e-5)


def test_round_trip_and_picture(report, tmp_path):
    again = ProbeReport.load(report.save(tmp_path / "probes"))
    assert torch.equal(again.values, report.values) and again.spans == report.spans
    assert repr(again) == repr(report) and repr(report).startswith("ProbeReport(2 layers x 2 spans, best accuracy 1.00")
    assert {trace.name for trace in report.plot().data} == {"last", "instruction"}


def test_without_a_metric_nothing_is_erased(directed):
    model, pairs, _ = directed
    found = probe_layers(model, pairs, layers=[1], spans=["last"], hard=HARD, n_shuffled=2, progress=False)
    assert found.erased is None and "erased" not in found.to_dataframe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spans": ["middle"]}, "spans ['middle']; expected some of ('instruction', 'suffix', 'last')"),
        ({"layers": [4]}, "layers [4]; expected some of 0 to 3"),
        ({"layers": []}, "layers []; expected some of 0 to 3"),
        ({"n_shuffled": 1}, "n_shuffled=1; expected at least 2 draws, so that there is an interval"),
    ],
)
def test_refusals(directed, options, message):
    model, pairs, metric = directed
    with pytest.raises(MechsafetyError) as caught:
        probe_layers(model, pairs, metric, **options)
    assert str(caught.value) == message
    with pytest.raises(MechsafetyError, match=r"^2 pairs; expected at least 3, so that some can be held out$"):
        probe_layers(model, PromptPairs(pairs.pairs[:2]), metric)
