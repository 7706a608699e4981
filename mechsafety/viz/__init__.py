"""Pictures, charts and reports of results. It reads results only, never a model."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from mechsafety.circuits.circuit import Ablation, Notes
from mechsafety.output import write_text
from mechsafety.viz.attention import attention_html, figures_page, neurons_html, tokens_html
from mechsafety.viz.captions import circuit_caption, layout_caption
from mechsafety.viz.charts import effect_distribution, faithfulness_curve, node_heatmap
from mechsafety.viz.comparison import Comparison, compare_layouts
from mechsafety.viz.explorable import explorable_html
from mechsafety.viz.html import circuit_fragment, circuit_html, compare_html, mimebundle
from mechsafety.viz.layout import layout_circuit
from mechsafety.viz.pdf import circuit_pdf, circuit_png, draw_circuit, layout_pdf, layout_png
from mechsafety.viz.report import render_report
from mechsafety.viz.role_diagram import role_diagram
from mechsafety.viz.style import Positions, Style
from mechsafety.viz.svg import circuit_svg, layout_svg
from mechsafety.viz.tikz import circuit_tikz, layout_tikz
from mechsafety.viz.widget import circuit_widget

if TYPE_CHECKING:
    from mechsafety.circuits.circuit import RefusalCircuit

FILES = ("circuit.json", "report.html", "circuit.svg", "circuit.pdf", "circuit.tex", "scores.csv")

__all__ = [
    "Ablation",
    "Comparison",
    "FILES",
    "Notes",
    "Positions",
    "Style",
    "attention_html",
    "circuit_caption",
    "circuit_fragment",
    "circuit_html",
    "circuit_pdf",
    "circuit_png",
    "circuit_svg",
    "circuit_tikz",
    "circuit_widget",
    "compare_html",
    "compare_layouts",
    "draw_circuit",
    "effect_distribution",
    "explorable_html",
    "faithfulness_curve",
    "figures_page",
    "layout_caption",
    "layout_circuit",
    "layout_pdf",
    "layout_png",
    "layout_svg",
    "layout_tikz",
    "mimebundle",
    "neurons_html",
    "node_heatmap",
    "render_report",
    "role_diagram",
    "tokens_html",
    "write_all",
]


def write_all(circuit: "RefusalCircuit", folder: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Write ``circuit.json``, ``report.html``, ``circuit.svg``, ``circuit.pdf``, ``circuit.tex`` and ``scores.csv``.

    Args:
        circuit: The circuit, with its details, which ``scores.csv`` needs.
        folder: Folder to write to. It is made if it is missing; files of these names in it are replaced.

    Returns:
        The six paths.

    Raises:
        MechsafetyError: The circuit has no scores of its candidates; otherwise as `mechsafety.output.output_file`.

    Example:
        >>> paths = ms.viz.write_all(circuit, folder / "all")
        >>> sorted(path.name for path in paths)
        ['circuit.json', 'circuit.pdf', 'circuit.svg', 'circuit.tex', 'report.html', 'scores.csv']
    """
    target = Path(folder)
    texts = {
        "circuit.json": circuit.to_json(),
        "report.html": render_report(circuit),
        "circuit.svg": circuit_svg(circuit),
        "circuit.tex": circuit_tikz(circuit),
        "scores.csv": circuit.scores_dataframe().to_csv(index=False, float_format="%.6g", lineterminator="\n"),
    }
    written = [write_text(target / name, text) for name, text in texts.items()]
    return (*written, circuit_pdf(circuit, target / "circuit.pdf"))
