"""Scores and general ability under patching, against plain forwards; judges."""

import pytest
import torch

import mechsafety as ms
from mechsafety.models.rows import lay_out, prompt_rows
from mechsafety.neurons import ReplyLikelihood, ReplyScore, ability, measure
from mechsafety.neurons.behaviour import Unedited
from mechsafety.neurons.runs import greedy
from mechsafety.replies import reply_loss

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
    found = measure(*pair, [NONE, SOME, ALL], prompts, log_odds).scores
    for k, model in ((0, pair[0]), (2, pair[1])):
        torch.testing.assert_close(found[k], log_odds(model.logits(prompts)), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[1], found[0]) and not torch.allclose(found[1], found[2])
    torch.testing.assert_close(
        measure(pair[0], None, [NONE], prompts, log_odds).scores[0], found[0], atol=1e-5, rtol=1e-5
    )


def test_likelihood_of_given_replies(pair, prompts):
    found = measure(*pair, [NONE, ALL], prompts, ReplyLikelihood(REPLIES)).scores
    for row, model in zip(found, pair, strict=True):
        expected = [mean_log_prob(model, p, r) for p, r in zip(prompts, REPLIES, strict=True)]
        assert row.tolist() == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ms.MechsafetyError, match=r"^1 replies to 5 prompts; expected one per prompt$"):
        measure(*pair, [NONE], prompts, ReplyLikelihood(("no",)))


def test_a_judge_and_a_score_read_prompts_and_replies_in_order(pair, prompts):
    seen = {}

    def long(asked, replies):
        seen.update(zip(asked, replies, strict=True))
        return ["refuses" if len(reply) > 12 else "answers" for reply in replies]

    expected = pair[1].generate(prompts, 5)
    found = measure(*pair, [ALL], prompts, long, max_new_tokens=5)
    assert [seen[p] for p in prompts] == expected == list(found.replies[0])
    assert found.scores[0].tolist() == [float(len(reply) > 12) for reply in expected]
    assert found.kinds == (tuple(long(prompts, expected)),)
    length = ReplyScore("length", lambda asked, replies: [len(reply) for reply in replies])
    scored = measure(*pair, [ALL], prompts, length, max_new_tokens=5)
    assert scored.scores[0].tolist() == [len(reply) for reply in expected] and scored.replies == found.replies


def test_a_judge_of_another_form_is_refused(pair, prompts):
    """One argument is refused before anything is generated, numbers as soon as they are seen."""
    with pytest.raises(ms.MechsafetyError, match=r"^the judge 'is_refusal' cannot be called with prompts and repl"):
        measure(*pair, [NONE], prompts, ms.replies.is_refusal)
    with pytest.raises(ms.MechsafetyError, match=r"^the judge says \['1.0'\] of 5 replies; expected one of \['refu"):
        measure(*pair, [NONE], prompts, lambda asked, said: [1.0] * 5, max_new_tokens=1)


def test_a_patched_reply_is_beyond_the_limit_only_if_both_models_find_it_so(pair, prompts):
    own = [model.generate(prompts, 6) for model in pair]
    losses = torch.stack([reply_loss(model, prompts, own[1]) for model in pair])
    assert bool((losses[0] > losses[1]).all()), "what the aligned model says itself is more likely under it"
    between = float(losses[1].max()) + 1e-4
    found = Unedited.of(*pair, limit=between).kinds(prompts, own[1], ["answers"] * 5)
    torch.testing.assert_close(found.loss, losses[1])
    assert found.kinds == ("answers",) * 5
    alone = Unedited.of(pair[0], limit=between).kinds(prompts, own[1], ["answers"] * 5)
    assert [kind == "degenerate" for kind in alone.kinds] == (
        losses[0] > between
    ).tolist() and "degenerate" in alone.kinds


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
