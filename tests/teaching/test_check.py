"""What a check says of answers that are wrong in other ways than its known mistakes."""

import re

import pytest
import torch

from mechsafety.teaching import Case, Check, CheckFailed, Mistake, Passed

X = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
CASES = [Case({"x": X, "scale": 2.0}, 2 * X), Case({"x": X[:1], "scale": 3.0}, 3 * X[:1])]
TWICE = Check("twice", lambda: CASES, (Mistake("a sum", "Multiply.", lambda x, scale: x + scale),))


def said(function, check=TWICE):
    with pytest.raises(CheckFailed) as error:
        check(function)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_right_answer_passes():
    assert TWICE(lambda x, scale: x * scale) == Passed("twice", 2, ("a sum",))
    assert TWICE(lambda x, scale: x * (scale + 1e-6)).cases == 2  # another order of float32 sums


def test_a_known_mistake_is_named():
    assert said(lambda x, scale: scale + x) == "twice: this looks like a sum. Multiply."


def test_a_mistake_on_some_inputs_only_is_not_named():
    text = said(lambda x, scale: x + scale if len(x) > 1 else x)
    assert text == "twice: 3 at [0, 0] for x [2, 3]; expected 2"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (lambda x, scale: None, "twice: a result of type NoneType for x [2, 3]; expected a tensor"),
        (lambda x, scale: "two", "twice: a result of type str for x [2, 3]; expected a tensor"),
        (lambda x, scale: x[0], "twice: a result of shape [3] for x [2, 3]; expected the shape [2, 3]"),
        (
            lambda x, scale: (x * scale).double(),
            "twice: a result of torch.float64 for x [2, 3]; expected torch.float32",
        ),
        (lambda x, scale: (x * scale).long(), "twice: a result of torch.int64 for x [2, 3]; expected torch.float32"),
        (lambda x, scale: x * scale + (x == 5), "twice: 11 at [1, 1] for x [2, 3]; expected 10"),
        (lambda x, scale: x / 0, "twice: inf at [0, 0] for x [2, 3]; expected 2"),
        (lambda x, scale: x * scale * torch.nan, "twice: nan at [0, 0] for x [2, 3]; expected 2"),
    ],
)
def test_other_faults_are_said_in_one_line(answer, text):
    assert said(answer) == text


def test_an_input_that_is_changed_in_place():
    text = said(lambda x, scale: x.mul_(scale))
    assert text == "twice: it changed its input x in place; expected a new tensor; begin with x.clone()"
    assert X[0, 0] == 1  # the check's own tensor is whole


def test_an_error_names_the_students_line():
    text = said(lambda x, scale: x @ x)
    assert re.fullmatch(r"twice raised RuntimeError: .+; in your line `.*x @ x.*`, with x \[2, 3\]", text)
    text = said(torch.Tensor.sum)  # no line of a student's
    assert re.fullmatch(r"twice raised TypeError: .+; with x \[2, 3\]", text)


def test_numbers_and_lists_of_numbers_are_answers():
    total = Check("total", lambda: [Case({"x": X}, torch.tensor(21.0))], ())
    assert total(lambda x: 21.0).cases == total(lambda x: x.double().sum()).cases == 1
    assert said(lambda x: [21.0], total) == "total: a result of shape [1] for x [2, 3]; expected the shape []"
    assert said(lambda x: {}, total) == "total: a result of type dict for x [2, 3]; expected a number"
    row = Check("row", lambda: [Case({"ids": [1]}, torch.tensor([3, 4]))], ())
    assert row(lambda ids: [3, 4]).cases == 1
    assert said(lambda ids: [3, 5], row) == "row: 5 at [1] for inputs ids; expected 4"


def test_a_notebook_shows_the_line_and_no_traceback():
    with pytest.raises(CheckFailed) as error:
        TWICE(lambda x, scale: x)
    assert error.value._render_traceback_() == [f"CheckFailed: {error.value}"]
