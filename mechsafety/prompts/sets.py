"""Single prompts: the built-in sets, local files, and public benchmarks by hub id."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mechsafety.errors import MechsafetyError, first_line
from mechsafety.prompts.files import READERS, read_jsonl, read_rows

TEXT_COLUMNS = ("instruction", "prompt", "goal", "Goal", "behavior", "Behavior", "text")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request with its topic and its split (``train``, ``validation`` or ``test``; splits never share a topic).

    Example:
        >>> prompt = ms.prompts.builtin_prompts("plain")[0]
        >>> prompt.topic, prompt.split
        ('plain', 'validation')
    """

    text: str
    topic: str = ""
    split: str = ""


def builtin_prompts(name: str, split: str | None = None) -> list[Prompt]:
    """The project's own single prompts: ``"borderline"`` (scary but harmless) or ``"plain"`` (ordinary harmless).

    Raises:
        MechsafetyError: There is no such set.

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
    r"""Instructions of a local ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file or of a data set on the hub.

    The text column is the first of ``instruction, prompt, goal, behavior, text`` that exists.

    Raises:
        MechsafetyError: The file or data set cannot be read, or it has no such column.

    Example:
        >>> path = folder / "mine.csv"
        >>> _ = path.write_text("prompt\nHow do I bake bread?\n")
        >>> ms.prompts.load_instructions(str(path))
        ['How do I bake bread?']
    """
    import pandas as pd

    path = Path(name_or_path)
    if path.suffix.lower() in READERS:
        frame = pd.DataFrame(read_rows(path, []))
    elif path.is_file() and path.suffix == ".parquet":
        try:
            frame = pd.read_parquet(path)
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            reason = first_line(error)
            raise MechsafetyError(
                f"cannot read {name_or_path} ({reason})", expected="a .parquet file with a text column"
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
            expected="a hub id that can be reached, or a local .jsonl, .json, .csv or .parquet file",
        ) from error
