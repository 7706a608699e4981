"""What each piece of Python in README.md costs, in seconds on this machine: docs/results/readme-times.json.

The pieces of a section run in order in one process, as a reader pastes them, and each statement has its seconds. They
run in a folder of their own. There, the model and the pairs that the README calls path/to/model and pairs.jsonl are
the demo model and its built-in test pairs. Seconds of a piece include what is loaded on first use.

Run on an idle machine: python scripts/time_readme.py, or with headings of sections to run these alone
"""

import argparse
import ast
import contextlib
import io
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
OUT = ROOT / "docs" / "results" / "readme-times.json"
# what the README leaves to the reader, and what the demo model puts there
GIVEN = {'"path/to/model"': '"demo"'}


@dataclass(frozen=True)
class Timed:
    """One statement of a piece, and its seconds."""

    section: str
    piece: int
    statement: str
    seconds: float


def pieces(text: str) -> dict[str, list[str]]:
    """Blocks of Python of each section of a page, by its heading; sections without any are left out."""
    sections = re.split(r"^## (.+)$", text, flags=re.M)[1:]
    found = {
        heading: re.findall(r"^```python\n(.*?)^```", body, flags=re.S | re.M)
        for heading, body in zip(sections[::2], sections[1::2], strict=True)
    }
    return {heading: blocks for heading, blocks in found.items() if blocks}


def statements(piece: str) -> list[tuple[str, str]]:
    """Statements of a piece: the first line as it is printed, and the code."""
    parsed = ast.parse(piece).body
    return [(ast.unparse(one).split("\n")[0], ast.unparse(one)) for one in parsed]


def timed(sections: Mapping[str, list[str]], given: Mapping[str, str], names: dict[str, Any]) -> Iterable[Timed]:
    """Run all pieces in order in one namespace.

    Args:
        sections: Pieces of code by section.
        given: What takes the place of what in the code.
        names: The namespace.
    """
    for section, blocks in sections.items():
        for number, block in enumerate(blocks, 1):
            for shown, code in statements(block):
                for old, new in given.items():
                    code = code.replace(old, new).replace(old.replace('"', "'"), new)
                begin = time.perf_counter()
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(compile(code, section, "exec"), names)
                yield Timed(section, number, shown, time.perf_counter() - begin)


def table(found: Iterable[Timed], least: float = 1.0) -> str:
    """Markdown: seconds of each piece, and of each of its statements that takes some."""
    lines = ["| section | statement | seconds |", "| --- | --- | --- |"]
    by_piece: dict[tuple[str, int], list[Timed]] = {}
    for one in found:
        by_piece.setdefault((one.section, one.piece), []).append(one)
    for (section, number), parts in by_piece.items():
        lines.append(f"| {section} ({number}) | **all** | {sum(one.seconds for one in parts):.0f} |")
        lines += [f"| | `{one.statement}` | {one.seconds:.0f} |" for one in parts if one.seconds >= least]
    return "\n".join(lines)


def write_pairs(path: Path) -> None:
    """The demo model's test pairs, as the README's pairs.jsonl."""
    import mechsafety as ms

    rows = ({"harmful": pair.harmful, "harmless": pair.harmless} for pair in ms.PromptPairs.builtin("test"))
    path.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help="headings; all by default. A section needs those before it.")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    sections = pieces(README.read_text(encoding="utf-8"))
    if unknown := set(args.sections) - set(sections):
        parser.error(f"README.md has no Python under {sorted(unknown)}; it has {list(sections)}")
    chosen = {heading: sections[heading] for heading in sections if not args.sections or heading in args.sections}
    sys.path.append(str(ROOT / "benchmarks"))
    from run import here

    out = args.out.resolve()
    names: dict[str, Any] = {"__name__": "readme"}
    exec("import mechsafety as ms", names)
    found = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_pairs(Path("pairs.jsonl"))
        for one in tqdm(timed(chosen, GIVEN, names), desc="statements"):
            found.append(one)
            load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
            record = {**here(), "load": load, "statements": [asdict(each) for each in found]}
            out.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
