"""The study of fine-tuning, end to end on a planted model, and its page; and how it compares curves and ranks."""

import argparse
import copy
import dataclasses
from types import SimpleNamespace

import pytest
import study_finetuning
import torch
from pages.finetuning import PAGE
from pages.records import load
from study_finetuning import SMALL, moved, study

import mechsafety as ms
from mechsafety import testbed
from mechsafety.circuits import draw_pairs
from mechsafety.nodes import Node
from mechsafety.output import json_text, write_text


@pytest.fixture
def planted_study(monkeypatch, tmp_path):
    """Arguments of the study, with a planted model and its pairs in the place of the demo model and built-in pairs."""
    made = testbed.planted(seed=5, layers=4, heads=4, decoys=2, backups=1)
    plain = copy.deepcopy(made.model)
    with torch.no_grad():  # the model before its alignment: what decides on a refusal writes nothing
        for layer in plain.model.layers[1:]:
            layer.mlp.down_proj.weight.zero_()
    model = ms.load_model((made.model, made.tokenizer))
    rows = {"train": made.pairs[:24], "validation": made.pairs[24:30], "test": made.pairs[30:42]}
    metric = ms.RefusalLogOdds.detect(model, rows["train"])
    heads = [Node("head", 3, 1), Node("head", 0, 1), Node("head", 2, 2)]
    circuit = SimpleNamespace(
        metric=metric.to_json(),
        nodes=[SimpleNamespace(node=node, effect=1 / k) for k, node in enumerate(heads, 1)],
        provenance=SimpleNamespace(options={"limit": 16}, seed=0),
    )
    base = ms.load_model((plain, made.tokenizer))
    monkeypatch.setattr(study_finetuning.ms, "load_model", lambda name: base if name.endswith("base") else model)
    monkeypatch.setattr(ms.RefusalCircuit, "load", classmethod(lambda cls, path: circuit))
    every = dataclasses.replace(made.pairs, pairs=made.pairs.pairs[:42])
    monkeypatch.setattr(ms.PromptPairs, "builtin", classmethod(lambda cls, split=None: rows.get(split, every)))
    return argparse.Namespace(
        model="planted", circuit=tmp_path, work=tmp_path / "steps", adapters=tmp_path / "adapters", out=tmp_path
    )


def test_the_study_runs_goes_on_and_draws_its_page(planted_study, tmp_path, monkeypatch):
    size = dataclasses.replace(SMALL, damaged=3, ablated=2, sizes=(1, 2), test=6, curve_pairs=4, ranking=6)
    record = study(planted_study, size)
    assert len(record["damage"]) == 3 and record["ablated"] == ["L3.H1", "L0.H1"]
    assert [row["condition"] for row in record["repair"]["rows"]][-2:] == ["random parts", "all parameters"]
    assert {path.name for path in planted_study.adapters.iterdir()} >= {"repair.safetensors", "spread.safetensors"}
    first = record["flatter"]["spread"][0]
    curve = record["curves"]["before, first heads of the map"]["rows"][0]
    assert first["lost"]["before"] == pytest.approx(curve["lost"]) and first["parts"] == 1
    assert first["lost"]["change"] == pytest.approx(first["lost"]["after"] - first["lost"]["before"])
    held_out = draw_pairs(ms.load_model("planted"), limit=16, progress=False).there
    test = ms.PromptPairs.builtin("test").sample(size.test)
    assert record["used"] == len(set(test.pairs) & set(held_out.pairs))
    write_text(PAGE.stored(tmp_path), json_text(record))
    PAGE.draw(tmp_path)
    page = PAGE.path(tmp_path).read_text()
    assert "With one set of as many random parts it is" in page and (tmp_path / "finetuning-curves.png").is_file()
    controls = record["repair"]["controls"]
    assert [row["name"] for row in controls] == ["random parts", "all parameters", "all parameters"]
    assert f"| {controls[2]['learning_rate']:.0e} " in page
    moved_by = record["relocation"]["before"]
    assert moved_by["ceiling"] == 1.0 > moved_by["floor"] and record["later"]["harden"][0] is not None
    assert sum(record["harden_ablated"][0][:4]) == pytest.approx(1)
    # a second run takes every step from the folder
    monkeypatch.setattr(study_finetuning, "finetune_parts", None)
    monkeypatch.setattr(study_finetuning, "fragility", None)
    monkeypatch.setattr(study_finetuning, "relocation", None)
    assert study(planted_study, size) == load(PAGE.stored(tmp_path)) == record


def test_how_far_ranks_moved():
    before, after = {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}, {"d": 5.0, "a": 3.0, "b": 2.0, "c": 1.0}
    found = moved(before, after, 2)
    assert found["common"] == 1 and found["new"] == [["d", 1.0, 5.0]]
    assert found["spearman"] == pytest.approx(-0.2) and found["sum_before"] == 7 and found["sum_after"] == 8
