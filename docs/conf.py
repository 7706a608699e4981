"""Settings of Sphinx for the site: ``make docs``.

The source folder is the repository itself, so that a relative link in a Markdown page leads to the same place on a code
host and on the site. Nothing is fetched from a network.
"""

import posixpath
import re
import shutil
import sys
from pathlib import Path

import nbformat
from docutils import nodes
from plotly.offline import get_plotlyjs
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python._object import PyObject
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from notebook_pages import with_charts  # noqa: E402

from mechsafety.version import __version__  # noqa: E402

project = "mechsafety"
author = "The mechsafety authors"
copyright = "The mechsafety authors, MIT license"
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "notebooks/*.ipynb",
    "notebooks/exercises/*.ipynb",
    "benchmarks/*.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]

# Markdown as a code host reads it: every heading is an anchor. A notebook shows what is stored in it.
myst_heading_anchors = 6
nb_execution_mode = "off"
# a page may begin with worked examples of the third rank; a widget has a stored picture beside it
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]

# the reference: signatures from the annotations, everything else from the docstrings
autodoc_member_order = "bysource"  # of a room: the order of its __all__
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"
default_role = "py:obj"
nitpicky = True

templates_path = ["_templates"]
html_theme = "furo"
html_title = "mechsafety"
smartquotes = False  # messages and code are quoted as they are
html_show_sourcelink = False
html_additional_pages = {"index": "redirect.html"}
# pages that are complete as they are; they keep their place, so that a relative link leads to them
COMPLETE = ("docs/explorable.html",)

# pages whose links are the site's menu, so that a list of pages is written once, and the folder of these pages; those
# of the root are in sections
MENUS = {
    "docs/methods": "docs/methods/",
    "docs/reference/index": "docs/reference/",
    "docs/exercises": "notebooks/exercises/",
}
LINK = re.compile(r"\]\(([^)#\s]+)\.(?:md|ipynb)(?:#[^)]*)?\)")


def linked_pages(docname: str, text: str) -> list[str]:
    """Pages that a text links to: those that begin a list's item or a table's row first, then those in its prose."""
    rows = "\n".join(re.findall(r"^[|-] +\[.+$", text, flags=re.M))
    targets = [*LINK.findall(rows), *LINK.findall(text)]
    pages = (posixpath.normpath(posixpath.join(posixpath.dirname(docname), target)) for target in targets)
    return list(dict.fromkeys(pages))


def add_menu(app: Sphinx, docname: str, content: list[str]) -> None:
    """Put what the root or a page of `MENUS` links to below it in the menu; links to folders have no target here."""
    content[0] = re.sub(r"\[([^\]]+)\]\([^)\s]+/\)", r"\1", content[0])
    if docname == root_doc:
        parts = re.split(r"^## +(.+)$", content[0], flags=re.M)[1:]
        menus = [
            (f":caption: {title}", linked_pages(docname, body)) for title, body in zip(*[iter(parts)] * 2, strict=True)
        ]
    elif docname in MENUS:
        pages = linked_pages(docname, content[0])
        menus = [("", [page for page in pages if page.startswith(MENUS[docname])])]
    else:
        return
    for caption, pages in menus:
        lines = [f"/{page}" for page in pages if page in app.env.found_docs and page != docname]
        content[0] += "\n".join(["", "```{toctree}", ":hidden:", caption, "", *lines, "```", ""])


def show_charts(app: Sphinx, docname: str, content: list[str]) -> None:
    """Show the charts of a notebook, which are stored as plotly's own mime type, by the copy of plotly.js below."""
    if docname.startswith("notebooks/"):
        notebook = nbformat.reads(content[0], 4)
        content[0] = nbformat.writes(with_charts(notebook, '<script src="../_static/plotly.min.js"></script>'))


def add_plotly(app: Sphinx, error: Exception | None) -> None:
    """Put plotly.js beside the site's own scripts, so that charts need no network."""
    if error is None and app.builder.format == "html":
        (Path(app.outdir) / "_static" / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")


def keep_names_together(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Write ``a, b: text`` of a docstring as one field; its space would make a type of the first name."""
    for k, line in enumerate(lines):
        if found := re.match(r":(?:param|ivar) [\w*]+(?:, [\w*]+)+:", line):
            lines[k] = found[0].replace(", ", ",\u200b") + line[found.end() :]


def link_by_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element) -> nodes.Node | None:
    """Link a name of a docstring or an annotation to where it is documented, whatever module it was written in.

    Names that the reference does not have stay plain: parameters, other libraries' types, and the names of axes.
    """
    if node.get("refdomain") != "py":
        return None
    objects = env.domains.python_domain.objects
    target = node["reftarget"].strip("'")
    name = target.removeprefix("mechsafety.").split(".")
    for tail in (".".join(name), name[-1] if target.startswith("mechsafety.") else ""):
        found = [full for full in objects if tail and (full == tail or full.endswith("." + tail))]
        if found:
            full = min(found, key=lambda one: (one.count("."), one))
            place = objects[full]
            return make_refnode(app.builder, node["refdoc"], place.docname, place.node_id, contnode, full)
    return contnode


def copy_complete_pages(app: Sphinx, error: Exception | None) -> None:
    """Put the pages of `COMPLETE` beside those that Sphinx wrote."""
    if error is None and app.builder.format == "html":
        for page in COMPLETE:
            shutil.copyfile(ROOT / page, Path(app.outdir) / page)


def setup(app: Sphinx) -> None:
    """Register the functions above; attributes in a docstring are no links to others of the same name."""
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.rolename, field.label = "", "Attributes"
    app.connect("source-read", add_menu)
    app.connect("source-read", show_charts)
    app.connect("build-finished", add_plotly)
    app.connect("autodoc-process-docstring", keep_names_together, priority=900)  # after napoleon
    app.connect("missing-reference", link_by_name)
    app.connect("build-finished", copy_complete_pages)
