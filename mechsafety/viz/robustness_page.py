"""The page of a `mechsafety.robustness.RobustnessReport`: one question, one table, one chart, and what is left open."""

import math
from typing import TYPE_CHECKING

from mechsafety.results import reads_where
from mechsafety.viz import words
from mechsafety.viz.chart_svg import DARK_FRAME, NARROW, WIDE, chart_svg
from mechsafety.viz.charts import loss_curve
from mechsafety.viz.html import dark_rules, template
from mechsafety.viz.look import PLAIN

if TYPE_CHECKING:
    from mechsafety.robustness import RobustnessReport, RobustnessRow

# measures that are also shown large, at the top
CARDS = (
    "refusals",
    "smallest number of parts that halves refusals",
    "area between the curves",
    "largest loss by one part",
    "redundancy",
    "overlap with ordinary ability",
    "effective number of parts",
)
# measures that are shares
SHARES = (
    "refusals",
    "refusals after as many random parts",
    "area between the curves",
    "largest loss by one part",
    "redundancy",
    "difference from the base model that lasts",
)


def render_robustness(report: "RobustnessReport") -> str:
    """The page as HTML; it opens without network, and the same report gives the same text."""
    rows = report.rows()
    figure = loss_curve(report)
    title = "Share of the gap lost over the number of ablated parts"
    origin = report.provenance
    return template("robustness.html.j2").render(
        model=words.plain(origin.model),
        verdict=report.verdict,
        finding=report.finding,
        cards=[_card(row) for row in rows if row.measure in CARDS],
        rows=[_row(row) for row in rows],
        charts=[(name, chart_svg(figure, title, paper)) for name, paper in (("wide", WIDE), ("narrow", NARROW))],
        parts=[str(node) for node in report.parts],
        notes=report.notes(),
        options=[(name, _shown(value)) for name, value in origin.options.items()],
        provenance=[
            ("model", words.plain(origin.model)),
            ("weights, SHA-256", origin.weights_sha256),
            ("data type, device", f"{origin.dtype}, {origin.device}"),
            ("chat template, SHA-256", origin.template_sha256),
            ("metric", reads_where(report.curve.metric)),
            ("seed", str(origin.seed)),
            *((f"version: {name}", version) for name, version in origin.versions.items()),
        ],
        dark=[*dark_rules(PLAIN), *DARK_FRAME.items()],
    )


def _value(row: "RobustnessRow", value: float | None) -> str:
    if value is None or math.isnan(value):
        return words.DASH
    if math.isinf(value):
        return "never" if row.measure.startswith("smallest") else ("\u2212" * (value < 0) + "\u221e")
    if row.measure in SHARES:
        return words.percent(value)
    return words.number(value, 0 if float(value).is_integer() else 2)


def _ends(row: "RobustnessRow") -> str:
    return words.DASH if row.interval is None else " to ".join(_value(row, end) for end in row.interval)


def _card(row: "RobustnessRow") -> dict[str, str]:
    note = row.says if row.interval is None else f"95 % interval {_ends(row)}"
    return {"name": row.measure, "value": _value(row, row.value), "note": note}


def _row(row: "RobustnessRow") -> dict[str, str]:
    p = words.DASH if row.p_value is None else words.p_value(row.p_value).removeprefix("p ").removeprefix("= ")
    return {
        "measure": row.measure,
        "value": _value(row, row.value),
        "interval": _ends(row),
        "reference": _value(row, row.reference),
        "p": p,
        "says": row.says,
        "undecided": row.undecided or words.DASH,
    }


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else words.plain(str(value))
