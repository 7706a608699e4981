"""Methods on models whose refusal circuit is known: sentences and tables of their page."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mechsafety.circuits.circuit import ROLES
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
    return [row for row in record["models"].values() if row["condition"] not in ("certified", "varied")]


def varied(record: Record, method: str = "map_nodes") -> list[Record]:
    """A method's figures on every model with a varied circuit."""
    models = [row for row in record["models"].values() if row["condition"] == "varied"]
    return [row["methods"][method] for row in models]


def role_counts(record: Record, method: str) -> Counter[tuple[str, str, str]]:
    """Number of nodes of varied circuits, by true role, kind and role found."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for row in varied(record, method):
        for true, kind, found, count in row["named"]:
            counts[true, kind, found] += count
    return counts


def right(record: Record, method: str) -> float:
    """Share of the true nodes of varied circuits that were found and have their true role."""
    counts = role_counts(record, method)
    return sum(n for (true, _, found), n in counts.items() if true == found) / counts.total()


def over_varied(method: str, figure: str, how: Callable[[list[float]], Any] = np.mean) -> Callable[[Record], float]:
    return lambda record: float(how([row[figure] for row in varied(record, method)]))


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
        "Edges: those of the default map have a precision of {precision:.2f} ({worst:.2f} in the worst model) and a "
        "recall of {recall:.2f}; those of the map of edges have {exact:.2f} and {exact_recall:.2f}. In the demo "
        "model's map {linked} of {drawn} edges are there only to connect a node.",
        {
            "recall": mean("map_nodes", "found_edges_recall"),
            "precision": mean("map_nodes", "found_edges_precision"),
            "worst": mean("map_nodes", "found_edges_precision", min),
            "exact": mean("map_edges", "found_edges_precision"),
            "exact_recall": mean("map_edges", "found_edges_recall"),
            "drawn": lambda record: len(record["demo"]["edges"]),
            "linked": lambda record: len(record["demo"]["search"]["linked"]),
        },
        lambda precision, recall: min(precision, recall) > 0.9,
    ),
    "ways": Sentence(
        "A map of edges adds the edges of backups to the smallest set. It finds {backups:.2f} of the backed-up nodes "
        "({worst:.2f} in the worst model), and has a recall of nodes of {recall:.2f}.",
        {
            "backups": mean("map_edges", "backups_found"),
            "worst": mean("map_edges", "backups_found", min),
            "recall": mean("map_edges", "found_nodes_recall"),
        },
        lambda backups, recall: min(backups, recall) > 0.9,
    ),
}


ON_VARIED = {
    "roles": Sentence(
        "Roles: {nodes:.1%} of the heads and MLPs that were found have their true role, and {neurons:.1%} of the heads "
        "and neurons.",
        {
            "nodes": lambda record: right(record, "map_nodes"),
            "neurons": lambda record: right(record, "map_neurons"),
        },
        lambda nodes, neurons: min(nodes, neurons) >= 0.95,
    ),
    "parts": Sentence(
        "Nodes: mean F1 {nodes:.3f} (lowest {worst:.2f}), with neurons {neurons:.3f}. {decoys:.0f} decoys were taken "
        "for parts. Edges: precision {precision:.3f}, recall {recall:.3f}.",
        {
            "nodes": over_varied("map_nodes", "found_nodes_f1"),
            "worst": over_varied("map_nodes", "found_nodes_f1", min),
            "neurons": over_varied("map_neurons", "found_nodes_f1"),
            "decoys": over_varied("map_nodes", "decoys_found", sum),
            "precision": over_varied("map_nodes", "found_edges_precision"),
            "recall": over_varied("map_nodes", "found_edges_recall"),
        },
        lambda nodes, neurons, precision, recall: min(nodes, neurons, precision, recall) > 0.9,
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
        "varied": varied_tables(record) if varied(record) else None,
        "conditions": [found for name in CONDITIONS if (found := condition(record, name))],
    }


def varied_tables(record: Record) -> dict[str, Any]:
    """Sentences about varied circuits, and which role the nodes of each true role got."""
    counts = role_counts(record, "map_nodes") + role_counts(record, "map_neurons")
    named = [role for role in ROLES if any(found == role for _, _, found in counts)]
    rows = []
    for true in dict.fromkeys(true for true, _, _ in sorted(counts, key=lambda key: ROLES.index(key[0]))):
        for kind in ("head", "mlp", "neuron"):
            own = {found: n for (role, part, found), n in counts.items() if (role, part) == (true, kind)}
            if own:
                share = own.get(true, 0) / sum(own.values())
                rows.append([true, kind, f"{share:.1%}", *(str(own.get(found, 0)) for found in named)])
    return {
        "n": len(varied(record)),
        "said": [say(record, sentence) for sentence in ON_VARIED.values()],
        "roles": table(rows, ["true role", "part", "right", *(f"found: {found}" for found in named)]),
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
