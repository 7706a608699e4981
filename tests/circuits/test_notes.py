"""What nodes write and read, and what is left once some are ablated: against plain hooks."""

import math

import pytest
import torch

import mechsafety as ms
from mechsafety.circuits import ablations
from mechsafety.circuits.ablations import measure_ablation, rerun
from mechsafety.circuits.circuit import CircuitNode
from mechsafety.circuits.notes import attention_examples, measure_notes
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Node, head_and_mlp_nodes
from mechsafety.patching import pair_runs
from mechsafety.replies import loss_limit, phrase_judge
from mechsafety.sites import Site, SiteKind
from mechsafety.viz.cards import ablation_data

HEAD, MLP, NEURON = Node("head", 1, 2), Node("mlp", 1), Node("neuron", 2, 5)


@pytest.fixture(scope="module")
def notes(llama, pairs):
    runs = pair_runs(llama, pairs, extra=[SiteKind.NEURONS])
    return measure_notes(llama, runs, pairs, [HEAD, MLP, NEURON], n_tokens=5)


def direct_logits(model, prompt: str, node: Node) -> torch.Tensor:
    """What removing the node's output at the last token from the final norm's input takes from the logits."""
    site = {"head": SiteKind.Z, "mlp": SiteKind.MLP_OUT, "neuron": SiteKind.NEURONS}[node.kind]
    sites = [Site(site, node.layer), Site(SiteKind.FINAL_NORM_IN)]
    acts = model.read(model.tokenize([prompt]), sites)
    own, stream = acts[sites[0]][0, -1], acts[sites[1]][0, -1]
    if node.kind == "head":
        own = own[node.index] @ model.W_O(node.layer)[node.index]
    elif node.kind == "neuron":
        own = own[node.index] * model.W_out(node.layer)[node.index]
    norm = model.frozen_final_norm(stream)
    return (norm(stream) - norm(stream - own)) @ model.W_U.float()


@pytest.mark.parametrize("node", [HEAD, MLP, NEURON], ids=str)
def test_tokens_are_those_whose_logits_the_output_moves_most(node, notes, llama, pairs) -> None:
    moved = sum(
        direct_logits(llama, bad, node) - direct_logits(llama, good, node)
        for bad, good in zip(pairs.harmful, pairs.harmless, strict=True)
    )
    moved = moved - moved.mean()
    for found, sign in ((notes[node].promotes, 1), (notes[node].suppresses, -1)):
        expected = (sign * moved).topk(5).indices.tolist()
        assert found == tuple(llama.tokenizer.decode([token]) for token in expected)


def test_spans_and_activations(notes, llama, pairs) -> None:
    assert sum(notes[HEAD].spans.values()) == pytest.approx(1.0, abs=1e-5)
    total = 0.0
    for prompt in pairs.harmful:
        tokens = llama.tokenize([prompt])
        start, end = tokens.spans[0].instruction
        total += float(llama.cache(tokens, ["pattern"]).pattern[1, 2, 0, -1, start:end].sum())
    assert notes[HEAD].spans["instruction"] == pytest.approx(total / len(pairs), abs=1e-5)
    assert notes[MLP].spans is None and notes[MLP].texts == notes[HEAD].texts == ()
    (words, values), (other, _) = notes[NEURON].texts
    assert words == tuple(llama.token_strings(pairs.harmful[0])) and other != words
    acts = llama.cache([pairs.harmful[0]], ["neurons"]).neurons[2, 0, :, 5]
    assert values == pytest.approx(acts.tolist(), rel=1e-3)


@pytest.mark.parametrize("node", [HEAD, NEURON], ids=str)
def test_tokens_behind_a_norm_are_those_of_the_share(node, shared_model, pairs) -> None:
    """What a part adds behind a norm: what it writes, times what one unit of the sum becomes there."""
    model, moved = shared_model("gemma2"), 0.0
    kind, after = (SiteKind.Z, "ln1_post") if node.kind == "head" else (SiteKind.NEURONS, "ln2_post")
    weight = model.W_O(node.layer) if node.kind == "head" else model.W_out(node.layer)
    for prompts, sign in ((pairs.harmful, 1), (pairs.harmless, -1)):
        for prompt in prompts:
            sites = [Site(kind, node.layer), Site(SiteKind.FINAL_NORM_IN)]
            acts = model.read(model.tokenize([prompt]), sites)
            own, stream = acts[sites[0]][0, -1], acts[sites[1]][0, -1]
            parts = torch.einsum("hk,hkd->hd", own, weight) if node.kind == "head" else own[:, None] * weight
            norm = getattr(model.bridge.blocks[node.layer], after)
            total = parts.sum(0)
            share = parts[node.index] * norm(torch.ones_like(total)) / total.square().mean().sqrt()
            moved = moved + sign * model.frozen_final_norm(stream)(share) @ model.W_U.float()
    found = measure_notes(model, pair_runs(model, pairs, extra=[SiteKind.NEURONS]), pairs, [HEAD, NEURON], n_tokens=5)
    moved = moved - moved.mean()
    assert found[node].promotes == tuple(model.tokenizer.decode([token]) for token in moved.topk(5).indices.tolist())


def test_attention_of_all_heads_or_of_the_strongest(llama, pairs) -> None:
    members = [CircuitNode(Node("head", layer, head), effect=0.1 * layer + head) for layer in (0, 2) for head in (1, 3)]
    every = attention_examples(llama, pairs, members)
    assert [str(head) for head in every[0].heads] == ["L0.H1", "L0.H3", "L2.H1", "L2.H3"]
    entries = sum(len(one.tokens) ** 2 for one in every)
    some = attention_examples(llama, pairs, members, max_entries=2 * entries)
    assert [str(head) for head in some[1].heads] == ["L0.H3", "L2.H3"]
    assert torch.equal(some[1].patterns, every[1].patterns[[1, 3]])
    assert attention_examples(llama, pairs, members, max_entries=entries - 1) == ()


def test_an_ablation_runs_the_model_again(llama, pairs, log_odds) -> None:
    gone, watched = [Node("head", 0, 1), Node("mlp", 0)], [Node("head", 1, 2), Node("mlp", 2), Node("mlp", 0)]
    before = [float(log_odds(llama.logits(side)).mean()) for side in (pairs.harmful, pairs.harmless)]
    found = measure_ablation(llama, pairs, log_odds, gone, watched=watched, replies=True)
    for said in found.replies:
        assert len(said.kinds) == len(pairs) and not bool(said.loss.isnan().any())
    assert not llama.edited
    with ms.ablate(llama, gone, prompts=pairs.harmless):
        after = float(log_odds(llama.logits(pairs.harmful)).mean())
        expected = {node: patched(llama, pairs, log_odds, node) for node in watched[:2]}
    assert found.score == pytest.approx((before[0], after), abs=1e-4) and abs(before[0] - after) > 1e-3
    assert found.effects.keys() == set(watched[:2]) and found.refusal_rate == (0.0, 0.0)
    for node, score in expected.items():
        assert found.effects[node] == pytest.approx((after - score) / (before[0] - before[1]), abs=1e-3)
    assert found.name == "without L0.H1, L0.MLP"


def patched(model, pairs, metric, node: Node) -> float:
    """Mean metric with one node at its values on the twin, prompt by prompt, by plain hooks."""
    site = Site(SiteKind.Z if node.kind == "head" else SiteKind.MLP_OUT, node.layer)
    total = 0.0
    for bad, good in zip(pairs.harmful, pairs.harmless, strict=True):
        values = model.read(model.tokenize([good]), [site])[site]

        def edit(own, values=values):
            new = own.clone()
            if node.kind == "head":
                new[:, :, node.index] = values[:, :, node.index]
                return new
            return values

        with model.hooks([(site, edit)]):
            total += float(metric(model.logits([bad])))
    return total / len(pairs)


def test_nothing_is_left_after_a_failed_ablation(llama, pairs, log_odds) -> None:
    with pytest.raises(MechsafetyError, match=r"L9\.H0 does not exist"):
        measure_ablation(llama, pairs, log_odds, [MLP], watched=[Node("head", 9, 0)])
    assert not llama.edited


@pytest.fixture(scope="module")
def mapped(planted):
    model, pairs = planted
    return (
        model,
        pairs,
        ms.map_refusal_circuit(
            model,
            pairs,
            options=ms.MapOptions(limit=16, n_random=19, n_added=5, n_resamples=1, level="neuron"),
            progress=False,
        ),
    )


def test_a_map_brings_notes_for_every_node_to_its_page(mapped) -> None:
    from mechsafety.viz import circuit_html

    _, _, circuit = mapped
    assert circuit.details.notes.keys() == {member.node for member in circuit.nodes}
    assert all(note.promotes for note in circuit.details.notes.values())
    heads = [member.node for member in circuit.nodes if member.node.kind == "head"]
    assert set(circuit.details.attention[0].heads) == set(heads) and len(heads) > 0
    text = circuit_html(circuit)
    assert '"promotes":' in text and '"spans":' in text and "decision, a token" in text
    assert "a token" not in circuit_html(circuit.without_details())
    assert "notes" not in circuit.to_json()


def test_a_widget_of_a_model_reruns_it(mapped) -> None:
    pytest.importorskip("anywidget")
    model, pairs, circuit = mapped
    widget = circuit.widget(model, pairs)
    assert '"ablate":true' in widget.page and '"ablate":false' in circuit.widget().page
    gone = max(circuit.nodes, key=lambda member: member.effect).node
    widget.ablated = [str(gone)]
    shown = widget.ablation
    assert widget.message == "" and shown["nodes"] == [str(gone)] and shown["text"].startswith("metric ")
    assert shown["effects"].keys() == {str(member.node) for member in circuit.nodes} - {str(gone)}
    assert not model.edited
    score = measure_ablation(model, pairs, ms.RefusalLogOdds.of(model, circuit.metric["refusal_tokens"]), [gone]).score
    assert f"{score[1]:.2f}".replace("-", "\u2212") in shown["text"] and score[1] < score[0]


def test_a_box_judges_replies_and_asks_the_unedited_model_once(mapped, monkeypatch) -> None:
    model, pairs, circuit = mapped
    asked, plain = [], ablations.unedited_replies
    monkeypatch.setattr(
        ablations, "unedited_replies", lambda *args, **options: asked.append(1) or plain(*args, **options)
    )
    ablated = rerun(circuit, model, pairs, replies=True)
    assert not asked
    found = [ablated((member.node,)) for member in circuit.nodes[:2]]
    assert len(asked) == 1 and found[0].replies[0] == found[1].replies[0]
    before, after = found[0].replies
    assert before.kinds == tuple(phrase_judge(pairs.harmful, model.generate(pairs.harmful, 100)))
    assert before.limit == after.limit == loss_limit(model) or math.isnan(before.limit)
    assert found[0].refusal_rate == (before.share("refuses"), after.share("refuses"))


def test_ablating_everything_makes_the_model_babble(mapped) -> None:
    """Without its heads and MLPs the planted model no longer refuses; it says what it itself finds absurd instead."""
    model, pairs, circuit = mapped
    metric = ms.RefusalLogOdds.of(model, circuit.metric["refusal_tokens"])
    every = head_and_mlp_nodes(model.n_layers, model.n_heads)
    known = ms.judge_replies(model, pairs.harmful, model.generate(pairs.harmful, 100), limit=5.0)
    found = measure_ablation(model, pairs, metric, every, replies=True, known=known, progress=False)
    before, after = found.replies
    assert before == known.without_text() and found.refusal_rate[0] > 0.8 and found.refusal_rate[1] == 0.0
    assert before.share("degenerate") < 0.2 and after.share("degenerate") == 1.0
    assert ablation_data([found])[0]["text"].endswith("degenerate: the model babbles rather than complies")
    with pytest.raises(
        MechsafetyError, match=r"^known replies to 8 other prompts; expected replies to the 7 harmful pr"
    ):
        measure_ablation(model, pairs[:7], metric, every, replies=True, known=known)


def test_a_widget_refuses_another_model(mapped, llama, pairs) -> None:
    with pytest.raises(MechsafetyError, match="has other weights than the model that was mapped"):
        rerun(mapped[2], llama, pairs)
