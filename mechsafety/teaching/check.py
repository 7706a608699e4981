"""Checks of exercises: a student's function against what is right, and against mistakes that are easy to make."""

import functools
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from mechsafety.errors import MechsafetyError, first_line

# numbers count as equal up to this share of the largest one: float32 sums depend on their order
TOLERANCE = 1e-4


class CheckFailed(MechsafetyError):
    """A function does not do what its exercise asks; the message says in one line what is wrong.

    Example:
        >>> from mechsafety.teaching import CheckFailed, checks
        >>> try:
        ...     checks.faithfulness(lambda kept, full, empty: kept.mean(1) / full.mean())
        ... except CheckFailed as error:
        ...     print(error)
        faithfulness: this looks like a ratio without the empty circuit. ...
    """

    def _render_traceback_(self) -> list[str]:
        """What notebooks show in place of the traceback, most of which lies in the check."""
        return [f"{type(self).__name__}: {self}"]


@dataclass(frozen=True, slots=True)
class Mistake:
    """A mistake that is easy to make in an exercise.

    Attributes:
        name: What it is called, such as ``transposed weights``.
        advice: A sentence that says what to do instead.
        function: A whole wrong answer: the exercise's function with this mistake.

    Example:
        >>> from mechsafety.teaching import Mistake
        >>> wrong = Mistake("a mean", "Add up the numbers.", lambda x: x.mean())
        >>> wrong.function(torch.arange(3.0))
        tensor(1.)
    """

    name: str
    advice: str
    function: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One input of a check.

    Attributes:
        inputs: Arguments, in order, with the names that the exercise gives them.
        expected: The right answer. A number, or a list of numbers, is stored as a tensor.

    Example:
        >>> from mechsafety.teaching import Case
        >>> case = Case({"x": torch.arange(3.0)}, torch.tensor(3.0))
        >>> case.sizes, case.answer(torch.sum)
        ('x [3]', tensor(3.))
    """

    inputs: Mapping[str, Any]
    expected: Shaped[Tensor, "..."]

    @property
    def sizes(self) -> str:
        """The shapes of the tensors among the inputs."""
        shapes = [f"{name} {list(value.shape)}" for name, value in self.inputs.items() if isinstance(value, Tensor)]
        return ", ".join(shapes) or f"inputs {', '.join(self.inputs)}"

    def answer(self, function: Callable[..., Any]) -> Any:
        """What a function returns for the inputs.

        Raises:
            CheckFailed: The function has changed an input.
        """
        copies = [value.clone() if isinstance(value, Tensor) else value for value in self.inputs.values()]
        out = function(*copies)
        for (name, value), copy in zip(self.inputs.items(), copies, strict=True):
            if isinstance(value, Tensor) and not torch.equal(value, copy):
                raise CheckFailed(
                    f"it changed its input {name} in place", expected="a new tensor", hint=f"begin with {name}.clone()"
                )
        return out


@dataclass(frozen=True, slots=True)
class Passed:
    """A function that did what its exercise asks.

    Attributes:
        name: The exercise.
        cases: Number of inputs on which it was right.
        mistakes: Names of the mistakes that it was compared with.

    Example:
        >>> from mechsafety.teaching import Case, Check, Passed
        >>> total = Check("total", lambda: [Case({"x": torch.arange(3.0)}, torch.tensor(3.0))], ())
        >>> total(torch.sum) == Passed("total", cases=1, mistakes=())
        True
    """

    name: str
    cases: int
    mistakes: tuple[str, ...]

    def __repr__(self) -> str:
        return f"passed: {self.name} (random inputs: {self.cases}, known mistakes ruled out: {len(self.mistakes)})"


@dataclass(frozen=True, slots=True, repr=False)
class Check:
    """The check of one exercise; call it with your function.

    Attributes:
        name: Name of the function that the exercise asks for.
        cases: Builds the random inputs, always the same ones, with the right answers.
        mistakes: Mistakes that it knows by name.

    Example:
        >>> import torch
        >>> case = Case({"x": torch.arange(3.0)}, torch.tensor(3.0))
        >>> total = Check("total", lambda: [case], (Mistake("a mean", "Add up the numbers.", lambda x: x.mean()),))
        >>> total(lambda x: x.sum())
        passed: total (random inputs: 1, known mistakes ruled out: 1)
        >>> total(lambda x: x.sum() / 3)
        Traceback (most recent call last):
        mechsafety.teaching.check.CheckFailed: total: this looks like a mean. Add up the numbers.
        >>> total(lambda x: x[1:])
        Traceback (most recent call last):
        mechsafety.teaching.check.CheckFailed: total: a result of shape [2] for x [3]; expected the shape []
    """

    name: str
    cases: Callable[[], Sequence[Case]]
    mistakes: tuple[Mistake, ...]

    def __repr__(self) -> str:
        return f"Check({self.name}: call it with your function)"

    def __call__(self, function: Callable[..., Any]) -> Passed:
        """Run a function on all inputs.

        Args:
            function: The function that the exercise asks for.

        Raises:
            CheckFailed: The function is not written yet, raises an error, changes an input, or gives a wrong answer.
                The message names the mistake if the answer is that of a known one.
        """
        cases = self.cases()
        answers = [self._answer(function, case) for case in cases]
        faults = [fault(answer, case.expected) for answer, case in zip(answers, cases, strict=True)]
        if not any(faults):
            return Passed(self.name, len(cases), tuple(mistake.name for mistake in self.mistakes))
        for mistake in self.mistakes:
            wrong = wrong_answers(self, mistake)
            if not any(fault(answer, other) for answer, other in zip(answers, wrong, strict=True)):
                raise CheckFailed(f"{self.name}: this looks like {mistake.name}. {mistake.advice}")
        case, found = next((case, found) for case, found in zip(cases, faults, strict=True) if found)
        problem, expected = found
        raise CheckFailed(f"{self.name}: {problem} for {case.sizes}", expected=expected)

    def _answer(self, function: Callable[..., Any], case: Case) -> Any:
        """What the student's function returns; every error becomes one line."""
        try:
            return case.answer(function)
        except NotImplementedError:
            raise CheckFailed(f"{self.name} is not written yet") from None
        except CheckFailed as error:
            raise CheckFailed(f"{self.name}: {error}") from None
        except Exception as error:
            raised = f"{self.name} raised {type(error).__name__}: {first_line(error)}"
            raise CheckFailed(raised, hint=f"{_line(function, error)}with {case.sizes}") from error


@functools.cache
def wrong_answers(check: Check, mistake: Mistake) -> list[Tensor]:
    """What a mistake gives on the inputs of a check, which are always the same."""
    return [as_tensor(case.answer(mistake.function)) for case in check.cases()]


def _line(function: Callable[..., Any], error: Exception) -> str:
    """The last line of the student's own code that an error went through; empty if that is not known."""
    file = getattr(getattr(function, "__code__", None), "co_filename", "")
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"in your line `{own[-1].line}`, " if own and own[-1].line else ""


def as_tensor(answer: Any) -> Tensor:
    """An answer as a tensor: numbers and lists of numbers become one.

    Raises:
        TypeError, ValueError, RuntimeError: It is no number.
    """
    return answer if isinstance(answer, Tensor) else torch.as_tensor(answer)


def fault(answer: Any, expected: Tensor) -> tuple[str, str] | None:
    """What is wrong with an answer, and what was expected instead; None if nothing is."""
    try:
        found = as_tensor(answer).detach()
    except (TypeError, ValueError, RuntimeError):
        return f"a result of type {type(answer).__name__}", "a tensor" if expected.ndim else "a number"
    if found.shape != expected.shape:
        return f"a result of shape {list(found.shape)}", f"the shape {list(expected.shape)}"
    strict = isinstance(answer, Tensor) and expected.ndim > 0
    if found.is_floating_point() != expected.is_floating_point() or (strict and found.dtype != expected.dtype):
        return f"a result of {found.dtype}", str(expected.dtype)
    same = torch.isclose(
        found.double(), expected.double(), rtol=TOLERANCE, atol=TOLERANCE * _size(expected), equal_nan=True
    )
    if bool(same.all()):
        return None
    place = tuple((~same).nonzero()[0].tolist())
    where = f" at {list(place)}" if place else ""
    return f"{found[place].item():.5g}{where}", f"{expected[place].item():.5g}"


def _size(values: Tensor) -> float:
    """The largest finite number."""
    finite = values[values.isfinite()].double()
    return float(finite.abs().max()) if finite.numel() else 0.0
