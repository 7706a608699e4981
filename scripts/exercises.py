"""Exercises of the course: each source ``notebooks/exercises/sources/NN_title.py`` becomes a notebook for students.

A source is a notebook with all answers, in jupytext's percent format. A cell tagged ``exercise`` holds one function,
right and complete. The cells behind it that are tagged ``hint`` are its hints; the cell behind these is its check. The
notebook for students (``notebooks/exercises/NN_title.ipynb``) has a stub that raises an error in the function's place.
The hints are folded, and so is the answer, which stands behind the check. So an answer is written once.
"""

import argparse
import ast
import textwrap
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

from notebooks import METADATA, NOTEBOOKS

EXERCISES = NOTEBOOKS / "exercises"
INSTALL = """\
# installs the package where it is missing, for example in Colab; otherwise it does nothing
import importlib.util
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("mechsafety") is None:
    package = "../.." if Path("../../setup.cfg").exists() else "mechsafety"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)"""
RULES = """\
In each exercise, write the body of the function in place of the `raise` line. The cell below it checks your answer on
random inputs. If it is wrong, the message says in one line what is wrong, and which common mistake it looks like. Hints
and the answer are folded: click on them to open them. The shapes stand in the annotations: `Float[Tensor, "batch pos"]`
is a tensor with these two axes."""


def sources() -> list[Path]:
    """The sources in order."""
    return sorted((EXERCISES / "sources").glob("[0-9][0-9]_*.py"))


def stored(source: Path) -> Path:
    """Where the notebook for students is stored."""
    return EXERCISES / f"{source.stem}.ipynb"


def read(source: Path) -> list[NotebookNode]:
    """The cells of a source, with their tags."""
    return jupytext.read(source, fmt="py:percent").cells


def is_tagged(cell: NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", ())


def function_of(cell: NotebookNode) -> ast.FunctionDef:
    """The one function of an exercise's cell, which must have a docstring."""
    (function,) = ast.parse(cell.source).body
    assert isinstance(function, ast.FunctionDef) and ast.get_docstring(function), cell.source
    return function


def stub(cell: NotebookNode) -> str:
    """The function of an exercise without its body."""
    function = function_of(cell)
    head = cell.source.splitlines()[: function.body[0].end_lineno]
    return "\n".join([*head, f'    raise NotImplementedError("{function.name} is not written yet")'])


def folded(title: str, text: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"


def student_cells(source: Path, *, solved: bool = False) -> list[NotebookNode]:
    """The notebook's cells: for students, or with every stub solved."""
    markdown, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    first, *rest = read(source)
    cells, hints, answer = [markdown(f"{first.source}\n\n{RULES}"), code(INSTALL)], [], ""
    for cell in rest:
        if is_tagged(cell, "hint"):
            hints.append(folded(f"Hint {len(hints) + 1}", cell.source))
            continue
        if hints:
            cells.append(markdown("\n\n".join(hints)))
        if is_tagged(cell, "exercise"):
            about = f"*Difficulty: {cell.metadata['difficulty']}. Time: about {cell.metadata['minutes']} minutes.*"
            cells += [markdown(about), code(cell.source if solved else stub(cell))]
            answer = folded("Answer", f"```python\n{cell.source}\n```")
        else:
            cells.append(markdown(cell.source) if cell.cell_type == "markdown" else code(cell.source))
        if hints:
            cells.append(markdown(answer))
            hints = []
    for k, cell in enumerate(cells):
        cell.id = f"cell-{k:02d}"
    return cells


def notebook(source: Path, *, solved: bool = False) -> NotebookNode:
    """The notebook of a source, without outputs; with ``solved``, the answers are filled in."""
    made = nbformat.v4.new_notebook(metadata=nbformat.from_dict(METADATA), cells=student_cells(source, solved=solved))
    made.nbformat, made.nbformat_minor = 4, 5
    nbformat.validate(made)
    return made


def text_of(made: NotebookNode) -> str:
    """The notebook as it is stored."""
    return nbformat.writes(made) + "\n"


def main() -> None:
    argparse.ArgumentParser(description=textwrap.dedent(__doc__ or "")).parse_args()
    for source in sources():
        stored(source).write_text(text_of(notebook(source)), encoding="utf-8")
        print(stored(source).relative_to(NOTEBOOKS.parent))


if __name__ == "__main__":
    main()
