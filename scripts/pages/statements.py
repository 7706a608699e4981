"""Sentences of a results page that may stand there only while the numbers they name carry them.

A page is drawn from its stored JSON. What it claims is a `Sentence`: a text with the numbers in it, and a condition on
these same numbers. Where the condition no longer holds, the other wording is drawn, or drawing fails.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from mechsafety.intervals import wilson_interval
from pages.records import PageError, Record, Stored


@dataclass(frozen=True, slots=True)
class Rate:
    """Hits of a number of trials.

    Its text is the share with the counts and the Wilson interval. The format is that of the shares; ``short`` gives the
    share alone.
    """

    hits: int
    n: int

    @classmethod
    def of(cls, pair: Any) -> "Rate":
        """From JSON, where it is a list of two numbers."""
        return cls(*pair)

    @property
    def value(self) -> float:
        return self.hits / self.n

    @property
    def low(self) -> float:
        return wilson_interval(self.hits, self.n)[0]

    @property
    def high(self) -> float:
        return wilson_interval(self.hits, self.n)[1]

    def __format__(self, spec: str) -> str:
        if spec == "short":
            return f"{self.value:.0%}"
        kind = spec or ".0%"
        return f"{self.value:{kind}} ({self.hits} of {self.n}; {self.low:{kind}} to {self.high:{kind}})"


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its interval; the format is that of each number."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, row: Record, name: str, low: str = "", high: str = "") -> "Interval":
        """From a row of a stored table: ``name``, ``name_low`` and ``name_high`` unless named otherwise."""
        return cls(row[name], row[low or f"{name}_low"], row[high or f"{name}_high"])

    def __format__(self, spec: str) -> str:
        kind = spec or ".2f"
        return f"{self.value:{kind}} ({self.low:{kind}} to {self.high:{kind}})"

    def holds(self, value: float) -> bool:
        """Whether the interval holds a value."""
        return self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Sentence:
    """What a page says, and when it may say it.

    Attributes:
        text: The sentence, a format string; its fields are names of ``numbers``.
        numbers: Where each number stands: its path in the JSON (as for `look_up`), or a function of the JSON.
        holds: The condition, a function of some of the numbers by their names. Each of them stands in the text, so that
            a reader sees what carries the sentence.
        otherwise: The wording where the condition does not hold, or another sentence; None where nothing else can be
            said and drawing the page must fail.
    """

    text: str
    numbers: Mapping[str, str | Callable[[Any], Any]]
    holds: Callable[..., bool]
    otherwise: "str | Sentence | None" = None

    def __post_init__(self) -> None:
        fields, needed = fields_of(self.text), set(inspect.signature(self.holds).parameters)
        unnamed = sorted((needed - fields) | (fields - set(self.numbers)) | (set(self.numbers) - fields))
        if unnamed or not needed:
            what = f"{', '.join(unnamed)} not both stored and named" if unnamed else "a condition on no number"
            raise PageError(f"{self.text!r}: {what}")
        if isinstance(self.otherwise, str) and fields_of(self.otherwise) != fields:
            raise PageError(f"{self.otherwise!r} names other numbers than {self.text!r}")

    def values(self, record: Record) -> dict[str, Any]:
        """The numbers, by name."""
        return {
            name: found(record) if callable(found) else look_up(record, found) for name, found in self.numbers.items()
        }

    def carried(self, values: Mapping[str, Any]) -> bool:
        """Whether the numbers carry the sentence."""
        return bool(self.holds(**{name: values[name] for name in inspect.signature(self.holds).parameters}))


def say(record: Record, sentence: Sentence) -> str:
    """The sentence, if its numbers carry it; else its other wording.

    Raises:
        PageError: They do not, and there is no other wording.
    """
    values = sentence.values(record)
    if sentence.carried(values):
        return sentence.text.format(**values)
    if sentence.otherwise is None:
        numbers = ", ".join(f"{name} = {value}" for name, value in values.items())
        raise PageError(f"no longer carried by its numbers ({numbers}): {sentence.text!r}")
    if isinstance(sentence.otherwise, Sentence):
        return say(record, sentence.otherwise)
    return sentence.otherwise.format(**values)


def fields_of(text: str) -> set[str]:
    """Names of the fields of a format string.

    Example:
        >>> sorted(fields_of("{share:.0%} of {n.value}"))
        ['n', 'share']
    """
    return {name.split(".")[0].split("[")[0] for _, name, _, _ in Formatter().parse(text) if name}


def look_up(record: Any, path: str) -> Any:
    """A number of a stored JSON; keys are parted by ``/``, and ``key=value,key=value`` takes a row of a table.

    Example:
        >>> look_up({"curves": [{"share": 0.05, "c": 0.2}, {"share": 0.1, "c": 0.4}]}, "curves/share=0.1/c")
        0.4

    Raises:
        PageError: Nothing stands there, or more than one row.
    """
    found = record
    for part in path.split("/"):
        if isinstance(found, list) and "=" in part:
            wanted = dict(pair.split("=", 1) for pair in re.split(r",(?=[\w ]+=)", part))
            rows = [row for row in found if all(str(row.get(key)) == value for key, value in wanted.items())]
            if len(rows) != 1:
                raise PageError(f"{path!r}: {len(rows)} rows are {part!r}")
            found = rows[0]
        elif isinstance(found, list) and part.lstrip("-").isdigit() and -len(found) <= int(part) < len(found):
            found = found[int(part)]
        elif isinstance(found, Stored) or (isinstance(found, Mapping) and part in found):
            found = found[part]
        else:
            raise PageError(f"nothing stands at {part!r} of {path!r}")
    return found
