"""Fuzzing: minutes, cases and findings of each target."""

from collections.abc import Iterable
from typing import Any

from pages.page import Page
from pages.records import Record
from pages.tables import table

WAYS = {False: "by chance", True: "by coverage"}


def context(record: Record) -> dict[str, Any]:
    """What the template is given."""
    rows = record["targets"]
    names = list(dict.fromkeys(row["target"] for row in rows))
    return {
        "python": record["python"],
        "minutes": sum(row["seconds"] for row in rows) / 60,
        "cases": sum(row["cases"] for row in rows),
        "about": [(name, next(row["about"] for row in rows if row["target"] == name)) for name in names],
        "table": table([line(rows, name) for name in names], ["target", *HEAD]),
        "mended": record["mended"],
        "open": [one for row in rows for one in row["findings"] if not mended(record, one)],
    }


HEAD = ("minutes by chance", "cases", "minutes by coverage", "cases", "loads", "refused", "findings")


def line(rows: Iterable[Record], name: str) -> list[str]:
    """A target's row of the table."""
    own = {row["coverage"]: row for row in rows if row["target"] == name}
    cells = []
    for way in WAYS:
        found = own.get(way)
        cells += ["not run", ""] if found is None else [f"{found['seconds'] / 60:.1f}", f"{found['cases']:,}"]
    totals = [sum(row["outcomes"].get(kind, 0) for row in own.values()) for kind in ("loads", "refused")]
    findings = sum(len(row["findings"]) for row in own.values())
    return [name, *cells, *(f"{total:,}" for total in totals), str(findings)]


def mended(record: Record, finding: Record) -> bool:
    """Whether a finding of the long runs is among those that are mended."""
    return any(finding["where"] and one["where"] == finding["where"] for one in record["mended"])


PAGE = Page("fuzzing", context)
