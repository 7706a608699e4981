"""Where a name stands that the package itself does not have."""

import ast
import difflib
from functools import cache
from pathlib import Path


def missing(name: str) -> str:
    """The line for a name that does not stand directly in the package: its room, or the nearest names.

    Example:
        >>> from mechsafety.names import missing
        >>> missing("describe_nodes")
        "mechsafety has no attribute 'describe_nodes'; use mechsafety.attribution.describe_nodes"
    """
    said = f"mechsafety has no attribute {name!r}"
    known = _names()
    near = [name] if name in known else difflib.get_close_matches(name, known, n=1)
    return f"{said}; use {known[near[0]]}" if near else said


@cache
def _names() -> dict[str, str]:
    """Every public name with its full address, read from the source, so that no room is imported for an error."""
    here, found = Path(__file__).parent, dict[str, str]()
    folders = [here, *sorted(path.parent for path in here.glob("*/__init__.py"))]
    for folder in folders:
        room = ".".join(("mechsafety", *folder.relative_to(here).parts))
        stub = folder / "__init__.pyi"
        tree = ast.parse((stub if stub.is_file() else folder / "__init__.py").read_text(encoding="utf-8"))
        for line in tree.body:
            for alias in line.names if isinstance(line, ast.ImportFrom) else ():
                name = alias.asname or alias.name
                if not name.startswith("_"):
                    found.setdefault(name, f"{room}.{name}")
    return found
