"""Steps of a study: done once, kept whole, read back as they were."""

from dataclasses import dataclass

import pytest
import torch
from jaxtyping import Float
from steps import Steps
from torch import Tensor

from mechsafety.circuits import SearchResult
from mechsafety.circuits.verification.outcome import CurvePoint
from mechsafety.nodes import EMBED, Edge, Node


@dataclass(frozen=True)
class Stage:
    values: Float[Tensor, "row column"]
    gap: float


def test_a_value_is_computed_once_and_read_back(tmp_path):
    made = []

    def compute():
        made.append(1)
        return Stage(torch.randn(2, 3), float("inf"))

    first, again = (Steps(tmp_path, {"size": 1}).value("stage", Stage, compute) for _ in range(2))
    assert made == [1] and torch.equal(first.values, again.values) and again.gap == float("inf")
    assert {path.name for path in tmp_path.iterdir()} == {"stage.json", "stage.safetensors", "store.json"}


def test_a_search_of_parts_comes_back(tmp_path):
    parts = (Node("mlp", 1), Edge(EMBED, Node("head", 2, 0), "q"))
    found = SearchResult(parts, (CurvePoint(0.5, 1, 0.4, 0.3),), parts[:1], {parts[0]: 0.1}, True, 2, None)
    assert Steps(tmp_path).value("search", SearchResult, lambda: found) == found


def test_a_step_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        Steps(tmp_path).value("stage", Stage, lambda: Stage(torch.zeros(1, 1), 1 / 0))
    assert list(tmp_path.iterdir()) == []
