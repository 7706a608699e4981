"""Methods on models whose refusal circuit is known: sentences and tables of their page."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mechsafety.intervals import mean_interval
from pages.page import Page
from pages.records import Record, Stored, load
from pages.statements import Sentence, say
from pages.tables import table

# planted models of a whole run
PLANTED = 36
DEMO = "../gallery/demo.json"
# column: (heading, figure)
RANKINGS = (
    ("nodes AP", "nodes_average_precision"),
    ("neurons AP", "neurons_average_precision"),
    ("edges AP", "edges_average_precision"),
    ("nodes AUROC", "nodes_auroc"),
    ("above decoys", "nodes_auroc_decoys"),
    ("decoys' strength", "nodes_strength_decoys"),
    ("backups above the rest", "nodes_auroc_backups"),
    ("backups' strength", "nodes_strength_backups"),
)
SETS = (
    ("precision", "found_nodes_precision"),
    ("recall", "found_nodes_recall"),
    ("F1", "found_nodes_f1"),
    ("decoys in it", "decoys_found"),
    ("backups found", "backups_found"),
    ("edges F1", "found_edges_f1"),
    ("roles", "roles"),
    ("seconds", "seconds"),
)
CONDITIONS = {
    "neither": "Neither decoys nor backups",
    "decoys": "Decoys only",
    "backups": "Backups only",
    "both": "Decoys and backups",
    "certified": "The certified model",
}
MAPS = ("map_nodes", "map_neurons", "map_edges")
SUMMARY = {
    "precision": "found_nodes_precision",
    "recall": "found_nodes_recall",
    "decoys in all circuits": "decoys_found",
    "backups found": "backups_found",
    "roles right": "roles",
    "edges: precision": "found_edges_precision",
    "edges: recall": "found_edges_recall",
    "seconds (longest)": "seconds",
}


def completed(record: Record, folder: Path) -> Record:
    """The record with the demo model's map."""
    return Stored({**record, "demo": load(folder / DEMO)}, "ground-truth.json", ())


# --- what the page says, and the numbers that carry it --------------------------------------------------------------


def planted(record: Record) -> list[Record]:
    return [row for row in record["models"].values() if row["condition"] != "certified"]


def on_planted(record: Record, method: str, figure: str) -> list[float]:
    """A figure of a method on every planted model that has it."""
    rows = [row["methods"].get(method, {}) for row in planted(record)]
    return [row[figure] for row in rows if figure in row]


def mean(method: str, figure: str, how: Callable[[list[float]], Any] = np.mean) -> Callable[[Record], float]:
    return lambda record: float(how(on_planted(record, method, figure)))


def lowest(figure: str) -> Callable[[Record], float]:
    """The lowest value of any model, over the maps of heads and MLPs and of neurons."""
    return lambda record: min(min(on_planted(record, name, figure)) for name in ("map_nodes", "map_neurons"))


SENTENCES = {
    "nodes": Sentence(
        "Nodes: the default map and that of neurons find all nodes and no other, in every one of {n} models (lowest "
        "precision {precision:.3g}, lowest recall {recall:.3g}, lowest share of backups {backups:.3g}, {decoys:.0f} "
        "decoys).",
        {
            "n": lambda record: len(on_planted(record, "map_nodes", "found_nodes_recall")),
            "precision": lowest("found_nodes_precision"),
            "recall": lowest("found_nodes_recall"),
            "backups": lowest("backups_found"),
            "decoys": mean("map_nodes", "decoys_found", sum),
        },
        lambda precision, recall, backups, decoys: precision == recall == backups == 1 and decoys == 0,
    ),
    "edges": Sentence(
        "Edges: those of the default map hold the true ones (recall {recall:.2f}) among others. Their precision is "
        "{precision:.2f} ({worst:.2f} in the worst model), so that most of the lines that it draws are no direct path "
        "of the circuit. In the demo model's map {estimated} of {drawn} edges are estimates, and {linked} are there "
        "only to connect a node. The map of edges has a precision of {exact:.2f}, and a recall of {exact_recall:.2f}.",
        {
            "recall": mean("map_nodes", "found_edges_recall"),
            "precision": mean("map_nodes", "found_edges_precision"),
            "worst": mean("map_nodes", "found_edges_precision", min),
            "exact": mean("map_edges", "found_edges_precision"),
            "exact_recall": mean("map_edges", "found_edges_recall"),
            "estimated": lambda record: sum(edge["status"] == "estimated" for edge in record["demo"]["edges"]),
            "drawn": lambda record: len(record["demo"]["edges"]),
            "linked": lambda record: len(record["demo"]["search"]["linked"]),
        },
        lambda precision, recall, exact, linked: precision < 0.5 < recall and exact > 0.9 and linked > 0,
    ),
    "smallest": Sentence(
        "A map of edges is the smallest set, and has no search for backups. Of two ways that do the same work it holds "
        "one. It therefore finds {backups:.2f} of the backed-up nodes, and has a recall of nodes of {recall:.2f}.",
        {"backups": mean("map_edges", "backups_found"), "recall": mean("map_edges", "found_nodes_recall")},
        lambda backups, recall: backups < 1 and recall < 1,
    ),
}


# --- the page -------------------------------------------------------------------------------------------------------


def context(record: Record) -> dict[str, Any]:
    """What the template is given."""
    whole = len(planted(record)) >= PLANTED
    return {
        "date": record["date"],
        "models": len(record["models"]),
        "cpu": record["machine"]["cpu"],
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "planted": len(planted(record)),
        "said": [say(record, sentence) for sentence in SENTENCES.values()] if whole else None,
        "summary": summary_table(record) if whole else None,
        "conditions": [found for name in CONDITIONS if (found := condition(record, name))],
    }


def summary_table(record: Record) -> str:
    """What the maps found over all planted models, the worst model beside the mean."""
    rows = []
    for name in MAPS:
        row = [words(name)]
        for figure in SUMMARY.values():
            values = on_planted(record, name, figure)
            worst = max if figure == "seconds" else min
            found = f"{np.mean(values):.3g} ({worst(values):.3g})" if values else ""
            row.append(f"{sum(values)}" if figure == "decoys_found" else found)
        rows.append(row)
    return table(rows, ["map", *SUMMARY])


def condition(record: Record, name: str) -> dict[str, Any] | None:
    """Both tables of the models of a condition."""
    models = [row for row in record["models"].values() if row["condition"] == name]
    tables = [method_table(models, columns, what) for columns, what in ((RANKINGS, "ranking"), (SETS, "circuit"))]
    return {"title": CONDITIONS[name], "n": len(models), "tables": [one for one in tables if one]} if models else None


def method_table(models: list[Record], columns: Iterable[tuple[str, str]], heading: str) -> str | None:
    """A row per method that gives a ranking, or a circuit."""
    wanted = "found_nodes_f1" if heading == "circuit" else "nodes_auroc"
    names = dict.fromkeys(name for row in models for name in row["methods"])

    def values(name: str, figure: str) -> list[float]:
        return [row["methods"][name][figure] for row in models if figure in row["methods"].get(name, {})]

    methods = [n for n in names if values(n, wanted) or (heading == "ranking" and values(n, "edges_auroc"))]
    shown = [(title, figure) for title, figure in columns if any(values(name, figure) for name in methods)]
    rows = []
    for name in methods:
        run = sum(name in row["methods"] for row in models)
        some = f" ({run} models)" if run < len(models) else ""
        rows.append([f"{words(name)}{some}", *(over_models(values(name, figure), figure) for _, figure in shown)])
    return table(rows, [heading, *(title for title, _ in shown)]) if rows else None


def over_models(values: list[float], figure: str) -> str:
    """Mean and 95 % interval over models; that of a share ends at 0 and 1."""
    if not values:
        return ""
    text = f"{np.mean(values):.2f}"
    if len(values) == 1:
        return text
    low, high = np.clip(mean_interval(values), 0, 1) if is_share(figure) else mean_interval(values)
    return f"{text} [{low:.2f}, {high:.2f}]"


def is_share(figure: str) -> bool:
    """Whether a figure lies between 0 and 1 by its definition."""
    return figure not in ("seconds", "decoys_found") and "strength" not in figure


def words(name: str) -> str:
    return name.replace("_", " ")


PAGE = Page("ground-truth", context, completed=completed)
