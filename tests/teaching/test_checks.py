"""Every check lets the right answer pass, and names each mistake that it knows."""

import ast
import re

import pytest
import torch
from exercises import EXERCISES as FOLDER
from exercises import function_of, is_tagged, read, sources, stub

from mechsafety.neurons import random_masks
from mechsafety.sites import Site
from mechsafety.teaching import CheckFailed, checks
from mechsafety.teaching.check import wrong_answers
from mechsafety.teaching.checks.detective import MODELS, _planted, effect_of


def exercises():
    """The cell of every exercise, after the imports of its notebook."""
    found = {}
    for source in sources():
        cells = read(source)
        imports = [
            ast.unparse(node)
            for cell in cells
            if cell.cell_type == "code"
            for node in ast.parse(cell.source).body
            if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        for cell in cells:
            if is_tagged(cell, "exercise"):
                found[function_of(cell).name] = ("\n".join(imports), cell)
    return found


PAGE = (FOLDER.parents[1] / "docs" / "exercises.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"-?\d+\.\d+")
EXERCISES = exercises()
EVERY = list(checks.__all__)
MISTAKES = [
    pytest.param(name, mistake, id=f"{name}-{mistake.name.replace(' ', '_')}")
    for name in EVERY
    for mistake in getattr(checks, name).mistakes
]


def function(name, text):
    """A function from its source, as a student's notebook defines it."""
    names: dict = {}
    exec(compile(f"{EXERCISES[name][0]}\n{text}", f"{name}.py", "exec"), names)
    return names[name]


def test_every_exercise_has_a_check_and_every_check_an_exercise():
    assert list(EXERCISES) == EVERY  # in the order of the course
    assert all(getattr(checks, name).name == name for name in EVERY)


@pytest.mark.parametrize("name", EVERY)
def test_the_answer_passes(name):
    check = getattr(checks, name)
    passed = check(function(name, EXERCISES[name][1].source))
    assert passed.cases == len(check.cases()) >= 3 and passed.mistakes == tuple(m.name for m in check.mistakes)
    assert repr(passed).startswith(f"passed: {name} (random inputs: ")


def pattern_by_hand(q, k):
    """Loops, and a large negative number in place of minus infinity."""
    heads, batch, width, size = q.shape
    out = torch.zeros(heads, batch, width, width)
    for head in range(heads):
        keys = k[head * len(k) // heads]
        scores = q[head] @ keys.transpose(1, 2) / size**0.5
        out[head] = (scores - 1e9 * torch.ones(width, width).triu(1)).softmax(-1)
    return out


def scores_by_hand(model, metric, base, source, layer, head):
    """A hook that writes into the activation that it is given."""
    found = {}
    site = Site("z", layer)

    def edit(own):
        own[:, :, head] = found[site][:, :, head]
        return own

    with model.hooks([(site, lambda own: found.update({site: own.clone()}))]):
        model.logits(source)
    with model.hooks([(site, edit)]):
        return metric(model.logits(base))


def precision_by_hand(scores, is_true):
    """A loop over ranks that returns a number of Python's."""
    hits, found = 0, []
    for rank, part in enumerate(sorted(range(len(scores)), key=lambda k: -abs(float(scores[k]))), 1):
        if is_true[part]:
            hits += 1
            found.append(hits / rank)
    return sum(found) / len(found)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("attention_pattern", pattern_by_hand),
        ("patched_scores", scores_by_hand),
        ("average_precision", precision_by_hand),
        (
            "head_outputs",
            lambda z, weight: torch.stack(
                [
                    z[:, :, head] @ weight[:, head * z.shape[3] : (head + 1) * z.shape[3]].T
                    for head in range(z.shape[2])
                ],
                dim=2,
            ),
        ),
        ("change_scores", lambda base, aligned, mask: (base - aligned)[:, mask].pow(2).mean(1).sqrt()),
        ("remove_direction", lambda x, r: x - torch.outer((x @ r).flatten(), r).reshape(x.shape) / (r @ r)),
        ("control_p", lambda observed, controls: (1 + sum(c >= observed for c in controls)) / (1 + len(controls))),
        (
            "circuit_scores",
            lambda found, true: [
                h := len(found & true) / len(found),
                r := len(found & true) / len(true),
                2 / (1 / h + 1 / r),
            ],
        ),
    ],
)
def test_other_ways_to_write_the_answer_pass(name, answer):
    assert getattr(checks, name)(answer).name == name


@pytest.mark.parametrize("name", EVERY)
def test_the_stub_is_not_written_yet(name):
    with pytest.raises(CheckFailed, match=f"^{name} is not written yet$"):
        getattr(checks, name)(function(name, stub(EXERCISES[name][1])))


@pytest.mark.parametrize(("name", "mistake"), MISTAKES)
def test_a_mistake_is_named(name, mistake):
    with pytest.raises(CheckFailed) as error:
        getattr(checks, name)(mistake.function)
    assert str(error.value) == f"{name}: this looks like {mistake.name}. {mistake.advice}"


@pytest.mark.parametrize(("name", "mistake"), MISTAKES)
def test_a_mistake_is_far_from_right_on_some_input(name, mistake):
    """Not by rounding: another shape, or a hundredth of the largest number and more."""

    check = getattr(checks, name)
    distances = []
    for case, found in zip(check.cases(), wrong_answers(check, mistake), strict=True):
        right = case.expected.double()
        same = found.shape == right.shape
        far = (found.double() - right).abs().nan_to_num(torch.inf).max() / right.abs().max() if same else torch.inf
        distances.append(float(far))
    assert max(distances) > 0.01


@pytest.mark.parametrize("name", EVERY)
def test_a_check_has_three_mistakes_and_advice_in_whole_sentences(name):
    mistakes = getattr(checks, name).mistakes
    assert len(mistakes) >= 3 and len({mistake.name for mistake in mistakes}) == len(mistakes)
    assert all(mistake.advice[0].isupper() and mistake.advice.endswith(".") for mistake in mistakes)
    assert not any(mistake.name.endswith(".") for mistake in mistakes)


@pytest.mark.parametrize("name", EVERY)
def test_inputs_are_of_several_sizes_and_the_same_every_time(name):
    cases = getattr(checks, name).cases
    sizes = [case.sizes for case in cases()]
    if "[" in sizes[0]:
        assert len(set(sizes)) == len(sizes)
    before, state = [case.expected.clone() for case in cases()], torch.get_rng_state()
    cases.cache_clear()
    assert all(torch.equal(then, case.expected) for then, case in zip(before, cases(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers go on as they were


# --- what the references of single checks promise ---------------------------------------------------------------------


def test_a_matched_control_is_like_those_of_the_package():
    for case in checks.matched_control.cases():
        chosen = case.inputs["chosen"]
        for control in (case.expected, random_masks(chosen, 1)[0]):
            assert torch.equal(control.sum(1), chosen.sum(1)) and not bool((control & chosen).any())


@pytest.mark.parametrize("number", range(len(MODELS)))
def test_the_largest_joint_excess_is_that_of_planted_backups(number):
    case = checks.joint_excess.cases()[number]
    nodes = case.inputs["nodes"]
    row, column = divmod(int(case.expected.argmax()), len(nodes))
    assert {nodes[row], nodes[column]} in [set(group) for group in _planted(number).truth.backups]


def test_an_effect_of_any_number_of_nodes_is_measured():
    truth = _planted(0).truth
    assert effect_of(0)(truth.nodes) == pytest.approx(1, abs=0.1) and effect_of(0)([]) == pytest.approx(0, abs=1e-5)


def test_the_page_quotes_what_a_check_says():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    *lines, last = ast.parse(code).body
    names: dict = {}
    exec(compile(ast.Module(lines, []), "exercises.md", "exec"), names)
    assert f"`{eval(ast.unparse(last), names)!r}`" in PAGE

    def stub(kept, full, empty):
        raise NotImplementedError

    wrong = [
        stub,
        lambda kept, full, empty: ((kept - empty) / (full - empty)).mean(dim=1),
        lambda kept, full, empty: (kept.mean() - empty.mean()) / (full.mean() - empty.mean()),
        lambda kept, full, empty: (kept.mean(dim=1) - empty.mean()) / full.mean(),
        lambda kept, full, empty: kept.sub_(empty).mean(dim=1) / (full - empty).mean(),
    ]
    quoted = re.findall(r"^\| (?:is|makes|has|changes) .+ \| `(faithfulness.+)` \|$", PAGE, flags=re.M)
    for function, text in zip(wrong, quoted, strict=True):
        with pytest.raises(CheckFailed) as error:
            checks.faithfulness(function)
        # the last digits are not the same on every processor
        assert NUMBER.sub("#", str(error.value)) == NUMBER.sub("#", text)
        said, printed = (list(map(float, NUMBER.findall(one))) for one in (str(error.value), text))
        assert said == pytest.approx(printed, rel=1e-3)


def test_a_reply_that_never_ends_is_stopped():
    def endless(base, aligned, chosen, prompt, length, end):
        reply = []
        while end not in reply:
            ids = [*prompt, *reply]
            reply.append(int(base(ids, chosen, aligned(ids)[1])[0].argmax()))
        return reply

    with pytest.raises(CheckFailed, match=r"a model was given \d+ tokens; a reply ends after `length` tokens or with"):
        checks.dynamic_reply(endless)


def test_one_reply_ends_before_it_is_full():
    cases = checks.dynamic_reply.cases()
    assert any(len(case.expected) < case.inputs["length"] for case in cases)
    assert any(len(case.expected) == case.inputs["length"] for case in cases)
