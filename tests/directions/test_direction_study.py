"""What the study of the refusal direction stores of replies, on a model whose refusal is one direction."""

import json
import sys
import types
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    try:
        import reproduce_refusal_direction

        yield reproduce_refusal_direction
    finally:
        sys.path.remove(str(SCRIPTS))


def test_rates_come_with_kinds_and_no_text(script, directed, directed_found, tmp_path, monkeypatch):
    model, pairs, metric = directed
    study = object.__new__(script.Study)
    study.folder, study.model, study.metric, study.layer = tmp_path, model, metric, directed_found.layer
    study.args = types.SimpleNamespace(n_sweep=2)
    (tmp_path / "loss-limit.json").write_text('{"seconds": 0, "found": 50.0}')
    sets = {"JailbreakBench": pairs.harmful[:4], "Alpaca (rest)": pairs.harmless[:4]}
    monkeypatch.setattr(script, "test_sets", lambda study: sets)
    monkeypatch.setattr(
        study.__class__, "prompts", lambda self, file, n, **rest: list(sets.values())["alp" in file][:n]
    )
    found = script.rates(study, directed_found)
    removed, before = found["JailbreakBench"]["direction removed"], found["JailbreakBench"]["as it is"]
    assert script.rate(before) == [4, 4] and script.rate(removed) == [0, 4]
    kinds = {"refuses": 0, "answers": 4, "degenerate": 0, "neither": 0}
    assert script.summary(removed, before) == {"kinds": kinds, "perplexity": removed.perplexity, "lost": [4, 0]}
    stored = json.loads((tmp_path / "replies-jailbreakbench-direction-removed.json").read_text())["found"]
    assert stored.keys() == {"kinds", "loss"} and len(stored["loss"]) == 4, "no reply is kept"
    monkeypatch.setattr(type(model), "generate", lambda *args, **options: pytest.fail("a finished step runs again"))
    assert script.rates(study, directed_found)["JailbreakBench"]["direction removed"].kinds == removed.kinds
    monkeypatch.undo()
    monkeypatch.setattr(script.Study, "prompts", lambda self, file, n, **rest: list(sets.values())["alp" in file][:n])
    kinds = script.sweep(study, directed_found, "removed").kinds_harmful
    assert {one.limit for one in kinds} == {50.0} and kinds[-1].kinds == ("answers",) * 2
