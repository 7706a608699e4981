"""The selection rules on constructed scores, and on the published scores of three models."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechsafety.directions.select import (
    conditions,
    cosmic_layers,
    joint_cosine,
    passing,
    select_cosmic,
    select_published,
)

RUNS = ("gemma-2b-it", "qwen-1_8b-chat", "yi-6b-chat")
LATER = "gemma-3-1b-it"


def published_scores(shared_data, name):
    """What a published run says: its own JSON, columns, and scores [3 layer column]."""
    path = shared_data / "direction_runs" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"no {path.name} in the folder with evaluation data")
    run = json.loads(path.read_text())
    columns = sorted({row["position"] for row in run["evaluations"]})
    scores = torch.full((3, run["n_layers"], len(columns)), torch.nan)
    for row in run["evaluations"]:
        values = [row[key] for key in ("refusal_score", "steering_score", "kl_div_score")]
        scores[:, row["layer"], columns.index(row["position"])] = torch.tensor(
            [math.nan if value is None else value for value in values]
        )
    return run, columns, scores


@pytest.mark.parametrize("name", RUNS)
def test_the_published_choice(shared_data, name):
    run, columns, scores = published_scores(shared_data, name)
    layer, column = select_published(*scores, range(run["n_layers"]), run["n_layers"])
    assert {"pos": columns[column], "layer": layer} == run["chosen"]
    # each condition matters: without the depth limit or the KL another candidate would be chosen for some model
    assert (layer, column) != divmod(int(scores[0].nan_to_num(math.inf).argmin()), len(columns)) or name == RUNS[1]


def test_a_later_run_whose_publishers_dropped_the_kl_condition(shared_data):
    run, columns, scores = published_scores(shared_data, LATER)
    layers, n = range(run["n_layers"]), run["n_layers"]
    assert select_published(*scores, layers, n) is None
    assert str(conditions(*scores, layers, n)) == (
        "100 of 130 candidates are below the depth limit, of which induce > 0 leaves 28, KL <= 0.1 5, and both 0"
    )
    layer, column = select_published(*scores, layers, n, max_kl=None)
    assert {"pos": columns[column], "layer": layer} == run["chosen"]
    assert str(conditions(*scores, layers, n, max_kl=None)).endswith("induce > 0 leaves 28; no KL is asked for")
    # what they kept matters: without induce > 0 another candidate would be chosen
    freely = select_published(scores[0], torch.ones_like(scores[1]), scores[2], layers, n, max_kl=None)
    assert freely != (layer, column)


def test_every_published_run_is_tested(shared_data):
    folder = shared_data / "direction_runs"
    if not folder.is_dir():
        pytest.skip("the folder with evaluation data has no direction_runs")
    assert {path.stem for path in folder.glob("*.json")} == {*RUNS, LATER}


GOOD = {"bypass": -5.0, "induce": 1.0, "kl": 0.05}


def grid(**changed):
    """Four layers by two columns, all alike but the candidate (1, 0), which has the best bypass score."""
    scores = {name: torch.full((4, 2), value) for name, value in GOOD.items()}
    scores["bypass"][1, 0] = -9.0
    for name, value in changed.items():
        scores[name][1, 0] = value
    return scores


@pytest.mark.parametrize(
    ("changed", "chosen"),
    [
        ({}, (1, 0)),
        ({"induce": 0.0}, (0, 0)),
        ({"induce": math.nan}, (0, 0)),
        ({"kl": 0.11}, (0, 0)),
        ({"kl": 0.1}, (1, 0)),
        ({"kl": math.nan}, (0, 0)),
        ({"bypass": math.nan}, (0, 0)),
    ],
)
def test_each_condition(changed, chosen):
    assert select_published(**grid(**changed), layers=range(4), n_layers=5) == chosen


def test_a_missing_kl_passes_only_when_asked_for():
    scores = grid(kl=math.nan)
    assert select_published(**scores, layers=range(4), n_layers=5, keep_missing_kl=True) == (1, 0)
    assert select_published(**grid(kl=0.11), layers=range(4), n_layers=5, keep_missing_kl=True) == (0, 0)
    scores["kl"][:] = math.nan
    assert select_published(**scores, layers=range(4), n_layers=5) is None
    assert select_published(**scores, layers=range(4), n_layers=5, max_kl=math.inf) is None
    assert select_published(**scores, layers=range(4), n_layers=5, max_kl=None) == (1, 0)


def test_the_depth_limit_is_a_layer_of_the_model_not_a_row():
    scores = grid()
    assert select_published(**scores, layers=[2, 3, 4, 5], n_layers=5) == (1, 0)  # int(0.8 * 5) = 4
    assert select_published(**scores, layers=[3, 4, 5, 6], n_layers=5) == (0, 0)
    assert select_published(**scores, layers=[4, 5, 6, 7], n_layers=5) is None
    assert select_published(**scores, layers=[4, 5, 6, 7], n_layers=5, max_depth=1.2) == (1, 0)


def test_cosmic_takes_the_largest_allowed_score():
    cosmic = torch.tensor([[0.1, math.nan], [0.7, 0.2], [1.9, 0.0]])
    assert select_cosmic(cosmic, [0, 1, 2], n_layers=3) == (1, 0)
    assert select_cosmic(cosmic, [0, 1, 2], n_layers=3, max_depth=1.0) == (2, 0)
    assert select_cosmic(torch.full((2, 2), math.nan), [0, 1], n_layers=3) is None


@given(st.integers(0, 10_000))
def test_the_choice_passes_and_nothing_that_passes_is_better(seed):
    draw = torch.randn(3, 6, 3, generator=torch.Generator().manual_seed(seed))
    bypass, induce, kl = draw[0], draw[1], draw[2].abs() / 5
    cell = select_published(bypass, induce, kl, range(6), 7)
    allowed = passing(bypass, induce, kl, range(6), 7)
    if cell is None:
        assert not allowed.any()
    else:
        assert allowed[cell] and bypass[cell] == bypass[allowed].min()
        assert induce[cell] > 0 and kl[cell] <= 0.1 and cell[0] < 5


def test_cosines():
    a = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    b = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, -1.0]])
    assert cosmic_layers(a, b) == [2]
    many = torch.eye(20)
    assert len(cosmic_layers(many, many.roll(1, 0))) == 2
    want = (1 + 1 - 2) / (7**0.5 * 3**0.5)
    assert float(joint_cosine(a, b)) == pytest.approx(want, abs=1e-6)
    torch.testing.assert_close(joint_cosine(torch.stack([a, b]), b), torch.tensor([want, 1.0]), atol=1e-6, rtol=1e-6)
