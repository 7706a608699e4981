"""Pages are those of their stored JSON, and scripts take nothing from where they should not."""

import ast
import doctest
import json
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from pages import ground_truth, records, render, statements, tables
from pages.page import save
from pages.records import PageError, load
from pages.render import PAGES
from pages.tables import interval, table

ROOT = Path(__file__).resolve().parents[1]
DRAWN = [name for name, page in PAGES.items() if page.stored().is_file()]


@pytest.mark.parametrize("name", DRAWN)
def test_the_committed_page_is_that_of_the_committed_json(name):
    page = PAGES[name]
    assert page.text(page.read()) == page.path().read_text(encoding="utf-8"), "make pages"


def test_every_record_but_those_of_studies_to_come_is_there():
    assert {*PAGES} == {*DRAWN}


def places(value, path=(), depth=3):
    """Paths of keys: of mappings, and of the first entry of lists."""
    if isinstance(value, dict) and depth:
        for key, item in list(value.items())[:20]:
            yield (*path, key)
            yield from places(item, (*path, key), depth - 1)
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0), depth)


# what is too slow to draw for every key is tried on fewer; what has one key at the top, on more
DEPTHS = {"ground-truth": 1, "discovery": 3}


@pytest.mark.parametrize(("name", "depth"), [(name, DEPTHS.get(name, 2)) for name in DRAWN])
def test_a_missing_key_is_refused_in_one_line_with_its_path(name, depth):
    """Without any one key a page is the same or says less, or is refused by the key; nothing else happens."""
    page, refused = PAGES[name], {}
    record = page.read()
    for *path, key in list(places(record, depth=depth)):
        holder = record
        for part in path:
            holder = holder[part]
        kept = dict(holder)
        del holder[key]
        try:
            page.text(record)
        except PageError as error:
            refused[key] = str(error)
        holder.clear()
        holder.update(kept)
    assert len(refused) >= 3 or name == "gallery", refused
    for key, line in refused.items():
        assert str(key) in line and "\n" not in line
    assert page.text(record) == page.path().read_text(encoding="utf-8"), "all is as before"


def test_the_command_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    stored = json.loads(PAGES["coverage"].stored().read_text())
    del stored["coverage"][3]["held"]
    (tmp_path / "coverage.json").write_text(json.dumps(stored))
    with pytest.raises(SystemExit, match=r"^coverage: coverage\.json: nothing stands at 'coverage/3/held'$"):
        render.redraw(PAGES["coverage"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["coverage.json"], "no page of half a record"
    with pytest.raises(SystemExit, match=r"^coverage: .*none/coverage\.json is not there; its script writes it$"):
        render.redraw(PAGES["coverage"], tmp_path / "none")
    with pytest.raises(SystemExit):
        render.main(["coverage", "no-such"])
    assert "no page no-such; there are refusal-direction, safety-neurons," in capsys.readouterr().err


def test_pages_are_published_and_drawn_again(tmp_path, monkeypatch, capsys):
    stored = json.loads(PAGES["coverage"].stored().read_text())
    render.publish("coverage", stored, tmp_path)
    committed = PAGES["coverage"].path()
    assert (tmp_path / "coverage.md").read_bytes() == committed.read_bytes()
    assert json.loads((tmp_path / "coverage.json").read_text()) == stored
    drawn = []
    monkeypatch.setattr(render, "redraw", lambda page: drawn.append(page.name))
    render.main([])
    render.main(["models", "gallery"])
    assert drawn == [*DRAWN, "models", "gallery"]
    left_out = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(left_out) == len(PAGES) - len(DRAWN)


@pytest.mark.parametrize("name", ["refusal-direction", "safety-neurons"])
def test_figures_are_those_that_the_page_shows(name):
    page = PAGES[name]
    figures = page.figures(page.read())
    text, folder = page.path().read_text(encoding="utf-8"), page.path().parent
    assert figures and all(f"]({file})" in text and (folder / file).is_file() for file in figures)
    assert text.count("![") == len(figures)


def test_the_same_figure_has_the_same_bytes(tmp_path):
    for suffix in ("png", "svg"):
        for name in ("a", "b"):
            figure = Figure(figsize=(2, 1))
            figure.subplots().plot([0, 1], [1, 0])
            save(figure, tmp_path / "folder" / f"{name}.{suffix}")
        a, b = ((tmp_path / "folder" / f"{name}.{suffix}").read_bytes() for name in "ab")
        assert a == b and len(a) > 1000


def test_tables_survive_bars_and_missing_numbers():
    text = table([["`||`", 0.5, float("nan"), 3, "0.50"]], ["token", "a|b", "y", "n", "text"])
    head, _, row = text.splitlines()
    assert head == "| token | a\\|b | y | n | text |" and row == "| `\\|\\|` | 0.500 |  | 3 | 0.50 |"
    found = {"x": 0.5, "x_low": 0.25, "x_high": None, "y": None}
    assert interval(found, "x") == "0.50 (no interval)" and interval(found, "y", missing="none") == "none"


def test_renamed_keys_keep_their_place(tmp_path):
    (tmp_path / "a.json").write_text('{"rows": [{"column": 1, "columns": {"x": 2}}]}')
    found = records.renamed(load(tmp_path / "a.json"), {"column": "position"})
    assert found == {"rows": [{"position": 1, "columns": {"x": 2}}]}
    with pytest.raises(PageError, match=r"^a\.json: nothing stands at 'rows/0/columns/y'$"):
        _ = found["rows"][0]["columns"]["y"]


@pytest.mark.parametrize("module", [records, statements, tables])
def test_examples(module):
    assert doctest.testmod(module) == (0, doctest.testmod(module).attempted)


def test_planted_models_are_counted_as_they_are_made():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import truth

    assert sum(n for *_, n in truth.PLANTED.values()) == ground_truth.PLANTED


def imported(tree):
    """Modules and names that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def test_scripts_import_nothing_private_and_nothing_of_the_tests():
    helpers = {path.stem for path in (ROOT / "tests").rglob("*.py")}
    files = sorted((ROOT / "scripts").rglob("*.py"))
    assert len(files) > 20
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for module, name in imported(tree):
            parts = [*module.split("."), name]
            assert parts[0] not in helpers, f"{path.name} imports {module}, which is of the tests"
            private = parts[0] == "mechsafety" and any(part.startswith("_") for part in parts)
            assert not private, f"{path.name} imports {module}.{name}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
                of = node.value.id if isinstance(node.value, ast.Name) else ""
                assert of in ("self", "cls"), f"{path.name} reads {of}.{node.attr}"
