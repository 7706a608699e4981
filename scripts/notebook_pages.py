"""Stored notebooks as HTML with their charts alive and without network, for the site and for single pages."""

import copy
from pathlib import Path

import nbconvert
import nbformat
import plotly
from nbformat import NotebookNode

PLOTLY = "application/vnd.plotly.v1+json"


def with_charts(notebook: NotebookNode, script: str) -> NotebookNode:
    """A copy whose charts are HTML, for pages outside Jupyter: those know nothing of plotly's own mime type.

    Args:
        notebook: A stored notebook.
        script: HTML before the first chart that loads plotly.js.
    """
    notebook, charts = copy.deepcopy(notebook), 0
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if PLOTLY in output.get("data", {}):
                figure = output.data.pop(PLOTLY)
                chart = {"data": figure["data"], "layout": figure["layout"]}
                text = plotly.io.to_html(chart, div_id=f"chart-{charts}", include_plotlyjs=False, full_html=False)
                output.data["text/html"], script = script + text, ""
                charts += 1
    return notebook


def notebook_page(path: Path) -> str:
    """A stored notebook as one HTML page that needs no network."""
    outside = {
        name: ""
        for name in ("require_js_url", "mathjax_url", "mermaid_js_url", "mermaid_layout_elk_js_url", "jquery_url")
    }
    notebook = with_charts(nbformat.read(path, 4), f"<script>{plotly.offline.get_plotlyjs()}</script>")
    return nbconvert.HTMLExporter(**outside).from_notebook_node(notebook)[0]
