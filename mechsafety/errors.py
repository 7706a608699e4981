"""The one exception of this package, and its subclass for models that do not refuse."""

import difflib
import re
from collections.abc import Collection, Iterable

LONGEST = 1000  # characters of each part of a message, which may quote a file
# control characters, line breaks, halves of characters, and marks that reverse what follows them on a terminal
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class MechsafetyError(ValueError):
    """Bad input: one clear line that says what was given, what was expected, and what fixes it.

    A message may quote a file, a prompt or a token. Control characters in it are written as escapes, and each part ends
    after 1000 characters.

    Args:
        problem: What was given and why it cannot be used.
        expected: What would have been accepted.
        hint: The call, command or edit that fixes it.
        page: Anchor in ``docs/errors.md`` where causes and remedies are explained, for errors that need more than a
            line. A traceback then names the page below the message; the message itself stays one line.

    Example:
        >>> str(MechsafetyError("dtype 'int3' is unknown", expected="float32 or bfloat16", hint="pass dtype='float32'"))
        "dtype 'int3' is unknown; expected float32 or bfloat16; pass dtype='float32'"
    """

    def __init__(self, problem: str, *, expected: str = "", hint: str = "", page: str = "") -> None:
        self.problem = one_line(problem)
        self.expected = one_line(expected)
        self.hint = one_line(hint)
        self.page = page
        parts = [self.problem, f"expected {self.expected}" if expected else "", self.hint]
        super().__init__("; ".join(part for part in parts if part))
        if page:
            self.add_note(f"causes and remedies: docs/errors.md#{page}")


def one_line(text: str) -> str:
    r"""A text that a terminal shows as one line of a readable length, whatever it quotes.

    Example:
        >>> one_line("no such file: 'a\nb'") == r"no such file: 'a\nb'"
        True
        >>> one_line("\x1b[2J"), len(one_line("x" * 5000))
        ('\\x1b[2J', 1000)
    """
    seen = _UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
    return seen if len(seen) <= LONGEST else seen[: LONGEST - 3] + "..."


def first_line(error: BaseException) -> str:
    r"""The first line of another library's error, for a message of one line.

    Example:
        >>> first_line(ValueError("bad\nworse")), first_line(KeyError())
        ('bad', 'KeyError')
    """
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 200 else line[:197] + "..."


def named(names: Iterable[str], noun: str) -> str:
    """The number of names, and the first of them in sorted order.

    Example:
        >>> named(["b", "a"], "tensor"), named(["a"], "tensor")
        ('2 tensors, such as a', '1 tensor, a')
    """
    found = sorted(names)
    return f"1 {noun}, {found[0]}" if len(found) == 1 else f"{len(found)} {noun}s, such as {found[0]}"


def did_you_mean(name: object, known: Collection[str]) -> str:
    """The hint with the known name that is most like a wrong one; empty where none is alike.

    Example:
        >>> did_you_mean("detector", ("detection", "relay"))
        "did you mean 'detection'?"
    """
    lower = {one.lower(): one for one in known}
    alike = difflib.get_close_matches(str(name).lower(), lower, 1, 0.55)
    return f"did you mean '{lower[alike[0]]}'?" if alike else ""


class NoRefusal(MechsafetyError):
    """The model does not refuse, so there is nothing to map (exit code 3 of the command).

    Args:
        problem: The measured rates, in words.
        hint: What could be tried.

    Example:
        >>> ms.map_refusal_circuit(base, made.pairs, metric, options)
        Traceback (most recent call last):
        mechsafety.errors.NoRefusal: the model refuses 0% of ...
    """

    def __init__(self, problem: str, *, expected: str = "", hint: str = "", page: str = "no-refusal") -> None:
        super().__init__(problem, expected=expected, hint=hint, page=page)
