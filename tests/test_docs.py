"""The documentation: links lead somewhere, and the glossary has every word in its place."""

import json
import re
from functools import cache
from pathlib import Path

import pytest

from mechsafety.circuits.circuit import NODE_STATUS, ROLES
from mechsafety.circuits.levels import LEVELS
from mechsafety.nodes import KINDS as NODE_KINDS
from mechsafety.nodes import SLOTS
from mechsafety.prompts.spans import SPANS
from mechsafety.replies import KINDS as REPLY_KINDS

ROOT = Path(__file__).parents[1]
METHODS = (ROOT / "docs" / "methods.md", *sorted((ROOT / "docs" / "methods").glob("*.md")))
GLOSSARY = ROOT / "docs" / "glossary.md"
WRITTEN = (*(ROOT / name for name in ("README.md", "CONTRIBUTING.md")), *sorted((ROOT / "docs").rglob("*.md")))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SLOT_NAMES = sorted({slot for slots in SLOTS.values() for slot in slots})
VERDICTS = ("holds", "holds by construction", "fails", "undecided", "not measured")


@cache
def prose(page: Path) -> str:
    """A page without its code; of a notebook the text cells."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = (cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


@cache
def anchors(page: Path) -> set[str]:
    """What a link to a page can name: its headings as GitHub writes them, and anchors of its own."""
    found: list[str] = re.findall(r'<a (?:id|name)="([^"]+)"', prose(page))
    for heading in re.findall(r"^#+ +(.+?) *$", prose(page), flags=re.M):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{sum(one == slug for one in found)}")
    return set(found)


@pytest.mark.parametrize("page", [*WRITTEN, *NOTEBOOKS], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{page.name}: {target} does not exist"
        if anchor and place.suffix == ".md":
            assert anchor in anchors(place), f"{page.name}: {target} is no heading there"


def test_methods_lead_to_every_page_and_back():
    index = prose(METHODS[0])
    for page in METHODS[1:]:
        assert f"(methods/{page.name})" in index, page.name
        assert "[Methods](../methods.md)" in prose(page) and "[Glossary](../glossary.md)" in prose(page), page.name


def entries() -> list[tuple[str, str]]:
    """The glossary's terms, each with what it says in brackets to tell two of them apart."""
    lines = [line for line in GLOSSARY.read_text(encoding="utf-8").splitlines() if line.startswith("- ")]
    found = []
    for line in lines:
        entry = re.fullmatch(r"- \*\*(.+?)\*\*(?: \((.+?)\))?: .+", line)
        assert entry, f"no entry: {line}"
        found.append((entry[1].strip("`").casefold(), entry[2] or ""))
    return found


def test_the_glossary_is_in_order_and_says_each_word_once():
    found = entries()
    assert found == sorted(set(found))
    body = GLOSSARY.read_text(encoding="utf-8").split("\n- ", 1)[1]
    assert all(line.startswith("- ") for line in body.splitlines()[1:]), "one line each"


@pytest.mark.parametrize(
    "names", [ROLES, NODE_STATUS, LEVELS, REPLY_KINDS, NODE_KINDS, SLOT_NAMES, SPANS, VERDICTS], ids=" ".join
)
def test_the_glossary_has_every_name_of_the_code(names):
    known = {term for term, _ in entries()}
    assert not [name for name in names if name not in known]


@pytest.mark.parametrize("page", [*METHODS, GLOSSARY], ids=lambda page: page.name)
def test_pages_say_it_in_the_words_of_the_field(page):
    private = r"\b(twins?|dose|doses|cure|asked for|prompt's column|stand-ins?)\b"
    assert not re.findall(private, prose(page))
