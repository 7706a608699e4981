"""The steps of the reproduction script that are not calls of the library, on tiny models."""

import argparse
import types

import numpy as np
import pytest

import mechsafety as ms


@pytest.fixture(scope="module")
def script():
    import reproduce_safety_neurons

    return reproduce_safety_neurons


@pytest.fixture
def make_run(script, pair, prompts, tmp_path, monkeypatch):
    """Builder of a small run whose models are tiny."""
    models = dict(zip(("demo-base", "demo"), pair, strict=True))
    monkeypatch.setattr(script.Run, "model", lambda self, name: models[name])
    monkeypatch.setattr(script.Run, "has_helpful", lambda self: False)
    work = tmp_path / "work"

    def build(small=True):
        run = script.Run(argparse.Namespace(work=work, small=small, data=tmp_path / "data"))
        run.test = ms.PromptPairs.from_lists(prompts, prompts[1:] + prompts[:1])
        return run

    return build


def test_a_store_of_another_run_is_refused(make_run, script, tmp_path):
    make_run()
    make_run()  # the same again goes on
    with pytest.raises(SystemExit, match=r"work holds steps of another size; delete it or choose another --work$"):
        make_run(small=False)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "advbench.jsonl").write_text('{"instruction": "a"}\n')
    with pytest.raises(SystemExit, match=r"work holds steps of another data; delete it"):
        make_run()
    (tmp_path / "work" / "store.json").unlink()
    (tmp_path / "work" / "metric.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"work holds steps of an unknown run; delete it"):
        make_run()


def test_steps_are_stored_and_their_time_added_up(make_run, script, monkeypatch):
    run, made = make_run(), []

    def fails():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.json("one", fails)
    assert run.clock()["seconds"].keys() == {"one"}, "an interrupted attempt counts"
    for _ in range(2):
        assert run.json("one", lambda: made.append(1) or {"found": 2}) == {"found": 2}
    assert made == [1]
    now = [0.0]
    monkeypatch.setattr(script, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def passes(seconds):
        now[0] += seconds

    with run.timed("outer"):
        passes(0.5)
        with run.timed("inner"):
            passes(2.0)
    for _ in range(2):  # the page once, loading with the step that needed it
        with run.timed(script.PAGE):
            passes(0.2)
            with run.timed(script.LOADING):
                passes(0.3)
    assert script.LOADING not in run.clock()["seconds"]
    with run.timed("next"):
        passes(1.0)
    seconds = run.clock()["seconds"]
    assert seconds[script.PAGE] == 0.2 and seconds[script.LOADING] == 0.6
    assert (seconds["outer"], seconds["inner"], seconds["next"]) == (0.5, 2.0, 1.0), (
        "the time of steps inside is theirs"
    )


def test_ends_and_contrast(make_run):
    run = make_run()
    for found in run.ends().values():
        assert found["same_replies"] == found["prompts"] and found["largest_logit_difference"] < 1e-3
    assert run.contrast("test").effects.shape == (2, 3, 48)


def test_replies_of_the_judged_shares_and_of_both_models(make_run, script, tmp_path):
    run = make_run()
    limits = '{"seconds": 0, "found": {"demo-base": 0.5, "demo": null}}'
    (run.args.work / "loss-limit.json").write_text(limits)
    rows = run.judged_replies()
    assert [row["top share"] for row in rows] == ["5.0%", "100.0%", "aligned model", "base model"]
    assert all(row["n"] == 3 and row["perplexity"] > 1 for row in rows) and run.limit == 0.5
    of = ("refuses", "answers", "degenerate", "neither", "perplexity")
    assert all(rows[1][name] == rows[2][name] for name in of), "all neurons are the aligned model"
    sets = {"name": "x", "harmful": 3, "kinds": ["refuses", "degenerate", "answers", ""], "unsafe": [0, 0, 1, 0]}
    counts = {"harmful prompts": 3, "refused by the base": 1, "degenerate": 1, "neither": 0, "unsafe": 1, "safe": 3}
    assert script.guard_counts(sets) == {"set": "x", **counts}


def test_planted_neurons(make_run, script, monkeypatch, make_hf_model):
    class Loader:
        @staticmethod
        def from_pretrained(folder, dtype):
            return make_hf_model("llama")

    monkeypatch.setattr(script, "AutoModelForCausalLM", Loader)
    monkeypatch.setattr(script, "base_folder", lambda: None)
    monkeypatch.setattr(script, "PLANTED", 4)
    found = make_run().planted()
    assert found["ratio"] >= 0.75 and found["neurons"] == 4  # of 144: 0.03 by chance


def test_tokens_as_code_and_numbers_as_json(script):
    assert script.code("a`") == "`` 'a`' ``" and script.code("a|") == "`'a|'`"
    assert script.plain({"a": (np.float32(0.5), float("nan")), "n": np.int64(3)}) == {"a": [0.5, None], "n": 3}


def test_drawn_prompts_spread(script):
    rows = [topic for topic in "abcd" for _ in range(25)]
    assert set(script.drawn(rows, 40, seed=0)) == set("abcd") and len(script.drawn(rows, 200, seed=0)) == 100
    assert script.drawn(rows, 5, seed=1) == script.drawn(rows, 5, seed=1)


def test_short_plans_warm_up_in_a_share_of_their_steps(script):
    import train_demo_adapter

    found = {steps: train_demo_adapter.warm_up_steps(steps) for steps in (3, 16, 39, 40, 46, 720)}
    assert found == {3: 1, 16: 3, 39: 7, 40: 20, 46: 20, 720: 20}
