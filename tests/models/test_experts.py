"""Mixtures of experts: each MLP is one node, and whatever asks for its neurons gets one line."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import random_model, tiny_tokenizer
from whole_forwards import patched_whole

import mechsafety as ms
from mechsafety.circuits import EdgeMeter
from mechsafety.directions import direction_io
from mechsafety.errors import MechsafetyError
from mechsafety.models import hooked
from mechsafety.nodes import Node
from mechsafety.patching import pair_runs
from mechsafety.sites import Site, SiteKind

LINE = (
    "neurons of {}, a mixture of experts: the neurons that a layer runs differ from token to token; expected heads and "
    "whole MLPs"
)
NEURON = Node("neuron", 1, 3)
METRIC = ms.RefusalLogOdds((20, 21), ("a", "b"), (30,), ("c",))
bridge_only = pytest.mark.generation("TransformerBridge", reason="TransformerLens 3.9 is given no mixtures of experts")


@pytest.fixture(scope="module", params=["Mixtral", "Qwen3-MoE"])
def both(request):
    """The unwrapped model, and the same wrapped."""
    plain = random_model(request.param, len(tiny_tokenizer()))
    return plain, ms.load_model((copy.deepcopy(plain), tiny_tokenizer()))


@bridge_only
def test_logits_are_hugging_faces(both):
    plain, model = both
    plain.set_attn_implementation("eager")
    prompts = ["tea", "teach me to steal a car please"]
    with torch.no_grad():
        alone = torch.stack([plain(model.tokenize([prompt]).ids).logits[0, -1] for prompt in prompts])
    torch.testing.assert_close(model.logits(prompts), alone, atol=1e-5, rtol=1e-5)
    assert model.experts and model.d_mlp == 0 and "mixture of experts" in repr(model)


@bridge_only
def test_circuits_of_edges_where_experts_return_tokens_along_one_axis(pairs):
    """Llama 4's experts give [row * token, d_model]."""
    model = ms.load_model((random_model("Llama 4 (text)", len(tiny_tokenizer())), tiny_tokenizer()))
    meter = EdgeMeter(model, pair_runs(model, pairs), METRIC)
    harmful, harmless = meter.ends()
    np.testing.assert_allclose(meter.kept([meter.parts, []]), [harmful, harmless], atol=2e-4)


@bridge_only
def test_mlps_are_nodes(both, pairs):
    """Patched whole, against plain hooks; and edges, which leave nothing of the gap out."""
    _, model = both
    tokens = model.tokenize_pairs(pairs)
    found = ms.activation_patching(model, pairs, METRIC, progress=False)
    for node in (Node("mlp", 1), Node("head", 2, 1)):
        logits = patched_whole(model, tokens.harmful, tokens.harmless, [node])
        expected = METRIC(model.logits(pairs.harmful)) - METRIC(logits)
        torch.testing.assert_close(found.changes[found.nodes.index(node)], expected, atol=1e-4, rtol=1e-4)
    direct = ms.direct_logit_attribution(model, pairs.harmful, METRIC, progress=False)
    parts = direct.heads.sum((0, 1)) + direct.mlps.sum(0) + direct.embed + direct.rest
    torch.testing.assert_close(parts, METRIC(model.logits(pairs.harmful)), atol=1e-4, rtol=1e-4)
    edges = ms.edge_attribution(model, pairs, METRIC, method="eap", progress=False)
    assert any(edge.receiver.kind == "mlp" for edge, _ in edges.top(50))


@bridge_only
def test_neurons_are_refused_in_one_line(both, pairs, tmp_path):
    _, model = both
    mask = torch.zeros(3, 48, dtype=torch.bool)
    calls = {
        "patching": lambda: ms.activation_patching(model, pairs, METRIC, nodes=[NEURON], progress=False),
        "site": lambda: ms.activation_patching(model, pairs, METRIC, nodes=[Site("neurons", 1)], progress=False),
        "senders": lambda: ms.path_patching(model, pairs, METRIC, senders=[NEURON], progress=False),
        "receivers": lambda: ms.path_patching(model, pairs, METRIC, receivers=[(NEURON, "mlp")], progress=False),
        "edges": lambda: ms.edge_attribution(model, pairs, METRIC, neurons=[1], progress=False),
        "edge nodes": lambda: ms.edge_attribution(model, pairs, METRIC, nodes=[NEURON], progress=False),
        "nodes": lambda: ms.node_attribution(model, pairs, METRIC, neurons=True, progress=False),
        "map": lambda: ms.map_refusal_circuit(model, pairs, METRIC, ms.MapOptions(level="neuron"), progress=False),
        "cache": lambda: model.cache(pairs.harmful, ["neurons"]),
        "runs": lambda: pair_runs(model, pairs, extra=[SiteKind.NEURONS]),
        "hooks": lambda: model.read(model.tokenize(["tea"]), [Site("neurons", 0)]),
        "weights": lambda: model.W_out(0),
        "ablation": lambda: ms.ablate(model, [NEURON], prompts=pairs.harmless).__enter__(),
        "cards": lambda: ms.neurons.describe_neurons(model, mask),
        "contrast": lambda: ms.neurons.contrast_neurons(model, pairs, progress=False),
        "change": lambda: ms.safety_neurons(model, model, pairs.harmful, progress=False),
    }
    for name, call in calls.items():
        with pytest.raises(MechsafetyError) as caught:
            call()
        assert str(caught.value) == LINE.format(model.name), name


@bridge_only
def test_a_direction_is_written_by_heads_and_mlps(both, pairs, directed_found):
    _, model = both
    vector = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(2))
    found = direction_io(model, replace(directed_found, vectors=vector, layer=2), pairs, METRIC, progress=False)
    assert float(found.writes.sum(0).mean()) == pytest.approx(1.0, abs=1e-3)
    assert found.neurons_write.shape == found.neurons_read.shape == (3, 0) and found.neurons_dataframe().empty


@pytest.mark.skipif(not hooked.installed(), reason="TransformerLens 4 takes them")
def test_the_older_transformer_lens_says_what_it_takes():
    with pytest.raises(MechsafetyError, match=r"^HookedTransformer cannot be made from a MixtralForCausalLM; expected"):
        ms.load_model((random_model("Mixtral", len(tiny_tokenizer())), tiny_tokenizer()))


def test_no_other_model_is_one(llama):
    assert not llama.experts and llama.d_mlp == 48
    llama.check_neurons()
