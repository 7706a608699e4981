"""Monitors: what they read, when they flag, what stands in the generation's way, and how they join a guard."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from circuits_drawn import build
from scipy import stats

import mechsafety as ms
from mechsafety.interventions import Direction
from mechsafety.monitors import (
    ActivationMonitor,
    LabelledPrompts,
    MonitorScores,
    MonitorWeights,
    SafetyGuard,
)
from mechsafety.monitors.activation import _rank as rank
from mechsafety.monitors.activation import _split as split
from mechsafety.monitors.features import read_sites
from mechsafety.monitors.regression import fit_regression
from mechsafety.nodes import Node
from mechsafety.prompts import Tokens
from mechsafety.sites import Site, SiteKind

FRAMES = ["make a {}", "please make a {}", "how do i make a {}", "teach me a {}", "write about a {}", "explain a {}"]
FRAMES += ["why is my {} blue", "can i help a {}", "what is a {}", "the {} of my house", "my {} please", "help a {}"]
NODES = (Node("head", 0, 1), Node("head", 2, 3), Node("head", 2, 0), Node("mlp", 1), Node("neuron", 2, 7))
OPTIONS = {"false_positive_rate": 0.25, "reply_tokens": 4}


@pytest.fixture(scope="module")
def prompts():
    return ms.PromptPairs.from_lists([f.format("bomb") for f in FRAMES], [f.format("cake") for f in FRAMES])


@pytest.fixture(scope="module")
def direction(llama):
    vector = torch.randn(1, llama.d_model, generator=torch.Generator().manual_seed(0))
    return Direction(llama.provenance(), "made", (Site(SiteKind.RESID_PRE, 2),), vector)


@pytest.fixture(scope="module")
def monitor(llama, direction, prompts):
    return ActivationMonitor.fit(llama, direction, prompts, **OPTIONS)


def circuit_of(model, nodes):
    return replace(build(list(nodes), 2, half=1.0), provenance=model.provenance())


def whole_forward(model, prompt, reply, monitor):
    """Score at every column that a token of the reply is chosen from, by one plain forward without a cache."""
    tokens = model.tokenize([prompt])
    ids = torch.cat([tokens.ids, torch.tensor([reply[:-1]], dtype=torch.long, device=tokens.ids.device)], 1)
    found = model.read(Tokens(ids, torch.ones_like(ids).bool(), tokens.spans), list(monitor.weights.sites))
    total = monitor.weights.intercept
    for site, weights in zip(monitor.weights.sites, monitor.weights.weights, strict=True):
        total = total + found[site][0, tokens.ids.shape[1] - 1 :].flatten(1).float() @ weights
    return total.tolist()


# --- what is read -----------------------------------------------------------------------------------------------------


def test_a_directions_score_is_its_projection(llama, direction, prompts, monitor, directed, directed_found):
    found = monitor.score(prompts.harmful)
    torch.testing.assert_close(found.scores, direction.project(llama, prompts.harmful)[0], atol=1e-5, rtol=1e-5)
    model, pairs, _ = directed
    ours = ActivationMonitor.fit(model, directed_found, pairs, **OPTIONS)
    projected = directed_found.project(model, pairs.harmless).cpu()
    torch.testing.assert_close(ours.score(pairs.harmless).scores, projected, atol=1e-4, rtol=1e-4)


def test_several_sites_of_a_direction_count_alike(llama, prompts):
    vectors = torch.randn(3, llama.d_head, generator=torch.Generator().manual_seed(1))
    sites = (Site(SiteKind.Z, 0, 1), Site(SiteKind.Z, 0, 3), Site(SiteKind.Z, 2, 0))
    heads = Direction(llama.provenance(), "heads", sites, vectors)
    monitor = ActivationMonitor.fit(llama, heads, prompts, **OPTIONS)
    assert len(monitor.weights.sites) == 2, "heads of one layer are read together"
    expected = heads.project(llama, prompts.harmful).mean(0)
    torch.testing.assert_close(monitor.score(prompts.harmful).scores, expected, atol=1e-5, rtol=1e-5)


def test_neurons_are_read_by_a_regression_on_prompts_that_do_not_calibrate(llama, prompts):
    mask = torch.rand(3, 48, generator=torch.Generator().manual_seed(0)) < 0.15
    monitor = ActivationMonitor.fit(llama, mask, prompts, **OPTIONS)
    fitted, held = split(LabelledPrompts.of_pairs(prompts), 0.5, 0)
    assert not set(fitted.prompts) & set(held.prompts)
    features = llama.cache(fitted.prompts, ["neurons"]).neurons[:, :, -1]
    features = torch.cat([features[layer][:, mask[layer]] for layer in range(3)], 1).double().numpy()
    regression = fit_regression(features, np.array(fitted.unsafe))
    asked = llama.cache(held.prompts, ["neurons"]).neurons[:, :, -1]
    asked = torch.cat([asked[layer][:, mask[layer]] for layer in range(3)], 1).double().numpy()
    expected = regression.decision_function(asked)
    assert monitor.score(held.prompts).scores.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    unsafe = np.array(held.unsafe)
    assert monitor.weights.harmless.tolist() == pytest.approx(expected[~unsafe].tolist(), abs=1e-4)
    assert monitor.weights.harmful.tolist() == pytest.approx(expected[unsafe].tolist(), abs=1e-4)


def test_a_circuits_nodes_are_projected_on_their_own_difference_of_means(llama, prompts):
    monitor = ActivationMonitor.fit(llama, circuit_of(llama, NODES), prompts, **OPTIONS)
    fitted, held = split(LabelledPrompts.of_pairs(prompts), 0.5, 0)

    def values(texts):
        cache = llama.cache(texts, ["z", "mlp_out", "neurons"])
        heads = [cache.z[node.layer, node.index][:, -1] for node in NODES if node.kind == "head"]
        return [*heads, cache.mlp_out[1][:, -1], cache.neurons[2][:, -1, 7:8]]

    unsafe = torch.tensor(fitted.unsafe)
    units = [own[unsafe].mean(0) - own[~unsafe].mean(0) for own in values(fitted.prompts)]
    units = [gap / gap.norm() if len(gap) > 1 else torch.ones(1) for gap in units]

    def features(texts):
        return torch.stack([own @ unit for own, unit in zip(values(texts), units, strict=True)], 1).double().numpy()

    regression = fit_regression(features(fitted.prompts), unsafe.numpy())
    expected = regression.decision_function(features(held.prompts))
    assert monitor.score(held.prompts).scores.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert monitor.weights.source == "circuit" and len(monitor.weights.sites) == 4


def test_the_most_accurate_probe_of_the_last_token_is_read(llama, prompts):
    spans, prompts = ["instruction", "last"], ms.PromptPairs(prompts.pairs[:6])
    options = {"n_shuffled": 2, "outer": 3, "progress": False}
    report = ms.probe_layers(llama, prompts, layers=[1, 3], spans=spans, **options)
    table = report.to_dataframe()
    layer = int(table[table.span == "last"].iloc[0].layer)
    monitor = ActivationMonitor.fit(llama, report, prompts, **OPTIONS)
    resid = llama.cache(prompts.harmful, ["resid"]).resid[layer][:, -1]
    expected = resid @ report.directions[(1, 3).index(layer), 1]
    torch.testing.assert_close(monitor.score(prompts.harmful).scores, expected, atol=1e-4, rtol=1e-4)
    final = replace(report, values=torch.stack([report.values[0] * 0, report.labels.expand(2, -1) - 0.5]))
    assert ActivationMonitor.fit(llama, final, prompts, **OPTIONS).weights.sites == (Site(SiteKind.FINAL_NORM_IN),)


def test_a_known_circuit_tells_harmful_prompts_and_the_replies_to_them_apart():
    built = ms.testbed.planted()
    model, pairs = ms.load_model((built.model, built.tokenizer)), built.pairs.sample(40)
    parts = [node for node in built.truth.nodes if node.kind in ("head", "mlp")]
    monitor = ActivationMonitor.fit(model, circuit_of(model, parts), pairs, reply_tokens=6)
    held = split(LabelledPrompts.of_pairs(pairs), 0.5, 0)[1]
    for row in monitor.weights.to_dataframe().itertuples():
        assert (row.auroc, row.caught, row.harmless, row.harmful) == (1.0, 1.0, 20, 20)
    said = {prompt: list(monitor.stream(prompt, 6)) for prompt in held.prompts}
    for moment, flags in (("prompt", slice(0, 1)), ("reply", slice(1, None))):
        flagged = [any(token.flagged for token in said[prompt][flags]) for prompt in held.prompts]
        hits = [flag for flag, unsafe in zip(flagged, held.unsafe, strict=True) if unsafe]
        alarms = [flag for flag, unsafe in zip(flagged, held.unsafe, strict=True) if not unsafe]
        # of 20 scores none may be flagged; the largest, which sets the threshold, may be off by rounding in a stream
        assert all(hits) and sum(alarms) <= 1, moment


# --- streaming --------------------------------------------------------------------------------------------------------


def test_every_tokens_score_is_that_of_a_plain_forward(any_model, prompts):
    nodes = NODES if any_model.d_mlp else NODES[:4]
    monitor = ActivationMonitor.fit(any_model, circuit_of(any_model, nodes), prompts, **OPTIONS)
    for prompt in ("teach me a bomb", "tea"):
        said = list(monitor.stream(prompt, 7))
        reply = any_model.reply_ids([prompt], 7, progress=False)[0]
        assert [token.id for token in said] == reply
        assert "".join(token.text for token in said) == any_model.generate([prompt], 7, progress=False)[0]
        expected = whole_forward(any_model, prompt, reply, monitor)
        assert [token.score for token in said] == pytest.approx(expected, abs=2e-4, rel=2e-4)
        assert said[0].score == pytest.approx(float(monitor.score([prompt]).scores), abs=2e-4, rel=2e-4)
        limits = [monitor.weights.threshold("prompt"), *[monitor.weights.threshold("reply")] * 6]
        assert [t.flagged for t in said] == [t.score >= limit for t, limit in zip(said, limits, strict=False)]
        for token in said:
            assert token.flagged == (token.p_value <= monitor.weights.false_positive_rate)
    assert not any_model.edited


def test_no_forward_is_added(llama, monitor, monkeypatch):
    calls, feed = [], type(llama.backend).feed
    monkeypatch.setattr(type(llama.backend), "feed", lambda *a, **k: calls.append(1) or feed(*a, **k))
    llama.reply_ids(["teach me a bomb"], 6, progress=False)
    plain = len(calls)
    list(monitor.stream("teach me a bomb", 6))
    assert len(calls) == 2 * plain


def test_the_model_is_free_between_two_tokens(llama, monitor):
    alone = list(monitor.stream("teach me a bomb", 6))
    stream, other = monitor.stream("teach me a bomb", 6), []
    for token in alone:
        assert next(stream) == token
        assert not llama.edited and llama.lock.acquire(blocking=False)
        llama.lock.release()
        other.append(llama.generate(["make a cake"], 3, progress=False))
    assert next(stream, None) is None
    left = monitor.stream("teach me a bomb", 6)
    next(left)
    del left
    assert not llama.edited and len(set(map(tuple, other))) == 1


def test_a_watch_reads_one_call(llama, monitor):
    watch = monitor.watch()
    llama.generate(["tea", "teach me a bomb"], 2, batch_size=1, watch=watch, progress=False)
    for call in (
        lambda: llama.generate(["tea"], 2, watch=watch, progress=False),
        lambda: llama.stream("tea", 2, watch=watch),
    ):
        with pytest.raises(ms.MechsafetyError, match=r"^this watch has read another call; expected a fresh watch for"):
            call()


@pytest.mark.parametrize("strange", [float("nan"), float("-inf"), float("inf")])
def test_a_score_that_is_no_number_is_flagged(llama, monitor, strange):
    broken = replace(monitor.weights, intercept=strange)
    watch = ActivationMonitor(llama, broken).watch(stop=True)
    assert llama.reply_ids(["tea"], 4, watch=watch, progress=False) == [[]] and watch.reply().flagged == 0
    assert bool(ActivationMonitor(llama, broken).score(["tea"]).flagged[0])


def test_a_sampled_stream_is_the_sampled_reply(llama, monitor):
    said = list(monitor.stream("teach me a bomb", 6, temperature=0.8, seed=5))
    assert [token.id for token in said] == llama.reply_ids(["teach me a bomb"], 6, temperature=0.8, seed=5)[0]


def test_a_character_of_several_tokens_is_said_when_it_is_whole():
    from mechsafety.models.decode import Speech

    raw = " né 🙂 ok ".encode()
    speech = Speech(lambda ids: bytes(ids).decode(errors="replace").strip())
    said = [speech.add(byte).text for byte in raw]
    assert said == ["", "n", "", "é", "", "", "", "", " 🙂", "", " o", "k", ""]
    assert not any("\ufffd" in text for text in said)
    cut = Speech(lambda ids: bytes(ids).decode(errors="replace"))
    assert [cut.add(0xC3).text, cut.add(0xC3, last=True).text] == ["", "\ufffd\ufffd"]


# --- thresholds -------------------------------------------------------------------------------------------------------


def with_scores(weights, harmless, harmful=(1.0,), rate=0.1):
    good, bad = torch.as_tensor(harmless).float(), torch.tensor(harmful)
    sides = {"harmless": good, "harmful": bad, "harmless_replies": good, "harmful_replies": bad}
    return replace(weights, false_positive_rate=rate, **sides)


def test_the_threshold_keeps_the_rate_whatever_the_scores(monitor):
    rng = np.random.default_rng(0)
    for n, rate in ((19, 0.05), (30, 0.1), (7, 0.25)):
        shares = []
        for _ in range(600):
            weights = with_scores(monitor.weights, rng.exponential(size=n), rate=rate)
            shares.append(np.exp(-weights.threshold("prompt")))
        shares = np.array(shares)
        k = rank(n, rate)
        assert k / (n + 1) <= rate + 1e-9
        error = 4 * np.std(shares) / np.sqrt(len(shares))
        assert abs(shares.mean() - k / (n + 1)) < error, "the mean of Beta(k, n + 1 - k)"
        low, high = weights.false_positives("prompt")
        assert 0.92 < np.mean((shares >= low) & (shares <= high)) < 0.98
        assert (low, high) == pytest.approx(stats.beta(k, n + 1 - k).interval(0.95))


def test_p_values_and_thresholds_say_the_same(monitor):
    scores = [0.0, 1.0, 1.0, 2.0, 5.0, 3.0, 4.0, 6.0, 7.0]
    weights = with_scores(monitor.weights, scores, rate=0.3)
    assert weights.p_value([8.0, 7.0, 6.5, 1.0, -1.0], "prompt") == [0.1, 0.2, 0.2, 0.9, 1.0]
    for score in (5.0, 5.5, 4.9, 6.0):
        assert (score >= weights.threshold("prompt")) == (weights.p_value([score], "prompt")[0] <= 0.3)
    assert weights.threshold("prompt") == np.nextafter(5.0, np.inf), "two of nine may be flagged"


def test_a_reply_of_one_token_has_no_later_token(monitor):
    low = -float("inf")
    weights = replace(monitor.weights, harmless_replies=torch.full((12,), low), harmful_replies=torch.full((12,), low))
    table = weights.to_dataframe().set_index("moment")
    assert table.auroc["reply"] == 0.5 and table.caught["reply"] == 0
    assert weights.threshold("reply") > low and weights.plot()


def test_groups_stay_whole_and_the_seed_decides(prompts):
    labelled = LabelledPrompts.of_pairs(prompts)
    sides = {seed: split(labelled, 0.5, seed) for seed in (0, 1)}
    for fitted, held in sides.values():
        assert len(fitted.prompts) == len(held.prompts) == len(FRAMES)
        for side in (fitted, held):
            assert {text.replace("bomb", "cake") for text in side.prompts} <= set(side.prompts) | {None}
    assert sides[0] == split(labelled, 0.5, 0) != sides[1]
    loose = LabelledPrompts("loose", labelled.prompts, labelled.unsafe)
    fitted, held = split(loose, 0.25, 0)
    assert held.unsafe.count(True) == held.unsafe.count(False) == 3, "each label by itself"
    topics = ms.PromptPairs.builtin().sample(24)
    grouped = LabelledPrompts.of_pairs(topics)
    assert set(grouped.groups) == {pair.topic for pair in topics}


def test_another_rate_gives_another_threshold_without_a_run(llama, monitor, monkeypatch):
    monkeypatch.setattr(llama.backend, "feed", None)
    strict = monitor.with_false_positive_rate(0.1)
    assert strict.weights.threshold("prompt") > monitor.weights.threshold("prompt")
    assert monitor.weights.false_positive_rate == 0.25


def test_the_same_seed_gives_the_same_bytes(llama, direction, prompts, monitor):
    assert ActivationMonitor.fit(llama, direction, prompts, **OPTIONS).weights.to_json() == monitor.weights.to_json()


# --- files ------------------------------------------------------------------------------------------------------------


def test_replies_none_of_which_is_flagged_are_said(llama, direction, prompts, monitor):
    """Of a direction and its opposite, one scores the harmless replies higher."""
    reversed_ = replace(direction, vectors=-direction.vectors)
    caught = []
    for source in (direction, reversed_):
        found = ActivationMonitor.fit(llama, source, prompts, **OPTIONS | {"false_positive_rate": 0.08})
        missed = not (found.weights.harmful_replies >= found.weights.threshold("reply")).any()
        assert ("; where replies are short, fit it with a smaller reply_tokens)" in repr(found.weights)) == missed
        caught.append(not missed)
    assert not all(caught)


def test_a_monitor_comes_back_from_its_file(llama, monitor, tmp_path, make_model):
    for place in (tmp_path / "m.json", tmp_path / "folder"):
        monitor.save(place)
        again = ActivationMonitor.load(place, llama)
        assert list(again.stream("tea", 4)) == list(monitor.stream("tea", 4))
        assert repr(again) == repr(monitor)
    with pytest.raises(ms.MechsafetyError, match=r"^this monitor was fitted on .*, the weights of .* differ; fit one"):
        ActivationMonitor.load(tmp_path / "m.json", make_model("llama", 1))
    text = (tmp_path / "m.json").read_text()
    (tmp_path / "bad.json").write_text(text.replace('"false_positive_rate": 0.25', '"false_positive_rate": 0.001'))
    with pytest.raises(ms.MechsafetyError, match=r"held-out harmless prompts for a false-positive rate of 0\.001"):
        MonitorWeights.load(tmp_path / "bad.json")


def test_results_are_tables_and_figures(monitor, prompts, tmp_path):
    found = monitor.score([*prompts.harmful[:2], [{"role": "user", "content": "make a cake"}]])
    frame = found.to_dataframe()
    assert list(frame.columns) == ["prompt", "score", "p_value", "flagged"] and len(frame) == 3
    assert (frame.flagged == (frame.p_value <= 0.25)).all()
    found.save(tmp_path / "scores")
    assert MonitorScores.load(tmp_path / "scores").to_dataframe().equals(frame)
    assert found.plot().data and monitor.weights.plot().data and "prompts flagged)" in repr(found)
    table = monitor.weights.to_dataframe()
    assert list(table.moment) == ["prompt", "reply"] and (table.true_low < table.false_positive_rate).all()


# --- the guard --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guard(llama, prompts):
    mask = torch.rand(3, 48, generator=torch.Generator().manual_seed(0)) < 0.15
    return SafetyGuard.fit(llama, mask, LabelledPrompts.of_pairs(prompts)).with_threshold(1.0)


def flagging(monitor, llama, prompt, at, tokens):
    """The monitor with thresholds between the scores of a reply, so that token ``at`` is the first one flagged."""
    scores = [token.score for token in monitor.stream(prompt, tokens)]
    assert at > 0 and scores[at] > max(scores[1:at], default=-9.9e9), scores
    limit = (scores[at] + max(scores[1:at], default=scores[at] - 1.0)) / 2
    weights = with_scores(monitor.weights, [limit] * 9)
    return ActivationMonitor(llama, replace(weights, harmless=torch.full((9,), 1e6)))


def rising(monitor, prompt, tokens):
    """A later token of a reply whose score is above those of all later tokens before it."""
    scores = [token.score for token in monitor.stream(prompt, tokens)]
    return max(k for k in range(1, len(scores)) if scores[k] == max(scores[1 : k + 1]))


def test_a_flagged_token_stops_the_reply(llama, guard, monitor):
    prompt, others = "teach me a bomb", ["make a cake", "what is a cake"]
    at = rising(monitor, prompt, 8)
    armed = guard.with_monitor(flagging(monitor, llama, prompt, at, 8))
    plain = llama.reply_ids([prompt, *others], 8, progress=False)
    seen = armed.wrap(llama.reply_ids)([prompt, *others], 8, progress=False)
    assert list(seen.output) == plain, "without stop, nothing but the scores is added"
    assert seen.watched[0].flagged == at and len(seen.watched[0].scores) == len(plain[0])
    stopped = armed.wrap(llama.reply_ids, stop=True)([prompt, *others], 8, progress=False)
    assert stopped.output[0] == plain[0][:at]
    for reply, watched, whole in zip(stopped.output, stopped.watched, plain, strict=True):
        assert reply == (whole if watched.flagged is None else whole[: watched.flagged])
    texts = armed.wrap(llama.generate, stop=True)([prompt], 8, 1, progress=False)
    assert texts.replies == llama.decode([plain[0][:at]])
    watch = armed.watch(stop=True)
    assert [token.id for token in llama.stream(prompt, 8, watch=watch)] == plain[0][:at]
    assert watch.reply().flagged == at and not llama.edited


def test_a_flagged_prompt_gets_no_token_and_the_guard_comes_first(llama, guard, monitor):
    every = ActivationMonitor(llama, with_scores(monitor.weights, [-1e6] * 9))
    stopped = guard.with_monitor(every).wrap(llama.reply_ids, stop=True)(["make a cake", "tea"], 4, progress=False)
    assert stopped.output == [[], []] and [one.flagged for one in stopped.watched] == [0, 0]
    closed = guard.with_threshold(0.0).with_monitor(every).wrap(llama.generate, stop=True)(["make a cake"], 4)
    assert closed.output is None and closed.watched == ()


def test_two_monitors_read_their_own_scores(llama, guard, monitor, prompts):
    second = ActivationMonitor.fit(llama, [Node("neuron", 0, 3), "L2.N5"], prompts, **OPTIONS)
    out = guard.with_monitor(monitor).with_monitor(second).wrap(llama.generate)(["make a cake"], 5, progress=False)
    columns = list(zip(*out.watched[0].scores, strict=True))
    for column, one in zip(columns, (monitor, second), strict=True):
        assert column == pytest.approx([token.score for token in one.stream("make a cake", 5)], abs=1e-5)


def test_a_guard_is_saved_with_its_monitors(llama, guard, monitor, tmp_path):
    guard.with_monitor(monitor).save(tmp_path / "guard.json")
    again = SafetyGuard.load(tmp_path / "guard.json", llama)
    assert again.weights.monitors[0].to_json() == monitor.weights.to_json()
    out = again.wrap(llama.generate)(["tea"], 3, progress=False)
    assert len(out.watched) == 1


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"false_positive_rate": 0.0}, "false_positive_rate=0.0; expected a number between 0 and 1"),
        (
            {"false_positive_rate": 0.01},
            "12 held-out harmless prompts for a false-positive rate of 0.01; expected at least 99; "
            "give more prompts, or a larger false_positive_rate",
        ),
        (
            {"source": NODES, "false_positive_rate": 0.05},
            "6 of 12 harmless prompts held out (whole topics, the others are learned from) for a false-positive rate "
            "of 0.05; expected at least 19; give more prompts, or a larger false_positive_rate",
        ),
        ({"held_out": 1.0}, "held_out=1.0; expected a number between 0 and 1"),
        ({"reply_tokens": 1}, "reply_tokens=1; expected at least 2"),
        ({"reply_tokens": 2.5}, "reply_tokens=2.5; expected a whole number"),
        (
            {"prompts": ["make a cake"]},
            "prompts of type list; expected PromptPairs or LabelledPrompts; "
            "pass PromptPairs.from_lists(harmful, harmless)",
        ),
        (
            {"source": 3},
            "a source of type int; expected a RefusalCircuit, neurons, a RefusalDirection or a ProbeReport",
        ),
        (
            {"source": "L0.N1"},
            "a source of type str; expected a RefusalCircuit, neurons, a RefusalDirection or a ProbeReport",
        ),
        ({"source": torch.zeros(3, 48).bool()}, "no neuron to read; expected at least one"),
        ({"model": "demo"}, "model is the string 'demo'; expected a LensModel; pass load_model('demo')"),
    ],
)
def test_bad_input_of_fit_gets_one_line(llama, direction, prompts, changed, said):
    given = {"model": llama, "source": direction, "prompts": prompts} | OPTIONS | changed
    with pytest.raises(ms.MechsafetyError) as caught:
        ActivationMonitor.fit(given.pop("model"), given.pop("source"), given.pop("prompts"), **given)
    assert str(caught.value) == said


def test_sources_of_another_model_are_refused(llama, prompts):
    wide = Direction(llama.provenance(), "wide", (Site(SiteKind.RESID_PRE, 2),), torch.ones(1, 99))
    with pytest.raises(ms.MechsafetyError, match="99"):
        ActivationMonitor.fit(llama, wide, prompts, **OPTIONS)
    with pytest.raises(ms.MechsafetyError, match=r"L9\.MLP"):
        ActivationMonitor.fit(llama, circuit_of(llama, [Node("mlp", 9)]), prompts, **OPTIONS)
    report = ms.probe_layers(llama, prompts, layers=[1], spans=["suffix"], n_shuffled=2, progress=False)
    with pytest.raises(ms.MechsafetyError, match=r"^a report of probes of \['suffix'\]; expected probes of the last"):
        ActivationMonitor.fit(llama, report, prompts, **OPTIONS)


def test_too_few_groups_are_refused(llama, prompts):
    few = ms.PromptPairs.from_lists(prompts.harmful[:1], prompts.harmless[:1])
    with pytest.raises(
        ms.MechsafetyError,
        match=r"^lists: 1 groups of prompts with held_out=0\.5; expected prompts of both labels to learn from and to "
        r"calibrate on; give more prompts$",
    ):
        ActivationMonitor.fit(llama, ["L0.N1"], few)


@pytest.mark.unchecked
def test_bad_input_of_a_monitor_and_a_guard_gets_one_line(llama, gpt2, monitor, guard, direction, prompts):
    def said(call):
        with pytest.raises(ms.MechsafetyError) as caught:
            call()
        return str(caught.value)

    assert said(lambda: monitor.score("tea")) == "a single string was given; expected a list of prompts; write [prompt]"
    assert said(lambda: monitor.score([])) == "no prompts; expected at least one"
    assert said(lambda: monitor.stream("")) == "prompt 1 of 1 is empty; expected text"
    assert said(lambda: monitor.stream("tea", 0)) == "max_new_tokens=0; expected at least 1"
    assert said(lambda: monitor.stream("tea", temperature=-1)) == "temperature=-1; expected a number, at least 0"
    assert said(lambda: llama.stream("tea", 10**6)).startswith("max_new_tokens=1000000 after a prompt of")
    assert "false_positive_rate=2" in said(lambda: monitor.with_false_positive_rate(2))
    assert "cannot be assigned" in said(lambda: setattr(monitor, "weights", None))
    assert said(lambda: ActivationMonitor.load("nowhere", llama)).startswith("no such file: nowhere")
    other = ActivationMonitor.fit(gpt2, ["L0.N1"], prompts, **OPTIONS)
    assert "whose weights differ from the guard's model" in said(lambda: guard.with_monitor(other))
    armed = guard.with_monitor(monitor)
    for foreign in (lambda prompts: prompts, gpt2.generate, llama.logits):
        assert said(lambda call=foreign: armed.wrap(call)).endswith("write guard.wrap(guard.model.generate)")
    sites = (Site(SiteKind.RESID_PRE, 7),)
    assert "expected one that was fitted on" in said(
        lambda: ActivationMonitor(llama, replace(monitor.weights, sites=sites))
    )


def test_prompts_are_read_without_an_opener(llama, monitor):
    view = llama.reading((5, 7))
    found = ActivationMonitor(view, monitor.weights)
    torch.testing.assert_close(found.score(["tea"]).scores, monitor.score(["tea"]).scores)
    assert read_sites(view, ["tea"], monitor.weights.sites)[monitor.weights.sites[0]].shape == (1, llama.d_model)


@pytest.mark.demo
def test_the_demo_models_replies_are_the_same_when_watched(demo):
    pairs = ms.PromptPairs.builtin().sample(4)
    source = [f"L{layer}.N{index}" for layer in (8, 14, 20) for index in range(0, 1536, 16)]
    monitor = ActivationMonitor.fit(demo, source, pairs, false_positive_rate=0.4, reply_tokens=2)
    prompt = pairs.harmful[0]
    said = list(monitor.stream(prompt, 6))
    assert "".join(token.text for token in said) == demo.generate([prompt], 6, progress=False)[0]
    assert said[0].score == pytest.approx(float(monitor.score([prompt]).scores), abs=1e-3)
