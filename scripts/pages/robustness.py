"""How fragile the demo model's refusal is: sentences, tables and figures of the page."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from pages.page import Page
from pages.records import Record
from pages.statements import Interval
from pages.tables import table

FIGURES = {"curves": "robustness-curves.png", "depth": "robustness-depth.png"}
COLOURS = {
    "whole circuit": "#9C2F6B",
    "heads": "#00588C",
    "heads at the other prompt's values": "#3D8B37",
    "edges": "#C46A00",
    "refusal direction": "#5B4FA2",
}
SOURCES = {
    "mean": "Each is held at its mean over the harmless prompts.",
    "zero": "It is removed from all that is written to the residual stream.",
    "counterfactual": "Each takes what it has on the harmless prompt of the pair, at every token of prompt and reply.",
}
CUT = "Each carries what its sender writes on the harmless prompt of the pair. No replies were generated."
COLUMNS = ["gap lost (95 % CI)", "random parts", "p", "KL, harmless", "random", "overlap"]
KINDS = ("refuses", "answers", "degenerate", "neither")


def context(record: Record) -> Mapping[str, Any]:
    """What the template is given."""
    doubled, shared, spread = record["redundancy"], record["entanglement"], record["concentration"]
    return {
        "model": record["model"],
        "pairs": record["pairs"],
        "parts": record["parts"],
        "candidates": record["candidates"],
        "figures": FIGURES,
        "curves": [curve(name, row) for name, row in record["curves"].items()],
        "joint": three(doubled["joint"]),
        "summed": three(doubled["summed"]),
        "redundancy": three(doubled["redundancy"]),
        "takes_over": table(
            [
                [
                    row["node"],
                    row["before"],
                    row["after"],
                    f"{row['change']:.3f} ({row['ci_low']:.3f} to {row['ci_high']:.3f})",
                ]
                for row in doubled["takes_over"]
            ],
            ["node", "direct effect before", "with the circuit patched", "change (95 % CI)"],
        ),
        "shared": shared["shared"],
        "of": shared["refusal"],
        "expected": f"{shared['expected']:.1f}",
        "p": f"{shared['p']:.2g}",
        "ordinary": shared["prompts"],
        "most": table(
            [[row["node"], row["kl"], "yes" if row["refusal"] else "no"] for row in shared["most"]],
            ["node", "KL, nats", "in the refusal circuit"],
        ),
        "gini": f"{spread['gini']:.2f}",
        "effective": f"{spread['effective']:.1f}",
        "depth": depth(record["depth"]),
        "relocation": relocated(record["relocation"]),
    }


def three(values: Any, spec: str = ".2f") -> str:
    """A value with its interval."""
    value, low, high = values
    return f"{value:{spec}} (95 % CI {low:{spec}} to {high:{spec}})"


def curve(name: str, row: Record) -> dict[str, Any]:
    """Tables and numbers of one curve."""
    what, swept = row["what"], len({one["strength"] for one in row["rows"]}) > 1
    columns = ["strength", *COLUMNS] if swept else [f"{what} ablated", *COLUMNS]
    rows = [
        [
            f"{one['strength']:g}" if swept else one["parts"],
            f"{one['lost']:.2f} ({one['ci_low']:.2f} to {one['ci_high']:.2f})",
            f"{one['random_mean']:.2f} ({one['random_low']:.2f} to {one['random_high']:.2f})",
            "-" if row["mlps"] else f"{one['p_value']:.3f}",  # with most MLPs in the circuit all rankings begin alike
            f"{one['kl']:.2f}",
            f"{one['random_kl']:.2f}",
            f"{one['random_overlap']:.0%}",
        ]
        for one in row["rows"]
    ]
    half, low, high = row["half"]
    kinds = row["kinds"]
    return {
        "name": name,
        "what": what,
        "parts": row["parts"],
        "mlps": row["mlps"],
        "first": ", ".join(row["order"]),
        "source": CUT if what == "edges" else SOURCES[row["source"]],
        "found_on": row["found_on"],
        "counterfactual": row["source"] == "counterfactual",
        "table": table(rows, columns),
        "said": said(row, swept) if kinds else "",
        "unedited": ", ".join(f"{kind} {share:.0%}" for kind, share in zip(KINDS, row["unedited"], strict=True))
        if kinds
        else "",
        "one": row["parts"] == 1,
        "half": f"1 {what[:-1]} is" if half == 1 else f"{size(half)} {what} are",
        "half_ci": f"{size(low)} to {size(high)}",
        "lost": "refusals are" if kinds else "gap is",
        "words_in": what == "edges" and row["order"][0].startswith("embed "),
        "broken": bool(kinds) and kinds[0][2] == 1,
        "area": three(row["area"]),
    }


def said(row: Record, swept: bool) -> str:
    """Kinds of reply at the largest strength, to harmful prompts and, where they were measured, to harmless ones."""
    last = max(one["strength"] for one in row["rows"])
    columns = [f"{row['what']} ablated", *KINDS, "refuses, random"]
    harmless = row["harmless"][1:]  # the unedited model comes first
    columns += ["harmless: refuses", "degenerate", "perplexity (95 % CI)", "perplexity, random"] if harmless else []
    found = []
    for k, one in enumerate(one for one in row["rows"] if one["strength"] == last):
        cells = [one["parts"], *(f"{share:.0%}" for share in row["kinds"][k]), f"{one['random_refuses']:.0%}"]
        if harmless:
            ends = [f"{one[name]:.2f}" for name in ("perplexity", "perplexity_low", "perplexity_high")]
            cells += [f"{one['harmless_refuses']:.0%}", f"{one['harmless_degenerate']:.0%}"]
            cells += ["{} ({} to {})".format(*ends), f"{one['random_perplexity']:.2f}"]
        found.append(cells)
    return ("At strength 1:\n\n" if swept else "") + table(found, columns)


def size(count: int | None) -> str:
    """A number of parts."""
    return "never" if count is None else str(count)


def depth(record: Record) -> dict[str, Any]:
    """Numbers of the depth in tokens."""
    given, along = measures(record)
    return {
        "prompts": record["prompts"],
        "opener": "".join(record["opener"]),
        "tokens": len(record["opener"]),
        "start": three([given[0][key] for key in ("value", "ci_low", "ci_high")]),
        "one": three([given[1][key] for key in ("value", "ci_low", "ci_high")]),
        "end": three([given[-1][key] for key in ("value", "ci_low", "ci_high")]),
        "kl_first": f"{along[0]['value']:.2f}",
        "kl_fifth": f"{along[min(4, len(along) - 1)]['value']:.2f}",
        "kl_last": f"{along[-1]['value']:.2f}",
        "length": len(along),
    }


def relocated(record: Record) -> dict[str, Any]:
    """Numbers of the relocation."""
    rows = [
        [
            row["layer"],
            f"{Interval.of(row, 'refused'):.0%}",
            f"{row['degenerate']:.0%}",
            three([row[key] for key in ("log_odds", "log_odds_low", "log_odds_high")]),
        ]
        for row in record["rows"]
        if row["run"] == "patched"
    ]
    first, low, high = record["half"]
    return {
        **{name: record[name] for name in ("base", "prompts")},
        **{name: f"{record[name]:.0%}" for name in ("floor", "ceiling")},
        "same": "exactly the same log-odds" if record["same"] else "other log-odds, which must not be",
        "half": size(first),
        "half_ci": f"{size(low)} to {size(high)}",
        "middle": f"{(record['floor'] + record['ceiling']) / 2:.0%}",
        "table": table(rows, ["after layer", "refuses (95 % CI)", "degenerate", "log-odds (95 % CI)"]),
    }


def measures(record: Record) -> tuple[list[Any], list[Any]]:
    """Rows of the metric after an opener, and of the KL along the replies, which has no value once all have ended."""
    known = [row for row in record["rows"] if row["value"] is not None]
    given = [row for row in known if row["measure"] == "metric after opener"]
    return given, [row for row in known if row not in given]


def figures(record: Record) -> Mapping[str, Figure]:
    """The curves against random parts, and the depth in tokens."""
    return {FIGURES["curves"]: curves(record), FIGURES["depth"]: tokens(record["depth"])}


def curves(record: Record) -> Figure:
    """Share of the gap lost, side effects and refusals against the number of ablated parts."""
    figure = Figure(figsize=(11.5, 4.4), layout="constrained")
    lost, cost, replies = figure.subplots(1, 3)
    for name, row in record["curves"].items():
        found, colour = [one for one in row["rows"] if one["strength"] == 1], COLOURS[name]
        if row["parts"] == 1:  # one direction has no curve over parts
            continue
        x = [one["parts"] for one in found]
        y, low, high = ([one[key] for one in found] for key in ("lost", "ci_low", "ci_high"))
        lost.plot(x, y, "o-", color=colour, label=name)
        lost.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
        lost.plot(x, [one["random_mean"] for one in found], ":", color=colour)
        cost.plot(x, [one["kl"] for one in found], "o-", color=colour)
        cost.plot(x, [one["random_kl"] for one in found], ":", color=colour)
        if row["kinds"]:
            replies.plot(x, [kinds[0] for kinds in row["kinds"]], "o-", color=colour)
            replies.plot(x, [kinds[2] for kinds in row["kinds"]], "x--", color=colour)
    lost.set(title="share of the gap lost\n(dotted: random parts)")
    cost.set(title="KL on harmless prompts, nats\n(dotted: random parts)")
    replies.set(title="replies to harmful prompts\n(dots: refuses, crosses: degenerate)", ylim=(-0.03, 1.03))
    for axis in (lost, cost, replies):
        axis.set(xlabel="parts ablated", xscale="log")
        axis.xaxis.set_major_formatter("{x:g}")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=4)
    return figure


def tokens(record: Record) -> Figure:
    """The metric after the first words of an answer, and the KL along the reply."""
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, rows in zip(axes, measures(record), strict=True):
        x, y = ([row[key] for row in rows] for key in ("token", "value"))
        axis.plot(x, y, "o-", color="#00588C")
        axis.fill_between(
            x, [row["ci_low"] for row in rows], [row["ci_high"] for row in rows], color="#00588C", alpha=0.15, lw=0
        )
    axes[0].axhline(0.0, color="#9A9A9A", lw=0.8)
    axes[0].set(title="refusal log-odds", xlabel="tokens of the opener given")
    axes[1].set(title="KL(aligned || base), nats", xlabel="token of the reply", ylim=(0, None))
    return figure


PAGE = Page("robustness", context, figures)
