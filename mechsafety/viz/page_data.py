"""What a page's script needs besides the SVG of its pictures. The script lays out nothing itself."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from mechsafety.viz.comparison import Sides
from mechsafety.viz.detours import Ends, detours
from mechsafety.viz.fonts import SANS, family
from mechsafety.viz.marks import (
    BAR_WIDTH,
    DASHES,
    LINK,
    LINK_DASHES,
    PAPER,
    THINNEST_DASHED,
    TIP_RIM,
    Command,
    Layout,
    edge_bar,
    edge_colour,
    edge_tip,
    edge_width,
    grey,
    magnitude,
)
from mechsafety.viz.style import Style
from mechsafety.viz.svg import path_data, sheet_svg, shortened
from mechsafety.viz.tikz import tex
from mechsafety.viz.words import STRONGEST, edges_drawn

# a rounded corner of a path; few different ones occur, so each is stored once
TURN = re.compile(r"c[-. \d]+")
SMALLEST_LABEL = 11.0  # pixels on the screen, when a page opens


def picture_data(layouts: Sequence[Layout], style: Style, sides: Sides | None = None) -> dict[str, Any]:
    """What the script needs to know of all panes.

    Returns:
        - ``edgeThreshold``: the effect of the weakest edge that is shown at first.
        - ``map``: width and height of each pane's map.
        - ``readable``: the largest scale, in units of the picture per pixel, at which its smallest label can be read.
        - ``groups``: groups that can be folded; ``fold``: those that are folded at first.
        - ``sums``: edges of folded groups (`sums_data`).
        - ``caption``: the line of the caption that counts edges (`caption_data`).
        - ``latex``: LaTeX's command for the font, and a note where LaTeX has not this font (`latex_font`).
        - ``sides``: the sheet on which panes side by side are exported, and each pane's place on it.
    """
    first = layouts[0]
    sizes = sorted((magnitude(mark.effect) for mark in first.edges), reverse=True)
    limit = style.max_edges
    return {
        # rounded as in the SVG, so that the last of the strongest edges is not lost
        "edgeThreshold": float(shortened(sizes[limit - 1])) if limit and len(sizes) > limit else 0,
        "map": [[layout.width, layout.map_height] for layout in layouts],
        "readable": round(min(_label_sizes(layouts), default=SMALLEST_LABEL) / SMALLEST_LABEL, 3),
        "groups": [mark.group for mark in first.folded],
        "fold": list(style.fold),
        "sums": sums_data(first, style) if first.folded else None,
        "caption": caption_data(first) if len(layouts) == 1 else None,
        "latex": latex_font(style.look.font),
        "sides": sides
        and {"sheet": sheet_svg(sides.width, sides.height, sides.names, style.look.font), "places": sides.places},
    }


def _label_sizes(layouts: Sequence[Layout]) -> list[float]:
    """Sizes of all labels of the maps; legend and caption are under them."""
    around = [label for layout in layouts for label in layout.labels if label.y <= layout.map_height]
    names = [label for layout in layouts for mark in layout.nodes for label in mark.labels]
    return [label.size for label in [*around, *names]]


def sums_data(layout: Layout, style: Style) -> dict[str, Any]:
    """The edges that folding can make: the path of each, and an edge's marks at two widths.

    The strength of a sum depends on the page's thresholds. A mark's lengths are linear in the edge's width, and the
    width is linear in the strength. The script therefore interpolates between the two widths that it is given.
    """
    assert layout.grid is not None
    unit = layout.grid.unit
    paths = {
        ends: path_data(path) for ends, path in detours(layout.edges, layout.nodes, layout.folded, layout.grid).items()
    }
    turns = [turn for turn, _ in Counter(turn for path in paths.values() for turn in TURN.findall(path)).most_common()]
    short = {turn: f"~{place}" for place, turn in enumerate(turns)}
    tone = grey if style.grayscale else str
    slots = sorted({ends[2] for ends in paths})
    return {
        "turns": turns,
        "paths": _by_receiver({ends: TURN.sub(lambda found: short[found[0]], path) for ends, path in paths.items()}),
        "widths": {
            status: [round(edge_width(status, strength, unit), 3) for strength in (0, 1)]
            for status in ("measured", "estimated")
        },
        # of a positive and of a negative sum
        "colours": {
            **{status: [tone(edge_colour(sign, status)) for sign in (1, -1)] for status in ("measured", "estimated")},
            "linking": [tone(LINK)] * 2,
        },
        "paper": tone(PAPER),
        "dashes": {**{slot: DASHES[slot] for slot in slots}, "linking": LINK_DASHES},
        "thinnestDashed": THINNEST_DASHED * unit,
        "tips": {slot: [_numbers(edge_tip(slot, width, 0, 0, unit)) for width in (0, 1)] for slot in slots},
        "bar": [_numbers(edge_bar(width, 0, 0, unit)) for width in (0, 1)],
        "rims": [TIP_RIM * unit, BAR_WIDTH * unit],
    }


def latex_font(font: str) -> list[str]:
    """LaTeX's command for a font. Where it has none, its sans-serif one, and a note that says so."""
    command = family(font).latex
    return [command, ""] if command else [family(SANS).latex, f"LaTeX has no font {font}: it takes its sans-serif one."]


def caption_data(layout: Layout) -> dict[str, Any] | None:
    """The line of the caption that counts edges: its text before and after the number, plain and as LaTeX."""
    said = edges_drawn(sum(mark.n_edges for mark in layout.edges), layout.n_edges)
    for place, label in enumerate(layout.labels):
        before, found, after = label.text.partition(said)
        if found:
            # the script counts the edges that it shows, out of those that the page holds
            _, _, rest = edges_drawn(0, len(layout.edges)).partition("0")
            after = rest + after.removeprefix(f" ({STRONGEST})")
            return {"place": place, "text": [before, after], "tex": [tex(before), tex(after)]}
    return None


def _by_receiver(paths: Mapping[Ends, str]) -> dict[str, dict[str, dict[str, str]]]:
    """Paths by receiver, slot and sender. What all paths into a slot begin with is stored under an empty name."""
    slots: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for (sender, receiver, slot), path in paths.items():
        slots[receiver, slot][sender] = path
    found: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    for (receiver, slot), members in slots.items():
        alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*members.values(), strict=False))
        shared = "".join(letters[0] for letters in alike) if len(members) > 1 else ""
        begin = {"": shared} if shared else {}
        found[receiver][slot] = begin | {sender: path.removeprefix(shared) for sender, path in members.items()}
    return found


def _numbers(path: tuple[Command, ...]) -> list[list[Any]]:
    return [[letter, *(round(value, 3) for value in values)] for letter, values in path]
