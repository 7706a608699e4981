"""A layout as a vector PDF, as a PNG, or in axes of one's own, drawn by matplotlib: no browser, no global state."""

import os
from dataclasses import replace
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.errors import MechsafetyError
from mechsafety.output import output_file
from mechsafety.viz.fitting import fitted_sizes
from mechsafety.viz.fonts import WEIGHTS, drawable, families, family, lacking
from mechsafety.viz.layout import layout_circuit
from mechsafety.viz.look import Look
from mechsafety.viz.marks import EdgeMark, Label, Layout, NodeMark, Shape
from mechsafety.viz.style import PIXELS_PER_MM, SMALLEST_MM, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INCH, POINT = 96.0, 0.75  # pixels per inch, points per pixel
MM = INCH / PIXELS_PER_MM  # millimetres per inch
PICTURES = (".pdf", ".png", ".svg", ".tex", ".html", ".jpg", ".jpeg", ".gif", ".eps", ".webp")
SETTINGS: Any = {"pdf.fonttype": 42, "pdf.compression": 6, "path.simplify": False, "text.usetex": False}


def circuit_pdf(circuit: RefusalCircuit, path: str | os.PathLike[str], style: Style | None = None) -> FilePath:
    """Write the picture to the file ``path``, with embedded fonts; the same circuit gives the same bytes.

    Raises:
        MechsafetyError: As `layout_circuit` and `mechsafety.output.output_file`.

    Example:
        >>> ms.viz.circuit_pdf(circuit, folder / "circuit.pdf").name
        'circuit.pdf'
    """
    return layout_pdf(layout_circuit(circuit, style), path)


def layout_pdf(layout: Layout, path: str | os.PathLike[str]) -> FilePath:
    """Write any layout as `circuit_pdf` does.

    Example:
        >>> ms.viz.layout_pdf(ms.viz.role_diagram(circuit), folder / "roles.pdf").name
        'roles.pdf'
    """
    import matplotlib
    from matplotlib.backends.backend_pdf import FigureCanvasPdf

    _check_ending(path, ".pdf")
    with matplotlib.rc_context(SETTINGS), output_file(path) as target:
        figure = layout_figure(layout)
        metadata = {"CreationDate": None, "Creator": "mechsafety", "Producer": "matplotlib", "Title": layout.title}
        FigureCanvasPdf(figure).print_pdf(str(target), metadata=metadata)
    return FilePath(path)


def layout_png(layout: Layout, path: str | os.PathLike[str], *, dpi: float = 144) -> FilePath:
    """Write a layout as a bitmap, for places that cannot show vector graphics.

    Raises:
        MechsafetyError: As `mechsafety.output.output_file`.

    Example:
        >>> ms.viz.layout_png(ms.viz.role_diagram(circuit), folder / "roles.png", dpi=96).name
        'roles.png'
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    _check_ending(path, ".png")
    with matplotlib.rc_context(SETTINGS), output_file(path) as target:
        figure = layout_figure(layout)
        figure.set_dpi(dpi)
        FigureCanvasAgg(figure).print_png(str(target), metadata={"Software": "mechsafety"})
    return FilePath(path)


def circuit_png(
    circuit: RefusalCircuit, path: str | os.PathLike[str], style: Style | None = None, *, dpi: float = 144
) -> FilePath:
    """Write the picture as a bitmap, for slides and other places that cannot show vector graphics.

    Raises:
        MechsafetyError: As `circuit_pdf`.

    Example:
        >>> ms.viz.circuit_png(circuit, folder / "circuit.png").name
        'circuit.png'
    """
    return layout_png(layout_circuit(circuit, style), path, dpi=dpi)


def _check_ending(path: str | os.PathLike[str], ending: str) -> None:
    """Refuse the name of another kind of picture."""
    given = FilePath(path).suffix.lower()
    if given != ending and given in PICTURES:
        raise MechsafetyError(
            f"{FilePath(path).name!r} is no name of a {ending[1:].upper()}", expected=f"a name in {ending}"
        )


def draw_circuit(circuit: RefusalCircuit, ax: "Axes | None" = None, style: Style | None = None) -> "Axes":
    """Draw a circuit into axes of matplotlib, so that it can stand beside other panels of a figure.

    Args:
        circuit: The circuit.
        ax: Axes; the picture fits their present size (see ``width_mm`` of `Style`), so give the figure its size first.
            By default a figure of its own is made (``.figure`` of what is returned), without pyplot.
        style: Options of the picture.

    Returns:
        The axes.

    Raises:
        MechsafetyError: As `layout_circuit`; axes that are too small for any node are refused.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> figure, (left, right) = plt.subplots(1, 2, figsize=(7, 6))
        >>> axes = ms.viz.draw_circuit(circuit, left)
        >>> axes is left
        True
        >>> plt.close(figure)
    """
    style = style or Style()
    if ax is None:
        return layout_figure(layout_circuit(circuit, style)).axes[0]
    figure = ax.get_figure(root=True)
    assert figure is not None
    box = ax.get_position()
    width, height = (float(part) for part in figure.get_size_inches() * (box.width, box.height))
    if min(width, height) * MM < SMALLEST_MM:
        raise MechsafetyError(
            f"axes of {width * MM:.0f} x {height * MM:.0f} mm", expected=f"at least {SMALLEST_MM} mm each way"
        )
    layout = layout_circuit(circuit, replace(style, width_mm=width * MM, height_mm=height * MM))
    draw_layout(layout, ax, height * INCH)
    return ax


def layout_figure(layout: Layout) -> "Figure":
    """The picture as a matplotlib figure of its own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(layout.width / INCH, layout.height / INCH))
    draw_layout(layout, figure.add_axes((0.0, 0.0, 1.0, 1.0)), layout.height)
    return figure


def draw_layout(layout: Layout, axes: "Axes", height: float) -> None:
    """Draw a layout into axes of its width and of a height in pixels; the picture stands at their top.

    Raises:
        MechsafetyError: A text of the user's own has letters that no font here has.
    """
    _check_texts(layout.look)
    axes.set_xlim(0, layout.width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    marks: list[EdgeMark | NodeMark] = [*layout.edges, *layout.nodes]
    for shape in [*layout.backdrop, *(shape for mark in marks for shape in mark.shapes)]:
        _draw(axes, shape)
    sizes = fitted_sizes(layout)
    for label in [*layout.labels, *(label for mark in marks for label in mark.labels)]:
        _write(axes, label, sizes[label], layout.look.font)


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
            linestyle=(0, tuple(part / shape.width for part in shape.dashes)) if shape.dashes else "solid",
            alpha=shape.opacity,
            capstyle="butt",
        )
    )


def _check_texts(look: Look) -> None:
    """Refuse a user's own text that no font here has the letters of."""
    for text in look.texts:
        missing = lacking(look.font, text)
        if missing:
            raise MechsafetyError(
                f"the text {text!r} in PDF or PNG: font {family(look.font).drawn!r} lacks {missing!r}",
                expected="a font with these letters",
                hint="Style(font=...) with an installed family that has them, or SVG",
            )


def _write(axes: Any, label: Label, size: float, font: str) -> None:
    anchors = {"start": "left", "middle": "center", "end": "right"}
    axes.text(
        label.x,
        label.y,
        drawable(font, label.text),
        fontsize=size * POINT,
        color=label.colour,
        fontweight=WEIGHTS[label.bold],
        family=families(font),
        ha=anchors[label.anchor],
        va="baseline",
        parse_math=False,
    )
