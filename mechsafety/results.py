"""What every result carries and can do: provenance, a table, one way to save and load."""

import dataclasses
import importlib
import json
import math
import os
import pkgutil
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from mechsafety.errors import MechsafetyError, first_line
from mechsafety.output import json_text, output_folder, writing

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

FORMAT_VERSION = 2  # 1 wrote numbers that are none (NaN, infinite) as literals that JSON does not know
FILES = ("result.json", "tensors.safetensors")
NO_RESULTS = ("mechsafety.viz", "mechsafety.cli")
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
            "template options": (json_text(self.template_options, None), json_text(other.template_options, None)),
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


@dataclasses.dataclass(frozen=True, slots=True)
class Opener:
    """A reply's first tokens after which a model may be read, and how far refusals and answers part there.

    Attributes:
        opener_ids: The tokens; none for the prompt's end.
        opener: The same as text.
        refusal_tokens: What follows it in refusals and hardly ever in answers.
        auroc: Probability that a refused prompt scores higher than an answered one; None where every prompt was
            refused.
        refused, answered: Numbers of these prompts.
        share: Share of the refusals of harmful prompts that begin with it.
    """

    opener_ids: tuple[int, ...]
    opener: str
    refusal_tokens: tuple[str, ...]
    auroc: float | None
    refused: int
    answered: int
    share: float


def reads_where(metric: Mapping[str, Any]) -> str:
    """Where a stored metric reads a model, in words.

    Example:
        >>> reads_where({"refusal_tokens": [" sorry"], "opener": "I'm"})
        "read after `I'm`: next token ` sorry`"
        >>> reads_where({"refusal_tokens": ["Sorry"]})
        "read at the prompt's end: next token `Sorry`"
    """
    whole, opener = metric.get("whole_texts"), metric.get("opener")
    if whole:
        return "read along whole openers " + ", ".join(f"`{text}`" for text in whole)
    tokens, against = (
        ", ".join(f"`{text}`" for text in metric.get(f"{kind}_tokens") or ()) for kind in ("refusal", "comply")
    )
    where = f"after `{opener}`" if opener else "at the prompt's end"
    return f"read {where}: next token {tokens}" + (f" against {against}" if against else "")


def parting(metric: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each place where a detected metric was tried, and how far refused and answered prompts part there.

    Example:
        >>> parting({"tried": [{"opener": "I'm", "opener_ids": [1], "auroc": 0.98, "refused": 9, "answered": 7}]})
        [("after `I'm`", '0.980 (9 prompts refused, 7 answered)')]
    """
    return [
        (
            f"after `{one['opener']}`" if one["opener_ids"] else "at the prompt's end",
            "unknown: no prompt was answered"
            if one["auroc"] is None
            else f"{one['auroc']:.3f} ({one['refused']} prompts refused, {one['answered']} answered)",
        )
        for one in metric.get("tried") or ()
    ]


def norms_note(provenance: Provenance) -> str:
    """What a result's line says of norms after attention and MLP; empty for a model without any."""
    how = provenance.options.get("block_norms")
    return f", norms after blocks {how}" if how else ""


def bars(frame: "pd.DataFrame", x: str, y: str, label: str) -> "go.Figure":
    """Bar chart of the 30 rows with the largest absolute ``y``; with whiskers where there is an interval."""
    import plotly.express as px

    top = frame.sort_values(y, key=abs, ascending=False, kind="stable").head(30)
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
    Fields may be tensors, numbers, text, None, tuples or mappings (by text) of those, and dataclasses of the same.
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
        """Write the result to the folder ``path``, whole or not at all; folders on the way are made.

        Raises:
            MechsafetyError: ``path`` is no saved result, or cannot be written to, or a field cannot be stored.
        """
        from safetensors.torch import save

        tensors: dict[str, Any] = {}
        body = _encode(self, "", tensors)
        text = json_text({"format": "mechsafety.result", "version": FORMAT_VERSION, "result": body})
        with output_folder(path, FILES) as scratch, writing(path):
            (scratch / "result.json").write_text(text + "\n", encoding="utf-8", newline="\n")
            if tensors:
                (scratch / "tensors.safetensors").write_bytes(save(tensors))
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
        except UnicodeDecodeError:
            raise _not_saved(path, " (not UTF-8 text)") from None
        if not isinstance(data, dict) or "result" not in data:
            raise _not_saved(path, " (no result in it)")
        if not isinstance(data.get("version", 0), int):
            raise _not_saved(path, f" (format version {data['version']!r})")
        if data.get("version", 0) > FORMAT_VERSION:
            raise MechsafetyError(
                f"{path} has format version {data['version']}",
                expected=f"at most {FORMAT_VERSION}",
                hint="pip install --upgrade mechsafety",
            )
        try:
            result = _decode(data["result"], load_file(stored) if stored.is_file() else {})
        except (KeyError, TypeError, AttributeError, SafetensorError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
            raise _not_saved(path, f" ({reason})") from error
        if not isinstance(result, cls):
            raise MechsafetyError(f"{path} holds a {type(result).__name__}", expected=cls.__name__)
        return result


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
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"map": {key: _encode(item, f"{where}.{key}", tensors) for key, item in value.items()}}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(float(value))}
    if value is None or isinstance(value, str | int | float):
        return value
    raise MechsafetyError(
        f"{where} is a {type(value).__name__}", expected="a tensor, number, text, None, or tuples, mappings of them"
    )


def _decode(value: Any, tensors: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item, tensors) for item in value)
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "float" in value:
        return float(value["float"])
    if "map" in value:
        return {key: _decode(item, tensors) for key, item in value["map"].items()}
    kind = _type(value["type"])
    return kind(**{key: _decode(item, tensors) for key, item in value["fields"].items()})


def _type(name: str) -> type:
    """The class of a stored part: one that this process has met, otherwise the package's own of that name."""
    found = Result.TYPES.get(name) or _loaded(name)
    if found is None:
        _import_rooms(importlib.import_module("mechsafety"))
        found = _loaded(name)
    if found is None:
        raise MechsafetyError(
            f"unknown result type {name!r}", expected="one of mechsafety's", hint="import the module that defines it"
        )
    Result.TYPES[name] = found
    return found


def _loaded(name: str) -> type | None:
    """A dataclass of the package by its name, from the modules that are imported."""
    for place, module in list(sys.modules.items()):
        value = vars(module).get(name) if place.startswith("mechsafety.") and not place.startswith(NO_RESULTS) else None
        if isinstance(value, type) and dataclasses.is_dataclass(value):
            return value
    return None


def _import_rooms(package: ModuleType) -> None:
    for entry in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if not entry.name.startswith(NO_RESULTS):
            module = importlib.import_module(entry.name)
            if entry.ispkg:
                _import_rooms(module)
