"""The site's pages: code in them runs, every public name has its place in the reference, and errors name pages that exist."""

import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# pages whose code runs in order, in an empty folder; docs/questions.md has a test of its own
RUN = [page for folder in ("howto", "concepts") for page in sorted((DOCS / folder).glob("*.md"))]


def blocks(page: Path) -> list[str]:
    """The page's Python, also that of numbered steps."""
    found = re.findall(r"^( *)```python\n(.*?)^\1```", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    return [textwrap.dedent(code) for _, code in found]


@pytest.mark.parametrize("page", [page for page in RUN if blocks(page)], ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_in_order(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), names)
