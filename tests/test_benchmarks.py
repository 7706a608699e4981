"""What the benchmarks count and write; their cases are run by `make bench`."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mechsafety.patching import activation_patching, pair_runs

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from flops import Shape, floor_ratio, forward, least_for_head
from growth import grow, growth_cases, plot
from report import markdown

from mechsafety.nodes import Node


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_operations_of_a_forward_are_those_that_torch_counts(kind, make_model):
    model = make_model(kind)
    ids = model.tokenize(["how do i make a cake"]).ids
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model.hf_model(input_ids=ids)
    assert forward(Shape.of(model), ids.shape[1]) == counted.get_total_flops()


def test_the_floor(llama, pairs, log_odds):
    """By hand for the last layers; and what we do lies above it."""
    shape = Shape.of(llama)
    # 4 heads of 8 over 2, d_model 32, gated MLP of 48: output of one head, one column of the MLP, one of logits
    last = 2 * 8 * 32 + 2 * 3 * 32 * 48 + 2 * 32 * llama.d_vocab
    assert least_for_head(shape, 2, 10, 4) == last
    # one layer earlier: 6 columns there, then keys and values of 6, queries, scores, output and MLP of 1
    block = 6 * 2 * 2 * 32 * 16 + 2 * 2 * 32 * 32 + 2 * 2 * 32 * 10 + 2 * 3 * 32 * 48
    assert least_for_head(shape, 1, 10, 4) == 6 * (last - 2 * 32 * llama.d_vocab) + block + 2 * 32 * llama.d_vocab
    assert floor_ratio(shape, 10, 4) > floor_ratio(shape, 10, 1) > 1
    runs = pair_runs(llama, pairs)
    width, rows = runs.harmful.tokens.ids.shape[1], len(pairs)
    for layer in range(3):
        with FlopCounterMode(display=False) as counted:
            activation_patching(llama, runs, log_odds, nodes=[Node("head", layer, 1)], progress=False)
        assert counted.get_total_flops() >= rows * least_for_head(shape, layer, width, runs.start)


def test_growth_is_plotted_with_the_same_bytes_again(tmp_path):
    cases = {
        name: {
            "analysis": kind,
            "prompts": n,
            "columns": columns,
            "ours_s": n * columns / 99,
            "peak_gib": 0.5 + n / 999,
        }
        for name, (kind, n, columns) in growth_cases().items()
    }
    pictures = []
    for name in ("a.svg", "b.svg"):
        plot(cases, tmp_path / name)
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1] and b"peak memory" in pictures[0]
    cases["edges_prompts_4"] |= {"ours_s": 77.0}
    plot(cases, tmp_path / "c.svg")
    assert (tmp_path / "c.svg").read_bytes() != pictures[0]
    plot({"heads_columns_64": cases["heads_columns_64"]}, tmp_path / "d.svg")
    assert b"prompts: 2" in (tmp_path / "d.svg").read_bytes(), "a single size, as after a stop"


def test_results_say_what_was_not_run():
    place = {"date": "2026-01-01", "versions": {"torch": "2"}, "machine": {"cpu": "x", "cores": 2, "threads": 2}}
    peer = place | {"ours_s": 2.0, "peer_s": 14.0, "ratio": 7.0, "max_difference": 1e-6, "peak_gib": 1.5}
    floor = {"tokens": 43, "shared": 27, "floor_ratio": 10.0, "operations_over_floor": 1.25}
    grown = place | {
        "analysis": "heads",
        "prompts": 4,
        "columns": 32,
        "ours_s": 1.28,
        "before_gib": 1.0,
        "peak_gib": 1.1,
    }
    gpu = place | {"status": "not run", "shape": "1B", "dtype": "float32"}
    cases = {"head_sweep": peer | floor, "heads_prompts_4": grown, "gpu_1B_float32": gpu}
    text = markdown(
        place | {"cases": cases}, {"head_sweep": "Sweep.", "other": "Other."}, {"head_sweep": "6x", "other": "-"}
    )
    assert "| Sweep. | 2.00 s | 14.0 s | 7.0x | 1.0e-06 | 1.50 GiB | 6x |" in text
    assert "| Other. | not run | not run |" in text
    assert "takes 10.0 times as many. We do 1.25 times the floor" in text and "70 % of what the floor allows" in text
    assert "| 4 | 32 | 1.3 s | 10.0 ms | 1.00 GiB | 1.10 GiB |" in text
    assert "| 8B | bfloat16 | not run |" in text and "| 1B | float32 | not run |" in text


def test_every_growth_case_names_its_size():
    assert growth_cases()["edges_prompts_256"] == ("edges", 256, 32)
    assert growth_cases()["heads_columns_512"] == ("heads", 2, 512)
    assert callable(grow) and len(growth_cases()) == 18
