"""Integrated gradients over nodes: completeness, consistency, and agreement with exact patching."""

import numpy as np
import pytest
import torch

import mechsafety as ms
from mechsafety.attribution import node_attribution
from mechsafety.attribution.nodes import mask_gradients
from mechsafety.nodes import Node, head_and_mlp_nodes
from mechsafety.patching import Patch, activation_patching, masked_logits, pair_runs
from mechsafety.patching.masks import SoftMask, patched_scores


def test_shares_sum_to_one_as_steps_grow(any_model, pairs, logit_difference):
    runs = pair_runs(any_model, pairs)
    errors = [abs(node_attribution(any_model, runs, logit_difference, steps=steps).total - 1) for steps in (1, 32)]
    assert errors[1] < 0.02 and errors[1] < errors[0]


def test_neurons_of_a_layer_sum_to_its_mlp(any_model, pairs, logit_difference):
    whole = node_attribution(any_model, pairs, logit_difference, steps=32)
    split = node_attribution(any_model, pairs, logit_difference, steps=32, neurons=True)
    assert split.neurons.shape == (3, any_model.d_mlp) and whole.neurons is None
    torch.testing.assert_close(split.neurons.sum(-1), split.mlps)
    if not any_model.post_norm:  # else a norm stands between neurons and the MLP's output
        torch.testing.assert_close(split.mlps, whole.mlps, atol=1e-3, rtol=1e-3)
    assert abs(split.total - 1) < 0.02
    assert split.of(Node("neuron", 1, 5)) == float(split.neurons[1, 5])


def test_the_gradient_of_a_mask_is_its_finite_difference(llama, pairs, log_odds):
    runs = pair_runs(llama, pairs)
    heads, mlps = mask_gradients(llama, runs, log_odds, 0.5)
    step = 1e-2

    def score(kind, index, value):
        masks = {"head": torch.full((3, 4), 0.5), "mlp": torch.full((3,), 0.5)}
        masks[kind][index] += value
        with torch.no_grad():
            logits = masked_logits(llama, runs.harmful, runs.harmless.acts, SoftMask(masks["head"], masks["mlp"]))
        return float(log_odds(logits).mean())

    for layer in range(3):
        slope = (score("mlp", (layer,), step) - score("mlp", (layer,), -step)) / (2 * step)
        assert float(mlps[layer]) == pytest.approx(slope, abs=2e-3)
        for head in range(4):
            slope = (score("head", (layer, head), step) - score("head", (layer, head), -step)) / (2 * step)
            assert float(heads[layer, head]) == pytest.approx(slope, abs=2e-3)


def test_dead_nodes_get_no_gradient_through_live_ones(llama, pairs, log_odds):
    """With only the last MLP live, everything else stands at the harmless run."""
    runs = pair_runs(llama, pairs)
    live = (torch.zeros(3, 4), torch.tensor([0.0, 0.0, 1.0]))
    _, mlps = mask_gradients(llama, runs, log_odds, 0.7, live=live)
    with torch.no_grad():
        ends = [
            masked_logits(llama, runs.harmful, runs.harmless.acts, SoftMask(torch.zeros(3, 4), torch.tensor([0, 0, k])))
            for k in (0.69, 0.71)
        ]
    slope = float(log_odds(ends[1]).mean() - log_odds(ends[0]).mean()) / 0.02
    assert float(mlps[2]) == pytest.approx(slope, abs=2e-3)


def test_agrees_with_exact_patching_where_everything_is_nearly_linear(make_hf_model, make_tokenizer, logit_difference):
    hf, tokenizer = make_hf_model("llama"), make_tokenizer()
    weight = hf.get_input_embeddings().weight.data
    bad, good = (tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in ("bomb", "cake"))
    weight[bad] = weight[good] + 0.01 * torch.randn(32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # parts that write little do not act through each other
        for block in hf.model.layers:
            block.self_attn.o_proj.weight *= 0.1
            block.mlp.down_proj.weight *= 0.1
    model = ms.load_model((hf, tokenizer))
    runs = pair_runs(model, ms.PromptPairs.from_lists(["how to make a bomb please"], ["how to make a cake please"]))
    nodes = head_and_mlp_nodes(3, 4)
    found = node_attribution(model, runs, logit_difference)
    patch = Patch.of(model, [[node] for node in nodes])
    high, low = runs.scores(logit_difference)
    scores = patched_scores(model, runs.harmful, runs.harmless.acts, patch, logit_difference)
    exact = ((high - scores).mean(1) / (high - low).mean()).numpy()
    estimate = np.array([found.of(node) for node in nodes])
    assert np.corrcoef(estimate, exact)[0, 1] > 0.8
    strong = np.abs(exact) > 0.05 * np.abs(exact).max()
    assert strong.sum() >= 5 and (np.sign(exact[strong]) == np.sign(estimate[strong])).all()


def test_the_strongest_nodes_are_found(llama, pairs, logit_difference):
    runs = pair_runs(llama, pairs)
    found = node_attribution(llama, runs, logit_difference)
    exact = activation_patching(llama, runs, logit_difference, progress=False).effects.abs()
    top = {found.ranked()[k] for k in range(5)}
    best = head_and_mlp_nodes(3, 4)[int(exact.argmax())]
    assert best in top


def test_ranked(llama, pairs, logit_difference):
    found = node_attribution(llama, pairs, logit_difference, steps=2)
    ranked = found.ranked()
    values = [abs(found.of(node)) for node in ranked]
    assert values == sorted(values, reverse=True) and set(ranked) == set(head_and_mlp_nodes(3, 4))
    frame = found.to_dataframe()
    assert frame.node.tolist() == [str(node) for node in ranked] and frame["index"].dtype == "Int64"
    assert min(found.of(node) for node in ranked) < 0 < max(found.of(node) for node in ranked), "estimates are signed"
    assert repr(found).startswith("NodeAttribution(12 heads, 3 MLPs, sum ")
    again = node_attribution(llama, pairs, logit_difference, steps=2)
    assert torch.equal(again.heads, found.heads) and torch.equal(again.mlps, found.mlps)
