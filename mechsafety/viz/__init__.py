"""Pictures, charts and reports of results. It reads results only, never a model."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from mechsafety.errors import MechsafetyError
from mechsafety.viz.attention import attention_html
from mechsafety.viz.charts import faithfulness_curve, node_heatmap
from mechsafety.viz.html import circuit_fragment, circuit_html, mimebundle
from mechsafety.viz.pdf import circuit_pdf
from mechsafety.viz.report import render_report
from mechsafety.viz.svg import circuit_svg
from mechsafety.viz.tikz import circuit_tikz

if TYPE_CHECKING:
    from mechsafety.circuits.circuit import RefusalCircuit

FILES = ("circuit.json", "report.html", "circuit.svg", "circuit.pdf", "circuit.tex", "scores.csv")

__all__ = [
    "FILES",
    "attention_html",
    "circuit_fragment",
    "circuit_html",
    "circuit_pdf",
    "circuit_svg",
    "circuit_tikz",
    "faithfulness_curve",
    "mimebundle",
    "node_heatmap",
    "render_report",
    "write_all",
]


def write_all(circuit: "RefusalCircuit", folder: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Write ``circuit.json``, ``report.html``, ``circuit.svg``, ``circuit.pdf``, ``circuit.tex`` and ``scores.csv``.

    Args:
        circuit: With its details, which ``scores.csv`` needs.
        folder: An existing folder; files of these names in it are replaced.

    Returns:
        The six paths.

    Raises:
        MechsafetyError: No such folder, or the circuit has no scores of its candidates.
    """
    target = Path(folder)
    if not target.is_dir():
        raise MechsafetyError(f"no such folder: {folder}", expected="an existing folder to write into")
    texts = {
        "circuit.json": circuit.to_json(),
        "report.html": render_report(circuit),
        "circuit.svg": circuit_svg(circuit),
        "circuit.tex": circuit_tikz(circuit),
        "scores.csv": circuit.scores_dataframe().to_csv(index=False, float_format="%.6g", lineterminator="\n"),
    }
    for name, text in texts.items():
        (target / name).write_text(text, encoding="utf-8", newline="\n")
    return (*(target / name for name in texts), circuit_pdf(circuit, target / "circuit.pdf"))
