"""The study of two models, small, on a tiny model whose refusal is one direction: it runs, resumes, draws its page."""

import argparse
import json
import shutil

import pytest
from pages.records import PageError
from pages.render import PAGES
from planted_direction import FRAMES, directed_pairs

import mechsafety as ms

PLAIN = [f"{a.format(x)} {b.format('cake')}" for a in FRAMES for b in FRAMES for x in ("cake", "poem", "bread")]


@pytest.fixture(scope="module")
def script():
    import study_native_model

    return study_native_model


@pytest.fixture
def args(tmp_path, directed, monkeypatch):
    """Options of a small study whose models, pairs and benchmarks are tiny."""
    model, pairs, _ = directed
    sets = {split: [*directed_pairs(word)] for split, word in (("train", "bomb"), ("test", "poison"))}
    rows = [ms.prompts.PromptPair(p.harmful, p.harmless, p.topic, split) for split, one in sets.items() for p in one]

    def builtin(split=None, *, edition=None):
        return ms.PromptPairs(tuple(row for row in rows if split in (None, row.split)), "builtin")

    monkeypatch.setattr(ms.PromptPairs, "builtin", builtin)
    monkeypatch.setattr(ms, "load_model", lambda given: model)
    data = tmp_path / "data"
    data.mkdir()
    files = dict.fromkeys(("advbench", "jailbreakbench", "harmbench_test"), pairs.harmful)
    files |= {"harmbench_val": [p.harmful for p in sets["test"]], "alpaca_harmless": PLAIN}
    for name, prompts in files.items():
        lines = [json.dumps({"instruction": prompt}) for prompt in prompts]
        (data / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    options = {"data": data, "work": tmp_path / "work", "out": tmp_path / "out", "small": True}
    return argparse.Namespace(**options)


def test_the_study_runs_resumes_and_gives_the_same_bytes(script, args, monkeypatch):
    args.parts, given = list(script.PARTS), {name: ("a", "0" * 64) for name in ("native", "demo")}
    script.study(args, {"native": given["native"]})
    assert not (args.out / "native-model.md").exists(), "one model alone has no page"
    shutil.copytree(args.work / "native", args.work / "demo")  # the same model twice
    script.study(args, given)
    files = {path: path.read_bytes() for path in sorted(args.out.rglob("*")) if path.is_file()}
    names = {str(path.relative_to(args.out)) for path in files}
    assert names >= {"native-model.md", "native-model.json", "native-model/demo-neuron.json", "native-model/depths.png"}
    record = json.loads((args.out / "native-model.json").read_text())
    assert set(record) == {"native", "demo"} and set(record["native"]) == set(script.PARTS)
    said = record["native"]["replies"]["sets"]
    assert said["AdvBench"]["kinds"]["refuses"] == 4 and said["Alpaca"]["kinds"]["refuses"] == 0
    assert record["native"]["direction-found"]["replies"]["JailbreakBench"]["removed"]["kinds"]["refuses"] == 0
    assert record["native"]["ablations"]["rows"]["the circuit"]["after"]["kinds"]["refuses"] == 0
    page = (args.out / "native-model.md").read_text()
    assert record["native"]["direction-found"]["chosen"]["position"] < 0
    assert "JailbreakBench below both intervals: 100% (2 of 2" in page, "two prompts carry no sentence"
    assert not {"nan", "None"} & set(page.replace("|", " ").split())
    for part in ("ablations", "replies"):  # their own steps are kept
        (args.work / "demo" / f"{part}.json").unlink()
    (args.work / "demo" / "ablated contrast neurons.json").unlink()
    monkeypatch.setattr(script, "PARTS", {**script.PARTS, "maps": lambda side: pytest.fail("done again")})
    script.study(args, given)
    again = {path: path.read_bytes() for path in sorted(args.out.rglob("*")) if path.is_file()}
    assert again == files
    check_older_words(args.out)


def check_older_words(out):
    """A study that began before "column" and "twins" were replaced has the same page; a missing key is refused."""
    stored, page = out / "native-model.json", PAGES["native-model"]
    text, drawn = stored.read_text(), (out / "native-model.md").read_text()
    assert page.text(page.read(out)) == drawn
    old_words = {"position": "column", "built-in pairs, harmful": "twins, harmful"}
    old_words["built-in pairs, harmless"] = "twins, harmless"
    for new, old in old_words.items():
        assert f'"{new}":' in text
        text = text.replace(f'"{new}":', f'"{old}":')
    stored.write_text(text)
    record = page.read(out)
    assert page.text(record) == drawn and "column" not in record["native"]["direction-found"]["without_kl"]
    del record["demo"]["facts"]["d_mlp"]
    with pytest.raises(PageError, match=r"^native-model\.json: nothing stands at 'demo/facts/d_mlp'$"):
        page.text(record)


def test_a_store_of_other_weights_or_sizes_is_refused(script, args):
    args.parts = ["facts"]
    script.study(args, {"native": ("a", "0" * 64)})
    with pytest.raises(SystemExit, match=r"native holds steps of another weights; delete it or choose another --work$"):
        script.study(args, {"native": ("a", "2" * 64)})
    args.small = False
    with pytest.raises(SystemExit, match=r"holds steps of another size; delete it"):
        script.study(args, {"native": ("a", "0" * 64)})


def test_random_nodes_are_as_many_of_each_kind(script, llama):
    nodes = [ms.Node("head", 0, 1), ms.Node("head", 1, 2), ms.Node("mlp", 1), ms.Node("neuron", 2, 5)]
    drawn = script.random_nodes(llama, nodes, 1)
    assert script.kinds_of(drawn) == {"head": 2, "mlp": 1, "neuron": 1} and not set(drawn) & set(nodes)
    assert drawn == script.random_nodes(llama, nodes, 1) and [n.layer for n in drawn if n.kind == "neuron"] == [2]
