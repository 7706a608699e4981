"""What nodes and directions promote: against the logits of the node's own output, computed from hooks."""

import pytest
import torch

import mechsafety as ms
from mechsafety.attribution import NodeCards, describe_nodes
from mechsafety.circuits.notes import measure_notes
from mechsafety.nodes import Node
from mechsafety.patching import pair_runs
from mechsafety.sites import Site, SiteKind

NAMES = ["L1.H2", "M0", "L2.N5"]


@pytest.fixture(scope="module")
def cards(llama, pairs):
    return describe_nodes(llama, NAMES, pairs, n_tokens=5)


def direct(model, prompt, layer):
    """Change of the logits by an MLP's output at the last token, with the final norm's scale of the run."""
    sites = [Site(SiteKind.MLP_OUT, layer), Site(SiteKind.FINAL_NORM_IN)]
    acts = model.read(model.tokenize([prompt]), sites)
    own, stream = acts[sites[0]][0, -1], acts[sites[1]][0, -1]
    norm = model.frozen_final_norm(stream)
    return (norm(own) - norm(torch.zeros_like(own))) @ model.W_U.float()


def test_changes_are_those_of_the_output(cards, llama, pairs):
    moved = torch.stack(
        [
            direct(llama, bad, 0) - direct(llama, good, 0)
            for bad, good in zip(pairs.harmful, pairs.harmless, strict=True)
        ]
    ).mean(0)
    moved = moved - moved.mean()
    best = moved.topk(5)
    assert [token for token, _ in cards.promoted[1]] == [llama.tokenizer.decode([k]) for k in best.indices.tolist()]
    assert [change for _, change in cards.promoted[1]] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert [change for _, change in cards.suppressed[1]] == pytest.approx((-(-moved).topk(5).values).tolist(), abs=1e-5)


def test_they_are_the_tokens_of_a_circuits_cards(cards, llama, pairs):
    nodes = [Node("head", 1, 2), Node("mlp", 0), Node("neuron", 2, 5)]
    notes = measure_notes(llama, pair_runs(llama, pairs, extra=[SiteKind.NEURONS]), pairs, nodes, n_tokens=5)
    for node, up, down in zip(nodes, cards.promoted, cards.suppressed, strict=True):
        assert notes[node].promotes == tuple(token for token, _ in up)
        assert notes[node].suppresses == tuple(token for token, _ in down)


def test_table_figure_and_file(cards, tmp_path):
    table = cards.to_dataframe()
    assert list(table.node.unique()) == ["L1.H2", "L0.MLP", "L2.N5"] and len(table) == 30
    own = table[table.node == "L0.MLP"].logit_change
    assert list(own) == sorted(own, reverse=True), "from the most promoted to the most suppressed"
    figure = cards.plot("M0")
    assert list(figure.data[0].x) == list(own)[::-1] and figure.layout.title.text == "What L0.MLP promotes"
    again = NodeCards.load(cards.save(tmp_path / "cards.json"))
    assert again.promoted == cards.promoted and repr(again) == "NodeCards(L1.H2, L0.MLP, L2.N5)"
    with pytest.raises(ms.MechsafetyError, match=r"^L0\.H0 was not described; expected L1\.H2, L0\.MLP, L2\.N5$"):
        cards.plot("L0.H0")


def test_a_direction_promotes_what_its_vector_does(directed, directed_found):
    model, pairs, _ = directed
    found = directed_found.describe(model, pairs, n_tokens=3)
    logits = torch.zeros(model.d_vocab)
    for prompt in pairs.harmful:
        stream = model.read(model.tokenize([prompt]), [Site(SiteKind.FINAL_NORM_IN)])[Site(SiteKind.FINAL_NORM_IN)]
        norm = model.frozen_final_norm(stream[0, -1])
        vector = directed_found.vector.float()
        logits += (norm(vector) - norm(torch.zeros_like(vector))) @ model.W_U.float() / len(pairs)
    best = (logits - logits.mean()).topk(3)
    assert [token for token, _ in found.promoted[0]] == [model.tokenizer.decode([k]) for k in best.indices.tolist()]
    assert [change for _, change in found.promoted[0]] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert found.names == (f"direction of layer {directed_found.layer}",)
    assert found.plot(found.names[0]).layout.title.text == f"What {found.names[0]} promotes"


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([], "no nodes; expected at least one head, MLP or neuron"),
        ("logits", "logits cannot be patched; expected heads, MLPs or neurons"),
        ("L0.H9", "L0.H9 does not exist in LlamaForCausalLM"),
    ],
)
def test_what_cannot_be_described(llama, pairs, nodes, message):
    with pytest.raises(ms.MechsafetyError, match=f"^{message}"):
        describe_nodes(llama, nodes, pairs)
