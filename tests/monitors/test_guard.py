"""The guard: what it learns, when it speaks, and what it is compared with."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import mechsafety as ms
from mechsafety.monitors import (
    GuardReport,
    GuardWeights,
    LabelledPrompts,
    SafetyGuard,
    compare_guards,
    label_by_replies,
)
from mechsafety.monitors.features import read_prompts, read_tokens
from mechsafety.monitors.regression import cross_validated, fit_regression

FRAMES = ["make a {}", "please make a {}", "how do i make a {}", "teach me a {}", "write about a {}", "explain a {}"]
FRAMES += ["why is my {} blue", "can i help a {}", "what is a {}", "the {} of my house"]


def labelled(name, bad="bomb", good="cake", frames=FRAMES):
    prompts = [frame.format(bad) for frame in frames] + [frame.format(good) for frame in frames]
    return LabelledPrompts(name, tuple(prompts), (True,) * len(frames) + (False,) * len(frames), tuple(frames) * 2)


@pytest.fixture(scope="module")
def mask():
    return torch.rand(3, 48, generator=torch.Generator().manual_seed(0)) < 0.15


@pytest.fixture(scope="module")
def guard(llama, mask):
    return SafetyGuard.fit(llama, mask, labelled("train"))


def test_activations_are_those_of_the_last_token(llama, mask):
    prompts = labelled("x").prompts
    found = read_prompts(llama, prompts)
    for k in (0, 7, 19):
        cache = llama.cache([prompts[k]], sites=["neurons", "resid"])
        torch.testing.assert_close(found.neurons[k], cache.neurons[:, 0, -1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.resid[k], cache.resid[:, 0, -1], atol=1e-5, rtol=1e-4)
    assert found.chosen(mask).shape == (20, int(mask.sum()))
    tokens = llama.tokenize(prompts[:3])
    torch.testing.assert_close(read_tokens(llama, tokens.ids, tokens.mask).resid, found.resid[:3], atol=1e-5, rtol=1e-4)


def test_probabilities_are_the_regressions(llama, mask, guard):
    train = labelled("train")
    features = read_prompts(llama, train.prompts).chosen(mask).double().numpy()
    expected = fit_regression(features, np.array(train.unsafe)).predict_proba(features)[:, 1]
    verdicts = guard.predict_all(train.prompts)
    assert [v.probability for v in verdicts] == pytest.approx(expected.tolist(), abs=1e-4)
    assert guard.predict(train.prompts[0]).probability == pytest.approx(verdicts[0].probability, abs=1e-5)
    assert [v.unsafe for v in verdicts] == [v.probability >= guard.weights.threshold for v in verdicts]


def test_the_rotation_changes_no_prediction():
    """More features than prompts, and fewer; a fit to the features themselves is the reference."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    for n_features in (5, 90):
        features = rng.normal(size=(60, n_features)) @ rng.normal(size=(n_features, n_features)) + 3.0
        unsafe = features[:, 0] + rng.normal(size=60) > 3.0
        scaler = StandardScaler().fit(features[:40])
        plain = LogisticRegression(C=0.1, max_iter=5000, tol=1e-9).fit(scaler.transform(features[:40]), unsafe[:40])
        expected = plain.predict_proba(scaler.transform(features[40:]))[:, 1]
        found = fit_regression(features[:40], unsafe[:40]).predict_proba(features[40:])[:, 1]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_it_tells_other_frames_apart(llama, guard):
    other = labelled("other", frames=["do i kill a {}", "me and a {} please"])
    verdicts = guard.predict_all(other.prompts)
    assert min(v.probability for v in verdicts[:2]) > max(v.probability for v in verdicts[2:])


def test_the_threshold_catches_what_was_asked(llama, mask):
    train = labelled("train")
    features = read_prompts(llama, train.prompts).chosen(mask).double().numpy()
    unsafe = np.array(train.unsafe)
    held_out = cross_validated(features, train, 0)
    for tpr in (0.5, 0.95, 1.0):
        threshold = SafetyGuard.fit(llama, mask, train, target_tpr=tpr).weights.threshold
        assert (held_out[unsafe] >= threshold).mean() >= tpr
        assert (held_out[unsafe] > threshold).mean() < tpr, "the highest such threshold"


def test_no_group_is_on_both_sides(llama, mask, monkeypatch):
    from mechsafety.monitors import regression as module

    train, seen = labelled("train"), []
    plain = module.fit_regression
    monkeypatch.setattr(module, "fit_regression", lambda x, y: seen.append(x[:, 0].astype(int)) or plain(x, y))
    numbers = np.arange(20.0)[:, None] @ np.ones((1, 3))
    cross_validated(numbers, train, 0)
    assert len(seen) == 5
    for fitted in seen:
        groups = [train.groups[k] for k in fitted]
        assert all(groups.count(group) == 2 for group in groups)


def test_wrapped_generate_gives_the_verdict_first(llama, guard):
    order = []

    def generate(prompts, max_new_tokens=4):
        order.append(prompts)
        return llama.generate(prompts, max_new_tokens)

    prompts = ["make a bomb", "make a cake"]
    guard = guard.with_threshold(0.5)
    out = guard.wrap(generate, on_verdicts=order.append)(prompts, max_new_tokens=3)
    assert order == [out.verdicts, prompts], "the caller knows before the first token"
    order.pop()
    assert out.output == llama.generate(prompts, 3) and list(out.verdicts) == guard.predict_all(prompts)
    assert out.verdicts[0].unsafe and not out.verdicts[1].unsafe and len(order) == 1
    stopped = guard.wrap(generate, stop=True)(prompts)
    assert order.pop() == prompts[1:] and stopped.verdicts == out.verdicts, "nothing was generated for the unsafe one"
    assert stopped.replies == [None, *llama.generate(prompts[1:], 4)] and stopped.answered == (1,)
    order.clear()
    none = guard.wrap(generate, stop=True)(prompts=prompts[:1])
    assert none.output is None and none.replies == [None] and order == []


def test_some_rows_of_tokens_are_stopped(llama, guard):
    prompts = ["make a bomb", "explain a cake please", "make a cake"]
    guard, tokens = guard.with_threshold(0.5), llama.tokenize(prompts)
    options = {"attention_mask": tokens.mask.long(), "max_new_tokens": 3, "do_sample": False}
    out = guard.wrap(llama.hf_model.generate, stop=True)(input_ids=tokens.ids, **options)
    assert out.answered == tuple(k for k, verdict in enumerate(out.verdicts) if not verdict.unsafe)
    assert 0 not in out.answered and 2 in out.answered
    whole = llama.hf_model.generate(input_ids=tokens.ids, **options)
    assert out.replies[0] is None and torch.equal(out.replies[2], whole[2])


def test_a_guard_is_changed_by_making_another(guard):
    other = guard.with_threshold(0.25)
    assert other.threshold == 0.25 and guard.threshold == guard.weights.threshold != 0.25
    with pytest.raises(
        ms.MechsafetyError, match=r"^guard\.threshold cannot be assigned; guard\.with_threshold\(\.\.\.\)"
    ):
        guard.threshold = 0.5
    with pytest.raises(ms.MechsafetyError, match=r"^threshold=1\.5; expected a number from 0 to 1$"):
        guard.with_threshold(1.5)


@pytest.mark.unchecked
def test_what_a_guard_does_not_take(llama, guard):
    with pytest.raises(ms.MechsafetyError, match=r"^threshold='high'; expected a number from 0 to 1$"):
        guard.with_threshold("high")
    with pytest.raises(ms.MechsafetyError, match=r"^rate=None; expected a number from 0 to 1$"):
        guard.with_false_positive_rate(None, ["make a cake"])
    with pytest.raises(ms.MechsafetyError, match=r"^a list of 2 texts; expected one prompt; use guard\.predict_all"):
        guard.predict(["make a cake", "make a bomb"])
    with pytest.raises(ms.MechsafetyError, match=r"^generate is of type LensModel; expected a function; pass model\."):
        guard.wrap(llama)


@pytest.mark.parametrize(("rate", "flagged"), [(0.0, 0), (0.25, 1), (0.5, 2), (1.0, 4)])
def test_a_threshold_by_the_rate_of_false_positives(guard, rate, flagged):
    safe = ["make a cake", "explain a cake please", "help me make a cake", "write about tea"]
    found = guard.with_false_positive_rate(rate, safe)
    verdicts = found.predict_all(safe)
    assert len({verdict.probability for verdict in verdicts}) == 4 and sum(v.unsafe for v in verdicts) == flagged
    assert found.weights.weights is guard.weights.weights


def test_a_rate_that_is_none(guard):
    with pytest.raises(ms.MechsafetyError, match=r"^rate=-0\.1; expected a number from 0 to 1$"):
        guard.with_false_positive_rate(-0.1, ["tea"])
    with pytest.raises(ms.MechsafetyError, match=r"^no safe prompts; expected at least one$"):
        guard.with_false_positive_rate(0.1, [])
    with pytest.raises(
        ms.MechsafetyError, match=r"^5 safe prompts for a false-positive rate of 0\.05; expected at least 20; give more"
    ):
        guard.with_false_positive_rate(0.05, ["tea", "a cake", "make tea", "make a cake", "write about tea"])


def test_it_hooks_into_transformers(llama, guard):
    tokens = llama.tokenize(["make a bomb", "explain a cake please"])
    wrapped = guard.wrap(llama.hf_model.generate)
    inputs = {"attention_mask": tokens.mask.long(), "max_new_tokens": 3, "do_sample": False}
    for out in (wrapped(input_ids=tokens.ids, **inputs), wrapped(tokens.ids, **inputs)):
        assert out.output.shape == (2, tokens.ids.shape[1] + 3)
        found = [v.probability for v in guard.predict_all(["make a bomb", "explain a cake please"])]
        assert [v.probability for v in out.verdicts] == pytest.approx(found, abs=1e-4)
    right = tokens.mask.flip(1)
    with pytest.raises(ms.MechsafetyError, match=r"^a row ends with padding; pad on the left: tokenizer.padding_side"):
        wrapped(input_ids=tokens.ids, attention_mask=right)
    with pytest.raises(
        ms.MechsafetyError, match=r"^generate was called with 'x'; expected a list of prompts or input_i"
    ):
        wrapped("x")


def test_saved_for_the_same_model_only(llama, guard, gpt2, tmp_path, make_model):
    again = SafetyGuard.load(guard.save(tmp_path / "guard"), llama)
    expected = guard.predict("make a bomb").probability
    assert again.predict("make a bomb").probability == pytest.approx(expected, abs=1e-5)
    assert torch.equal(again.weights.weights, guard.weights.weights)
    assert repr(again).startswith("SafetyGuard(")
    with pytest.raises(ms.MechsafetyError, match=r"differ; fit one: SafetyGuard.fit\(model, neurons, train\)$"):
        SafetyGuard.load(tmp_path / "guard", make_model("llama", seed=4))
    with pytest.raises(ms.MechsafetyError, match=r"^a guard for \(3, 48\) neurons; expected one that was fitted on"):
        SafetyGuard(gpt2, guard.weights)
    frame = GuardWeights.load(tmp_path / "guard").to_dataframe()
    assert frame.weight.abs().is_monotonic_decreasing and guard.weights.plot().data


def test_bad_input(llama, mask):
    with pytest.raises(
        ms.MechsafetyError, match=r"^x: 2 prompts, 1 labels, 0 groups; expected one label per prompt, and"
    ):
        LabelledPrompts("x", ("a", "b"), (True,))
    with pytest.raises(ms.MechsafetyError, match=r"^x: all prompts have one label; expected both labels$"):
        LabelledPrompts("x", ("a", "b"), (True, True))
    with pytest.raises(ms.MechsafetyError, match=r"^no neuron to read; expected at least one$"):
        SafetyGuard.fit(llama, torch.zeros(3, 48, dtype=torch.bool), labelled("x"))
    with pytest.raises(ms.MechsafetyError, match=r"^target_tpr=2.0; expected above 0 and at most 1$"):
        SafetyGuard.fit(llama, mask, labelled("x"), target_tpr=2.0)
    with pytest.raises(
        ms.MechsafetyError, match=r"^x: 4 groups with safe and 4 with unsafe prompts; expected at least 5"
    ):
        SafetyGuard.fit(llama, mask, labelled("x", frames=FRAMES[:4]))


def test_a_regression_that_does_not_converge(monkeypatch):
    from mechsafety.monitors import regression as module

    monkeypatch.setattr(module, "MAX_STEPS", 1)
    features = np.random.default_rng(0).normal(size=(20, 5))
    with pytest.raises(ms.MechsafetyError, match=r"^the guard's regression did not converge in 1 steps$"):
        fit_regression(features, np.array([True, False] * 10))


def test_nothing_is_left_after_an_exception(llama, guard):
    def fail(prompts):
        raise KeyboardInterrupt

    before = llama.logits(["make a bomb"])
    with pytest.raises(KeyboardInterrupt):
        guard.wrap(fail)(["make a cake"])
    assert all(not point.fwd_hooks for point in llama.bridge.hook_dict.values())
    assert torch.equal(llama.logits(["make a bomb"]), before)


def test_labels_are_what_the_model_does(planted):
    model, pairs = planted
    found = label_by_replies(model, pairs.harmless[3:], pairs.harmless[:3], "mixed")
    assert found.unsafe == (True,) * 5 + (False,) * 3, "this model refuses bombs, so cakes called harmful are answered"
    with pytest.raises(ms.MechsafetyError, match=r"^refused: all prompts have one label"):
        label_by_replies(model, pairs.harmful, pairs.harmless, "refused", judge=lambda asked, replies: ["refuses"] * 8)
    with pytest.raises(ms.MechsafetyError, match=r"^x: 2 prompts, 1 kinds of reply; expected one kind per"):
        LabelledPrompts("x", ("a", "b"), (True, False), (), ("answers",))


def test_babble_is_not_unsafe(planted):
    model, pairs = planted
    kinds = ["answers", "degenerate", "neither", "refuses", "answers"]
    found = label_by_replies(model, pairs.harmful[:5], pairs.harmless[:3], "x", judge=lambda asked, said: kinds)
    assert found.unsafe == (True, False, False, False, True, False, False, False)
    assert found.kinds == (*kinds, "", "", "")
    rest = found.unseen_by(LabelledPrompts("train", (pairs.harmful[0], "other"), (True, False)))
    assert rest.kinds == (*kinds[1:], "", "", "") and rest.prompts[0] == pairs.harmful[1]


# --- comparison -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(llama, mask):
    tests = [labelled("same words", frames=["do i kill a {}", "me and a {} please", "yes a {}"])]
    tests.append(labelled("other words", bad="poison", good="tea"))
    return compare_guards(llama, mask, labelled("train"), tests, n_random=4, progress=False)


def test_every_baseline_is_there(report):
    frame = report.to_dataframe()
    assert frame.feature.tolist() == ["neurons", "random", "resid", "direction", "tfidf"] * 2
    assert frame[["auroc", "fpr_at_95_tpr", "brier", "calibration_error"]].notna().all().all()
    assert report.random["same words"].shape == (4, 6)
    assert frame.neurons_margin.isna().tolist() == [True, False, False, False, False] * 2


def test_the_neurons_row_is_the_guards(llama, mask, guard, report):
    other = labelled("other words", bad="poison", good="tea")
    found = [v.probability for v in guard.predict_all(other.prompts)]
    assert report.predictions("other words", "neurons")[0].tolist() == pytest.approx(found, abs=1e-4)


def test_words_that_training_never_saw_give_chance(report):
    assert report.auroc("other words", "tfidf").tolist() == [0.5], "the two prompts of a frame share all known words"


def with_predictions(report, unsafe, neurons, random):
    rows = torch.tensor([neurons, neurons, neurons, neurons])
    sets = torch.tensor(random)
    return replace(report, labels={"t": torch.tensor(unsafe)}, probabilities={"t": rows}, random={"t": sets})


def test_figures_by_hand(report):
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    unsafe = rng.random(60) < 0.4
    ours = np.round(0.3 * unsafe + rng.random(60) * 0.7, 2)
    theirs = rng.random((3, 60)).astype(np.float32)
    made = with_predictions(report, unsafe.tolist(), ours.tolist(), theirs.tolist())
    assert made.auroc("t", "neurons")[0] == pytest.approx(roc_auc_score(unsafe, ours))
    assert made.auroc("t", "random") == pytest.approx([roc_auc_score(unsafe, row) for row in theirs])
    cut = np.sort(ours[unsafe])[::-1][int(np.ceil(0.95 * unsafe.sum())) - 1]
    assert made.fpr_at_tpr("t", "neurons") == pytest.approx(
        (ours[~unsafe].astype(np.float32) >= np.float32(cut)).mean()
    )
    assert made.accuracy("t", "neurons") == pytest.approx(((ours >= 0.5) == unsafe).mean())
    assert made.brier("t", "neurons") == pytest.approx(((ours - unsafe) ** 2).mean(), abs=1e-6)
    table = made.calibration("t", "neurons", bins=2)
    low = ours < 0.5
    assert table.n.tolist() == [int(low.sum()), int((~low).sum())]
    assert table.observed.tolist() == pytest.approx([unsafe[low].mean(), unsafe[~low].mean()])
    expected = sum(abs(ours[s].mean() - unsafe[s].mean()) * s.sum() for s in (low, ~low)) / 60
    assert made.calibration_error("t", "neurons", bins=2) == pytest.approx(expected, abs=1e-6)
    alone = [with_predictions(report, unsafe.tolist(), row.tolist(), theirs.tolist()) for row in theirs]
    each = [one.calibration_error("t", "neurons") for one in alone]
    assert made.calibration_error("t", "random") == pytest.approx(np.mean(each)), "the sets are not pooled"


def test_intervals_over_prompts(report):
    """They hold the value, shrink with more prompts and are points where the guard is never wrong."""
    rng = np.random.default_rng(0)
    widths = []
    for n in (40, 360):
        unsafe = np.arange(n) < n // 2
        ours = np.clip(0.25 * unsafe + 0.7 * rng.random(n), 0, 1)
        made = with_predictions(report, unsafe.tolist(), ours.tolist(), rng.random((3, n)).astype(np.float32).tolist())
        found = made.intervals("t", "neurons", n=200)
        values = made.auroc("t", "neurons")[0], made.accuracy("t", "neurons"), made.fpr_at_tpr("t", "neurons")
        for value, (low, high) in zip(values, found.values(), strict=True):
            assert low < value < high
        widths.append(found["auroc"][1] - found["auroc"][0])
    assert widths[1] < widths[0] / 2
    row = made.to_dataframe().iloc[1]
    assert row.auroc_low < row.set_min < row.set_max < row.auroc_high, "over prompts too, not over the sets alone"
    sure = with_predictions(report, unsafe.tolist(), unsafe.astype(float).tolist(), made.random["t"].tolist())
    assert list(sure.intervals("t", "neurons", n=20).values()) == [(1.0, 1.0), (1.0, 1.0), (0.0, 0.0)]


def test_prompts_that_were_trained_on_are_not_tested_on(llama, mask, caplog):
    fresh = labelled("a", "poison", "tea")
    both = LabelledPrompts(
        "a", (*fresh.prompts, *labelled("x").prompts[::3]), (*fresh.unsafe, *labelled("x").unsafe[::3])
    )
    found = [
        compare_guards(llama, mask, labelled("train"), [test], n_random=2, progress=False) for test in (fresh, both)
    ]
    assert torch.equal(found[0].probabilities["a"], found[1].probabilities["a"]) and len(found[1].labels["a"]) == 20
    assert "a: 7 of 27 prompts left out, learned from before" in caplog.text


def test_a_crowded_layer_shares_as_few_neurons_as_it_must(llama):
    mask = torch.zeros(3, 48, dtype=torch.bool)
    mask[0, :36] = True
    found = compare_guards(llama, mask, labelled("train"), [labelled("a", "poison", "tea")], n_random=2, progress=False)
    assert found.random_overlap == pytest.approx(24 / 36) and not found.random["a"].isnan().any()
    alone = compare_guards(llama, mask, labelled("train"), labelled("a", "poison", "tea"), n_random=2, progress=False)
    assert alone.to_dataframe().equals(found.to_dataframe())  # one test set needs no list


def test_margins_null_and_not(report):
    rng = np.random.default_rng(1)
    unsafe = np.arange(80) < 40
    noise = rng.random((5, 80)).astype(np.float32)
    null = with_predictions(report, unsafe.tolist(), rng.random(80).tolist(), noise.tolist())
    value, low, high, is_null = null.margin("t")
    assert low <= value <= high and is_null and bool(null.to_dataframe().margin_is_null[1])
    clear = with_predictions(report, unsafe.tolist(), (unsafe * 0.5 + 0.4 * rng.random(80)).tolist(), noise.tolist())
    value, low, high, is_null = clear.margin("t")
    assert low > 0.2 and not is_null and value == pytest.approx(1 - clear.auroc("t", "random").mean())


def test_report_saves_and_plots(report, tmp_path):
    again = GuardReport.load(report.save(tmp_path / "report"))
    assert again.to_dataframe().equals(report.to_dataframe())
    assert repr(again).startswith("GuardReport(AUROC of neurons: same words ") and len(again.plot().data) == 5
    with pytest.raises(ms.MechsafetyError, match=r"^'words' on 'same words'; expected one of"):
        report.auroc("same words", "words")


def test_comparisons_that_cannot_be_made(llama, mask):
    train = labelled("train")
    with pytest.raises(
        ms.MechsafetyError, match=r"^test sets \[\]; expected at least one, each with a name of its own$"
    ):
        compare_guards(llama, mask, train, [])
    with pytest.raises(ms.MechsafetyError, match=r"^test sets \['a', 'a'\]; expected"):
        compare_guards(llama, mask, train, [labelled("a"), labelled("a")])
    with pytest.raises(ms.MechsafetyError, match=r"^n_random=0; expected at least 1$"):
        compare_guards(llama, mask, train, [labelled("a", "poison", "tea")], n_random=0)
    with pytest.raises(ms.MechsafetyError, match=r"^all neurons are chosen; expected room for random sets$"):
        compare_guards(llama, torch.ones(3, 48, dtype=torch.bool), train, [labelled("a", "poison", "tea")])


def test_a_guard_without_monitors_gives_no_watch(guard):
    with pytest.raises(ms.MechsafetyError, match=r"^a guard without monitors watches no reply; guard.with_monitor"):
        guard.watch()
