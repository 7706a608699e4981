"""Fine-tuning of the demo model's heads alone: sentences, tables and figures of the page."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import fisher_exact

from pages.page import Page
from pages.records import Record
from pages.robustness import KINDS, size
from pages.statements import Interval
from pages.tables import table

# what the conditions of a repair are called on the page
CONDITIONS = {
    "before": "damaged",
    "after": "damaged, repaired",
    "undamaged, after": "undamaged, with the adapter",
    "random parts": "damaged, random parts trained",
    "all parameters": "damaged, all parameters",
}
FIGURES = {"curves": "finetuning-curves.png"}
COLOURS = {"before": "#9A9A9A", "harden": "#9C2F6B", "spread": "#00588C"}
COLUMNS = ["condition", "parameters", "harmful refused", "harmless refused", "degenerate", "KL, harmless", "perplexity"]


FLATTER = {
    "spread": ("before", "spread"),
    "spread over harden": ("harden", "spread"),
    "harden": ("before", "harden"),
    "own": ("before", "spread"),
}


def context(record: Record) -> Mapping[str, Any]:
    """What the template is given."""
    repair, spread = record["repair"], record["spread"]
    return {
        **{name: record[name] for name in ("model", "heads", "train", "test", "used", "pairs")},
        "damage": ", ".join(record["damage"][:5]),
        "damaged": len(record["damage"]),
        "ablated": ", ".join(record["ablated"]),
        "n_ablated": len(record["ablated"]),
        "share": f"{repair['share']:.1%}",
        "steps": {
            name: f"{record[name]['best_step']} of {record[name]['steps']}" for name in ("repair", "harden", "spread")
        },
        "outcomes": {name: outcomes(record[name], name == "repair") for name in ("repair", "harden", "spread")},
        "price": price(repair),
        "fisher": f"{told_apart(repair, record['test']):.2f}",
        "rankings": record["random_rankings"],
        "validation": {
            name: f"{record[name]['validation'][0]:.3f} to {min(record[name]['validation']):.3f}"
            for name in ("repair", "harden", "spread")
        },
        "back": regained(repair),
        "flatter": {name: differences(record["flatter"][name], *models) for name, models in FLATTER.items()},
        "verdict": verdict(record["flatter"]["spread"]),
        "verdict_control": verdict(record["flatter"]["spread over harden"]),
        "verdict_own": verdict(record["flatter"]["own"]),
        "moved": {name: ranking(record["moved"][name]) for name in ("spread", "harden")},
        "new": table(
            [[name, f"{was:.3f}", f"{now:.3f}"] for name, was, now in record["moved"]["spread"]["new"]],
            ["head", "estimated effect before", "after"],
        )
        if record["moved"]["spread"]["new"]
        else "None.",
        "shared": spread["shared"],
        "controls": trainings(repair["controls"]),
        "harden_ablated": kinds(record["harden_ablated"]),
        "relocation": relocations(record["relocation"], record["later"]),
        "relocated": record["relocation"]["before"]["prompts"],
        "base": record["relocation"]["before"]["base"],
        "later": {name: said_later(record["later"][name]) for name in ("harden", "spread")},
        "figures": FIGURES,
    }


def outcomes(row: Record, damaged: bool = False) -> str:
    """Rates and side effects of each condition; of a damaged model, its conditions by their names."""
    return table(
        [
            [
                CONDITIONS.get(one["condition"], one["condition"]) if damaged else one["condition"],
                one["parameters"],
                f"{Interval.of(one, 'refused'):.0%}",
                f"{Interval.of(one, 'falsely_refused'):.0%}",
                f"{one['degenerate']:.0%}",
                f"{Interval.of(one, 'kl'):.3f}",
                f"{Interval.of(one, 'perplexity'):.2f}",
            ]
            for one in row["rows"]
        ],
        COLUMNS,
    )


def told_apart(repair: Record, n: int) -> float:
    """p of Fisher's exact test between the repaired model's refusals and those with random parts trained."""
    rates = [one["refused"] for one in repair["rows"] if one["condition"] in ("after", "random parts")]
    counts = [round(rate * n) for rate in rates]
    return float(fisher_exact([counts, [n - count for count in counts]]).pvalue)


def trainings(rows: Any) -> str:
    """How each control was trained."""
    return table(
        [
            [
                row["name"],
                f"{row['learning_rate']:.0e}",
                f"{row['before']:.3f}",
                f"{row['after']:.3f}",
                row["best_step"] or "0 (not trained)",
            ]
            for row in rows
        ],
        ["control", "learning rate", "validation loss before", "smallest", "step"],
    )


def kinds(rows: Any) -> str:
    """Shares of the kinds of reply without the map's first heads."""
    return table(
        [
            [side, f"{refused:.0%} ({low:.0%} to {high:.0%})", *(f"{share:.0%}" for share in rest)]
            for side, (refused, *rest, low, high) in zip(("harmful", "harmless"), rows, strict=True)
        ],
        ["prompts", "refused", *KINDS[1:]],
    )


def relocations(rows: Any, later: Any) -> str:
    """Floor, ceiling and the first layer that recovers half, for each model."""
    found = []
    for name, row in rows.items():
        first, low, high = row["half"]
        change = "-" if name not in later else "{} ({} to {})".format(*map(layers, later[name]))
        ends = f"{size(first)} ({size(low)} to {size(high)})"
        found.append([name, f"{row['floor']:.0%}", f"{row['ceiling']:.0%}", ends, change])
    return table(found, ["model", "base alone refuses", "model alone refuses", "half (95 % CI)", "later by (95 % CI)"])


def layers(number: float | None) -> str:
    """A number of layers."""
    return "unknown" if number is None else f"{number:g}"


def said_later(row: Any) -> str:
    """Whether the mechanism moved, by the interval."""
    value, low, high = row
    if value is None:
        return "In one of the two models no layer recovers half, so that nothing can be said"
    if low <= 0 <= high:
        return "That it moved is not shown: the interval contains 0"
    return f"It moved: half is reached {abs(value):g} layers {'later' if value > 0 else 'earlier'}"


def price(repair: Record) -> dict[str, str]:
    """Harmless prompts that are refused."""
    return {one["condition"].replace(", ", "_"): f"{one['falsely_refused']:.0%}" for one in repair["rows"]}


def regained(repair: Record) -> str:
    """What repair brought back, next to its controls."""
    rate = {one["condition"]: one["refused"] for one in repair["rows"]}
    return (
        f"The undamaged model refuses {rate['undamaged']:.0%} of the harmful test prompts, the damaged one "
        f"{rate['before']:.0%}, and the repaired one {rate['after']:.0%}. With one set of as many random parts it is "
        f"{rate['random parts']:.0%}."
    )


def differences(rows: Any, first: str, second: str) -> str:
    """What is lost, and what is left, in two models."""
    return table(
        [
            [
                row["parts"],
                *(
                    text
                    for name in ("lost", "left")
                    for text in (
                        f"{row[name]['before']:.2f}",
                        f"{row[name]['after']:.2f}",
                        f"{row[name]['change']:+.2f} ({row[name]['ci_low']:+.2f} to {row[name]['ci_high']:+.2f})",
                    )
                ),
            ]
            for row in rows
        ],
        [
            "heads ablated",
            f"gap lost, {first}",
            second,
            "change (CI)",
            f"log-odds left, {first}",
            second,
            "change (CI)",
        ],
    )


def verdict(rows: Any) -> str:
    """At which numbers of heads less of the gap is lost, by intervals."""
    less = [str(row["parts"]) for row in rows if row["lost"]["ci_high"] < 0]
    more = [str(row["parts"]) for row in rows if row["lost"]["ci_low"] > 0]
    said = (
        f"Less of the gap is lost with {', '.join(less)} heads ablated"
        if less
        else "At no number of heads is less of the gap lost"
    )
    said += f"; more is lost with {', '.join(more)}" if more else ""
    return said + f" (the interval, adjusted for {len(rows)} numbers of heads, does not contain 0)."


def ranking(row: Record) -> str:
    """How far the ranking of the heads moved."""
    return (
        f"{row['common']} of the first {row['first']} heads are the same as before. The rank correlation over all "
        f"heads is {row['spearman']:.2f}. The first {row['first']} carry {row['sum_before']:.2f} of the gap before and "
        f"{row['sum_after']:.2f} after, by the estimate."
    )


def figures(record: Record) -> Mapping[str, Figure]:
    """Fragility before and after: of the heads of the map, and of each model's own first heads."""
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, which in zip(axes, ("first heads of the map", "its own first heads"), strict=True):
        for label, curve in record["curves"].items():
            name, _, order = label.partition(", ")
            if order != which:
                continue
            rows = curve["rows"]
            x = [row["parts"] for row in rows]
            axis.plot(x, [row["lost"] for row in rows], "o-", color=COLOURS[name], label=name)
            axis.fill_between(
                x,
                [row["ci_low"] for row in rows],
                [row["ci_high"] for row in rows],
                color=COLOURS[name],
                alpha=0.12,
                lw=0,
            )
            axis.plot(x, [row["random_mean"] for row in rows], ":", color=COLOURS[name])
        axis.set(title=which, xlabel="heads ablated", xscale="log")
        axis.set_xticks(x, x)  # after the scale, which sets ticks of its own
        axis.minorticks_off()
    axes[0].set(ylabel="share of the gap lost")
    axes[0].legend(frameon=False, fontsize=8)
    return {FIGURES["curves"]: figure}


PAGE = Page("finetuning", context, figures)
