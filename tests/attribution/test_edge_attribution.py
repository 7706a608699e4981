"""Edge attribution: completeness, agreement with exact paths, memory by batches."""

import gc
import re
import weakref

import numpy as np
import pytest
import torch
from reference import hook_count

import mechsafety as ms
import mechsafety.attribution.edges as module
import mechsafety.patching.masks as masks
from mechsafety.attribution import edge_attribution
from mechsafety.nodes import Edge, Node
from mechsafety.patching import pair_runs
from mechsafety.patching.paths import measured_edges
from mechsafety.sites import Site, SiteKind

bridge_only = pytest.mark.generation("TransformerBridge", reason="hooks and weights by a bridge's own names")
LOGITS = Node("logits")


def gap(runs, metric):
    harmful, harmless = runs.scores(metric)
    return float((harmful - harmless).sum())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "qwen3", "gemma2", "olmo2"])
def test_scores_into_the_logits_complete(kind, shared_model, pairs, logit_difference):
    """All edges into one receiver sum to the first-order change of what it reads (here: exact gradient by autograd)."""
    model = shared_model(kind)
    runs = pair_runs(model, pairs)
    scores = edge_attribution(model, pairs, logit_difference, method="eap", progress=False)
    final = runs.harmful.resid[-1][:, -1].clone().requires_grad_()
    from mechsafety.models.engine import unembed

    (gradient,) = torch.autograd.grad(logit_difference(unembed(model, final)).sum(), final)
    change = (runs.harmful.resid[-1] - runs.harmless.resid[-1])[:, -1]
    expected = float((change * gradient).sum()) / gap(runs, logit_difference)
    column = scores.receivers.index((Node("logits"), "resid"))
    assert float(scores.scores[:, column].sum()) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "olmo2"])
def test_slots_of_all_heads_sum_to_the_streams_gradient(kind, shared_model, pairs, logit_difference):
    """q, k and v of all heads, grouped or not, and the skip and MLP branches, make up the whole stream's gradient."""
    model = shared_model(kind)
    runs = pair_runs(model, pairs)
    last = model.n_layers - 1
    scores = edge_attribution(model, pairs, logit_difference, method="eap", progress=False)
    from mechsafety.models.engine import run_from

    resid = runs.harmful.resid[last].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(logit_difference(run_from(model, runs.harmful, last, resid)).sum(), resid)
    embed = runs.harmful.resid[0] - runs.harmless.resid[0]
    whole = float((embed * gradient).sum()) / gap(runs, logit_difference)
    reads = [k for k, (node, _) in enumerate(scores.receivers) if node.layer == last or node.kind == "logits"]
    assert float(scores.scores[0, reads].sum()) != 0
    # the embedding's paths through the last block: heads' slots, its MLP's direct input, and the logits' direct input;
    # what passes a head and then the MLP is in the heads' slots
    assert float(scores.scores[0, reads].sum()) == pytest.approx(whole, abs=1e-4)


def test_number_of_edges(llama, pairs, log_odds):
    scores = edge_attribution(llama, pairs, log_odds, method="eap", progress=False)
    before = [1 + 5 * layer for layer in range(3)]
    assert scores.n_edges == sum(12 * n + n + 4 for n in before) + 16
    assert len(scores.senders) == 16 and len(scores.receivers) == 3 * 13 + 1
    assert scores.top(3)[0][1] == pytest.approx(float(scores.scores.abs().max()), abs=0) or scores.top(3)[0][1] < 0


@pytest.mark.parametrize("method", module.METHODS)
def test_estimates_follow_exact_paths_in_a_mild_model(method, make_hf_model, make_tokenizer, pairs, logit_difference):
    hf = make_hf_model("llama")
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim > 1:
                parameter *= 0.4
    model = ms.load_model((hf, make_tokenizer()))
    scores = edge_attribution(model, pairs, logit_difference, method=method, progress=False)
    top = [(edge, score) for edge, score in scores.top(60) if edge.sender != Node("embed")]
    runs = pair_runs(model, pairs)
    exact = measured_edges(model, runs, logit_difference, [e for e, _ in top]).sum(1) / gap(runs, logit_difference)
    estimates = [score for _, score in top]
    assert np.corrcoef(estimates, exact)[0, 1] > 0.95
    strong = [k for k in range(len(top)) if abs(estimates[k]) > 0.05 * max(map(abs, estimates))]
    agree = np.mean([np.sign(estimates[k]) == np.sign(float(exact[k])) for k in strong])
    assert agree > 0.9


@pytest.mark.parametrize("method", module.METHODS)
def test_batches_of_prompts_change_nothing(method, llama, ragged, log_odds, monkeypatch):
    whole = edge_attribution(llama, ragged, log_odds, method=method, steps=2, progress=False)
    monkeypatch.setattr(module, "BATCH_TOKENS", 1)
    single = edge_attribution(llama, ragged, log_odds, method=method, steps=2, progress=False)
    torch.testing.assert_close(single.scores, whole.scores, atol=1e-4, rtol=1e-3)


def test_nodes_restrict_and_keep_the_scores(llama, pairs, log_odds):
    chosen = [Node("head", 0, 1), Node("mlp", 1), Node("head", 2, 3)]
    runs = pair_runs(llama, pairs)
    few = edge_attribution(llama, runs, log_odds, nodes=chosen, progress=False)
    full = edge_attribution(llama, runs, log_odds, progress=False)
    for edge, score in few.top():
        row, column = full.senders.index(edge.sender), full.receivers.index((edge.receiver, edge.slot))
        assert score == pytest.approx(float(full.scores[row, column]), abs=1e-5)
    assert {edge.sender for edge, _ in few.top()} <= set(chosen)


def test_single_neurons_keep_their_scores(llama, pairs, log_odds):
    chosen = [Node("head", 0, 1), Node("neuron", 1, 30), Node("neuron", 1, 5), Node("neuron", 2, 7), Node("mlp", 2)]
    few = edge_attribution(llama, pairs, log_odds, nodes=chosen, steps=2, progress=False)
    full = edge_attribution(llama, pairs, log_odds, neurons=[1, 2], steps=2, progress=False)
    edges = few.top()
    assert Edge(Node("neuron", 1, 5), Node("neuron", 2, 7), "mlp") in [edge for edge, _ in edges]
    for edge, score in edges:
        if edge.receiver != Node("mlp", 2) and edge.sender != Node("mlp", 2):
            row, column = full.senders.index(edge.sender), full.receivers.index((edge.receiver, edge.slot))
            assert score == pytest.approx(float(full.scores[row, column]), abs=1e-5)
    # neurons of a layer work side by side; a neuron reaches neither its own layer's MLP nor itself
    assert few.n_edges == 2 * 1 + 3 + 3 + 5
    assert full.n_edges == (12 + 5) + (12 * 6 + 48 * 10) + (12 * 58 + 48 * 62) + 110
    assert full.provenance.options["neurons"] == [1, 2]


def test_table_plot_and_file(llama, pairs, log_odds, tmp_path):
    scores = edge_attribution(llama, pairs, log_odds, method="eap", progress=False)
    assert list(scores.to_dataframe().columns) == ["sender", "receiver", "slot", "score"]
    assert len(scores.plot().data[0].x) == 30
    assert scores.node_scores()[Node("embed")] == pytest.approx(float(scores.scores[0].sum()))
    scores.save(tmp_path / "edges")
    assert torch.equal(ms.attribution.EdgeScores.load(tmp_path / "edges").scores, scores.scores)


@bridge_only
def test_only_the_planted_path_scores(make_model, pairs, logit_difference):
    """One head of layer 0 and one of layer 1 write; every other edge is dead, and signs are those of exact patching."""
    model = make_model("llama")  # of its own, as its weights are changed after the load checks, which refuse dead MLPs
    with torch.no_grad():
        for name, weight in model.hf_model.named_parameters():
            if weight.ndim > 1:
                weight *= 0.4  # far from saturated: a gradient at one end can have the wrong sign where attention is
            if "down_proj" in name:
                weight.zero_()
            elif "o_proj" in name:
                layer = int(re.search(r"layers\.(\d+)", name)[1])
                kept = torch.arange(32) // 8 == (layer + 1 if layer < 2 else -1)
                weight[:, ~kept] = 0
    runs, first, second = pair_runs(model, pairs), Node("head", 0, 1), Node("head", 1, 2)
    possible = {Edge(first, second, slot) for slot in "qkv"} | {Edge(n, LOGITS, "resid") for n in (first, second)}
    for method in module.METHODS:
        scores = edge_attribution(model, runs, logit_difference, method=method, progress=False)
        listed = [(edge, score) for edge, score in scores.top() if edge.sender != Node("embed")]
        assert {edge for edge, _ in listed} == possible, method
        changes = measured_edges(model, runs, logit_difference, [edge for edge, _ in listed])
        exact = changes.sum(1) / gap(runs, logit_difference)
        strong = exact.abs() > 0.1 * exact.abs().max()
        assert strong.sum() >= 2
        estimates = torch.tensor([score for _, score in listed])
        assert bool((estimates.sign() == exact.sign())[strong].all()), method


def test_many_prompts_need_the_memory_of_few(llama, pairs, log_odds, monkeypatch):
    """Runs are let go before the next ones but one are made, also where stored runs of all prompts are given."""
    alive, counts, make = [], [], masks.pair_runs

    def counted(*args, **options):
        runs = make(*args, **options)
        counts.append(sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(runs.harmful.resid))
        assert len(runs.harmful) == 1
        return runs

    monkeypatch.setattr(module, "BATCH_TOKENS", 1)
    whole = make(llama, pairs)
    for given in (pairs, whole):
        alive.clear()
        counts.clear()
        with monkeypatch.context() as patch:
            patch.setattr(masks, "pair_runs", counted)
            edge_attribution(llama, given, log_odds, method="eap", progress=False)
        gc.collect()
        assert len(counts) == len(pairs) and max(counts) <= 1


class Stop(ms.RefusalLogOdds):
    """A metric at which the user presses Ctrl-C, the third time it is asked."""

    asked = 0

    def __call__(self, logits):
        type(self).asked += 1
        if type(self).asked == 3:
            raise KeyboardInterrupt
        return super().__call__(logits)


def test_control_c_leaves_the_model_clean(llama, pairs, log_odds):
    clean, before = hook_count(llama), llama.logits(pairs.harmful)
    for analysis in (ms.edge_attribution, ms.node_attribution, ms.activation_patching):
        Stop.asked = 0
        with pytest.raises(KeyboardInterrupt):
            analysis(llama, pairs, Stop(log_odds.refusal_ids, log_odds.refusal_tokens), progress=False)
        assert hook_count(llama) == clean, analysis
        torch.testing.assert_close(llama.logits(pairs.harmful), before, atol=1e-4, rtol=1e-4)
    inside = [(Site(SiteKind.MLP_OUT, 1), lambda tensor: (_ for _ in ()).throw(KeyboardInterrupt))]
    with pytest.raises(KeyboardInterrupt), llama.hooks(inside):
        edge_attribution(llama, pairs, log_odds, progress=False)
    assert hook_count(llama) == clean and not llama.lock._is_owned()


def test_progress_is_shown_when_asked(llama, pairs, log_odds, capsys):
    for analysis in (ms.edge_attribution, ms.node_attribution, ms.activation_patching):
        analysis(llama, pairs, log_odds, progress=False)
        assert capsys.readouterr().err == ""
        analysis(llama, pairs, log_odds)
        assert "<" in capsys.readouterr().err, "tqdm's [elapsed<remaining"


def test_no_hook_is_left(llama, pairs, log_odds):
    outside = ms.RefusalLogOdds((10**6,), ("no such token",))
    site, seen = Site(SiteKind.Z, 0), []
    runs = pair_runs(llama, pairs)
    with pytest.raises(IndexError):
        edge_attribution(llama, runs, outside, progress=False)
    before = llama.logits(pairs.harmful)
    with llama.hooks([(site, lambda tensor: seen.append(1))]):
        torch.testing.assert_close(llama.logits(pairs.harmful), before, atol=1e-4, rtol=1e-4)
    assert seen == [1]


def test_errors(llama, pairs, log_odds):
    with pytest.raises(ms.MechsafetyError, match="method='acdc'; expected one of"):
        edge_attribution(llama, pairs, log_odds, method="acdc")
    with pytest.raises(ms.MechsafetyError, match="steps=0; expected at least 1"):
        edge_attribution(llama, pairs, log_odds, steps=0)
    with pytest.raises(ms.MechsafetyError, match=r"neurons=\[3\]; expected layers 0 to 2, without nodes"):
        edge_attribution(llama, pairs, log_odds, neurons=[3])
    with pytest.raises(ms.MechsafetyError, match=r"neurons=\[1\] beside nodes; .* list single neurons as nodes"):
        edge_attribution(llama, pairs, log_odds, neurons=[1], nodes=[Node("mlp", 0)])
    for node in (Node("head", 3, 0), Node("neuron", 0, 48)):
        with pytest.raises(ms.MechsafetyError, match=f"{node} does not exist in Llama.*; the nearest is"):
            edge_attribution(llama, pairs, log_odds, nodes=[node])
    for node in (Node("logits"), Node("embed")):
        with pytest.raises(ms.MechsafetyError, match=f"^{node} among the nodes; expected heads, MLPs and neurons$"):
            edge_attribution(llama, pairs, log_odds, nodes=[node])
