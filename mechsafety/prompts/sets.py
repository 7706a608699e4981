"""Single prompts: readers that name the faulty line, the built-in sets, and public benchmarks by hub id."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mechsafety.errors import MechsafetyError, first_line

TEXT_COLUMNS = ("instruction", "prompt", "goal", "Goal", "behavior", "Behavior", "text")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request with its topic and its split (``train``, ``validation`` or ``test``; splits never share a topic)."""

    text: str
    topic: str = ""
    split: str = ""


def read_jsonl(path: str | os.PathLike[str], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Read a JSON-lines file whose every object holds non-empty strings under ``keys``.

    Raises:
        MechsafetyError: The file is missing or empty, or a line (named) is malformed, lacks a key or is blank there.
    """
    source = Path(path)
    if not source.is_file():
        raise MechsafetyError(f"no such file: {path}", expected=f"a .jsonl file with {_shape(keys)} a line")
    rows = []
    try:
        # no splitlines(): JSON strings may hold other line breaks, such as U+2028
        lines = source.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise MechsafetyError(f"{path} is not UTF-8 text ({error.reason})", expected="JSON lines") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(_parse(line, keys, f"{path}, line {number}"))
    if not rows:
        raise MechsafetyError(f"{path} holds no prompts", expected=f"{_shape(keys)} a line")
    return rows


def builtin_prompts(name: str, split: str | None = None) -> list[Prompt]:
    """The project's own single prompts: ``"borderline"`` (scary but harmless) or ``"plain"`` (ordinary harmless).

    Raises:
        MechsafetyError: No such set.

    Example:
        >>> all(prompt.split == "test" for prompt in builtin_prompts("borderline", split="test"))
        True
    """
    if name not in ("borderline", "plain"):
        raise MechsafetyError(f"no built-in prompt set is called {name!r}", expected="'borderline' or 'plain'")
    rows = read_jsonl(data_file(name), ["prompt"])
    prompts = [Prompt(row["prompt"], row.get("topic", ""), row.get("split", "")) for row in rows]
    return [prompt for prompt in prompts if split in (None, prompt.split)]


def data_file(name: str) -> Path:
    """Path of a packaged prompt file."""
    return Path(str(resources.files("mechsafety.prompts") / "data" / f"{name}.jsonl"))


def load_instructions(name_or_path: str, *, split: str = "train", config: str | None = None) -> list[str]:
    """Instructions of a local ``.jsonl``/``.csv``/``.parquet`` file or of a data set on the Hugging Face hub.

    The text column is the first of ``instruction, prompt, goal, behavior, text`` that exists.

    Raises:
        MechsafetyError: The file or data set cannot be read, or it has no such column.
    """
    import pandas as pd

    path = Path(name_or_path)
    readers: dict[str, Callable[[Path], Any]] = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
    if path.suffix == ".jsonl":
        frame = pd.DataFrame(read_jsonl(path, []))
    elif path.is_file() and path.suffix in readers:
        try:
            frame = readers[path.suffix](path)
        except (OSError, ValueError) as error:  # pandas' and pyarrow's errors are ValueErrors
            reason = first_line(error)
            raise MechsafetyError(
                f"cannot read {name_or_path} ({reason})", expected=f"a {path.suffix} file with a text column"
            ) from error
    else:
        frame = _from_hub(name_or_path, split, config)
    column = next((name for name in TEXT_COLUMNS if name in frame.columns), None)
    if column is None:
        raise MechsafetyError(
            f"{name_or_path} has the columns {list(frame.columns)}", expected=f"one of {list(TEXT_COLUMNS)}"
        )
    return [text.strip() for text in frame[column].dropna().astype(str) if text.strip()]


def _from_hub(name: str, split: str, config: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split).to_pandas()
    except Exception as error:  # the hub client raises many types; the user needs one line
        reason = first_line(error)
        raise MechsafetyError(
            f"cannot read the data set {name!r} ({reason})",
            expected="a hub id that can be reached, or a local .jsonl, .csv or .parquet file",
        ) from error


def _parse(line: str, keys: Sequence[str], where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise MechsafetyError(f"{where}: malformed JSON ({error.msg})", expected=_shape(keys)) from None
    if not isinstance(row, dict):
        raise MechsafetyError(f"{where}: a JSON {type(row).__name__}", expected=_shape(keys))
    for key in keys:
        if key not in row:
            raise MechsafetyError(f"{where}: the key {key!r} is missing", expected=_shape(keys))
        if not isinstance(row[key], str):
            found = type(row[key]).__name__
            raise MechsafetyError(f"{where}: the prompt under {key!r} is a JSON {found}", expected="text")
        if not row[key].strip():
            raise MechsafetyError(f"{where}: the prompt under {key!r} is empty", expected="text")
    return row


def _shape(keys: Sequence[str]) -> str:
    return "{" + ", ".join(f'"{key}": "..."' for key in keys) + "}"
