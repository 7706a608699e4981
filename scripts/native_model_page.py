"""The page of the native model beside the demo model, drawn from docs/results/native-model.json and the circuits.

python scripts/native_model_page.py             # draw page and figures again
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import numpy as np
from statements import Interval, Rate, Sentence, look_up, say, table

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.output import json_text
from mechsafety.results import parting, reads_where
from mechsafety.viz import Style, layout_circuit, layout_png

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OUT = Path(__file__).resolve().parents[1] / "docs" / "results"
NAME = "native-model"
CIRCUITS = NAME + "/{}-{}.json"
SIDES, LEVELS = ("native", "demo"), ("node", "neuron")
TITLES = {"native": "native model", "demo": "demo model"}
ROLES = ("detection", "evaluation", "decision", "production")
KINDS = ("refuses", "answers", "degenerate", "neither")
Record = Mapping[str, Any]


def write(out: Path, record: Mapping[str, Any]) -> None:
    """JSON, page and figures, into the folder ``out``, which holds the circuits."""
    (out / f"{NAME}.json").write_text(json_text(record) + "\n")
    full = with_circuits(out, record)
    for side in SIDES:
        picture(full["circuits"][side]["node"], out / NAME / f"{side}-roles.png")
    depths(full, out / NAME / "depths.png")
    kinds_figure(full, out / NAME / "replies.png")
    (out / f"{NAME}.md").write_text(page(full))
    print(f"wrote {out / NAME}.md")


def with_circuits(out: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the circuits, which are files of their own, and what the sentences say of them."""
    circuits = {
        side: {level: RefusalCircuit.load(out / CIRCUITS.format(side, level)) for level in LEVELS} for side in SIDES
    }
    told = {side: {level: told_of(circuits[side][level]) for level in LEVELS} for side in SIDES}
    return {**record, "circuits": circuits, "map": told}


def told_of(circuit: RefusalCircuit) -> dict[str, Any]:
    """Numbers of a circuit."""
    check, n_layers = circuit.verification, depth(circuit)
    options = circuit.provenance.options
    roles = {}
    for role in ROLES:
        layers = [member.node.layer for member in circuit.by_role(role) if member.node.layer is not None]
        roles[role] = {
            "n": len(layers),
            "layers": [min(layers), max(layers)] if layers else None,
            "median_depth": median(layers) / n_layers if layers else None,
        }
    fresh = check.fresh
    return {
        "nodes": len(circuit),
        "candidates": circuit.n_candidates,
        "share": len(circuit) / circuit.n_candidates,
        "kinds": dict(Counter(member.node.kind for member in circuit)),
        "pairs": [options[name] for name in ("found_on", "held_out", "fresh")],
        "speaks_for": list(circuit.speaks_for or ()),
        "faithfulness": check.faithfulness,
        "held_out": [check.held_out_faithfulness, *check.held_out_ci],
        "fresh": None if fresh is None else [fresh.faithfulness, *fresh.ci],
        "random": [check.random_controls.mean, check.random_p],
        "necessity": check.necessity,
        "roles": roles,
        "highest": max(point.held_out for point in check.curve),
        "verdicts": {claim.name: claim.verdict for claim in check.claims},
        "holds": sum(claim.passed is True for claim in check.tested),
        "decided": sum(claim.passed is not None for claim in check.tested),
        "tested": len(check.tested),
    }


def depth(circuit: RefusalCircuit) -> int:
    """Layers of the model."""
    assert circuit.shape is not None
    return circuit.shape.n_layers


# --- what the page says, and the numbers that carry it ----------------------------------------------------------------


def both(path: str, get: Callable[[Any], Any] = lambda value: value) -> dict[str, Callable[[Record], Any]]:
    """The same number of both models, by the names ``native`` and ``demo``."""
    return {side: lambda record, s=side: get(look_up(record[s], path)) for side in SIDES}


def mapped(level: str, name: str) -> dict[str, Callable[[Record], Any]]:
    """A number of both models' circuits at a level."""
    return {side: lambda record, s=side: look_up(record["map"][s][level], name) for side in SIDES}


def refused(row: Mapping[str, Any]) -> Rate:
    """Refusals among the replies."""
    return Rate(row["kinds"]["refuses"], sum(row["kinds"].values()))


def of_kind(kind: str) -> Callable[[Mapping[str, Any]], Rate]:
    return lambda row: Rate(row["kinds"][kind], sum(row["kinds"].values()))


def set_of(name: str) -> dict[str, Callable[[Record], Any]]:
    """Refusals of a set of prompts, of both models."""
    return {side: lambda record, s=side: refused(record[s]["replies"]["sets"][name]) for side in SIDES}


def same_verdicts(record: Record) -> list[str]:
    """Claims that come out alike for both models."""
    verdicts = [record["map"][side]["node"]["verdicts"] for side in SIDES]
    return [name for name, verdict in verdicts[0].items() if verdicts[1].get(name) == verdict]


def other_verdicts(record: Record) -> list[str]:
    verdicts = [record["map"][side]["node"]["verdicts"] for side in SIDES]
    return [
        f"{name} ({verdict}; demo: {verdicts[1].get(name)})"
        for name, verdict in verdicts[0].items()
        if verdicts[1].get(name) != verdict
    ]


def ablated(side: str, name: str) -> Callable[[Record], Rate]:
    return lambda record: refused(look_up(record[side], "ablations/rows")[name]["after"])


def ablated_before(side: str) -> Callable[[Record], Rate]:
    return lambda record: refused(next(iter(record[side]["ablations"]["rows"].values()))["before"])


def best_probe(record: Record, side: str) -> Mapping[str, Any]:
    return max(record[side]["probes"]["rows"], key=lambda row: row["accuracy"])


def probe(name: str) -> dict[str, Callable[[Record], Any]]:
    return {f"{side}_{name}": lambda record, s=side: best_probe(record, s)[name] for side in SIDES}


SENTENCES: dict[str, Sentence] = {
    "advbench": Sentence(
        "The native model refuses {native} of AdvBench, the demo model {demo}: the demo model was trained to refuse, "
        "and does so more often.",
        set_of("AdvBench"),
        lambda native, demo: demo.low > native.high,
        "The native model refuses {native} of AdvBench, the demo model {demo}; their intervals overlap, or the native "
        "model refuses more.",
    ),
    "twins": Sentence(
        "Of the built-in twins it refuses {bad} of the harmful side and {good} of the harmless side. It goes by words "
        "that both twins share more than by what is asked.",
        {
            "bad": lambda r: refused(r["native"]["replies"]["sets"]["twins, harmful"]),
            "good": lambda r: refused(r["native"]["replies"]["sets"]["twins, harmless"]),
        },
        lambda bad, good: bad.low > good.high and bad.value < 2 / 3,
        "Of the built-in twins it refuses {bad} of the harmful side and {good} of the harmless side.",
    ),
    "speaks": Sentence(
        "A pair can be mapped where the harmful twin is refused, the harmless one answered, and the metric agrees. "
        "That is so for {native_used} of {native_tried} pairs of the native model ({native_share:.0%}), and for "
        "{demo_used} "
        "of {demo_tried} of the demo model ({demo_share:.0%}). The native model's map speaks for that share alone.",
        {
            **{f"{s}_used": lambda r, s=s: r[s]["pairs-tried"]["here"] + r[s]["pairs-tried"]["there"] for s in SIDES},
            **{f"{s}_tried": lambda r, s=s: r[s]["pairs-tried"]["tried"] for s in SIDES},
            **{
                f"{s}_share": lambda r, s=s: (
                    (r[s]["pairs-tried"]["here"] + r[s]["pairs-tried"]["there"]) / r[s]["pairs-tried"]["tried"]
                )
                for s in SIDES
            },
        },
        lambda native_share, demo_share: native_share < demo_share,
        "A pair can be mapped where the harmful twin is refused, the harmless one answered, and the metric agrees. "
        "That is so for {native_used} of {native_tried} pairs of the native model ({native_share:.0%}), and for "
        "{demo_used} of {demo_tried} of the demo model ({demo_share:.0%}).",
    ),
    "size": Sentence(
        "For 80 % of the gap on held-out pairs it takes {native:.0%} of the native model's heads and MLPs, and "
        "{demo:.0%} "
        "of the demo model's.",
        mapped("node", "share"),
        lambda native, demo: native > 0 and demo > 0,
    ),
    "overshoot": Sentence(
        "Part of the native model works against refusal. The ranking puts these parts last, and without them the best "
        "of the others give up to {native:.1f} times the gap on held-out pairs; the demo model's give up to {demo:.1f} "
        "times. A faithfulness above 1 means that, and not that a circuit is better than its model.",
        mapped("node", "highest"),
        lambda native, demo: native > 1.2 and native > demo,
        "The best parts of the ranking give up to {native:.1f} times the gap of the native model on held-out "
        "pairs, and "
        "up to {demo:.1f} times that of the demo model.",
    ),
    "verdicts": Sentence(
        "{n} of {of} verdicts are the same for both models: {same}. These say more of the method, or of refusal in "
        "models of this size, than of how the demo model was made. Different: {other}.",
        {
            "n": lambda r: len(same_verdicts(r)),
            "of": lambda r: len(r["map"]["native"]["node"]["verdicts"]),
            "same": lambda r: ", ".join(same_verdicts(r)),
            "other": lambda r: "; ".join(other_verdicts(r)) or "none",
        },
        lambda n, of: 2 * n >= of,
        "Only {n} of {of} verdicts are the same for both models: {same}. Different: {other}.",
    ),
    "passes": Sentence(
        "The published rule finds a direction in the native model: {both} of {candidates} candidates pass.",
        {
            "both": "native/direction-found/conditions/both",
            "candidates": "native/direction-found/conditions/candidates",
        },
        lambda both: both > 0,
        "**No candidate of the native model passes the published conditions** ({both} of {candidates}). What is "
        "shown is "
        "the lowest bypass score below the depth limit. Nothing found under the rule's name is claimed of it.",
    ),
    "removal": Sentence(
        "Removing it takes the native model's refusals of JailbreakBench from {before} to {after}; removing a random "
        "direction leaves {random}.",
        {
            name: lambda r, c=condition: refused(r["native"]["direction-found"]["replies"]["JailbreakBench"][c])
            for name, condition in (("before", "as it is"), ("after", "removed"), ("random", "random removed"))
        },
        lambda before, after, random: after.high < min(before.low, random.low),
        "Removing it does **not** take the native model's refusals of JailbreakBench below both intervals: {before} as "
        "it is, {after} with it removed, {random} with a random direction removed.",
    ),
    "ablation": Sentence(
        "Ablating the whole circuit leaves {after} of {n} harmful prompts refused by the native model, ablating as "
        "many "
        "nodes at random {random}. **Of the random nodes' replies {babble} are degenerate.**",
        {
            "n": lambda r: r["native"]["ablations"]["pairs"],
            "after": ablated("native", "the circuit"),
            "random": ablated("native", "as many nodes at random"),
            "babble": lambda r: of_kind("degenerate")(
                r["native"]["ablations"]["rows"]["as many nodes at random"]["after"]
            ),
        },
        lambda after, random: after.high < random.low,
        "Ablating the whole circuit leaves {after} of {n} harmful prompts refused by the native model, ablating as "
        "many "
        "nodes at random {random}: replies alone do not tell the circuit from random nodes. Of the random nodes' "
        "replies "
        "{babble} are degenerate.",
    ),
    "probes": Sentence(
        "The best probe is right in {native_accuracy:.0%} of the native model's prompts and in {demo_accuracy:.0%} "
        "of the "
        "demo model's; the text alone gives {native_lexical:.0%}.",
        probe("accuracy") | {"native_lexical": lambda r: best_probe(r, "native")["lexical"]},
        lambda native_accuracy, demo_accuracy, native_lexical: min(native_accuracy, demo_accuracy) > native_lexical,
        "The best probe is right in {native_accuracy:.0%} of the native model's prompts and in {demo_accuracy:.0%} "
        "of the "
        "demo model's; the text alone gives {native_lexical:.0%}, so that not both beat it.",
    ),
    "neurons": Sentence(
        "Of the {n} neurons that differ most at the suffix, {within} lie in layers that the native model's map takes "
        "apart, and {shared} of these are in the circuit; at random {expected:.1%} of them would be.",
        {
            "n": "native/neurons-found/n",
            "within": "native/neurons-found/within",
            "shared": "native/neurons-found/shared",
            "expected": lambda r: r["native"]["neurons-found"]["expected_share"] or 0.0,
        },
        lambda within, shared, expected: within > 0 and shared / within > expected,
        "Of the {n} neurons that differ most at the suffix, {within} lie in layers that the native model's map takes "
        "apart, and {shared} of these are in the circuit; at random {expected:.1%} of them would be. Differing "
        "most and "
        "carrying the refusal are not the same.",
    ),
}


# --- the page ---------------------------------------------------------------------------------------------------------


def page(record: Record) -> str:
    """The page's text."""
    said = {name: say(record, sentence) for name, sentence in SENTENCES.items()}
    facts = record["native"]["facts"]
    lines = [
        "# A model that nobody here trained",
        "",
        "The demo model refuses because this project trained it to. Here the same steps are run on Qwen2.5-Coder-0.5B-"
        "Instruct (Apache-2.0), in the official Q4_K_M file, whose refusals are its makers'. This page shows both side "
        "by side: what is the same may be the method's doing, what differs is the model's.",
        "",
        f"Measured by `scripts/study_native_model.py`, drawn from [{NAME}.json]({NAME}.json) and the circuits in "
        f"[{NAME}/]({NAME}/) by `scripts/native_model_page.py`. The file's SHA-256 is `{facts['sha256']}`. "
        "[What is computed](../methods.md). Intervals are 95 %.",
        "",
        *facts_table(record),
        "",
        "## What is refused",
        "",
        f"Greedy replies of at most {record['native']['replies']['tokens']} tokens, each of one of "
        "[four kinds](../methods.md); *perplexity* is the model's own, on its own replies.",
        "",
        f"![Kinds of reply]({NAME}/replies.png)",
        "",
        *reply_table(record),
        "",
        f"- {said['advbench']}",
        f"- {said['twins']}",
        "",
        "## Where refusal is read, and of which pairs the map is",
        "",
        *(f"- {TITLES[side]}: {read_line(record[side]['pairs-tried']['metric'])}" for side in SIDES),
        "",
        said["speaks"],
        "",
        "## The map",
        "",
        f"{said['size']} {said['overshoot']}",
        "",
        *map_table(record),
        "",
        *(line for side in SIDES for line in (f"![The {TITLES[side]}'s circuit]({NAME}/{side}-roles.png)", "")),
        "### Claims",
        "",
        *claims_table(record),
        "",
        "Neurons are looked for in the circuit of nodes, so that the stability of its search stands there alone.",
        "",
        said["verdicts"],
        "",
        "### Roles",
        "",
        "Number of nodes, their layers, and the median depth (layer over number of layers).",
        "",
        f"![Depth of each role]({NAME}/depths.png)",
        "",
        *role_table(record),
        "",
        "## Refusal direction",
        "",
        *direction_section(record),
        "",
        f"- {said['passes']}",
        f"- {said['removal']}",
        "",
        "## Heads",
        "",
        *head_section(record),
        "",
        "## Contrast neurons",
        "",
        said["neurons"],
        "",
        *neuron_table(record),
        "",
        "## What ablating the found parts does to replies",
        "",
        *ablation_section(record),
        "",
        f"- {said['ablation']}",
        "",
        "## Probes",
        "",
        said["probes"],
        "",
        *probe_table(record),
        "",
    ]
    return "\n".join(lines)


def read_line(metric: Mapping[str, Any]) -> str:
    tried = "; ".join(f"{where} {value}" for where, value in parting(metric))
    return f"{reads_where(metric)}. AUROC: {tried}."


def facts_table(record: Record) -> list[str]:
    names = {
        "name": "loaded as",
        "parameters": "parameters",
        "n_layers": "layers",
        "n_heads": "heads per layer",
        "n_kv_heads": "key/value heads per layer",
        "d_model": "width",
        "d_mlp": "neurons per MLP",
        "d_vocab": "vocabulary",
    }
    shown = {
        side: {
            name: f"{value / 1e6:,.0f} M" if name == "parameters" else f"{value}" if name == "name" else f"{value:,}"
            for name in names
            for value in [record[side]["facts"][name]]
        }
        for side in SIDES
    }
    rows = [[text, *(shown[side][name] for side in SIDES)] for name, text in names.items()]
    return table(["", *TITLES.values()], rows)


def reply_table(record: Record) -> list[str]:
    rows = []
    for side in SIDES:
        for name, row in record[side]["replies"]["sets"].items():
            rows.append([TITLES[side], name, *reply_cells(row)])
    return table(["model", "prompts", *KINDS, "perplexity"], rows)


def reply_cells(row: Mapping[str, Any]) -> list[str]:
    perplexity = row["perplexity"]
    return [*(f"{of_kind(kind)(row)}" for kind in KINDS), "" if perplexity is None else f"{perplexity:.3g}"]


def map_table(record: Record) -> list[str]:
    def three(values: Any) -> str:
        return (
            "not measured" if values is None else shown(dict(zip(("v", "v_low", "v_high"), values, strict=True)), "v")
        )

    columns = [(side, level) for side in SIDES for level in LEVELS]
    rows: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "pairs: searched on, held out, fresh": lambda m: ", ".join(map(str, m["pairs"])),
        "parts in the circuit": lambda m: f"{m['nodes']} of {m['candidates']:,} ({m['share']:.1%})",
        "heads, MLPs, neurons": lambda m: ", ".join(str(m["kinds"].get(k, 0)) for k in ("head", "mlp", "neuron")),
        "faithfulness on the search's pairs": lambda m: f"{m['faithfulness']:.2f}",
        "on held-out pairs": lambda m: three(m["held_out"]),
        "on fresh pairs": lambda m: three(m["fresh"]),
        "random circuits of its size: mean, p": lambda m: f"{m['random'][0]:.2f}, {m['random'][1]:.3g}",
        "share of the gap lost without it": lambda m: f"{m['necessity']:.0%}",
        "claims that hold, of those decided": lambda m: f"{m['holds']} of {m['decided']}",
    }
    cells = [[text, *(show(record["map"][side][level]) for side, level in columns)] for text, show in rows.items()]
    seconds = [record[side]["maps"][level][1] for side, level in columns]
    cells.append(["seconds", *("" if took is None else f"{took:,.0f}" for took in seconds)])
    return table(["", *(f"{TITLES[side]}, by {level}s" for side, level in columns)], cells)


def claims_table(record: Record) -> list[str]:
    rows = []
    for name in record["map"]["native"]["node"]["verdicts"]:
        row = [name]
        for side in SIDES:
            for level in LEVELS:
                found = [c for c in record["circuits"][side][level].verification.claims if c.name == name]
                row.append(claim_cell(found[0]) if found else "")
        rows.append(row)
    return table(["claim", *(f"{TITLES[side]}, by {level}s" for side in SIDES for level in LEVELS)], rows)


def claim_cell(claim: Any) -> str:
    value = "" if claim.value is None else f" {claim.value:.2g}"
    if claim.interval is not None and all(map(math.isfinite, claim.interval)):
        value += f" ({claim.interval[0]:.2g} to {claim.interval[1]:.2g})"
    return f"{claim.verdict}{value}" + ("" if claim.p_value is None else f", p = {claim.p_value:.2g}")


def role_table(record: Record) -> list[str]:
    rows = []
    for role in ROLES:
        row = [role]
        for side in SIDES:
            found = record["map"][side]["node"]["roles"][role]
            low, high = found["layers"] or (None, None)
            row.append(
                f"{found['n']}: layers {low} to {high}, median {found['median_depth']:.2f}" if found["n"] else "none"
            )
        rows.append(row)
    return table(["role", *TITLES.values()], rows)


def direction_section(record: Record) -> list[str]:
    rows = []
    for side in SIDES:
        found = record[side]["direction-found"]
        limits = found["conditions"]
        best = next(row for row in found["candidates"] if row["chosen"])
        rows.append(
            [
                TITLES[side],
                f"{limits['shallow']} of {limits['candidates']}",
                str(limits["induce"]),
                str(limits["kl"]),
                str(limits["both"]),
                f"layer {found['chosen']['layer']}, column {found['chosen']['column']}",
                f"{found['unedited']['bypass']:.2f} to {shown(best, 'bypass')}",
                f"{found['unedited']['induce']:.2f} to {shown(best, 'induce')}",
                f"{shown(best, 'kl')}",
            ]
        )
    columns = ["model", "below the depth limit", "induce > 0", "KL at most 0.1", "both", "shown", "bypass"]
    lines = table([*columns, "induce", "KL"], rows)
    lines += [
        "",
        "*Bypass*: mean log-odds of refusal on harmful prompts, unedited and with the direction removed. *Induce*: the "
        "same on harmless prompts, with it added. Without the condition on the KL, as one published run drops it, the "
        "rule takes "
        + "; ".join(
            f"layer {found['layer']}, column {found['column']} of the {TITLES[side]}"
            for side in SIDES
            for found in [record[side]["direction-found"]["without_kl"]]
        )
        + ".",
        "",
    ]
    cells = [
        [TITLES[side], name, condition, *reply_cells(row)]
        for side in SIDES
        for name, conditions in record[side]["direction-found"]["replies"].items()
        for condition, row in conditions.items()
    ]
    return lines + table(["model", "prompts", "direction", *KINDS, "perplexity"], cells)


def head_section(record: Record) -> list[str]:
    lines = []
    for side in SIDES:
        found = record[side]["heads-found"]
        scores = [name for name in found["top"][0] if name in ("direct", "total", "path", "ships", "sahara")]
        rows = [
            [row["node"], *(f"{row[name]:.3f}" for name in scores), row["role"] or "not in it"] for row in found["top"]
        ]
        lines += [f"The {TITLES[side]}, on {found['pairs']} held-out pairs:", ""]
        lines += [*table(["head", *scores, "role in the map"], rows), ""]
    return lines[:-1]


def neuron_table(record: Record) -> list[str]:
    rows = []
    for side in SIDES:
        found = record[side]["neurons-found"]
        top = ", ".join(f"{row['node']} ({row['effect']:+.1f})" for row in found["top"][:5])
        most = sorted(found["layers"], key=lambda pair: -pair[1])[:3]
        rows.append(
            [
                TITLES[side],
                str(found["pairs"]),
                top,
                ", ".join(f"{layer} ({count})" for layer, count in most),
                f"{sum(found['large']):,}",
                f"{found['circuit']:,}",
                f"{found['shared']} of {found['within']}",
            ]
        )
    columns = ["model", "pairs", "strongest (Cohen's d)", "layers with most of the top", "with an absolute d of 0.8"]
    return table([*columns, "neurons in the circuit", "top neurons of its layers that are in it"], rows)


def ablation_section(record: Record) -> list[str]:
    rows = []
    for side in SIDES:
        found = record[side]["ablations"]["rows"]
        first = next(iter(found.values()))
        rows.append([TITLES[side], "nothing", "", f"{first['score'][0]:.2f}", *reply_cells(first["before"])])
        for name, row in found.items():
            parts = ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in row["nodes"].items())
            rows.append([TITLES[side], name, parts, f"{row['score'][1]:.2f}", *reply_cells(row["after"])])
    pairs = record["native"]["ablations"]["pairs"]
    return [
        f"Each part is set to its mean over the harmless prompts of {pairs} held-out pairs, at every token; "
        f"replies are to "
        "the harmful prompts. *Log-odds*: the mean metric.",
        "",
        *table(["model", "ablated", "parts", "log-odds", *KINDS, "perplexity"], rows),
    ]


def probe_table(record: Record) -> list[str]:
    rows = []
    for side in SIDES:
        for row in sorted(record[side]["probes"]["rows"], key=lambda row: -row["accuracy"])[:5]:
            cells = [TITLES[side], str(row["layer"]), row["span"], f"{shown(row, 'accuracy')}"]
            cells += [f"{row['lexical']:.2f}", f"{shown(row, 'shuffled')}", f"{row['hard_flagged']:.2f}"]
            cells += [f"{shown(row, 'erased')}", f"{shown(row, 'erased_kl')}"]
            rows.append([*cells, f"{shown(row, 'random_erased')}"])
    columns = ["model", "layer", "span", "accuracy", "text alone", "shuffled labels", "hard negatives flagged"]
    return table([*columns, "log-odds: weights erased", "KL", "random erased"], rows)


def shown(row: Mapping[str, Any], name: str) -> str:
    """A value with its interval, where there is one: of few prompts it may have no end, or not be there."""
    found = Interval.of(row, name)
    if found.value is None:
        return "not measured"
    known = [end for end in (found.low, found.high) if end is not None and math.isfinite(end)]
    return f"{found}" if len(known) == 2 else f"{found.value:.2f} (no interval)"


# --- figures ----------------------------------------------------------------------------------------------------------


def picture(circuit: RefusalCircuit, path: Path) -> None:
    layout = layout_circuit(circuit, Style(caption=False))
    layout_png(layout, path, dpi=96 * 1200 / layout.width)


def depths(record: Record, path: Path) -> None:
    """Where in its model each node of a role lies, effect as size."""
    colours = {"native": "#9C2F6B", "demo": "#00588C"}
    figure, axis = plt.subplots(figsize=(8, 3.4), layout="constrained")
    for k, side in enumerate(SIDES):
        circuit = record["circuits"][side]["node"]
        for row, role in enumerate(ROLES):
            members = circuit.by_role(role)
            x = [member.node.layer / depth(circuit) for member in members]
            size = [12 + 250 * min(1.0, abs(member.effect)) for member in members]
            y = np.full(len(x), row + (0.18 if k == 0 else -0.18))
            label = TITLES[side] if row == 0 else None
            axis.scatter(x, y, size, colours[side], alpha=0.6, label=label, linewidths=0)
    axis.set(xlim=(-0.02, 1.02), ylim=(-0.6, len(ROLES) - 0.4), xlabel="layer / number of layers", yticks=range(4))
    axis.set_yticklabels(ROLES)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, markerscale=1.0)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def kinds_figure(record: Record, path: Path) -> None:
    """Shares of the four kinds, a bar per set of prompts and model; whiskers are the interval of refusals."""
    colours = {"refuses": "#9C2F6B", "answers": "#00588C", "degenerate": "#C9A227", "neither": "#9A9A9A"}
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), sharey=True, layout="constrained")
    for axis, side in zip(axes, SIDES, strict=True):
        found = record[side]["replies"]["sets"]
        left = np.zeros(len(found))
        for kind in KINDS:
            rates = [of_kind(kind)(row) for row in found.values()]
            widths = np.array([one.value for one in rates])
            axis.barh(range(len(found)), widths, left=left, color=colours[kind], label=kind, height=0.7)
            if kind == "refuses":
                whiskers = [[one.value - one.low for one in rates], [one.high - one.value for one in rates]]
                axis.errorbar(widths, range(len(found)), xerr=whiskers, fmt="none", ecolor="black", capsize=3, lw=1)
            left += widths
        axis.set(title=TITLES[side], xlim=(0, 1), xlabel="share of replies", yticks=range(len(found)))
        axis.set_yticklabels(list(found))
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    write(OUT, json.loads((OUT / f"{NAME}.json").read_text()))


if __name__ == "__main__":
    main()
