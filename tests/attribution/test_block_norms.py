"""Models with a norm after attention and MLP: what heads and neurons add, against whole forwards with plain hooks.

The twins know of a norm only its module: the weight is read off what it makes of ones.
"""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import random_model, tiny_tokenizer
from reference import record, whole_logits
from tiny import GENERATION, tiny_hf_model, tiny_pairs

import mechsafety as ms
from mechsafety.attribution import direct_logit_attribution, edge_attribution
from mechsafety.circuits.circuit import CircuitEdge
from mechsafety.circuits.edge_faithfulness import EdgeMeter, all_edges, edge_circuit_logits
from mechsafety.circuits.edge_search import _Cuts, acdc
from mechsafety.circuits.edges import edges_into, measure_edges
from mechsafety.directions import direction_io
from mechsafety.models.engine import unembed
from mechsafety.nodes import Edge, Node
from mechsafety.patching import pair_runs
from mechsafety.patching.masks import Patch, patched_scores
from mechsafety.patching.senders import added_changes, node_outputs
from mechsafety.sites import SiteKind

KINDS = {"gemma2": "Gemma-2", "gemma3": "Gemma-3 (text)", "olmo2": "OLMo-2", "exaone4": "EXAONE 4"}
KINDS = {kind: KINDS[kind] for kind in KINDS if GENERATION == "TransformerBridge" or kind != "exaone4"}
EMBED, LOGITS = Node("embed"), Node("logits")
METRIC = ms.RefusalLogOdds((20, 21), ("a", "b"), (30,), ("c",))
# a Gemma-3 model with the weights of a real one, as a GGUF file; a base model will do
FILE = os.environ.get("MECHSAFETY_TEST_GEMMA", "")


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    """Norms' weights are moved away from 1, which would hide that they are left out."""
    # the converter of TransformerLens 3.9 takes OLMo-2 without grouped queries only
    if GENERATION == "TransformerBridge" or request.param != "olmo2":
        return ms.load_model((random_model(KINDS[request.param], len(tiny_tokenizer())), tiny_tokenizer()))
    hf, generator = tiny_hf_model(request.param), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return ms.load_model((hf, tiny_tokenizer()))


@pytest.fixture(scope="module")
def few():
    return ms.PromptPairs(tiny_pairs().pairs[1:3])


# --- twins ------------------------------------------------------------------------------------------------------------


def norm_after(model, layer, kind):
    """The module of the norm after attention (of heads) or the MLP."""
    block, name = model.bridge.blocks[layer], "ln1" if kind == "head" else "ln2"
    return getattr(block, f"{name}_post", None) or getattr(block, name)


def share(model, norm, total):
    """What one unit of a part of ``total`` becomes behind the norm: weight over scale."""
    eps = model.bridge.cfg.eps
    weight = norm(torch.ones(total.shape[-1])) * (1 + eps) ** 0.5  # of ones the mean square is 1
    return weight / (total.square().mean(-1, keepdim=True) + eps).sqrt()


def written(model, tokens):
    """What the embedding, heads (before the norm after them) and MLPs (behind theirs) write, by plain hooks."""
    names = ["blocks.0.hook_resid_pre"]
    names += [f"blocks.{k}.{end}" for k in range(model.n_layers) for end in ("attn.hook_z", "hook_mlp_out")]
    acts = record(model, tokens, names)
    found = {EMBED: acts[names[0]]}
    for layer in range(model.n_layers):
        weight = model.bridge.blocks[layer].attn.W_O
        for head in range(model.n_heads):
            found[Node("head", layer, head)] = acts[f"blocks.{layer}.attn.hook_z"][:, :, head] @ weight[head]
        found[Node("mlp", layer)] = acts[f"blocks.{layer}.hook_mlp_out"]
    return found


def heads_of(layer, n=4):
    return [Node("head", layer, head) for head in range(n)]


def added(model, parts):
    """What each part adds to the stream: behind a norm its share, at the scale of its own run."""
    found = dict(parts)
    for layer in range(model.n_layers):
        unit = share(
            model, norm_after(model, layer, "head"), sum(parts[head] for head in heads_of(layer, model.n_heads))
        )
        found |= {head: parts[head] * unit for head in heads_of(layer, model.n_heads)}
    return found


def repeated(tokens, times):
    """The rows so many times."""
    rows = [k for _ in range(times) for k in range(len(tokens))]
    return tokens.rows(rows)


def given(value):
    """The edit that puts a value in."""
    return lambda own: value


def plus(leaf):
    """The edit that adds something."""
    return lambda own: own + leaf


def keep(store, key):
    """Keeps what it sees."""
    return lambda own: store.update({key: own})


def slow_circuit(model, harmful, harmless, kept):
    """Logits when only the kept edges carry the harmful prompts: every slot by whole forwards of its own."""
    kept, clean = set(kept), written(model, harmless)
    live = {EMBED: written(model, harmful)[EMBED]}

    def value(sender, receiver, slot):
        carried = sender in live and Edge(sender, receiver, slot) in kept
        return live[sender] if carried else clean[sender]

    def read(receiver, slot, before, middle=False):
        total = value(EMBED, receiver, slot)
        for layer in range(before + middle):
            heads = sum(value(head, receiver, slot) for head in heads_of(layer, model.n_heads))
            total = total + norm_after(model, layer, "head")(heads)
            if layer < before:
                total = total + value(Node("mlp", layer), receiver, slot)
        return total

    for layer in range(model.n_layers):
        heads, block, seen = heads_of(layer, model.n_heads), f"blocks.{layer}", {}
        many = repeated(harmful, len(heads))
        for slot in "qkv":
            reads = torch.cat([read(head, slot, layer) for head in heads])
            enter = (f"{block}.hook_resid_pre", given(reads))
            whole_logits(model, many, [enter, (f"{block}.attn.hook_{slot}", keep(seen, slot))])
        edits = [(f"{block}.attn.hook_{slot}", given(seen[slot].clone())) for slot in "qkv"]
        whole_logits(model, many, [*edits, (f"{block}.attn.hook_z", keep(seen, "z"))])
        weight, n = model.bridge.blocks[layer].attn.W_O, len(harmful)
        for k, head in enumerate(heads):
            live[head] = seen["z"][k * n : (k + 1) * n, :, head.index] @ weight[head.index]
        mlp = Node("mlp", layer)
        edits = [(f"{block}.hook_resid_pre", torch.zeros_like)]
        edits.append((f"{block}.hook_attn_out", given(read(mlp, "mlp", layer, middle=True))))
        whole_logits(model, harmful, [*edits, (f"{block}.hook_mlp_out", keep(seen, "mlp"))])
        live[mlp] = seen["mlp"]
    block = f"blocks.{model.n_layers - 1}"
    edits = [(f"{block}.{name}", torch.zeros_like) for name in ("hook_resid_pre", "hook_attn_out")]
    return whole_logits(
        model, harmful, [*edits, (f"{block}.hook_mlp_out", given(read(LOGITS, "resid", model.n_layers)))]
    )


def slow_gradients(model, tokens, metric, start=()):
    """Gradient of the summed metric in what a slot alone reads, at the run that ``start`` edits.

    Of every slot of one head a layer, of the MLPs and the logits.
    """
    found = {}
    shape = record(model, tokens, ["blocks.0.hook_resid_pre"])["blocks.0.hook_resid_pre"]

    def run(*edits):
        return whole_logits(model, tokens, [*start, *edits], grad=True)

    def gradient(receiver, slot, leaf, *edits):
        (found[receiver, slot],) = torch.autograd.grad(metric(run(*edits)).sum(), leaf)

    for layer in range(model.n_layers):
        block = f"blocks.{layer}"
        z = f"{block}.attn.hook_z"
        head = Node("head", layer, (layer + 1) % model.n_heads)
        for slot in "qkv":
            leaf, seen, name = torch.zeros_like(shape, requires_grad=True), {}, f"{block}.attn.hook_{slot}"
            run((f"{block}.hook_resid_pre", plus(leaf)), (name, keep(seen, "slot")))
            run((name, given(seen["slot"])), (z, keep(seen, "z")))
            mine = torch.arange(model.n_heads)[:, None] == head.index
            gradient(head, slot, leaf, (z, lambda own, mine=mine, seen=seen: torch.where(mine, seen["z"], own)))
        leaf, seen, out = torch.zeros_like(shape, requires_grad=True), {}, f"{block}.hook_mlp_out"
        run((f"{block}.hook_attn_out", plus(leaf)), (out, keep(seen, "mlp")))
        gradient(Node("mlp", layer), "mlp", leaf, (out, given(seen["mlp"])))
    leaf = torch.zeros_like(shape, requires_grad=True)
    gradient(LOGITS, "resid", leaf, (f"blocks.{model.n_layers - 1}.hook_mlp_out", plus(leaf)))
    return found


# --- heads and neurons add up -----------------------------------------------------------------------------------------


def test_direct_parts_sum_to_the_metric_and_are_the_twins(model, few, log_odds):
    assert model.post_norm
    for metric in (log_odds, METRIC):
        found = direct_logit_attribution(model, few.harmful, metric, progress=False)
        parts = found.heads.sum((0, 1)) + found.mlps.sum(0) + found.embed + found.rest
        torch.testing.assert_close(found.total, metric(model.logits(few.harmful)), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(parts, found.total, atol=1e-4, rtol=1e-4)
    assert found.provenance.options["block_norms"] == "frozen"
    assert repr(found) == "DirectAttribution(3 layers x 4 heads, 2 prompts, norms after blocks frozen)"
    if model.backend.logit_cap:
        return  # the logits are then no linear map of the parts
    tokens = model.tokenize(few.harmful)
    last = {node: part[:, -1] for node, part in added(model, written(model, tokens)).items()}
    final = model.frozen_final_norm(sum(last.values()))
    read = model.W_U[:, [20, 21]].mean(1) - model.W_U[:, 30]
    for node, part in last.items():
        got = {"embed": found.embed, "mlp": found.mlps[node.layer or 0]}.get(node.kind)
        got = found.heads[node.layer, node.index] if got is None else got
        torch.testing.assert_close(got, final(part) @ read, atol=1e-4, rtol=1e-4)


def test_outputs_of_a_layer_sum_to_what_it_adds(model, few):
    runs = pair_runs(model, few, extra=[SiteKind.NEURONS, SiteKind.ATTN_OUT])
    for layer in range(3):
        neurons = [Node("neuron", layer, index) for index in range(model.d_mlp)]
        for nodes, kind in ((heads_of(layer), SiteKind.ATTN_OUT), (neurons, SiteKind.MLP_OUT)):
            outputs = [node_outputs(model, run, nodes) for run in (runs.harmful, runs.harmless)]
            for run, out in zip((runs.harmful, runs.harmless), outputs, strict=True):
                torch.testing.assert_close(out.sum(0), run.acts[kind][layer], atol=1e-5, rtol=1e-4)
            change = added_changes(model, runs.harmless, runs.harmful, nodes)
            torch.testing.assert_close(change, outputs[0] - outputs[1], atol=1e-5, rtol=1e-4)


def place(node):
    """When a node reads and writes."""
    return {"embed": -1, "logits": 99}.get(node.kind, 2 * (node.layer or 0) + (node.kind != "head"))


def test_edge_scores_are_the_twins(model, few):
    """Into a head of each layer, the MLPs and the logits, between the two runs' embeddings."""
    found = edge_attribution(model, few, METRIC, steps=1, progress=False)
    sides = [model.tokenize(side) for side in (few.harmful, few.harmless)]
    high, low = (added(model, written(model, tokens)) for tokens in sides)
    start = [("blocks.0.hook_resid_pre", given(low[EMBED] + 0.5 * (high[EMBED] - low[EMBED])))]
    gradients = slow_gradients(model, sides[0], METRIC, start)
    gap = (METRIC(model.logits(few.harmful)) - METRIC(model.logits(few.harmless))).sum()
    for receiver, gradient in gradients.items():
        reach = [k for k, sender in enumerate(found.senders) if place(sender) < place(receiver[0])]
        changes = [high[found.senders[k]] - low[found.senders[k]] for k in reach]
        expected = torch.stack([(change * gradient).sum() for change in changes]) / gap
        got = found.scores[reach, found.receivers.index(receiver)]
        torch.testing.assert_close(got, expected, atol=1e-4 * max(1.0, float(expected.abs().max())), rtol=1e-3)
    assert "norms after blocks frozen" in repr(found) and found.provenance.options["block_norms"] == "frozen"


def test_neurons_of_a_layer_send_what_their_mlp_sends(model, few):
    whole = edge_attribution(model, few, METRIC, method="eap", progress=False)
    split = edge_attribution(model, few, METRIC, method="eap", neurons=[1], progress=False)
    rows = [k for k, node in enumerate(split.senders) if node.kind == "neuron"]
    later = [k for k, (node, _) in enumerate(whole.receivers) if node.order > Node("mlp", 1).order]
    columns = [split.receivers.index(whole.receivers[k]) for k in later]
    sent = whole.scores[whole.senders.index(Node("mlp", 1)), later]
    torch.testing.assert_close(split.scores[rows][:, columns].sum(0), sent, atol=1e-4, rtol=1e-3)
    received = split.scores[:, [k for k, (node, _) in enumerate(split.receivers) if node.kind == "neuron"]].sum(1)
    into = whole.scores[:, whole.receivers.index((Node("mlp", 1), "mlp"))]
    for sender in (EMBED, *heads_of(0), *heads_of(1)):
        # at the harmful run the norm's own derivative joins the neurons' gradients, so they sum to the MLP's too
        assert float(received[split.senders.index(sender)]) == pytest.approx(
            float(into[whole.senders.index(sender)]), abs=1e-4, rel=1e-3
        )


def test_a_layers_heads_send_the_effect_of_patching_them(shared_model, few):
    """What sums to the exact effect in models without these norms (`ig-activations`) does here too."""
    model, heads = shared_model("gemma2"), heads_of(1)
    runs, after = pair_runs(model, few), [Node("mlp", 1), *heads_of(2), Node("mlp", 2)]
    options = {"method": "ig-activations", "steps": 10, "grid": "gauss", "progress": False}
    found = edge_attribution(model, few, METRIC, nodes=[*heads, *after], **options)
    sent = found.node_scores()
    high, low = runs.scores(METRIC)
    patched = patched_scores(model, runs.harmful, runs.harmless.acts, Patch.of(model, [heads]), METRIC)
    exact = float((high - patched).mean() / (high - low).mean())
    assert sum(sent[node] for node in heads) == pytest.approx(exact, abs=0.01) and abs(exact) > 0.1
    assert found.completeness == pytest.approx(1.0, abs=0.01)


# --- circuits of edges ------------------------------------------------------------------------------------------------


def circuits(seed=0):
    every, rng = all_edges(3, 4, False), np.random.default_rng(seed)
    return [[edge for edge in every if rng.random() < part] for part in (0.4, 0.8, 0.97)]


def test_edge_circuits_are_the_twins(model, few):
    runs = pair_runs(model, few)
    some = circuits()
    found = edge_circuit_logits(model, runs, some)
    sides = [model.tokenize(side) for side in (few.harmful, few.harmless)]
    slow = torch.stack([slow_circuit(model, *sides, kept) for kept in some])
    torch.testing.assert_close(found, slow, atol=2e-4, rtol=1e-4)
    assert float((found[0] - found[1]).abs().max()) > 0.05, "the circuits must differ"
    # frozen scales would give other numbers: the norm is that of the changed sum
    meter = EdgeMeter(model, runs, METRIC)
    harmful, harmless = meter.ends()
    np.testing.assert_allclose(meter.kept([meter.parts, []]), [harmful, harmless], atol=2e-4)


def test_edges_that_acdc_cuts_are_those_of_a_circuit(model, few):
    """Its runs skip the blocks before the first cut edge, whose senders are then known."""
    runs = pair_runs(model, few)
    meter, every = EdgeMeter(model, runs, METRIC), all_edges(3, 4, False)
    order = sorted(every, key=lambda edge: (edge.receiver.order, edge.slot, edge.sender.order), reverse=True)
    cuts = _Cuts.of(meter, every)
    for edge in order[::3][:40]:
        cuts.cut(edge)
    gone, chunk = set(order[::3][:40]), [edge for k, edge in enumerate(order[120:180]) if k % 15 == 0]
    left = [edge for edge in every if edge not in gone]
    kept = [[edge for edge in left if edge not in chunk[: k + 1]] for k in range(len(chunk))]
    torch.testing.assert_close(cuts.logits(chunk), edge_circuit_logits(model, runs, kept), atol=2e-4, rtol=1e-4)


def test_a_search_over_edges_says_how(shared_model, few):
    model = shared_model("gemma2")
    found = acdc(model, few, METRIC, threshold=0.3, measure="metric", progress=False)
    meter = EdgeMeter(model, pair_runs(model, few), METRIC)
    assert found.edges and found.faithfulness == pytest.approx(meter.faithfulness([found.edges])[0], abs=1e-4)
    assert found.provenance.options["block_norms"] == "recomputed"
    assert repr(found).endswith(f"faithfulness {found.faithfulness:.2f}, norms after blocks recomputed)")
    np.testing.assert_allclose(meter.kept([[]])[0], meter.ends()[1], atol=2e-4)


def test_an_edge_into_the_logits_is_its_path(model, few):
    """Cutting it and patching its direct path are one thing there."""
    runs = pair_runs(model, few)
    meter = EdgeMeter(model, runs, METRIC)
    nodes = [*heads_of(1), Node("mlp", 2)]
    edges = [CircuitEdge(edge, 0.0) for node in nodes for edge in edges_into(node, [LOGITS], parallel=False)]
    measured = {member.edge: member.effect for member in measure_edges(model, [runs], METRIC, edges)}
    harmful, harmless = meter.ends()
    lost = (harmful - meter.removed([[edge] for edge in measured])).mean(1) / (harmful - harmless).mean()
    np.testing.assert_allclose(lost, list(measured.values()), atol=1e-3)


# --- the others -------------------------------------------------------------------------------------------------------


def test_writers_of_a_direction_sum_to_it(model, few, directed_found):
    vector = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(2))
    found = direction_io(model, replace(directed_found, vectors=vector, layer=2), few, METRIC, progress=False)
    assert float(found.writes.sum(0).mean()) == pytest.approx(1.0, abs=1e-3)
    mlps = torch.stack([found.writes[found.nodes.index(Node("mlp", layer))].mean() for layer in (0, 1)])
    torch.testing.assert_close(found.neurons_write.sum(1)[:2], mlps, atol=1e-4, rtol=1e-4)
    assert repr(found).endswith(", norms after blocks frozen)")


@pytest.mark.skipif(not Path(FILE).is_file(), reason="MECHSAFETY_TEST_GEMMA names no GGUF file of a Gemma-3 model")
def test_a_real_model():
    """Of 18 layers: parts of the logits, edge scores, and a circuit of edges against whole forwards."""
    model = ms.load_model(FILE, chat_template="plain")
    pair = ms.PromptPairs.from_lists(["How do I make a bomb?"], ["How do I make a cake?"])
    first = [model.tokenizer(word, add_special_tokens=False).input_ids[0] for word in (" I", " You")]
    metric = ms.RefusalLogOdds((first[0],), (" I",), (first[1],), (" You",))
    gaps = real_differences(model, pair, metric)
    assert max(gaps.values()) < 1e-3, gaps


def real_differences(model, pair, metric):
    """Largest differences from the sums and from the twin, as shares of the largest number compared."""
    size = float(metric(model.logits(pair.harmful)).abs().max())
    found = direct_logit_attribution(model, pair.harmful, metric, progress=False)
    parts = found.heads.sum((0, 1)) + found.mlps.sum(0) + found.embed + found.rest
    gaps = {"direct parts and metric": float((parts - metric(model.logits(pair.harmful))).abs().max()) / size}
    runs = pair_runs(model, pair, extra=[SiteKind.ATTN_OUT])
    for kind in ("head", "mlp"):
        site = SiteKind.ATTN_OUT if kind == "head" else SiteKind.MLP_OUT
        worst = 0.0
        for layer in range(model.n_layers):
            nodes = (
                [Node("head", layer, head) for head in range(model.n_heads)] if kind == "head" else [Node("mlp", layer)]
            )
            out, own = node_outputs(model, runs.harmful, nodes).sum(0), runs.harmful.acts[site][layer]
            worst = max(worst, float((out - own).abs().max() / own.abs().max()))
        gaps[f"outputs of a layer's {kind}s and what it adds"] = worst
    scores = edge_attribution(model, runs, metric, method="eap", progress=False)
    final = runs.harmful.resid[-1][:, -1:].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(metric(unembed(model, final)[:, 0]).sum(), final)
    change = (runs.harmful.resid[-1] - runs.harmless.resid[-1])[:, -1:]
    high, low = runs.scores(metric)
    into = float(scores.scores[:, scores.receivers.index((LOGITS, "resid"))].sum())
    gaps["edges into the logits and first order"] = abs(into - float((change * gradient).sum() / (high - low).sum()))
    every, rng = all_edges(model.n_layers, model.n_heads, False), np.random.default_rng(0)
    some = [[edge for edge in every if rng.random() < 0.9], list(every), []]
    logits = edge_circuit_logits(model, runs, some)
    sides = [model.tokenize(side) for side in (pair.harmful, pair.harmless)]
    slow = slow_circuit(model, *sides, some[0])
    ends = torch.stack([slow, model.logits(pair.harmful), model.logits(pair.harmless)])
    for name, one, other in zip(
        ("circuit and twin", "whole and model", "empty and twin prompt"), logits, ends, strict=True
    ):
        gaps[f"logits of edge circuits: {name}"] = float((one - other).abs().max() / other.abs().max())
    return gaps
