"""The circuit as an interactive page, as a sandboxed frame for notebooks, and as a notebook's rich output."""

import html
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from mechsafety.circuits.circuit import ROLES, Ablation, Notes, RefusalCircuit
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Node
from mechsafety.viz.cards import ablations_on, attention_data, card_words, node_cards
from mechsafety.viz.comparison import Comparison, compare_layouts, side_by_side, without_legend
from mechsafety.viz.layout import layout_circuit
from mechsafety.viz.legend import legend_alone
from mechsafety.viz.look import Look
from mechsafety.viz.marks import DARK, Layout, band, blend, grey
from mechsafety.viz.page_data import picture_data
from mechsafety.viz.policy import allowed
from mechsafety.viz.style import Style, group_title
from mechsafety.viz.svg import layout_svg
from mechsafety.viz.words import plain

if TYPE_CHECKING:
    import jinja2

TALLEST, SHORTEST = 1000, 560
KEY_WIDTH = 264.0  # width of the page's column
THEMES = ("auto", "light", "dark")
SOURCES = ("model", "drawing", "cards", "export")  # of the page's script


def circuit_html(
    circuit: RefusalCircuit,
    style: Style | None = None,
    *,
    notes: Mapping[Node, Notes] | None = None,
    ablations: Sequence[Ablation] = (),
    theme: str = "auto",
    ablate: bool = False,
) -> str:
    """A self-contained page that uses no network.

    It has pan and zoom, cards, thresholds, paths, pins, search, folding, attention, ablations, dark mode, keys, and
    buttons that save the SVG and copy TikZ. The page holds all edges; those beyond ``style.max_edges`` are hidden at
    first.

    Args:
        circuit: The circuit to show.
        style: Options of the picture. Legend and caption are on the page in any case.
        notes: Notes of nodes, in place of those that the map measured (``circuit.details.notes``).
        ablations: Measurements before and after ablations; the page has one switch per ablation.
        theme: ``auto`` follows the reader's system; ``light`` or ``dark``.
        ablate: Whether each card gets a box "ablate", which informs the page around it (see `mechsafety.viz.widget`).

    Raises:
        MechsafetyError: As `layout_circuit`, a misshapen attention pattern, or another theme.

    Example:
        >>> page = ms.viz.circuit_html(circuit)
        >>> "L0.H1" in page, "https://" in page  # it loads nothing
        (True, False)
    """
    style = style or Style()
    layout = layout_circuit(circuit, _every_edge(style))
    known = {**(circuit.details.notes if circuit.details else {}), **(notes or {})}
    data = picture_data([layout], style) | {
        "words": card_words(style.look),
        "nodes": node_cards(circuit, known, style.look),
        "attention": attention_data(circuit.details.attention if circuit.details else ()),
        "ablations": ablations_on(circuit, ablations, style),
        "ablate": ablate,
    }
    return _page(layout.title, [("", layout)], data, theme, style, [member.role for member in circuit.by_mlp().nodes])


def compare_html(
    first: RefusalCircuit,
    second: RefusalCircuit,
    names: tuple[str, str],
    style: Style | None = None,
    *,
    theme: str = "auto",
) -> str:
    """A page of two circuits: their difference, or both side by side at the same places.

    Raises:
        MechsafetyError: As `layout_circuit`, or another theme.

    Example:
        >>> part = circuit.subset(["L0.H1", "L3.MLP"])
        >>> page = ms.viz.compare_html(circuit, part, ("whole", "part"))
        >>> path = (folder / "comparison.html").write_text(page, encoding="utf-8")
    """
    style = style or Style()
    comparison: Comparison = compare_layouts(first, second, names, _every_edge(style))
    # for two circuits side by side, the legend stands once, in the page's column
    panes = [
        ("difference", comparison.difference),
        (comparison.names[0], without_legend(comparison.first)),
        (comparison.names[1], without_legend(comparison.second)),
    ]
    cards = [node_cards(circuit, {}, style.look) for circuit in (first, second)]
    both = {key: {"pair": [found.get(key) for found in cards], "evidence": []} for key in {**cards[0], **cards[1]}}
    data = picture_data([layout for _, layout in panes], style, side_by_side(panes[1:], 1))
    data |= {"words": card_words(style.look), "nodes": both, "names": comparison.names}
    data |= {"attention": [], "ablations": [], "ablate": False}
    # where a node's roles differ, the page uses the role in the second circuit
    roles = {member.node: member.role for circuit in (first, second) for member in circuit.nodes}
    legend = layout_svg(legend_alone(style, (first, second), KEY_WIDTH))
    return _page(comparison.difference.title, panes, data, theme, style, list(roles.values()), legend)


def circuit_fragment(circuit: RefusalCircuit, style: Style | None = None, **options: Any) -> str:
    """The page in a sandboxed ``iframe``, for notebooks and other pages; the options are those of `circuit_html`.

    Raises:
        MechsafetyError: As `circuit_html`.

    Example:
        >>> ms.viz.circuit_fragment(circuit)
        '<iframe ...'
    """
    height = layout_circuit(circuit, _every_edge(style or Style())).map_height + 60
    title = f"Refusal circuit of {plain(circuit.provenance.model)}"
    return frame(circuit_html(circuit, style, **options), title, round(min(TALLEST, max(SHORTEST, height))))


def frame(page: str, title: str, height: int) -> str:
    """A page in a frame of its own: no script in it reaches the page around it, and none of its names clash.

    It is ``height`` pixels tall, or as tall as nine tenths of the window where that is less.
    """
    # allow-downloads serves the button "save SVG"; the frame still has no origin and no network
    return (
        f'<iframe sandbox="allow-scripts allow-downloads" allow="clipboard-write" '
        f'title="{html.escape(title, quote=True)}" loading="lazy" '
        f'style="width:100%;height:clamp({min(height, SHORTEST)}px,90vh,{height}px);border:1px solid #8886;'
        f'border-radius:8px;box-sizing:border-box" '
        f'srcdoc="{html.escape(page, quote=True)}"></iframe>'
    )


def mimebundle(circuit: RefusalCircuit) -> dict[str, str]:
    """What a notebook shows and keeps: the interactive frame, a plain SVG and one line of text.

    Raises:
        MechsafetyError: The circuit lists a node twice.

    Example:
        >>> sorted(ms.viz.mimebundle(circuit))
        ['image/svg+xml', 'text/html', 'text/plain']
    """
    svg = layout_svg(layout_circuit(circuit))
    return {"text/html": circuit_fragment(circuit), "image/svg+xml": svg, "text/plain": repr(circuit)}


def safe_json(data: Any) -> str:
    """JSON that can stand inside a ``script`` element: every ``<``, ``>``, ``&`` and line separator is escaped."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def template(name: str) -> "jinja2.Template":
    """A packaged template, autoescaping."""
    return _environment().get_template(name)


def document(name: str, made: Sequence[str] = (), **values: Any) -> str:
    """A page of a packaged template, whose policy allows the page's own scripts, what these make, and no others."""
    return allowed(template(name).render(**values), made)


def page_script() -> str:
    """The script of a circuit's page."""
    return joined_script(tuple(f"circuit-{part}.js" for part in SOURCES))


@cache
def joined_script(names: tuple[str, ...]) -> str:
    """A page's script: its sources one after the other, in one function, so that none of their names is global."""
    environment = _environment()
    assert environment.loader is not None
    sources = [environment.loader.get_source(environment, name)[0] for name in names]
    return "\n".join(['(() => {\n"use strict";', *sources, "start();\n})();"])


@cache
def _environment() -> "jinja2.Environment":
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("mechsafety.viz"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )


def _every_edge(style: Style) -> Style:
    from dataclasses import replace

    return replace(style, max_edges=None, fold=())


def _page(
    title: str,
    panes: Sequence[tuple[str, Layout]],
    data: Mapping[str, Any],
    theme: str,
    style: Style,
    roles: Sequence[str],
    legend: str = "",
) -> str:
    if theme not in THEMES:
        raise MechsafetyError(f"theme={theme!r}", expected=f"one of {THEMES}")
    return document(
        "circuit.html.j2",
        title=title,
        panes=[(name, layout_svg(layout, interactive=True)) for name, layout in panes],
        data=safe_json(data),
        theme=theme,
        tokens=any(card.get("promotes") or card.get("texts") for card in data["nodes"].values()),
        groups=[(mark.group, group_title(style, mark.group)) for mark in panes[0][1].folded],
        roles=[(role, style.look.role(role), _tone(style, role), roles.count(role)) for role in ROLES],
        legend=legend,
        script=page_script(),
        measure="change" if len(panes) > 1 else "effect",
        dark=dark_rules(style.look),
    )


def _tone(style: Style, role: str) -> str:
    colour = style.look.colour(role)
    return grey(colour) if style.grayscale else colour


def dark_rules(look: Look) -> list[tuple[str, str]]:
    """Each colour of the light picture, with the colour that a dark page shows instead."""
    colours = [look.colour(role) for role in ROLES]
    bands = {band(colour): blend(colour, 0.13, DARK["#FFFFFF"]) for colour in colours}
    return [*DARK.items(), *bands.items()]
