"""The comparison of rankings, on a model whose circuit is known."""

import compare_discovery as study
import pytest
from pages.render import PAGES
from steps import Steps

import mechsafety as ms
from mechsafety import testbed
from mechsafety.circuits import draw_pairs, split_pairs
from mechsafety.circuits.masks import Training


@pytest.fixture(scope="module")
def split():
    made = testbed.planted(5, 2, 4, decoys=2)
    model = ms.load_model((made.model, made.tokenizer))
    drawn = draw_pairs(model, made.pairs.sample(16), limit=16, progress=False)
    return split_pairs(model, drawn, progress=False), made


def test_every_ranking_finds_the_planted_circuit(split, tmp_path, monkeypatch):
    split, made = split
    monkeypatch.setattr(study, "N_RANDOM", 2)
    monkeypatch.setattr(study, "N_RESAMPLES", 2)
    monkeypatch.setattr(study, "THRESHOLDS", (0.01, 0.5))
    monkeypatch.setattr(
        study,
        "train_masks",
        lambda meter, kind, weights=None: ms.circuits.train_masks(meter, kind, Training(steps=80), weights=weights),
    )
    found = study.measure(split, Steps(tmp_path))
    true = len({node.home for node in made.truth.nodes})
    for method, row in found.items():
        if method != "random":
            assert row["needed"] == {"0.8": true, "0.9": true} and row["seconds"] >= 0, method
            assert row["low"][2] <= row["faithfulness"][2] <= row["high"][2] and row["n_pairs"] == len(
                split.drawn.there
            )
        assert row["sizes"][-1] == 10 and row["faithfulness"][-1] == pytest.approx(1.0, abs=1e-3)
    assert found["random"]["cmd"] > found["gradient, reach"]["cmd"]
    again = study.measure(split, Steps(tmp_path))
    assert again == found, "what was done is not done again"
    assert study.measure(split, Steps(tmp_path), resample=False) == found, "what was resampled before is kept"
    for path in tmp_path.glob("resamples *.json"):
        path.unlink()
    once = study.measure(split, Steps(tmp_path), resample=False)
    assert once == {name: {key: one for key, one in row.items() if key != "stability"} for name, row in found.items()}
    page = PAGES["discovery"]
    searches = study.measure_searches(split, Steps(tmp_path / "searches"))
    assert all(row["parts"] == true and row["reached"] for row in searches) and len(searches) == 8
    assert all(row["fresh"][1] <= row["fresh"][0] <= row["fresh"][2] and row["fresh"][0] > 0.79 for row in searches)
    record = {"models": {"planted": {"methods": found, "parts": 10, "found_on": len(split.drawn.here)}}}
    goals = [study.verdicts(split, kind, made.truth) for kind in ("reach", "match")]
    assert [row["recall"] for row in goals] == [1.0, 1.0] and [row["parts"] for row in goals] == [true, true]
    assert all(row["fresh"][1] <= row["fresh"][0] <= row["fresh"][2] and not row["opposing"] for row in goals)
    record["models"]["planted"] |= {"goals": goals}
    record["models"]["planted"] |= {"searches": searches, "edges": 99, "machine": {"cpu": "some", "cores": 2}}
    text = page.text(record)
    assert f"| masks, match | {true} | {true} |" in " ".join(text.split()) and list(page.figures(record)) == [
        "discovery.png"
    ]
    other = {key: row for key, row in record["models"]["planted"].items() if key not in ("methods", "searches")}
    both = page.text(record | {"models": record["models"] | {"goals alone": other}})
    alone = both[both.index("## goals alone") :]
    assert page.figures({"models": {"goals alone": other}}) == {} and ".png" not in page.text(
        {"models": {"one": other}}
    )
    record["models"]["planted"]["methods"] = once
    text = page.text(record)
    assert "not measured for this model" in text and f"| masks, match | {true} | {true} |" in " ".join(text.split())
    assert "| match | " in " ".join(alone.split()) and "Parts for 0.8" not in alone and "removes parts" not in alone


def test_only_a_circuit_that_matches_holds_what_works_against_refusal():
    split, truth = study.planted_split(opposing=True)
    against = next(node for node in truth.nodes if split.meters.held_out.without([[node]])[0] > 1.2)
    reach, match = (study.searched(split, "gradient", kind, 0.8) for kind in ("reach", "match"))
    assert reach["parts"] == len(truth.nodes) - 1 and reach["fresh"][0] > 1.3
    assert match["parts"] == len(truth.nodes) and match["fresh"][0] == pytest.approx(1.0, abs=0.1)
    assert truth.roles[against] == "production"
