"""The page of the safety neurons, drawn from docs/results/safety-neurons.json alone, and its figures.

python scripts/safety_neurons_page.py                # draw page and figures again
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from statements import Interval, Sentence, look_up, say

from mechsafety.metrics import adjust_p
from mechsafety.output import json_text

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OUT = Path(__file__).resolve().parents[1] / "docs" / "results"
NAME = "safety-neurons"
Record = Mapping[str, Any]

TOP = 0.05
PAGE = "page and figures"
# what the issue of cost asks for: seconds, times, minutes
SCORING, PATCHING, WHOLE = 480, 2.5, 40
CURVE = ["share", "neurons", "effect", "ci_low", "ci_high", "random_mean", "random_low", "random_high", "p_value"]
# a curve's name, and what its neurons are ranked by
CURVES = {"rms": "change", "ratio": "ratio", "judge": "change"}
# what the alignment tax is measured by
KINDS = ("safety", "helpfulness")
# the paper's range of C at 5 % over four models and four benchmarks
PUBLISHED = (0.56, 1.34)
SIGNIFICANT = 0.05


def write(out: Path, record: Record) -> None:
    """JSON, page and figures, into the folder ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{NAME}.json").write_text(json_text(plain(record)) + "\n")
    figures(record, out / NAME)
    (out / f"{NAME}.md").write_text(page(record))
    print(f"wrote {out / NAME}.md")


# --- what the page says, and the numbers that carry it ------------------------------------------------------------


def row_of(record: Record, curve: str, share: float = TOP) -> dict[str, Any]:
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


def of_curve(curve: str) -> dict[str, Any]:
    """Numbers of the sentence on the top 5 % of a curve."""
    return {
        "what": lambda r: f"{r['ends_of'][curve]['score']}, ranked by {CURVES[curve]}",
        "c": lambda r: Interval.of(row_of(r, curve), "effect", "ci_low", "ci_high"),
        "low": lambda r: PUBLISHED[0],
        "high": lambda r: PUBLISHED[1],
        "random": lambda r: Interval.of(row_of(r, curve), "random_mean", "random_low", "random_high"),
        "p": lambda r: adjusted(r)[curve, TOP],
        "points": lambda r: len(adjusted(r)),
        "sets": "size/random_sets",
    }


def curve_sentence(curve: str) -> Sentence:
    """C at the top 5 %: its place beside the published range, and beside random neurons."""
    start = "C at the top 5 % on {what}: {c}, {place} the published range ({low} to {high}, median 0.80). "
    more = (
        "That is more than random neurons of the same layers ({random}; p = {p:.3f}, adjusted over the {points} points "
        "of all curves, {sets} sets each)."
    )
    same = (
        "Random neurons of the same layers: {random}. No difference is claimed: with {sets} sets a p, "
        "adjusted over the "
        "{points} points of all curves, is {p:.3f}."
    )

    def wording(place: str, rest: str) -> str:
        return start.replace("{place}", place) + rest

    numbers = of_curve(curve)
    outside = "not wholly outside"
    inside = Sentence(wording(outside, same), numbers, lambda c, p, random: not beats(c, p, random))
    above = Sentence(wording(outside, more), numbers, lambda c, p, random: beats(c, p, random), inside)
    below = Sentence(
        wording("below", same), numbers, lambda c, p, random, low: c.high < low and not beats(c, p, random), above
    )
    return Sentence(
        wording("below", more), numbers, lambda c, p, random, low: c.high < low and beats(c, p, random), below
    )


def beats(c: Interval, p: float, random: Interval) -> bool:
    """Whether C is beyond random sets: by the adjusted p, and beyond what prompts leave open."""
    return p < SIGNIFICANT and c.low > random.high


def negative(record: Record, curve: str) -> list[dict[str, Any]]:
    return [row for row in record["curves"][curve] if row["ci_high"] < 0]


def negative_sentence(curve: str) -> Sentence:
    def points(record: Record) -> str:
        rows = negative(record, curve)
        return ", ".join(
            f"{row['effect']:.2f} ({row['ci_low']:.2f} to {row['ci_high']:.2f}) at {row['share']:.1%}" for row in rows
        )

    return Sentence(
        "At {n} small shares C on {what} is **negative**: with them the score is below the base model's. {points}. "
        "{replies}",
        {
            "n": lambda r: len(negative(r, curve)),
            "what": of_curve(curve)["what"],
            "points": points,
            "replies": lambda r: said_instead(r, curve),
        },
        lambda n: n > 0,
    )


def said_instead(record: Record, curve: str) -> str:
    """What is known of the replies behind a curve: a score that falls is no compliance."""
    rows = record.get("judged_replies")
    if curve != "judge":
        return "It is read before the reply, which was not generated, so that no compliance is claimed."
    if not rows:
        return "What the replies are that do not refuse was not measured, so that no compliance is claimed."
    return "Degenerate replies: " + ", ".join(f"{row['degenerate']} at {row['top share']}" for row in rows) + "."


def smallest_sentence(curve: str) -> Sentence:
    """The first share with C of at least 0.9."""

    def first(record: Record) -> dict[str, Any]:
        rows = [row for row in record["curves"][curve] if row["effect"] >= 0.9]
        return rows[0] if rows else {"share": float("nan"), "random_mean": None, "random_overlap": float("nan")}

    def band(record: Record) -> str:
        row = first(record)
        if row["random_mean"] is None:
            return "nothing is left for random sets there"
        return (
            f"random sets reach {Interval.of(row, 'random_mean', 'random_low', 'random_high')} there, which share "
            f"{row['random_overlap']:.0%} of their neurons with the top"
        )

    numbers = {
        "what": of_curve(curve)["what"],
        "measured": lambda r: ", ".join(f"{100 * row['share']:.3g}" for row in r["curves"][curve]),
        "share": lambda r: first(r)["share"],
        "band": band,
    }
    return Sentence(
        "The smallest share measured ({measured} %) with C of at least 0.9 on {what} is {share:.0%}; {band}.",
        numbers,
        lambda share: 0 < share <= 1,
        "C never reaches 0.9 on {what} (measured at {measured} %; share {share}; {band}).",
    )


def thirds(record: Record) -> list[float]:
    shares = record["layers"]
    third = len(shares) // 3
    return [sum(shares[:third]), sum(shares[third : len(shares) - third]), sum(shares[len(shares) - third :])]


def sized(record: Record, name: str) -> Any:
    return look_up(record, f"tax_agreement_sized/rows/measure=overlap/{name}")


OVERLAP = {
    "observed": "tax_agreement/measure=overlap/observed",
    "null": lambda r: Interval(sized(r, "sized_mean"), sized(r, "sized_low"), sized(r, "sized_high")),
    "bins": "tax_agreement_sized/bins",
    "p": lambda r: sized(r, "sized_p"),
    "layered": "tax_agreement/measure=overlap/layered_mean",
    "large": "scale/demo, demo-helpful/large in the base",
}


def patched_sentence(model: str, own: str, wanted: tuple[bool, bool], paper: str) -> Sentence:
    """One aligned model with the other's common neurons."""

    def moves(record: Record) -> str:
        row, before = (look_up(record, f"tax/model={name}") for name in (model, own))
        parts = [
            f"{kind} from {before[kind]:.2f} to {row[kind]:.2f} (random sets: {row[f'{kind}_random_low']:.2f} to "
            f"{row[f'{kind}_random_high']:.2f}, adjusted p = {tax_adjusted(record)[model, kind]:.3f})"
            for kind in KINDS
        ]
        return "; ".join(parts)

    def same(record: Record) -> str:
        row, before = (look_up(record, f"tax/model={name}") for name in (model, own))
        moved = tuple(bool(row[kind] > before[kind]) for kind in KINDS)
        return "both" if moved == wanted else "not both"

    numbers = {
        "moves": moves,
        "same": same,
        "largest": lambda r: max(tax_adjusted(r)[model, kind] for kind in KINDS),
        "smallest": lambda r: min(tax_adjusted(r)[model, kind] for kind in KINDS),
        "sets": "size/tax_random_sets",
    }
    start = (
        f"With the common neurons of the other ({model}): {{moves}}; {{same}} in the direction of the paper, {paper}. "
    )
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


def guard_frame(record: Record) -> pd.DataFrame:
    return pd.DataFrame(record["guard"])


def mean_accuracy(feature: str) -> Any:
    def mean(record: Record) -> float:
        found = guard_frame(record)
        return float(found[found.feature == feature].accuracy.mean())

    return mean


def nulls(record: Record, features: tuple[str, ...]) -> list[str]:
    """Test sets, with the feature, on which the neurons' margin over it holds 0."""
    found = guard_frame(record)
    found = found[found.feature.isin(features) & found.margin_is_null.eq(True)]
    return [f"{row.test} ({row.feature})" for row in found.itertuples()]


def sets_with_null(record: Record, features: tuple[str, ...]) -> int:
    found = guard_frame(record)
    return found[found.feature.isin(features) & found.margin_is_null.eq(True)].test.nunique()


PLAIN = ("resid", "direction", "tfidf")


def worst(record: Record) -> dict[str, Any]:
    return min((row for row in record["guard"] if row["feature"] == "neurons"), key=lambda row: row["auroc"])


def false_alarms(record: Record) -> list[float]:
    return [row["fpr_at_95_tpr"] for row in record["guard"] if row["feature"] == "neurons"]


def of_seeds(column: str, how: str) -> Any:
    return lambda r: getattr(pd.DataFrame(r["seeds"])[column], how)()


def refused(side: str) -> Any:
    return lambda r: sum(row[side] for row in r["seed_refusals"]) / sum(row["of"] for row in r["seed_refusals"])


SIZED = "overlap, permuted in sizes"
SEEDS = {
    "n": "size/seeds",
    "mean": of_seeds("overlap", "mean"),
    "low": of_seeds("overlap", "min"),
    "high": of_seeds("overlap", "max"),
    "large": "scale/seeds/large in the base",
}
SENTENCES = {
    "ability": Sentence(
        "General ability: the aligned model repeats {whole:.0%} of the base's replies to ordinary questions (KL "
        "{whole_kl:.2f} nats a token); the top {share:.1%} alone already brings that to {few:.0%} (KL {few_kl:.2f}).",
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
        "Layers: of the top 5 % of neurons {first:.0%} are in the first third of the layers, {middle:.0%} in the "
        "middle, {last:.0%} in the last: most are late (the paper's distributions are of its own, larger models).",
        {
            "first": lambda r: thirds(r)[0],
            "middle": lambda r: thirds(r)[1],
            "last": lambda r: thirds(r)[2],
        },
        lambda last: last > 0.5,
    ),
    "overlap": Sentence(
        "Alignment tax: {observed:.1%} of the two tops are common. A change is as large as its neuron, so that much of "
        "this is size: permuted within layers and, in each, among {bins} groups of like activation in the base, "
        "{null:.1%} are common (p = {p:.3f}); within layers alone, which leaves size in, it would be {layered:.1%}. "
        "{large:.0%} of each top is among as many neurons with the largest activations. Beyond size the overlap is "
        "small, and more than chance, as in the paper, where safety and helpfulness neurons overlap.",
        OVERLAP,
        lambda observed, null, p: p < SIGNIFICANT and null.high < observed < null.value + 0.1,
        "Alignment tax: {observed:.1%} of the two tops are common; permuted within layers and, in each, among {bins} "
        "groups of like activation in the base, {null:.1%} are (p = {p:.3f}; within layers alone {layered:.1%}; "
        "{large:.0%} of each top is among the largest).",
    ),
    "overlap_open": Sentence(
        "Alignment tax: {observed:.1%} of the two tops are common, but a change is as large as its neuron "
        "and {large:.0%} "
        "of each top is among as many neurons with the largest activations in the base. Permutations within "
        "layers have "
        "{layered:.1%}, which leaves size in; the null within sizes was not measured, so that no overlap beyond chance "
        "is claimed.",
        {name: OVERLAP[name] for name in ("observed", "large", "layered")},
        lambda observed, large, layered: large > layered and observed > layered,
    ),
    "by_ratio": Sentence(
        "By ratio, which divides the size out, {ratio:.1%} of the tops of `demo` and `demo-helpful` are common, where "
        "permutations within layers have {null:.1%} (p = {p:.3f}): little is left.",
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
        "Seeds: any two of {n} share {mean:.1%} of their top 5 % on average ({low:.1%} to {high:.1%}). {large:.0%} of "
        "each top is among as many neurons with the largest activations in the base. Permutations within layers and "
        "groups of like activation, which keep the neurons' size, share {null:.1%} on average, at most {most:.1%} "
        "(largest p {p:.3f}): most of the agreement is size, and some is beyond it. In the paper different training "
        "runs give largely the same neurons.",
        SEEDS
        | {
            "null": of_seeds(SIZED, "mean"),
            "most": of_seeds(SIZED, "max"),
            "p": of_seeds("overlap, p", "max"),
        },
        lambda mean, low, null, most, p: p < SIGNIFICANT and low > most and null > mean / 2,
    ),
    "seeds_open": Sentence(
        "Seeds: any two of {n} share {mean:.1%} of their top 5 % on average ({low:.1%} to {high:.1%}). {large:.0%} of "
        "each top is among as many neurons with the largest activations in the base, and the null within sizes was not "
        "measured for seeds: how much of the {mean:.1%} is size is open. In the paper different training runs give "
        "largely the same neurons.",
        SEEDS,
        lambda large, mean: large > 0.5 and mean > 0.5,
    ),
    "seeds_ratio": Sentence(
        "By ratio any two seeds share {ratio:.0%} of their tops, where permutations within layers have {null:.0%} "
        "(largest p {p:.3f}): the ratio divides size out, so this much of "
        "their agreement is not size.",
        {
            "ratio": "scale/seeds/ratio",
            "null": "scale/seeds/ratio, permuted in layers",
            "p": "scale/seeds/largest p",
        },
        lambda ratio, null, p: p < SIGNIFICANT and ratio > 2 * null,
    ),
    "twins": Sentence(
        "**The seeds refuse many of the harmless twins too**: {harmful:.0%} of harmful prompts and {harmless:.0%} of "
        "their twins; their agreement says little about what tells harmful from harmless.",
        {"harmful": refused("harmful"), "harmless": refused("harmless")},
        lambda harmful, harmless: harmless > 0.5 * harmful > 0.25,
        "The seeds refuse {harmful:.0%} of harmful prompts and {harmless:.0%} of their twins.",
    ),
    "guard": Sentence(
        "Guard: mean accuracy over {n} test sets {ours:.1%}, of as many random neurons {random:.1%} (the "
        "paper's 76.2 % "
        "is of other models, labels and prompts). The margin in AUROC over random neurons is null, its "
        "interval holding "
        "0, on {null} of {n} test sets: which neurons they are hardly matters.",
        {
            "n": lambda r: guard_frame(r).test.nunique(),
            "ours": mean_accuracy("neurons"),
            "random": mean_accuracy("random"),
            "null": lambda r: sets_with_null(r, ("random",)),
        },
        lambda null, n: null > n / 2,
    ),
    "plain": Sentence(
        "Guard: by the same rule, on {null} of {n} test sets at least one of residual stream, direction and "
        "TF-IDF does "
        "as well as the neurons: {where}.",
        {
            "null": lambda r: sets_with_null(r, PLAIN),
            "n": lambda r: guard_frame(r).test.nunique(),
            "where": lambda r: ", ".join(nulls(r, PLAIN)),
        },
        lambda null: null > 0,
        "Guard: by the same rule, on {null} of {n} test sets one of residual stream, direction and TF-IDF does as well "
        "as the neurons{where}.",
    ),
    "worst": Sentence(
        "Guard: its lowest AUROC is {auroc}, on *{name}*, where chance lies in the interval; to catch 95 % of unsafe "
        "replies it flags {least:.0%} to {most:.0%} of the safe.",
        {
            "auroc": lambda r: Interval.of(worst(r), "auroc"),
            "name": lambda r: worst(r)["test"],
            "least": lambda r: min(false_alarms(r)),
            "most": lambda r: max(false_alarms(r)),
        },
        lambda auroc: auroc.holds(0.5),
        "Guard: its lowest AUROC is {auroc}, on *{name}*; to catch 95 % of unsafe replies it flags {least:.0%} to "
        "{most:.0%} of the safe.",
    ),
    "planted": Sentence(
        "Planted: of {neurons} neurons scaled by {factor:g} in a copy of the base, {ratio:.1%} are among as "
        "many of the "
        "highest ratio scores, as asked for (at least 95 %), and {rms:.1%} of the highest rms scores "
        "({prompts} prompts "
        "x {tokens} tokens). A raw difference is as large as the neuron's own scale.",
        {name: f"planted/{name}" for name in ("neurons", "factor", "ratio", "rms", "prompts", "tokens")},
        lambda ratio, rms: ratio >= 0.95 > rms,
    ),
    "ends": Sentence(
        "Dynamic patching with 0 % of the neurons is the base model and with 100 % the aligned one: {none} "
        "and {all} of "
        "{n} replies are the same, logits differ by at most {off:.0e}.",
        {
            "none": "ends/0 %/same_replies",
            "all": "ends/100 %/same_replies",
            "n": "ends/0 %/prompts",
            "off": lambda r: max(found["largest_logit_difference"] for found in r["ends"].values()),
        },
        lambda none, all, n, off: none == all == n and off < 1e-3,
    ),
}


def findings(record: Record) -> list[str]:
    """What the figures say, in order."""
    out = []
    for curve in CURVES:
        out.append(say(record, curve_sentence(curve)))
        if negative(record, curve):
            out.append(say(record, negative_sentence(curve)))
        out.append(say(record, smallest_sentence(curve)))
    checks = ("planted", "ends")  # these stand beside what they check
    return [*out, *(say(record, SENTENCES[name]) for name in told(record) if name not in checks)]


def told(record: Record) -> list[str]:
    """Names of the sentences of this record: those on what was not measured stand in for those on what was."""
    left_out = {"overlap_open" if record["tax_agreement_sized"] else "overlap"}
    left_out.add("seeds_open" if SIZED in record["seeds"][0] else "seeds")
    if record["tax"] is None:
        left_out |= {"overlap", "overlap_open", "by_ratio", "safe", "helpful"}
    return [name for name in SENTENCES if name not in left_out]


# --- the page -------------------------------------------------------------------------------------------------------


def page(record: Record) -> str:
    """The page's text."""
    size = record["size"]
    lines = ["# Safety neurons of the demo pair", ""]
    lines += [
        "Measured by `scripts/reproduce_safety_neurons.py`, drawn from [safety-neurons.json](safety-neurons.json) by "
        "`scripts/safety_neurons_page.py`; formulas are in [methods](../methods.md#safety-neurons). The pair: `demo` "
        "(aligned) and `demo-base`, which differ in learned scales of MLP neurons alone ((IA)3, as in the paper's "
        "released training code). Neurons are ranked on train topics and judged on others. Intervals are 95 % over "
        "prompts.",
        "",
        "What else is not as in the paper: one model of 135M parameters instead of four much larger ones; safety is "
        f"the log-odds of a refusal's first token, or a phrase judge of the first {size['judged_tokens']} tokens of a "
        "reply, where the paper's is a cost model that reads long replies. Published figures stand beside ours for "
        "orientation.",
    ]
    if record.get("small"):
        lines += ["", "**A small run, made to test the script: its figures mean nothing.**"]
    lines += [*(f"{line}" for line in later(record))]
    lines += ["", "## What agrees with the paper and what does not", ""]
    lines += [f"- {line}" for line in findings(record)]
    neurons = record["neurons"]
    lines += ["", "## Neurons", ""]
    lines += [
        f"{neurons['tokens']} reply tokens of {size['ranked']} prompts; split-half rank correlation "
        f"{neurons['reliability']:.3f}.",
        "",
        "![layers of the top 5 %](safety-neurons/layers.svg)",
        "",
        "The twelve highest. Promoted and suppressed tokens are those of a positive activation and change places under "
        "a negative one; last, where the neuron is most active in harmful instructions, with the text before.",
        "",
        table(pd.DataFrame(record["cards"])),
        "",
        say(record, SENTENCES["planted"]),
        "",
        say(record, SENTENCES["ends"]),
        "",
        "Neurons of `demo` alone that tell harmful from harmless prompts: the five of each span with the largest "
        f"Cohen's d on {neurons['contrast_train']} train pairs, and their d on {neurons['contrast_test']} "
        "pairs of other "
        "topics.",
        "",
        table(pd.DataFrame(record["contrast"])),
        "",
        "What overlaps of tops owe to the neurons' size (findings, *Alignment tax* and *Seeds*):",
        "",
        table(pd.DataFrame.from_dict(record["scale"], orient="index").reset_index(names="tops")),
    ]
    lines += ["", "## Causal effect", *effect(record)]
    lines += ["", "## Alignment tax", "", *tax_section(record)]
    lines += ["", "## Seeds", "", *seeds_section(record)]
    lines += ["", "## Guard", "", *guard_section(record)]
    lines += ["", "## Cost", "", table(cost(record)), "", taken(record)]
    lines += [
        "",
        f"To stay below {WHOLE} minutes: the ranking by ratio and the phrase judge have "
        f"{len(size['ratio_shares'])} and "
        f"{len(size['judged_shares'])} shares, not eight; the judge reads {size['judged_tokens']} tokens of replies to "
        f"{size['judged']} prompts; a seed learns from {size['seed_examples']} pairs and as many single prompts.",
        "",
    ]
    return "\n".join(lines)


def later(record: Record) -> list[str]:
    """Parts that were measured after the others."""
    found = record.get("later", {}).values()
    return (
        ["", *(f"*{what['section']}* was measured on {what['date']}, {what['how']}." for what in found)]
        if found
        else []
    )


def effect(record: Record) -> list[str]:
    shown = [*CURVE, "random_overlap"]
    sets = record["size"]["random_sets"]
    said = "; ".join(
        f"{found['score']}: F(base) {Interval(*found['base'])}, F(aligned) {Interval(*found['aligned'])}"
        for found in (record["ends_of"][name] for name in ("rms", "judge"))
    )
    lines = ["", "![C against the share of neurons](safety-neurons/causal-effect.svg)", ""]
    lines += [
        f"C = (F(patched) - F(base)) / (F(aligned) - F(base)). {said}. The random columns are the mean and the 2.5 and "
        f"97.5 percentiles of {sets} sets with as many neurons in each layer; p = (1 + sets with C at least "
        "the top's) / "
        f"(1 + sets), so at least {1 / (1 + sets):.3f}; in the tables it is not adjusted, in the findings it is. "
        "*random_overlap*: where more than half of a layer is in the top, a set holds all of the layer's others and "
        "shares the rest with the top; such sets are hardly random, and their p says little.",
        "",
    ]
    for name, what in (
        ("rms", "{score}, {n} harmful prompts of held-out topics; ranked by change (rms):"),
        ("ratio", "Ranked by the ratio score:"),
        (
            "judge",
            "Phrase judge, {n} prompts, greedy replies; these intervals are of the percentile bootstrap, which is too "
            "narrow on so few prompts ([coverage](coverage.md)):",
        ),
    ):
        lines += [what.format(**record["ends_of"][name]), ""]
        lines += [
            table(pd.DataFrame(record["curves"][name])[shown].astype({"p_value": float, "random_mean": float})),
            "",
        ]
    rows = record.get("judged_replies")
    if rows:
        length = record["size"]["said_tokens"]
        lines += [
            f"What these replies are, read up to {length} tokens ([four kinds](../methods.md), shares with Wilson's "
            "95 % intervals); *perplexity*: of the replies, under whichever of the two models finds each more likely:",
            "",
            table(pd.DataFrame(rows)),
            "",
        ]
    else:
        lines += ["What these replies are beside refusals, answers or babble, was not measured.", ""]
    lines += [
        f"General ability on {record['size']['harmless']} ordinary questions of the test split (their subjects may "
        "recur in what the adapters learned from). All of it is of the base model's own greedy replies, 16 tokens: KL "
        "from the base in nats a token, perplexity, and the share of the reply that the patched model repeats before "
        "it first departs; so the base itself is the best there is, whatever the quality of replies. No random sets "
        "here.",
        "",
    ]
    return [*lines, table(pd.DataFrame(record["ability"]))]


def tax_section(record: Record) -> list[str]:
    if record["tax"] is None:
        return ["Not run: there is no shipped helpful adapter."]
    found, null = record["tax_counts"], record["tax_agreement_sized"]
    overlap = found["random_overlap"]
    shared = f"; random sets share {overlap:.0%} of their neurons with them" if overlap else ""
    text = (
        f"{found['common']} neurons are in both tops{shared}. Safety: {found['scores'][0]}, {found['harmful']} harmful "
        f"prompts. Helpfulness: {found['scores'][1]}, {found['harmless']} ordinary questions: log-likelihood "
        "a token of "
        "the project's own short, formatted answers. Their form is what `demo-helpful` learned, so this helpfulness is "
        "in part a matter of form. Random columns are the lowest and highest of the sets; p as above, not adjusted. "
        "Nulls of the agreement: permutations over all neurons (*free*), within layers (*layered*)"
        + (
            f", and within layers and {null['bins']} groups of like activation in the base (*sized*), the only "
            "one that "
            "keeps the neurons' size."
            if null
            else "; neither keeps the neurons' size."
        )
    )
    agreement = pd.DataFrame(record["tax_agreement"])
    lines = [
        text,
        "",
        table(pd.DataFrame(record["tax"]).astype({name: float for name in numbers_of(record["tax"])})),
        "",
    ]
    if null is None:
        return [*lines, table(agreement)]
    bins = pd.DataFrame([{"groups": int(k), "overlap, permuted": v} for k, v in null["by_bins"].items()])
    return [
        *lines,
        table(agreement.merge(pd.DataFrame(null["rows"]), on="measure")),
        "",
        "The overlap that permutations have, against the number of groups in each layer (1 is *layered*):",
        "",
        table(bins),
    ]


def numbers_of(rows: list[dict[str, Any]]) -> list[str]:
    """Columns that hold numbers, with None where there is none."""
    return [name for name in rows[0] if not isinstance(rows[0][name], str)]


NULLS = ("permuted in layers", "permuted in sizes")


def seeds_section(record: Record) -> list[str]:
    frame = pd.DataFrame(record["seeds"])
    means = [
        {
            "measure": name,
            "mean": frame[name].mean(),
            "lowest": frame[name].min(),
            "highest": frame[name].max(),
            **{how: frame[f"{name}, {how}"].mean() for how in NULLS if f"{name}, {how}" in frame},
        }
        for name in ("overlap", "spearman_top", "spearman_all")
    ]
    size = record["size"]
    lines = [
        f"{size['seeds']} adapters, each trained for one epoch, at twice the learning rate of the shipped one's first "
        f"stage, on {size['seed_examples']} pairs and as many single prompts drawn by its seed; scored on the "
        f"same {size['seed_prompts']} prompts. Over all pairs of seeds (permutations within layers leave the neurons' "
        "size in; those within groups of like size do not):"
    ]
    kept = [name for name in frame.columns if not name.endswith(", p")]
    lines += ["", table(pd.DataFrame(means)), "", table(frame[kept]), "", "What each refuses, test topics:", ""]
    return [*lines, table(pd.DataFrame(record["seed_refusals"]))]


def guard_section(record: Record) -> list[str]:
    kinds = "degenerate" in record["guard_sets"][0]
    unsafe = "it answers a harmful prompt" if kinds else "the prompt is harmful and the phrase judge finds no refusal"
    lines = [
        f"The watched model is the **base**, which refuses little: a reply is *unsafe* if {unsafe}, so that here "
        "unsafe nearly means that the prompt is harmful. Replies to "
        "harmless prompts count as safe without being generated. The first set is what guards learn from; the harmful "
        "prompts of the third are among those of the second. *null*: the interval of the neurons' margin in AUROC over "
        "that feature holds 0; *sets' AUROC*: lowest and highest of the random sets."
    ]
    if record["guard_left_out"]:
        lines += ["", f"Left out, as their files were not there: {', '.join(record['guard_left_out'])}."]
    lines += ["", table(pd.DataFrame(record["guard_sets"])), "", "![AUROC](safety-neurons/guard.svg)", ""]
    frame = guard_frame(record)
    shown = frame[["test", "feature"]].copy()
    for name, low, high in (
        ("auroc", "auroc_low", "auroc_high"),
        ("accuracy", "accuracy_low", "accuracy_high"),
        ("fpr_at_95_tpr", "fpr_low", "fpr_high"),
        ("neurons_margin", "margin_low", "margin_high"),
    ):
        shown[name] = [
            "" if row[0] is None or np.isnan(row[0]) else f"{Interval(*row)}"
            for row in frame[[name, low, high]].itertuples(index=False, name=None)
        ]
    shown["null"] = ["" if value is None or value != value else str(bool(value)) for value in frame.margin_is_null]
    shown[["brier", "calibration_error"]] = frame[["brier", "calibration_error"]]
    shown["sets' AUROC"] = [
        f"{row.set_min:.2f} to {row.set_max:.2f}" if row.feature == "random" else "" for row in frame.itertuples()
    ]
    return [*lines, table(shown)]


def cost(record: Record) -> pd.DataFrame:
    """Measured against asked."""
    spent = record["cost"]
    factor = spent["patched"] / (spent["base"] + spent["aligned"])
    size, whole = record["size"], sum(spent["seconds"].values()) / 60
    scoring = f"scoring {size['ranked']} prompts x {size['reply_tokens']} new tokens, s"
    rows = [
        (scoring, spent["seconds"]["scores"], SCORING),
        ("dynamic patching / plain generation of both models", factor, PATCHING),
        ("whole script, min", whole, WHOLE),
    ]
    frame = pd.DataFrame(
        [(name, f"{value:.3g}", f"{limit:g}", "yes" if value <= limit else "**no**") for name, value, limit in rows],
        columns=["", "measured", "at most", "met"],
    )
    frame.loc[len(frame)] = [
        "peak memory of the largest process (a seed's training is one), MiB",
        str(spent["peak_mib"]),
        "",
        "",
    ]
    return frame


def taken(record: Record) -> str:
    spent = record["cost"]
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in spent["seconds"].items())
    return (
        f"Measured with {spent['threads']} torch threads, models loaded before. Attempts that were interrupted are "
        f"counted, those that were killed are not. Seconds: {seconds}."
    )


# --- figures and tables --------------------------------------------------------------------------------------------


def figures(record: Record, folder: Path) -> None:
    plt.rcParams["svg.hashsalt"] = "mechsafety"
    folder.mkdir(parents=True, exist_ok=True)

    def save(figure: Any, name: str) -> None:
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), sharey=True)
    for axis, name in zip(axes, CURVES, strict=True):
        frame = pd.DataFrame(record["curves"][name]).astype(float)
        known = frame[frame.random_mean.notna()]
        percent = frame.share * 100
        axis.fill_between(known.share * 100, known.random_low, known.random_high, color="0.8", label="random, 95 %")
        # a resample of exactly 1 may be a rounding error on the wrong side of the effect
        bars = np.clip([frame.effect - frame.ci_low, frame.ci_high - frame.effect], 0, None)
        axis.errorbar(percent, frame.effect, bars, fmt="o-")
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
    save(figure, "causal-effect")

    figure, axis = plt.subplots(figsize=(6, 2.6))
    shares = record["layers"]
    axis.bar(range(len(shares)), shares)
    axis.axhline(1 / len(shares), color="0.5", lw=0.8)
    axis.set(xlabel="layer", ylabel=f"share of the top {TOP:.0%}")
    save(figure, "layers")

    frame = pd.DataFrame(record["guard"])
    features = ["neurons", "random", "resid", "direction", "tfidf"]
    figure, axis = plt.subplots(figsize=(9, 3))
    tests = frame.test.unique()
    for k, feature in enumerate(features):
        rows = frame[frame.feature == feature].set_index("test").loc[tests]
        bars = np.clip([rows.auroc - rows.auroc_low, rows.auroc_high - rows.auroc], 0, None)
        at = np.arange(len(tests)) + 0.16 * (k - 2)
        axis.bar(at, rows.auroc, 0.16, yerr=bars, error_kw={"lw": 0.8}, label=feature)
    axis.set_xticks(range(len(tests)), tests, rotation=12)
    axis.set(ylabel="AUROC, 95 %", ylim=(min(0.4, frame.auroc_low.min()), 1.0))
    axis.axhline(0.5, color="0.5", lw=0.8)
    axis.legend(ncols=5, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))
    save(figure, "guard")


def table(frame: pd.DataFrame, digits: int = 3) -> str:
    """Markdown table; a bar in a cell would end it."""

    def cell(value: Any) -> str:
        if isinstance(value, float | np.floating):
            return "" if np.isnan(value) else f"{value:.{digits}f}"
        return str(value).replace("|", "\\|")

    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "| " + " | ".join("---" for _ in frame.columns) + " |"]
    lines += ["| " + " | ".join(map(cell, row)) + " |" for row in frame.itertuples(index=False)]
    return "\n".join(lines)


def code(text: str) -> str:
    """A token as Markdown code; one that holds a backtick needs longer quotes."""
    shown = repr(text)
    return f"`` {shown} ``" if "`" in shown else f"`{shown}`"


def plain(value: Any) -> Any:
    """JSON has no NaN and no numpy types."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and np.isnan(value) else value


def main() -> None:
    write(OUT, json.loads((OUT / f"{NAME}.json").read_text()))


if __name__ == "__main__":
    main()
