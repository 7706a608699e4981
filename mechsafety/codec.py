"""Frozen dataclasses as JSON with named tensors beside it, and back: their own annotations say how.

A dataclass is written as an object of its fields and a tuple as a list. A mapping is an object where its keys are text,
otherwise a list of pairs. A tensor, or an array in its place, is ``{"tensor": name}``. A number that JSON lacks is
``{"float": "nan"}``. A prompt of several turns is a list of chat messages. Where an annotation allows several
dataclasses, ``"type"`` names the one. A field annotated ``Any`` holds plain JSON data.

A file may lack a field that has a default. The metadata of a field change how it is written:

- ``{"name": "from"}`` gives it another name, ``{"name": "held_out.ci"}`` one in an object of its own.
- `INLINE` puts the fields of a dataclass beside those of its owner.
- `SPARSE` leaves it out where it is empty.
- `REQUIRED` asks files for it although it has a default.
"""

import functools
import json
import math
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from mechsafety.conversation import Conversation, Messages
from mechsafety.errors import MechsafetyError

if TYPE_CHECKING:
    from torch import Tensor

NESTED = 64  # deepest nesting of lists and objects in a file; files of this package have a dozen levels
INLINE, SPARSE, REQUIRED = {"inline": True}, {"sparse": True}, {"required": True}
NAMES = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}
SEVERAL_TURNS = (Conversation, Messages)
NO_NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True, slots=True)
class Range:
    """What a number in a file may be; NaN always, which a file may write as null."""

    low: float
    high: float
    words: str


Amount = Annotated[int, Range(0, math.inf, "at least 0")]
"""A whole number, at least 0."""
OrNan = Annotated[float, Range(-math.inf, math.inf, "a number")]
"""A number; NaN where it was not measured."""
PValue = Annotated[float, Range(0, 1, "a number from 0 to 1")]
"""A p; NaN where it was not measured."""


def read_json(text: str | bytes, **options: Any) -> Any:
    """What JSON text says, as `json.loads` reads it; every text that cannot be used is refused in the same way.

    Args:
        text: The text, or its bytes in UTF-8.
        options: Of `json.loads`.

    Raises:
        json.JSONDecodeError: It is no JSON, it nests lists and objects more than 64 deep, or it holds a whole number of
            more digits than Python reads (4300).

    Example:
        >>> read_json('{"a": [1, 2.5, null]}')
        {'a': [1, 2.5, None]}
        >>> read_json("[" * 99 + "]" * 99)
        Traceback (most recent call last):
        json.decoder.JSONDecodeError: nested more than 64 deep: line 1 column 1 (char 0)
    """
    text = text if isinstance(text, str) else text.decode()
    return _read(lambda: json.loads(text, **options), text, 0)


def read_json_at(text: str, at: int) -> tuple[Any, int]:
    """The value that begins at a place of a text, and where it ends; otherwise as `read_json`."""
    end = at

    def value() -> Any:
        nonlocal end
        found, end = json.JSONDecoder().raw_decode(text, at)
        return found

    return _read(value, text, at), end


def _read(read: Callable[[], Any], text: str, at: int) -> Any:
    deep = f"nested more than {NESTED} deep"
    try:
        found = read()
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError(deep, text, at) from None
    except ValueError:  # Python's limit for the digits of whole numbers
        raise json.JSONDecodeError("a whole number of too many digits", text, at) from None
    level, depth = [found], 0
    while level := [one for part in level for one in _parts(part) if isinstance(one, dict | list)]:
        depth += 1
        if depth >= NESTED:
            raise json.JSONDecodeError(deep, text, at)
    return found


def _parts(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def parse(text: str, form: str, oldest: int, newest: int) -> dict[str, Any]:
    """The object in the text of a file.

    Args:
        text: Of the file.
        form: What the file's field ``format`` must be, such as ``mechsafety.circuit``.
        oldest: The oldest version that can be read.
        newest: The newest.

    Raises:
        MechsafetyError: Not JSON, another format, or another version.
    """
    what = form.rpartition(".")[2]
    try:
        data = read_json(text)
    except json.JSONDecodeError as error:
        raise MechsafetyError(f"malformed JSON ({error})", expected=f"a {what}.json") from None
    if not isinstance(data, dict) or data.get("format") != form:
        raise MechsafetyError(f"not a {what} file", expected=f'"format": "{form}"')
    version = data.get("version")
    if type(version) is not int or not oldest <= version <= newest:
        newer = type(version) is int and version > newest
        raise MechsafetyError(
            f"{what} format version {version!r}",
            expected=f"{newest}" if oldest == newest else f"{oldest} to {newest}",
            hint="pip install --upgrade mechsafety" if newer else f"make the {what} again",
            page="a-file-of-another-version",
        )
    return data


def encode(kind: Any, value: Any, where: str = "", tensors: "dict[str, Tensor] | None" = None) -> Any:
    """JSON data of a value.

    Args:
        kind: The value's annotation.
        value: The value.
        where: Its place, which names its tensors and stands in errors.
        tensors: Where its tensors go.

    Raises:
        MechsafetyError: It holds something else than its annotation says, or than a file can hold.

    Example:
        >>> encode(tuple[float, ...], (0.5, math.nan))
        [0.5, {'float': 'nan'}]
    """
    kinds = _members(kind)
    if isinstance(value, Conversation) and any(kind in SEVERAL_TURNS for kind in kinds):
        return value.messages
    if value is None or isinstance(value, str | int | float):
        infinite = isinstance(value, float) and not math.isfinite(value)
        written = {"float": str(value)} if infinite else value
        decode(kind, written, where)  # nothing is written that could not be read
        return written
    if isinstance(value, list | tuple):
        inner = next((get_args(one) for one in kinds if get_origin(one) is tuple), (Any, ...))
        return [encode(*part, tensors) for part in _items(inner, value, where)]
    if isinstance(value, Mapping):
        inner = next((get_args(one) for one in kinds if _is_mapping(one)), (str, Any))
        if inner[0] is not str:
            pairs = [_items(inner, pair, f"{where}[{k}]") for k, pair in enumerate(value.items())]
            return [[encode(*part, tensors) for part in pair] for pair in pairs]
        if all(isinstance(key, str) for key in value):
            return {key: encode(inner[1], item, _at(where, key), tensors) for key, item in value.items()}
    if type(value) in kinds and is_dataclass(value):
        row = _encode_fields(value, where, tensors)
        return {"type": type(value).__name__, **row} if sum(map(is_dataclass, kinds)) > 1 else row
    if tensors is not None and hasattr(value, "__array__") and any(map(_is_tensor, kinds)):
        import torch

        # a copy, because safetensors refuses tensors that share memory
        tensors[where] = torch.as_tensor(value).detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": where}
    free = "a number, text, None, or lists and mappings (by text) of them"
    asked = " or ".join(getattr(one, "__name__", str(one)) for one in kinds)
    raise MechsafetyError(
        f"{where or 'the value'} is a {type(value).__name__}",
        expected=free if kind in (Any, object) else f"{asked}, as annotated",
    )


def decode(kind: Any, value: Any, where: str = "", tensors: "Mapping[str, Tensor] | None" = None) -> Any:
    """The value that `encode` made JSON data of.

    Args:
        kind: The value's annotation.
        value: What a file holds, which anybody may have edited.
        where: Its place in the file.
        tensors: By name.

    Raises:
        MechsafetyError: A part has another type, is missing or unknown; the message names its place.

    Example:
        >>> decode(tuple[float, ...], [0.5, "x"], "effects")
        Traceback (most recent call last):
        mechsafety.errors.MechsafetyError: effects[1]: 'x'; expected a number
    """
    if value is None and types.NoneType in _members(kind):
        return None
    *others, kind = [one for one in _members(kind) if one is not types.NoneType]
    named: dict[str, Any] = {
        one.__name__: one for one in (*others, kind) if isinstance(one, type) and is_dataclass(one)
    }
    if len(named) > 1 and isinstance(value, dict):
        name = decode(Literal[tuple(named)], value.get("type"), _at(where, "type"))
        return decode(named[name], {key: item for key, item in value.items() if key != "type"}, where, tensors)
    for other in others:
        with suppress(MechsafetyError):
            return decode(other, value, where, tensors)
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if kind in (Any, object):
        return _plain(value)
    if kind in SEVERAL_TURNS:
        if not isinstance(value, list):
            raise _error(where, repr(value), "text or a list of messages")
        return Conversation(value, where or "the prompt")
    if origin is Annotated:
        return _in_range(inner[0], inner[1], value, where)
    if origin is tuple:
        return _decode_tuple(inner, value, where, tensors)
    if _is_mapping(kind) and inner[0] is str:
        return {key: decode(inner[1], item, _at(where, key), tensors) for key, item in _object(value, where).items()}
    if _is_mapping(kind):
        return dict(_decode_tuple(inner, row, f"{where}[{k}]", tensors) for k, row in enumerate(_list(value, where)))
    if is_dataclass(kind):
        return _decode_fields(kind, value, where, tensors)
    if _is_tensor(kind):
        name = value.get("tensor") if isinstance(value, dict) else None
        if not isinstance(name, str):
            raise _error(where, repr(value), "a tensor")
        if tensors is None or name not in tensors:
            raise _error(where, f"no tensor {name!r}", "it beside the JSON")
        found = tensors[name]
        if not _fits(found, kind):
            dtype = str(found.dtype).removeprefix("torch.")
            raise _error(where, f"a tensor of {dtype} with shape {tuple(found.shape)}", kind.__name__)
        return found
    if origin is Literal or issubclass(kind, Enum):
        known = inner if origin is Literal else tuple(one.value for one in kind)
        if value not in known:
            raise _error(where, repr(value), f"one of {known}")
        return value if origin is Literal else kind(value)
    return _leaf(kind, value, where)


def no_number(value: Any) -> float | None:
    """NaN or an infinity, if a file's value stands for one.

    Example:
        >>> no_number({"float": "-inf"}), no_number({"float": 2})
        (-inf, None)
    """
    return NO_NUMBERS.get(str(value["float"])) if isinstance(value, Mapping) and value.keys() == {"float"} else None


def _encode_fields(value: Any, where: str, tensors: "dict[str, Tensor] | None") -> dict[str, Any]:
    row: dict[str, Any] = {}
    kind: Any = type(value)
    for one in fields(kind):
        item, hint = getattr(value, one.name), _hints(kind)[one.name]
        if one.metadata.get("sparse") and item in (None, (), "", {}):
            continue
        if one.metadata.get("inline"):
            row |= encode(hint, item, where, tensors)
            continue
        *groups, name = _name(one).split(".")
        place = row
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = encode(hint, item, _at(where, _name(one)), tensors)
    return row


def _decode_fields(kind: Any, value: Any, where: str, tensors: "Mapping[str, Tensor] | None") -> Any:
    row, given = dict(_object(value, where)), {}
    known: dict[str, Field[Any]] = {}
    for one in fields(kind):
        if one.metadata.get("inline"):
            hint = _hints(kind)[one.name]
            inner = {_name(field): row.pop(_name(field)) for field in fields(hint) if _name(field) in row}
            given[one.name] = decode(hint, inner, where, tensors)
        else:
            known[_name(one)] = one
    for group in dict.fromkeys(name.partition(".")[0] for name in known if "." in name):
        if group not in row:
            raise _misfit(kind, where, group, "field {!r} is missing")
        inner = _object(row.pop(group), _at(where, group))
        row |= {f"{group}.{name}": item for name, item in inner.items()}
    for name in sorted(set(known) - set(row)):
        one = known[name]
        if one.metadata.get("required") or (one.default is MISSING and one.default_factory is MISSING):
            raise _misfit(kind, where, name, "field {!r} is missing")
    for name in sorted(set(row) - set(known)):
        raise _misfit(kind, where, name, "unknown field {!r}")
    for name, item in row.items():
        given[known[name].name] = decode(_hints(kind)[known[name].name], item, _at(where, name), tensors)
    try:
        return kind(**given)
    except MechsafetyError as error:
        raise _error(where, error.problem, error.expected, error.hint) from None


def _decode_tuple(inner: tuple[Any, ...], value: Any, where: str, tensors: "Mapping[str, Tensor] | None") -> Any:
    rows = _list(value, where)
    if inner == (float, float) and len(rows) == 2:
        # an interval: null is an end without a bound
        rows = [{"float": end} if row is None else row for row, end in zip(rows, ("-inf", "inf"), strict=True)]
    return tuple(decode(*part, tensors) for part in _items(inner, rows, where))


def _in_range(kind: Any, limits: Range, value: Any, where: str) -> Any:
    number = math.nan if value is None and kind is float else _leaf(kind, value, where)
    if number < limits.low or number > limits.high:
        raise _error(where, str(number), limits.words)
    return number


def _leaf(kind: Any, value: Any, where: str) -> Any:
    if kind is float and no_number(value) is not None:
        return no_number(value)
    if not isinstance(value, (int, float) if kind is float else kind) or (isinstance(value, bool) and kind is not bool):
        raise _error(where, repr(value), NAMES[kind])
    if kind is float and not _finite(value):
        raise _error(where, repr(value), "a finite number")
    return value


def _finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number that no float can hold
        return False


def _plain(value: Any) -> Any:
    """What a field of any kind holds: JSON data, with numbers that JSON lacks."""
    if no_number(value) is not None:
        return no_number(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@functools.cache
def _members(kind: Any) -> tuple[Any, ...]:
    """The kinds that an annotation allows."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    try:
        return get_type_hints(kind, include_extras=True)
    except NameError:  # a module that does without torch names its tensors for type checkers alone
        from torch import Tensor

        return get_type_hints(kind, localns={"Tensor": Tensor}, include_extras=True)


def _items(inner: tuple[Any, ...], items: Sequence[Any], where: str) -> list[tuple[Any, Any, str]]:
    """Kind, value and place of each of a tuple's items."""
    kinds = (inner[0],) * len(items) if inner[-1] is Ellipsis else inner
    if len(kinds) != len(items):
        raise _error(where, f"{len(items)} values", f"{len(kinds)}")
    return [(kind, item, f"{where}[{k}]") for k, (kind, item) in enumerate(zip(kinds, items, strict=True))]


def _is_mapping(kind: Any) -> bool:
    origin = get_origin(kind)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _is_tensor(kind: Any) -> bool:
    """Whether an annotation is a tensor, or jaxtyping's of one; without torch no annotation is."""
    kind, torch = getattr(kind, "array_type", kind), sys.modules.get("torch")
    return torch is not None and isinstance(kind, type) and issubclass(kind, torch.Tensor)


def _fits(tensor: "Tensor", kind: Any) -> bool:
    """Whether a tensor has the dtype and the number of axes of its annotation.

    ``isinstance`` would also compare the sizes of axes with those of other tensors of the caller.
    """
    dtypes, axes = getattr(kind, "dtypes", None), getattr(kind, "dim_str", "...").split()
    named = str(tensor.dtype).removeprefix("torch.") in dtypes if isinstance(dtypes, list | tuple) else True
    if any(axis.startswith(("*", "...")) for axis in axes):
        return named and tensor.ndim >= len(axes) - 1
    return named and tensor.ndim == len(axes)


def _name(field: "Field[Any]") -> str:
    return str(field.metadata.get("name", field.name))


def _at(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _error(where: str, problem: str, expected: str, hint: str = "") -> MechsafetyError:
    return MechsafetyError(f"{where}: {problem}" if where else problem, expected=expected, hint=hint)


def _misfit(kind: Any, where: str, name: str, problem: str) -> MechsafetyError:
    place, _, name = _at(where, name).rpartition(".")
    return _error(place, problem.format(name), f"the fields of {kind.__name__}")


def _list(value: Any, where: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise _error(where, repr(value), "a list")
    return value


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _error(where, repr(value), "an object")
    return value
