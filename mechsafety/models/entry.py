"""One check of what functions are given as a model."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from mechsafety.errors import MechsafetyError

P = ParamSpec("P")
T = TypeVar("T")


def takes_model(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: whatever the function annotates as a `LensModel` is one, or a MechsafetyError of one line says so.

    It stands above all other decorators, `classmethod` excepted.
    """
    parameters = inspect.signature(function).parameters.values()
    places = [(k, p.name) for k, p in enumerate(parameters) if _names_model(p.annotation)]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for place, name in places:
            if place < len(args):
                check_lens(args[place], name)
            elif name in kwargs:
                check_lens(kwargs[name], name)
        return function(*args, **kwargs)

    return checked


def _names_model(annotation: Any) -> bool:
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    return name == "LensModel"


def check_lens(given: Any, name: str = "model") -> None:
    """Refuse what is no `LensModel`.

    Args:
        given: What a function got.
        name: Of the parameter.

    Raises:
        MechsafetyError: What was given, and the call that makes a LensModel of it.
    """
    from mechsafety.models.backend import is_wrapped
    from mechsafety.models.lens import LensModel

    if isinstance(given, LensModel):
        return
    what, call = f"a {type(given).__name__}", "mechsafety.load_model(...)"
    if isinstance(given, str):
        what, call = f"the string {given!r}", f"mechsafety.load_model({given!r})"
    elif is_wrapped(given):
        call = "mechsafety.load_model(bridge)"
    elif hasattr(given, "get_output_embeddings"):
        call = "mechsafety.load_model((model, tokenizer))"
    elif isinstance(given, tuple):
        call = "mechsafety.load_model(pair)"
    raise MechsafetyError(f"{what} was given as {name}", expected="a LensModel", cure=f"pass {call}")
