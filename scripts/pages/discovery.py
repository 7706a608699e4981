"""Ways to rank the parts of a circuit: sentences, tables and the figure of their page."""

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from pages.page import Page
from pages.records import Record
from pages.tables import table

FIGURE = "discovery.png"
# colour and dashes of a method; the goal sets the dashes
COLOURS = {"gradient": "#00588C", "single effects": "#C9A227", "EAP-IG": "#009E73", "ACDC": "#D55E00"}
COLOURS |= {"masks": "#9C2F6B", "random": "#9A9A9A"}
DASHES = {"reach": "-", "match": "--"}


def context(record: Record) -> Mapping[str, Any]:
    """What the template is given."""
    drawn = any("methods" in row for row in record["models"].values())
    return {"models": [model(name, row) for name, row in record["models"].items()], "figure": FIGURE if drawn else None}


def model(name: str, row: Record) -> dict[str, Any]:
    """Tables and numbers of one model; a study of its goals alone lacks the others."""
    found = {"name": name, "parts": row["parts"], "found_on": row["found_on"], "edges": row["edges"]}
    found["from_curve"] = "sizes" in row
    found |= {"rankings": None, "searches": None, "goals": None, **row["machine"]}
    if methods := row.get("methods"):
        columns = ["ranking, goal", "parts for 0.8", "parts for 0.9", "CMD", "CPR (95 % CI)", "largest F"]
        columns += ["Jaccard", "seconds", "peak GiB"]
        found |= {
            "rankings": table([cells(method, own) for method, own in methods.items()], columns),
            "unseen": methods["random"]["n_pairs"],
            "acdc": "ACDC, reach" in methods,
            "resampled": any("stability" in own for own in methods.values()),
            "smallest": {kind: smallest(methods, kind) for kind in DASHES},
        }
    if rows := row.get("searches"):
        found |= {"searches": searches(rows), "fresh": rows[0]["n_pairs"]}
    if rows := row.get("goals"):
        found |= {"goals": goals(rows), "recall": any(one["recall"] is not None for one in rows)}
    return found


def cells(method: str, found: Record) -> list[str]:
    """A row of the table."""
    needed = found.get("needed")
    low_high = "" if len(found["cpr"]) == 1 else f" ({found['cpr'][1]:.2f} to {found['cpr'][2]:.2f})"
    return [
        method,
        *(["", ""] if needed is None else ["none" if size is None else str(size) for size in needed.values()]),
        f"{found['cmd']:.2f}",
        f"{found['cpr'][0]:.2f}{low_high}",
        f"{max(found['faithfulness']):.2f}",
        *(["", "", ""] if "seconds" not in found else measured(found)),
    ]


def measured(found: Record) -> list[str]:
    """Overlap of resamples, seconds and memory of one ranking."""
    overlap = f"{found['stability']['mean']:.2f}" if "stability" in found else ""
    return [overlap, seconds(found), f"{found['peak_gib']:.1f}"]


def seconds(row: Record) -> str:
    """Seconds of a step; below ten with a decimal."""
    return f"{row['seconds']:.1f}" if row["seconds"] < 10 else f"{row['seconds']:.0f}"


def searches(rows: Any) -> str:
    """The circuits after removal one by one."""
    return table(
        [
            [
                row["search"],
                row["goal"],
                str(row["target"]),
                f"{row['parts']}{'' if row['reached'] else ' (misses its goal)'}",
                "{:.2f} ({:.2f} to {:.2f})".format(*row["fresh"]),
                seconds(row),
                f"{row['peak_gib']:.1f}",
            ]
            for row in rows
        ],
        ["search", "goal", "target", "parts", "faithfulness on fresh pairs (95 % CI)", "seconds", "peak GiB"],
    )


def goals(rows: Any) -> str:
    """Whole maps for each goal: parts, faithfulness on fresh pairs, and the claims by verdict."""
    verdicts = ("holds", "fails", "undecided")
    known = any(row["recall"] is not None for row in rows)
    return table(
        [
            [
                row["goal"],
                str(row["parts"]),
                str(row["opposing"]),
                *([f"{row['recall']:.2f}"] if known else []),
                "{:.2f} ({:.2f} to {:.2f})".format(*row["fresh"]),
                *(", ".join(row["claims"].get(verdict, ())) for verdict in verdicts),
            ]
            for row in rows
        ],
        [
            "goal",
            "parts",
            "against",
            *(["recall"] if known else []),
            "faithfulness on fresh pairs (95 % CI)",
            *verdicts,
        ],
    )


def smallest(methods: Record, kind: str) -> dict[str, Any]:
    """The ranking for a goal that needs the fewest parts for 0.8, and how many the others need."""
    sizes = {
        method.split(",")[0]: found["needed"]["0.8"]
        for method, found in methods.items()
        if method.endswith(f", {kind}") and found["needed"]["0.8"] is not None
    }
    order = sorted(sizes, key=lambda method: (sizes[method], method))
    return {"order": [f"{method} ({sizes[method]})" for method in order]}


def figures(record: Record) -> Mapping[str, Figure]:
    """Faithfulness against size, one panel per model with rankings."""
    models = {name: row for name, row in record["models"].items() if "methods" in row}
    if not models:
        return {}
    columns = min(len(models), 3)
    rows = math.ceil(len(models) / columns)
    figure = Figure(figsize=(4.2 * columns + 1.8, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for spare in axes[len(models) :]:
        spare.remove()
    axes = axes[: len(models)]
    for axis, (name, row) in zip(axes, models.items(), strict=True):
        for method, found in row["methods"].items():
            kind, _, goal = method.partition(", ")
            share = [size / row["parts"] for size in found["sizes"]]
            axis.plot(share, found["faithfulness"], DASHES.get(goal, ":"), color=COLOURS[kind], label=method)
        axis.axhline(1.0, color="#9A9A9A", lw=0.8)
        axis.set(title=name, xlim=(0, 1), xlabel="share of all heads and MLPs")
    figure.supylabel("faithfulness on pairs that no method saw", fontsize="medium")
    # one model may lack a method
    lines = {line.get_label(): line for axis in axes for line in axis.get_lines() if line.get_label()[:1] != "_"}
    figure.legend(lines.values(), lines.keys(), loc="outside right center", frameon=False)
    return {FIGURE: figure}


PAGE = Page("discovery", context, figures)
