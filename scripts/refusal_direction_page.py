"""The page of the refusal direction, drawn from docs/results/refusal-direction.json alone, and its figures.

python scripts/refusal_direction_page.py             # draw page and figures again
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from statements import Interval, Rate, Sentence, look_up, say, table

from mechsafety.output import json_text

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OUT = Path(__file__).resolve().parents[1] / "docs" / "results"
NAME = "refusal-direction"
Record = Mapping[str, Any]

# the published conditions: KL of at most this, and a layer below this share of the depth
MAX_KL, MAX_DEPTH = 0.1, 0.8
JBB, ALPACA = "rates/JailbreakBench", "rates/Alpaca (rest)"
FITTED_ON = ("AdvBench and Alpaca", "built-in pairs")


def write(out: Path, record: Record) -> None:
    """JSON, page and figures, into the folder ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{NAME}.json").write_text(json_text(record) + "\n")
    heatmaps(record, out / f"{NAME}-candidates.png")
    curves(record, out / f"{NAME}-doses.png")
    (out / f"{NAME}.md").write_text(page(record))
    print(f"wrote {out / NAME}.md")


# --- what the page says, and the numbers that carry it ------------------------------------------------------------


def frame(record: Record) -> pd.DataFrame:
    """Candidates, with whether each meets the published conditions apart from depth."""
    found = pd.DataFrame(record["candidates"])
    found["meets"] = (found.induce > 0) & ~(found.kl > MAX_KL)
    return found


def depth_limit(record: Record) -> int:
    """First layer that the rule does not take."""
    return int(MAX_DEPTH * (1 + max(row["layer"] for row in record["candidates"])))


def passing(record: Record) -> int:
    found = frame(record)
    return int((found.meets & (found.layer < depth_limit(record))).sum())


def chosen(record: Record) -> dict[str, Any]:
    return next(row for row in record["candidates"] if row["chosen"])


def deeper(record: Record) -> pd.DataFrame:
    """Candidates that meet the conditions at layers that the rule leaves out, and remove more than the chosen one."""
    found = frame(record)
    return found[found.meets & (found.layer >= depth_limit(record)) & (found.bypass < chosen(record)["bypass"])]


def named(rows: pd.DataFrame) -> str:
    return ", ".join(f"layer {row.layer} (bypass {row.bypass:.2f})" for row in rows.itertuples()) or "none"


def rate(path: str) -> Any:
    return lambda record: Rate.of(look_up(record, path))


def doses_of(record: Record, way: str, measure: str) -> str:
    rows = [row for row in record["doses"][way] if row["measure"] == measure]
    return ", ".join(f"{row['value']:.0%} at {row['strength']:g}" for row in rows)


def largest_random_move(record: Record) -> float:
    """How far random directions move either rate, in points of a hundred."""
    moved = []
    for place, way in ((JBB, "removed"), (ALPACA, "added")):
        plain = Rate.of(look_up(record, f"{place}/as it is")).value
        moved += [abs(Rate.of(look_up(record, f"{place}/random {k} {way}")).value - plain) for k in (1, 2)]
    return 100 * max(moved)


def conditions(record: Record) -> list[tuple[str, str]]:
    """Sets of prompts and conditions whose rates are shown."""
    return [(name, condition) for name, row in record["rates"].items() for condition in row]


def judged(record: Record) -> int:
    """In how many of them it was measured what the replies are."""
    found = record.get("replies", {})
    return sum(condition in found.get(name, {}) for name, condition in conditions(record))


def removals(record: Record) -> list[Record]:
    """What replies are once another method's vector is removed, row by row, where measured."""
    rows = [row.get(f"{way}_replies") for row in record["others"] for way in ("removed", "removed_at_site")]
    return [row for row in rows if row]


def mostly_babble(record: Record) -> int:
    """In how many of these most of the replies that no longer refuse are degenerate."""
    return sum(2 * row["lost"][1] > row["lost"][0] for row in removals(record))


def other(data: str, method: str, way: str) -> Any:
    return rate(f"others/data={data},method={method}/{way}")


def probe_counts(record: Record) -> dict[str, Any]:
    """What the sentences on probes count; of shuffled labels and of KL over the rows where these were measured."""
    rows = record["probes"]
    best = max(rows, key=lambda row: row["accuracy"])
    drawn = [row for row in rows if row.get("shuffled_draws")]
    erasures = [
        (row[f"{name}_high"] < row["random_erased_low"], row.get(f"{name}_kl"))
        for row in rows
        for name in ("erased", "pattern_erased")
        if row[name] is not None
    ]
    costs = [kl for lower, kl in erasures if lower and kl is not None]
    return {
        "n": len(rows),
        "above": sum(row["accuracy_low"] > row["lexical"] for row in rows),
        "lexical": rows[0]["lexical"],
        "best": best["accuracy"],
        "where": f"layer {best['layer']}, {best['span']}",
        "lowest_shuffled": min((row["shuffled"] for row in drawn), default=None),
        "highest_shuffled": max((row["shuffled"] for row in drawn), default=None),
        "draws": len(drawn[0]["shuffled_draws"]) if drawn else 0,
        "erasures": len(erasures),
        "lower": sum(lower for lower, _ in erasures),
        "known": len(costs),
        "costly": sum(kl > MAX_KL for kl in costs),
    }


def missing(record: Record) -> int:
    """How many of the four rates that tell method from data are not measured."""
    rows = {(row["data"], row["method"]): row["removed"] for row in record["others"]}
    wanted = [(data, method) for data in FITTED_ON for method in ("mean difference", "representation reading")]
    return sum(rows.get(one) is None for one in wanted)


def counted(name: str) -> Any:
    return lambda record: probe_counts(record)[name]


# what is said of the chosen candidate
CHOICE = {
    "layer": "chosen/layer",
    "column": "chosen/column",
    "bypass": lambda r: chosen(r)["bypass"],
    "passing": passing,
    "n": lambda r: len(r["candidates"]),
}
SENTENCES = {
    "choice": Sentence(
        "Layer {layer}, column {column}, whose bypass score is {bypass:.2f}: the lowest of the candidates "
        "that meet the "
        "published conditions ({passing} of {n}).",
        CHOICE,
        lambda passing: passing > 0,
        Sentence(
            "**None of {n} candidates meets the published conditions** ({passing} do); shown is the lowest "
            "bypass score "
            "below the depth limit, layer {layer}, column {column} ({bypass:.2f}).",
            CHOICE,
            lambda passing: passing == 0,
        ),
    ),
    "depth": Sentence(
        "The choice hangs on the rule's depth limit: it takes layers below {limit}, and {layer} is the "
        "deepest of them. "
        "Without the limit {count} more candidates meet the conditions with a lower bypass score than {bypass:.2f}: "
        "{deeper}.",
        {
            "limit": depth_limit,
            "layer": "chosen/layer",
            "count": lambda r: len(deeper(r)),
            "bypass": lambda r: chosen(r)["bypass"],
            "deeper": lambda r: named(deeper(r)),
        },
        lambda limit, layer, count: layer == limit - 1 and count > 0,
        Sentence(
            "The rule takes layers below {limit}; without that limit {count} more candidates meet the conditions "
            "with a "
            "lower bypass score.",
            {"limit": depth_limit, "count": lambda r: len(deeper(r))},
            lambda count: count >= 0,
        ),
    ),
    "cosmic": Sentence(
        "COSMIC, which reads no output, takes layer {layer}, column {column}: {here:.2f} there against {there:.2f} at "
        "the chosen one.",
        {
            "layer": "cosmic/layer",
            "column": "cosmic/column",
            "here": lambda r: candidate(r, **r["cosmic"])["cosmic"],
            "there": lambda r: chosen(r)["cosmic"],
        },
        lambda here, there: here >= there,
    ),
    "removal": Sentence(
        "Removing it cuts refusals on JailbreakBench: {before} as it is, {after} with the direction removed.",
        {"before": rate(f"{JBB}/as it is"), "after": rate(f"{JBB}/direction removed")},
        lambda before, after: after.high < before.low,
        "Removing it does **not** cut refusals on JailbreakBench beyond the intervals: {before} as it is, {after} with "
        "the direction removed.",
    ),
    "babble": Sentence(
        "Of {lost} JailbreakBench prompts that are refused as it is and not with the direction removed, {degenerate} "
        "get a degenerate reply; perplexity under the unedited model is {before:.1f} before and {after:.1f} after.",
        {
            "lost": "replies/JailbreakBench/direction removed/lost/0",
            "degenerate": "replies/JailbreakBench/direction removed/lost/1",
            "before": "replies/JailbreakBench/as it is/perplexity",
            "after": "replies/JailbreakBench/direction removed/perplexity",
        },
        lambda lost, degenerate: 2 * degenerate <= lost,
        "**With the direction removed the model babbles rather than complies**: of {lost} JailbreakBench prompts that "
        "are refused as it is and no longer, {degenerate} get a degenerate reply; perplexity under the unedited model "
        "is {before:.1f} before and {after:.1f} after.",
    ),
    "babble_open": Sentence(
        "What the replies are that no longer refuse, answers or babble, was not measured ({judged} of {n} conditions), "
        "so that no compliance is claimed.",
        {"judged": judged, "n": lambda r: len(conditions(r))},
        lambda judged: judged == 0,
    ),
    "addition": Sentence(
        "Adding it makes at least 80 % of Alpaca prompts refused: {added} at strength 1, the length of the mean "
        "difference, at a KL of {kl:.2f} and a perplexity of {perplexity:.1f}. At other strengths, on the "
        "dose-response's prompts: {doses}.",
        {
            "added": rate(f"{ALPACA}/direction added"),
            "kl": "doses/added/strength=1.0,measure=KL, harmless/value",
            "perplexity": "doses/added/strength=1.0,measure=perplexity, harmless/value",
            "doses": lambda r: doses_of(r, "added", "refusal rate, harmless"),
        },
        lambda added: added.value >= 0.8,
        "Adding it does **not** make 80 % of Alpaca prompts refused: {added} at strength 1, the length of the mean "
        "difference, at a KL of {kl:.2f} and a perplexity of {perplexity:.1f}. At other strengths, on the "
        "dose-response's prompts: {doses}.",
    ),
    "random": Sentence(
        "Two random directions of the same length move neither rate by more than 10 points (at most {moved:.0f}).",
        {"moved": largest_random_move},
        lambda moved: moved <= 10,
        "Random directions of the same length **do** move a rate by more than 10 points (by {moved:.0f}).",
    ),
    "hooks": Sentence(
        "Hooks and orthogonalised weights are the same edit: their logits differ by at most {gap:.1e}, where the edit "
        "itself moves logits by {moved:.1f}; after both the model is as before (difference {after:.1e}).",
        {
            "gap": "equality/hooks against weights",
            "moved": "equality/hooks against the model",
            "after": "equality/after",
        },
        lambda gap, moved, after: gap < 1e-3 and moved > 1 and after == 0.0,
    ),
    "writers": Sentence(
        "The nodes of the found circuit ({nodes} heads and MLPs) write {share:.0%} of the pairs' gap along the "
        "direction, and lie closer to it than others: mean absolute cosine of a node's change {inside:.3f} in the "
        "circuit, {outside:.3f} elsewhere.",
        {
            "nodes": "writers/circuit_nodes",
            "share": "writers/written_by_circuit",
            "inside": "writers/mean_abs_cosine/circuit",
            "outside": "writers/mean_abs_cosine/other nodes",
        },
        lambda inside, outside: inside > outside,
    ),
    "probes": Sentence(
        "{above} of {n} probes tell harmful from harmless prompts better than the text alone does ({lexical:.2f}), by "
        "the interval of their accuracy; the best ({where}) is right in {best:.0%}.",
        {name: counted(name) for name in ("above", "n", "lexical", "where", "best")},
        lambda above: above > 0,
    ),
    "shuffled": Sentence(
        "With labels swapped at random within pairs, and scored against these labels, probes are right in "
        "{lowest_shuffled:.0%} to {highest_shuffled:.0%} of cases (means over {draws} draws): folds leak nothing.",
        {name: counted(name) for name in ("lowest_shuffled", "highest_shuffled", "draws")},
        lambda lowest_shuffled, highest_shuffled: lowest_shuffled > 0.4 and highest_shuffled < 0.6,
    ),
    "not_shuffled": Sentence(
        "The control with shuffled labels was not measured ({draws} draws), so that the folds are not checked here.",
        {"draws": counted("draws")},
        lambda draws: draws == 0,
    ),
    "erasing": Sentence(
        "{lower} of {erasures} erasures lower the log-odds beyond the interval of random directions. What else they "
        "take away is measured for {known} of these: {costly} change the next token on harmless Alpaca prompts by more "
        "than 0.1 nats of KL, the most that the rule for directions allows. Such a change of the log-odds is not of "
        "refusal alone.",
        {name: counted(name) for name in ("lower", "erasures", "known", "costly")},
        lambda lower, known, costly: lower > 0 and known > 0 and costly > 0,
        Sentence(
            "{lower} of {erasures} erasures lower the log-odds beyond the interval of random directions. What "
            "else they "
            "take away, their KL on harmless prompts, is measured for {known} of these, of which {costly} cost more "
            "than 0.1 nats: where it is not known, nothing is claimed about what the model uses.",
            {name: counted(name) for name in ("lower", "erasures", "known", "costly")},
            lambda lower, known, costly: lower > 0 and costly <= known,
        ),
    ),
    "others_babble": Sentence(
        "**In {babble} of {n} removals most of the replies that no longer refuse are degenerate**: there the model "
        "babbles rather than complies.",
        {"babble": mostly_babble, "n": lambda r: len(removals(r))},
        lambda babble: babble > 0,
        "In {babble} of {n} removals most of the replies that no longer refuse are degenerate.",
    ),
    "others_open": Sentence(
        "What the replies are that no longer refuse was not measured here ({n} removals).",
        {"n": lambda r: len(removals(r))},
        lambda n: n == 0,
    ),
    "data_open": Sentence(
        "{missing} of the four rates that would tell the method from what it was fitted on are not measured, "
        "so that no "
        "method is called better than another.",
        {"missing": missing},
        lambda missing: missing > 0,
    ),
    "data": Sentence(
        "What the direction is fitted on matters more than how: removed everywhere, a mean difference leaves {md_own} "
        "of JailbreakBench refused when fitted on AdvBench and Alpaca, and {md_pairs} when fitted on built-in pairs; "
        "representation reading {rr_own} and {rr_pairs}.",
        {
            "md_own": other(FITTED_ON[0], "mean difference", "removed"),
            "md_pairs": other(FITTED_ON[1], "mean difference", "removed"),
            "rr_own": other(FITTED_ON[0], "representation reading", "removed"),
            "rr_pairs": other(FITTED_ON[1], "representation reading", "removed"),
        },
        lambda md_own, md_pairs, rr_own, rr_pairs: (
            md_own.high < md_pairs.low
            and abs(md_own.value - md_pairs.value) > abs(md_own.value - rr_own.value)
            and abs(md_own.value - md_pairs.value) > abs(md_pairs.value - rr_pairs.value)
        ),
        "Removed everywhere, a mean difference leaves {md_own} of JailbreakBench refused when fitted on AdvBench and "
        "Alpaca, and {md_pairs} when fitted on built-in pairs; representation reading {rr_own} and {rr_pairs}.",
    ),
}


def candidate(record: Record, layer: int, column: int) -> dict[str, Any]:
    return look_up(record, f"candidates/layer={layer},column={column}")


def subspace_sentence(record: Record) -> Sentence:
    """How far the search for more directions went; its two cases are two searches."""
    numbers = {
        "left": rate(f"{JBB}/direction removed"),
        "n": lambda r: len(r["subspace"]),
        "held": lambda r: sum(row["causal"] for row in r["subspace"]),
    }
    if record["sizes"]["subspace_stop_below"] is not None:
        return Sentence(
            "The search ended when the mean log-odds were below 0, after {n} ({held} causal), although {left} of "
            "JailbreakBench is refused even then: **no further direction was judged**, so that this is no evidence "
            "that there is only one.",
            numbers,
            lambda n, held: n == held,
        )
    return Sentence(
        "The search goes on below mean log-odds of 0, as {left} of JailbreakBench is refused even then, and ends at "
        "the first direction that does no more than random ones. **{held} of {n} looked at are causal**; that is a "
        "matter of significance, and the column of changes says how much each does.",
        numbers,
        lambda n, held: held <= n,
    )


# --- the page -------------------------------------------------------------------------------------------------------


def page(record: Record) -> str:
    """The page's text."""
    sizes, said = record["sizes"], {name: say(record, SENTENCES[name]) for name in told(record)}
    train, held = sizes["train"], sizes["validation"]
    took = record["seconds"]
    lines = [
        "# The refusal direction of the demo model",
        "",
        "Measured by `scripts/reproduce_refusal_direction.py`, drawn from "
        f"[{NAME}.json]({NAME}.json) by `scripts/{NAME.replace('-', '_')}_page.py`. Arditi et al. 2024; "
        "[what is computed](../methods.md).",
        f"Means over {train[0]} AdvBench and {train[1]} Alpaca prompts; chosen on {held[0]} HarmBench (validation) and "
        f"{held[1]} other Alpaca prompts, all treated as expected by the model.",
        "Metric: log-odds that the reply begins with one of "
        f"{', '.join(f'`{token}`' for token in record['metric']['refusal_tokens'])}. Intervals are 95 %.",
        *([f"Finding and judging all candidates took {took:.0f} s."] if took else []),
        *later(record),
        "",
        "## The choice",
        "",
        f"{said['choice']} {said['depth']} {said['cosmic']}",
        "",
        f"![All candidates]({NAME}-candidates.png)",
        "",
        *score_table(record),
        "",
        "## What it does to replies",
        "",
        *rate_table(record),
        "",
        *(
            f"- {said[name]}"
            for name in ("removal", "babble", "babble_open", "addition", "random", "hooks")
            if name in said
        ),
        "",
        "## Doses and side effects",
        "",
        f"![Doses]({NAME}-doses.png)",
        "",
        f"{sizes['dose']} harmful prompts: the first of JailbreakBench in its own order, so that only its first "
        "categories are among them; as many of Alpaca.",
        "",
        *dose_table(record),
        "",
        "## More than one direction?",
        "",
        "Directions found one after the other, each in what is left when those before are removed; chosen on half of "
        "the harmful validation prompts, judged on the others against random directions. "
        + say(record, subspace_sentence(record)),
        "",
        *subspace_table(record),
        "",
        "## Who writes it, who reads it",
        "",
        said["writers"],
        "",
        *writer_tables(record["writers"]),
        "",
        "## Heads, scored six ways",
        "",
        *head_tables(record["heads"]),
        "",
        "## Probes",
        "",
        *(f"- {said[name]}" for name in ("probes", "shuffled", "not_shuffled", "erasing") if name in said),
        "",
        *probe_table(record),
        "",
        "## Other directions",
        "",
        *other_section(
            record,
            f"{said.get('data') or said['data_open']} {said.get('others_babble') or said['others_open']}",
        ),
        "",
    ]
    return "\n".join(lines)


def told(record: Record) -> list[str]:
    """Names of the sentences of this record: those on what was not measured stand in for those on what was."""
    left_out = {"data" if missing(record) else "data_open"}
    left_out.add("not_shuffled" if probe_counts(record)["draws"] else "shuffled")
    left_out.add("babble_open" if judged(record) else "babble")
    left_out.add("others_open" if removals(record) else "others_babble")
    return [name for name in SENTENCES if name not in left_out]


def later(record: Record) -> list[str]:
    """Parts that were measured after the others."""
    return [
        f"*{what['section']}* was measured on {what['date']}, {what['how']}."
        for what in record.get("later", {}).values()
    ]


def score_table(record: Record) -> list[str]:
    unedited = record["unedited"]
    rows = [["none", f"{unedited['bypass']:.2f}", f"{unedited['induce']:.2f}", "0"]]
    listed = [("**chosen**", chosen(record)), *((row["control"], row) for row in record["controls"])]
    rows += [[name, *(f"{Interval.of(row, k)}" for k in ("bypass", "induce", "kl"))] for name, row in listed]
    return table(["direction", "bypass (harmful, removed)", "induce (harmless, added)", "KL (harmless, removed)"], rows)


def rate_table(record: Record) -> list[str]:
    columns, replies = ["prompts", "condition", "refused"], record.get("replies")
    rows = [[name, condition, f"{Rate.of(record['rates'][name][condition])}"] for name, condition in conditions(record)]
    if not replies:
        return table(columns, rows)
    for row, (name, condition) in zip(rows, conditions(record), strict=True):
        row += reply_cells(replies[name][condition])
    text = (
        f"Greedy replies of at most {record['sizes']['reply_tokens']} tokens, each of one of "
        "[four kinds](../methods.md); *perplexity* is the unedited model's on the replies."
    )
    return [text, "", *table([*columns, "answered", "degenerate", "neither", "perplexity"], rows)]


def reply_cells(found: Record) -> list[str]:
    """Shares of the kinds that are no refusals, and the replies' perplexity."""
    kinds, perplexity = found["kinds"], found["perplexity"]
    cells = [f"{Rate(kinds[kind], sum(kinds.values()))}" for kind in ("answers", "degenerate", "neither")]
    return [*cells, "" if perplexity is None else f"{perplexity:.3g}"]


def dose_table(record: Record) -> list[str]:
    """A column per measure; the two kinds of reply that say least are left out, as is what was not measured."""
    known = [row for found in record["doses"].values() for row in found if row["value"] is not None]
    measures = [m for m in dict.fromkeys(row["measure"] for row in known) if not m.startswith(("answers", "neither"))]
    rows = []
    for way, found in record["doses"].items():
        for strength, part in pd.DataFrame(found).groupby("strength", sort=False):
            of = part.set_index("measure")
            numbers = [of.loc[name, ["value", "ci_low", "ci_high"]] if name in of.index else None for name in measures]
            cells = ["" if row is None or row.isna().any() else f"{Interval(*row):.3g}" for row in numbers]
            rows.append([f"direction {way}", f"{strength:g}", *cells])
    open_ = [] if any(m.startswith("degenerate") for m in measures) else ["Degenerate replies: not measured.", ""]
    return [*open_, *table(["", "strength", *measures], rows)]


def subspace_table(record: Record) -> list[str]:
    rows = [
        [
            str(row["direction"]),
            f"{row['layer']}, {row['column']}",
            *(f"{Interval.of(row, name)}" for name in ("change", "beyond_random", "induce_beyond_random")),
            "yes" if row["causal"] else "no",
        ]
        for row in record["subspace"]
    ]
    return table(
        ["direction", "layer, column", "change of log-odds", "beyond random", "induce beyond random", "causal"], rows
    )


def writer_tables(found: Record) -> list[str]:
    rows = [
        [
            row["node"],
            f"{Interval.of(row, 'writes'):.3f}",
            f"{row['cosine']:.3f}",
            f"yes, {row['role']}" if row["in_circuit"] else "no",
        ]
        for row in found["top"]
    ]
    lines = table(["node", "writes (share of the gap along it)", "cosine", "in circuit, role"], rows)
    slots = ("q", "k", "v", "mlp")
    reads = [[row["node"], *(cell(row, f"reads_{slot}", ".3f") for slot in slots)] for row in found["readers"]]
    lines += ["", *table(["reader", *slots], reads)]
    lines += [
        "",
        "Neurons that write most of it, and those that read most (writing is exact, reading an estimate):",
        "",
    ]
    neurons = [[n["node"], f"{n['writes']:.3f}", f"{n['reads_estimate']:.3f}"] for n in found["neurons"]]
    return lines + table(["neuron", "writes (share of the gap along it)", "reads (share of the metric's gap)"], neurons)


def cell(row: Record, name: str, spec: str = ".2f") -> str:
    """A value with its interval, empty where it was not measured."""
    return "" if row.get(name) is None else f"{Interval.of(row, name):{spec}}"


def head_tables(found: Record) -> list[str]:
    names = found["agreement"]["columns"]
    scores = [name for name in names if not name.startswith("attention_prefix")]
    lines = table(["head", *scores], [[row["node"], *(f"{row[name]:.3f}" for name in scores)] for row in found["top"]])
    if found.get("sahara") != "published":
        lines += [
            "",
            "*sahara* was measured here before it was made what the paper publishes: by right singular vectors of rank "
            "4 before the final norm. Its column and its correlations are of that variant.",
        ]
    lines += ["", "Spearman's rank correlation of absolute scores over all heads:", ""]
    rows = [
        [name, *("" if value is None else f"{value:.2f}" for value in row)]
        for name, row in zip(names, found["agreement"]["data"], strict=True)
    ]
    return lines + table(["", *names], rows)


def probe_table(record: Record) -> list[str]:
    sizes = record["sizes"]
    lines = [
        "Out-of-topic accuracy, and of *shuffled* labels the mean over draws with its interval over draws. Then the "
        f"change of {sizes['erased']} harmful prompts' log-odds, of topics that no probe saw, when the "
        "probe's weights, "
        f"or its pattern, are erased everywhere, and beside it the harm: KL of the next token on {sizes['harmless']} "
        f"Alpaca prompts, in nats. For comparison the mean over {sizes['random']} random directions with its interval "
        "over prompts, and the one that changes most.",
        "",
    ]
    columns = ["layer", "span", "accuracy", "text alone", "shuffled", "hard negatives flagged (text alone)"]
    columns += ["weights erased", "KL", "pattern erased", "KL", "random erased (most)", "KL"]
    rows = []
    for row in sorted(record["probes"], key=lambda row: (row["span"], row["layer"])):
        cells = [str(row["layer"]), row["span"], f"{Interval.of(row, 'accuracy')}", f"{row['lexical']:.2f}"]
        cells += [cell(row, "shuffled"), f"{row['hard_flagged']:.2f} ({row['lexical_hard_flagged']:.2f})"]
        for name in ("erased", "pattern_erased"):
            cells += [cell(row, name), cell(row, f"{name}_kl")]
        low, high = row["random_erased_low"], row["random_erased_high"]
        cells.append(f"{row['random_erased']:.2f} ({low:.2f} to {high:.2f}; {row['random_erased_most']:.2f})")
        rows.append([*cells, cell(row, "random_erased_kl")])
    return lines + table(columns, rows)


def refused_cell(row: Record, way: str) -> str:
    """Rate of refusal and, where measured, what the replies are instead."""
    if row[way] is None:
        return ""
    said = row.get(f"{way}_replies")
    if not said:
        return f"{Rate.of(row[way])}"
    babble = Rate(said["kinds"]["degenerate"], sum(said["kinds"].values()))
    return f"{Rate.of(row[way])}; degenerate {babble}, perplexity {said['perplexity'] or math.nan:.3g}"


def other_section(record: Record, sentence: str) -> list[str]:
    rows = [
        [
            row["method"],
            row["data"],
            *(refused_cell(row, way) for way in ("removed", "removed_at_site")),
            refused_cell(row, "added") and f"{refused_cell(row, 'added')} ({row['strength']:g})",
            "" if row["cosine"] is None else f"{row['cosine']:.2f}",
        ]
        for row in record["others"]
    ]
    columns = ["method", "fitted on", "JailbreakBench refused, removed everywhere", "removed at its own sites alone"]
    return [
        "Every method on the same two sets of contrast data. Vectors of the residual stream are those of the chosen "
        "layer; removed *everywhere* is what the chosen direction undergoes, at *its own sites alone* is that layer's "
        "input, or the heads that inference-time intervention shifts. *Cosine*: with the mean difference on AdvBench "
        "and Alpaca, which is the chosen direction.",
        "",
        sentence,
        "",
        *table([*columns, "Alpaca refused, added (strength)", "cosine"], rows),
    ]


# --- figures --------------------------------------------------------------------------------------------------------


def heatmaps(record: Record, path: Path) -> None:
    found = pd.DataFrame(record["candidates"]).astype({"cosmic": float})
    best = chosen(record)
    figure, axes = plt.subplots(1, 4, figsize=(13, 6), sharey=True, layout="constrained")
    for axis, name in zip(axes, ("bypass", "induce", "kl", "cosmic"), strict=True):
        grid = found.pivot(index="layer", columns="column", values=name)
        data = grid.to_numpy()
        size = float(np.nanmax(np.abs(data))) or 1.0
        diverging = name in ("bypass", "induce")
        options = {"cmap": "RdBu_r", "vmin": -size, "vmax": size} if diverging else {"cmap": "viridis"}
        image = axis.imshow(data, origin="lower", aspect="auto", **options)
        column, row = list(grid.columns).index(best["column"]), list(grid.index).index(best["layer"])
        axis.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, lw=2, ec="black"))
        titles = {"kl": "KL", "cosmic": "COSMIC"}
        axis.set(title=titles.get(name, name), xlabel="column", xticks=range(len(grid.columns)))
        axis.set_xticklabels(grid.columns)
        figure.colorbar(image, ax=axis, shrink=0.8)
    step = max(1, len(grid.index) // 10)
    axes[0].set(ylabel="layer", yticks=range(0, len(grid.index), step))
    axes[0].set_yticklabels(grid.index[::step])
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def curves(record: Record, path: Path) -> None:
    panels = ["refusal rate", "log-odds", "KL", "perplexity"]
    measured = {row["measure"] for found in record["doses"].values() for row in found if row["value"] is not None}
    if any(name.startswith("degenerate") for name in measured):
        panels[1:1] = ["degenerate", "reply perplexity"]
    figure, axes = plt.subplots(2, len(panels), figsize=(13 * len(panels) / 4, 6), layout="constrained")
    for line, way in zip(axes, ("removed", "added"), strict=True):
        found = pd.DataFrame(record["doses"][way])
        for axis, panel in zip(line, panels, strict=True):
            for measure, rows in found[found.measure.str.startswith(panel)].groupby("measure", sort=False):
                side = str(measure).split(", ")[1]
                colour = {"harmful": "#9C2F6B", "harmless": "#00588C"}[side]
                errors = np.clip([rows.value - rows.ci_low, rows.ci_high - rows.value], 0, None)
                axis.errorbar(rows.strength, rows.value, errors, color=colour, label=side, marker="o", capsize=2)
            axis.set(title=panel, xlabel=f"strength (direction {way})")
            if panel.endswith("perplexity"):
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_formatter("{x:g}")
        line[0].legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    write(OUT, json.loads((OUT / f"{NAME}.json").read_text()))


if __name__ == "__main__":
    main()
