"""Coverage of intervals and rejections of tests: tables of their page."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from pages.page import Page
from pages.records import Record
from pages.tables import marked, table

# shares of samples that are as they should be; others are bold
GOOD, REJECTED = (0.93, 0.97), (0.0, 0.06)
# the page's sections, and what each has the coverage of
SECTIONS = {
    "means": ("mean",),
    "ratios": ("share of the gap", "ratio"),
    "rates": ("rate",),
    "areas": ("CPR, rises to 1", "CMD, rises to 1", "CPR, at 1 early", "CMD, at 1 early"),
}
# samples of the slower parts: at least so many, and this share of those of the others
FEWER = {"others": (50, 2), "independence": (50, 10), "sweeps": (5, 40)}


def context(record: Record) -> dict[str, Any]:
    """What the template is given."""
    rows, samples = record["coverage"], record["samples"]
    outside = [row for row in rows if row["data"] != "all" and not GOOD[0] <= row["held"] <= GOOD[1]]
    return {
        "seed": record["seed"],
        "samples": samples,
        "known_to": 2 * math.sqrt(0.05 * 0.95 / samples),
        "many": record["many"],
        "good": GOOD,
        "most_rejected": REJECTED[1],
        "fewer": {part: max(least, samples // share) for part, (least, share) in FEWER.items()},
        "sections": {name: [covered(rows, kind) for kind in kinds] for name, kinds in SECTIONS.items()},
        "cells": len(rows),
        "outside": list(by_side(outside)),
        "n_outside": len(outside),
        "others": {
            method: by_size((row for row in record["others"] if row["method"] == method), "held", GOOD)
            for method in dict.fromkeys(row["method"] for row in record["others"])
        },
        "tests": [tested(record["tests"], name) for name in dict.fromkeys(row["test"] for row in record["tests"])],
    }


def covered(rows: Iterable[Record], kind: str) -> dict[str, Any]:
    """The table of what intervals are of, and the cells whose interval is often without an end."""
    some = [row for row in rows if row["of"] == kind]
    endless = [row for row in some if row["unbounded"] > 0.005]
    return {
        "title": title(kind),
        "table": by_size(some, "held", GOOD),
        "endless": ", ".join(f"{row['data']}, n = {row['n']}: {row['unbounded']:.1%}" for row in endless),
    }


def tested(rows: Iterable[Record], name: str) -> dict[str, Any]:
    """A test's table, or its figures where there is one row; and what share of real effects it finds."""
    some = [row for row in rows if row["test"] == name]
    found = [row for row in some if row.get("found")]
    return {
        "title": title(name),
        "figures": ", ".join(f"{row['data']}: {row['rejected']:.1%}" for row in some),
        "table": None if name == "random circuits" else by_size(some, "rejected", REJECTED),
        "found": ", ".join(f"{row['found']:.0%} at {row['n']}" for row in found),
    }


def title(kind: str) -> str:
    return f"{kind[0].upper()}{kind[1:]}"


def by_size(rows: Iterable[Mapping[str, Any]], figure: str, good: tuple[float, float]) -> str:
    """A row per kind of data, a column per number of prompts; what is outside the limits is bold."""
    rows = list(rows)
    sizes = sorted({row["n"] for row in rows})
    cells = []
    for name in dict.fromkeys(row["data"] for row in rows):
        found = {row["n"]: row[figure] for row in rows if row["data"] == name}
        cells.append([name, *(marked(found[n], name == "all" or good[0] <= found[n] <= good[1]) for n in sizes)])
    return table(cells, ["data", *(f"n = {n}" for n in sizes)])


def by_side(outside: list[Record]) -> Iterable[str]:
    """The cells outside the limits, by what they are of."""
    for kind in dict.fromkeys(row["of"] for row in outside):
        below = [row for row in outside if row["of"] == kind and row["held"] < GOOD[0]]
        above = [row for row in outside if row["of"] == kind and row["held"] > GOOD[1]]
        for word, part in (("below", below), ("above", above)):
            if part:
                cells = ", ".join(f"{row['data']} at {row['n']} ({row['held']:.1%})" for row in part)
                yield f"{kind}, {word}: {cells}"


PAGE = Page("coverage", context)
