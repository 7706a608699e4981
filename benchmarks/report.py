"""RESULTS.md from results.json."""

import sys
from pathlib import Path
from typing import Any

from gpu import gpu_cases
from growth import ANALYSES, AT_COLUMNS, AT_PROMPTS, COLUMNS, PROMPTS, growth_cases
from memory import LIMIT_GIB, NAME, PAIRS
from targets import Target

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))

from pages.statements import Sentence, say

WHOLE_MAP = "whole_map"
GPU_COLUMNS = {
    "forward_s": "forward",
    "heads_s": "64 heads patched",
    "paths_s": "all heads -> logits",
    "nodes_s": "node attribution",
    "edges_s": "edge attribution",
}
PATHS = {
    "paths_to_logits": "all of them, MLPs recomputed",
    "paths_to_two_logits": "two of them, MLPs recomputed",
    "direct_paths": "two of them, MLPs frozen",
}


def markdown(results: dict[str, Any], docs: dict[str, str], targets: dict[str, Target]) -> str:
    """The whole file.

    Args:
        results: What results.json holds.
        docs: What each case with a peer runs.
        targets: What each of them is to reach.
    """
    cases, machine = results["cases"], results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    head = (
        f"# Benchmarks\n\n{results['date']}, {machine['cpu']}, {machine['cores']} cores, {machine['ram_gib']} GiB, "
        f"{machine['threads']} threads, "
        f"{versions}. Demo model, float32. `make bench`.\n"
        "Every case runs in a process of its own; peak memory is the process' during our own calls, the loaded model "
        "(0.5 GiB and the libraries) included. Times are medians of so many repeats as the row says, a peer's "
        "interleaved with ours; a case whose values differ from the peer's by more than 1e-4 has failed.\n"
    )
    other = sorted({case["date"] for case in cases.values()} - {results["date"]})
    if other:
        head += f"Some cases were measured on {', '.join(other)} (see results.json).\n"
    parts = [
        head,
        _peers(cases, docs, targets),
        _floor(cases),
        _whole_map(cases),
        _memory(cases),
        _growth(cases),
        _gpu(cases),
    ]
    return "\n".join(part for part in parts if part)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    return _row(columns) + _row(["---"] * len(columns)) + "".join(map(_row, rows))


def _peers(cases: dict[str, Any], docs: dict[str, str], targets: dict[str, Target]) -> str:
    rows: list[list[str]] = []
    notes: list[str] = []
    for name, doc in docs.items():
        if name not in cases:
            rows.append([doc, *["not run"] * 2, *[""] * 4, str(targets[name]), "not run"])
            continue
        case = cases[name]
        peer = f"{case['peer_s']:.1f} s" if "peer_s" in case else case.get("peer", "")
        gap = ""
        if "equal" in case:
            gap = "not finite" if case["max_difference"] is None else f"{case['max_difference']:.1e}"
        rows.append(
            [
                doc,
                f"{case['ours_s']:.2f} s",
                peer,
                f"{case['ratio']:.1f}x" if "ratio" in case else "",
                gap,
                f"{case['peak_gib']:.2f} GiB",
                str(case.get("repeats", "")),
                str(targets[name]),
                targets[name].verdict(case),
            ]
        )
        notes += [f"{doc} {case['note'].capitalize()}."] if "note" in case else []
    columns = ["case", "ours", "peer", "ratio", "largest difference", "peak memory", "repeats", "target", "verdict"]
    text = "## Against peers\n\nTransformerLens' own functions, unless the row says which.\n\n" + _table(columns, rows)
    if notes:
        text += "\n" + "\n".join(notes) + "\n"
    if "neurons" in cases:
        case = cases["neurons"]
        text += (
            f"\nA neuron costs {1000 * case['per_neuron_s']:.0f} ms, a plain forward of the same prompts "
            f"{1000 * case['plain_forward_s']:.0f} ms.\n"
        )
    return text


def _floor(cases: dict[str, Any]) -> str:
    parts = []
    case = cases.get("head_sweep", {})
    if "operations_over_floor" in case:
        parts.append(
            "Operations that any exact method must do to patch a head: its output weights, its layer's MLP, the later "
            f"blocks at the columns from the first difference on ({case['shared']} of {case['tokens']} tokens are "
            "shared), in the last block queries and MLP at the last column alone, and that column's logits. One plain "
            f"forward a head takes {case['floor_ratio']:.1f} times as many. We do {case['operations_over_floor']:.2f} "
            "times the floor (all matrix products of the call counted, both base runs included). In time we are "
            f"{case['ratio']:.1f} times as fast as the peer, whose hooks cost time beside its products.\n"
        )
    rows = [
        [what, f"{cases[name]['floor_ratio']:.0f}x", f"{cases[name]['ratio']:.0f}x"]
        for name, what in PATHS.items()
        if name in cases
    ]
    if rows:
        parts.append(
            "Paths from all heads to the logits need both base runs, each head's output weights, the MLPs that respond "
            "at the last column, and the logits that the metric reads: log-odds read all of them.\n\n"
            + _table(
                ["logits read", "fewer operations than a forward a head, at most", "less time than the peer"], rows
            )
        )
    return "## Floors\n\n" + "\n".join(parts) if parts else ""


def _whole_map(cases: dict[str, Any]) -> str:
    if WHOLE_MAP not in cases:
        return ""
    case = cases[WHOLE_MAP]
    before, now = case["commits"]["before"], case["commits"]["now"]
    labels = {"before": f"commit {before}", "as many pairs": f"commit {now}, as many pairs", "now": f"commit {now}"}
    rows = []
    for name, what in labels.items():
        row = case[name]
        claims = row["claims"]
        rows.append(
            [
                what,
                f"{row['seconds']:.0f} s",
                f"{row['peak_gib']:.2f} GiB",
                f"{row['tried']}: {', '.join(map(str, row['pairs']))}",
                str(row["parts"]),
                f"{row['fresh']:.2f} ({row['fresh_ci'][0]:.2f} to {row['fresh_ci'][1]:.2f})",
                f"{claims['holds']}, {claims['fails']}, {claims['undecided']}",
            ]
        )
    columns = ["code", "time", "peak memory", "pairs asked for: searched on, held out, fresh", "parts"]
    columns += ["faithfulness on fresh pairs (95 % CI)", "claims that hold, fail, are undecided"]
    return (
        f"## The whole map\n\n`mechsafety map demo`, by two versions of the code in one run ({case['date']}, "
        f"{case['machine']['cpu']}, {case['machine']['threads']} threads; `python benchmarks/whole_map.py`). Each uses "
        "its own defaults, apart from the number of pairs in the second row. Time and memory are of the whole command, "
        "loading included. Faithfulness on held-out pairs, which holds by construction, is counted among the claims. "
        f"The claims of {before} were judged by their figures, and those of {now} by whole intervals, so that their "
        "numbers do not compare. A check that was not measured counts as undecided.\n\n" + _table(columns, rows)
    )


def _memory(cases: dict[str, Any]) -> str:
    if NAME not in cases:
        return "## Memory of the analyses\n\nNot run.\n"
    case = cases[NAME]
    rows = [
        [name, f"{row['seconds']:.1f} s", f"{row['peak_gib']:.2f} GiB"]
        for name, row in sorted(case["calls"].items(), key=lambda item: -item[1]["peak_gib"])
    ]
    return (
        f"## Memory of the analyses\n\nPeak of one process, the loaded model included, on {PAIRS} pairs unless said "
        f"otherwise. {say(cases, LIMIT)}\n\n" + _table(["call", "time", "peak memory"], rows)
    )


def _over(cases: dict[str, Any]) -> list[str]:
    """Growth cases that take more than the limit."""
    found = [cases[name] for name in growth_cases() if name in cases and cases[name]["peak_gib"] > LIMIT_GIB]
    return [
        f"{ANALYSES[one['analysis']]} at {one['prompts']} pairs and {one['columns']} columns "
        f"({one['peak_gib']:.2f} GiB)"
        for one in found
    ]


MISSED = Sentence(
    "Asked: no call over {limit:g} GiB; **missed**: the largest of these takes {largest:.2f} GiB, and of the sizes "
    "below {n} take more ({over}).",
    {
        "limit": lambda cases: LIMIT_GIB,
        "largest": f"{NAME}/largest_gib",
        "n": lambda cases: len(_over(cases)),
        "over": lambda cases: "; ".join(_over(cases)) or "none",
    },
    lambda limit, largest, n: largest > limit or n > 0,
)
LIMIT = Sentence(
    "Asked: no call over {limit:g} GiB; met, here (the largest takes {largest:.2f} GiB) and at every size below ({n} "
    "take more).",
    {"limit": lambda cases: LIMIT_GIB, "largest": f"{NAME}/largest_gib", "n": lambda cases: len(_over(cases))},
    lambda limit, largest, n: largest <= limit and n == 0,
    MISSED,
)


def _peaks(kind: str) -> dict[str, Any]:
    """Where the peaks of an analysis stand at the fewest, the third and the most pairs."""
    return {name: f"{kind}_prompts_{n}/peak_gib" for name, n in zip(("few", "many", "most"), GROWN, strict=True)}


GROWN = (PROMPTS[0], PROMPTS[2], PROMPTS[3])
GROWTH = (
    Sentence(
        f"Exact patching takes more memory with more pairs until its batches are full: {{few:.2f}} GiB at {GROWN[0]} "
        f"pairs, {{many:.2f}} at {GROWN[1]}, and no more at {GROWN[2]} ({{most:.2f}}).",
        _peaks("heads"),
        lambda few, many, most: many > 1.2 * few and most < 1.1 * many,
        f"Exact patching: {{few:.2f}} GiB at {GROWN[0]} pairs, {{many:.2f}} at {GROWN[1]}, {{most:.2f}} at {GROWN[2]}.",
    ),
    Sentence(
        f"Edge attribution takes the same at any number of pairs: {{few:.2f}} GiB at {GROWN[0]}, {{many:.2f}} at "
        f"{GROWN[1]}, {{most:.2f}} at {GROWN[2]}.",
        _peaks("edges"),
        lambda few, many, most: max(few, many, most) < 1.1 * min(few, many, most),
        f"Edge attribution: {{few:.2f}} GiB at {GROWN[0]} pairs, {{many:.2f}} at {GROWN[1]}, {{most:.2f}} at "
        f"{GROWN[2]}.",
    ),
    Sentence(
        f"Both take more with longer prompts: from {COLUMNS[0]} to {COLUMNS[-1]} columns exact patching goes from "
        "{heads:.2f} to {heads_long:.2f} GiB, edge attribution from {edges:.2f} to {edges_long:.2f}.",
        {
            **{name: f"{name}_columns_{COLUMNS[0]}/peak_gib" for name in ("heads", "edges")},
            **{f"{name}_long": f"{name}_columns_{COLUMNS[-1]}/peak_gib" for name in ("heads", "edges")},
        },
        lambda heads, heads_long, edges, edges_long: heads_long > heads and edges_long > edges,
        f"From {COLUMNS[0]} to {COLUMNS[-1]} columns exact patching goes from {{heads:.2f}} to {{heads_long:.2f}} GiB, "
        "edge attribution from {edges:.2f} to {edges_long:.2f}.",
    ),
)


def _growth(cases: dict[str, Any]) -> str:
    done = {name: cases[name] for name in growth_cases() if name in cases}
    if not done:
        return "## Growth\n\nNot run.\n"
    rows = [
        [
            ANALYSES[case["analysis"]],
            str(case["prompts"]),
            str(case["columns"]),
            f"{case['ours_s']:.1f} s",
            f"{1000 * case['ours_s'] / (case['prompts'] * case['columns']):.1f} ms",
            f"{case['before_gib']:.2f} GiB",
            f"{case['peak_gib']:.2f} GiB",
            str(case.get("repeats", "")),
        ]
        for case in done.values()
    ]
    said = " ".join(say(cases, one) for one in GROWTH) if len(done) == len(growth_cases()) else "Not all were run."
    columns = ["analysis", "pairs", "columns", "time", "a pair and column", "memory before", "peak memory", "repeats"]
    return (
        f"## Growth\n\nPairs grow at {AT_COLUMNS} columns; columns (tokens from the first difference on) grow at "
        f"{AT_PROMPTS} pairs. Stored runs, graphs and senders are those of a few prompts at a time. {said}\n\n"
        "![growth](growth.svg)\n\n" + _table(columns, rows)
    )


def _gpu(cases: dict[str, Any]) -> str:
    rows = []
    for name, (shape, dtype) in gpu_cases().items():
        case = cases.get(name, {"status": "not run"})
        cells = ["not run"] * (len(GPU_COLUMNS) + 2)
        if case["status"] == "run":
            cells = [f"{1000 * case[key]:.0f} ms" for key in GPU_COLUMNS] + [f"{case.get('peak_gib', 0):.1f} GiB"]
            counts = [case[key.replace("_s", "_repeats")] for key in GPU_COLUMNS]
            cells.append(f"{min(counts)}-{max(counts)}" if min(counts) < max(counts) else str(counts[0]))
        rows.append([shape, dtype, *cells, case.get("device", "")])
    columns = ["shape", "dtype", *GPU_COLUMNS.values(), "peak device memory", "repeats", "device"]
    return "## GPU\n\nRandom-weight Llamas, 8 pairs; attribution with 1 step.\n\n" + _table(columns, rows)
