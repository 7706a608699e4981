"""Steps of a study, kept in a folder and not done again, so that a stopped study goes on."""

import json
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from mechsafety.codec import decode, encode
from mechsafety.output import output_file


class Steps:
    """The folder of finished steps; delete a step's file or folder there to do it again.

    Args:
        folder: Made if it is missing.
        made_of: What the numbers depend on, such as sizes and hashes of weights and data. A folder with steps of
            something else is refused, since old and new ones would be mixed.
        besides: As for `check_store`.

    Raises:
        SystemExit: The folder holds steps of something else.
    """

    def __init__(self, folder: Path, made_of: Mapping[str, Any] | None = None, besides: Collection[str] = ()) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if made_of is not None:
            check_store(folder, made_of, besides)

    def json(self, name: str, compute: Callable[[], Any]) -> Any:
        """A step whose outcome is plain data."""
        return self.with_seconds(name, compute)[0]

    def with_seconds(self, name: str, compute: Callable[[], Any]) -> tuple[Any, float]:
        """A step whose outcome is plain data, and the seconds that it took when it was done."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            found, seconds = self.measured(name, compute)
            _write(path, {"seconds": seconds, "found": found})
        stored = json.loads(path.read_text())
        return stored["found"], stored["seconds"]

    def result(self, name: str, kind: Any, compute: Callable[[], Any]) -> Any:
        """A step whose outcome is a result, or a circuit."""
        path = self.folder / name
        if not path.exists():
            found, seconds = self.measured(name, compute)
            found.save(path)
            _write(self.folder / f"{name}-seconds.json", seconds)
        return kind.load(path)

    def value(self, name: str, kind: Any, compute: Callable[[], Any]) -> Any:
        """A step whose outcome is an annotated dataclass that is no result, such as a stage of a map."""
        from safetensors.torch import load_file, save

        path, beside = self.folder / f"{name}.json", self.folder / f"{name}.safetensors"
        if not path.is_file():
            found, seconds = self.measured(name, compute)
            tensors: dict[str, Any] = {}
            row = encode(kind, found, "", tensors)
            if tensors:
                _write_bytes(beside, save(tensors))
            _write(path, {"seconds": seconds, "found": row})
        row = json.loads(path.read_text())["found"]
        return decode(kind, row, name, load_file(beside) if beside.is_file() else {})

    def seconds(self, name: str) -> float | None:
        """How long a result's step took when it was done."""
        path = self.folder / f"{name}-seconds.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def measured(self, name: str, compute: Callable[[], Any]) -> tuple[Any, float]:
        """A step's outcome, and the seconds that it took."""
        start = time.perf_counter()
        found = compute()
        seconds = round(time.perf_counter() - start, 1)
        print(f"{name}: {seconds} s", flush=True)
        return found, seconds


def check_store(folder: Path, made_of: Mapping[str, Any], besides: Collection[str] = ()) -> None:
    """Refuse a folder with steps of something else; of an empty one, note what its steps will depend on.

    Args:
        folder: Where the steps are.
        made_of: As for `Steps`.
        besides: Files that an empty folder may hold.

    Raises:
        SystemExit: It holds steps of something else, or of an unknown run.
    """
    store, now = folder / "store.json", json.loads(json.dumps(made_of, allow_nan=False))
    if not store.is_file():
        if any(entry.name not in besides for entry in folder.iterdir()):
            raise SystemExit(f"{folder} holds steps of an unknown run; delete it or choose another --work")
        _write(store, now)
    known = json.loads(store.read_text())
    other = [key for key in {**now, **known} if now.get(key) != known.get(key)]
    if other:
        what = " and ".join(other)
        raise SystemExit(f"{folder} holds steps of another {what}; delete it or choose another --work")


def _write(path: Path, data: Any) -> None:
    _write_bytes(path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())


def _write_bytes(path: Path, data: bytes) -> None:
    with output_file(path) as scratch:
        scratch.write_bytes(data)
