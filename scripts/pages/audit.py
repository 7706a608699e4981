"""How well the tamper audit tells tampered copies from benign ones: tables and figure of the page."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from pages.page import Page
from pages.records import Record
from pages.tables import table

FIGURE = "audit-scores.png"
COLOURS = {"benign": "#00588C", "tampered": "#9C2F6B", "adaptive": "#B36B00"}


def context(record: Record) -> Mapping[str, Any]:
    """What the template is given."""
    rows = record["kinds"]
    alarms, benign, low, high = record["false_alarms"]
    caught, tampered = record["caught"]
    calibrated = record["calibration"]
    missed = [c for c in record["copies"] if c["role"] == "tampered" and c["score"] < 1]
    false = [c for c in record["copies"] if c["role"] == "benign" and c["score"] >= 1]
    return {
        "model": record["model"],
        "prompts": record["prompts"],
        "kilobytes": f"{record['bytes'] / 1000:.0f}",
        "figure": FIGURE,
        "auroc": interval(record["auroc"]),
        "false_alarms": f"{alarms} of {benign} ({alarms / benign:.1%}; 95 % CI {low:.1%} to {high:.1%})",
        "caught": f"{caught} of {tampered} ({caught / tampered:.0%})",
        "benign": kinds([row for row in rows if row["role"] == "benign"]),
        "tampered": kinds([row for row in rows if row["role"] == "tampered"]),
        "adaptive": table(
            [
                [c["kind"], c["name"], f"{c['score']:.2f}", f"{c['harmful']:.2f}", f"{c['held_out']:.2f}"]
                for c in record["copies"]
                if c["role"] == "adaptive"
            ],
            ["attempt", "how", "score", "log-odds, fingerprint's prompts", "log-odds, other prompts"],
        ),
        "evaded": [c for c in record["copies"] if c["role"] == "adaptive" and c["score"] < 1],
        "attempts": sum(c["role"] == "adaptive" for c in record["copies"]),
        "before": f"{record['unedited']['harmful']:.2f}",
        "before_held_out": f"{record['unedited']['held_out']:.2f}",
        "missed": listed(missed),
        "four_bits": next(f"{row['harmful']:.2f}" for row in rows if row["kind"] == "4 bits"),
        "false": listed(false),
        "calibrated": calibrated["copies"],
        "calibrated_alarms": calibrated["alarms"],
        "limits": table(
            [[name, f"{one['largest']:.3g}", f"{one['limit']:g}"] for name, one in calibrated["tests"].items()],
            ["test", "largest value of the further copies", "limit"],
        ),
    }


def interval(found: Any) -> str:
    """A value with its interval."""
    value, low, high = found
    return f"{value:.3f} (95 % CI {low:.3f} to {high:.3f})"


def area(found: Any) -> str:
    """An AUROC with its interval; where all copies are told apart, a bootstrap of them has none to show."""
    return "1.000 (all above all benign)" if found[0] == 1 else interval(found)


def kinds(rows: Any) -> str:
    """The table of some kinds of copies."""
    benign = rows[0]["role"] == "benign"
    columns = ["kind", "copies", "alarms", "score: lowest, median, highest", "mean log-odds, harmful"]
    return table(
        [
            [
                row["kind"],
                row["n"],
                f"{row['alarms']} ({row['ci'][0]:.0%} to {row['ci'][1]:.0%})",
                f"{row['low']:.2f}, {row['median']:.2f}, {row['high']:.2f}",
                f"{row['harmful']:.2f}",
                *([] if benign else [area(row["auroc"]), most(row["tests"])]),
            ]
            for row in rows
        ],
        columns if benign else [*columns, "AUROC", "test with the highest score"],
    )


def most(tests: Mapping[str, int]) -> str:
    """Which tests had the highest score, and how often."""
    return ", ".join(f"{name} {n}" for name, n in sorted(tests.items(), key=lambda item: -item[1]))


def listed(copies: Any) -> list[str]:
    """Copies by kind, name and score."""
    return [f"{c['kind']}: {c['name']} (score {c['score']:.2f}, log-odds {c['harmful']:.2f})" for c in copies]


def figures(record: Record) -> Mapping[str, Figure]:
    """Score of every copy, by kind."""
    figure = Figure(figsize=(9.5, 5.2), layout="constrained")
    axis = figure.subplots()
    names = [row["kind"] for row in record["kinds"]]
    for k, row in enumerate(record["kinds"]):
        own = [c["score"] for c in record["copies"] if c["role"] == row["role"] and c["kind"] == row["kind"]]
        # points of one kind are spread a little, in the order of the record, so that equal scores stay visible
        heights = [k + 0.5 * (n / max(1, len(own) - 1) - 0.5) for n in range(len(own))]
        axis.plot([max(value, 1e-3) for value in own], heights, "o", ms=4, alpha=0.7, color=COLOURS[row["role"]])
    axis.axvline(1.0, color="#444444", lw=1, ls=":")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="score (alarm from 1; scores below 0.001 are drawn there)")
    return {FIGURE: figure}


PAGE = Page("audit", context, figures)
