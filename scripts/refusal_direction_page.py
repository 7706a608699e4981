"""The page, figures and JSON that scripts/reproduce_refusal_direction.py writes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from mechsafety.directions import RefusalDirection, RefusalSubspace
from mechsafety.intervals import wilson_interval
from mechsafety.interventions import DoseResponse
from mechsafety.output import json_text

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def write(out: Path, found: RefusalDirection, parts: dict[str, Any], seconds: float | None) -> None:
    """Figures, JSON and page, into the folder ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    heatmaps(found, out / "refusal-direction-candidates.png")
    curves(parts["removed"], parts["added"], out / "refusal-direction-doses.png")
    record = {
        "provenance": found.provenance.to_json(),
        "metric": found.metric,
        "chosen": {"layer": found.layer, "column": found.column, "passes": found.passes},
        "cosmic": dict(zip(("layer", "column"), _place(found.choose("cosmic")), strict=True)),
        "seconds": seconds,
        "candidates": json.loads(found.to_dataframe().to_json(orient="records")),
        "controls": json.loads(found.controls.to_dataframe().to_json(orient="records")) if found.controls else [],
        "rates": {s: {c: [sum(hits), len(hits)] for c, hits in row.items()} for s, row in parts["rates"].items()},
        "doses": {w: json.loads(parts[w].to_dataframe().to_json(orient="records")) for w in ("removed", "added")},
        "subspace": json.loads(parts["subspace"].to_dataframe().to_json(orient="records")),
        **{name: parts[name] for name in ("equality", "writers", "heads", "probes")},
        "others": {
            name: {k: [sum(v), len(v)] if isinstance(v, list) else v for k, v in row.items()}
            if isinstance(row, dict)
            else row
            for name, row in parts["others"].items()
        },
    }
    (out / "refusal-direction.json").write_text(json_text(record) + "\n")
    (out / "refusal-direction.md").write_text(page(found, parts, seconds))
    print(f"wrote {out / 'refusal-direction.md'}")


def page(found: RefusalDirection, parts: dict[str, Any], took: float | None) -> str:
    frame = found.to_dataframe()
    chosen = frame[frame.chosen].iloc[0]
    passing = int(((frame.induce > 0) & ~(frame.kl > 0.1) & (frame.layer < int(0.8 * found.n_layers))).sum())
    verdict = (
        f"{passing} of {len(frame)} candidates meet the published conditions."
        if found.passes
        else f"**None of {len(frame)} candidates meets the published conditions**; shown is the lowest bypass score."
    )
    cosmic = found.choose("cosmic")
    lines = [
        "# The refusal direction of the demo model",
        "",
        "Written by `scripts/reproduce_refusal_direction.py`. Arditi et al. 2024; [what is computed](../methods.md).",
        f"Means over {found.n_train[0]} AdvBench and {found.n_train[1]} Alpaca prompts; chosen on {len(found.harmful)} "
        f"HarmBench (validation) and {len(found.harmless)} other Alpaca prompts, all treated as expected by the model.",
        f"Metric: log-odds that the reply begins with one of {found.metric['refusal_tokens']}. Intervals are 95 %.",
        *([f"Finding and judging all candidates took {took:.0f} s."] if took else []),
        "",
        "## The choice",
        "",
        f"Layer {found.layer}, column {found.column}. {verdict} COSMIC, which reads no output, takes layer "
        f"{cosmic.layer}, column {cosmic.column}.",
        "",
        "![All candidates](refusal-direction-candidates.png)",
        "",
        "| direction | bypass (harmful, removed) | induce (harmless, added) | KL (harmless, removed) |",
        "| --- | --- | --- | --- |",
        f"| none | {float(found.harmful.mean()):.2f} | {float(found.harmless.mean()):.2f} | 0 |",
        _score_row("**chosen**", chosen),
    ]
    if found.controls is not None:
        lines += [_score_row(row.control, row) for _, row in found.controls.to_dataframe().iterrows()]
    lines += [
        "",
        "## What it does to replies",
        "",
        *rate_table(parts["rates"]),
        "",
        *verdicts(parts["rates"], parts["added"]),
    ]
    gaps = parts["equality"]
    lines += [
        "",
        f"Hooks against orthogonalised weights: logits differ by at most {gaps['hooks against weights']:.1e} (hooks "
        f"against the unedited model: {gaps['hooks against the model']:.1f}; after both: {gaps['after']:.1e}).",
        "",
        "## Doses and side effects",
        "",
        "![Doses](refusal-direction-doses.png)",
        "",
        f"{parts['removed'].harmful.shape[1]} harmful prompts: the first of JailbreakBench in its own order, so that "
        "only its first categories are among them; as many of Alpaca.",
        "",
        *dose_table(parts["removed"], parts["added"]),
        "",
        "## More than one direction?",
        "",
        *subspace_table(parts["subspace"], parts["rates"]),
        "",
        "## Who writes it, who reads it",
        "",
        *writer_tables(parts["writers"]),
        "",
        "## Heads, scored six ways",
        "",
        *head_tables(parts["heads"]),
        "",
        "## Probes",
        "",
        *probe_table(parts["probes"]),
        "",
        "## Other directions",
        "",
        *other_table(parts["others"]),
        "",
    ]
    return "\n".join(lines)


def _score_row(name: str, row: Any) -> str:
    cells = [f"{row[k]:.2f} ({row[f'{k}_low']:.2f} to {row[f'{k}_high']:.2f})" for k in ("bypass", "induce", "kl")]
    return f"| {name} | " + " | ".join(cells) + " |"


def share(hits: Sequence[bool]) -> str:
    low, high = wilson_interval(sum(hits), len(hits))
    return f"{sum(hits) / len(hits):.0%} ({sum(hits)} of {len(hits)}; {low:.0%} to {high:.0%})"


def rate_table(found: dict[str, dict[str, list[bool]]]) -> list[str]:
    lines = ["| prompts | condition | refused |", "| --- | --- | --- |"]
    return lines + [f"| {name} | {c} | {share(hits)} |" for name, row in found.items() for c, hits in row.items()]


def verdicts(found: dict[str, dict[str, list[bool]]], added: DoseResponse) -> list[str]:
    """The three claims, with the figures that decide them, and the strength at which the second holds if it fails."""

    def rate(name: str, condition: str) -> float:
        return float(np.mean(found[name][condition]))

    jbb, alpaca = "JailbreakBench", "Alpaca (rest)"
    moved = [abs(rate(jbb, f"random {k} removed") - rate(jbb, "as it is")) for k in (1, 2)]
    moved += [abs(rate(alpaca, f"random {k} added") - rate(alpaca, "as it is")) for k in (1, 2)]
    claims = [
        ("removing it cuts refusals on JailbreakBench", rate(jbb, "direction removed") < rate(jbb, "as it is")),
        ("adding it makes at least 80 % of Alpaca prompts refused", rate(alpaca, "direction added") >= 0.8),
        (f"random directions change neither by more than 10 points (at most {max(moved):.0%})", max(moved) <= 0.1),
    ]
    lines = [f"- {claim}: {'yes' if held else '**no**'}" for claim, held in claims]
    if not claims[1][1]:
        frame = added.to_dataframe()
        doses = frame[frame.measure == "refusal rate, harmless"].set_index("strength")["value"]
        said = ", ".join(f"{value:.0%} at {strength:g}" for strength, value in doses.items())
        lines[1] += (
            f": {rate(alpaca, 'direction added'):.0%} at strength 1, the length of the mean difference. It is a"
            f" matter of strength: on the dose-response's prompts {said}, at the cost in KL and perplexity shown below"
        )
    return lines


def dose_table(*found: DoseResponse) -> list[str]:
    lines = ["| | strength | " + " | ".join(found[0].to_dataframe().measure.unique()) + " |"]
    lines.append("| --- | --- |" + " --- |" * 6)
    for response in found:
        for strength, rows in response.to_dataframe().groupby("strength", sort=False):
            cells = [f"{row.value:.3g} ({row.ci_low:.3g} to {row.ci_high:.3g})" for row in rows.itertuples()]
            lines.append(f"| {response.name} | {strength:g} | " + " | ".join(cells) + " |")
    return lines


def subspace_table(found: RefusalSubspace, rates: dict[str, dict[str, list[bool]]]) -> list[str]:
    left = f"{share(rates['JailbreakBench']['direction removed'])} of JailbreakBench is refused even then"
    lines = [
        "Directions found one after the other, each in what is left when those before are removed; chosen on half of "
        "the harmful validation prompts, judged on the others against random directions. " + searched(found, left),
        "",
        "| direction | layer, column | change of log-odds | beyond random | induce beyond random | causal |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in found.to_dataframe().itertuples():
        cells = [f"{row.change:.2f} ({row.change_low:.2f} to {row.change_high:.2f})"]
        cells.append(f"{row.beyond_random:.2f} ({row.beyond_random_low:.2f} to {row.beyond_random_high:.2f})")
        low, high = row.induce_beyond_random_low, row.induce_beyond_random_high
        cells.append(f"{row.induce_beyond_random:.2f} ({low:.2f} to {high:.2f})")
        name = f"{row.layer}, {row.column}"
        lines.append(f"| {row.direction} | {name} | " + " | ".join(cells) + f" | {'yes' if row.causal else 'no'} |")
    return lines


def searched(found: RefusalSubspace, left: str) -> str:
    """How far the search went, and what that means."""
    n, held = len(found.layers), found.dimension
    if found.provenance.options.get("stop_below", 0.0) is not None and all(found.causal):
        return (
            f"The search ended when the mean log-odds were below 0, although {left}: **no further direction was "
            "judged**, so that this is no evidence that there is only one."
        )
    return (
        f"The search goes on below mean log-odds of 0, as {left}, and ends at the first direction that does no more "
        f"than random ones. **{held} of {n} looked at are causal**; that is a matter of significance, and the column "
        "of changes says how much each does."
    )


def writer_tables(found: dict[str, Any]) -> list[str]:
    cosines, part = found["mean_abs_cosine"], found["written_by_circuit"]
    lines = [
        f"The found circuit ({found['circuit_nodes']} heads and MLPs) writes {part:.0%} of the pairs' gap along the "
        f"direction. Mean absolute cosine of a node's change with it: {cosines['circuit']:.3f} in the circuit, "
        f"{cosines['other nodes']:.3f} elsewhere.",
        "",
        "| node | writes (share of the gap along it) | cosine | in circuit, role |",
        "| --- | --- | --- | --- |",
    ]
    for row in found["top"]:
        inside = f"yes, {row['role']}" if row["in_circuit"] else "no"
        ends = f"{row['writes_low']:.3f} to {row['writes_high']:.3f}"
        lines.append(f"| {row['node']} | {row['writes']:.3f} ({ends}) | {row['cosine']:.3f} | {inside} |")
    lines += ["", "| reader | q | k | v | mlp |", "| --- | --- | --- | --- | --- |"]
    for row in found["readers"]:
        cells = [_reads(row, slot) for slot in ("q", "k", "v", "mlp")]
        lines.append(f"| {row['node']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Neurons that write most of it, and those that read most (writing is exact, reading an estimate):",
        "",
    ]
    lines += [
        "| neuron | writes (share of the gap along it) | reads (share of the metric's gap) |",
        "| --- | --- | --- |",
    ]
    return lines + [f"| {n['node']} | {n['writes']:.3f} | {n['reads_estimate']:.3f} |" for n in found["neurons"]]


def _reads(row: dict[str, Any], slot: str) -> str:
    value, low, high = (row[f"reads_{slot}{end}"] for end in ("", "_low", "_high"))
    return "" if value is None else f"{value:.3f} ({low:.3f} to {high:.3f})"


def head_tables(found: dict[str, Any]) -> list[str]:
    names = found["agreement"]["columns"]
    scores = [name for name in names if not name.startswith("attention_prefix")]
    lines = ["| head | " + " | ".join(scores) + " |", "| --- |" + " --- |" * len(scores)]
    lines += [f"| {row['node']} | " + " | ".join(f"{row[name]:.3f}" for name in scores) + " |" for row in found["top"]]
    lines += ["", "Spearman's rank correlation of absolute scores over all heads:", ""]
    lines += ["| | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for name, row in zip(names, found["agreement"]["data"], strict=True):
        lines.append(f"| {name} | " + " | ".join("" if v is None else f"{v:.2f}" for v in row) + " |")
    return lines


def probe_table(found: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Out-of-topic accuracy; the change of 16 harmful prompts' log-odds, of topics that no probe saw, when the "
        "probe's weights, or its pattern, are erased everywhere. For comparison the mean over eight random directions "
        "with its interval over prompts, and the one that changes most. *Shuffled* lies below one half because labels "
        "are swapped within pairs of nearly the same text: where a held-out topic has more swaps of one kind, the "
        "topics that are left to learn from have fewer, so that the probe leans the wrong way. It shows that no "
        "accuracy comes from the folds; it is no estimate of chance.",
        "",
        "| layer | span | accuracy | text alone | shuffled | hard negatives flagged (text alone) | weights erased "
        "| pattern erased | random erased (most) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(found, key=lambda row: (row["span"], row["layer"])):
        cells = [f"{row['accuracy']:.2f} ({row['accuracy_low']:.2f} to {row['accuracy_high']:.2f})"]
        cells += [f"{row['lexical']:.2f}", f"{row['shuffled']:.2f}"]
        cells += [f"{row['hard_flagged']:.2f} ({row['lexical_hard_flagged']:.2f})"]
        for name in ("erased", "pattern_erased"):
            value = row[name]
            ends = "" if value is None else f" ({row[f'{name}_low']:.2f} to {row[f'{name}_high']:.2f})"
            cells.append("" if value is None else f"{value:.2f}{ends}")
        low, high = row["random_erased_low"], row["random_erased_high"]
        cells.append(f"{row['random_erased']:.2f} ({low:.2f} to {high:.2f}; {row['random_erased_most']:.2f})")
        lines.append(f"| {row['layer']} | {row['span']} | " + " | ".join(cells) + " |")
    return lines


def other_table(found: dict[str, Any]) -> list[str]:
    lines = [
        "| direction | JailbreakBench refused, removed | Alpaca refused, added (strength) |",
        "| --- | --- | --- |",
    ]
    for name, row in found.items():
        if isinstance(row, dict):
            lines.append(f"| {name} | {share(row['removed'])} | {share(row['added'])} ({row['strength']:g}) |")
    name = "cosine of representation reading with the direction"
    return [*lines, "", f"{name[0].upper()}{name[1:]}: {found[name]:.3f}."]


def heatmaps(found: RefusalDirection, path: Path) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(13, 6), sharey=True, layout="constrained")
    panels = [("bypass", found.bypass.mean(-1)), ("induce", found.induce.mean(-1)), ("KL", found.kl.mean(-1))]
    for axis, (name, values) in zip(axes, [*panels, ("COSMIC", found.cosmic)], strict=True):
        data = values.numpy()
        size = float(np.nanmax(np.abs(data))) or 1.0
        diverging = name in ("bypass", "induce")
        options = {"cmap": "RdBu_r", "vmin": -size, "vmax": size} if diverging else {"cmap": "viridis"}
        image = axis.imshow(data, origin="lower", aspect="auto", **options)
        column, row = found.columns.index(found.column), found.layers.index(found.layer)
        axis.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, lw=2, ec="black"))
        axis.set(title=name, xlabel="column", xticks=range(len(found.columns)))
        axis.set_xticklabels(found.columns)
        figure.colorbar(image, ax=axis, shrink=0.8)
    step = max(1, len(found.layers) // 10)
    axes[0].set(ylabel="layer", yticks=range(0, len(found.layers), step))
    axes[0].set_yticklabels(found.layers[::step])
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def curves(removed: DoseResponse, added: DoseResponse, path: Path) -> None:
    figure, axes = plt.subplots(2, 4, figsize=(13, 6), layout="constrained")
    for line, response in zip(axes, (removed, added), strict=True):
        frame = response.to_dataframe()
        for axis, panel in zip(line, ("refusal rate", "log-odds", "KL", "perplexity"), strict=True):
            for measure, rows in frame[frame.measure.str.startswith(panel)].groupby("measure", sort=False):
                side = measure.split(", ")[1]
                colour = {"harmful": "#9C2F6B", "harmless": "#00588C"}[side]
                errors = np.clip([rows.value - rows.ci_low, rows.ci_high - rows.value], 0, None)
                axis.errorbar(rows.strength, rows.value, errors, color=colour, label=side, marker="o", capsize=2)
            axis.set(title=panel, xlabel=f"strength ({response.name})")
            if panel == "perplexity":
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_formatter("{x:g}")
        line[0].legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _place(found: RefusalDirection) -> tuple[int, int]:
    return found.layer, found.column
