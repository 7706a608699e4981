"""Checks of the arguments of public functions: models, prompts, texts, counts and options.

A function that users call and that runs a model is marked `public`. Its arguments annotated `LensModel`, `Prompts`,
`Texts`, `Count`, `Amount` or as a `Literal` are checked before anything runs. While it runs, torch's switches are set
as the analyses need them (`mechsafety.settled`). A dataclass of options checks its fields in the same way, with
`check_fields`.
"""

import functools
import inspect
import operator
import types
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from mechsafety.codec import Amount as Amount
from mechsafety.conversation import Conversation, whole_characters
from mechsafety.conversation import PromptLike as PromptLike
from mechsafety.errors import MechsafetyError
from mechsafety.halving import exhausted, out_of_memory
from mechsafety.settled import settled

P = ParamSpec("P")
R = TypeVar("R")

Prompts = Annotated[Sequence[PromptLike], "prompts"]
"""Prompts: a list, tuple, pandas or numpy column, or anything else that yields prompts in an order.

Each is a text (one turn of the user) or a list of chat messages. A checked function gets a `Conversation` for messages.
"""
Texts = Annotated[Sequence[str], "texts"]
"""Texts in the same forms; unlike requests, they may be empty (replies, tokens)."""
Count = Annotated[int, "count"]
"""A whole number, at least 1."""

_KINDS = (Prompts, Texts, Count, Amount)
# classes that functions are given most often, and how they are made; by name, because their modules import this one
_MADE = {
    "PromptPairs": "make them with PromptPairs.from_lists(harmful, harmless)",
    "RefusalLogOdds": "make one with RefusalLogOdds.detect(model, pairs)",
}


def prompt_text(prompt: Any, where: str = "") -> str:
    r"""A prompt, if a chat template and a tokenizer can read it.

    Args:
        prompt: Text, which is one turn of the user; or a list of chat messages.
        where: Which of several prompts it is, for the message. By default it is the only prompt.

    Returns:
        The text; or, for messages of several turns, a `Conversation`. A single message of the user is its text.

    Raises:
        MechsafetyError: It is neither, is blank, or holds half of a character (a lone surrogate); or as `Conversation`.

    Example:
        >>> prompt_text("\ud83d")
        Traceback (most recent call last):
        mechsafety.errors.MechsafetyError: the prompt holds half a character ('\ud83d'); expected whole characters
        >>> prompt_text([{"role": "user", "content": "How are you?"}])
        'How are you?'
    """
    if isinstance(prompt, Conversation):
        return prompt
    if isinstance(prompt, list | tuple) or len(getattr(prompt, "shape", ())) == 1:  # tables keep lists as arrays
        talk = Conversation(list(prompt), where or "the prompt")
        return talk if len(talk.turns) > 1 else talk.instruction
    text = _text(prompt, where, "prompt")
    if not text.strip():
        raise MechsafetyError(f"{where} is empty" if where else "an empty prompt", expected="text")
    return text


def prompt_list(given: Any, name: str = "prompts") -> list[str]:
    """The prompts in the order of their rows.

    Args:
        given: A list, tuple, pandas or numpy column, or anything else that yields prompts in an order. A prompt is a
            text or a list of chat messages.
        name: The parameter, for messages.

    Raises:
        MechsafetyError: ``given`` is a single prompt, a table or something without an order; or one of the prompts is
            refused by `prompt_text`. The message then gives its number.

    Example:
        >>> import pandas
        >>> prompt_list(pandas.Series(["tea", "cake"], index=[1, 0]))
        ['tea', 'cake']
    """
    items = _items(given, "prompt")
    if items and all(isinstance(item, Mapping) for item in items):
        raise MechsafetyError(
            "a single list of messages was given", expected="a list of prompts", hint="write [prompt]"
        )
    return [prompt_text(item, _where(items, k, "prompt", name)) for k, item in enumerate(items)]


def text_list(given: Any, name: str = "texts") -> list[str]:
    """The texts in the order of their rows; unlike prompts, they may be empty.

    Example:
        >>> text_list(("Sure.", ""), "replies")
        ['Sure.', '']
    """
    items = _items(given, "text")
    return [_text(item, _where(items, k, "text", name), "text") for k, item in enumerate(items)]


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """The number, if it is whole and at least ``least``.

    Raises:
        MechsafetyError: The number is not whole, or it is smaller.

    Example:
        >>> whole_number("batch_size", 0)
        Traceback (most recent call last):
        mechsafety.errors.MechsafetyError: batch_size=0; expected at least 1
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise MechsafetyError(f"{name}={value!r}", expected="a whole number")
    if number < least:
        raise MechsafetyError(f"{name}={number}", expected=f"at least {least}")
    return number


def lens_model(given: Any, name: str = "model") -> Any:
    """What was given, if it is a `LensModel`.

    Raises:
        MechsafetyError: It is not. The message names the call that makes a `LensModel` of it.

    Example:
        >>> lens_model("demo")
        Traceback (most recent call last):
        mechsafety.errors.MechsafetyError: model is the string 'demo'; expected a LensModel; pass load_model('demo')
    """
    names = {kind.__name__ for kind in type(given).__mro__}
    if "LensModel" in names:
        return given
    hint = "load_model(...)"
    if isinstance(given, str):
        hint = f"load_model({given!r})"
    elif names & {"TransformerBridge", "HookedTransformer", "tuple"}:
        hint = f"load_model({name})"
    elif names & {"PreTrainedModel", "PeftModel"}:
        hint = f"load_model(({name}, tokenizer))"
    shown = f"the string {given!r}" if isinstance(given, str) else f"of type {type(given).__name__}"
    raise MechsafetyError(f"{name} is {shown}", expected="a LensModel", hint=f"pass {hint}")


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a public function: its arguments are checked by their annotations, and it runs with torch's usual switches.

    Its attribute ``checks`` holds the names of the checked parameters. A value that is the parameter's default is not
    checked. If the function returns a context manager, torch's usual switches hold while it is entered and left, but
    not while the user's code runs inside.

    The metric decides where the model is read. If a `RefusalLogOdds` is among the arguments, every model among them is
    replaced by its `LensModel.reading` after the metric's opener. Tokens and runs that do not end in this opener are
    refused.
    """
    signature = inspect.signature(function)
    models, metrics = (
        [name for name, p in signature.parameters.items() if _mentions(p.annotation, kind)]
        for kind in ("LensModel", "RefusalLogOdds")
    )
    checks = {name: check for name, p in signature.parameters.items() if (check := _check(name, p.annotation))}

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        with settled():
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                return function(*args, **kwargs)  # Python raises its own error for a wrong call
            for name, value in bound.arguments.items():
                if name in checks and value is not signature.parameters[name].default:
                    bound.arguments[name] = checks[name](value)
            for name in metrics:
                metric: Any = bound.arguments.get(name)
                if hasattr(metric, "opener_ids"):
                    _read_after(metric.opener_ids, bound.arguments, models, name)
            try:
                out = function(*bound.args, **bound.kwargs)
            except (RuntimeError, MemoryError) as error:
                if out_of_memory(error):
                    raise exhausted(error) from error
                raise
        return cast(R, _Settled(out)) if isinstance(out, AbstractContextManager) else out

    vars(checked)["checks"] = tuple(checks)
    return checked


def check_fields(options: Any) -> None:
    """Check the fields of a frozen dataclass by their annotations, as `public` checks arguments.

    Raises:
        MechsafetyError: A field is not what its annotation says.
    """
    for name, annotation in get_type_hints(type(options), include_extras=True).items():
        check = _check(name, annotation)
        if check is not None:
            object.__setattr__(options, name, check(getattr(options, name)))


def one_of(name: str, value: Any, known: Sequence[str]) -> Any:
    """The value, if it is one of the known values.

    Raises:
        MechsafetyError: It is not one of them.

    Example:
        >>> one_of("level", "nodes", ("node", "edge"))
        Traceback (most recent call last):
        mechsafety.errors.MechsafetyError: level='nodes'; expected one of ('node', 'edge')
    """
    if value not in known:
        raise MechsafetyError(f"{name}={value!r}", expected=f"one of {tuple(known)}")
    return value


def check_opener(given: Any, opener_ids: tuple[int, ...], what: str) -> None:
    """Refuse tokens, or runs of them, that do not end where a metric reads.

    Raises:
        MechsafetyError: They end in another opener, or in none.

    Example:
        >>> from types import SimpleNamespace
        >>> check_opener(SimpleNamespace(opener_ids=()), (40, 2776), "runs")
        Traceback (most recent call last):
        mechsafety.errors.MechsafetyError: runs made without a reply opener; expected the metric's opener (40, 2776); \
make them with model.reading(metric.opener_ids)
    """
    own = given.opener_ids
    if own != opener_ids:
        made = f"with the reply opener {own}" if own else "without a reply opener"
        raise MechsafetyError(
            f"{what} made {made}",
            expected=f"the metric's opener {opener_ids}" if opener_ids else "none, as the metric has none",
            hint="make them with model.reading(metric.opener_ids)",
        )


def _read_after(opener_ids: tuple[int, ...], arguments: Any, models: Sequence[str], metric: str) -> None:
    """Let a function's models read after an opener, and check the arguments that are tokenized already."""
    for name, value in arguments.items():
        if name in models:
            arguments[name] = value if value is None else value.reading(opener_ids)
        elif name != metric:
            for part in value if isinstance(value, list | tuple) else (value,):
                if hasattr(part, "opener_ids"):
                    check_opener(part, opener_ids, name)


def _mentions(annotation: Any, kind: str) -> bool:
    """Whether an annotation is the class named ``kind``, or allows it among others."""
    return any(kind in (part, getattr(part, "__name__", "")) for part in (annotation, *get_args(annotation)))


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows."""
    union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if union else (annotation,)


def _made(value: Any, name: str, kind: str, hint: str) -> Any:
    """The value, if it is of the class with that name."""
    if value is not None and kind not in {one.__name__ for one in type(value).__mro__}:
        given = type(value).__name__
        if given == "MapOptions":
            hint = "pass options=MapOptions(...)"
        elif kind == "RefusalLogOdds" and callable(value):
            hint = f"analyses take no function of logits; {hint}"
        raise MechsafetyError(f"{name} is of type {given}", expected=kind, hint=hint)
    return value


class _Settled(AbstractContextManager[Any]):
    """A context manager whose beginning and end run under torch's usual switches."""

    def __init__(self, inner: AbstractContextManager[Any]) -> None:
        self._inner = inner

    def __enter__(self) -> Any:
        with settled():
            return self._inner.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        with settled():
            return self._inner.__exit__(*error)


def _check(name: str, annotation: Any) -> Callable[[Any], Any] | None:
    """The check that an annotation demands; None if it demands none.

    If the annotation allows several types, a value of one of the other types passes unchanged.
    """
    asked = (annotation, *get_args(annotation))
    kinds = [kind for kind in asked if kind in _KINDS]
    if _mentions(annotation, "LensModel"):  # by name, because its module imports this one
        optional = type(None) in asked
        return lambda value: value if value is None and optional else lens_model(value, name)
    for kind, hint in _MADE.items():
        if all(
            kind in (part, getattr(part, "__name__", "")) or part is type(None) for part in _alternatives(annotation)
        ):
            return functools.partial(_made, name=name, kind=kind, hint=hint)
    if get_origin(annotation) is Literal:
        return lambda value: one_of(name, value, get_args(annotation))
    if not kinds:
        return None
    readers: dict[Any, Callable[[Any], Any]] = {
        Prompts: functools.partial(prompt_list, name=name),
        Texts: functools.partial(text_list, name=name),
        Count: functools.partial(whole_number, name),
        Amount: functools.partial(whole_number, name, least=0),
    }
    read = readers[kinds[0]]
    if annotation in _KINDS:
        return read
    others = tuple(kind for kind in get_args(annotation) if isinstance(kind, type))
    return lambda value: value if isinstance(value, others) else read(value)


def _items(given: Any, what: str) -> list[Any]:
    if isinstance(given, str | bytes):
        raise MechsafetyError("a single string was given", expected=f"a list of {what}s", hint=f"write [{what}]")
    table = len(getattr(given, "shape", (0,))) != 1
    if table or isinstance(given, Mapping | Set) or not isinstance(given, Iterable):
        raise MechsafetyError(
            f"a {type(given).__name__} was given",
            expected=f"a list of {what}s",
            hint=f"pass one column of it: table[{what!r}]" if table else "",
        )
    return list(given)


def _where(items: Sequence[Any], index: int, what: str, name: str) -> str:
    return f"{what} {index + 1} of {len(items)}" + ("" if name == f"{what}s" else f" in {name}")


def _text(item: Any, where: str, what: str) -> str:
    if not isinstance(item, str):
        kind = type(item).__name__
        hints = {"Prompt": "pass [p.text for p in prompts]", "PromptPair": "pass pairs.harmful or pairs.harmless"}
        shown = repr(item) if item is None or isinstance(item, float) else f"of type {kind}"
        expected = "text or a list of messages" if what == "prompt" else "text"
        raise MechsafetyError(f"{where or f'the {what}'} is {shown}", expected=expected, hint=hints.get(kind, ""))
    return str(whole_characters(item, where or f"the {what}"))
