"""Chat prompts as text: the one place that renders a chat template."""

import copy
import datetime
import json
from collections.abc import Mapping
from typing import Any

from mechsafety.errors import MechsafetyError, first_line

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# what a template writes as today: a fixed day, or the same seed would give other numbers tomorrow
DATE = datetime.date(2024, 7, 26)
# a marker that no template adds by itself, to find where the instruction stands in the rendered text
_MARK = "\u2042instruction\u2042"
# options that are not template variables of the same name
_SYSTEM, _DATE = "system", "date"


def render(tokenizer: Any, prompt: str, options: Mapping[str, Any]) -> tuple[str, int, int]:
    """One user turn as the chat template writes it, ready for the reply.

    Args:
        tokenizer: Hugging Face's, with a chat template.
        prompt: What the user says.
        options: What `checked_options` returned.

    Returns:
        The text, and where in it the prompt begins and ends (characters), without the white space that the template
        takes from its ends.

    Raises:
        MechsafetyError: A template that is broken, that refuses the prompt, or that rewrites it.
    """
    text, marked = _text(tokenizer, prompt, options), _text(tokenizer, _MARK, options)
    before, mark, after = marked.partition(_MARK)
    start = len(before)
    # what follows the prompt says where it ends, unless the template writes something else behind this prompt
    whole = [text[start : len(text) - len(after)]] if text.endswith(after) else [prompt, prompt.strip()]
    content = next((c for c in whole if text.startswith(c, start) and c.strip() == prompt.strip()), None)
    if not mark or content is None:
        raise MechsafetyError("the chat template rewrites the instruction", expected="a template that quotes it")
    return text, start, start + len(content)


def checked_options(tokenizer: Any, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Template options in the form that provenance keeps.

    Args:
        tokenizer: Hugging Face's, with a chat template.
        options: ``system``: text of a system turn before the prompt; ``date``: what the template writes as today, a
            `datetime.date` or ``"2024-07-26"``; any other name is a variable that the template reads, such as
            ``enable_thinking``.

    Raises:
        MechsafetyError: An option that the template does not read, that JSON cannot hold, or a system text for a
            template without a system turn.
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
    return kept


def tokenizer_copy(tokenizer: Any) -> Any:
    """A tokenizer with special tokens and a chat template of its own, and the same vocabulary.

    The vocabulary is not copied: for 150,000 tokens that takes seconds. Nothing may be added to it.
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
        cure="leave 'system' out of template_options, or begin each prompt with the text",
    )


def _text(tokenizer: Any, prompt: str, options: Mapping[str, Any]) -> str:
    """The rendered text.

    transformers' ``apply_chat_template`` turns functions among its arguments into text, so a template that calls
    ``strftime_now`` could be given no other day: its compiled template is rendered here, with the same variables.
    """
    rest = {name: value for name, value in options.items() if name not in (_SYSTEM, _DATE)}
    day = _day(options[_DATE]) if _DATE in options else DATE
    system = [{"role": "system", "content": options[_SYSTEM]}] if _SYSTEM in options else []
    variables = {
        **{name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "tools": None,
        "documents": None,
        "date_string": day.strftime("%d %b %Y"),
        **rest,
        "strftime_now": day.strftime,
        "messages": [*system, {"role": "user", "content": prompt}],
        "add_generation_prompt": True,
    }
    try:
        return str(_compiled(tokenizer).render(**variables))
    except Exception as error:  # a template may raise anything; the user needs one line
        raise MechsafetyError(
            f"the chat template cannot render a prompt ({first_line(error)})",
            expected="a Jinja template that takes a turn's content as one text",
            cure="pass chat_template='plain' or a template of your own",
        ) from error


def _compiled(tokenizer: Any) -> Any:
    """The chat template in the sandbox of transformers, which keeps compiled templates."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(tokenizer.get_chat_template())


def _variables(tokenizer: Any) -> set[str]:
    """Names of the options that this template knows."""
    from jinja2 import meta, nodes

    _text(tokenizer, _MARK, {})  # a broken template says so here
    tree = _compiled(tokenizer).environment.parse(tokenizer.get_chat_template())
    names = meta.find_undeclared_variables(tree)
    if "date_string" in names or any(node.name == "strftime_now" for node in tree.find_all(nodes.Name)):
        names.add(_DATE)
    return names - {"messages", "add_generation_prompt", *tokenizer.special_tokens_map} | {_SYSTEM}


def _day(date: Any) -> datetime.date:
    try:
        return datetime.date.fromisoformat(date)
    except (TypeError, ValueError):
        raise MechsafetyError(
            f"the template option 'date' is {date!r}", expected="a day such as '2024-07-26'"
        ) from None
