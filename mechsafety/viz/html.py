"""The circuit as an interactive page, as a sandboxed frame for notebooks, and as a notebook's rich output."""

import html
import json
from functools import cache
from typing import TYPE_CHECKING, Any

from mechsafety.circuits.circuit import ROLES, CircuitNode, RefusalCircuit
from mechsafety.viz.layout import STATIC_EDGES, layout_circuit
from mechsafety.viz.marks import ROLE_COLOURS, Layout, magnitude
from mechsafety.viz.svg import circuit_svg, layout_svg
from mechsafety.viz.words import (
    STATUS_WORDS,
    edge_title,
    evidence,
    interval,
    number,
    p_value,
    percent,
    plain,
)

if TYPE_CHECKING:
    import jinja2

TOOLBAR, TALLEST = 40, 1100


def circuit_html(circuit: RefusalCircuit) -> str:
    """A self-contained page: the SVG with tooltips, thresholds, paths, zoom and download; it uses no network.

    Raises:
        MechsafetyError: The circuit lists a node twice.
    """
    layout = layout_circuit(circuit, max_edges=None)
    return template("circuit.html.j2").render(
        title=f"Refusal circuit of {plain(circuit.provenance.model)}",
        svg=layout_svg(circuit, layout),
        data=safe_json(_data(circuit, layout)),
        roles=[(role, ROLE_COLOURS[role], len(circuit.by_role(role))) for role in ROLES],
    )


def circuit_fragment(circuit: RefusalCircuit) -> str:
    """The page in a sandboxed ``iframe``, to be put into notebooks and other pages.

    Raises:
        MechsafetyError: The circuit lists a node twice.
    """
    height = min(TALLEST, round(layout_circuit(circuit).height) + TOOLBAR)
    label = html.escape(f"Refusal circuit of {plain(circuit.provenance.model)}", quote=True)
    page = html.escape(circuit_html(circuit), quote=True)
    # allow-downloads serves the button "download SVG"; the frame still has no origin and no network.
    return (
        f'<iframe sandbox="allow-scripts allow-downloads" title="{label}" loading="lazy" '
        f'style="width:100%;height:{height}px;border:1px solid #d5d9df;border-radius:8px;background:#fff" '
        f'srcdoc="{page}"></iframe>'
    )


def mimebundle(circuit: RefusalCircuit) -> dict[str, str]:
    """What a notebook shows and keeps: the interactive frame, a plain SVG and one line of text.

    Raises:
        MechsafetyError: The circuit lists a node twice.
    """
    return {"text/html": circuit_fragment(circuit), "image/svg+xml": circuit_svg(circuit), "text/plain": repr(circuit)}


def safe_json(data: Any) -> str:
    """JSON that can stand inside a ``script`` element: no ``<``, ``>``, ``&`` or line separator is left bare."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def template(name: str) -> "jinja2.Template":
    """A packaged template, autoescaping."""
    return _environment().get_template(name)


@cache
def _environment() -> "jinja2.Environment":
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("mechsafety.viz"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )


def _data(circuit: RefusalCircuit, layout: Layout) -> dict[str, Any]:
    """What the page's script needs; texts are shown as text, never parsed as HTML."""
    ranked = sorted((magnitude(mark.member.effect) for mark in layout.edges), reverse=True)
    return {
        "nodes": {str(member.node): _node_data(member) for member in circuit.nodes},
        "edges": [edge_title(mark.member) for mark in layout.edges],
        # As rounded as in the SVG, so that the last of the strongest edges is not lost.
        "edgeThreshold": float(f"{ranked[STATIC_EDGES - 1]:.6g}") if len(ranked) > STATIC_EDGES else 0,
    }


def _node_data(member: CircuitNode) -> dict[str, Any]:
    return {
        "name": str(member.node),
        "rows": [
            ["effect", f"{number(member.effect)} ({percent(member.effect)} of the gap)"],
            ["95 % interval", interval(member.ci) if member.ci else "not measured"],
            ["p, adjusted", p_value(member.p_value)],
            ["role", "none assigned" if member.role == "none" else member.role],
            ["status", STATUS_WORDS[member.status]],
        ],
        "evidence": list(evidence(member)) or ["none: this node was not measured"],
    }
