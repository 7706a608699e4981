"""The safety neurons of the demo pair: sentences, tables and figures of their page."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from mechsafety.metrics import adjust_p
from pages.page import Page
from pages.records import Record, frame
from pages.statements import Interval, Sentence, look_up, say
from pages.tables import table

TOP = 0.05
# what scoring, dynamic patching and the whole script may cost: seconds, times, minutes
SCORING, PATCHING, WHOLE = 480, 2.5, 40
RANDOM = ("_random_low", "_random_high")
NULL = ("mean", "p", "low", "high")
CURVE = ["share", "neurons", "effect", "ci_low", "ci_high", "random_mean", "random_low", "random_high", "p_value"]
CONTRAST = ["span", "node", "effect, train", "effect, test", "harmful_mean", "harmless_mean"]
AGREEMENT = ["measure", "observed", *(f"{null}_{what}" for null in ("free", "layered") for what in NULL)]
SIZED_COLUMNS = ["measure", *(f"sized_{what}" for what in NULL)]
# a curve's name, and what its neurons are ranked by
CURVES = {"rms": "change", "ratio": "ratio", "judge": "change"}
# what the alignment tax is measured by
KINDS = ("safety", "helpfulness")
TAX = ["model", *(f"{kind}{what}" for kind in KINDS for what in ("", "_low", "_high", *RANDOM, "_p"))]
# the paper's range of C at 5 % over four models and four benchmarks
PUBLISHED = (0.56, 1.34)
SIGNIFICANT = 0.05
SEED_RATES = ["harmful", "harmful rate", "harmless", "harmless rate"]
# features of the guard that are no neurons
PLAIN = ("resid", "direction", "tfidf")
NULLS = ("permuted in layers", "permuted in sizes")
SIZED = "overlap, permuted in sizes"


# --- numbers that the sentences name --------------------------------------------------------------------------------


def row_of(record: Record, curve: str, share: float = TOP) -> Record:
    return look_up(record, f"curves/{curve}/share={share}")


def adjusted(record: Record) -> dict[tuple[str, float], float]:
    """Benjamini-Hochberg adjusted p of every point of all curves: the sentences look at all of them."""
    keys = [(name, row["share"]) for name in CURVES for row in record["curves"][name] if row["p_value"] is not None]
    return dict(zip(keys, adjust_p(np.array([row_of(record, *key)["p_value"] for key in keys])), strict=True))


def tax_adjusted(record: Record) -> dict[tuple[str, str], float]:
    """The same of the alignment tax: both models, safety and helpfulness."""
    rows = {row["model"]: row for row in record["tax"] if row["safety_p"] is not None}
    keys = [(model, kind) for model in rows for kind in KINDS]
    return dict(zip(keys, adjust_p(np.array([rows[model][f"{kind}_p"] for model, kind in keys])), strict=True))


def of_curve(curve: str) -> Callable[[Record], str]:
    """What a curve is of."""
    return lambda r: f"{r['ends_of'][curve]['score']} (ranked by {CURVES[curve]})"


def random_band(row: Record) -> Interval:
    return Interval.of(row, "random_mean", "random_low", "random_high")


def beats(c: Interval, p: float, random: Interval) -> bool:
    """Whether C is beyond random sets: by the adjusted p, and beyond what prompts leave open."""
    return p < SIGNIFICANT and c.low > random.high


def negative(record: Record, curve: str) -> list[Record]:
    return [row for row in record["curves"][curve] if row["ci_high"] < 0]


def said_instead(record: Record, curve: str) -> str:
    """What is known of the replies behind a curve: a score that falls is no compliance."""
    rows = record.get("judged_replies")
    if curve != "judge":
        return "It is read before the reply, which was not generated, so that no compliance is claimed."
    if not rows:
        return "What the replies are that do not refuse was not measured, so that no compliance is claimed."
    return "Degenerate replies: " + ", ".join(f"{row['degenerate']} at {row['top share']}" for row in rows) + "."


def thirds(record: Record) -> list[float]:
    shares = record["layers"]
    third = len(shares) // 3
    return [sum(shares[:third]), sum(shares[third : len(shares) - third]), sum(shares[len(shares) - third :])]


def sized(record: Record, name: str) -> Any:
    return look_up(record, f"tax_agreement_sized/rows/measure=overlap/{name}")


def guard(record: Record, *columns: str) -> pd.DataFrame:
    return frame(record["guard"], "test", "feature", *columns)


def test_sets(record: Record) -> int:
    """Test sets of the guard."""
    return guard(record).test.nunique()


def mean_accuracy(feature: str) -> Callable[[Record], float]:
    def mean(record: Record) -> float:
        found = guard(record, "accuracy")
        return float(found[found.feature == feature].accuracy.mean())

    return mean


def nulls(record: Record, features: tuple[str, ...]) -> pd.DataFrame:
    """Test sets, with the feature, on which the neurons' margin over it holds 0."""
    found = guard(record, "margin_is_null")
    return found[found.feature.isin(features) & found.margin_is_null.eq(True)]


def worst(record: Record) -> Record:
    return min((row for row in record["guard"] if row["feature"] == "neurons"), key=lambda row: row["auroc"])


def false_alarms(record: Record) -> list[float]:
    return [row["fpr_at_95_tpr"] for row in record["guard"] if row["feature"] == "neurons"]


def of_seeds(column: str, how: str) -> Callable[[Record], float]:
    return lambda r: getattr(frame(r["seeds"], column)[column], how)()


def refused(side: str) -> Callable[[Record], float]:
    return lambda r: sum(row[side] for row in r["seed_refusals"]) / sum(row["of"] for row in r["seed_refusals"])


# --- what the page says ---------------------------------------------------------------------------------------------


def curve_sentence(curve: str) -> Sentence:
    """C at the top 5 %: its place beside the published range, and beside random neurons."""
    numbers = {
        "what": of_curve(curve),
        "c": lambda r: Interval.of(row_of(r, curve), "effect", "ci_low", "ci_high"),
        "low": lambda r: PUBLISHED[0],
        "high": lambda r: PUBLISHED[1],
        "random": lambda r: random_band(row_of(r, curve)),
        "p": lambda r: adjusted(r)[curve, TOP],
        "points": lambda r: len(adjusted(r)),
        "sets": "size/random_sets",
    }
    start = "C at the top 5 % on {what} is {c}. This is {place} the published range ({low} to {high}, median 0.80). "
    more = (
        "C is larger than that of random neurons of the same layers ({random}; p = {p:.3f}, adjusted over the {points} "
        "points of all curves, {sets} sets each)."
    )
    same = (
        "Random neurons of the same layers have {random}. No difference from them is claimed: with {sets} sets the p "
        "is {p:.3f}, adjusted over the {points} points of all curves."
    )

    def wording(place: str, rest: str) -> str:
        return start.replace("{place}", place) + rest

    inside = Sentence(wording("not below", same), numbers, lambda c, p, random: not beats(c, p, random))
    above = Sentence(wording("not below", more), numbers, lambda c, p, random: beats(c, p, random), inside)
    below = Sentence(
        wording("below", same), numbers, lambda c, p, random, low: c.high < low and not beats(c, p, random), above
    )
    return Sentence(
        wording("below", more), numbers, lambda c, p, random, low: c.high < low and beats(c, p, random), below
    )


def negative_sentence(curve: str) -> Sentence:
    def points(record: Record) -> str:
        rows = negative(record, curve)
        return ", ".join(
            f"{row['effect']:.2f} ({row['ci_low']:.2f} to {row['ci_high']:.2f}) at {row['share']:.1%}" for row in rows
        )

    return Sentence(
        "C on {what} is **negative** at {n} small shares: {points}. The score is then below the base model's. "
        "{replies}",
        {
            "n": lambda r: len(negative(r, curve)),
            "what": of_curve(curve),
            "points": points,
            "replies": lambda r: said_instead(r, curve),
        },
        lambda n: n > 0,
    )


def smallest_sentence(curve: str) -> Sentence:
    """The first share with C of at least 0.9."""

    def first(record: Record) -> Record:
        rows = [row for row in record["curves"][curve] if row["effect"] >= 0.9]
        return rows[0] if rows else {"share": float("nan"), "random_mean": None}

    def band(record: Record) -> str:
        row = first(record)
        if row["random_mean"] is None:
            return "No neurons are left there for random sets."
        shared = f"{row['random_overlap']:.0%} of their neurons are in the top"
        return f"Random sets reach {random_band(row)} there; {shared}."

    common = {
        "what": of_curve(curve),
        "measured": lambda r: ", ".join(f"{100 * row['share']:.3g}" for row in r["curves"][curve]),
    }
    return Sentence(
        "C on {what} reaches 0.9 at {share:.0%} of the neurons, the smallest such share of those measured ({measured} "
        "%). {band}",
        {**common, "share": lambda r: first(r)["share"], "band": band},
        lambda share: 0 < share <= 1,
        Sentence(
            "C on {what} stays below 0.9: the largest is {largest:.2f} (measured at {measured} %).",
            {**common, "largest": lambda r: max(row["effect"] for row in r["curves"][curve])},
            lambda largest: largest < 0.9,
        ),
    )


def patched_sentence(model: str, own: str, wanted: tuple[bool, bool], paper: str) -> Sentence:
    """One aligned model with the other's common neurons."""

    def moves(record: Record) -> str:
        row, before = (look_up(record, f"tax/model={name}") for name in (model, own))
        parts = [
            f"{kind} goes from {before[kind]:.2f} to {row[kind]:.2f} (random sets: {row[f'{kind}_random_low']:.2f} to "
            f"{row[f'{kind}_random_high']:.2f}, adjusted p = {tax_adjusted(record)[model, kind]:.3f})"
            for kind in KINDS
        ]
        return " and ".join(parts)

    def same(record: Record) -> str:
        row, before = (look_up(record, f"tax/model={name}") for name in (model, own))
        moved = tuple(bool(row[kind] > before[kind]) for kind in KINDS)
        return "Both move" if moved == wanted else "Not both move"

    numbers = {
        "moves": moves,
        "same": same,
        "largest": lambda r: max(tax_adjusted(r)[model, kind] for kind in KINDS),
        "smallest": lambda r: min(tax_adjusted(r)[model, kind] for kind in KINDS),
        "sets": "size/tax_random_sets",
    }
    start = f"With the common neurons of the other model ({model}), {{moves}}. {{same}} as in the paper, {paper}. "
    mixed = Sentence(
        start + "One of the two moves beyond random neurons of the same layers (adjusted p {smallest:.3f} and "
        "{largest:.3f}, {sets} sets).",
        numbers,
        lambda smallest, largest: smallest < SIGNIFICANT <= largest,
    )
    none = Sentence(
        start + "No difference from random neurons of the same layers is claimed: with {sets} sets the adjusted p are "
        "{smallest:.3f} and {largest:.3f}.",
        numbers,
        lambda smallest, largest: smallest >= SIGNIFICANT,
        mixed,
    )
    return Sentence(
        start + "Both move beyond random neurons of the same layers (adjusted p {smallest:.3f} and {largest:.3f}, "
        "{sets} sets).",
        numbers,
        lambda largest, smallest: largest < SIGNIFICANT,
        none,
    )


OVERLAP = {
    "observed": "tax_agreement/measure=overlap/observed",
    "null": lambda r: Interval(sized(r, "sized_mean"), sized(r, "sized_low"), sized(r, "sized_high")),
    "bins": "tax_agreement_sized/bins",
    "p": lambda r: sized(r, "sized_p"),
    "layered": "tax_agreement/measure=overlap/layered_mean",
    "large": "scale/demo, demo-helpful/large in the base",
}
COMMON = "Alignment tax: {observed:.1%} of the two tops are common. "
LARGE = "{large:.0%} of each top is among as many neurons with the largest activations in the base. "
SEEDS = {
    "n": "size/seeds",
    "mean": of_seeds("overlap", "mean"),
    "low": of_seeds("overlap", "min"),
    "high": of_seeds("overlap", "max"),
    "large": "scale/seeds/large in the base",
}
SHARED = "Seeds: any two of {n} share {mean:.1%} of their top 5 % on average ({low:.1%} to {high:.1%}). " + LARGE
SEEDS_OF_PAPER = "In the paper different training runs give largely the same neurons."
LOWEST = "Guard: its lowest AUROC is {auroc}, on *{name}*. "
FLAGGED = "To catch 95 % of unsafe replies it flags {least:.0%} to {most:.0%} of the safe ones."
SENTENCES = {
    "ability": Sentence(
        "General ability: the aligned model repeats {whole:.0%} of the base's replies to ordinary questions (KL "
        "{whole_kl:.2f} nats per token). The top {share:.1%} alone already brings that to {few:.0%} (KL {few_kl:.2f}).",
        {
            "whole": "ability/top share=aligned model/agreement",
            "whole_kl": "ability/top share=aligned model/kl",
            "share": "curves/rms/0/share",
            "few": "ability/0/agreement",
            "few_kl": "ability/0/kl",
        },
        lambda few, whole: few < 0.5 and whole < 0.5,
    ),
    "layers": Sentence(
        "Layers: {first:.0%} of the top 5 % of neurons are in the first third of the layers, {middle:.0%} in the "
        "middle third and {last:.0%} in the last. Most are late. The paper's distributions are of its own, "
        "larger models.",
        {
            "first": lambda r: thirds(r)[0],
            "middle": lambda r: thirds(r)[1],
            "last": lambda r: thirds(r)[2],
        },
        lambda last: last > 0.5,
    ),
    "overlap": Sentence(
        f"{COMMON}A change grows with the neuron's activation, so that much of this is size. Permutations within "
        "layers and, in each, among {bins} groups of like activation in the base keep the size: {null:.1%} are then "
        "common (p = {p:.3f}). Permutations within layers alone do not keep it: {layered:.1%} are then common. "
        f"{LARGE}Beyond size the overlap is small, and more than chance. In the paper, too, safety and helpfulness "
        "neurons overlap.",
        OVERLAP,
        lambda observed, null, p: p < SIGNIFICANT and null.high < observed < null.value + 0.1,
        f"{COMMON}{{null:.1%}} are common after permutations within layers and, in each, among {{bins}} groups of like "
        f"activation in the base (p = {{p:.3f}}), and {{layered:.1%}} after permutations within layers alone. {LARGE}",
    ),
    "overlap_open": Sentence(
        f"{COMMON}A change grows with the neuron's activation. {LARGE}After permutations within layers, which do not "
        "keep the size, {layered:.1%} are common. The null that keeps the size was not measured, so that no overlap "
        "beyond chance is claimed.",
        {name: OVERLAP[name] for name in ("observed", "large", "layered")},
        lambda observed, large, layered: large > layered and observed > layered,
    ),
    "by_ratio": Sentence(
        "The ratio score divides the size out. By ratio {ratio:.1%} of the tops of `demo` and `demo-helpful` are "
        "common, and {null:.1%} after permutations within layers (p = {p:.3f}): little is left.",
        {
            "ratio": "scale/demo, demo-helpful/ratio",
            "null": "scale/demo, demo-helpful/ratio, permuted in layers",
            "p": "scale/demo, demo-helpful/largest p",
        },
        lambda ratio, null, p: p < SIGNIFICANT and ratio - null < 0.1,
    ),
    "safe": patched_sentence("safe <- helpful", "safe", (False, True), "where safety falls and helpfulness rises"),
    "helpful": patched_sentence(
        "helpful <- safe", "helpful", (True, False), "where safety rises and helpfulness falls"
    ),
    "seeds": Sentence(
        f"{SHARED}After permutations within layers and groups of like activation, which keep the size, {{null:.1%}} "
        "are shared on average and {most:.1%} at most (largest p {p:.3f}). Most of the agreement is size, and some is "
        f"beyond it. {SEEDS_OF_PAPER}",
        SEEDS
        | {
            "null": of_seeds(SIZED, "mean"),
            "most": of_seeds(SIZED, "max"),
            "p": of_seeds("overlap, p", "max"),
        },
        lambda mean, low, null, most, p: p < SIGNIFICANT and low > most and null > mean / 2,
    ),
    "seeds_open": Sentence(
        f"{SHARED}The null that keeps the size was not measured for seeds: how much of the {{mean:.1%}} is size is "
        f"open. {SEEDS_OF_PAPER}",
        SEEDS,
        lambda large, mean: large > 0.5 and mean > 0.5,
    ),
    "seeds_ratio": Sentence(
        "By ratio any two seeds share {ratio:.0%} of their tops, and {null:.0%} after permutations within layers "
        "(largest p {p:.3f}). The ratio divides size out, so that this much of their agreement is not size.",
        {
            "ratio": "scale/seeds/ratio",
            "null": "scale/seeds/ratio, permuted in layers",
            "p": "scale/seeds/largest p",
        },
        lambda ratio, null, p: p < SIGNIFICANT and ratio > 2 * null,
    ),
    "counterfactuals": Sentence(
        "**The seeds refuse many of the harmless counterfactuals too**: {harmful:.0%} of harmful prompts and "
        "{harmless:.0%} of their counterfactuals. Their agreement says little about what tells harmful from harmless.",
        {"harmful": refused("harmful"), "harmless": refused("harmless")},
        lambda harmful, harmless: harmless > 0.5 * harmful > 0.25,
        "The seeds refuse {harmful:.0%} of harmful prompts and {harmless:.0%} of their counterfactuals.",
    ),
    "guard": Sentence(
        "Guard: the mean accuracy over {n} test sets is {ours:.1%}, and {random:.1%} for as many random neurons. (The "
        "paper's 76.2 % is of other models, labels and prompts.) On {null} of {n} test sets the margin in AUROC over "
        "random neurons is null, which means that its interval holds 0. Which neurons are watched hardly matters.",
        {
            "n": test_sets,
            "ours": mean_accuracy("neurons"),
            "random": mean_accuracy("random"),
            "null": lambda r: nulls(r, ("random",)).test.nunique(),
        },
        lambda null, n: null > n / 2,
    ),
    "plain": Sentence(
        "Guard: by the same rule, on {null} of {n} test sets at least one of residual stream, direction and TF-IDF "
        "does as well as the neurons: {where}.",
        {
            "null": lambda r: nulls(r, PLAIN).test.nunique(),
            "n": test_sets,
            "where": lambda r: ", ".join(f"{row.test} ({row.feature})" for row in nulls(r, PLAIN).itertuples()),
        },
        lambda null: null > 0,
        "Guard: by the same rule, on {null} of {n} test sets one of residual stream, direction and TF-IDF does as well "
        "as the neurons{where}.",
    ),
    "worst": Sentence(
        f"{LOWEST}Chance lies in that interval. {FLAGGED}",
        {
            "auroc": lambda r: Interval.of(worst(r), "auroc"),
            "name": lambda r: worst(r)["test"],
            "least": lambda r: min(false_alarms(r)),
            "most": lambda r: max(false_alarms(r)),
        },
        lambda auroc: auroc.holds(0.5),
        LOWEST + FLAGGED,
    ),
    "planted": Sentence(
        "Planted neurons: {neurons} neurons were scaled by {factor:g} in a copy of the base. {ratio:.1%} of them are "
        "among as many of the highest ratio scores, as asked for (at least 95 %). {rms:.1%} of them are among the "
        "highest rms scores ({prompts} prompts x {tokens} tokens): a raw difference grows with the neuron's own scale.",
        {name: f"planted/{name}" for name in ("neurons", "factor", "ratio", "rms", "prompts", "tokens")},
        lambda ratio, rms: ratio >= 0.95 > rms,
    ),
    "ends": Sentence(
        "Dynamic patching with 0 % of the neurons is the base model, and with 100 % the aligned one: {none} and {all} "
        "of {n} replies are the same, and logits differ by at most {off:.0e}.",
        {
            "none": "ends/0 %/same_replies",
            "all": "ends/100 %/same_replies",
            "n": "ends/0 %/prompts",
            "off": lambda r: max(found["largest_logit_difference"] for found in r["ends"].values()),
        },
        lambda none, all, n, off: none == all == n and off < 1e-3,
    ),
}
# these stand beside what they check
CHECKS = ("planted", "ends")


def findings(record: Record) -> list[str]:
    """What the figures say, in order."""
    out = []
    for curve in CURVES:
        out.append(say(record, curve_sentence(curve)))
        if negative(record, curve):
            out.append(say(record, negative_sentence(curve)))
        out.append(say(record, smallest_sentence(curve)))
    return [*out, *(say(record, SENTENCES[name]) for name in told(record) if name not in CHECKS)]


def told(record: Record) -> list[str]:
    """Names of the sentences of this record: those on what was not measured stand in for those on what was."""
    left_out = {"overlap_open" if record["tax_agreement_sized"] else "overlap"}
    left_out.add("seeds_open" if SIZED in record["seeds"][0] else "seeds")
    if record["tax"] is None:
        left_out |= {"overlap", "overlap_open", "by_ratio", "safe", "helpful"}
    return [name for name in SENTENCES if name not in left_out]


# --- the page -------------------------------------------------------------------------------------------------------


def context(record: Record) -> dict[str, Any]:
    """What the template is given."""
    size, judged = record["size"], record.get("judged_replies")
    spent = record["cost"]
    return {
        "size": size,
        "small": record.get("small", False),
        "later": list(record.get("later", {}).values()),
        "findings": findings(record),
        "said": {name: say(record, SENTENCES[name]) for name in CHECKS},
        "neurons": record["neurons"],
        "cards": table(frame(record["cards"], "node", "promoted", "suppressed", "active")),
        "contrast": table(frame(record["contrast"], *CONTRAST)),
        "scale": scale_table(record["scale"]),
        "ends": [ends_of(record, name) for name in ("rms", "judge")],
        "least_p": 1 / (1 + size["random_sets"]),
        "curves": {
            name: {
                "table": table(frame(record["curves"][name], *CURVE, "random_overlap")),
                "n": record["ends_of"][name]["n"],
                "score": record["ends_of"][name]["score"],
            }
            for name in CURVES
        },
        "judged": judged and table(frame(judged)),
        "ability": table(frame(record["ability"], "top share", *with_ends("kl", "perplexity", "agreement"))),
        "tax": tax_context(record) if record["tax"] is not None else None,
        "seed_means": table(seed_means(record)),
        "seeds": table(frame(record["seeds"], *(name for name in record["seeds"][0] if not name.endswith(", p")))),
        "seed_refusals": table(frame(record["seed_refusals"], "seed", "of", *SEED_RATES)),
        "guard_judged": "degenerate" in record["guard_sets"][0],
        "guard_left_out": record["guard_left_out"],
        "guard_sets": table(frame(record["guard_sets"])),
        "guard": guard_table(record),
        "cost": cost_table(record),
        "threads": spent["threads"],
        "seconds": ", ".join(f"{name} {value:.0f}" for name, value in spent["seconds"].items()),
        "limit": WHOLE,
    }


def with_ends(*names: str) -> list[str]:
    """Columns of values, each with those of its interval."""
    return [f"{name}{end}" for name in names for end in ("", "_low", "_high")]


def scale_table(scale: Record) -> str:
    found = frame(list(scale.values()), "change", "large in the base", "ratio", f"ratio, {NULLS[0]}", "largest p")
    found.insert(0, "tops", list(scale))
    return table(found)


def ends_of(record: Record, curve: str) -> str:
    found = record["ends_of"][curve]
    return f"{found['score']}: F(base) {Interval(*found['base'])}, F(aligned) {Interval(*found['aligned'])}"


def tax_context(record: Record) -> dict[str, Any]:
    """The alignment tax."""
    null, agreement = record["tax_agreement_sized"], frame(record["tax_agreement"], *AGREEMENT)
    return {
        **{name: record["tax_counts"][name] for name in ("common", "random_overlap", "scores", "harmful", "harmless")},
        "table": table(frame(record["tax"], *TAX)),
        "agreement": table(agreement.merge(frame(null["rows"], *SIZED_COLUMNS), on="measure") if null else agreement),
        "bins": null and null["bins"],
        "by_bins": null and table([*null["by_bins"].items()], ["groups", "overlap, permuted"]),
    }


def seed_means(record: Record) -> pd.DataFrame:
    """Agreement over all pairs of seeds."""
    return pd.DataFrame(
        {
            "measure": name,
            "mean": of_seeds(name, "mean")(record),
            "lowest": of_seeds(name, "min")(record),
            "highest": of_seeds(name, "max")(record),
            **{
                how: of_seeds(f"{name}, {how}", "mean")(record)
                for how in NULLS
                if f"{name}, {how}" in record["seeds"][0]
            },
        }
        for name in ("overlap", "spearman_top", "spearman_all")
    )


def guard_table(record: Record) -> str:
    def cell(row: Record, name: str, low: str, high: str) -> str:
        return "" if row[name] is None else f"{Interval.of(row, name, low, high)}"

    rows = [
        [
            row["test"],
            row["feature"],
            cell(row, "auroc", "auroc_low", "auroc_high"),
            cell(row, "accuracy", "accuracy_low", "accuracy_high"),
            cell(row, "fpr_at_95_tpr", "fpr_low", "fpr_high"),
            cell(row, "neurons_margin", "margin_low", "margin_high"),
            {True: "yes", False: "no", None: ""}[row["margin_is_null"]],
            row["brier"],
            row["calibration_error"],
            f"{row['set_min']:.2f} to {row['set_max']:.2f}" if row["feature"] == "random" else "",
        ]
        for row in record["guard"]
    ]
    columns = ["test", "feature", "auroc", "accuracy", "fpr_at_95_tpr", "neurons_margin", "null", "brier"]
    return table(rows, [*columns, "calibration_error", "sets' AUROC"])


def cost_table(record: Record) -> str:
    """Measured against asked."""
    spent, size = record["cost"], record["size"]
    scoring = f"scoring {size['ranked']} prompts x {size['reply_tokens']} new tokens, s"
    rows = [
        (scoring, spent["seconds"]["scores"], SCORING),
        (
            "dynamic patching / plain generation of both models",
            spent["patched"] / (spent["base"] + spent["aligned"]),
            PATCHING,
        ),
        ("whole script, min", sum(spent["seconds"].values()) / 60, WHOLE),
    ]
    cells = [[name, f"{found:.3g}", f"{most:g}", "yes" if found <= most else "**no**"] for name, found, most in rows]
    peak = "peak memory of the largest process (a seed's training is one), MiB"
    return table([*cells, [peak, str(spent["peak_mib"]), "", ""]], ["", "measured", "at most", "met"])


# --- figures --------------------------------------------------------------------------------------------------------


def figures(record: Record) -> Mapping[str, Figure]:
    """Figures by file."""
    return {
        "safety-neurons/causal-effect.svg": causal_effect(record),
        "safety-neurons/layers.svg": layers(record["layers"]),
        "safety-neurons/guard.svg": aurocs(record),
    }


def causal_effect(record: Record) -> Figure:
    figure = Figure(figsize=(11, 3.2))
    axes = figure.subplots(1, 3, sharey=True)
    for axis, name in zip(axes, CURVES, strict=True):
        found = frame(record["curves"][name], *CURVE).astype(float)
        known = found[found.random_mean.notna()]
        percent = found.share * 100
        axis.fill_between(known.share * 100, known.random_low, known.random_high, color="0.8", label="random, 95 %")
        # a resample of exactly 1 may be a rounding error on the wrong side of the effect
        bars = np.clip([found.effect - found.ci_low, found.ci_high - found.effect], 0, None)
        axis.errorbar(percent, found.effect, bars, fmt="o-")
        axis.axhline(1, color="0.5", lw=0.8)
        axis.axhline(0, color="0.5", lw=0.8)
        axis.set(
            xscale="log",
            xlabel="top share of neurons, %",
            title=f"{record['ends_of'][name]['score']}, by {CURVES[name]}",
        )
        axis.xaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel("causal effect C")
    axes[1].legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.9))
    return figure


def layers(shares: list[float]) -> Figure:
    figure = Figure(figsize=(6, 2.6))
    axis = figure.subplots()
    axis.bar(range(len(shares)), shares)
    axis.axhline(1 / len(shares), color="0.5", lw=0.8)
    axis.set(xlabel="layer", ylabel=f"share of the top {TOP:.0%}")
    return figure


def aurocs(record: Record) -> Figure:
    found = guard(record, "auroc", "auroc_low", "auroc_high")
    figure = Figure(figsize=(9, 3))
    axis = figure.subplots()
    tests = found.test.unique()
    for k, feature in enumerate(("neurons", "random", *PLAIN)):
        rows = found[found.feature == feature].set_index("test").loc[tests]
        bars = np.clip([rows.auroc - rows.auroc_low, rows.auroc_high - rows.auroc], 0, None)
        at = np.arange(len(tests)) + 0.16 * (k - 2)
        axis.bar(at, rows.auroc, 0.16, yerr=bars, error_kw={"lw": 0.8}, label=feature)
    axis.set_xticks(range(len(tests)), tests, rotation=12)
    axis.set(ylabel="AUROC, 95 %", ylim=(min(0.4, found.auroc_low.min()), 1.0))
    axis.axhline(0.5, color="0.5", lw=0.8)
    axis.legend(ncols=5, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


PAGE = Page("safety-neurons", context, figures)
