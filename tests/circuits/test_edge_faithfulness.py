"""Circuits of edges against a transformer in plain torch that computes every slot's input edge by edge."""

import math

import numpy as np
import pytest
import torch
from reference import PlainModel, hook_count

from mechsafety.circuits.circuit import CircuitEdge
from mechsafety.circuits.edge_faithfulness import EdgeMeter, all_edges, prune
from mechsafety.circuits.edges import measure_edges
from mechsafety.nodes import Edge, Node
from mechsafety.patching import pair_runs

KINDS = ("llama", "gpt2", "gpt_neox")
EMBED, LOGITS = Node("embed"), Node("logits")


def slow_run(plain, harmful, harmless, kept):
    """Logits when only the kept edges carry the harmful prompt: one slot after the other, no tensor of edges."""
    kept = set(kept)
    _, source = plain(harmless)
    clean = {Node("head" if index is not None else "mlp", layer, index): v for (layer, index), v in source.items()}
    clean[EMBED] = plain.embed(harmless)
    live = {EMBED: plain.embed(harmful)}
    bias = {layer: plain.write_bias(layer) for layer in range(plain.n_layers)}
    hidden = torch.ones(len(harmful), len(harmful), dtype=torch.bool).triu(1)

    def read(receiver, slot, layers):
        total = sum((bias[k] for k in range(layers)), torch.zeros(()))
        for sender in clean:
            if sender not in live:
                continue
            use = live if Edge(sender, receiver, slot) in kept else clean
            total = total + use[sender]
        return total

    for layer in range(plain.n_layers):
        made = {}
        for head in range(plain.n_heads):
            node = Node("head", layer, head)
            q, k, v = (plain.qkv(layer, head, slot, read(node, slot, layer)) for slot in "qkv")
            scores = (plain.rope(q) @ plain.rope(k).T / math.sqrt(plain.d_head)).masked_fill(hidden, -torch.inf)
            made[node] = plain.write(layer, head, scores.softmax(-1) @ v)
        mlp = Node("mlp", layer)
        if plain.parallel:
            made[mlp] = plain.mlp(layer, read(mlp, "mlp", layer))
            live |= made
        else:
            live |= made
            live[mlp] = plain.mlp(layer, read(mlp, "mlp", layer + 1))
    return plain.unembed(read(LOGITS, "resid", plain.n_layers))[-1]


@pytest.fixture(scope="module", params=KINDS)
def both(request, make_hf_model, shared_model):
    return shared_model(request.param), PlainModel(make_hf_model(request.param))


def some_circuits(parallel, seed=0):
    every = all_edges(3, 4, parallel)
    rng = np.random.default_rng(seed)
    return [[edge for edge in every if rng.random() < share] for share in (0.1, 0.4, 0.8, 0.97)]


def test_scores_equal_the_slow_twin(both, ragged, logit_difference):
    model, plain = both
    meter, clean = EdgeMeter(model, pair_runs(model, ragged), logit_difference), hook_count(model)
    circuits = some_circuits(plain.parallel)
    found = meter.kept(circuits)
    for row, circuit in enumerate(circuits):
        for column, pair in enumerate(ragged):
            ids = [model.tokenize([prompt]).ids[0] for prompt in (pair.harmful, pair.harmless)]
            slow = float(logit_difference(slow_run(plain, *ids, circuit)))
            assert found[row, column] == pytest.approx(slow, abs=2e-4)
    assert np.abs(np.diff(found, axis=0)).max() > 0.05, "the circuits must differ"
    assert hook_count(model) == clean


def test_the_ends(any_model, pairs, log_odds):
    meter = EdgeMeter(any_model, pair_runs(any_model, pairs), log_odds)
    harmful, harmless = meter.ends()
    np.testing.assert_allclose(meter.kept([meter.parts, []]), [harmful, harmless], atol=2e-4)
    np.testing.assert_allclose(meter.removed([meter.parts, []]), [harmless, harmful], atol=2e-4)


def test_one_edge_cut_is_the_measured_edge_where_nothing_follows(both, pairs, log_odds):
    """Into the logits, cutting an edge and patching its direct path are the same thing."""
    model, _ = both
    runs = pair_runs(model, pairs)
    meter = EdgeMeter(model, runs, log_odds)
    edges = [edge for edge in meter.parts if edge.receiver == LOGITS and edge.sender != EMBED]
    harmful, harmless = meter.ends()
    lost = (harmful - meter.removed([[edge] for edge in edges])).mean(1) / (harmful - harmless).mean()
    measured = measure_edges(model, [runs], log_odds, [CircuitEdge(edge, 0.0) for edge in edges])
    np.testing.assert_allclose(lost, [member.effect for member in measured], atol=1e-3)


def test_batches_do_not_matter(llama, pairs, log_odds, monkeypatch):
    meter = EdgeMeter(llama, pair_runs(llama, pairs), log_odds)
    circuits = some_circuits(False, seed=1)
    together = meter.kept(circuits)
    small = EdgeMeter(llama, pair_runs(llama, pairs, max_batch_tokens=1), log_odds)
    monkeypatch.setattr("mechsafety.circuits.edge_faithfulness.SENDER_BYTES", 1)
    np.testing.assert_allclose(small.kept(circuits), together, atol=1e-4)
    assert meter.kept([]).shape == (0, len(pairs))


def test_pruning_changes_nothing_and_leaves_paths(llama, pairs, log_odds):
    meter = EdgeMeter(llama, pair_runs(llama, pairs), log_odds)
    for circuit in some_circuits(False, seed=2)[:2]:
        left = prune(circuit)
        assert len(left) < len(circuit)
        for edge in left:
            assert edge.sender == EMBED or any(other.receiver == edge.sender for other in left)
            assert edge.receiver == LOGITS or any(other.sender == edge.receiver for other in left)
    alone = [edge for edge in meter.parts if edge.sender != EMBED]
    assert prune(alone) == []
    np.testing.assert_allclose(meter.kept([alone])[0], meter.ends()[1], atol=2e-4)


def test_counts():
    assert len(all_edges(3, 4, False)) == 12 + 5 + 72 + 10 + 132 + 15 + 16
    assert len(all_edges(3, 4, True)) == 12 + 1 + 72 + 6 + 132 + 11 + 16
    assert len(set(all_edges(2, 3, False))) == len(all_edges(2, 3, False))
