"""The stored exercises are what their sources give, and keep to one form."""

import ast
import re

import nbformat
import pytest
from exercises import EXERCISES, function_of, is_tagged, notebook, read, sources, stored, stub, text_of

from mechsafety.teaching import checks

PAGE = (EXERCISES.parents[1] / "docs" / "exercises.md").read_text(encoding="utf-8")
EVERY = [pytest.param(path, id=path.stem) for path in sources()]


def answers(source):
    return [cell for cell in read(source) if is_tagged(cell, "exercise")]


def test_every_notebook_has_a_source_and_there_is_one_for_each_of_the_course():
    assert {path.stem for path in EXERCISES.glob("*.ipynb")} == {path.stem for path in sources()}
    assert [path.name[:2] for path in sources()] == [f"0{number}" for number in range(1, 9)]


@pytest.mark.parametrize("source", EVERY)
def test_the_stored_notebook_is_what_its_source_gives(source):
    assert stored(source).read_text(encoding="utf-8") == text_of(notebook(source)), "make notebooks"


@pytest.mark.parametrize("source", EVERY)
def test_exercises_have_a_time_a_difficulty_and_two_hints(source):
    cells = read(source)
    assert 2 <= len(answers(source)) <= 4
    for k, cell in enumerate(cells):
        if is_tagged(cell, "exercise"):
            assert cell.metadata["difficulty"] in ("easy", "medium", "hard")
            assert cell.metadata["minutes"] in range(5, 31)
            assert [is_tagged(one, "hint") for one in cells[k + 1 : k + 4]] == [True, True, False]
            name = function_of(cell).name
            assert cells[k + 3].source == f"checks.{name}({name})"
            assert re.match(r"## \d\. ", cells[k - 1].source), "what is asked stands before it"


@pytest.mark.parametrize("source", EVERY)
def test_a_stub_is_typed_and_holds_nothing_of_the_answer(source):
    for cell in answers(source):
        function, text = function_of(cell), stub(cell)
        assert function.returns and all(one.annotation for one in function.args.args)
        described = ast.get_docstring(function)
        assert all(f"{one.arg}:" in described for one in function.args.args)
        left = ast.parse(text).body[0].body
        assert [type(node) for node in left] == [ast.Expr, ast.Raise]
        body = [ast.unparse(node) for node in function.body[1:]]
        assert body and not any(line in text for line in body)


@pytest.mark.parametrize("source", EVERY)
def test_the_students_notebook_folds_hints_and_answers(source):
    made = nbformat.read(stored(source), 4)
    nbformat.validate(made)
    assert all(cell.get("outputs", []) == [] and cell.metadata == {} for cell in made.cells)
    shown = "\n".join(cell.source for cell in made.cells)
    opened = re.sub(r"<details>.*?</details>", "", shown, flags=re.S)
    for cell in answers(source):
        function = function_of(cell)
        assert shown.count(f"checks.{function.name}({function.name})") == 1
        assert cell.source in shown and cell.source not in opened
    hints = [cell.source for cell in read(source) if is_tagged(cell, "hint")]
    assert all(hint in shown and hint not in opened for hint in hints)
    assert shown.count("<summary>Hint 1</summary>") == shown.count("<summary>Answer</summary>") == len(answers(source))


@pytest.mark.parametrize("source", EVERY)
def test_with_the_answers_filled_in_nothing_raises(source):
    made = notebook(source, solved=True)
    code = [cell.source for cell in made.cells if cell.cell_type == "code"]
    assert not any("NotImplementedError" in text for text in code)
    assert [cell.source in code for cell in answers(source)] == [True] * len(answers(source))


# --- the pages about them ---------------------------------------------------------------------------------------------


def test_the_page_lists_every_notebook_with_its_time():
    rows = re.findall(
        r"^\| \[(\d\d) · .+?\]\(\.\./notebooks/exercises/(.+?)\.ipynb\) \| .+ \| (\d+) minutes \|$", PAGE, flags=re.M
    )
    times = [sum(cell.metadata["minutes"] for cell in answers(source)) for source in sources()]
    assert rows == [(path.stem[:2], path.stem, str(time)) for path, time in zip(sources(), times, strict=True)]
    assert 5.25 < sum(times) / 60 < 5.75 and "five and a half hours" in PAGE


def test_the_reference_lists_every_check():
    page = (EXERCISES.parents[1] / "docs" / "reference" / "teaching.md").read_text(encoding="utf-8")
    listed = page[page.index("in the order of the course:") : page.index("```")]
    assert re.findall(r"`(\w+)`", listed) == checks.__all__
