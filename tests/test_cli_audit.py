"""The commands `mechsafety fingerprint` and `mechsafety audit`: exit codes, one line per mistake, no half files."""

import json
from pathlib import Path

import pytest
from tampering import weakened

import mechsafety as ms
import mechsafety.models
from mechsafety import cli, testbed
from mechsafety.cli import main
from mechsafety.monitors import TamperAudit
from mechsafety.nodes import Node
from mechsafety.testbed.vocabulary import REFUSAL


def saved(folder: Path, seed: int) -> Path:
    """A planted model's folder, with a file of its pairs."""
    made = testbed.planted(seed=seed, layers=3, heads=2)
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    rows = [json.dumps({"harmful": pair.harmful, "harmless": pair.harmless}) for pair in made.pairs.sample(12).pairs]
    (folder / "pairs.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("planted") / "model", 7)


@pytest.fixture(scope="module")
def print_file(folder, tmp_path_factory) -> Path:
    """A fingerprint that the command wrote."""
    out = tmp_path_factory.mktemp("fingerprints") / "model.json"
    with pytest.raises(SystemExit) as caught:
        main(["fingerprint", str(folder), "--pairs", str(folder / "pairs.jsonl"), "--out", str(out)])
    assert caught.value.code == 0
    return out


def test_a_fingerprint_and_an_intact_model(run, folder, print_file):
    audit = TamperAudit.load(print_file)
    assert audit.provenance.model == "model" and len(audit.harmful) == 6
    ran = run("audit", folder, "--fingerprint", print_file)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == "model is intact: its weights are those of the fingerprint, byte for byte, and no test alarms.\n"
    facts = json.loads(run("audit", folder, "--fingerprint", print_file, "--dtype", "bfloat16", "--json").out)
    assert facts["tampered"] is False and facts["identical"] is False and 0 < facts["score"] < 1
    assert facts["notes"] == ["the data type differs from the fingerprinted model's"] and facts["findings"] == []


def test_what_the_fingerprint_says(run, folder, tmp_path):
    out = tmp_path / "new" / "a.json"
    argv = ["fingerprint", folder, "--pairs", folder / "pairs.jsonl", "--out", out, "--refusal-token", REFUSAL[0]]
    ran = run(*argv, "--n-pairs", "2", "--json")
    assert ran.code == 0
    facts = json.loads(ran.out)
    assert facts["prompts"] == 4 and facts["bytes"] == out.stat().st_size and facts["out"] == str(out)
    assert facts["weights_sha256"] == TamperAudit.load(out).provenance.weights_sha256
    kilobytes = f"{out.stat().st_size / 1000:.0f}"
    assert run(*argv, "--n-pairs", "2").out == f"fingerprint of model: {out}, {kilobytes} kB, 4 prompts\n"
    assert [path.name for path in out.parent.iterdir()] == ["a.json"]


def test_a_tampered_model_ends_with_4(run, folder, print_file, monkeypatch):
    """It lives in memory only: the loader hands out the model in the middle of a change."""
    model = ms.load_model(folder)
    monkeypatch.setattr(mechsafety.models, "load_model", lambda *_, **__: model)
    with weakened(model, [Node("head", 1, 1)], 0.0):
        ran = run("audit", folder, "--fingerprint", print_file)
        facts = json.loads(run("audit", folder, "--fingerprint", print_file, "--json").out)
    assert ran.code == 4
    assert ran.err.startswith("mechsafety: model was tampered with (score ") and ran.err.count("\n") == 1
    assert "L1.H1: its weights are 0% of what they were" in ran.out
    assert facts["tampered"] and "L1.H1" in [one["part"] for one in facts["findings"]]
    assert {test["name"] for test in facts["tests"] if test["alarm"]} >= {"heads", "silent heads"}


def test_another_model_of_the_same_sizes_ends_with_4(run, print_file, tmp_path):
    ran = run("audit", saved(tmp_path / "other", 8), "--fingerprint", print_file)
    assert ran.code == 4 and ran.out.startswith("other was tampered with: the score is ")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--out", "x.bin"], "--out 'x.bin'; expected a file whose name ends in .json"),
        (["--out", "x.json", "--n-pairs", "0"], "--n-pairs=0; expected at least 1"),
        (["--out", "x.json", "--seed", "-1"], "--seed=-1; expected at least 0"),
        (
            ["--out", "x.json", "--pairs", "none.jsonl"],
            "no such file: none.jsonl; expected a .jsonl, .json or .csv file",
        ),
        (["--out", "x.json", "--opener", "I'm"], "--opener without --refusal-token; expected both, or neither"),
        (["--out", "x.json", "--chat-template", "none.jinja"], "--chat-template 'none.jinja' is no file"),
        (["--out", "x.json", "--dtype", "int4"], "unknown dtype 'int4'"),
        (["--out", "notes/x.json"], "cannot write 'notes/x.json' (File exists)"),
        ([], 'Command "fingerprint" parameter --out requires an argument.'),
    ],
)
def test_mistakes_of_a_fingerprint(run, tmp_path, monkeypatch, given, expected):
    monkeypatch.chdir(tmp_path)
    Path("notes").write_text("mine")
    ran = run("fingerprint", "demo", *given)
    assert (ran.code, ran.out) == (2, "") and ran.err.count("\n") == 1
    assert ran.err.startswith(f"mechsafety: {expected}")
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_mistakes_of_an_audit(run, folder, print_file, tmp_path):
    """All of them but the last are said before the model is looked for."""
    other = tmp_path / "other.json"
    other.write_text("{}")
    small = testbed.planted(seed=7, layers=2, heads=2)
    small.model.save_pretrained(tmp_path / "small")
    small.tokenizer.save_pretrained(tmp_path / "small")
    for argv, expected in (
        (
            ["no/model", "--fingerprint", tmp_path / "none.json"],
            f"no such file: '{tmp_path / 'none.json'}'; expected a file",
        ),
        (["no/model", "--fingerprint", other], f"{other}: not a result file"),
        (
            ["no/model", "--fingerprint", print_file, "--template-option", "x"],
            "--template-option 'x'; expected NAME=VALUE",
        ),
        ([folder], 'Command "audit" parameter --fingerprint requires an argument.'),
        (
            [tmp_path / "small", "--fingerprint", print_file],
            "small has n_layers 2, the fingerprinted model has 3; expected a",
        ),
    ):
        ran = run("audit", *argv)
        assert (ran.code, ran.out) == (2, "") and ran.err.count("\n") == 1, ran.err
        assert ran.err.startswith(f"mechsafety: {expected}"), ran.err


def test_a_model_that_does_not_refuse_has_no_fingerprint(run, folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    swapped = [json.dumps({"harmful": row["harmless"], "harmless": row["harmful"]}) for row in rows]
    (tmp_path / "swapped.jsonl").write_text("\n".join(swapped))
    argv = ["--pairs", tmp_path / "swapped.jsonl", "--refusal-token", REFUSAL[0]]
    ran = run("fingerprint", folder, *argv, "--out", tmp_path / "a.json")
    assert (ran.code, ran.out) == (3, "") and "scores harmful prompts no higher than harmless ones" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["swapped.jsonl"]


def test_help_has_the_exit_codes(run):
    tables = {"fingerprint": cli.FINGERPRINT_CODES, "audit": cli.AUDIT_CODES, "serve": cli.SERVE_CODES}
    for command, table in tables.items():
        text = " ".join(run(command, "--help").out.split())
        assert [words for words in table.values() if words not in text] == [] and "The map" not in text
