"""A hash of what a call was given, so that a run folder of other arguments is never taken for this one."""

import functools
import hashlib
import inspect
from collections.abc import Mapping, Set
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

from mechsafety.conversation import Conversation
from mechsafety.errors import MechsafetyError


def identity(value: Any, where: str = "an argument") -> str:
    """SHA-256 of a value's content: equal for equal values in every process, and different for different ones.

    Models count by their weights, chat template and reading; tensors by dtype, shape and bytes; functions by their
    name, their code and what they enclose. An object may say itself what it is made of: ``identity_parts()``.

    Args:
        value: The value.
        where: What it is, for the message.

    Raises:
        MechsafetyError: It holds itself, or something whose content cannot be read.

    Example:
        >>> identity({"k": (1, 2.0)}) == identity({"k": (1, 2.0)}), identity([1]) == identity([1.0])
        (True, False)
    """
    digest = hashlib.sha256()
    _feed(digest, value, where, ())
    return digest.hexdigest()


def _feed(digest: Any, value: Any, where: str, inside: tuple[int, ...]) -> None:
    if id(value) in inside:
        raise MechsafetyError(f"{where} holds itself", expected="values whose content can be read")
    inside = (*inside, id(value))

    def tag(*words: object) -> None:
        digest.update(("\0".join(map(str, words)) + "\1").encode(errors="surrogatepass"))

    def feed(*parts: Any) -> None:
        tag(len(parts))
        for part in parts:
            _feed(digest, part, where, inside)

    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, Conversation):
        tag("conversation")
        feed(*value.turns)
    elif value is None or (isinstance(value, bool | int | float | str | bytes) and not isinstance(value, Enum)):
        tag(kind.__name__, repr(value))
    elif isinstance(value, Enum):
        tag("enum", name, value.name)
    elif hasattr(value, "identity_parts"):
        tag("parts", name)
        feed(*value.identity_parts())
    elif hasattr(value, "__array__") and hasattr(value, "dtype"):
        _feed_array(digest, value, tag)
    elif isinstance(value, Mapping):
        tag("mapping")
        feed(*value.items())
    elif isinstance(value, Set):
        tag("set", *sorted(identity(part, where) for part in value))
    elif isinstance(value, list | tuple | range):
        tag("sequence")
        feed(*value)
    elif isinstance(value, slice):
        tag("slice")
        feed(value.start, value.stop, value.step)
    elif isinstance(value, Path):
        tag("path", value)
    elif isinstance(value, type | BuiltinFunctionType):
        tag("named", value.__module__, value.__qualname__)
    elif is_dataclass(value):
        tag("dataclass", name)
        feed(*((one.name, getattr(value, one.name)) for one in fields(value)))
    elif isinstance(value, CodeType):
        tag("code", value.co_code.hex(), value.co_names)
        feed(*value.co_consts)
    elif isinstance(value, FunctionType):
        own = inspect.unwrap(value)  # what a decorator encloses is the decorator's
        tag("function", own.__module__, own.__qualname__)
        feed(own.__code__, own.__defaults__, own.__kwdefaults__, inspect.getclosurevars(own).nonlocals)
    elif isinstance(value, MethodType):
        tag("method")
        feed(value.__self__, value.__func__.__qualname__)
    elif isinstance(value, functools.partial):
        tag("partial")
        feed(value.func, value.args, value.keywords)
    elif hasattr(value, "state_dict"):
        tag("module", name)
        feed(value.state_dict())
    elif kind.__module__ == "torch":
        tag("torch", repr(value))  # a dtype or device
    elif hasattr(value, "__dict__"):
        tag("object", name)
        feed(vars(value))
    else:
        raise MechsafetyError(
            f"{where} holds a {name}, whose content a run cannot tell from another's",
            expected="prompts, models, numbers, texts, results, or functions of them",
        )


def _feed_array(digest: Any, value: Any, tag: Any) -> None:
    """A tensor or array: dtype, shape and bytes."""
    import torch

    tensor = torch.atleast_1d(torch.as_tensor(value).detach().cpu()).contiguous()
    tag("array", str(value.dtype).removeprefix("torch."), tuple(value.shape))
    if tensor.numel():
        digest.update(tensor.view(torch.uint8).numpy().data)
