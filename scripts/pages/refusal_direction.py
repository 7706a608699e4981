"""The refusal direction of the demo model: sentences, tables and figures of its page."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pages.page import Page
from pages.records import Record, frame
from pages.statements import Interval, Rate, Sentence, look_up, say
from pages.tables import interval, rate_of, reply_cells, table

# the published conditions: KL of at most this, and a layer below this share of the depth
MAX_KL, MAX_DEPTH = 0.1, 0.8
JBB, ALPACA = "rates/JailbreakBench", "rates/Alpaca (rest)"
FITTED_ON = ("AdvBench and Alpaca", "built-in pairs")
SCORES = ("bypass", "induce", "kl")
COLOURS = {"harmful": "#9C2F6B", "harmless": "#00588C"}


# --- numbers that the sentences name --------------------------------------------------------------------------------


def candidates(record: Record) -> pd.DataFrame:
    """Candidates, with whether each meets the published conditions apart from depth."""
    found = frame(record["candidates"], "layer", "position", *SCORES, "cosmic", "chosen")
    found["meets"] = (found.induce > 0) & ~(found.kl > MAX_KL)
    return found


def depth_limit(record: Record) -> int:
    """First layer that the rule does not take."""
    return int(MAX_DEPTH * (1 + max(row["layer"] for row in record["candidates"])))


def passing(record: Record) -> int:
    found = candidates(record)
    return int((found.meets & (found.layer < depth_limit(record))).sum())


def chosen(record: Record) -> Record:
    return next(row for row in record["candidates"] if row["chosen"])


def deeper(record: Record) -> pd.DataFrame:
    """Candidates that meet the conditions at layers that the rule leaves out, and remove more than the chosen one."""
    found = candidates(record)
    return found[found.meets & (found.layer >= depth_limit(record)) & (found.bypass < chosen(record)["bypass"])]


def named(rows: pd.DataFrame) -> str:
    return ", ".join(f"layer {row.layer} (bypass {row.bypass:.2f})" for row in rows.itertuples()) or "none"


def rate(path: str) -> Callable[[Record], Rate]:
    return lambda record: Rate.of(look_up(record, path))


def at_strengths(record: Record, way: str, measure: str) -> str:
    """A measure at each strength of a sweep."""
    rows = [row for row in record["strengths"][way] if row["measure"] == measure]
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


def mostly_degenerate(record: Record) -> int:
    """In how many of these most of the replies that no longer refuse are degenerate."""
    return sum(2 * row["lost"][1] > row["lost"][0] for row in removals(record))


def other(data: str, method: str, way: str) -> Callable[[Record], Rate]:
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


def counted(*names: str) -> dict[str, Callable[[Record], Any]]:
    return {name: lambda record, name=name: probe_counts(record)[name] for name in names}


def missing(record: Record) -> int:
    """How many of the four rates that tell method from data are not measured."""
    rows = {(row["data"], row["method"]): row["removed"] for row in record["others"]}
    wanted = [(data, method) for data in FITTED_ON for method in ("mean difference", "representation reading")]
    return sum(rows.get(one) is None for one in wanted)


def cosmic_at(record: Record, place: Record) -> float:
    return look_up(record, f"candidates/layer={place['layer']},position={place['position']}")["cosmic"]


# --- what the page says ---------------------------------------------------------------------------------------------

CHOICE = {
    "layer": "chosen/layer",
    "position": "chosen/position",
    "bypass": lambda r: chosen(r)["bypass"],
    "passing": passing,
    "n": lambda r: len(r["candidates"]),
}
ADDED = {
    "added": rate(f"{ALPACA}/direction added"),
    "kl": "strengths/added/strength=1.0,measure=KL, harmless/value",
    "perplexity": "strengths/added/strength=1.0,measure=perplexity, harmless/value",
    "shares": lambda r: at_strengths(r, "added", "refusal rate, harmless"),
}
AT_ONE = (
    "{added} at strength 1, which is the length of the mean difference. The KL is then {kl:.2f} and the perplexity "
    "{perplexity:.1f}. On the prompts of the strength sweep the share is {shares}."
)
LOST = "{lost} JailbreakBench prompts are refused as it is and not with the direction removed"
PERPLEXITY = (
    "The perplexity of the replies under the unedited model is {before:.1f} as it is and {after:.1f} with the "
    "direction removed."
)
ERASED = "{lower} of {erasures} erasures lower the log-odds beyond the interval of random directions. "
SENTENCES = {
    "choice": Sentence(
        "The direction at layer {layer}, position {position} is chosen. Its bypass score is {bypass:.2f}, the lowest "
        "of the candidates that meet the published conditions ({passing} of {n}).",
        CHOICE,
        lambda passing: passing > 0,
        Sentence(
            "**None of {n} candidates meets the published conditions** ({passing} do). The page shows the lowest "
            "bypass score below the depth limit: layer {layer}, position {position} ({bypass:.2f}).",
            CHOICE,
            lambda passing: passing == 0,
        ),
    ),
    "depth": Sentence(
        "The rule takes layers below {limit}, and {layer} is the deepest of them. The depth limit therefore decides "
        "the choice: {count} deeper candidates meet the other conditions with a lower bypass score than {bypass:.2f}. "
        "They are {deeper}.",
        {
            "limit": depth_limit,
            "layer": "chosen/layer",
            "count": lambda r: len(deeper(r)),
            "bypass": lambda r: chosen(r)["bypass"],
            "deeper": lambda r: named(deeper(r)),
        },
        lambda limit, layer, count: layer == limit - 1 and count > 0,
        Sentence(
            "The rule takes layers below {limit}. Without that limit, {count} more candidates meet the conditions with "
            "a lower bypass score.",
            {"limit": depth_limit, "count": lambda r: len(deeper(r))},
            lambda count: count >= 0,
        ),
    ),
    "cosmic": Sentence(
        "COSMIC reads no output. It takes layer {layer}, position {position}: its score is {here:.2f} there and "
        "{there:.2f} at the chosen direction.",
        {
            "layer": "cosmic/layer",
            "position": "cosmic/position",
            "here": lambda r: cosmic_at(r, r["cosmic"]),
            "there": lambda r: chosen(r)["cosmic"],
        },
        lambda here, there: here >= there,
    ),
    "removal": Sentence(
        "Removing the direction cuts refusals on JailbreakBench from {before} to {after}.",
        {"before": rate(f"{JBB}/as it is"), "after": rate(f"{JBB}/direction removed")},
        lambda before, after: after.high < before.low,
        "Removing the direction does **not** cut refusals on JailbreakBench beyond the intervals: {before} as it is, "
        "{after} with the direction removed.",
    ),
    "degenerate": Sentence(
        f"{LOST}. {{degenerate}} of them get a degenerate reply. {PERPLEXITY}",
        {
            "lost": "replies/JailbreakBench/direction removed/lost/0",
            "degenerate": "replies/JailbreakBench/direction removed/lost/1",
            "before": "replies/JailbreakBench/as it is/perplexity",
            "after": "replies/JailbreakBench/direction removed/perplexity",
        },
        lambda lost, degenerate: 2 * degenerate <= lost,
        f"**With the direction removed the model babbles rather than complies**: {LOST}, and {{degenerate}} of them "
        f"get a degenerate reply. {PERPLEXITY}",
    ),
    "degenerate_open": Sentence(
        "Replies that no longer refuse may be answers, and they may be degenerate. Which they are was not measured "
        "({judged} of {n} conditions), so that no compliance is claimed.",
        {"judged": judged, "n": lambda r: len(conditions(r))},
        lambda judged: judged == 0,
    ),
    "addition": Sentence(
        f"Adding the direction makes at least 80 % of Alpaca prompts refused: {AT_ONE}",
        ADDED,
        lambda added: added.value >= 0.8,
        f"Adding the direction does **not** make 80 % of Alpaca prompts refused: {AT_ONE}",
    ),
    "random": Sentence(
        "Two random directions of the same length move neither rate by more than 10 points (at most {moved:.0f}).",
        {"moved": largest_random_move},
        lambda moved: moved <= 10,
        "Random directions of the same length **do** move a rate by more than 10 points (by {moved:.0f}).",
    ),
    "hooks": Sentence(
        "Hooks and orthogonalised weights make the same edit. Their logits differ by at most {gap:.1e}, and the edit "
        "itself moves logits by {moved:.1f}. After both, the model is as before (difference {after:.1e}).",
        {
            "gap": "equality/hooks against weights",
            "moved": "equality/hooks against the model",
            "after": "equality/after",
        },
        lambda gap, moved, after: gap < 1e-3 and moved > 1 and after == 0.0,
    ),
    "writers": Sentence(
        "The found circuit has {nodes} heads and MLPs. They write {share:.0%} of the pairs' gap along the direction. "
        "They also lie closer to it than other nodes: the mean absolute cosine of a node's change is {inside:.3f} in "
        "the circuit and {outside:.3f} elsewhere.",
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
        "the interval of their accuracy. The best one ({where}) is right on {best:.0%} of the prompts.",
        counted("above", "n", "lexical", "where", "best"),
        lambda above: above > 0,
    ),
    "shuffled": Sentence(
        "The control swaps labels at random within pairs and scores probes against these labels. Probes are then right "
        "on {lowest_shuffled:.0%} to {highest_shuffled:.0%} of the prompts (means over {draws} draws): the folds leak "
        "nothing.",
        counted("lowest_shuffled", "highest_shuffled", "draws"),
        lambda lowest_shuffled, highest_shuffled: lowest_shuffled > 0.4 and highest_shuffled < 0.6,
    ),
    "not_shuffled": Sentence(
        "The control with shuffled labels was not measured ({draws} draws), so that the folds are not checked here.",
        counted("draws"),
        lambda draws: draws == 0,
    ),
    "erasing": Sentence(
        f"{ERASED}Side effects were measured for {{known}} of these. {{costly}} of them change the next token on "
        "harmless Alpaca prompts by a KL of more than 0.1 nats, the most that the rule for directions allows. Their "
        "change of the log-odds is not of refusal alone.",
        counted("lower", "erasures", "known", "costly"),
        lambda lower, known, costly: lower > 0 and known > 0 and costly > 0,
        Sentence(
            f"{ERASED}Side effects were measured for {{known}} of these. {{costly}} of them cost a KL of more than 0.1 "
            "nats on harmless prompts. Where the KL is not known, nothing is claimed about what the model uses.",
            counted("lower", "erasures", "known", "costly"),
            lambda lower, known, costly: lower > 0 and costly <= known,
        ),
    ),
    "others_degenerate": Sentence(
        "**In {babble} of {n} removals most of the replies that no longer refuse are degenerate**: there the model "
        "babbles rather than complies.",
        {"babble": mostly_degenerate, "n": lambda r: len(removals(r))},
        lambda babble: babble > 0,
        "In {babble} of {n} removals most of the replies that no longer refuse are degenerate.",
    ),
    "others_open": Sentence(
        "What the replies are that no longer refuse was not measured here ({n} removals).",
        {"n": lambda r: len(removals(r))},
        lambda n: n == 0,
    ),
    "data_open": Sentence(
        "Four rates would tell the method from the data that it was fitted on. {missing} of them are not measured, so "
        "that no method is called better than another.",
        {"missing": missing},
        lambda missing: missing > 0,
    ),
    "data": Sentence(
        "The data that a direction is fitted on matter more than the method. Each rate is the share of JailbreakBench "
        "that is still refused once the vector is removed everywhere. A mean difference leaves {md_own} when it is "
        "fitted on AdvBench and Alpaca, and {md_pairs} when it is fitted on built-in pairs. Representation reading "
        "leaves {rr_own} and {rr_pairs}.",
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
        "Each rate is the share of JailbreakBench that is still refused once the vector is removed everywhere. A mean "
        "difference leaves {md_own} when it is fitted on AdvBench and Alpaca, and {md_pairs} when it is fitted on "
        "built-in pairs. Representation reading leaves {rr_own} and {rr_pairs}.",
    ),
}


def subspace_sentence(record: Record) -> Sentence:
    """How far the search for more directions went; its two cases are two searches."""
    numbers = {
        "left": rate(f"{JBB}/direction removed"),
        "n": lambda r: len(r["subspace"]),
        "held": lambda r: sum(row["causal"] for row in r["subspace"]),
    }
    if record["sizes"]["subspace_stop_below"] is not None:
        return Sentence(
            "The search stops when the mean log-odds are below 0. It stopped after {n} ({held} causal), although "
            "{left} of JailbreakBench is still refused then. **No further direction was judged**, so that this is no "
            "evidence that there is only one.",
            numbers,
            lambda n, held: n == held,
        )
    return Sentence(
        "The search goes on when the mean log-odds are below 0, since {left} of JailbreakBench is still refused then. "
        "It ends at the first direction that does no more than random ones. **{held} of {n} that were looked at are "
        "causal**, which means significant. How much each of them does stands in the table.",
        numbers,
        lambda n, held: held <= n,
    )


def told(record: Record) -> list[str]:
    """Names of the sentences of this record: those on what was not measured stand in for those on what was."""
    left_out = {"data" if missing(record) else "data_open"}
    left_out.add("not_shuffled" if probe_counts(record)["draws"] else "shuffled")
    left_out.add("degenerate_open" if judged(record) else "degenerate")
    left_out.add("others_open" if removals(record) else "others_degenerate")
    return [name for name in SENTENCES if name not in left_out]


# --- the page -------------------------------------------------------------------------------------------------------


def context(record: Record) -> dict[str, Any]:
    """What the template is given."""
    heads, writers = record["heads"], record["writers"]
    return {
        "said": {name: say(record, SENTENCES[name]) for name in told(record)},
        "subspace_said": say(record, subspace_sentence(record)),
        "sizes": record["sizes"],
        "tokens": ", ".join(f"`{token}`" for token in record["metric"]["refusal_tokens"]),
        "seconds": record["seconds"],
        "later": list(record.get("later", {}).values()),
        "replies_judged": bool(record.get("replies")),
        "sweep_judged": any(measure.startswith("degenerate") for measure in measured(record)),
        "sahara_published": heads.get("sahara") == "published",
        "scores": score_table(record),
        "rates": rate_table(record),
        "strengths": strength_table(record),
        "subspace": subspace_table(record),
        "writers": writer_table(writers["top"]),
        "readers": reader_table(writers["readers"]),
        "neurons": neuron_table(writers["neurons"]),
        "heads": head_table(heads),
        "agreement": agreement_table(heads["agreement"]),
        "probes": probe_table(record["probes"]),
        "others": other_table(record["others"]),
    }


def score_table(record: Record) -> str:
    unedited = record["unedited"]
    rows = [["none", f"{unedited['bypass']:.2f}", f"{unedited['induce']:.2f}", "0"]]
    listed = [("**chosen**", chosen(record)), *((row["control"], row) for row in record["controls"])]
    rows += [[name, *(interval(row, score) for score in SCORES)] for name, row in listed]
    return table(rows, ["direction", "bypass (harmful, removed)", "induce (harmless, added)", "KL (harmless, removed)"])


def rate_table(record: Record) -> str:
    columns, replies = ["prompts", "condition", "refused"], record.get("replies")
    rows = [[name, condition, f"{Rate.of(record['rates'][name][condition])}"] for name, condition in conditions(record)]
    if not replies:
        return table(rows, columns)
    kinds = ("answers", "degenerate", "neither")
    for row, (name, condition) in zip(rows, conditions(record), strict=True):
        row += reply_cells(replies[name][condition], kinds)
    return table(rows, [*columns, "answered", "degenerate", "neither", "perplexity"])


def measured(record: Record) -> list[str]:
    """Measures of the strength sweep that were measured."""
    rows = [row for found in record["strengths"].values() for row in found if row["value"] is not None]
    return list(dict.fromkeys(row["measure"] for row in rows))


def strength_table(record: Record) -> str:
    """A column per measure; the two kinds of reply that say least are left out, as is what was not measured."""
    shown = [name for name in measured(record) if not name.startswith(("answers", "neither"))]
    rows = []
    for way, found in record["strengths"].items():
        sweep = frame(found, "strength", "measure", "value", "ci_low", "ci_high")
        for strength, part in sweep.groupby("strength", sort=False):
            of = part.set_index("measure")[["value", "ci_low", "ci_high"]]
            numbers = [of.loc[name] if name in of.index else None for name in shown]
            cells = ["" if row is None or row.isna().any() else f"{Interval(*row):.3g}" for row in numbers]
            rows.append([f"direction {way}", f"{strength:g}", *cells])
    return table(rows, ["", "strength", *shown])


def subspace_table(record: Record) -> str:
    scores = ("change", "beyond_random", "induce_beyond_random")
    rows = [
        [
            str(row["direction"]),
            f"{row['layer']}, {row['position']}",
            *(interval(row, name) for name in scores),
            "yes" if row["causal"] else "no",
        ]
        for row in record["subspace"]
    ]
    columns = ["direction", "layer, position", "change of log-odds", "beyond random", "induce beyond random", "causal"]
    return table(rows, columns)


def writer_table(nodes: list[Record]) -> str:
    rows = [
        [
            row["node"],
            interval(row, "writes", ".3f"),
            f"{row['cosine']:.3f}",
            f"yes, {row['role']}" if row["in_circuit"] else "no",
        ]
        for row in nodes
    ]
    return table(rows, ["node", "writes (share of the gap along it)", "cosine", "in circuit, role"])


def reader_table(nodes: list[Record]) -> str:
    slots = ("q", "k", "v", "mlp")
    rows = [[row["node"], *(interval(row, f"reads_{slot}", ".3f") for slot in slots)] for row in nodes]
    return table(rows, ["reader", *slots])


def neuron_table(neurons: list[Record]) -> str:
    rows = [[row["node"], row["writes"], row["reads_estimate"]] for row in neurons]
    return table(rows, ["neuron", "writes (share of the gap along it)", "reads (share of the metric's gap)"])


def head_table(found: Record) -> str:
    scores = [name for name in found["agreement"]["columns"] if not name.startswith("attention_prefix")]
    return table([[row["node"], *(row[name] for name in scores)] for row in found["top"]], ["head", *scores])


def agreement_table(found: Record) -> str:
    rows = [[name, *row] for name, row in zip(found["columns"], found["data"], strict=True)]
    return table(rows, ["", *found["columns"]], digits=2)


def probe_table(probes: list[Record]) -> str:
    columns = ["layer", "span", "accuracy", "text alone", "shuffled", "hard negatives flagged (text alone)"]
    columns += ["weights erased", "KL", "pattern erased", "KL", "random erased (most)", "KL"]
    rows = []
    for row in sorted(probes, key=lambda row: (row["span"], row["layer"])):
        cells = [str(row["layer"]), row["span"], interval(row, "accuracy"), f"{row['lexical']:.2f}"]
        cells += [interval(row, "shuffled"), f"{row['hard_flagged']:.2f} ({row['lexical_hard_flagged']:.2f})"]
        for name in ("erased", "pattern_erased"):
            cells += [interval(row, name), interval(row, f"{name}_kl")]
        low, high = row["random_erased_low"], row["random_erased_high"]
        cells.append(f"{row['random_erased']:.2f} ({low:.2f} to {high:.2f}; {row['random_erased_most']:.2f})")
        rows.append([*cells, interval(row, "random_erased_kl")])
    return table(rows, columns)


def refused_cell(row: Record, way: str) -> str:
    """Rate of refusal and, where measured, what the replies are instead."""
    if row[way] is None:
        return ""
    said = row.get(f"{way}_replies")
    if not said:
        return f"{Rate.of(row[way])}"
    perplexity = said["perplexity"] or math.nan
    return f"{Rate.of(row[way])}; degenerate {rate_of(said['kinds'], 'degenerate')}, perplexity {perplexity:.3g}"


def other_table(others: list[Record]) -> str:
    rows = [
        [
            row["method"],
            row["data"],
            *(refused_cell(row, way) for way in ("removed", "removed_at_site")),
            refused_cell(row, "added") and f"{refused_cell(row, 'added')} ({row['strength']:g})",
            "" if row["cosine"] is None else f"{row['cosine']:.2f}",
        ]
        for row in others
    ]
    columns = ["method", "fitted on", "JailbreakBench refused, removed everywhere", "removed at its own sites alone"]
    return table(rows, [*columns, "Alpaca refused, added (strength)", "cosine"])


# --- figures --------------------------------------------------------------------------------------------------------


def figures(record: Record) -> Mapping[str, Figure]:
    """Figures by file."""
    return {
        "refusal-direction-candidates.png": heatmaps(record),
        "refusal-direction-strengths.png": curves(record),
    }


def heatmaps(record: Record) -> Figure:
    found, best = candidates(record).astype({"cosmic": float}), chosen(record)
    figure = Figure(figsize=(13, 6), layout="constrained")
    axes = figure.subplots(1, 4, sharey=True)
    titles = {"bypass": "bypass", "induce": "induce", "kl": "KL", "cosmic": "COSMIC"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        grid = found.pivot(index="layer", columns="position", values=name)
        data = grid.to_numpy()
        size = float(np.nanmax(np.abs(data))) or 1.0
        diverging = name in ("bypass", "induce")
        options = {"cmap": "RdBu_r", "vmin": -size, "vmax": size} if diverging else {"cmap": "viridis"}
        image = axis.imshow(data, origin="lower", aspect="auto", **options)
        x, y = list(grid.columns).index(best["position"]), list(grid.index).index(best["layer"])
        axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, lw=2, ec="black"))
        axis.set(title=title, xlabel="position", xticks=range(len(grid.columns)))
        axis.set_xticklabels(grid.columns)
        figure.colorbar(image, ax=axis, shrink=0.8)
    step = max(1, len(grid.index) // 10)
    axes[0].set(ylabel="layer", yticks=range(0, len(grid.index), step))
    axes[0].set_yticklabels(grid.index[::step])
    return figure


def curves(record: Record) -> Figure:
    """A panel per measure against the strength, with the direction removed and added."""
    panels = ["refusal rate", "log-odds", "KL", "perplexity"]
    if any(name.startswith("degenerate") for name in measured(record)):
        panels[1:1] = ["degenerate", "reply perplexity"]
    figure = Figure(figsize=(13 * len(panels) / 4, 6), layout="constrained")
    for line, way in zip(figure.subplots(2, len(panels)), ("removed", "added"), strict=True):
        found = frame(record["strengths"][way], "strength", "measure", "value", "ci_low", "ci_high")
        for axis, panel in zip(line, panels, strict=True):
            for measure, rows in found[found.measure.str.startswith(panel)].groupby("measure", sort=False):
                side = str(measure).split(", ")[1]
                errors = np.clip([rows.value - rows.ci_low, rows.ci_high - rows.value], 0, None)
                axis.errorbar(rows.strength, rows.value, errors, color=COLOURS[side], label=side, marker="o", capsize=2)
            axis.set(title=panel, xlabel=f"strength (direction {way})")
            if panel.endswith("perplexity"):
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_formatter("{x:g}")
        line[0].legend()
    return figure


PAGE = Page("refusal-direction", context, figures)
