"""The check of a GPU (benchmarks/gpu_check.py): on a GPU with ``pytest -m gpu``; its code everywhere."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import gpu_check


def test_the_check_runs_on_a_cpu(tmp_path):
    found = gpu_check.check("cpu", tiny=True, seconds=600, out=tmp_path / "gpu.json")
    assert json.loads((tmp_path / "gpu.json").read_text()) == found
    assert list(found) == ["equality", "drift", "placed", "tiny float32"]
    assert {row["status"] for row in found.values()} == {"run"}, found
    assert found["equality"]["met"] and found["drift"]["met"] and found["placed"]["met"]
    assert found["placed"]["offloaded"] == 9 and max(found["placed"]["gaps"].values()) < 1e-6
    assert found["tiny float32"]["heads_gap"] < 1e-4  # TransformerLens' own patching of the same heads


def test_rows_that_begin_too_late_are_not_run(tmp_path):
    rows = gpu_check.Rows(-1, tmp_path / "gpu.json")
    rows.add("late", dict)
    rows.seconds = 60
    rows.add("broken", lambda: {"x": 1 / 0})
    assert rows.found["late"] == {"status": "not run", "reason": "-1 s are over"}
    assert rows.found["broken"]["error"] == "ZeroDivisionError: division by zero"


@pytest.mark.gpu
def test_a_gpu(tmp_path):
    assert torch.cuda.is_available()
    found = gpu_check.check("cuda", tiny=False, seconds=420, out=tmp_path / "gpu.json")
    assert [name for name, row in found.items() if row["status"] == "failed" or row.get("met") is False] == []
