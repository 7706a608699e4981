"""scripts/time_readme.py: every piece of the README's Python, statement by statement."""

import ast
import re

import pytest
from test_readme import SECTIONS, TEXT
from time_readme import GIVEN, Timed, pieces, statements, table, timed


def test_every_python_block_of_the_readme_is_a_piece():
    found = pieces(TEXT)
    assert ["In Python", *SECTIONS] == list(found)
    assert sum(map(len, found.values())) == len(re.findall(r"^```python$", TEXT, flags=re.M))
    assert all(old in TEXT for old in GIVEN), "what is replaced still stands in the README"


def test_no_statement_of_a_piece_is_lost():
    for blocks in pieces(TEXT).values():
        for block in blocks:
            whole = "\n".join(code for _, code in statements(block))
            assert ast.dump(ast.parse(whole)) == ast.dump(ast.parse(block))


PAGE = """# Name

## First

```python
import time

time.sleep(0.02)
print("not shown")
```

## No code

text

## Second

```python
with open("path") as file:
    text = file.read()
```

```python
seen = (text, time.__name__)
```
"""


def test_pieces_share_their_names_and_each_statement_has_its_seconds(tmp_path, capsys):
    (tmp_path / "real").write_text("content", encoding="utf-8")
    names: dict = {}
    found = list(timed(pieces(PAGE), {'"path"': repr(str(tmp_path / "real"))}, names))
    assert [(one.section, one.piece, one.statement) for one in found] == [
        ("First", 1, "import time"),
        ("First", 1, "time.sleep(0.02)"),
        ("First", 1, "print('not shown')"),
        ("Second", 1, "with open('path') as file:"),
        ("Second", 2, "seen = (text, time.__name__)"),
    ]
    assert names["seen"] == ("content", "time")
    assert found[1].seconds >= 0.02
    assert capsys.readouterr().out == ""


def test_a_piece_that_fails_says_so():
    with pytest.raises(ZeroDivisionError):
        list(timed({"Broken": ["1 / 0"]}, {}, {}))


def test_the_table_has_a_sum_per_piece_and_the_statements_that_take_a_second():
    found = [Timed("A", 1, "slow()", 2.6), Timed("A", 1, "quick()", 0.2), Timed("A", 2, "other()", 1.2)]
    assert table(found).splitlines()[2:] == [
        "| A (1) | **all** | 3 |",
        "| | `slow()` | 3 |",
        "| A (2) | **all** | 1 |",
        "| | `other()` | 1 |",
    ]
