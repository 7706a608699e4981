"""The course: each ``notebooks/sources/NN_title.py`` is executed and stored as ``notebooks/NN_title.ipynb``.

python scripts/notebooks.py [NN ...] [--prose | --html FOLDER]

Sources are jupytext's percent scripts. Without numbers, all notebooks are built. What is stored says nothing of the
machine or the time, so that building again changes the outputs that changed and nothing more.

Two options execute nothing. ``--prose`` stores changed text beside the outputs of code that is the same. ``--html``
writes the stored notebooks as pages that open without network, with their charts alive.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from notebook_pages import notebook_page

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
SOURCES = NOTEBOOKS / "sources"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "pygments_lexer": "ipython3",
    },
}
WIDGET = "application/vnd.jupyter.widget-view+json"


def sources(numbers: list[str] | None = None) -> list[Path]:
    """The sources in order; with numbers ("03") these alone."""
    found = sorted(SOURCES.glob("[0-9][0-9]_*.py"))
    if not numbers:
        return found
    unknown = set(numbers) - {path.name[:2] for path in found}
    if unknown:
        sys.exit(f"no source of notebook {', '.join(sorted(unknown))} in {SOURCES.relative_to(ROOT)}")
    return [path for path in found if path.name[:2] in numbers]


def stored(source: Path) -> Path:
    """Where a source's notebook is stored."""
    return NOTEBOOKS / f"{source.stem}.ipynb"


def read(path: Path) -> NotebookNode:
    """A source as a notebook without outputs, or a stored notebook as it is."""
    if path.suffix == ".ipynb":
        return nbformat.read(path, 4)
    notebook = jupytext.read(path, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for k, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{k:02d}", NotebookNode()
    return notebook


def execute(source: Path, seconds: int = 600) -> NotebookNode:
    """The notebook of a source with its outputs, from a fresh kernel in an empty folder.

    Args:
        source: The source.
        seconds: What one cell may take.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raised.
    """
    notebook = read(source)
    cells = [(cell.id, dict(cell.metadata)) for cell in notebook.cells]
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=seconds,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,
            store_widget_state=False,
        )
        client.execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell, (name, metadata) in zip(notebook.cells, cells, strict=True):
        cell.id, cell.metadata = name, nbformat.from_dict(metadata)
        if cell.cell_type == "code":
            # a progress bar is gone when its work is done
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    return notebook


def kinds(cell: NotebookNode) -> list[tuple[str, ...]]:
    """What sorts of outputs a cell has: the name of a stream, or the mime types of a result."""
    return [
        (output.name,) if output.output_type == "stream" else tuple(sorted(output.get("data", {})))
        for output in cell.get("outputs", [])
    ]


def build(source: Path) -> str:
    """Execute a source, store its notebook and say how long that took: on the clock, and on the processor."""
    start, used = time.perf_counter(), processor_seconds()
    notebook = execute(source, seconds=3600)  # a busy machine may take long
    said = f"{time.perf_counter() - start:.0f} s, of processors {processor_seconds() - used:.0f} s"
    nbformat.validate(notebook)
    nbformat.write(notebook, stored(source))
    return said


def processor_seconds() -> float:
    """What this process's children that have ended used of all processors; a busy machine does not change it much."""
    used = os.times()
    return used.children_user + used.children_system


def reword(source: Path) -> None:
    """Store the prose of a source beside the outputs of an earlier build, whose code must be the same."""
    told, kept = read(source), read(stored(source))
    code, before = ([cell for cell in one.cells if cell.cell_type == "code"] for one in (told, kept))
    if [cell.source for cell in code] != [cell.source for cell in before]:
        sys.exit(f"{source.stem}: its code is not that of the stored notebook; build it without --prose")
    for new, old in zip(code, before, strict=True):
        new.outputs, new.execution_count = old.outputs, old.execution_count
    nbformat.write(told, stored(source))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", metavar="NN", help="numbers of notebooks, such as 03")
    parser.add_argument("--html", type=Path, metavar="FOLDER", help="write the stored notebooks as pages")
    parser.add_argument("--prose", action="store_true", help="store changed text beside the outputs of the same code")
    args = parser.parse_args()
    if args.prose:
        for source in sources(args.numbers):
            reword(source)
        return
    if args.html:
        args.html.mkdir(parents=True, exist_ok=True)
        for source in sources(args.numbers):
            (args.html / f"{source.stem}.html").write_text(notebook_page(stored(source)), encoding="utf-8")
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for source in sources(args.numbers):
        print(f"{source.stem}: {build(source)}", flush=True)


if __name__ == "__main__":
    main()
