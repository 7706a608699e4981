"""Batches of variants by the layer at which they begin."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mechsafety.nodes import Node, head_and_mlp_nodes
from mechsafety.patching import pair_runs
from mechsafety.patching.masks import Patch, batches_by_layer, patched_scores


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 12))
def test_every_variant_is_in_one_batch_and_no_batch_is_too_large(firsts, most):
    batches = batches_by_layer(firsts, most)
    assert [k for rows in batches for k in range(len(firsts))[rows]] == list(range(len(firsts)))
    assert all(1 <= len(firsts[rows]) <= most for rows in batches)
    for rows in batches:
        beyond = firsts[rows][-(-most // 4) :]
        assert all(first <= min(firsts[rows][: -(-most // 4)]) for first in beyond), "only variants of its layer join"


def test_first_layers(llama):
    nodes = [[Node("mlp", 2)], [Node("head", 1, 3), Node("mlp", 2)], [], [Node("neuron", 0, 5)]]
    patch = Patch.of(llama, nodes)
    assert patch.first_layers(llama.n_layers) == [2, 1, llama.n_layers, 0]


def test_batches_do_not_change_the_scores(llama, pairs, log_odds):
    runs = pair_runs(llama, pairs, max_batch_tokens=8 * len(pairs) * 8)
    nodes = head_and_mlp_nodes(llama.n_layers, llama.n_heads)
    patch = Patch.of(llama, [[node] for node in nodes])
    together = patched_scores(llama, runs.harmful, runs.source, patch, log_odds)
    alone = [patched_scores(llama, runs.harmful, runs.source, Patch.of(llama, [[node]]), log_odds)[0] for node in nodes]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-5)
    assert len(batches_by_layer(patch.first_layers(3), 8)) > 1
