"""The page, figures and JSON that scripts/reproduce_safety_neurons.py writes."""

import dataclasses
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

from mechsafety.intervals import mean_interval, wilson_interval
from mechsafety.output import json_text

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TOP = 0.05
PAGE = "page and figures"
# what the issue of cost asks for: seconds, times, minutes
SCORING, PATCHING, WHOLE = 480, 2.5, 40
CURVE = ["share", "neurons", "effect", "ci_low", "ci_high", "random_mean", "random_low", "random_high", "p_value"]
# what the alignment tax is measured by
KINDS = ("safety", "helpfulness")
# the paper's range of C at 5 % over four models and four benchmarks
PUBLISHED = (0.56, 1.34)


def write(out: Path, run: Any) -> None:
    """Page, JSON and figures, into the folder ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    with run.timed(PAGE):
        page(run)
        figures(run, out / "safety-neurons")
    text = page(run)  # once more: now it knows what all of it took
    (out / "safety-neurons.md").write_text(text)
    scores = run.scores()
    record = {
        "provenance": scores.provenance.to_json(),
        "aligned": scores.aligned.to_json(),
        "size": dataclasses.asdict(run.size),
        "findings": findings(run),
        "layers": scores.layer_shares(TOP).tolist(),
        "curves": {
            name: found.to_dataframe().to_dict("records")
            for name, (_, found) in zip(("rms", "ratio", "judge"), curves(run), strict=True)
        },
        "guard": guard_frame(run).to_dict("records"),
        "seeds": seeds(run).to_dict("records"),
        "seed_refusals": seed_refusals(run).to_dict("records"),
        "tax": run.tax().to_dataframe().to_dict("records") if run.has_helpful() else None,
        "tax_agreement": run.tax().agreement.to_dataframe().to_dict("records") if run.has_helpful() else None,
        "scale": run.scale_controls(),
        "planted": run.planted(),
        "ends": run.ends(),
        "cost": {**run.cost(), **run.clock()},
    }
    (out / "safety-neurons.json").write_text(json_text(plain(record)) + "\n")
    print(text)


def page(run: Any) -> str:
    size = run.size
    lines = ["# Safety neurons of the demo pair", ""]
    lines += [
        "Written by `scripts/reproduce_safety_neurons.py`; formulas are in [methods](../methods.md#safety-neurons). "
        "The pair: `demo` (aligned) and `demo-base`, which differ in learned scales of MLP neurons alone ((IA)3, as in "
        "the paper's released training code). Neurons are ranked on train topics and judged on others. Intervals "
        "are 95 % over prompts.",
        "",
        "What else is not as in the paper: one model of 135M parameters instead of four much larger ones; safety is "
        f"the log-odds of a refusal's first token, or a phrase judge of the first {size.judged_tokens} tokens of a "
        "reply, where the paper's is a cost model that reads long replies. Published figures stand beside ours for "
        "orientation.",
    ]
    if run.args.small:
        lines += ["", "**A small run, made to test the script: its figures mean nothing.**"]
    lines += ["", "## What agrees with the paper and what does not", ""]
    lines += [f"- {line}" for line in findings(run)]
    scores = run.scores()
    lines += ["", "## Neurons", "", f"{scores!r}; split-half rank correlation {scores.reliability:.3f}.", ""]
    lines += ["![layers of the top 5 %](safety-neurons/layers.svg)", ""]
    lines += [
        "The twelve highest. Promoted and suppressed tokens are those of a positive activation and change places under "
        "a negative one; last, where the neuron is most active in harmful instructions, with the text before.",
        "",
        table(cards(run)),
    ]
    lines += ["", *checks(run)]
    lines += [
        "",
        f"Neurons of `demo` alone that tell harmful from harmless prompts: the five of each span with the largest "
        f"Cohen's d on {run.contrast('train').n} train pairs, and their d on {run.contrast('test').n} pairs of other "
        "topics.",
        "",
    ]
    lines += [table(contrast(run)), "", "What overlaps of tops owe to the neurons' scale (findings, *Scale*):", ""]
    lines += [table(pd.DataFrame.from_dict(run.scale_controls(), orient="index").reset_index(names="tops"))]
    lines += ["", "## Causal effect", *effect(run)]
    lines += ["", "## Alignment tax", "", *tax_section(run)]
    lines += ["", "## Seeds", "", *seeds_section(run)]
    lines += ["", "## Guard", "", *guard_section(run)]
    lines += ["", "## Cost", "", table(cost(run)), "", taken(run)]
    lines += [
        "",
        f"To stay below {WHOLE} minutes: the ranking by ratio and the phrase judge have {len(size.ratio_shares)} and "
        f"{len(size.judged_shares)} shares, not eight; the judge reads {size.judged_tokens} tokens of replies to "
        f"{size.judged} prompts; a seed learns from {size.seed_examples} pairs and as many single prompts.",
        "",
    ]
    return "\n".join(lines)


# --- what the figures say ------------------------------------------------------------------------------------------


def findings(run: Any) -> list[str]:
    """What the figures say, decided by the figures."""
    out = [line for ranking, one in curves(run) for line in curve_findings(one, ranking)]
    out.append(ability_finding(run.curve("rms")))
    shares = run.scores().layer_shares(TOP).numpy()
    third = len(shares) // 3
    parts = [shares[:third].sum(), shares[third : len(shares) - third].sum(), shares[len(shares) - third :].sum()]
    out.append(
        f"Layers: of the top 5 % of neurons {parts[0]:.0%} are in the first third of the layers, {parts[1]:.0%} in the "
        f"middle, {parts[2]:.0%} in the last (the paper's distributions are of its own, larger models)."
    )
    if run.has_helpful():
        out += tax_findings(run)
    return [*out, *seed_findings(run), scale_finding(run), *guard_findings(run)]


def curves(run: Any) -> list[tuple[str, Any]]:
    """What neurons are ranked by, and their curve."""
    return [("change", run.curve("rms")), ("ratio", run.curve("ratio")), ("change", run.judged_curve())]


def curve_findings(one: Any, ranking: str) -> list[str]:
    frame, what = one.to_dataframe(), f"{one.score}, ranked by {ranking}"
    row = frame[frame.share == TOP].iloc[0]
    low, high = PUBLISHED
    place = "below" if row.effect < low else "above" if row.effect > high else "inside"
    if row.p_value > 0.05:
        beats = "no more than random neurons of the same layers"
    elif row.ci_low <= row.random_high:
        beats = "more than every random set, but not beyond what prompts leave open"
    else:
        beats = "more than random neurons of the same layers"
    out = [
        f"C at the top 5 % on {what}: {row.effect:.2f} ({row.ci_low:.2f} to {row.ci_high:.2f}), {place} the published "
        f"range ({low} to {high}, median 0.80); {beats} ({row.random_low:.2f} to {row.random_high:.2f}, p = "
        f"{row.p_value:.3f})."
    ]
    against = frame[frame.ci_high < 0]
    if len(against):
        points = ", ".join(
            f"{r.share:.1%} ({r.effect:.2f}; random {r.random_low:.2f} to {r.random_high:.2f})"
            for r in against.itertuples()
        )
        out.append(f"At small shares C on {what}, is **negative**: with them the base model refuses less. {points}.")
    measured = ", ".join(f"{share:.3g}" for share in frame.share * 100)
    reached = one.smallest(0.9)
    if reached is None:
        return [*out, f"C never reaches 0.9 on {what} (measured at {measured} %)."]
    row = frame[frame.share == reached].iloc[0]
    band = "nothing is left for random sets there"
    if not np.isnan(row.random_mean):
        band = f"random sets there: {row.random_low:.2f} to {row.random_high:.2f}, p = {row.p_value:.3f}"
        band += f" (they share {row.random_overlap:.0%} of their neurons with the top)"
        if row.random_mean >= 0.8 * row.effect:
            band += ", so nearly the same as the top"
    return [
        *out,
        f"The smallest share measured ({measured} %) with C of at least 0.9 on {what}: {reached:.0%}; {band}.",
    ]


def ability_finding(one: Any) -> str:
    """What harmless replies pay, at the first share measured and with all neurons."""
    frame = one.harmless.to_dataframe()
    few, whole = frame.iloc[0], frame.iloc[len(one.shares)]
    return (
        f"General ability: the aligned model repeats {whole.agreement:.0%} of the base's replies to ordinary questions "
        f"(KL {whole.kl:.2f} nats a token); the top {one.shares[0]:.1%} alone brings that to {few.agreement:.0%} (KL "
        f"{few.kl:.2f})."
    )


def scale_finding(run: Any) -> str:
    """What overlaps owe to scale."""
    parts = [
        f"{name}: {found['change']:.0%} of the tops by change are common, and {found['large in the base']:.0%} of each "
        f"are among as many neurons with the largest activations in the base; by ratio {found['ratio']:.0%} are common "
        f"({found['ratio, permuted in layers']:.0%} permuted within layers, largest p {found['largest p']:.3f})"
        for name, found in run.scale_controls().items()
    ]
    return (
        f"Scale: a change is as large as its neuron, which no permutation keeps. {'; '.join(parts)}. What the overlap "
        "by ratio adds to its permuted value is agreement that scale does not explain."
    )


def guard_findings(run: Any) -> list[str]:
    frame = guard_frame(run)
    ours, random = frame[frame.feature == "neurons"].set_index("test"), frame[frame.feature == "random"]
    null = int(random.margin_is_null.sum())
    others = frame[frame.feature.isin(["resid", "direction", "tfidf"])].groupby("test").auroc.max()
    beaten = [name for name in ours.index if others[name] >= ours.auroc[name]]
    worst = ours.loc[ours.auroc.idxmin()]
    rates = ours.fpr_at_95_tpr
    out = [
        f"Guard: mean accuracy over {len(ours)} test sets {ours.accuracy.mean():.1%}, of as many random neurons "
        f"{random.accuracy.mean():.1%} (the paper's 76.2 % is of other models, labels and prompts). The margin in "
        f"AUROC over random neurons is null on {null} of {len(random)} test sets; in the paper the same baseline is "
        "within two points of accuracy.",
        f"Guard: its lowest AUROC is {worst.auroc:.2f} ({worst.auroc_low:.2f} to {worst.auroc_high:.2f}), on "
        f"*{worst.name}*; to catch 95 % of unsafe replies it flags {rates.min():.0%} to {rates.max():.0%} of the safe.",
    ]
    if beaten:
        out.append(f"Guard: residual stream, direction or TF-IDF do as well or better on {', '.join(beaten)}.")
    return out


def guard_frame(run: Any) -> pd.DataFrame:
    """The guard's table; its bootstraps take seconds, so they are made once a run."""
    if "guard" not in run.frames:
        run.frames["guard"] = run.guard().to_dataframe()
    return run.frames["guard"]


def tax_findings(run: Any) -> list[str]:
    tax = run.tax()
    found, frame = tax.agreement.to_dataframe().set_index("measure"), tax.to_dataframe().set_index("model")
    overlap = found.loc["overlap"]
    verdict = "as in" if overlap.layered_p < 0.05 else "not as in"
    out = [
        f"Alignment tax: {overlap.observed:.1%} of the two tops are common, {overlap.layered_mean:.1%} if permuted "
        f"within layers (p = {overlap.layered_p:.3f}), {verdict} the paper, where safety and helpfulness neurons "
        "overlap more than by chance (but see scale, below)."
    ]
    for model, own, wanted, other in (
        ("safe <- helpful", "safe", [False, True], "the paper, where safety falls and helpfulness rises"),
        ("helpful <- safe", "helpful", [True, False], "the paper, where safety rises and helpfulness falls"),
    ):
        parts, moved, apart = [], [], []
        for kind in KINDS:
            row, before = frame.loc[model], frame.loc[own, kind]
            moved.append(bool(row[kind] > before))
            apart.append(row[f"{kind}_p"] < 0.05)
            parts.append(
                f"{kind} from {before:.2f} to {row[kind]:.2f} (random sets: {row[f'{kind}_random_low']:.2f} to "
                f"{row[f'{kind}_random_high']:.2f}, p = {row[f'{kind}_p']:.3f})"
            )
        verdict = "not as in" if moved != wanted else "as in" if all(apart) else "in the directions of"
        weak = [
            f"{kind} moves no further than with random neurons"
            for kind, far in zip(KINDS, apart, strict=True)
            if not far
        ]
        said = "; ".join([*parts, f"{verdict} {other}", *weak])
        out.append(f"With the common neurons of the other ({model}): {said}.")
    return out


def seed_findings(run: Any) -> list[str]:
    frame, refused = seeds(run), seed_refusals(run)
    overlap, permuted = frame.overlap, frame["overlap, permuted in layers"]
    rates = {side: refused[side].sum() / refused.of.sum() for side in ("harmful", "harmless")}
    out = [
        f"Seeds: any two of {run.size.seeds} share {overlap.mean():.1%} of their top 5 % on average "
        f"({overlap.min():.1%} to {overlap.max():.1%}; permuted within layers {permuted.mean():.1%}; largest p "
        f"{frame['overlap, p'].max():.3f}). In the paper different training runs give largely the same neurons. "
        f"The seeds refuse {rates['harmful']:.0%} of harmful prompts and {rates['harmless']:.0%} of their twins."
    ]
    weak = refused[refused.harmful < 0.1 * refused.of].seed.tolist()
    if weak:
        out.append(
            f"**Seeds {weak} refuse less than a tenth of harmful prompts**: what they agree on is not what makes a "
            "model refuse."
        )
    if rates["harmless"] > 0.5 * rates["harmful"]:
        out.append(
            "**The seeds refuse many of the harmless twins too**, so their agreement says little about what tells "
            "harmful from harmless."
        )
    return out


# --- sections ------------------------------------------------------------------------------------------------------


def cards(run: Any) -> pd.DataFrame:
    found = run.cards()
    frame = found.to_dataframe()
    for column in ("promoted", "suppressed"):
        frame[column] = [", ".join(map(code, row)) for row in frame[column]]
    frame["active"] = [
        ", ".join(f"{code(one.context[-14:] + one.token)} {one.activation:.1f}" for one in row[:3])
        for row in found.active
    ]
    return frame


def checks(run: Any) -> list[str]:
    """What must hold on this pair whatever the paper says."""
    planted, ends = run.planted(), run.ends()
    done = f"{planted['prompts']} prompts x {planted['tokens']} tokens"
    lines = [
        f"Planted: of {planted['neurons']} neurons scaled by {planted['factor']:g} in a copy of the base, "
        f"{planted['ratio']:.1%} are among as many of the highest ratio scores and {planted['rms']:.1%} of the highest "
        f"rms scores ({done}; asked for: at least 95 % by the ratio). A raw difference is as large as the neuron's own "
        "scale."
    ]
    for name, whose in (("0 %", "base"), ("100 %", "aligned")):
        found = ends[name]
        off = found["largest_logit_difference"]
        lines.append(
            f"Dynamic patching with {name} of the neurons is the {whose} model: {found['same_replies']} of "
            f"{found['prompts']} replies are the same, logits differ by at most {off:.0e}."
        )
    return [lines[0], "", " ".join(lines[1:])]


def contrast(run: Any) -> pd.DataFrame:
    """The strongest neurons of each span on train pairs, and how strong they are on the others."""
    keys = ["span", "node"]
    chosen = run.contrast("train").to_dataframe().groupby("span", sort=False).head(5)[[*keys, "effect"]]
    found = chosen.merge(run.contrast("test").to_dataframe(), on=keys, suffixes=(", train", ", test"))
    return found.sort_values("span", kind="stable")


def effect(run: Any) -> list[str]:
    curve, judged, ratio = run.curve("rms"), run.judged_curve(), run.curve("ratio")
    shown = [*CURVE, "random_overlap"]
    names = [f"{share:.1%}" for share in curve.shares] + ["aligned model", "base model"]
    ability = curve.harmless.to_dataframe()
    ability.insert(0, "top share", names)
    sets = curve.random.shape[1]
    lines = ["", "![C against the share of neurons](safety-neurons/causal-effect.svg)", ""]
    lines += [
        f"C = (F(patched) - F(base)) / (F(aligned) - F(base)). {ends_of(curve)}; {ends_of(judged)}. The random columns "
        f"are the mean and the 2.5 and 97.5 percentiles of {sets} sets with as many neurons in each layer; p = (1 + "
        f"sets with C at least the top's) / (1 + sets), so at least {1 / (1 + sets):.3f}, not corrected over shares. "
        "*random_overlap*: where more than half of a layer is in the top, a set holds all of the layer's others and "
        "shares the rest with the top; such sets are hardly random, and their p says little.",
        "",
        f"{curve.score}, {len(curve.base_scores)} harmful prompts of held-out topics; ranked by change (rms):",
        "",
    ]
    lines += [
        table(curve.to_dataframe()[shown]),
        "",
        "Ranked by the ratio score:",
        "",
        table(ratio.to_dataframe()[shown]),
    ]
    lines += ["", f"Phrase judge, {len(judged.base_scores)} prompts, greedy replies:", ""]
    lines += [table(judged.to_dataframe()[shown]), ""]
    lines += [
        f"General ability on {curve.harmless.kl.shape[1]} ordinary questions of the test split (their subjects may "
        "recur in what the adapters learned from). All of it is of the base model's own greedy replies, 16 tokens: KL "
        "from the base in nats a token, perplexity, and the share of the reply that the patched model repeats before "
        "it first departs; so the base itself is the best there is, whatever the quality of replies. No random sets "
        "here.",
        "",
    ]
    return [*lines, table(ability)]


def ends_of(one: Any) -> str:
    """F of base and aligned model."""
    found = [
        interval(float(values.mean()), *mean_interval(values.double().numpy()))
        for values in (one.base_scores, one.aligned_scores)
    ]
    return f"{one.score}: F(base) {found[0]}, F(aligned) {found[1]}"


def tax_section(run: Any) -> list[str]:
    if not run.has_helpful():
        return ["Not run: there is no shipped helpful adapter."]
    tax = run.tax()
    overlap = f"; random sets share {tax.random_overlap:.0%} of their neurons with them" if tax.random_overlap else ""
    names = f"Safety: {tax.scores[0]}, {tax.safety.shape[1]} harmful prompts. Helpfulness: {tax.scores[1]}, "
    names += (
        f"{tax.helpfulness.shape[1]} ordinary questions: log-likelihood a token of the project's own short, formatted "
        "answers. Their form is what `demo-helpful` learned, so this helpfulness is in part a matter of form. Random "
        "columns are the lowest and highest of the sets. Nulls of the agreement: permutations over all neurons "
        "(*free*) and within layers (*layered*)."
    )
    return [f"{tax!r}{overlap}. {names}", "", table(tax.to_dataframe()), "", table(tax.agreement.to_dataframe())]


def seeds(run: Any) -> pd.DataFrame:
    """Agreement of every two seeds."""
    rows = []
    for (a, b), found in run.seed_pairs().items():
        frame = found.to_dataframe().set_index("measure")
        row: dict[str, Any] = {"seeds": f"{a}, {b}"}
        for name in frame.index:
            row |= {name: frame.observed[name], f"{name}, permuted in layers": frame.layered_mean[name]}
            row |= {f"{name}, p": frame.layered_p[name]}
        rows.append(row)
    return pd.DataFrame(rows)


def seed_refusals(run: Any) -> pd.DataFrame:
    """How many harmful prompts and harmless twins every seed refuses."""
    rows = []
    for seed in range(1, run.size.seeds + 1):
        found = run.seed_refusals(seed)
        row = {"seed": seed, "of": found["n"]}
        for side in ("harmful", "harmless"):
            low, high = wilson_interval(found[side], found["n"])
            row |= {side: found[side], f"{side} rate": interval(found[side] / found["n"], low, high)}
        rows.append(row)
    return pd.DataFrame(rows)


def seeds_section(run: Any) -> list[str]:
    frame = seeds(run)
    means = []
    for name in ("overlap", "spearman_top", "spearman_all"):
        means.append(
            {
                "measure": name,
                "mean": frame[name].mean(),
                "lowest": frame[name].min(),
                "highest": frame[name].max(),
                "permuted in layers": frame[f"{name}, permuted in layers"].mean(),
                "largest p": frame[f"{name}, p"].max(),
            }
        )
    size = run.size
    lines = [
        f"{size.seeds} adapters, each trained for one epoch, at twice the learning rate of the shipped one's first "
        f"stage, on {size.seed_examples} pairs and as many single prompts drawn by its seed; scored on the "
        f"same {size.seed_prompts} prompts. Over all pairs of seeds:"
    ]
    lines += ["", table(pd.DataFrame(means)), "", table(frame), "", "What each refuses, test topics:", ""]
    return [*lines, table(seed_refusals(run))]


def guard_section(run: Any) -> list[str]:
    made = run.guard_sets()
    counts = [
        {
            "set": one["name"],
            "harmful prompts": one["harmful"],
            "refused by the base": one["harmful"] - sum(one["unsafe"]),
        }
        | {"unsafe": sum(one["unsafe"]), "safe": len(one["unsafe"]) - sum(one["unsafe"])}
        for one in made["sets"]
    ]
    lines = [
        "The watched model is the **base**, which refuses little: a reply is *unsafe* if the prompt is harmful and the "
        "phrase judge finds no refusal, so that here unsafe nearly means that the prompt is harmful. Replies to "
        "harmless prompts count as safe without being generated. The first set is what guards learn from; the harmful "
        "prompts of the third are among those of the second. *null*: the interval of the neurons' margin in AUROC over "
        "that feature holds 0; *sets' AUROC*: lowest and highest of the random sets."
    ]
    if made["left_out"]:
        lines += ["", f"Left out, as their files were not there: {', '.join(made['left_out'])}."]
    lines += ["", table(pd.DataFrame(counts)), "", "![AUROC](safety-neurons/guard.svg)", ""]
    frame = guard_frame(run)
    shown = frame[["test", "feature"]].copy()
    for name, low, high in (
        ("auroc", "auroc_low", "auroc_high"),
        ("accuracy", "accuracy_low", "accuracy_high"),
        ("fpr_at_95_tpr", "fpr_low", "fpr_high"),
        ("neurons_margin", "margin_low", "margin_high"),
    ):
        shown[name] = [interval(*row) for row in frame[[name, low, high]].itertuples(index=False)]
    shown["null"] = ["" if value is None or value != value else str(bool(value)) for value in frame.margin_is_null]
    shown[["brier", "calibration_error"]] = frame[["brier", "calibration_error"]]
    shown["sets' AUROC"] = [
        f"{row.set_min:.2f} to {row.set_max:.2f}" if row.feature == "random" else "" for row in frame.itertuples()
    ]
    return [*lines, table(shown)]


def cost(run: Any) -> pd.DataFrame:
    """Measured against asked."""
    spent, plain_runs = run.clock(), run.cost()
    seconds = spent["seconds"]
    factor = plain_runs["patched"] / (plain_runs["base"] + plain_runs["aligned"])
    whole = sum(seconds.values()) / 60
    rows = [
        (f"scoring {run.size.ranked} prompts x {run.size.reply_tokens} new tokens, s", seconds["scores"], SCORING),
        ("dynamic patching / plain generation of both models", factor, PATCHING),
        ("whole script, min", whole, WHOLE),
    ]
    frame = pd.DataFrame(
        [(name, f"{value:.3g}", f"{limit:g}", "yes" if value <= limit else "**no**") for name, value, limit in rows],
        columns=["", "measured", "at most", "met"],
    )
    frame.loc[len(frame)] = [
        "peak memory of the largest process (a seed's training is one), MiB",
        spent["peak_mib"],
        "",
        "",
    ]
    return frame


def taken(run: Any) -> str:
    spent = run.clock()
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in spent["seconds"].items())
    return (
        f"Measured with {spent['threads']} torch threads, models loaded before. Attempts that were interrupted are "
        f"counted, those that were killed are not. Seconds: {seconds}."
    )


# --- figures and tables --------------------------------------------------------------------------------------------


def figures(run: Any, folder: Path) -> None:
    plt.rcParams["svg.hashsalt"] = "mechsafety"
    folder.mkdir(parents=True, exist_ok=True)

    def save(figure: Any, name: str) -> None:
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), sharey=True)
    for axis, (ranking, curve) in zip(axes, curves(run), strict=True):
        frame = curve.to_dataframe()
        known = frame[frame.random_mean.notna()]
        percent = frame.share * 100
        axis.fill_between(known.share * 100, known.random_low, known.random_high, color="0.8", label="random, 95 %")
        # a resample of exactly 1 may be a rounding error on the wrong side of the effect
        bars = np.clip([frame.effect - frame.ci_low, frame.ci_high - frame.effect], 0, None)
        axis.errorbar(percent, frame.effect, bars, fmt="o-")
        axis.axhline(1, color="0.5", lw=0.8)
        axis.axhline(0, color="0.5", lw=0.8)
        axis.set(xscale="log", xlabel="top share of neurons, %", title=f"{curve.score}, by {ranking}")
        axis.xaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel("causal effect C")
    axes[1].legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.9))
    save(figure, "causal-effect")

    figure, axis = plt.subplots(figsize=(6, 2.6))
    shares = run.scores().layer_shares(TOP).tolist()
    axis.bar(range(len(shares)), shares)
    axis.axhline(1 / len(shares), color="0.5", lw=0.8)
    axis.set(xlabel="layer", ylabel=f"share of the top {TOP:.0%}")
    save(figure, "layers")

    frame = guard_frame(run)
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


def interval(value: float, low: float, high: float) -> str:
    return "" if np.isnan(value) else f"{value:.2f} ({low:.2f} to {high:.2f})"


def plain(value: Any) -> Any:
    """JSON has no NaN and no numpy types."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and np.isnan(value) else value
