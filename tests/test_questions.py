"""docs/questions.md: its code runs in order, as it stands there."""

import inspect
import re
from pathlib import Path

import mechsafety as ms

PAGE = Path(__file__).parents[1] / "docs" / "questions.md"


def test_the_code_of_the_page_runs_in_order(capsys):
    names: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.S | re.M)
    assert len(blocks) >= 15
    for block in blocks:
        exec(block, names)
    assert names["circuit"].nodes and names["graph"].number_of_nodes() >= len(names["circuit"].nodes)
    capsys.readouterr()


def test_every_public_function_answers_a_question():
    """The page is the index of functions: each of the package's top level is called in its code."""
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.S | re.M))
    functions = [name for name in ms.__all__ if inspect.isfunction(getattr(ms, name))]
    assert len(functions) >= 15
    assert [name for name in functions if f"ms.{name}(" not in code] == []
