"""docs/questions.md: its code runs in order, as it stands there."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "questions.md"


def test_the_code_of_the_page_runs_in_order(capsys):
    names: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.S | re.M)
    assert len(blocks) >= 15
    for block in blocks:
        exec(block, names)
    assert names["circuit"].nodes and names["graph"].number_of_nodes() >= len(names["circuit"].nodes)
    capsys.readouterr()
