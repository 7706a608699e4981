"""Files of prompts: JSON lines, a JSON array or CSV. Every error names the file and the line."""

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mechsafety.codec import read_json, read_json_at
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import prompt_text

LABELS = ("topic", "split")
EDITION = "edition"
_SPACE = re.compile(r"[ \t\n\r]*")
# one pair per row: the number of the line in which the row begins, and its parsed value
Rows = Iterator[tuple[int, Any]]


def read_rows(path: str | os.PathLike[str], keys: Sequence[str]) -> list[dict[str, Any]]:
    r"""Read a file of prompts in the format that its suffix names.

    ``.jsonl`` holds one object per line, ``.json`` one array of objects, ``.csv`` a line of column names and one row
    per prompt.

    Args:
        path: The file (UTF-8).
        keys: Keys under which every row must hold a prompt: a text that is not blank, or a list of chat messages.

    Returns:
        The rows. A list of messages becomes a `Conversation`. A ``topic`` or ``split`` becomes text (empty for
        ``null``). An ``edition`` becomes a whole number.

    Raises:
        MechsafetyError: The suffix is not one of these; or as `read_jsonl`.

    Example:
        >>> path = folder / "mine.csv"
        >>> _ = path.write_text("prompt,topic\nHow do I bake bread?,food\n")
        >>> ms.prompts.read_rows(path, ["prompt"])
        [{'prompt': 'How do I bake bread?', 'topic': 'food'}]
    """
    suffix = Path(path).suffix.lower()
    if suffix not in READERS:
        raise MechsafetyError(
            f"{path} ends in {suffix!r}" if suffix else f"{path} has no suffix",
            expected=".jsonl (an object a line), .json (an array of objects) or .csv (column names, then rows)",
            hint="rename it",
        )
    return _read(path, keys, READERS[suffix], f"a .jsonl, .json or .csv file with {_shape(keys)} in every row")


def read_jsonl(path: str | os.PathLike[str], keys: Sequence[str]) -> list[dict[str, Any]]:
    r"""Read a JSON-lines file in which every object holds a prompt under each of ``keys``.

    A prompt is a text that is not blank, or a list of chat messages.

    Raises:
        MechsafetyError: The file is missing or empty; or a line is malformed, lacks a key or holds something else. The
            message names the line.

    Example:
        >>> path = folder / "mine.jsonl"
        >>> _ = path.write_text('{"prompt": "How do I bake bread?", "topic": "food"}\n')
        >>> ms.prompts.read_jsonl(path, ["prompt"])
        [{'prompt': 'How do I bake bread?', 'topic': 'food'}]
    """
    return _read(path, keys, _json_lines, f"a .jsonl file with {_shape(keys)} a line")


def _read(
    path: str | os.PathLike[str], keys: Sequence[str], reader: Callable[[str, str, str], Rows], expected: str
) -> list[dict[str, Any]]:
    if not Path(path).is_file():
        raise MechsafetyError(f"no such file: {path}", expected=expected)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise MechsafetyError(f"{path} is not UTF-8 text ({error.reason})", expected=expected) from None
    rows = [_checked(row, keys, f"{path}, line {line}") for line, row in reader(text, str(path), _shape(keys))]
    if not rows:
        raise MechsafetyError(f"{path} holds no prompts", expected=expected)
    return rows


def _json_lines(text: str, path: str, shape: str) -> Rows:
    # no splitlines(): JSON strings may hold other line breaks, such as U+2028
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, read_json(line)
            except json.JSONDecodeError as error:
                raise MechsafetyError(f"{path}, line {number}: malformed JSON ({error.msg})", expected=shape) from None


def _json_array(text: str, path: str, shape: str) -> Rows:
    """The elements one by one, because the parser of whole arrays does not say in which lines they begin."""
    line, at = 1, 0

    def skip(end: int) -> None:
        nonlocal line, at
        end = _SPACE.match(text, end).end()  # type: ignore[union-attr]
        line += text.count("\n", at, end)
        at = end

    def wrong(found: str) -> MechsafetyError:
        hint = "name it .jsonl if it has one object a line" if text[:1] == "{" else ""
        return MechsafetyError(f"{path}, line {line}: {found}", expected=f"[{shape}, ...]", hint=hint)

    skip(0)
    if text and text[at : at + 1] != "[":
        raise wrong("no JSON array")
    skip(at + 1)
    while at < len(text) and text[at] != "]":
        try:
            value, end = read_json_at(text, at)
        except json.JSONDecodeError as error:
            line = error.lineno
            raise wrong(f"malformed JSON ({error.msg})") from None
        yield line, value
        skip(end)
        if text[at : at + 1] not in (",", "]"):
            raise wrong("malformed JSON (Expecting ',' delimiter)")
        if text[at] == ",":
            skip(at + 1)
            if text[at : at + 1] in ("]", ""):
                raise wrong("malformed JSON (Expecting value)")
    if text and text[at:].strip() != "]":
        raise wrong("malformed JSON (the array does not end the file)")


def _csv(text: str, path: str, shape: str) -> Rows:
    reader, line, names = csv.reader(io.StringIO(text), strict=True), 1, None
    try:
        for cells in reader:
            where = f"{path}, line {line}"
            if cells and names is None:
                names = [cell.strip() for cell in cells]
            elif cells and names is not None:
                if len(cells) > len(names):
                    raise MechsafetyError(
                        f"{where}: {len(cells)} values under {len(names)} columns",
                        expected="one each",
                        hint='put a prompt with commas into double quotes: "..."',
                    )
                if any(re.match(r'\s+"', cell) for cell in cells):
                    raise MechsafetyError(f"{where}: a space before a double quote", expected='"...","..."')
                yield line, dict(zip(names, cells, strict=False))
            line = reader.line_num + 1
    except csv.Error as error:
        raise MechsafetyError(f"{path}, line {line}: malformed CSV ({error})", expected=shape) from None


def _checked(row: Any, keys: Sequence[str], where: str) -> dict[str, Any]:
    """A row, checked for prompts under ``keys``; labels become text, an edition a number, messages a `Conversation`."""
    if not isinstance(row, dict):
        raise MechsafetyError(f"{where}: a JSON {type(row).__name__}", expected=_shape(keys))
    for key in keys:
        if key not in row:
            raise MechsafetyError(f"{where}: the key {key!r} is missing", expected=_shape(keys))
        if not isinstance(row[key], str | list):
            found = type(row[key]).__name__
            raise MechsafetyError(
                f"{where}: the prompt under {key!r} is a JSON {found}", expected="text or a list of messages"
            )
    prompts = {key: prompt_text(row[key], f"{where}: the prompt under {key!r}") for key in keys}
    labels = {name: _label(row[name], name, where) for name in LABELS if name in row}
    return row | prompts | labels | ({EDITION: _edition(row[EDITION], where)} if EDITION in row else {})


def _edition(value: Any, where: str) -> int:
    """An edition as a whole number, at least 1; ``null`` or an empty cell of a table means the first edition."""
    if value in (None, ""):
        return 1
    number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise MechsafetyError(f"{where}: {EDITION!r} is {value!r}", expected="a whole number, at least 1")
    return number


def _label(value: Any, name: str, where: str) -> str:
    """A topic or split as text: ``null`` becomes empty; a number becomes text, because some data sets number topics."""
    if value is None:
        return ""
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    raise MechsafetyError(f"{where}: {name!r} is a JSON {type(value).__name__}", expected="text, or null for none")


def _shape(keys: Sequence[str]) -> str:
    return "{" + ", ".join(f'"{key}": "..."' for key in keys) + "}"


READERS: dict[str, Callable[[str, str, str], Rows]] = {".jsonl": _json_lines, ".json": _json_array, ".csv": _csv}
