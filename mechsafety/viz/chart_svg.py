"""The figures of `mechsafety.viz.charts` as plain SVG, so that a report needs no script of 4.8 MB to show three charts.

It draws what these figures use of plotly, and no more: scatter traces with error bars, one heat map, straight lines
across, annotations, and linear, logarithmic and named axes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from mechsafety.viz.charts import DIVERGING, GRID
from mechsafety.viz.fonts import SANS, family
from mechsafety.viz.marks import BAR, INK, MUTED, PAPER, blend, text_width
from mechsafety.viz.words import number

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

AXIS = "#C8CDD4"
# of plotly's names for dashes: lengths in pixels
DASHES = {"dot": "2 4", "dash": "7 4"}
# The heat map's colours come in this many steps, so that a dark page can replace each of them by a rule.
STEPS = 32
# the colours on a dark page of what frames a chart, and of its heat map
DARK_FRAME = {GRID: "#262E37", AXIS: "#47515D"}
DARK_DIVERGING = [[0.0, "#F08CC0"], [0.25, "#95587A"], [0.5, "#2A323B"], [0.75, "#2E6C93"], [1.0, "#6EC1F2"]]


@dataclass(frozen=True, slots=True)
class Paper:
    """What a chart is drawn on.

    Attributes:
        width: Width in pixels.
        font: Size of every text in pixels.
        titles: Whether marks have tooltips. A phone shows none.
    """

    width: float
    font: float
    titles: bool


WIDE, NARROW = Paper(900, 14.5, True), Paper(340, 13, False)


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: its values, its pixels, and its ticks with their words."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    names: tuple[str, ...] = ()
    ticks: tuple[tuple[float, str], ...] = ()

    def at(self, value: Any) -> float:
        """The pixel of a value or a category."""
        place = float(self.names.index(value)) if value in self.names else float(value)
        place = math.log10(place) if self.log else place
        return self.start + (place - self.low) / (self.high - self.low) * (self.end - self.start)


def chart_svg(figure: "Figure", title: str, paper: Paper = WIDE) -> str:
    """One of the figures of `mechsafety.viz.charts` as an inline SVG element.

    Args:
        figure: The figure.
        title: What the chart shows, for readers who cannot see it.
        paper: The size to draw it in; `NARROW` is for a phone.
    """
    font = paper.font
    legend, top = _legend(figure, paper)
    height = float(figure.layout.height)
    lines = 1 + max((text.count("<br>") for text in figure.layout.xaxis.ticktext or ()), default=0)
    said = _wrapped(figure.layout.xaxis.title.text, paper.width - 6 * font, font)
    bottom = height + top - (1.3 * lines + 1.25 * len(said) + 0.9) * font
    ys = _axis(figure, "y", bottom, top + 8, paper)
    left = max(text_width(text, font) for _, text in ys.ticks) * 0.95 + 2.4 * font
    xs = _axis(figure, "x", left, paper.width - 12, paper)
    body = [*_frame(figure, xs, ys, paper, said)]
    for trace in figure.data:
        body += _heat(trace, xs, ys, paper) if trace.type == "heatmap" else _scatter(trace, xs, ys, paper)
    body += _annotations(figure, xs, ys)
    width, tall = f"{paper.width:g}", f"{height + top:.5g}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {tall}" width="{width}" height="{tall}" '
        f'role="img" font-family="{family(SANS).svg}" font-size="{font:g}" fill="{INK}"><title>{escape(title)}</title>'
        f"{''.join(legend)}{''.join(body)}</svg>"
    )


def heat_colours() -> list[tuple[str, str]]:
    """Each colour of the heat map, with the colour that a dark page shows instead."""
    places = [place / STEPS for place in range(STEPS + 1)]
    return [(_between(DIVERGING, place), _between(DARK_DIVERGING, place)) for place in places]


def _between(scale: Sequence[Sequence[Any]], place: float) -> str:
    upper = next(i for i in range(1, len(scale)) if place <= scale[i][0])
    (start, first), (end, second) = scale[upper - 1], scale[upper]
    return blend(second, (place - start) / (end - start), first)


def _axis(figure: "Figure", which: str, start: float, end: float, paper: Paper) -> Axis:
    """An axis with its range and its ticks; those whose words would touch the last one's are left out."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    given = figure.layout[f"{which}axis"]
    names = tuple(figure.data[0].x) if given.type == "category" else ()
    if given.range is not None:
        low, high = map(float, given.range)
    else:
        values = [value for trace in figure.data for value in _extent(trace, which)]
        values += [float(shape.y0) for shape in figure.layout.shapes if which == "y" and shape.xref == "x domain"]
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        room = 0.06 * ((high - low) or abs(high) or 1.0)
        low, high = low - room, high + room
    axis = Axis(low, high, start, end, given.type == "log", names)
    if given.tickvals is not None:
        ticks = [(float(value), str(text)) for value, text in zip(given.tickvals, given.ticktext, strict=True)]
    elif names:
        ticks = [(float(place), name) for place, name in enumerate(names)]
    elif given.dtick is not None:
        step = float(given.dtick)
        ticks = [(value, f"{value:g}") for value in np.arange(math.ceil(low / step) * step, high, step).tolist()]
    else:
        count = 8 if paper is WIDE or which == "y" else 4
        places = [float(value) for value in MaxNLocator(count).tick_values(low, high) if low <= value <= high]
        digits = max((len(f"{round(value, 9):g}".partition(".")[2]) for value in places), default=0)
        ticks = [(value, number(value, digits)) for value in places]
    kept: list[tuple[float, str]] = []
    # of a log axis, the last tick is the whole model
    for value, text in reversed(ticks) if axis.log else ticks:
        words = max(text_width(line, paper.font) for line in text.split("<br>")) + 0.6 * paper.font
        size = 1.5 * paper.font if which == "y" else words
        if not kept or abs(axis.at(value) - axis.at(kept[-1][0])) >= size:
            kept.append((value, text))
    return Axis(low, high, start, end, axis.log, names, tuple(kept))


def _extent(trace: Any, which: str) -> Iterator[float]:
    """The ends of a trace's marks and error bars along an axis."""
    for value, up, down in _with_errors(trace, which):
        if value is not None and math.isfinite(value):
            yield value + up
            yield value - down


def _with_errors(trace: Any, which: str) -> list[tuple[Any, float, float]]:
    """A trace's values (numbers or categories) along an axis, each with its error bar's lengths up and down."""
    values, error = trace[which], trace[f"error_{which}"]
    none = [0.0] * len(values)
    up = none if error.array is None else [_finite(value) for value in error.array]
    down = none if error.arrayminus is None else [_finite(value) for value in error.arrayminus]
    return list(zip(values, up, down, strict=True))


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


def _legend(figure: "Figure", paper: Paper) -> tuple[list[str], float]:
    """The names of the traces in rows, and the height that they take."""
    font, x, row, parts = paper.font, 4.0, 1, []
    items = [(trace.name, trace) for trace in figure.data if trace.type == "scatter" and trace.showlegend is not False]
    for name, trace in items if figure.layout.showlegend is not False else ():
        wide = text_width(name, font) + 3.2 * font
        if x > 4.0 and x + wide > paper.width:
            x, row = 4.0, row + 1
        y = 1.5 * font * (row - 0.5)
        colour = (trace.line.color if "lines" in trace.mode else None) or trace.marker.color
        if "lines" in trace.mode:
            parts.append(_line(x, y, x + 1.8 * font, y, colour, 2.4, DASHES.get(trace.line.dash)))
        parts.append(_mark(trace.marker.symbol, x + 0.9 * font, y, min(float(trace.marker.size), 10), colour))
        parts.append(_text(x + 2.3 * font, y + 0.35 * font, name))
        x += wide
    for trace in figure.data:
        if trace.type == "heatmap":
            row += bool(parts)
            parts += _scale(trace, 4.0, 1.5 * font * (row - 0.5), paper)
    return parts, 1.5 * font * row if parts else 0.0


def _scale(trace: Any, x: float, y: float, paper: Paper) -> list[str]:
    """The heat map's colours from the lowest to the highest value."""
    font, length = paper.font, min(120.0, 0.25 * paper.width)
    title = str(trace.colorbar.title.text).replace("<br>", " ")
    low, high = number(trace.zmin, 2), number(trace.zmax, 2)
    begin = x + text_width(low, font) + 0.8 * font
    wide = length / (STEPS + 1)
    parts = [_text(x, y + 0.35 * font, low)]
    parts += [
        f'<rect x="{begin + wide * place:.1f}" y="{y - 6:.1f}" width="{wide + 0.3:.1f}" height="12" fill="{colour}"/>'
        for place, (colour, _) in enumerate(heat_colours())
    ]
    return [*parts, _text(begin + length + 8, y + 0.35 * font, f"{high}  {title}")]


def _frame(figure: "Figure", xs: Axis, ys: Axis, paper: Paper, said: Sequence[str]) -> Iterator[str]:
    """Background, grid, lines across, tick words and axis titles."""
    layout, font = figure.layout, paper.font
    wide, tall = xs.end - xs.start, ys.start - ys.end
    ground = BAR if layout.plot_bgcolor.upper() != PAPER else PAPER
    yield f'<rect x="{xs.start:.1f}" y="{ys.end:.1f}" width="{wide:.1f}" height="{tall:.1f}" fill="{ground}"/>'
    for value, text in xs.ticks:
        x = xs.at(value)
        if layout.xaxis.showgrid is not False:
            yield _line(x, ys.end, x, ys.start, GRID)
        for place, part in enumerate(text.split("<br>")):
            yield _text(x, ys.start + (1.25 + 1.3 * place) * font, part, "middle", MUTED)
    for value, text in ys.ticks:
        if layout.yaxis.showgrid is not False:
            yield _line(xs.start, ys.at(value), xs.end, ys.at(value), GRID)
        yield _text(xs.start - 0.5 * font, ys.at(value) + 0.35 * font, text, "end", MUTED)
    if layout.xaxis.zeroline and xs.low < 0 < xs.high:
        yield _line(xs.at(0), ys.end, xs.at(0), ys.start, AXIS)
    if layout.yaxis.zeroline and ys.low < 0 < ys.high:
        yield _line(xs.start, ys.at(0), xs.end, ys.at(0), AXIS)
    for shape in layout.shapes:
        dash = DASHES.get(shape.line.dash)
        if shape.xref == "x domain":
            yield _line(xs.start, ys.at(shape.y0), xs.end, ys.at(shape.y0), shape.line.color, 1.2, dash)
        else:
            yield _line(xs.at(shape.x0), ys.end, xs.at(shape.x0), ys.start, shape.line.color, 1.0, dash)
    lines = 1 + max((text.count("<br>") for _, text in xs.ticks), default=0)
    base = ys.start + (1.3 * lines + 1.5) * font
    for place, part in enumerate(said):
        yield _text((xs.start + xs.end) / 2, base + 1.25 * place * font, part, "middle")
    if layout.yaxis.title.text:
        yield (
            f'<text transform="translate({0.9 * font:.1f} {(ys.start + ys.end) / 2:.1f}) rotate(-90)" '
            f'text-anchor="middle">{escape(layout.yaxis.title.text)}</text>'
        )


def _wrapped(text: str, width: float, font: float) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _heat(trace: Any, xs: Axis, ys: Axis, paper: Paper) -> Iterator[str]:
    colours = [light for light, _ in heat_colours()]
    wide, tall = abs(xs.at(1.0) - xs.at(0.0)), abs(ys.at(1.0) - ys.at(0.0))
    gap = min(2.0, 0.15 * wide, 0.15 * tall)
    size = f'width="{wide - gap:.1f}" height="{tall - gap:.1f}"'
    for row, values in enumerate(trace.z):
        for column, value in enumerate(values):
            if value is None or not math.isfinite(value):
                continue
            share = (min(max(value, trace.zmin), trace.zmax) - trace.zmin) / (trace.zmax - trace.zmin)
            x, y = xs.at(float(column)) - (wide - gap) / 2, ys.at(float(row)) - (tall - gap) / 2
            title = _title(trace.text[row][column], paper)
            yield f'<rect x="{x:.1f}" y="{y:.1f}" {size} fill="{colours[round(share * STEPS)]}">{title}</rect>'


def _scatter(trace: Any, xs: Axis, ys: Axis, paper: Paper) -> Iterator[str]:
    along, up = _with_errors(trace, "x"), _with_errors(trace, "y")
    texts = trace.text or [""] * len(along)
    symbols, colour = trace.marker.symbol, trace.marker.color
    symbols = [symbols] * len(along) if isinstance(symbols, str) else symbols
    if "lines" in trace.mode:
        colour = trace.line.color
        points = [(xs.at(x), ys.at(y)) for x, y in zip(trace.x, trace.y, strict=True) if _drawn(y)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = DASHES.get(trace.line.dash)
        yield (
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{trace.line.width:g}"'
            + (f' stroke-dasharray="{dash}"' if dash else "")
            + "/>"
        )
    # a symbol as wide as a cell frames it
    cell = abs(xs.at(1.0) - xs.at(0.0)) if xs.names else math.inf
    for (x, right, left), (y, high, low), text, symbol in zip(along, up, texts, symbols, strict=True):
        if not _drawn(y) or not (isinstance(x, str) or _drawn(x)):
            continue
        cx, cy = xs.at(x), ys.at(y)
        parts = []
        if right or left:
            parts.append(_line(xs.at(x - left), cy, xs.at(x + right), cy, colour, 1))
        if high or low:
            parts.append(_line(cx, ys.at(y - low), cx, ys.at(y + high), colour, 1.6))
        parts.append(_mark(symbol, cx, cy, min(float(trace.marker.size), 0.8 * cell), colour))
        title = _title(text, paper)
        yield f"<g>{title}{''.join(parts)}</g>" if title or len(parts) > 1 else parts[0]


def _drawn(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _annotations(figure: "Figure", xs: Axis, ys: Axis) -> Iterator[str]:
    for note in figure.layout.annotations:
        yield _text(xs.start + 6, ys.at(note.y) - 5, note.text, "start", MUTED)


def _title(text: str, paper: Paper) -> str:
    """A tooltip in plain words."""
    plain = text.replace("<b>", "").replace("</b>", "").replace("<br>", "\n").strip()
    return f"<title>{escape(plain)}</title>" if plain and paper.titles else ""


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = "") -> str:
    style = "" if anchor == "start" else f' text-anchor="{anchor}"'
    style += f' fill="{colour}"' if colour else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}>{escape(text)}</text>'


def _line(
    x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1.0, dash: str | None = None
) -> str:  # fmt: skip
    style = "" if width == 1 else f' stroke-width="{width:g}"'
    style += f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{colour}"{style}/>'


def _mark(symbol: str, x: float, y: float, size: float, colour: str) -> str:
    """A symbol of plotly's, by its name there."""
    half = size / 2
    if symbol == "star":
        turns = [math.radians(36 * place - 90) for place in range(10)]
        reach = [half * (1.0 if place % 2 == 0 else 0.42) * 1.2 for place in range(10)]
        points = " ".join(
            f"{x + r * math.cos(t):.1f},{y + r * math.sin(t):.1f}" for t, r in zip(turns, reach, strict=True)
        )
        return f'<polygon points="{points}" fill="{colour}"/>'
    if symbol == "x-thin":
        path = f"M{x - half:.1f} {y - half:.1f}l{size:.1f} {size:.1f}m0 {-size:.1f}l{-size:.1f} {size:.1f}"
        return f'<path d="{path}" stroke="{colour}" stroke-width="2.4"/>'
    kind, _, hollow = symbol.partition("-")
    paint = f'fill="none" stroke="{colour}" stroke-width="1.3"' if hollow else f'fill="{colour}"'
    if kind == "square":
        return f'<rect x="{x - half:.1f}" y="{y - half:.1f}" width="{size:.1f}" height="{size:.1f}" {paint}/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{half:.1f}" {paint}/>'
