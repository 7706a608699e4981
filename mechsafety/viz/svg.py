"""The circuit as SVG."""

from xml.sax.saxutils import escape, quoteattr

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.viz.layout import layout_circuit
from mechsafety.viz.marks import PAPER, Command, EdgeMark, Label, Layout, NodeMark, Shape
from mechsafety.viz.words import caption, edge_title, node_title, plain

FONTS = "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"


def circuit_svg(circuit: RefusalCircuit) -> str:
    """A stand-alone SVG document: no script, no outside font or file; the same circuit gives the same text.

    Raises:
        MechsafetyError: The circuit lists a node twice.
    """
    return layout_svg(circuit, layout_circuit(circuit))


def layout_svg(circuit: RefusalCircuit, layout: Layout) -> str:
    """The SVG of a layout; nodes and edges carry ``data-*`` attributes and tooltips."""
    title = escape(f"Refusal circuit of {plain(circuit.provenance.model)}")
    words = escape(" ".join(caption(circuit, len(layout.edges))))
    size = f'width="{layout.width:g}" height="{layout.height:g}" viewBox="0 0 {layout.width:g} {layout.height:g}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="{FONTS}">',
        f"<title>{title}</title>",
        f"<desc>{words}</desc>",
        f'<rect class="paper" width="{layout.width:g}" height="{layout.height:g}" fill="{PAPER}"/>',
        '<g class="backdrop">',
        *(_path(shape) for shape in layout.backdrop),
        *(_text(label) for label in layout.labels),
        "</g>",
        '<g class="edges">',
        *(_edge(mark) for mark in layout.edges),
        "</g>",
        '<g class="nodes">',
        *(_node(mark) for mark in layout.nodes),
        "</g>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def path_data(commands: tuple[Command, ...]) -> str:
    """The ``d`` attribute of a path."""
    return " ".join(letter + " ".join(f"{round(value, 2):g}" for value in values) for letter, values in commands)


def _path(shape: Shape) -> str:
    style = f'fill="{shape.fill or "none"}"'
    if shape.stroke:
        style += f' stroke="{shape.stroke}" stroke-width="{shape.width:.4g}"'
    if shape.dashed:
        style += ' stroke-dasharray="5 3"'
    if shape.opacity < 1:
        style += f' opacity="{shape.opacity:.3g}"'
    return f'<path d="{path_data(shape.commands)}" {style}/>'


def _text(label: Label) -> str:
    weight = ' font-weight="600"' if label.bold else ""
    place = f'x="{label.x:.4g}" y="{round(label.y, 2):g}" font-size="{round(label.size, 2):g}"'
    return f'<text {place} text-anchor="{label.anchor}" fill="{label.colour}"{weight}>{escape(label.text)}</text>'


def _edge(mark: EdgeMark) -> str:
    member, edge = mark.member, mark.member.edge
    data = (
        f"data-from={quoteattr(str(edge.sender))} data-to={quoteattr(str(edge.receiver))} "
        f'data-slot={quoteattr(edge.slot)} data-effect="{_raw(member.effect)}" data-status={quoteattr(member.status)}'
    )
    return f'<g class="edge" {data}><title>{escape(edge_title(member))}</title>{_path(mark.shape)}</g>'


def _node(mark: NodeMark) -> str:
    member = mark.member
    data = f'data-node={quoteattr(str(mark.node))} data-kind="{mark.node.kind}"'
    if member is None:
        data += ' data-implied="true"'
        title = f"{mark.node}: drawn for orientation, not a node of the circuit"
    else:
        data += f' data-role="{member.role}" data-status="{member.status}" data-effect="{_raw(member.effect)}"'
        title = node_title(member)
    body = _path(mark.shape) + (_text(mark.label) if mark.label else "")
    return f'<g class="node" {data}><title>{escape(title)}</title>{body}</g>'


def _raw(effect: float | None) -> str:
    return "" if effect is None else f"{effect:.6g}"
