"""Edges against a transformer in plain torch in which every slot of every head has an input of its own."""

import numpy as np
import pytest
import torch
from reference import PlainModel, hook_count

import mechsafety as ms
from mechsafety.attribution.edges import edge_attribution
from mechsafety.circuits.circuit import CircuitEdge
from mechsafety.circuits.edges import carrying, estimate_edges, measure_edges
from mechsafety.intervals import ratio_interval
from mechsafety.nodes import Edge, Node, head_and_mlp_nodes
from mechsafety.patching import pair_runs
from mechsafety.patching.paths import measured_edges
from mechsafety.patching.senders import node_outputs

KINDS = ("llama", "gpt2", "gpt_neox")
PATHS = {
    "q": [("head", 0, 1, 1, 2), ("mlp", 0, None, 2, 3), ("head", 1, 3, 2, 0)],
    "k": [("head", 0, 0, 1, 1), ("mlp", 1, None, 2, 2), ("head", 0, 3, 2, 3)],
    "v": [("head", 0, 2, 1, 0), ("mlp", 0, None, 1, 3), ("head", 1, 0, 2, 1)],
    "mlp": [("head", 0, 1, 1, None), ("mlp", 0, None, 2, None), ("head", 0, 3, 2, None)],
    "resid": [("head", 0, 1, None, None), ("mlp", 1, None, None, None), ("mlp", 2, None, None, None)],
}


def edges_of(slot):
    edges = []
    for kind, layer, index, to_layer, to_index in PATHS[slot]:
        ends = {"mlp": Node("mlp", to_layer) if slot == "mlp" else None, "resid": Node("logits")}
        receiver = ends.get(slot) or Node("head", to_layer, to_index)
        edges.append(Edge(Node(kind, layer, index), receiver, slot))
    return edges


def plain_rows(model, pairs):
    """Unpadded token rows of both prompts of each pair."""
    for pair in pairs:
        yield tuple(model.tokenize([prompt]).ids[0] for prompt in (pair.harmful, pair.harmless))


def slow_effects(plain, model, pairs, metric, edges):
    """Share of the gap lost when the sender's change reaches the receiver's slot alone: one forward each."""
    lost, gap = np.zeros(len(edges)), 0.0
    for harmful, harmless in plain_rows(model, pairs):
        high, writes = plain(harmful)
        low, other = plain(harmless)
        gap += float(metric(high) - metric(low))
        for k, edge in enumerate(edges):
            sender = (edge.sender.layer, edge.sender.index)
            place = (edge.slot, edge.receiver.layer, edge.receiver.index)
            fork = ("logits", None, None) if edge.slot == "resid" else place
            changed, _ = plain(harmful, {fork: other[sender] - writes[sender]})
            lost[k] += float(metric(high) - metric(changed))
    return lost / gap


@pytest.fixture(scope="module", params=KINDS)
def both(request, make_hf_model, shared_model):
    """A wrapped model and the plain one with the same weights."""
    return shared_model(request.param), PlainModel(make_hf_model(request.param))


def test_the_plain_reference_is_the_model(both, pairs):
    model, plain = both
    for harmful, harmless in plain_rows(model, pairs):
        for ids in (harmful, harmless):
            tokens = next(
                t for p in pairs for t in map(model.tokenize, ([p.harmful], [p.harmless])) if torch.equal(t.ids[0], ids)
            )
            torch.testing.assert_close(plain(ids)[0], model.logits(tokens)[0], atol=1e-4, rtol=1e-4)


def test_node_outputs_are_what_the_parts_write(both, pairs):
    model, plain = both
    one = ms.PromptPairs(pairs.pairs[:1])
    runs, nodes = pair_runs(model, one, start=0), head_and_mlp_nodes(3, 4)
    _, writes = plain(next(plain_rows(model, one))[0])
    for node, found in zip(nodes, node_outputs(model, runs.harmful, nodes), strict=True):
        torch.testing.assert_close(found[0], writes[node.layer, node.index], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("slot", PATHS)
def test_measured_edges_equal_the_slow_reference(both, pairs, log_odds, slot):
    model, plain = both
    edges = edges_of(slot)
    clean = hook_count(model)
    found = measure_edges(
        model, [pair_runs(model, pairs)], log_odds, [CircuitEdge(e, 0.5, "estimated", 0.25) for e in edges]
    )
    slow = slow_effects(plain, model, pairs, log_odds, edges)
    assert np.abs(slow).max() > 1e-3, "the edges must matter"
    np.testing.assert_allclose([member.effect for member in found], slow, atol=1e-4)
    assert [member.edge for member in found] == edges
    assert all(member.status == "measured" and member.estimate == 0.25 for member in found)
    assert hook_count(model) == clean


def test_rows_of_very_different_lengths(both, ragged, logit_difference):
    model, plain = both
    edges = [edge for slot in PATHS for edge in edges_of(slot)[:2]]
    found = measure_edges(model, [pair_runs(model, ragged)], logit_difference, [CircuitEdge(e, 0.0) for e in edges])
    slow = slow_effects(plain, model, ragged, logit_difference, edges)
    np.testing.assert_allclose([member.effect for member in found], slow, atol=1e-4)


def test_same_layer_paths(both, pairs, log_odds):
    """A head writes into its own layer's MLP, except where both read the same residual stream (GPT-NeoX)."""
    model, plain = both
    runs = pair_runs(model, pairs)
    found = estimate_edges(model, runs, log_odds, [Node("head", 1, 0), Node("mlp", 1)], steps=2)
    own = [member for member in found if str(member.edge) == "L1.H0 -> L1.MLP (mlp)"]
    assert len(own) == (0 if plain.parallel else 1)
    if own:
        (measured,) = measure_edges(model, [runs], log_odds, own)
        slow = slow_effects(plain, model, pairs, log_odds, [own[0].edge])
        assert measured.effect == pytest.approx(float(slow[0]), abs=1e-4) and abs(slow[0]) > 1e-4


def test_effects_do_not_depend_on_order_or_batching(llama, pairs, log_odds, monkeypatch):
    runs = pair_runs(llama, pairs)
    edges = [CircuitEdge(edge, 0.0) for slot in PATHS for edge in edges_of(slot)]
    together = [member.effect for member in measure_edges(llama, [runs], log_odds, edges)]
    pieces = [pair_runs(llama, ms.PromptPairs((pair,))) for pair in pairs]
    apart = [member.effect for member in measure_edges(llama, pieces, log_odds, edges)]
    np.testing.assert_allclose(apart, together, atol=1e-5)
    backward = [member.effect for member in measure_edges(llama, [runs], log_odds, edges[::-1])][::-1]
    monkeypatch.setattr(llama, "max_batch_tokens", 1)
    runs = pair_runs(llama, pairs)
    alone = [member.effect for member in measure_edges(llama, [runs], log_odds, edges)]
    np.testing.assert_allclose(together, backward, atol=1e-5)
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_every_edge_is_estimated_once(llama, pairs, log_odds):
    nodes = list(head_and_mlp_nodes(3, 4))
    found = estimate_edges(llama, pair_runs(llama, pairs), log_odds, nodes[::-1], steps=1)
    # senders before each layer: 0, 5, 10; each head has three slots; a layer's heads feed its own MLP; 15 into logits
    assert len(found) == len({member.edge for member in found}) == 4 * 3 * (5 + 10) + (4 + 9 + 14) + 15
    assert [abs(m.effect) for m in found] == sorted((abs(m.effect) for m in found), reverse=True)
    assert all(m.status == "estimated" and m.estimate == m.effect for m in found)
    again = estimate_edges(llama, pair_runs(llama, pairs), log_odds, nodes, steps=1)
    assert [m.edge for m in again] == [m.edge for m in found]


@pytest.fixture(scope="module", params=[*KINDS, "qwen3"])
def close_pair(request, make_hf_model, make_tokenizer):
    """A model to which the two prompts are almost the same, so that everything is nearly linear."""
    hf, tokenizer = make_hf_model(request.param), make_tokenizer()
    weight = hf.get_input_embeddings().weight.data
    spot = {
        word: tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in ("bomb", "cake", "steal", "bake")
    }
    generator = torch.Generator().manual_seed(0)
    for bad, good in (("bomb", "cake"), ("steal", "bake")):
        weight[spot[bad]] = weight[spot[good]] + 0.004 * torch.randn(weight.shape[1], generator=generator)
    pairs = ms.PromptPairs.from_lists(
        ["how to make a bomb", "teach me to steal bread"], ["how to make a cake", "teach me to bake bread"]
    )
    return ms.load_model((hf, tokenizer)), pairs


def test_estimates_agree_with_measurements_of_small_changes(close_pair, logit_difference):
    model, pairs = close_pair
    runs = pair_runs(model, pairs)
    found = estimate_edges(model, runs, logit_difference, list(head_and_mlp_nodes(3, 4)))
    measured = measure_edges(model, [runs], logit_difference, found)
    assert {member.edge.slot for member in found} == {"q", "k", "v", "mlp", "resid"}
    pair = np.array([(m.estimate, m.effect) for m in measured])
    assert np.corrcoef(pair.T)[0, 1] > 0.9
    # into the logits nothing lies between, and after the last MLP only the logits do: no blend is left over
    last = [m for m in measured if m.edge.slot == "resid" or m.edge.receiver == Node("mlp", 2)]
    pair = np.array([(m.estimate, m.effect) for m in last])
    assert np.abs(pair[:, 1]).max() > 0.02
    np.testing.assert_allclose(pair[:, 0], pair[:, 1], atol=0.03 * np.abs(pair[:, 1]).max())


def test_gradients_at_the_harmful_run_are_the_first_order_of_every_edge(close_pair, logit_difference):
    model, pairs = close_pair
    runs = pair_runs(model, pairs)
    scores = edge_attribution(
        model, runs, logit_difference, method="eap", nodes=list(head_and_mlp_nodes(3, 4)), progress=False
    )
    found = [CircuitEdge(edge, score, "estimated", score) for edge, score in scores.top()]
    measured = measure_edges(model, [runs], logit_difference, found)
    for slot in ("q", "k", "v", "mlp", "resid"):
        some = np.array([(m.estimate, m.effect) for m in measured if m.edge.slot == slot])
        assert len(some) >= 14  # 15, less the first MLP of a parallel model, which says nothing at the last token
        np.testing.assert_allclose(some[:, 0], some[:, 1], atol=0.08 * np.abs(some[:, 1]).max() + 1e-5, err_msg=slot)


@pytest.mark.parametrize(
    ("effect", "ends", "kept"),
    [
        (0.05, (0.01, 0.09), True),  # a tenth of the sender's effect
        (0.049, (0.01, 0.09), False),
        (-0.05, (-0.09, -0.01), True),
        (0.2, (-0.01, 0.4), False),  # not told from 0
        (0.2, (-float("inf"), float("inf")), False),
        (0.2, None, False),  # not measured
    ],
)
def test_edges_that_carry_something(effect, ends, kept):
    sender, receiver = Node("head", 0, 0), Node("mlp", 1)
    edge = CircuitEdge(Edge(sender, receiver, "mlp"), effect, "measured", None, ends)
    assert carrying([edge], {sender: 0.5, receiver: -0.9}) == [edge] * kept
    from_embed = CircuitEdge(Edge(Node("embed"), receiver, "mlp"), 0.1, "measured", None, (0.05, 0.15))
    assert carrying([from_embed], {receiver: 0.9}) == [from_embed], "the embeddings have no effect of their own"
    through = CircuitEdge(Edge(Node("embed"), Node("logits"), "resid"), 0.01, "measured", None, (0.005, 0.015))
    assert carrying([through], {receiver: 0.9}) == [through], "neither have the logits"


def test_intervals_of_edges_are_those_of_shares_of_the_given_gaps(llama, pairs, log_odds):
    runs = pair_runs(llama, pairs)
    edges = [CircuitEdge(Edge(Node("head", 0, 1), Node("mlp", 2), "mlp"), 0.0)]
    gaps = [3.0, 1.0, 2.0, 5.0][: len(pairs)]
    (found,) = measure_edges(llama, [runs], log_odds, edges, gaps)
    changes = measured_edges(llama, runs, log_odds, [edges[0].edge])[0].double().numpy()
    assert found.effect == pytest.approx(changes.mean() / np.mean(gaps), abs=1e-6)
    assert found.ci == pytest.approx(ratio_interval(changes, gaps), rel=1e-4)
