"""Examples in docstrings: every name of the reference has one that shows it, and the ready names stand on its page.

That the examples run is tested by running them (``--doctest-modules``); the root's conftest.py makes their names.
"""

import ast
import doctest
import functools
import importlib
import inspect
import re
from pathlib import Path

import pytest

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
PAGES = sorted(page for page in REFERENCE.glob("*.md") if page.name != "index.md")
# names for annotations, constants and modules, which have no docstring of their own
WITHOUT = {"Align", "PromptLike", "FILES", "checks"}


@functools.cache
def documented():
    """Every documented object by page and name: the members that the page lists, or all public ones of its module."""
    found = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name, options in re.findall(r"automodule:: (\S+)\n((?: +:.*\n)*)", text):
            module = importlib.import_module(name)
            listed = re.search(r":members: (.+)", options)
            own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == name]
            names = listed[1].split(", ") if listed else getattr(module, "__all__", own)
            found |= {(name, key): getattr(module, key) for key in names if not key.startswith("_")}
    return {key: value for key, value in found.items() if key[1] not in WITHOUT}


def example_of(thing):
    """Code and output of the examples in an object's own docstring."""
    parsed = doctest.DocTestParser().get_examples(inspect.cleandoc(vars(thing).get("__doc__") or thing.__doc__ or ""))
    return "\n".join(part for one in parsed for part in (one.source, one.want))


@functools.cache
def givers():
    """Functions, methods and fields by each class that their annotations say they give."""
    found = {}

    def note(name, hint):
        for word in re.findall(r"\w+", str(hint)):
            found.setdefault(word, set()).add(name)

    for thing in documented().values():
        if inspect.isfunction(thing):
            note(thing.__name__, inspect.signature(thing).return_annotation)
        elif inspect.isclass(thing):
            for name, hint in inspect.get_annotations(thing).items():
                note(name, hint)
            for name, value in vars(thing).items():
                function = getattr(value, "fget", None) or getattr(value, "__func__", value)
                if inspect.isfunction(function):
                    note(name, inspect.signature(function).return_annotation)
    return found


def shows(text, name, thing, ready):
    """Whether an example has the name; for a class, whether it or the code of a ready name uses what gives it."""
    words = set(re.findall(r"\w+", text))
    if inspect.isclass(thing) and name not in words:
        code = [ready.paragraphs[ready.makers[word]] for word in words & ready.makers.keys()]
        return bool(givers().get(name, set()) & {*words, *re.findall(r"\w+", "\n".join(code))})
    return name in words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_public_name_has_an_example_that_shows_it(page, ready_names):
    room = re.search(r"automodule:: (\S+)", page.read_text(encoding="utf-8"))[1]
    things = {name: thing for (module, name), thing in documented().items() if module == room}
    assert things
    examples = {name: example_of(thing) for name, thing in things.items()}
    assert [name for name, text in examples.items() if not text] == []
    assert [name for name, text in examples.items() if not shows(text, name, things[name], ready_names)] == []


def test_no_public_docstring_has_an_example_that_is_not_run():
    left = [".".join(key) for key, thing in documented().items() if "Example::" in (thing.__doc__ or "")]
    assert left == []


def test_no_example_is_skipped():
    assert [key for key, thing in documented().items() if "+SKIP" in (thing.__doc__ or "")] == []


def used_names():
    """Names that the examples of the package read without making them."""
    from mechsafety import __file__ as root

    names = set()
    for path in Path(root).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                examples = doctest.DocTestParser().get_examples(ast.get_docstring(node) or "")
                names |= {
                    one.id for e in examples for one in ast.walk(ast.parse(e.source)) if isinstance(one, ast.Name)
                }
    return names


def test_the_page_describes_the_ready_names_and_examples_use_each(ready_names):
    described, made = set(ready_names.table), set(ready_names.makers)
    assert described <= made
    assert described <= used_names()


def test_the_code_on_the_page_makes_its_names_in_order(ready_names):
    """Pasted as it stands, it works: each paragraph uses names of itself or of earlier paragraphs."""
    known = set()
    for text in ready_names.paragraphs:
        assert ready_names.read(text) <= known, text
        known |= ready_names.made(text)
