"""What every result carries and can do: provenance, a table, one way to save and load."""

import base64
import dataclasses
import importlib
import math
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mechsafety.codec import SPARSE, decode, encode, parse
from mechsafety.errors import MechsafetyError, first_line
from mechsafety.output import check_within, json_text, output_folder, write_text, writing

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from torch import Tensor

FORMAT = "mechsafety.result"
FORMAT_VERSION = 3  # 1 and 2 named the type of every part
FILES = ("result.json", "tensors.safetensors")
# endings of pictures, pages and tables, which a folder of a result should not be called by mistake
NO_RESULT = frozenset({".png", ".svg", ".pdf", ".html", ".tex", ".csv", ".jpg", ".jpeg", ".xlsx"})
# why a mark in a figure has no whisker
NO_BOUNDS = "no bounded 95 % interval (one pair, or a gap that cannot be told from 0)"
VISIBLE = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
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

    Example:
        >>> found = ms.activation_patching(model, pairs, metric, nodes=["L0.H1"])
        >>> found.provenance.model, found.provenance.dtype
        ('planted-rmsnorm-4x4-5', 'float32')
        >>> found.provenance.difference(circuit.provenance) is None  # the same weights and chat template
        True
    """

    model: str
    weights_sha256: str
    dtype: str
    device: str
    template_sha256: str
    seed: int | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    template_options: Mapping[str, Any] = dataclasses.field(default_factory=dict, metadata=SPARSE)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping; without template options where none were given."""
        row: dict[str, Any] = encode(type(self), self)
        return row

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
        found: Self = decode(cls, data, "provenance")
        return found


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


# colours of Okabe and Ito 2008, which the common colour-vision deficiencies leave apart
KIND_COLOURS = {"head": "#0072B2", "mlp": "#E69F00", "neuron": "#009E73"}


def bars(frame: "pd.DataFrame", x: str, y: str, label: str, title: str = "") -> "go.Figure":
    """Bar chart of the 30 rows with the largest absolute ``y``; with whiskers where there is an interval.

    An interval without bounds, which no whisker can show, hatches its bar. Where the table has kinds of node, each kind
    has its own colour.
    """
    import plotly.graph_objects as go

    top = frame.sort_values(y, key=abs, ascending=False, kind="stable").head(30)
    kinds = top.kind if "kind" in top else top[x].map(lambda _: "")
    figure = go.Figure()
    for kind in sorted(set(kinds)):
        own = top[kinds == kind]
        options: dict[str, Any] = {"name": kind, "marker_color": KIND_COLOURS.get(kind, KIND_COLOURS["head"])}
        if "ci_low" in own:
            ends = {"array": own.ci_high - own[y], "arrayminus": own[y] - own.ci_low}
            options["error_y"] = {"type": "data", "symmetric": False, "thickness": 1.2, **ends}
            if any(unbounded(own)):
                options["marker_pattern_shape"] = ["/" if here else "" for here in unbounded(own)]
        figure.add_bar(x=own[x], y=own[y], **options)
    lines = [title] if title else []
    if len(top) < len(frame):
        lines.append(f"the {len(top)} of {len(frame)} with the largest values")
    if "ci_low" in top and any(unbounded(top)):
        lines.append(f"hatched: {NO_BOUNDS}")
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=list(top[x]), tickangle=-60)
    figure.update_yaxes(title_text=label)
    figure.update_layout(showlegend=len(set(kinds)) > 1, title={"text": "<br>".join(lines), "font_size": 14})
    return figure


def unbounded(frame: "pd.DataFrame") -> list[bool]:
    """Whether each row's interval (``ci_low``, ``ci_high``) lacks a bound."""
    return [
        not (math.isfinite(low) and math.isfinite(high)) for low, high in zip(frame.ci_low, frame.ci_high, strict=True)
    ]


def visible(token: str) -> str:
    r"""A token with its white space made visible; other control characters become U+FFFD.

    Example:
        >>> visible(" a\n")
        '·a⏎'
    """
    return "".join(VISIBLE.get(char) or ("\ufffd" if ord(char) < 32 or ord(char) == 127 else char) for char in token)


def prompt_column(asked: Sequence[str]) -> "pd.Series[Any]":
    """A result's prompts as a table's column, in which a prompt of several turns keeps its turns."""
    import pandas as pd

    return pd.Series(asked, dtype=object)


def package_versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on, as the imported modules say.

    The list of installed packages may say something else: that of an editable installation keeps the version of the day
    on which it was installed.
    """
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        return "not installed"
    own = getattr(module, "__version__", None)
    if own is not None:
        return str(own)
    # TransformerLens has no such attribute: what is listed in the folder from which the module was imported comes first
    beside = [str(Path(place).parent) for place in module.__path__]
    listed = chain(distributions(name=name, path=beside), distributions(name=name))
    return next((one.version for one in listed), "unknown")


class Result:
    """Base of the frozen result dataclasses: ``save``, ``load`` and a table.

    A result is saved as a folder, with ``result.json`` (everything but tensors) and ``tensors.safetensors``, or as one
    file where the path ends in ``.json``; there the tensors are text (base64 of the same safetensors bytes). Either way
    it is read by its own class: ``PatchMap.load(path)``. What fields may hold: see `mechsafety.codec`. A result that
    could not be loaded again, such as one with a wrong field, is not saved.

    Example:
        >>> found = ms.activation_patching(model, pairs, metric, nodes=["L0.H1"])  # a PatchMap, which is a Result
        >>> path = found.save(folder / "patched.json")
        >>> ms.patching.PatchMap.load(path).to_dataframe().node.tolist()
        ['L0.H1']
    """

    __slots__ = ()

    def to_dataframe(self) -> "pd.DataFrame":
        """The result as a table, one row per part."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result, whole or not at all; folders on the way are made.

        Args:
            path: A folder, or one file where it ends in ``.json``.

        Raises:
            MechsafetyError: ``path`` holds something else, cannot be written to, or is named like a picture or a table;
                or `load` would refuse the result, with the same message.
        """
        if Path(path).suffix == ".json":
            return write_text(path, self.to_json())
        if Path(path).suffix.lower() in NO_RESULT:
            raise MechsafetyError(
                f"a result cannot be saved as {Path(path).name!r}",
                expected="a folder, or a file that ends in .json",
                hint="for pictures see ms.viz and plot(), for tables to_dataframe()",
            )
        data, tensors = _written(self)
        with output_folder(path, FILES) as scratch, writing(path):
            (scratch / FILES[0]).write_text(json_text(data) + "\n", encoding="utf-8", newline="\n")
            if tensors:
                (scratch / FILES[1]).write_bytes(tensors)
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a result that `save` wrote.

        Raises:
            MechsafetyError: Not a saved result (or a damaged one), of another format version, or of another type.
        """
        folder = Path(path).is_dir()
        source = Path(path) / FILES[0] if folder else Path(path)
        if folder:
            check_within(Path(path), source)
        if not source.is_file():
            other = next(iter(sorted(Path(path).glob("*.json"))), None) if folder else None
            hint = "" if other is None else f"{cls.__name__}.load({str(other)!r}) reads the file there"
            raise MechsafetyError(f"no such file: {source}", expected=f"what {cls.__name__}.save wrote", hint=hint)
        tensors = source.with_name(FILES[1])
        if folder:
            check_within(Path(path), tensors)
        try:
            text = source.read_bytes().decode()
            if folder:
                result: Self = _read(cls, text, tensors.read_bytes() if tensors.is_file() else b"")
                return result
            return cls.from_json(text)
        except UnicodeDecodeError:
            raise MechsafetyError(f"{source}: not UTF-8 text", expected=f"what {cls.__name__}.save wrote") from None
        except MechsafetyError as error:
            raise MechsafetyError(f"{path}: {error.problem}", expected=error.expected, hint=error.hint) from None

    def to_json(self) -> str:
        """The text of the one file that holds the result. The same result gives the same bytes."""
        data, tensors = _written(self)
        return json_text(data | ({"tensors": base64.b64encode(tensors).decode()} if tensors else {})) + "\n"

    def check_stored(self) -> None:
        """Refuse what no file of such a result may hold, beyond what its fields' annotations say; for subclasses.

        It is called whenever a result is saved or loaded.

        Raises:
            MechsafetyError: The result cannot be stored.
        """

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverse of `to_json`.

        Raises:
            MechsafetyError: As `load`.
        """
        result: Self = _read(cls, text)
        return result


def _written(result: Result) -> tuple[dict[str, Any], bytes]:
    """A result's JSON data, and the safetensors bytes of its tensors; none where it has none."""
    tensors: dict[str, Tensor] = {}
    kind = type(result)
    body = encode(kind, result, "", tensors)
    decode(kind, body, "", tensors).check_stored()
    data = {"format": FORMAT, "version": FORMAT_VERSION, "type": kind.__name__, "result": body}
    if not tensors:
        return data, b""
    from safetensors.torch import save

    return data, save(tensors)


def _read(kind: Any, text: str, stored: bytes = b"") -> Any:
    """A result of a kind from its JSON text; the tensors are in it where they are not stored beside it."""
    data = parse(text, FORMAT, FORMAT_VERSION, FORMAT_VERSION)
    name = data.get("type")
    if name != kind.__name__:
        raise MechsafetyError(f"a {name}", expected=f"a {kind.__name__}", hint=f"{name}.load reads it")
    if "tensors" in data:
        try:
            stored = base64.b64decode(data["tensors"], validate=True)
        except (TypeError, ValueError):
            raise MechsafetyError("tensors: no base64 text", expected="safetensors bytes as such") from None
    found = decode(kind, data.get("result"), "", _tensors(stored))
    found.check_stored()
    return found


def _tensors(stored: bytes) -> "dict[str, Tensor]":
    if not stored:
        return {}
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(stored)
    except SafetensorError as error:
        raise MechsafetyError(f"damaged tensors ({first_line(error)})", expected="safetensors") from None
