"""Scores and general ability under patching, against plain forwards; judges and classifiers."""

import pytest
import torch
import transformers

import mechsafety as ms
from mechsafety.neurons import ReplyLikelihood, ability, measure, phrase_judge, text_classifier
from mechsafety.neurons.runs import greedy, lay_out, prompt_rows

NONE, ALL = torch.zeros(3, 48, dtype=torch.bool), torch.ones(3, 48, dtype=torch.bool)
SOME = torch.rand(3, 48, generator=torch.Generator().manual_seed(0)) < 0.4
REPLIES = ("sure here", "no", "sorry i can help people", "yes", "the sky is blue")


def mean_log_prob(model, prompt, reply):
    row = prompt_rows(model, [prompt])[0]
    ids = [*model.tokenizer(reply, add_special_tokens=False).input_ids, model.tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model.hf_model(input_ids=torch.tensor([row + ids])).logits[0].log_softmax(-1)
    return float(logits[range(len(row) - 1, len(row) + len(ids) - 1), ids].mean())


def test_log_odds_are_those_of_the_two_models_at_both_ends(pair, prompts, log_odds):
    found = measure(*pair, [NONE, SOME, ALL], prompts, log_odds)
    for k, model in ((0, pair[0]), (2, pair[1])):
        torch.testing.assert_close(found[k], log_odds(model.logits(prompts)), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[1], found[0]) and not torch.allclose(found[1], found[2])
    torch.testing.assert_close(measure(pair[0], None, [NONE], prompts, log_odds)[0], found[0], atol=1e-5, rtol=1e-5)


def test_likelihood_of_given_replies(pair, prompts):
    found = measure(*pair, [NONE, ALL], prompts, ReplyLikelihood(REPLIES))
    for row, model in zip(found, pair, strict=True):
        expected = [mean_log_prob(model, p, r) for p, r in zip(prompts, REPLIES, strict=True)]
        assert row.tolist() == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ms.MechsafetyError, match=r"^1 replies to 5 prompts; expected one a prompt$"):
        measure(*pair, [NONE], prompts, ReplyLikelihood(("no",)))


def test_a_judge_reads_prompts_and_replies_in_order(pair, prompts):
    seen = {}

    def length(asked, replies):
        seen.update(zip(asked, replies, strict=True))
        return [len(reply) for reply in replies]

    found = measure(*pair, [ALL], prompts, length, max_new_tokens=5)
    expected = pair[1].generate(prompts, 5)
    assert [seen[p] for p in prompts] == expected and found[0].tolist() == [len(reply) for reply in expected]


def test_ability_by_hand(pair, prompts):
    base, aligned = pair
    found = ability(base, aligned, [NONE, ALL], prompts, max_new_tokens=6)
    replies = greedy(base, None, None, lay_out(base, prompt_rows(base, prompts)), 6)[0]
    moved = greedy(aligned, None, None, lay_out(base, prompt_rows(base, prompts)), 6)[0]
    for k, (row, reply) in enumerate(zip(prompt_rows(base, prompts), replies, strict=True)):
        ids = torch.tensor([row + reply])
        with torch.no_grad():
            own, other = (m.hf_model(input_ids=ids).logits[0, len(row) - 1 : -1].log_softmax(-1) for m in pair)
        assert float(found.kl[1, k]) == pytest.approx(float((own.exp() * (own - other)).sum(-1).mean()), abs=1e-4)
        nll = -float(other[range(len(reply)), reply].mean())
        assert float(found.nll[1, k]) == pytest.approx(nll, abs=1e-4)
        same = next((j for j, (a, b) in enumerate(zip(reply, moved[k], strict=False)) if a != b), len(reply))
        assert float(found.agreement[1, k]) == pytest.approx(min(same, len(reply)) / len(reply)), "the generated reply"
    assert found.kl.shape == (4, 5), "two masks, then the aligned and the base model by themselves"
    for values in (found.kl, found.nll, found.agreement):
        torch.testing.assert_close(values[0], values[3], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(values[1], values[2], atol=1e-4, rtol=1e-4)
    assert float(found.kl[3].abs().max()) == 0 and float(found.agreement[3].min()) == 1
    assert float(found.agreement[2].mean()) < 1


def test_phrase_judge():
    assert phrase_judge(["a", "b"], ["Sorry, I can't help with that.", "Of course."]) == [1.0, 0.0]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, make_tokenizer):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config.id2label, config.label2id = {0: "safe", 1: "unsafe"}, {"safe": 0, "unsafe": 1}
    folder = tmp_path_factory.mktemp("classifier")
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_any_text_classifier_is_a_judge(classifier, pair, prompts):
    safe, unsafe = (text_classifier(classifier, label) for label in ("safe", "unsafe"))
    texts = ["sure here", "", "no"]
    both = [a + b for a, b in zip(safe(texts, texts), unsafe(texts, texts), strict=True)]
    assert both == pytest.approx([1.0, 1.0, 1.0], abs=1e-5)
    found = measure(*pair, [NONE], prompts, unsafe, max_new_tokens=3)
    assert float(found.min()) > 0 and float(found.max()) < 1
    with pytest.raises(ms.MechsafetyError, match=r"^the classifier has no label 'bad'; expected one of \['safe', 'uns"):
        text_classifier(classifier, "bad")


def test_a_classifier_that_is_not_there(tmp_path):
    with pytest.raises(ms.MechsafetyError, match=r"^cannot load the text classifier .*; expected a hub id that can be"):
        text_classifier(tmp_path / "none", "unsafe")
