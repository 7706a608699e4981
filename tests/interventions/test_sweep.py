"""A sweep of strengths on a model whose refusal is one direction by construction."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import mechsafety as ms
from mechsafety.errors import MechsafetyError
from mechsafety.interventions import StrengthSweep, ablate, scale, steer, strength_sweep, sweep
from mechsafety.nodes import Node
from mechsafety.replies import reply_loss


@pytest.fixture(scope="module")
def measured(directed, directed_found):
    model, pairs, metric = directed
    part = (pairs.harmful[:6], pairs.harmless[:6])
    return strength_sweep(
        model, lambda s: directed_found.ablate(model, s), [0.0, 0.5, 1.0], *part, metric, name="removed", progress=False
    )


def test_refusals_fall_with_the_strength(measured):
    assert measured.refused_harmful.float().mean(1).tolist() == [1.0, 1.0, 0.0]
    assert not measured.refused_harmless.any()
    falling = measured.harmful.mean(1)
    assert falling[0] > falling[1] > falling[2] and falling[2] < -5


def test_strength_zero_is_the_model_itself(measured, directed):
    model, pairs, metric = directed
    torch.testing.assert_close(measured.harmful[0], metric(model.logits(pairs.harmful[:6])), atol=1e-4, rtol=1e-4)
    assert float(measured.kl[0].max()) < 1e-5 and float(measured.kl[2].mean()) > 1e-3


def test_side_effects_by_hand(measured, directed, directed_found):
    model, pairs, _ = directed
    p = model.logits(pairs.harmless[:6]).softmax(-1)
    with directed_found.ablate(model, 1.0):
        q = model.logits(pairs.harmless[:6]).softmax(-1)
        prompt, reply = pairs.harmless[0], "sure"
        loss = -model.logits([prompt]).log_softmax(-1)[0, model.tokenizer(reply).input_ids[0]]
        torch.testing.assert_close(reply_loss(model, [prompt], [reply])[0], loss, atol=1e-4, rtol=1e-4)
        assert float(reply_loss(model, [prompt], [""])[0]) != float(reply_loss(model, [prompt], [""])[0])  # NaN
    torch.testing.assert_close(measured.kl[2], (p * (p / q).log()).sum(-1), atol=1e-4, rtol=1e-3)
    frame = measured.to_dataframe().set_index(["strength", "measure"])
    value = frame.loc[(1.0, "perplexity, harmless"), "value"]
    assert value == pytest.approx(float(measured.loss[2].double().mean().exp()))


def test_loss_over_several_tokens(llama):
    """The mean over a reply's tokens equals one whole forward a token."""
    prompt, reply = "how do i bake bread", " make a cake"
    ids, more = llama.tokenize([prompt]).ids[0].tolist(), llama.tokenizer(reply, add_special_tokens=False).input_ids
    total = 0.0
    for k, token in enumerate(more):
        with torch.no_grad():
            logits = llama.hf_model(input_ids=torch.tensor([ids + more[:k]])).logits[0, -1]
        total -= float(logits.log_softmax(-1)[token])
    assert float(reply_loss(llama, [prompt], [reply])[0]) == pytest.approx(total / len(more), abs=1e-4)


def test_table_picture_and_round_trip(measured, tmp_path):
    frame = measured.to_dataframe()
    assert (
        len(frame) == 3 * 14
        and (frame.ci_low <= frame.value + 1e-9).all()
        and (frame.value <= frame.ci_high + 1e-9).all()
    )
    rate = frame[(frame.measure == "refusal rate, harmful") & (frame.strength == 1.0)].iloc[0]
    assert (rate.value, rate.ci_low) == (0.0, 0.0) and rate.ci_high == pytest.approx(0.390, abs=1e-3)  # Wilson, 0 of 6
    assert len(measured.plot().data) == 10
    again = StrengthSweep.load(measured.save(tmp_path / "sweep"))
    assert torch.equal(again.refused_harmful, measured.refused_harmful)
    np.testing.assert_allclose(again.to_dataframe().value, frame.value)
    assert repr(again).startswith("StrengthSweep(removed: 3 strengths, harmful refused 100% at 0 and 0% at 1; degen")


def test_any_intervention_and_judge(directed):
    model, pairs, metric = directed
    head = [Node("head", 0, 0)]

    def says_sure(asked, said):
        return ["refuses" if reply.startswith("sure") else "answers" for reply in said]

    options = {"judge": says_sure, "limit": 1e9, "references": ["sure"] * 2, "reply_tokens": 4, "progress": False}
    found = [
        strength_sweep(model, make, [1.0], pairs.harmful[:2], pairs.harmless[:2], metric, **options)
        for make in (lambda s: ablate(model, head, s, "zero"), lambda s: scale(model, head, 1 - s))
    ]
    assert found[0].refused_harmful.all()  # the judge looks for "sure", which the model says without that head
    torch.testing.assert_close(found[0].harmful, found[1].harmful, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def babbling(directed):
    """Strengths of a push towards one word: the first leaves refusals, the last makes the model say nothing else."""
    model, pairs, metric = directed
    word = model.tokenizer(" tea", add_special_tokens=False).input_ids[0]
    push = (model.W_U[:, word] / model.W_U[:, word].norm()).detach()
    part = (pairs.harmful[:4], pairs.harmless[:4])
    options = {"name": "pushed", "limit": 20.0, "reply_tokens": 24, "progress": False}
    return strength_sweep(model, lambda s: steer(model, push, s, [2]), [0.0, 1e3], *part, metric, **options)


def test_a_model_that_babbles_does_not_comply(babbling, directed, tmp_path):
    """Refusals fall to none, and every reply is a loop: the result says that nobody is answered."""
    model, pairs, _ = directed
    frame = babbling.to_dataframe().set_index(["strength", "measure"]).value
    assert [frame[s, "refusal rate, harmful"] for s in (0.0, 1e3)] == [1.0, 0.0]
    assert [frame[s, "degenerate, harmful"] for s in (0.0, 1e3)] == [0.0, 1.0]
    assert frame[1e3, "answers, harmful"] == 0.0 and frame[0.0, "answers, harmless"] == 1.0
    said = model.generate(pairs.harmful[:4], 24)
    own = float(reply_loss(model, pairs.harmful[:4], said).double().mean().exp())
    assert frame[0.0, "reply perplexity, harmful"] == pytest.approx(own)
    assert frame[1e3, "reply perplexity, harmful"] > 10 * own
    end = "4 of 4 replies that no longer refuse are degenerate: the model babbles rather than complies)"
    assert repr(babbling).endswith(end) and "degenerate 0% and 100%, perplexity 1" in repr(babbling)
    again = StrengthSweep.load(babbling.save(tmp_path / "babble"))
    assert repr(again) == repr(babbling) and again.kinds_harmless[1].kinds == ("degenerate",) * 4


def test_a_result_of_an_earlier_version_says_that_babble_was_not_measured(babbling, tmp_path):
    path = babbling.save(tmp_path / "old") / "result.json"
    stored = json.loads(path.read_text())
    for side in ("harmful", "harmless"):
        del stored["result"][f"kinds_{side}"]
    path.write_text(json.dumps(stored))
    old = StrengthSweep.load(tmp_path / "old")
    assert repr(old).endswith("harmful refused 100% at 0 and 0% at 1000; degenerate replies not measured)")
    new, left = babbling.to_dataframe(), old.to_dataframe()
    assert left.measure.tolist() == new.measure.tolist() and len(old.plot().data) == 10
    judged = left.measure.str.match("answers|degenerate|neither|reply")
    assert left[judged].value.isna().all() and left[~judged].equals(new[~judged])


def test_beyond_the_limit_nothing_refuses(directed, babbling):
    """The limit is one for all strengths: below every loss, all replies are degenerate at strength 0 too."""
    model, pairs, metric = directed
    options = {"limit": 0.0, "reply_tokens": 4, "progress": False}
    found = strength_sweep(
        model, lambda s: nullcontext(), [0.0], pairs.harmful[:2], pairs.harmless[:2], metric, **options
    )
    assert not found.refused_harmful.any() and found.kinds_harmful[0].share("degenerate") == 1.0


def test_the_limit_is_found_once(directed, monkeypatch):
    model, pairs, metric = directed
    found, plain = [], sweep.loss_limit
    monkeypatch.setattr(sweep, "loss_limit", lambda model: found.append(plain(model)) or found[-1])
    options = {"reply_tokens": 2, "progress": False}
    part = (pairs.harmful[:2], pairs.harmless[:2], metric)
    measured = strength_sweep(model, lambda s: nullcontext(), [0.0, 1.0, 2.0], *part, **options)
    assert len(found) == 1 and [one.limit for one in measured.kinds_harmful] == found * 3


def test_what_cannot_be_judged_is_refused_before_anything_runs(directed, monkeypatch):
    model, pairs, metric = directed
    part = (model, lambda s: nullcontext(), [0.0], pairs.harmful[:2], pairs.harmless[:2], metric)
    monkeypatch.setattr(ms.LensModel, "generate", lambda *args, **options: pytest.fail("it generates"))
    with pytest.raises(MechsafetyError, match=r"^the judge 'is_refusal' cannot be called with prompts and replies; "):
        strength_sweep(*part, judge=ms.replies.is_refusal)
    with (
        ablate(model, [Node("head", 0, 0)], source="zero"),
        pytest.raises(MechsafetyError, match=r"^an intervention is on, and perplexity is the unedited model's; judge"),
    ):
        strength_sweep(*part)


@pytest.mark.parametrize(
    ("strengths", "references", "message"),
    [
        ([], None, "no strengths or no prompts; expected at least one of each"),
        ([float("nan")], None, "strength=nan; expected a finite number"),
        ([1.0], ["one"], "1 references; expected one for each of 2 prompts"),
    ],
)
def test_refused(directed, strengths, references, message):
    model, pairs, metric = directed
    part = (pairs.harmful[:2], pairs.harmless[:2], metric)
    with pytest.raises(MechsafetyError) as caught:
        strength_sweep(model, lambda s: scale(model, [Node("mlp", 0)], s), strengths, *part, references=references)
    assert str(caught.value) == message and isinstance(caught.value, ms.MechsafetyError)
