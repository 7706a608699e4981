"""A layout as SVG."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.viz.fonts import family
from mechsafety.viz.layout import layout_circuit
from mechsafety.viz.look import Look
from mechsafety.viz.marks import INK, PAPER, Command, EdgeMark, Label, Layout, NodeMark, Shape
from mechsafety.viz.style import Style
from mechsafety.viz.tikz import tex
from mechsafety.viz.words import edge_title, node_title


def circuit_svg(circuit: RefusalCircuit, style: Style | None = None) -> str:
    """A stand-alone SVG document: no script, no external font or file; the same circuit gives the same text.

    Raises:
        MechsafetyError: As `layout_circuit`.

    Example:
        >>> ms.viz.circuit_svg(circuit)
        '<svg ...'
        >>> ms.viz.circuit_svg(circuit) == ms.viz.circuit_svg(circuit)
        True
    """
    style = style or Style()
    return layout_svg(layout_circuit(circuit, style), width_mm=style.width_mm)


def layout_svg(layout: Layout, *, width_mm: float | None = None, interactive: bool = False) -> str:
    """The SVG of a layout; nodes and edges carry tooltips.

    Args:
        layout: The layout to draw.
        width_mm: Width on paper; None gives the size in pixels.
        interactive: Whether to add the ``data-*`` attributes and the hidden supernodes that a page's script reads.

    Example:
        >>> layout = ms.viz.layout_circuit(circuit)
        >>> ms.viz.layout_svg(layout, width_mm=86)
        '<svg ...'
    """
    width, height = f'"{layout.width:.5g}"', f'"{layout.height:.5g}"'
    if width_mm is not None:
        width, height = f'"{width_mm:g}mm"', f'"{width_mm * layout.height / layout.width:.5g}mm"'
    names = [label for mark in layout.nodes for label in mark.labels]
    usual = _Usual(
        "middle",
        True,
        _most_common([round(label.size, 1) for label in names], 12.0),
        _most_common([label.colour for label in names], INK),
    )
    groups = frozenset(mark.group for mark in layout.folded)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width={width} height={height} '
        # what is in an image cannot be reached by the keyboard
        f'viewBox="0 0 {layout.width:.5g} {layout.height:.5g}" role="{"group" if interactive else "img"}" '
        f"font-family={quoteattr(family(layout.look.font).svg)}>",
        f"<title>{escape(layout.title)}</title>",
        f"<desc>{escape(layout.description)}</desc>",
        f'<rect class="paper" width="{layout.width:.5g}" height="{layout.height:.5g}" fill="{PAPER}"/>',
        '<g class="backdrop">',
        *(_path(shape) for shape in layout.backdrop),
        *(_text(label, interactive) for label in layout.labels),
        "</g>",
        '<g class="edges" fill="none">',
        *(_edge(mark, interactive) for mark in layout.edges),
        "</g>",
        # attributes that all nodes' texts share stand on their group
        f'<g class="nodes" text-anchor="middle" font-weight="600" font-size="{usual.size:g}" fill="{usual.colour}">',
        *(_node(mark, interactive, usual, groups, layout.look) for mark in layout.nodes),
        *(_node(mark, interactive, usual, groups, layout.look) for mark in layout.folded if interactive),
        "</g>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def sheet_svg(width: float, height: float, labels: Sequence[Label], font: str) -> str:
    """White paper with texts in a font, on which a page's script puts pictures."""
    texts = "".join(_text(label, True) for label in labels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.5g}" height="{height:.5g}" '
        f'viewBox="0 0 {width:.5g} {height:.5g}" font-family={quoteattr(family(font).svg)}>'
        f'<rect width="{width:.5g}" height="{height:.5g}" fill="{PAPER}"/>{texts}</svg>'
    )


def path_data(commands: tuple[Command, ...]) -> str:
    """The ``d`` attribute of a path, to a tenth of a pixel; steps are relative, which halves the length."""
    parts, x, y = [], 0, 0
    for letter, values in commands:
        points = [(round(10 * values[i]), round(10 * values[i + 1])) for i in range(0, len(values), 2)]
        if letter == "M":
            parts.append("M" + _numbers(*points[0]))
        elif letter == "L" and points[0][0] == x:
            parts.append("v" + _numbers(points[0][1] - y))
        elif letter == "L" and points[0][1] == y:
            parts.append("h" + _numbers(points[0][0] - x))
        elif letter == "Z":
            parts.append("z")
        else:
            parts.append(letter.lower() + _numbers(*(part for a, b in points for part in (a - x, b - y))))
        x, y = points[-1] if points else (x, y)
    return "".join(parts)


def _numbers(*tenths: int) -> str:
    words = [f"{tenth / 10:g}" for tenth in tenths]
    return words[0] + "".join(word if word.startswith("-") else " " + word for word in words[1:])


def _path(shape: Shape, unfilled: bool = True) -> str:
    style = f' fill="{shape.fill or "none"}"' if shape.fill or unfilled else ""
    if shape.stroke:
        style += f' stroke="{shape.stroke}"'
        # 1 is what it is in any SVG
        style += "" if f"{shape.width:.3g}" == "1" else f' stroke-width="{shape.width:.3g}"'
    if shape.dashes:
        style += f' stroke-dasharray="{" ".join(f"{part:g}" for part in shape.dashes)}"'
    if shape.opacity < 1:
        style += f' opacity="{shape.opacity:.3g}"'
    return f'<path d="{path_data(shape.commands)}"{style}/>'


@dataclass(frozen=True, slots=True)
class _Usual:
    """The anchor, weight, size and colour that a text has without its own attributes."""

    anchor: str = "start"
    bold: bool = False
    size: float = 0.0
    colour: str = ""


def _most_common(values: Sequence[Any], default: Any) -> Any:
    return max(sorted(set(values)), key=values.count, default=default)


def _text(label: Label, interactive: bool, usual: _Usual | None = None) -> str:
    """A text element; ``usual`` is what it need not say."""
    usual = usual or _Usual()
    style = f'x="{round(label.x, 1):g}" y="{round(label.y, 1):g}"'
    style += "" if round(label.size, 1) == usual.size else f' font-size="{round(label.size, 1):g}"'
    style += "" if label.anchor == usual.anchor else f' text-anchor="{label.anchor}"'
    style += "" if label.bold == usual.bold else f' font-weight="{600 if label.bold else 400}"'
    style += "" if label.colour == usual.colour else f' fill="{label.colour}"'
    # the page makes TikZ from the picture; where LaTeX needs another text, that text comes with it
    latex = tex(label.text)
    data = f" data-tex={quoteattr(latex)}" if interactive and latex != label.text else ""
    return f"<text {style}{data}>{escape(label.text)}</text>"


def _edge(mark: EdgeMark, interactive: bool) -> str:
    data = ""
    if interactive:
        data = (
            f" data-from={quoteattr(mark.sender)} data-to={quoteattr(mark.receiver)} data-slot={quoteattr(mark.slot)}"
            f' data-effect="{shortened(mark.effect)}"'
        )
        # a script takes what has no status for measured
        data += f" data-status={quoteattr(mark.status)}" if mark.status != "measured" else ""
        if mark.member is not None and mark.member.estimate is not None and mark.status != "estimated":
            data += f' data-estimate="{shortened(mark.member.estimate)}"'
    body = "".join(_path(shape, False) for shape in mark.shapes)
    body += "".join(_text(label, interactive) for label in mark.labels)
    # a page's script writes the usual tooltips itself
    usual = interactive and mark.member is not None and mark.title == edge_title(mark.member, mark.linking)
    kind = "edge linking" if interactive and mark.linking else "edge"
    return f'<g class="{kind}"{data}>{_title(mark.title, usual)}{body}</g>'


def _node(mark: NodeMark, interactive: bool, names: _Usual, groups: frozenset[str], look: Look) -> str:
    data = f" data-node={quoteattr(mark.key)}"
    if interactive:
        # the script takes a mark without a kind for a part of the model
        data += f' data-kind="{mark.kind}"' if mark.kind in ("embed", "logits", "group", "role", "weak") else ""
        data += f' data-at="{round(mark.x, 1):g} {round(mark.y, 1):g}"'
        # a script takes what has no group for a member of its role's, where there is one
        role = mark.member.role if mark.member is not None else ""
        data += f" data-group={quoteattr(mark.group)}" if mark.group != (role if role in groups else "") else ""
        if mark.member is not None:
            member = mark.member
            data += f' data-role="{member.role}" data-effect="{shortened(member.effect)}"'
    body = "".join(_path(shape) for shape in mark.shapes)
    body += "".join(_text(label, interactive, names) for label in mark.labels)
    usual = interactive and mark.member is not None and mark.title == node_title(mark.member, look)
    return f'<g class="node"{data}>{_title(mark.title, usual)}{body}</g>'


def _title(text: str, usual: bool) -> str:
    return "" if usual else f"<title>{escape(text)}</title>"


def shortened(effect: float | None) -> str:
    """An effect with as few digits as a page's script needs to say the same number of it as the tooltips here do."""
    if effect is None:
        return ""
    short = f"{effect:.4g}"
    return short if f"{float(short):.3f}" == f"{effect:.3f}" else f"{effect:.7g}"
