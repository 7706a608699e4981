"""What a page is: the record that it is drawn from, and how its text and its figures come out of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from mechsafety.output import write_text
from mechsafety.viz import layout_png
from mechsafety.viz.marks import Layout
from pages.records import Record, load

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
# files name neither the program's version nor the day, so that the same figure has the same bytes
SAVING: Mapping[str, Mapping[str, Any]] = {
    ".png": {"dpi": 110, "metadata": {"Software": None}},
    ".svg": {"bbox_inches": "tight", "metadata": {"Date": None}},
}
# pixels of a circuit's picture
WIDTH = 1200


@dataclass(frozen=True, slots=True)
class Page:
    """A page that is drawn from a stored record.

    Attributes:
        name: The page's name; its template is ``templates/NAME.md.j2``.
        context: What the template is given: sentences, tables and numbers of the record.
        figures: Figures of the record by file.
        file: The page itself; ``NAME.md`` by default.
        source: The record; ``NAME.json`` by default.
        folder: Where files are, unless a method is told otherwise; their names are relative to it.
        completed: The record with what it needs beside its file, or with older words replaced.
    """

    name: str
    context: Callable[[Record], Mapping[str, Any]]
    figures: Callable[[Record], Mapping[str, Figure | Layout]] = lambda record: {}
    file: str = ""
    source: str = ""
    folder: Path = RESULTS
    completed: Callable[[Record, Path], Record] = lambda record, folder: record

    def path(self, folder: Path | None = None) -> Path:
        """The page's file."""
        return (folder or self.folder) / (self.file or f"{self.name}.md")

    def stored(self, folder: Path | None = None) -> Path:
        """The record's file."""
        return (folder or self.folder) / (self.source or f"{self.name}.json")

    def read(self, folder: Path | None = None) -> Record:
        """The record."""
        return self.completed(load(self.stored(folder)), folder or self.folder)

    def text(self, record: Record) -> str:
        """The page in Markdown.

        Raises:
            PageError: The record misses something that the page shows, or does not carry what it says.
        """
        return TEMPLATES.get_template(f"{self.name}.md.j2").render(self.context(record))

    def draw(self, folder: Path | None = None) -> None:
        """Write the page and its figures."""
        record = self.read(folder)
        text = self.text(record)
        for name, picture in self.figures(record).items():
            save(picture, (folder or self.folder) / name)
        write_text(self.path(folder), text)


def save(picture: Figure | Layout, path: Path) -> None:
    """Write a figure: the same picture gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(picture, Layout):
        layout_png(picture, path, dpi=96 * WIDTH / picture.width)
        return
    with matplotlib.rc_context({"svg.hashsalt": "mechsafety"}):
        picture.savefig(path, **SAVING[path.suffix])
