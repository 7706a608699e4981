"""Architectures that load, and the built-in pairs under other tokenizers: tables of their page."""

from pathlib import Path
from typing import Any

from pages.page import Page
from pages.records import Record, Stored, load
from pages.tables import table

SPLITS = ("train", "validation", "test")


def completed(record: Record, folder: Path) -> Record:
    """The record with that of the built-in pairs."""
    return Stored({**record, "alignment": load(folder / "alignment.json")}, "models.json", ())


def context(record: Record) -> dict[str, Any]:
    """What the template is given."""
    loaded, refused = record["loaded"], record["refused"]
    return {
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "prompts": record["prompts"],
        "total": len(loaded) + len(refused),
        "n_loaded": len(loaded),
        "n_refused": len(refused),
        "loaded": loaded_table(record),
        "lines": record["lines"],
        "refused": table([[row["name"], row["line"]] for row in refused], ["architecture", "the line"]),
        **alignment(record["alignment"]["tokenizers"]),
    }


def loaded_table(record: Record) -> str:
    every = set(record["shortcuts"])
    analyses = list(record["loaded"][0]["analyses"])
    rows = [
        [
            row["name"],
            f"{row['alone']:.0e}",
            f"{row['padded']:.0e}",
            "all" if set(row["shortcuts"]) == every else ", ".join(row["shortcuts"]) or "none",
            f"{row['hooks']:.0e}",
            *("yes" if row["analyses"][name] else "no" for name in analyses),
        ]
        for row in record["loaded"]
    ]
    return table(rows, ["architecture", "alone", "padded", "shortcuts", "hooks", *analyses])


def alignment(tokenizers: Record) -> dict[str, Any]:
    """Shares of the built-in pairs that align, by split and by topic."""
    first = next(iter(tokenizers.values()))
    sizes = {split: first["splits"][split][1] for split in SPLITS}
    rows = []
    for name, found in tokenizers.items():
        topic, cell = min(found["topics"].items(), key=lambda item: item[1][0] / item[1][1])
        rows.append([f"of {name}", *(share(found["splits"][split]) for split in SPLITS), words(topic), share(cell)])
    topics = [
        [f"{words(topic)} ({n})", *(share(found["topics"][topic]) for found in tokenizers.values())]
        for topic, (_, n) in first["topics"].items()
    ]
    return {
        "pairs": sum(sizes.values()),
        "splits": ", ".join(f"{n} {split}" for split, n in sizes.items()),
        "aligned": table(rows, ["tokenizer", *SPLITS, "smallest topic", "share"]),
        "topics": table(topics, ["topic", *tokenizers]),
    }


def words(topic: str) -> str:
    return topic.replace("_", " ")


def share(cell: list[int]) -> str:
    return f"{cell[0] / cell[1]:.2f}"


PAGE = Page("models", context, file="../models.md", completed=completed)
