"""What every result carries and can do: provenance, a table, one way to save and load."""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Edge, Node
from mechsafety.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

FORMAT_VERSION = 1
FILES = ("result.json", "tensors.safetensors")
PACKAGES = ("mechsafety", "torch", "transformers", "transformer_lens")


@dataclasses.dataclass(frozen=True, slots=True)
class Provenance:
    """Where a result comes from: everything needed to get it again, and nothing that changes between runs.

    Attributes:
        model: Name the model was loaded under.
        weights_sha256: Hash of all weights, the adapter's effect included.
        dtype: Data type of the weights.
        device: Device type of the run (``cpu``, ``cuda``).
        template_sha256: Hash of the chat template.
        seed: Seed of everything random in the analysis.
        options: The analysis' own options.
        versions: Versions of the packages that the numbers depend on.
        template_options: What the chat template was given besides the prompts.
    """

    model: str
    weights_sha256: str
    dtype: str
    device: str
    template_sha256: str
    seed: int | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    template_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping; without template options where none were given."""
        row = dataclasses.asdict(self)
        return row if self.template_options else {k: v for k, v in row.items() if k != "template_options"}

    def difference(self, other: "Provenance") -> tuple[str, str, str] | None:
        """What of two models is not the same, and what each has; None where prompts give both the same numbers."""
        pairs = {
            "weights": (self.weights_sha256[:12], other.weights_sha256[:12]),
            "chat template": (self.template_sha256[:12], other.template_sha256[:12]),
            "template options": (json.dumps(dict(self.template_options)), json.dumps(dict(other.template_options))),
        }
        return next(((what, mine, theirs) for what, (mine, theirs) in pairs.items() if mine != theirs), None)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`; unknown keys are refused by name."""
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(data) - names)
        if unknown:
            raise MechsafetyError(f"provenance has the unknown fields {unknown}", expected=f"some of {sorted(names)}")
        return cls(**data)


def bars(frame: "pd.DataFrame", x: str, y: str, label: str) -> "go.Figure":
    """Bar chart of the 30 rows with the largest absolute ``y``; with whiskers where there is an interval."""
    import plotly.express as px

    top = frame.reindex(frame[y].abs().sort_values(ascending=False, kind="stable").index).head(30)
    whiskers = {}
    if "ci_low" in top:
        top = top.assign(up=top.ci_high - top[y], down=top[y] - top.ci_low)
        whiskers = {"error_y": "up", "error_y_minus": "down"}
    return px.bar(top, x=x, y=y, category_orders={x: list(top[x])}, labels={x: "", y: label}, **whiskers)


def package_versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


class Result:
    """Base of the frozen result dataclasses: ``save``, ``load`` and a table.

    A result is saved as a folder with ``result.json`` (everything but tensors) and ``tensors.safetensors``.
    Fields may be tensors, numbers, strings, None, tuples or mappings of those, and other such dataclasses.
    """

    __slots__ = ()
    TYPES: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Result.TYPES[cls.__name__] = cls

    def to_dataframe(self) -> "pd.DataFrame":
        """The result as a table, one row a part."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result to the folder ``path``, whole or not at all.

        Raises:
            MechsafetyError: ``path`` exists and is not a saved result.
        """
        from safetensors.torch import save_file

        tensors: dict[str, Any] = {}
        body = _encode(self, "", tensors)
        with fresh_folder(path, FILES) as scratch:
            text = json.dumps({"format": "mechsafety.result", "version": FORMAT_VERSION, "result": body}, indent=1)
            (scratch / "result.json").write_text(text + "\n", encoding="utf-8")
            if tensors:
                save_file(tensors, scratch / "tensors.safetensors")
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a result that `save` wrote.

        Raises:
            MechsafetyError: Not a saved result (or a damaged one), of a newer format, or of another type.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        source, stored = Path(path) / "result.json", Path(path) / "tensors.safetensors"
        if not source.is_file():
            raise _not_saved(path)
        try:
            data = json.loads(source.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise _not_saved(path, f" (malformed JSON ({error.msg}))") from None
        if not isinstance(data, dict) or "result" not in data:
            raise _not_saved(path, " (no result in it)")
        if data.get("version", 0) > FORMAT_VERSION:
            raise MechsafetyError(
                f"{path} has format version {data['version']}",
                expected=f"at most {FORMAT_VERSION}",
                cure="pip install --upgrade mechsafety",
            )
        try:
            result = _decode(data["result"], load_file(stored) if stored.is_file() else {})
        except (KeyError, TypeError, SafetensorError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise _not_saved(path, f" ({reason})") from error
        if not isinstance(result, cls):
            raise MechsafetyError(f"{path} holds a {type(result).__name__}", expected=cls.__name__)
        return result


class fresh_folder:
    """Context manager: a scratch folder that becomes ``path`` on success and vanishes on failure.

    An existing ``path`` is replaced only if it holds nothing but files of the given names, so that nobody's own file is
    lost; it is moved aside first, so that the old result stays if anything goes wrong.

    Raises:
        MechsafetyError: ``path`` holds something else.
    """

    def __init__(self, path: str | os.PathLike[str], names: Collection[str]) -> None:
        self.path = Path(path).resolve()
        self.names = names
        check_output_folder(self.path, names)

    def __enter__(self) -> Path:
        self.made = [folder for folder in self.path.parents if not folder.exists()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.scratch = Path(tempfile.mkdtemp(prefix=f".{self.path.name}-", dir=self.path.parent))
        self.scratch.chmod(0o755)
        return self.scratch

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        aside = self.scratch.with_name(self.scratch.name + "-old")
        try:
            if kind is None:
                check_output_folder(self.path, self.names)
                if self.path.exists():
                    os.replace(self.path, aside)
                os.replace(self.scratch, self.path)
        finally:
            if aside.exists() and not self.path.exists():
                os.replace(aside, self.path)
            for rest in (aside, self.scratch):
                shutil.rmtree(rest, ignore_errors=True)
            for folder in self.made if not self.path.exists() else []:
                if not any(folder.iterdir()):
                    folder.rmdir()


def check_output_folder(path: Path, names: Collection[str]) -> None:
    """Refuse an output folder that holds anything but files of an earlier result of ours.

    Args:
        path: The folder.
        names: What our results are called.

    Raises:
        MechsafetyError: ``path`` is a file, or a folder with other things in it.
    """
    if path.exists() and not path.is_dir():
        raise MechsafetyError(f"{path.name!r} is a file", expected="a folder to write into", cure="choose another name")
    strange = sorted(entry.name for entry in path.iterdir() if entry.name not in names) if path.is_dir() else []
    if strange:
        raise MechsafetyError(
            f"the output folder {path.name!r} holds something else ({', '.join(strange[:3])})",
            expected="a new or empty folder, or one with an earlier result and nothing more",
            cure="choose another folder",
        )


def _not_saved(path: str | os.PathLike[str], reason: str = "") -> MechsafetyError:
    return MechsafetyError(f"{path} is not a saved result{reason}", expected="a folder that .save(path) wrote")


def _encode(value: Any, where: str, tensors: dict[str, Any]) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        # a copy, because safetensors refuses tensors that share memory
        tensors[where] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": where}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        Result.TYPES.setdefault(type(value).__name__, type(value))
        fields = {
            field.name: _encode(getattr(value, field.name), f"{where}.{field.name}".strip("."), tensors)
            for field in dataclasses.fields(value)
        }
        return {"type": type(value).__name__, "fields": fields}
    if isinstance(value, tuple | list):
        return [_encode(item, f"{where}.{index}", tensors) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {"map": {key: _encode(item, f"{where}.{key}", tensors) for key, item in value.items()}}
    return value


def _decode(value: Any, tensors: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item, tensors) for item in value)
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "map" in value:
        return {key: _decode(item, tensors) for key, item in value["map"].items()}
    if value.get("type") not in Result.TYPES:
        raise MechsafetyError(f"unknown result type {value.get('type')!r}", cure="import mechsafety before loading")
    fields = {key: _decode(item, tensors) for key, item in value["fields"].items()}
    return Result.TYPES[value["type"]](**fields)


# what results are made of; registered here so that they load in a process that has saved none
for _part in (Provenance, Node, Edge, Site):
    Result.TYPES[_part.__name__] = _part
