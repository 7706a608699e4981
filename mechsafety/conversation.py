"""Prompts of several turns: a list of chat messages as one value, which is text as well."""

from collections.abc import Mapping, Sequence
from typing import Any

from mechsafety.errors import MechsafetyError

Messages = Sequence[Mapping[str, str]]
"""Chat messages, each with a ``role`` and a ``content``."""
PromptLike = str | Messages
"""A prompt: text, which is one turn of the user; or chat messages that end in the user's turn."""
ROLES = ("system", "user", "assistant")
_MESSAGE = "{'role': ..., 'content': ...}"


class Conversation(str):
    """A prompt of several turns, the last of which is the user's.

    As text it is a transcript with one ``role: content`` line per turn. It can therefore stand wherever a prompt is
    shown, listed or counted. A chat template renders its turns, never the transcript. Two conversations are equal if
    their turns are; no conversation equals a plain text.

    Attributes:
        turns: Role and text of each turn.

    Example:
        >>> system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "How are you?"}
        >>> talk = Conversation([system, user])
        >>> print(talk)
        system: Be brief.
        user: How are you?
        >>> talk.instruction
        'How are you?'
    """

    __slots__ = ("turns",)
    turns: tuple[tuple[str, str], ...]

    def __new__(cls, messages: Messages, where: str = "the prompt") -> "Conversation":
        """Check the messages.

        Args:
            messages: At most one system turn, which comes first, then turns of user and assistant.
            where: Which prompt it is, for errors.

        Raises:
            MechsafetyError: There are no messages; one is not of a role and a text; the system turn is not the first;
                or the last turn is not the user's.
        """
        turns = tuple(_turn(message, f"{where}, message {k}") for k, message in enumerate(messages, 1))
        if not turns:
            raise MechsafetyError(f"{where} is an empty list of messages", expected="at least the user's message")
        late = next((k for k, (role, _) in enumerate(turns, 1) if k > 1 and role == "system"), None)
        if late is not None:
            raise MechsafetyError(
                f"{where}, message {late} is a system turn", expected="a system turn only as the first"
            )
        if turns[-1][0] != "user":
            raise MechsafetyError(
                f"{where} ends in a turn of the {turns[-1][0]}",
                expected="the user's turn at the end, to which the model replies",
            )
        self = super().__new__(cls, "\n".join(f"{role}: {content}" for role, content in turns))
        self.turns = turns
        return self

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns as chat messages."""
        return [{"role": role, "content": content} for role, content in self.turns]

    @property
    def instruction(self) -> str:
        """Text of the last turn."""
        return self.turns[-1][1]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Conversation) and self.turns == other.turns

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__

    def __getnewargs__(self) -> Any:  # for copies and pickles; str's own would hand on the transcript
        return (self.messages,)


def turns_of(prompt: str) -> tuple[tuple[str, str], ...]:
    """Role and text of a prompt's turns; plain text is one turn of the user.

    Example:
        >>> turns_of("How are you?")
        (('user', 'How are you?'),)
    """
    return prompt.turns if isinstance(prompt, Conversation) else (("user", prompt),)


def system_of(prompt: str) -> str | None:
    """Text of a prompt's own system turn; None if it has none."""
    role, content = turns_of(prompt)[0]
    return content if role == "system" else None


def whole_characters(text: str, where: str) -> str:
    """The text, if it has no half of a character (a lone surrogate), which no tokenizer can read.

    Raises:
        MechsafetyError: It has one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start : error.end]
        raise MechsafetyError(f"{where} holds half a character ({half!r})", expected="whole characters") from None
    return text


def _turn(message: Any, where: str) -> tuple[str, str]:
    """Role and text of one message."""
    if not isinstance(message, Mapping):
        raise MechsafetyError(
            f"{where} is of type {type(message).__name__}",
            expected=_MESSAGE,
            hint="a list of texts is several prompts" if isinstance(message, str) else "",
        )
    for key in ("role", "content"):
        if key not in message:
            raise MechsafetyError(f"{where} has no {key!r}", expected=_MESSAGE)
    other = next((key for key in message if key not in ("role", "content")), None)
    if other is not None:
        raise MechsafetyError(f"{where} has the key {other!r}", expected=_MESSAGE)
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise MechsafetyError(f"{where} has the role {role!r}", expected=f"one of {ROLES}")
    if not isinstance(content, str):
        raise MechsafetyError(f"{where} has a content of type {type(content).__name__}", expected="text")
    if role != "system" and not content.strip():  # an empty system turn keeps a template from writing its own
        raise MechsafetyError(f"{where} has no text", expected="text")
    return role, str(whole_characters(content, where))
