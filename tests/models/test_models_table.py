"""docs/models.md: some of its rows measured again."""

import json
import runpy
from pathlib import Path

import pytest
from architectures import CONFIGS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "models.md"
STORED = ROOT / "docs" / "results" / "models.json"


@pytest.fixture(scope="module")
def script():
    """Names of scripts/models_table.py."""
    return runpy.run_path(str(ROOT / "scripts" / "models_table.py"))


def cells(name):
    """The page's row of an architecture."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name} |")]
    assert len(lines) == 1, name
    return [cell.strip() for cell in lines[0].strip("|").split(" | ")]


@pytest.mark.generation("TransformerBridge", reason="the page is of TransformerLens 4")
@pytest.mark.parametrize("name", ["Llama, biases", "Gemma-2", "Mixtral", "Granite", "Llama, a folder of several files"])
def test_rows_that_load(name, script, make_tokenizer):
    row = script["measure"](name, make_tokenizer())
    assert not row.refused and row.alone < 1e-5 and row.padded < 1e-5
    _, alone, padded, shortcuts, hooks, *analyses = cells(name)
    assert max(map(float, (alone, padded, hooks))) < 1e-5 and row.hooks < 1e-5
    assert (shortcuts == "all") == (len(row.shortcuts) == 6)
    assert analyses == ["no" if line else "yes" for _, line in row.analyses]


@pytest.mark.generation("TransformerBridge", reason="the page is of TransformerLens 4")
@pytest.mark.parametrize("name", ["Ministral", "BLOOM", "Mamba"])
def test_rows_that_are_refused(name, script, make_tokenizer):
    line = script["measure"](name, make_tokenizer()).refused
    assert line and "\n" not in line and cells(name) == [name, line]


def test_what_is_stored_of_rows(script):
    """The same as in the stored record."""
    analyses = (("heads", ""), ("neurons", "no neurons"), ("paths", ""), ("edges", ""))
    rows = [script["Row"]("a", analyses=analyses), script["Row"]("b", "cannot load")]
    found, stored = script["record"](rows), json.loads(STORED.read_text())
    assert found.keys() == stored.keys() and found["loaded"][0].keys() == stored["loaded"][0].keys()
    assert found["loaded"][0]["analyses"] == {"heads": True, "neurons": False, "paths": True, "edges": True}
    assert found["lines"] == {"neurons": "no neurons"} and found["refused"] == [{"name": "b", "line": "cannot load"}]
    assert found["shortcuts"] == stored["shortcuts"] and found["prompts"] == stored["prompts"]


def test_the_page_has_every_architecture(script):
    assert len(CONFIGS) > 55
    for name in (*CONFIGS, *script["FOLDERS"]):
        assert cells(name)
