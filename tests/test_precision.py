"""How far numbers may move in half precision and with threads; the limits of docs/howto/memory.md."""

import pytest
import torch
from precision import QUANTITIES, compare, moved, threads
from tiny import tiny_hf_model, tiny_pairs, tiny_tokenizer

import mechsafety as ms
from mechsafety.attribution import node_attribution
from mechsafety.patching.effects import effect_table, mean_gap

# largest difference as a share of the largest value, and smallest correlation
LIMITS = {"bfloat16": (0.15, 0.99), "float16": (0.02, 0.999)}


@pytest.fixture(scope="module")
def found():
    return compare(
        lambda dtype: ms.load_model((tiny_hf_model("llama"), tiny_tokenizer()), dtype=dtype), tiny_pairs(), ["sorry"]
    )


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", QUANTITIES)
def test_half_precision_keeps_to_its_limits(dtype, name, found):
    most, least = LIMITS[dtype]
    numbers = found[dtype][name]
    assert 0 < numbers["of_largest"] <= most
    assert numbers["correlation"] >= least


def test_the_measure_sees_a_difference():
    full = torch.arange(20.0)
    assert moved(full, full)["largest"] == 0 and moved(full, full)["top"] == 1
    assert moved(full, full.flip(0))["correlation"] < 0 and moved(full, full.flip(0))["top"] == 0


def test_sums_over_prompts_are_in_double_precision():
    """A sum in float32 would lose the small values beside the large ones."""
    harmful = torch.full((1000,), 1e-4)
    harmful[0] = 3e4
    exact = float(harmful.double().mean())
    assert mean_gap(harmful, torch.zeros(1000)) == exact != float(harmful.mean())
    table = effect_table(harmful[None], torch.ones(1000))
    assert table.effect[0] == exact


def test_the_same_threads_give_the_same_bytes_and_more_threads_nearly():
    model = ms.load_model((tiny_hf_model("llama"), tiny_tokenizer()))
    numbers = threads(model, list(tiny_pairs().harmful))
    assert numbers["again"] == 0.0
    assert numbers["between_1_and_2"] <= 1e-5


def test_the_same_seed_gives_the_same_bytes():
    model, pairs = ms.load_model((tiny_hf_model("llama"), tiny_tokenizer())), tiny_pairs()
    metric = ms.RefusalLogOdds.of(model, ["sorry"])
    one, other = (ms.activation_patching(model, pairs, metric, progress=False) for _ in range(2))
    assert torch.equal(one.changes, other.changes)
    assert one.to_dataframe().equals(other.to_dataframe())
    first, second = (node_attribution(model, pairs, metric, progress=False) for _ in range(2))
    assert torch.equal(first.heads, second.heads)
