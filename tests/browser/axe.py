"""Checks of a page's accessibility by axe-core: the package axe-core-python, or the script that $AXE names."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

SERIOUS = ("serious", "critical")
RUN = """axe.run(document, {iframes: false}).then(found => found.violations.map(one =>
    [one.impact, one.id, one.nodes.map(node => node.target.join(" ") + ": " + node.failureSummary).slice(0, 4)]))"""


def axe_script() -> str:
    """axe-core's script; a test that asks for it is skipped where there is none."""
    spec = importlib.util.find_spec("axe_core_python")
    folder = next(iter(spec.submodule_search_locations or []), "") if spec else ""
    path = Path(os.environ.get("AXE") or Path(folder) / "axe.min.js")
    if not path.is_file():
        pytest.skip("no axe-core: pip install axe-core-python, or set AXE to the path of axe.min.js")
    return path.read_text(encoding="utf-8")


def serious_violations(page: Any, script: str) -> list[Any]:
    """The serious and critical violations of a page and of each of its frames."""
    found = []
    for frame in page.frames:
        frame.evaluate(script)
        found += [row for row in frame.evaluate(RUN) if row[0] in SERIOUS]
    return found
