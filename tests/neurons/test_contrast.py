"""One model's neurons: effect sizes by hand, and what single neurons write and react to."""

import pytest
import torch

import mechsafety as ms
from mechsafety.neurons import contrast_neurons, describe_neurons
from mechsafety.neurons.describe import output_weights
from mechsafety.nodes import Node


def span_means(model, prompts, span):
    rows = []
    for prompt in prompts:
        cache = model.cache([prompt], sites=["neurons"])
        rows.append(cache.neurons[:, 0, cache.tokens.span_mask(span)[0]].mean(1))
    return torch.stack(rows).double()


def test_effect_sizes_by_hand(llama, ragged):
    found = contrast_neurons(llama, ragged, batch_size=2)
    for span in ("instruction", "suffix"):
        a, b = (span_means(llama, prompts, span) for prompts in (ragged.harmful, ragged.harmless))
        expected = (a.mean(0) - b.mean(0)) / ((a.var(0) + b.var(0)) / 2).sqrt()
        torch.testing.assert_close(found.at(span).double(), expected, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(
            found.harmful_mean[found.spans.index(span)].double(), a.mean(0), atol=1e-5, rtol=1e-4
        )


def test_the_sign_is_that_of_harmful(llama, pairs):
    found = contrast_neurons(llama, pairs)
    swapped = contrast_neurons(llama, ms.PromptPairs.from_lists(pairs.harmless, pairs.harmful))
    torch.testing.assert_close(found.effects, -swapped.effects, atol=1e-4, rtol=1e-4)
    assert float(found.effects.abs().max()) > 0.5


def test_a_common_prefix_tells_nothing(llama, ragged):
    """Same tokens in every prompt: the differences are rounding, and no effect is made of them."""
    assert float(contrast_neurons(llama, ragged, spans=["prefix"]).effects.abs().max()) == 0.0


def test_views(llama, pairs, tmp_path):
    found = contrast_neurons(llama, pairs)
    best = found.ranked("suffix", 3)[0]
    assert abs(float(found.at("suffix")[best.layer, best.index])) == float(found.at("suffix").abs().max())
    frame = found.to_dataframe()
    assert len(frame) == 2 * 144 and frame.effect.abs().is_monotonic_decreasing
    row = frame[frame.span == "suffix"].iloc[0]
    assert row.node == str(best) and row.effect == float(found.at("suffix")[best.layer, best.index])
    again = type(found).load(found.save(tmp_path / "contrast"))
    assert torch.equal(again.effects, found.effects)
    assert repr(found) == "NeuronContrast(3 x 48 neurons, 4 pairs, spans instruction, suffix)"
    assert found.plot().data
    with pytest.raises(ms.MechsafetyError, match=r"^no effects at the span 'prefix'; expected one of"):
        found.at("prefix")


def test_bad_input(llama, pairs):
    with pytest.raises(ms.MechsafetyError, match=r"^spans \['middle'\]; expected some of"):
        contrast_neurons(llama, pairs, spans=["middle"])
    with pytest.raises(ms.MechsafetyError, match=r"^one pair; expected at least 2: an effect size needs variances$"):
        contrast_neurons(llama, ms.PromptPairs(pairs.pairs[:1]))


# --- single neurons ---------------------------------------------------------------------------------------------------

NODES = [Node("neuron", 2, 7), Node("neuron", 0, 3), Node("neuron", 2, 40)]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_output_weights_are_the_models(shared_model, kind):
    model = shared_model(kind)
    found = output_weights(model, NODES)
    for node, row in zip(NODES, found, strict=True):
        torch.testing.assert_close(row, model.bridge.blocks[node.layer].mlp.W_out[node.index], atol=1e-5, rtol=1e-4)


def test_promoted_tokens_gain_most(llama):
    """Adding the neuron's output to the final stream raises the promoted token's logit most."""
    found = describe_neurons(llama, NODES, n_tokens=3)
    weight = llama.hf_model.model.norm.weight
    for k, row in enumerate(output_weights(llama, NODES)):
        logits = (row * weight) @ llama.hf_model.lm_head.weight.T
        assert found.promoted[k][0] == llama.tokenizer.decode([int(logits.argmax())])
        assert found.suppressed[k][0] == llama.tokenizer.decode([int(logits.argmin())])
    assert found.neurons == tuple(NODES) and found.active == ((), (), ())


def test_most_active_tokens(llama, prompts):
    found = describe_neurons(llama, NODES, prompts, n_tokens=2, batch_size=2)
    for node, rows in zip(NODES, found.active, strict=True):
        every = []
        for prompt in prompts:
            cache = llama.cache([prompt], sites=["neurons"])
            inside = cache.tokens.span_mask("instruction")[0]
            values = cache.neurons[node.layer, 0, inside, node.index]
            texts = [llama.tokenizer.decode([token]) for token in cache.tokens.ids[0, inside].tolist()]
            every += list(zip(values.tolist(), texts, strict=True))
        every.sort(key=lambda row: -abs(row[0]))
        assert [row.token for row in rows] == [text for _, text in every[:2]]
        assert [row.activation for row in rows] == pytest.approx([value for value, _ in every[:2]], abs=1e-5)
    assert any(row.context for rows in found.active for row in rows)


def test_cards(llama, prompts, tmp_path):
    mask = torch.zeros(3, 48, dtype=torch.bool)
    mask[1, 4] = True
    found = describe_neurons(llama, mask, prompts)
    assert [str(node) for node in found.neurons] == ["L1.N4"] and len(found.promoted[0]) == 8
    assert type(found).load(found.save(tmp_path / "cards")).active == found.active
    assert found.to_dataframe().node.tolist() == ["L1.N4"] and found.plot().data
    with pytest.raises(ms.MechsafetyError, match=r"^0 neurons; expected 1 to 1,000; describe the top of a ranking$"):
        describe_neurons(llama, [])
