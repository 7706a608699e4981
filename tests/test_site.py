"""The site: code of its pages runs, every public name is in the reference, and errors name places that exist."""

import ast
import importlib
import inspect
import re
import textwrap
import traceback
import types
from pathlib import Path

import pytest

import mechsafety as ms

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


# --- the reference ----------------------------------------------------------------------------------------------------


def documented(module: str) -> set[str]:
    """The names of a module that its page documents: those that it lists, or all that the module exports."""
    page = DOCS / "reference" / f"{module}.md"
    (options,) = re.findall(
        rf"^\.\. automodule:: mechsafety\.{module}\n((?:   .*\n)*)```$", page.read_text(), flags=re.M
    )
    listed = re.search(r":members: (.+)", options)
    if listed:
        return set(listed[1].split(", "))
    room = importlib.import_module(f"mechsafety.{module}")
    return set(getattr(room, "__all__", ())) or {
        name
        for name, value in vars(room).items()
        if getattr(value, "__module__", None) == room.__name__ and not name.startswith("_")
    }


REFERENCE = sorted(page.stem for page in (DOCS / "reference").glob("*.md") if page.stem != "index")


def test_every_room_has_a_page_of_the_reference():
    packages = {path.parent.name for path in Path(ms.__file__).parent.glob("*/__init__.py")}
    rooms = {name for name in ms.__all__ if isinstance(getattr(ms, name), types.ModuleType)}
    # shipped adapters are data
    assert (packages - {"adapters"}) | rooms <= set(REFERENCE)
    index = (DOCS / "reference" / "index.md").read_text()
    assert sorted(re.findall(r"^\| \[`mechsafety\.(\w+)`\]\(\1\.md\)", index, flags=re.M)) == REFERENCE


@pytest.mark.parametrize("module", REFERENCE)
def test_every_documented_name_is_there_and_has_a_docstring(module):
    room = importlib.import_module(f"mechsafety.{module}")
    names = documented(module)
    assert names and {name for name in names if not hasattr(room, name)} == set()
    bare = [name for name in names if inspect.isroutine(getattr(room, name)) or inspect.isclass(getattr(room, name))]
    assert [name for name in bare if not inspect.getdoc(getattr(room, name))] == []


def test_the_index_of_the_reference_says_where_every_name_of_the_top_is():
    index = (DOCS / "reference" / "index.md").read_text()
    said = dict(re.findall(r"^\| `ms\.(\w+)` \| \[`mechsafety\.(\w+)`\]\(\2\.md\) \|$", index, flags=re.M))
    top = {name for name in ms.__all__ if name != "__version__" and not isinstance(getattr(ms, name), types.ModuleType)}
    assert set(said) == top
    assert [name for name, module in said.items() if name not in documented(module)] == []


# --- errors and sources -----------------------------------------------------------------------------------------------


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in found}


def test_places_that_errors_name_exist_and_every_place_is_named():
    named = {inspect.signature(ms.NoRefusal).parameters["page"].default}
    for path in Path(ms.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("MechsafetyError", "NoRefusal"):
                named |= {word.value.value for word in node.keywords if word.arg == "page"}
    assert named == headings(DOCS / "errors.md") - {"errors", "what-every-kind-of-bad-input-gets"}


def test_an_error_names_its_place_below_a_message_of_one_line():
    error = ms.NoRefusal("the model refuses 0% of 8 prompts", hint="use a model that refuses")
    assert str(error) == "the model refuses 0% of 8 prompts; use a model that refuses"
    assert error.page == "no-refusal"
    assert traceback.format_exception(error)[-2:] == [
        f"mechsafety.errors.NoRefusal: {error}\n",
        "causes and remedies: docs/errors.md#no-refusal\n",
    ]
    plain = ms.MechsafetyError("top=0", expected="at least 1")
    assert plain.page == "" and not hasattr(plain, "__notes__")


def test_the_bibliography_has_every_paper_that_is_named():
    listed = set(re.findall(r"^- \*\*(.+?)\*\*: ", (DOCS / "bibliography.md").read_text(encoding="utf-8"), flags=re.M))
    assert sorted(listed) and len(listed) >= 40
    known = {(one.split()[0].rstrip(","), one.split()[-1]) for one in listed}
    name = r"\b([A-Z][\w-]+)(?: et al\.|,? [A-Z][a-z]+,? and [A-Z][a-z]+| and [A-Z][a-z]+),? \(?((?:19|20)\d\d)\b"
    sources = [*Path(ms.__file__).parent.rglob("*.py"), *DOCS.glob("*.md")]
    sources += [page for folder in ("methods", "concepts", "howto") for page in (DOCS / folder).glob("*.md")]
    named: dict[tuple[str, str], str] = {}
    for path in sources:
        # the circuits' paper of Wang et al. is of 2022 as a preprint and of 2023 at a conference
        text = re.sub(r"\s+", " ", path.read_text(encoding="utf-8")).replace("Wang et al. (2023)", "Wang et al. 2022")
        named |= {tuple(found): path.name for found in re.findall(name, text)}
    assert len(named) >= 30
    assert {found: page for found, page in named.items() if found not in known} == {}


def test_every_page_is_in_a_menu():
    """What Sphinx would refuse as a page that no menu leads to; its own check takes a build."""
    text = "\n".join((DOCS / name).read_text(encoding="utf-8") for name in ("index.md", "methods.md"))
    pages = [DOCS / name for name in ("errors.md", "bibliography.md", *(page.name for page in DOCS.glob("*.md")))]
    pages += [page for folder in ("howto", "concepts", "methods", "results") for page in (DOCS / folder).glob("*.md")]
    left = [page for page in pages if page.name != "index.md" and f"({page.relative_to(DOCS)})" not in text]
    notebooks = [page for page in (ROOT / "notebooks").glob("*.ipynb") if f"(../notebooks/{page.name})" not in text]
    assert left == [] and notebooks == []
