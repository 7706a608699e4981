"""The circuit as a vector PDF, drawn by matplotlib: no browser, no global figure state."""

import os
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.errors import MechsafetyError
from mechsafety.viz.layout import layout_circuit
from mechsafety.viz.marks import Label, Layout, Shape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INCH, POINT = 96.0, 0.75  # pixels an inch, points a pixel
NARROWER = 0.9  # DejaVu Sans runs wider than the fonts the layout reckons with
SETTINGS: Any = {"pdf.fonttype": 42, "pdf.compression": 6, "path.simplify": False, "text.usetex": False}


def circuit_pdf(circuit: RefusalCircuit, path: str | os.PathLike[str]) -> FilePath:
    """Write the picture to the file ``path``; the same circuit gives the same bytes.

    Raises:
        MechsafetyError: The folder of ``path`` does not exist, or the circuit lists a node twice.
    """
    import matplotlib
    from matplotlib.backends.backend_pdf import FigureCanvasPdf

    target = FilePath(path)
    if not target.parent.is_dir():
        raise MechsafetyError(f"no such folder: {target.parent}", expected="an existing folder to write into")
    with matplotlib.rc_context(SETTINGS):
        figure = layout_figure(layout_circuit(circuit))
        metadata = {"CreationDate": None, "Creator": "mechsafety", "Producer": "matplotlib", "Title": "Refusal circuit"}
        FigureCanvasPdf(figure).print_pdf(str(target), metadata=metadata)
    return target


def layout_figure(layout: Layout) -> "Figure":
    """The picture as a matplotlib figure of its own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(layout.width / INCH, layout.height / INCH))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, layout.width)
    axes.set_ylim(layout.height, 0)
    axes.axis("off")
    for shape in [*layout.backdrop, *(mark.shape for mark in layout.edges)]:
        _draw(axes, shape)
    for mark in layout.nodes:
        _draw(axes, mark.shape)
    for label in [*layout.labels, *(mark.label for mark in layout.nodes if mark.label)]:
        _write(axes, label)
    return figure


def _draw(axes: Any, shape: Shape) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    codes: list[Any] = []
    points: list[tuple[float, float]] = []
    for letter, values in shape.commands:
        pairs = [(values[i], values[i + 1]) for i in range(0, len(values), 2)] or [(0.0, 0.0)]
        code = {"M": Path.MOVETO, "L": Path.LINETO, "C": Path.CURVE4, "Z": Path.CLOSEPOLY}[letter]
        codes += [code] * len(pairs)
        points += pairs
    axes.add_patch(
        PathPatch(
            Path(points, codes),
            facecolor=shape.fill or "none",
            edgecolor=shape.stroke or "none",
            linewidth=shape.width * POINT if shape.stroke else 0,
            linestyle=(0, (5 / shape.width, 3 / shape.width)) if shape.dashed else "solid",
            alpha=shape.opacity,
            capstyle="butt",
        )
    )


def _write(axes: Any, label: Label) -> None:
    anchors = {"start": "left", "middle": "center", "end": "right"}
    axes.text(
        label.x,
        label.y,
        _drawable(label.text),
        fontsize=label.size * POINT * NARROWER,
        color=label.colour,
        fontweight="bold" if label.bold else "normal",
        family="DejaVu Sans",
        ha=anchors[label.anchor],
        va="baseline",
        parse_math=False,
    )


def _drawable(text: str) -> str:
    """Characters that the bundled font lacks become question marks."""
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont("DejaVu Sans")).get_charmap()
    return "".join(char if ord(char) in known else "?" for char in text)
