"""Chat prompts as text: the one place that renders a chat template."""

import copy
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from mechsafety.conversation import turns_of
from mechsafety.errors import MechsafetyError, first_line

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# the day that a template writes as today; it is fixed, so that the same seed gives the same numbers on every day
DATE = datetime.date(2024, 7, 26)
# a marker that no template adds by itself, to find where the instruction stands in the rendered text
_MARK = "\u2042instruction\u2042"
# options that are not template variables of the same name
_SYSTEM, _DATE, _THINKING = "system", "date", "thinking"
# how a model that thinks before it replies is read: "off" uses the template's own switch, "closed" reads after a
# thinking block that is closed and empty
THINKING = ("off", "closed")
# template variables that are such a switch: the first in Qwen-3 and SmolLM3, the second in Granite and DeepSeek-V3.1
_SWITCHES = ("enable_thinking", "thinking")
# what opens and closes a thinking block
_BLOCKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
# role and text of each turn
Turns = Sequence[tuple[str, str]]


def render(tokenizer: Any, prompt: str, options: Mapping[str, Any]) -> tuple[str, int, int]:
    """A prompt as the chat template writes it, ready for the reply.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        prompt: What the user says, or a `Conversation`. A system turn of its own takes the place of the system text in
            the options.
        options: What `checked_options` returned.

    Returns:
        The text, and where in it the user's last turn begins and ends (characters). White space that the template
        strips from the ends of this turn is not counted.

    Raises:
        MechsafetyError: The template is broken, refuses the prompt or one of its turns, leaves a turn out, or rewrites
            the last one.
    """
    *before, (_, asked) = turns_of(prompt)
    if before and before[0][0] == _SYSTEM:
        options = {**options, _SYSTEM: before.pop(0)[1]}
        _check_system(tokenizer, options)
    text, marked = _text(tokenizer, asked, options, before), _text(tokenizer, _MARK, options, before)
    shown, mark, after = marked.partition(_MARK)
    _check_written(before, shown)
    start = len(shown)
    # the text after the prompt shows where the prompt ends, unless the template writes another text after this prompt
    whole = [text[start : len(text) - len(after)]] if text.endswith(after) else [asked, asked.strip()]
    content = next((c for c in whole if text.startswith(c, start) and c.strip() == asked.strip()), None)
    if not mark or content is None:
        raise MechsafetyError("the chat template rewrites the instruction", expected="a template that quotes it")
    return text, start, start + len(content)


def _check_written(before: Turns, shown: str) -> None:
    """Refuse a template that leaves out earlier turns; what the assistant thought in them may be left out."""
    for role, content in before:
        said = content
        for _, end in _BLOCKS:
            said = said.rpartition(end)[2] if role == "assistant" else said
        if said.strip() not in shown:
            raise MechsafetyError(
                f"the chat template leaves out an earlier turn of the {role}: {content[:40]!r}",
                expected="a template that writes every turn",
            )


def checked_options(tokenizer: Any, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Template options in the form that provenance keeps.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        options: ``system`` is the text of a system turn before the prompt. ``date`` is the day that the template writes
            as today: a `datetime.date` or ``"2024-07-26"``. ``thinking`` is for a template that thinks. ``"off"`` uses
            the template's own switch; ``"closed"`` reads after a closed and empty thinking block. Any other name is a
            variable that the template reads, such as ``enable_thinking``.

    Returns:
        The options. ``thinking`` is added if neither it nor the template's own switch is given and a prompt would
        otherwise end where the model begins to think. The added value is ``"off"`` if the template has a switch,
        otherwise ``"closed"``.

    Raises:
        MechsafetyError: The template does not read an option; JSON cannot hold it; a system text is given for a
            template without a system turn; or ``thinking`` is given for a template that does not think.
    """
    given = dict(options or {})
    if isinstance(given.get(_DATE), datetime.date):
        given[_DATE] = given[_DATE].isoformat()
    try:
        kept: dict[str, Any] = json.loads(json.dumps(given, allow_nan=False))
        json.dumps(kept, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise MechsafetyError(
            f"template options {given!r} ({first_line(error)})", expected="texts, numbers, True, False, lists and dicts"
        ) from None
    known = _variables(tokenizer)
    for name in kept:
        if name not in known:
            raise MechsafetyError(f"the chat template reads no option {name!r}", expected=f"one of {sorted(known)}")
    if _DATE in kept:
        kept[_DATE] = _day(kept[_DATE]).isoformat()
    if _SYSTEM in kept:
        _check_system(tokenizer, kept)
    return _with_thinking(tokenizer, kept)


def check_template(source: str) -> None:
    """Refuse a chat template that no model can use, before there is a tokenizer.

    Args:
        source: A Jinja chat template, or ``"plain"``.

    Raises:
        MechsafetyError: It is not text, it is not Jinja, or it does not read the messages.

    Example:
        >>> check_template("chat.jinja")
        Traceback (most recent call last):
        mechsafety.errors.MechsafetyError: the chat template 'chat.jinja' reads no messages; \
expected a Jinja chat template, or 'plain'; pass the text of a template, not the name of its file
    """
    if not isinstance(source, str):
        raise MechsafetyError(f"a chat template of type {type(source).__name__}", expected="text")
    if source == "plain":
        return
    try:
        names = _names(source)
    except TemplateError as error:
        raise MechsafetyError(
            f"the chat template cannot be read ({first_line(error)})", expected="a Jinja chat template, or 'plain'"
        ) from None
    if "messages" not in names:
        shown = source if len(source) <= 60 else source[:57] + "..."
        raise MechsafetyError(
            f"the chat template {shown!r} reads no messages",
            expected="a Jinja chat template, or 'plain'",
            hint="pass the text of a template, not the name of its file",
        )


def _with_thinking(tokenizer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options, with a default for ``thinking`` if it is not given and a prompt would end in a thinking block.

    Raises:
        MechsafetyError: The template does not offer the given way of reading.
    """
    switch, block, asked = _switch(tokenizer), _block(tokenizer), options.get(_THINKING)
    ways = [*(["off"] if switch else []), *(["closed"] if block else [])]
    own = _THINKING in options and asked not in THINKING and switch == _THINKING  # the template's variable
    if own or (_THINKING not in options and switch in options):
        return options
    if _THINKING not in options:
        text = _text(tokenizer, _MARK, options)
        for way in ways if switch or _opened(text, block) else []:
            read = _text(tokenizer, _MARK, options | {_THINKING: way})
            if not _opened(read, block):
                return options if read == text else options | {_THINKING: way}
        return options
    if switch in options and switch != _THINKING:
        raise MechsafetyError(f"the template options 'thinking' and {switch!r}", expected="one of the two")
    if asked not in ways or _opened(_text(tokenizer, _MARK, options), block):
        raise MechsafetyError(
            f"the template option 'thinking' is {asked!r}", expected=f"one of {ways} of this template"
        )
    return options


def _switch(tokenizer: Any) -> str:
    """Name of the template's variable that switches thinking on and off; empty if it has none."""
    names = _names(tokenizer.get_chat_template())
    return next((name for name in _SWITCHES if name in names), "")


def _block(tokenizer: Any) -> tuple[str, str] | None:
    """The tags that open and close a thinking block of this template; None if it has no such block."""
    source = tokenizer.get_chat_template()
    return next((pair for pair in _BLOCKS if any(tag in source for tag in pair)), None)


def _opened(text: str, block: tuple[str, str] | None) -> bool:
    """Whether a chat prompt ends inside a thinking block."""
    if block is None:
        return False
    reply = text.partition(_MARK)[2]
    return reply.rfind(block[0]) > reply.rfind(block[1])


def _closed(text: str, block: tuple[str, str]) -> str:
    """A chat prompt with a closed and empty thinking block at its end, as Qwen-3's template writes it."""
    start, end = block
    shown = text.rstrip()
    if shown.endswith(end):
        return text
    return f"{shown.removesuffix(start) if shown.endswith(start) else text}{start}\n\n{end}\n\n"


def tokenizer_copy(tokenizer: Any) -> Any:
    """A copy of a tokenizer with special tokens and a chat template of its own, and the same vocabulary.

    The vocabulary is shared, because copying 150,000 tokens takes seconds. No token may be added to it.
    """
    vocabulary = tokenizer.backend_tokenizer
    return copy.deepcopy(tokenizer, {id(vocabulary): vocabulary})


def _check_system(tokenizer: Any, options: Mapping[str, Any]) -> None:
    system = options[_SYSTEM]
    if not isinstance(system, str):
        raise MechsafetyError(f"the template option 'system' is {system!r}", expected="a text")
    plain = _text(tokenizer, _MARK, {name: value for name, value in options.items() if name != _SYSTEM})
    reason = "it leaves the text out"
    try:
        # a template may take a switch such as /no_think from the text, or write the same text by itself
        if _text(tokenizer, _MARK, options) != plain or system.strip() in plain:
            return
    except MechsafetyError as error:
        reason = first_line(error.__cause__ or error)
    raise MechsafetyError(
        f"a system text for a chat template without a system turn ({reason})",
        hint="leave the system text out, or begin the user's turn with it",
    )


def _text(tokenizer: Any, prompt: str, options: Mapping[str, Any], before: Turns = ()) -> str:
    """The rendered text of a user's turn, after the system text of the options and the turns ``before``.

    transformers' ``apply_chat_template`` turns functions among its arguments into text. A template that calls
    ``strftime_now`` could therefore not be given another day. This function renders the compiled template itself, with
    the same variables.
    """
    rest = {name: value for name, value in options.items() if name not in (_SYSTEM, _DATE)}
    thinking = rest.pop(_THINKING) if rest.get(_THINKING) in THINKING else None
    if thinking is not None:
        switch = _switch(tokenizer)
        rest |= {switch: thinking != "off"} if switch else {}
    day = _day(options[_DATE]) if _DATE in options else DATE
    system = [(_SYSTEM, options[_SYSTEM])] if _SYSTEM in options else []
    variables = {
        **{name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "tools": None,
        "documents": None,
        "date_string": day.strftime("%d %b %Y"),
        **rest,
        "strftime_now": day.strftime,
        "messages": [{"role": role, "content": said} for role, said in (*system, *before, ("user", prompt))],
        "add_generation_prompt": True,
    }
    try:
        text = str(_compiled(tokenizer).render(**variables))
    except Exception as error:  # a template may raise anything; the user needs one line
        taken = "turns of these roles, each with its content" if before else "a turn's content"
        raise MechsafetyError(
            f"the chat template cannot render a prompt ({first_line(error)})",
            expected=f"a Jinja template that takes {taken} as one text",
            hint="pass chat_template='plain' or a template of your own",
        ) from error
    block = _block(tokenizer) if thinking == "closed" else None
    return text if block is None else _closed(text, block)


def _compiled(tokenizer: Any) -> Any:
    """The chat template, compiled in transformers' sandbox; transformers keeps compiled templates."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(tokenizer.get_chat_template())


def _variables(tokenizer: Any) -> set[str]:
    """Names of the options that this template knows."""
    _text(tokenizer, _MARK, {})  # a broken template raises its error here
    names = set(_names(tokenizer.get_chat_template()))
    if names & {"date_string", "strftime_now"}:
        names.add(_DATE)
    own = {_SYSTEM} if not _switch(tokenizer) and _block(tokenizer) is None else {_SYSTEM, _THINKING}
    return names - {"messages", "add_generation_prompt", "strftime_now", *tokenizer.special_tokens_map} | own


@functools.cache
def _names(source: str) -> frozenset[str]:
    """The variables that a template reads, and ``strftime_now`` if the template names it anywhere."""
    from jinja2 import meta, nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    tree = _compile_jinja_template(source).environment.parse(source)
    called = {node.name for node in tree.find_all(nodes.Name)} & {"strftime_now"}
    return frozenset(meta.find_undeclared_variables(tree)) | called


def _day(date: Any) -> datetime.date:
    try:
        return datetime.date.fromisoformat(date)
    except (TypeError, ValueError):
        raise MechsafetyError(
            f"the template option 'date' is {date!r}", expected="a day such as '2024-07-26'"
        ) from None
