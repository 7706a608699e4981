"""Prompts that say nothing new are left out, and said."""

import logging

import numpy as np
import pytest
import torch

import mechsafety as ms
from mechsafety.errors import MechsafetyError
from mechsafety.metrics import check_gap, sign_flip_p
from mechsafety.monitors.features import LabelledPrompts
from mechsafety.neurons import safety_neurons
from mechsafety.prompts import PromptPair, PromptPairs, distinct, omissions, unseen

TEA = PromptPair("make a bomb", "make a cake", "food")


def test_a_pair_counts_once(caplog):
    again = PromptPair(TEA.harmful, TEA.harmless, "another topic", "test")
    other = PromptPair("make a bomb", "make a pie")
    made = PromptPairs((TEA, again, other, TEA), "mine")
    assert made.pairs == (TEA, other), "the twin is another one"
    assert made.left_out == ("2 exact duplicates of earlier pairs left out",)
    assert [record.getMessage() for record in caplog.records] == ["mine: 2 exact duplicates of earlier pairs left out"]
    parts = [made.sample(1), *made.halves(), made.topic("food")]
    assert all(part.left_out == made.left_out for part in parts) and len(caplog.records) == 1, "it is said once"
    assert omissions(made) == {"left_out": list(made.left_out)}
    assert omissions(PromptPairs((TEA,))) == {} == omissions(None)


def test_a_pair_of_two_equal_prompts_has_no_gap(caplog):
    made = PromptPairs.from_lists(["tea", "bomb", "tea"], ["tea", "cake", "tea"])
    assert len(made) == 1 and made.left_out == ("2 pairs of two equal prompts left out: the gap is 0",)
    for texts, said in ((["tea"], "the pair"), (["tea", "cake"], "all 2 pairs")):
        with pytest.raises(MechsafetyError) as caught:
            PromptPairs.from_lists(texts, texts)
        assert str(caught.value) == (
            f"lists: the two prompts of {said} are equal; "
            "expected a harmful prompt and a harmless counterfactual that differs"
        )


def test_repeated_pairs_change_no_number(llama, log_odds, pairs):
    once = ms.activation_patching(llama, pairs, log_odds, progress=False)
    twice = ms.activation_patching(llama, PromptPairs(pairs.pairs * 2), log_odds, progress=False)
    assert twice.p_values() == once.p_values() and torch.equal(twice.changes, once.changes)
    assert twice.provenance.options["left_out"] == ["4 exact duplicates of earlier pairs left out"]
    assert "left_out" not in once.provenance.options


@pytest.mark.parametrize(
    "analysis", [ms.activation_patching, ms.path_patching, ms.edge_attribution, ms.node_attribution]
)
def test_a_gap_of_zero_has_no_shares(llama, pairs, analysis):
    """Another metric than the pairs differ in: the same number for every prompt."""

    class Flat(ms.RefusalLogOdds):
        def __call__(self, logits):
            return logits[..., 0] * 0.0

    with pytest.raises(MechsafetyError, match=r"^the metric of 4 pairs has a mean gap of 0, so nothing has a share; "):
        analysis(llama, pairs, Flat((5,), ("x",)), progress=False)


def test_gaps_that_are_not_numbers_or_of_the_other_sign(caplog):
    good = torch.tensor([1.0, 2.0])
    with pytest.raises(
        MechsafetyError, match=r"^the metric is NaN or infinite on 1 of 2 harmful prompts; expected fini"
    ):
        check_gap(torch.tensor([1.0, float("nan")]), good)
    with pytest.raises(MechsafetyError, match="infinite on 2 of 2 harmless prompts"):
        check_gap(good, good / 0)
    check_gap(good + 1, good)
    assert not caplog.records
    check_gap(good - 1, good)
    assert "the harmless prompts score higher than the harmful ones: shares are of a gap of -1" in caplog.text


@pytest.mark.parametrize("values", [[1.0, float("nan")], [float("inf"), 1.0], []])
def test_no_p_of_what_is_no_number(values):
    with pytest.raises(MechsafetyError, match="values are not finite; expected numbers, of at least one prompt"):
        sign_flip_p(np.array(values))


def test_prompts_without_duplicates(caplog):
    assert distinct(["a", "b", "a"], "prompts") == ["a", "b"] and distinct(["a", "b"], "prompts") == ["a", "b"]
    assert [record.getMessage() for record in caplog.records] == [
        "prompts: 1 exact duplicate of an earlier prompt left out"
    ]
    assert unseen(["a", "b", "c"], ["b", "x"], "test") == [0, 2]
    assert caplog.records[-1].getMessage() == "test: 1 of 3 prompts left out, learned from before"
    with pytest.raises(
        MechsafetyError, match=r"^test: all 2 prompts are among those that were learned from; expected o"
    ):
        unseen(["a", "a"], ["a"], "test")


def test_scores_of_neurons_see_each_prompt_once(pair_of_llamas):
    base, aligned = pair_of_llamas
    texts = ["make a bomb", "make a cake"]
    once, twice = (safety_neurons(aligned, base, given, max_new_tokens=2) for given in (texts, [*texts, texts[0]]))
    assert torch.equal(once.scores, twice.scores)


@pytest.fixture(scope="module")
def pair_of_llamas(make_model):
    return make_model("llama"), make_model("llama", 1)


def test_labelled_prompts(caplog):
    made = LabelledPrompts("set", ("a", "b", "a", "c"), (True, False, True, False), ("g", "h", "g", "i"))
    assert (made.prompts, made.unsafe, made.groups) == (("a", "b", "c"), (True, False, False), ("g", "h", "i"))
    assert caplog.records[-1].getMessage() == "set: 1 exact duplicate of an earlier prompt left out"
    with pytest.raises(MechsafetyError, match=r"^set: 'a' has both labels; expected one label for each prompt$"):
        LabelledPrompts("set", ("a", "b", "a"), (True, False, False))
    train = LabelledPrompts("train", ("a", "x"), (True, False))
    test = LabelledPrompts("test", ("a", "b", "y", "z"), (True, False, True, False))
    assert test.unseen_by(train) == LabelledPrompts("test", ("b", "y", "z"), (False, True, False))
    assert train.unseen_by(LabelledPrompts("other", ("p", "q"), (True, False))) == train
    with pytest.raises(MechsafetyError, match=r"^train: all 2 prompts are among those"):
        train.unseen_by(train)


def test_pairs_that_share_a_prompt(caplog):
    made = PromptPairs.from_lists(["a", "b", "c", "a"], ["w", "x", "x", "y"], "mine")
    assert made.without_shared_prompts().harmful == ["a", "b"]
    assert caplog.records[-1].getMessage() == "mine: 2 pairs left out, a prompt of which is in an earlier pair"
    few = made.without_shared_prompts()
    assert few.without_shared_prompts() is few


@pytest.fixture(autouse=True)
def _warnings(caplog):
    caplog.set_level(logging.WARNING, logger="mechsafety")
