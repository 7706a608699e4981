"""The native model beside the demo model: sentences, tables and figures of their page, from record and circuits."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.results import parting, reads_where
from mechsafety.viz import Style, layout_circuit
from mechsafety.viz.marks import Layout
from pages.page import Page
from pages.records import Record, Stored, renamed, stored
from pages.statements import Rate, Sentence, look_up, say
from pages.tables import interval, rate_of, reply_cells, table

NAME = "native-model"
CIRCUITS = NAME + "/{}-{}.json"
SIDES, LEVELS = ("native", "demo"), ("node", "neuron")
TITLES = {"native": "native model", "demo": "demo model"}
ROLES = ("detection", "relay", "evaluation", "decision", "production")
KINDS = ("refuses", "answers", "degenerate", "neither")
BUILT_IN = {"harmful": "built-in pairs, harmful", "harmless": "built-in pairs, harmless"}
# keys of a record that was measured before these words changed: "column" of the direction's candidates and choices, the
# rest among replies/sets; they are replaced when the record is read, and nowhere else
OLD_WORDS = {"column": "position", **{f"twins, {side}": name for side, name in BUILT_IN.items()}}
COLOURS = {"native": "#9C2F6B", "demo": "#00588C"}
KIND_COLOURS = {"refuses": "#9C2F6B", "answers": "#00588C", "degenerate": "#C9A227", "neither": "#9A9A9A"}
shown = partial(interval, missing="not measured")


def completed(record: Record, folder: Path) -> Record:
    """The record in today's words, with the circuits, which are files of their own, and their numbers."""
    circuits = {
        side: {level: RefusalCircuit.load(folder / CIRCUITS.format(side, level)) for level in LEVELS} for side in SIDES
    }
    numbers = {side: {level: numbers_of(circuits[side][level]) for level in LEVELS} for side in SIDES}
    new = renamed(record, OLD_WORDS)
    return Stored({**new, **stored({"circuits": circuits, "map": numbers}, new.file)}, new.file, new.path)


def numbers_of(circuit: RefusalCircuit) -> dict[str, Any]:
    """Numbers of a circuit."""
    check, options = circuit.verification, circuit.provenance.options
    fresh = check.fresh
    return {
        "nodes": len(circuit),
        "candidates": circuit.n_candidates,
        "share": len(circuit) / circuit.n_candidates,
        "kinds": dict(Counter(member.node.kind for member in circuit)),
        "pairs": [options[name] for name in ("found_on", "held_out", "fresh")],
        "faithfulness": check.faithfulness,
        "held_out": {"value": check.held_out_faithfulness, **ends(check.held_out_ci)},
        "fresh": {"value": None} if fresh is None else {"value": fresh.faithfulness, **ends(fresh.ci)},
        "cmd": {"value": check.cmd} if check.cmd_ci is None else {"value": check.cmd, **ends(check.cmd_ci)},
        "random": [check.random_controls.mean, check.random_p],
        "necessity": check.necessity,
        "roles": {role: role_of(circuit, role) for role in ROLES},
        "highest": max(point.held_out for point in check.curve),
        "verdicts": {claim.name: claim.verdict for claim in check.claims},
        "holds": sum(claim.passed is True for claim in check.tested),
        "decided": sum(claim.passed is not None for claim in check.tested),
    }


def ends(found: tuple[float, float]) -> dict[str, float]:
    return {"value_low": found[0], "value_high": found[1]}


def role_of(circuit: RefusalCircuit, role: str) -> dict[str, Any]:
    """Number of nodes of a role, their first and last layer, and their median depth."""
    layers = [member.node.layer for member in circuit.by_role(role) if member.node.layer is not None]
    if not layers:
        return {"n": 0}
    return {
        "n": len(layers),
        "layers": [min(layers), max(layers)],
        "median_depth": median(layers) / depth(circuit),
    }


def depth(circuit: RefusalCircuit) -> int:
    """Layers of the model."""
    assert circuit.shape is not None
    return circuit.shape.n_layers


# --- numbers that the sentences name --------------------------------------------------------------------------------


def mapped(level: str, name: str) -> dict[str, Callable[[Record], Any]]:
    """A number of both models' circuits at a level."""
    return {side: lambda record, s=side: look_up(record["map"][s][level], name) for side in SIDES}


def refused(row: Record) -> Rate:
    """Refusals among the replies."""
    return rate_of(row["kinds"], "refuses")


def set_of(side: str, name: str) -> Callable[[Record], Rate]:
    """Refusals of a set of prompts."""
    return lambda record: refused(record[side]["replies"]["sets"][name])


def of_pairs(side: str) -> dict[str, Callable[[Record], Any]]:
    """Pairs that were tried for the map, those that it uses, and their share."""

    def used(record: Record) -> int:
        found = record[side]["pairs-tried"]
        return found["here"] + found["there"]

    return {
        f"{side}_used": used,
        f"{side}_tried": lambda record: record[side]["pairs-tried"]["tried"],
        f"{side}_share": lambda record: used(record) / record[side]["pairs-tried"]["tried"],
    }


def verdicts(record: Record) -> list[dict[str, str]]:
    """Verdicts of the claims by name, of the native and of the demo model."""
    return [record["map"][side]["node"]["verdicts"] for side in SIDES]


def decided(record: Record, *, alike: bool) -> list[str]:
    """Claims that hold or fail in both models: those with the same verdict, or with opposite ones."""
    native, demo = verdicts(record)
    both = [name for name in native if {native[name], demo.get(name)} <= {"holds", "fails"}]
    return [name for name in both if (native[name] == demo[name]) == alike]


def undecided(record: Record) -> list[str]:
    """Claims that are undecided, or were not measured, in at least one model."""
    native, demo = verdicts(record)
    return [name for name in native if {native[name], demo.get(name)} & {"undecided", "not measured"}]


def shared_mlps(side: str) -> dict[str, Callable[[Record], int]]:
    """MLPs of a circuit by nodes, those of the model, and how many a random circuit of its make-up shares at least."""

    def inside(record: Record) -> int:
        return sum(member.node.kind == "mlp" for member in record["circuits"][side]["node"])

    def every(record: Record) -> int:
        return depth(record["circuits"][side]["node"])

    return {
        f"{side}_mlps": inside,
        f"{side}_every": every,
        f"{side}_least": lambda record: max(0, 2 * inside(record) - every(record)),
    }


def ablated(name: str) -> Callable[[Record], Record]:
    """Replies of the native model once parts are ablated."""
    return lambda record: record["native"]["ablations"]["rows"][name]["after"]


def best_probe(record: Record, side: str) -> Record:
    return max(record[side]["probes"]["rows"], key=lambda row: row["accuracy"])


# --- what the page says ---------------------------------------------------------------------------------------------

PAIRS = (
    "A pair can be mapped where the harmful prompt is refused, its harmless counterfactual is answered, and the metric "
    "agrees. That is so for {native_used} of {native_tried} pairs of the native model ({native_share:.0%}), and for "
    "{demo_used} of {demo_tried} of the demo model ({demo_share:.0%})."
)
SIDES_REFUSED = (
    "Of the built-in pairs the native model refuses {bad} of the harmful prompts and {good} of their harmless "
    "counterfactuals."
)
LEFT = (
    "Ablating the whole circuit leaves {after} of {n} harmful prompts refused by the native model. Ablating as many "
    "nodes at random leaves {random}. "
)
PROBES = (
    "The best probe is right on {native:.0%} of the native model's prompts and on {demo:.0%} of the demo model's. The "
    "text alone gives {lexical:.0%}"
)
NEURONS = (
    "The native model's map takes some layers apart. Of the {n} neurons that differ most at the suffix, {within} lie "
    "in these layers, and {shared} of these are in the circuit. Of neurons drawn at random, {expected:.1%} would be."
)
MAKE_UP = (
    "The native model's circuit by nodes holds {native_mlps} of {native_every} MLPs, and the demo model's {demo_mlps} "
    "of {demo_every}. A random circuit with as many parts of each kind shares at least {native_least} and {demo_least} "
    "of these MLPs."
)
SENTENCES: dict[str, Sentence] = {
    "make_up": Sentence(
        f"{MAKE_UP} Removing it loses as much for that reason alone. Of these two circuits the claim *necessity* "
        "therefore says nothing.",
        shared_mlps("native") | shared_mlps("demo"),
        lambda native_mlps, native_least, demo_mlps, demo_least: (
            2 * native_least > native_mlps and 2 * demo_least > demo_mlps
        ),
        MAKE_UP,
    ),
    "advbench": Sentence(
        "The native model refuses {native} of AdvBench, and the demo model {demo}. The demo model was trained to "
        "refuse, and does so more often.",
        {side: set_of(side, "AdvBench") for side in SIDES},
        lambda native, demo: demo.low > native.high,
        "The native model refuses {native} of AdvBench, and the demo model {demo}. Their intervals overlap, or the "
        "native model refuses more.",
    ),
    "built_in": Sentence(
        f"{SIDES_REFUSED} The wording that a pair shares explains a part of its refusals at most.",
        {"bad": set_of("native", BUILT_IN["harmful"]), "good": set_of("native", BUILT_IN["harmless"])},
        lambda bad, good: bad.low > good.high,
        SIDES_REFUSED,
    ),
    "speaks": Sentence(
        f"{PAIRS} The native model's map speaks for that share alone.",
        of_pairs("native") | of_pairs("demo"),
        lambda native_share, demo_share: native_share < demo_share,
        PAIRS,
    ),
    "size": Sentence(
        "For 80 % of the gap on held-out pairs it takes {native:.0%} of the native model's heads and MLPs, and "
        "{demo:.0%} of the demo model's.",
        mapped("node", "share"),
        lambda native, demo: native > 0 and demo > 0,
    ),
    "overshoot": Sentence(
        "Some parts of the native model work against refusal. The ranking puts these last. Without them, the best of "
        "the others give up to {native:.1f} times the gap on held-out pairs; the demo model's give up to {demo:.1f} "
        "times. This is what a faithfulness above 1 means. It does not mean that a circuit is better than its model.",
        mapped("node", "highest"),
        lambda native, demo: native > 1.2 and native > demo,
        "The best parts of the ranking give up to {native:.1f} times the gap of the native model on held-out pairs, "
        "and up to {demo:.1f} times that of the demo model.",
    ),
    "verdicts": Sentence(
        "Of the maps by nodes, {n} of {of} claims are decided in both models, and with the same verdict: {same}. "
        "{against} claims hold in one model and fail in the other. Faithfulness holds by construction. At least one of "
        "the models has too few pairs to decide these: {open}.",
        {
            "n": lambda r: len(decided(r, alike=True)),
            "of": lambda r: len(verdicts(r)[0]),
            "same": lambda r: ", ".join(decided(r, alike=True)),
            "against": lambda r: len(decided(r, alike=False)),
            "open": lambda r: ", ".join(undecided(r)) or "none",
        },
        lambda against: against == 0,
        "Of the maps by nodes, {n} of {of} claims are decided in both models, and with the same verdict: {same}. "
        "**{against} claims hold in one model and fail in the other.** Faithfulness holds by construction. At least "
        "one of the models has too few pairs to decide these: {open}.",
    ),
    "passes": Sentence(
        "The published rule finds a direction in the native model: {both} of {candidates} candidates pass.",
        {
            "both": "native/direction-found/conditions/both",
            "candidates": "native/direction-found/conditions/candidates",
        },
        lambda both: both > 0,
        "**No candidate of the native model passes the published conditions** ({both} of {candidates}). The page shows "
        "the lowest bypass score below the depth limit, and claims nothing of the rule's direction.",
    ),
    "removal": Sentence(
        "Removing the direction takes the native model's refusals of JailbreakBench from {before} to {after}. Removing "
        "a random direction leaves {random}.",
        {
            name: lambda r, c=condition: refused(r["native"]["direction-found"]["replies"]["JailbreakBench"][c])
            for name, condition in (("before", "as it is"), ("after", "removed"), ("random", "random removed"))
        },
        lambda before, after, random: after.high < min(before.low, random.low),
        "Removing the direction does **not** take the native model's refusals of JailbreakBench below both intervals: "
        "{before} as it is, {after} with it removed, {random} with a random direction removed.",
    ),
    "ablation": Sentence(
        f"{LEFT}**Of the random nodes' replies {{babble}} are degenerate.**",
        {
            "n": "native/ablations/pairs",
            "after": lambda r: refused(ablated("the circuit")(r)),
            "random": lambda r: refused(ablated("as many nodes at random")(r)),
            "babble": lambda r: rate_of(ablated("as many nodes at random")(r)["kinds"], "degenerate"),
        },
        lambda after, random: after.high < random.low,
        f"{LEFT}Replies alone do not tell the circuit from random nodes. Of the random nodes' replies {{babble}} are "
        "degenerate.",
    ),
    "probes": Sentence(
        f"{PROBES}.",
        {side: lambda r, s=side: best_probe(r, s)["accuracy"] for side in SIDES}
        | {"lexical": lambda r: best_probe(r, "native")["lexical"]},
        lambda native, demo, lexical: min(native, demo) > lexical,
        f"{PROBES}, and at least one of the two probes is no better.",
    ),
    "neurons": Sentence(
        NEURONS,
        {
            "n": "native/neurons-found/n",
            "within": "native/neurons-found/within",
            "shared": "native/neurons-found/shared",
            "expected": lambda r: r["native"]["neurons-found"]["expected_share"] or 0.0,
        },
        lambda within, shared, expected: within > 0 and shared / within > expected,
        f"{NEURONS} Differing most and carrying the refusal are not the same.",
    ),
}


# --- the page -------------------------------------------------------------------------------------------------------


def context(record: Record) -> dict[str, Any]:
    """What the template is given."""
    return {
        "said": {name: say(record, sentence) for name, sentence in SENTENCES.items()},
        "sides": TITLES,
        "sha256": record["native"]["facts"]["sha256"],
        "reply_tokens": record["native"]["replies"]["tokens"],
        "facts": facts_table(record),
        "replies": reply_table(record),
        "read": {side: read_line(record[side]["pairs-tried"]["metric"]) for side in SIDES},
        "map": map_table(record),
        "claims": claims_table(record),
        "roles": role_table(record),
        "directions": direction_table(record),
        "without_kl": {side: record[side]["direction-found"]["without_kl"] for side in SIDES},
        "direction_replies": direction_reply_table(record),
        "heads": {
            side: {"pairs": record[side]["heads-found"]["pairs"], "table": head_table(record[side]["heads-found"])}
            for side in SIDES
        },
        "neurons": neuron_table(record),
        "ablated_pairs": record["native"]["ablations"]["pairs"],
        "ablations": ablation_table(record),
        "probes": probe_table(record),
    }


def read_line(metric: Mapping[str, Any]) -> str:
    tried = "; ".join(f"{where} {value}" for where, value in parting(metric))
    return f"{reads_where(metric)}. AUROC: {tried}."


def facts_table(record: Record) -> str:
    def cell(name: str, value: Any) -> str:
        return f"{value / 1e6:,.0f} M" if name == "parameters" else value if name == "name" else f"{value:,}"

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
    rows = [[text, *(cell(name, record[side]["facts"][name]) for side in SIDES)] for name, text in names.items()]
    return table(rows, ["", *TITLES.values()])


def reply_table(record: Record) -> str:
    rows = [
        [TITLES[side], name, *reply_cells(row, KINDS)]
        for side in SIDES
        for name, row in record[side]["replies"]["sets"].items()
    ]
    return table(rows, ["model", "prompts", *KINDS, "perplexity"])


def map_table(record: Record) -> str:
    columns = [(side, level) for side in SIDES for level in LEVELS]
    rows: dict[str, Callable[[Record], str]] = {
        "pairs: searched on, held out, fresh": lambda m: ", ".join(map(str, m["pairs"])),
        "parts in the circuit": lambda m: f"{m['nodes']} of {m['candidates']:,} ({m['share']:.1%})",
        "heads, MLPs, neurons": lambda m: ", ".join(str(m["kinds"].get(k, 0)) for k in ("head", "mlp", "neuron")),
        "faithfulness on the search's pairs": lambda m: f"{m['faithfulness']:.2f}",
        "on held-out pairs": lambda m: shown(m["held_out"], "value"),
        "on fresh pairs": lambda m: shown(m["fresh"], "value"),
        "CMD: mean distance from 1 over all sizes": lambda m: shown(m["cmd"], "value"),
        "random circuits of its size: mean, p": lambda m: f"{m['random'][0]:.2f}, {m['random'][1]:.3g}",
        "share of the gap lost without it": lambda m: f"{m['necessity']:.0%}",
        "claims that hold, of those decided": lambda m: f"{m['holds']} of {m['decided']}",
    }
    cells = [[text, *(show(record["map"][side][level]) for side, level in columns)] for text, show in rows.items()]
    seconds = [record[side]["maps"][level][1] for side, level in columns]
    cells.append(["seconds", *("" if took is None else f"{took:,.0f}" for took in seconds)])
    return table(cells, ["", *(f"{TITLES[side]}, by {level}s" for side, level in columns)])


def claims_table(record: Record) -> str:
    columns = [(side, level) for side in SIDES for level in LEVELS]
    rows = []
    for name in verdicts(record)[0]:
        row = [name]
        for side, level in columns:
            found = [c for c in record["circuits"][side][level].verification.claims if c.name == name]
            row.append(claim_cell(found[0]) if found else "")
        rows.append(row)
    return table(rows, ["claim", *(f"{TITLES[side]}, by {level}s" for side, level in columns)])


def claim_cell(claim: Any) -> str:
    value = "" if claim.value is None else f" {claim.value:.2g}"
    if claim.interval is not None and all(map(math.isfinite, claim.interval)):
        value += f" ({claim.interval[0]:.2g} to {claim.interval[1]:.2g})"
    return f"{claim.verdict}{value}" + ("" if claim.p_value is None else f", p = {claim.p_value:.2g}")


def role_table(record: Record) -> str:
    def cell(found: Record) -> str:
        if not found["n"]:
            return "none"
        low, high = found["layers"]
        return f"{found['n']}: layers {low} to {high}, median {found['median_depth']:.2f}"

    rows = [[role, *(cell(record["map"][side]["node"]["roles"][role]) for side in SIDES)] for role in ROLES]
    return table([*rows, ["no role", *(str(without(record, side)) for side in SIDES)]], ["role", *TITLES.values()])


def without(record: Record, side: str) -> int:
    """Nodes of a circuit that no rule gives a role."""
    return len(record["circuits"][side]["node"].by_role("none"))


def direction_table(record: Record) -> str:
    rows = []
    for side in SIDES:
        found = record[side]["direction-found"]
        limits, chosen, unedited = found["conditions"], found["chosen"], found["unedited"]
        best = next(row for row in found["candidates"] if row["chosen"])
        rows.append(
            [
                TITLES[side],
                f"{limits['shallow']} of {limits['candidates']}",
                *(str(limits[name]) for name in ("induce", "kl", "both")),
                f"layer {chosen['layer']}, position {chosen['position']}",
                *(f"{unedited[name]:.2f} to {shown(best, name)}" for name in ("bypass", "induce")),
                shown(best, "kl"),
            ]
        )
    columns = ["model", "below the depth limit", "induce > 0", "KL at most 0.1", "both", "shown", "bypass"]
    return table(rows, [*columns, "induce", "KL"])


def direction_reply_table(record: Record) -> str:
    rows = [
        [TITLES[side], name, condition, *reply_cells(row, KINDS)]
        for side in SIDES
        for name, conditions in record[side]["direction-found"]["replies"].items()
        for condition, row in conditions.items()
    ]
    return table(rows, ["model", "prompts", "direction", *KINDS, "perplexity"])


def head_table(found: Record) -> str:
    scores = [name for name in found["top"][0] if name in ("direct", "total", "path", "ships", "sahara")]
    rows = [[row["node"], *(row[name] for name in scores), row["role"] or "not in it"] for row in found["top"]]
    return table(rows, ["head", *scores, "role in the map"])


def neuron_table(record: Record) -> str:
    rows = []
    for side in SIDES:
        found = record[side]["neurons-found"]
        most = sorted(found["layers"], key=lambda pair: -pair[1])[:3]
        rows.append(
            [
                TITLES[side],
                str(found["pairs"]),
                ", ".join(f"{row['node']} ({row['effect']:+.1f})" for row in found["top"][:5]),
                ", ".join(f"{layer} ({count})" for layer, count in most),
                f"{sum(found['large']):,}",
                f"{found['circuit']:,}",
                f"{found['shared']} of {found['within']}",
            ]
        )
    columns = ["model", "pairs", "strongest (Cohen's d)", "layers with most of the top", "with an absolute d of 0.8"]
    return table(rows, [*columns, "neurons in the circuit", "top neurons of its layers that are in it"])


def ablation_table(record: Record) -> str:
    rows = []
    for side in SIDES:
        found = record[side]["ablations"]["rows"]
        first = next(iter(found.values()))
        rows.append([TITLES[side], "nothing", "", f"{first['score'][0]:.2f}", *reply_cells(first["before"], KINDS)])
        for name, row in found.items():
            parts = ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in row["nodes"].items())
            rows.append([TITLES[side], name, parts, f"{row['score'][1]:.2f}", *reply_cells(row["after"], KINDS)])
    return table(rows, ["model", "ablated", "parts", "log-odds", *KINDS, "perplexity"])


def probe_table(record: Record) -> str:
    rows = []
    for side in SIDES:
        for row in sorted(record[side]["probes"]["rows"], key=lambda row: -row["accuracy"])[:5]:
            cells = [TITLES[side], str(row["layer"]), row["span"], shown(row, "accuracy"), f"{row['lexical']:.2f}"]
            cells += [shown(row, "shuffled"), f"{row['hard_flagged']:.2f}"]
            rows.append([*cells, *(shown(row, name) for name in ("erased", "erased_kl", "random_erased"))])
    columns = ["model", "layer", "span", "accuracy", "text alone", "shuffled labels", "hard negatives flagged"]
    return table(rows, [*columns, "log-odds: weights erased", "KL", "random erased"])


# --- figures --------------------------------------------------------------------------------------------------------


def figures(record: Record) -> Mapping[str, Figure | Layout]:
    """Figures by file."""
    pictures = {
        f"{NAME}/{side}-roles.png": layout_circuit(record["circuits"][side]["node"], Style(caption=False))
        for side in SIDES
    }
    return {**pictures, f"{NAME}/depths.png": depths(record), f"{NAME}/replies.png": reply_kinds(record)}


def depths(record: Record) -> Figure:
    """Where in its model each node of a role lies, effect as size."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axis = figure.subplots()
    for k, side in enumerate(SIDES):
        circuit = record["circuits"][side]["node"]
        for row, role in enumerate(ROLES):
            members = circuit.by_role(role)
            x = [member.node.layer / depth(circuit) for member in members]
            size = [12 + 250 * min(1.0, abs(member.effect)) for member in members]
            y = np.full(len(x), row + (0.18 if k == 0 else -0.18))
            label = TITLES[side] if row == 0 else None
            axis.scatter(x, y, size, COLOURS[side], alpha=0.6, label=label, linewidths=0)
    axis.set(xlim=(-0.02, 1.02), ylim=(-0.6, len(ROLES) - 0.4), xlabel="layer / number of layers")
    axis.set_yticks(range(len(ROLES)), ROLES)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, markerscale=1.0)
    return figure


def reply_kinds(record: Record) -> Figure:
    """Shares of the four kinds, a bar per set of prompts and model; whiskers are the interval of refusals."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, side in zip(axes, SIDES, strict=True):
        found = record[side]["replies"]["sets"]
        left = np.zeros(len(found))
        for kind, colour in KIND_COLOURS.items():
            rates = [rate_of(row["kinds"], kind) for row in found.values()]
            widths = np.array([one.value for one in rates])
            axis.barh(range(len(found)), widths, left=left, color=colour, label=kind, height=0.7)
            if kind == "refuses":
                whiskers = [[one.value - one.low for one in rates], [one.high - one.value for one in rates]]
                axis.errorbar(widths, range(len(found)), xerr=whiskers, fmt="none", ecolor="black", capsize=3, lw=1)
            left += widths
        axis.set(title=TITLES[side], xlim=(0, 1), xlabel="share of replies", yticks=range(len(found)))
        axis.set_yticklabels(list(found))
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


PAGE = Page(NAME, context, figures, completed=completed)
