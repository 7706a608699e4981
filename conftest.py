"""Ready names for the examples in docstrings.

The names and the code that makes them stand in docs/reference/index.md, under "Names in examples". An example gets the
names that it uses. Each is made once per process, when the first example uses it.
"""

import ast
import builtins
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parent / "docs" / "reference" / "index.md"


class ReadyNames:
    """Names that are made by the paragraphs of a page's code, each when it is needed.

    Args:
        page: Text of the page.
    """

    def __init__(self, page: str) -> None:
        section = page.split("\n## Names in examples\n")[1]
        (code,) = re.findall(r"^```python\n(.*?)^```", section, flags=re.S | re.M)
        self.paragraphs = code.strip().split("\n\n")
        self.makers = {name: place for place, text in enumerate(self.paragraphs) for name in self.made(text)}
        self.table = re.findall(r"`(\w+)`(?=[^|\n]*\|[^|\n]*\|\n)", section)
        self._space: dict[str, Any] = {}
        self._run: set[int] = set()

    @staticmethod
    def made(text: str) -> set[str]:
        """Names that code makes."""
        names: set[str] = set()
        for statement in ast.parse(text).body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                names |= {alias.asname or alias.name for alias in statement.names}
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    names.add(node.id)
        return names

    @staticmethod
    def read(source: str) -> set[str]:
        """Names that code reads before it has made them itself."""
        bound, found = set(dir(builtins)), set()
        for statement in ast.parse(source).body:
            nodes = list(ast.walk(statement))
            names = [node for node in nodes if isinstance(node, ast.Name)]
            assigned = {node.id for node in names if isinstance(node.ctx, ast.Store)}
            # a plain assignment reads its right side first; every other statement binds its names before they are read
            targets = statement.targets if isinstance(statement, ast.Assign) else []
            later = {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
            inside = (assigned - later) | {node.arg for node in nodes if isinstance(node, ast.arg)}
            found |= {node.id for node in names if isinstance(node.ctx, ast.Load)} - bound - inside
            bound |= assigned | {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
            for node in nodes:
                if isinstance(node, ast.Import | ast.ImportFrom):
                    bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        return found

    def of(self, source: str) -> dict[str, Any]:
        """The ready names that code uses, with their values."""
        used = self.read(source) & self.makers.keys()
        for name in sorted(used):
            self._make(self.makers[name])
        return {name: self._space[name] for name in used}

    def _make(self, place: int) -> None:
        if place in self._run:
            return
        for name in self.read(self.paragraphs[place]):
            self._make(self.makers[name])
        exec(self.paragraphs[place], self._space)
        self._run.add(place)


@pytest.fixture(scope="session")
def ready_names() -> ReadyNames:
    """The names of docs/reference/index.md."""
    return ReadyNames(PAGE.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def _ready_names(request: pytest.FixtureRequest) -> Iterator[None]:
    if not isinstance(request.node, pytest.DoctestItem) or request.node.dtest is None:
        yield
        return
    space = request.getfixturevalue("doctest_namespace")
    source = "".join(example.source for example in request.node.dtest.examples)
    space.update(request.getfixturevalue("ready_names").of(source))
    yield
    # the next example's module may have a global of the same name
    space.clear()
