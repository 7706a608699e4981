"""Stored JSON that says where it misses something."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

Record = Mapping[str, Any]


class PageError(ValueError):
    """A page that cannot be drawn: its record misses something, or its numbers do not carry a sentence."""


class Stored(dict[str, Any]):
    """A mapping of a stored JSON. A key that it misses is refused with its file and path."""

    __slots__ = ("file", "path")

    def __init__(self, values: Mapping[str, Any], file: str, path: tuple[str, ...]) -> None:
        super().__init__(values)
        self.file, self.path = file, path

    def __missing__(self, key: str) -> Any:
        raise PageError(f"{self.file}: nothing stands at {'/'.join((*self.path, key))!r}")


def stored(value: Any, file: str, path: tuple[str, ...] = ()) -> Any:
    """The same data with every mapping as `Stored`.

    Example:
        >>> stored({"sizes": [{"train": 64}]}, "a.json")["sizes"][0]["test"]
        Traceback (most recent call last):
        ...
        pages.records.PageError: a.json: nothing stands at 'sizes/0/test'
    """
    if isinstance(value, Mapping):
        return Stored({key: stored(item, file, (*path, key)) for key, item in value.items()}, file, path)
    if isinstance(value, list):
        return [stored(item, file, (*path, str(k))) for k, item in enumerate(value)]
    return value


def renamed(value: Any, words: Mapping[str, str]) -> Any:
    """A stored value with these keys renamed, wherever they stand."""
    if isinstance(value, Stored):
        new = {words.get(key, key): renamed(item, words) for key, item in value.items()}
        return Stored(new, value.file, value.path)
    return [renamed(item, words) for item in value] if isinstance(value, list) else value


def load(path: Path) -> Stored:
    """A stored JSON."""
    return stored(json.loads(path.read_text(encoding="utf-8")), path.name)


def frame(rows: Sequence[Record], *columns: str) -> pd.DataFrame:
    """Stored rows as a table with these columns, which every row must hold; all columns of the first row by default."""
    return pd.DataFrame({name: [row[name] for row in rows] for name in columns or rows[0]})
