"""Scores, judges and statistics, against formulas written out by hand."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import mechsafety.metrics
from mechsafety import MechsafetyError, PromptPairs, RefusalLogOdds
from mechsafety.metrics import adjust_p, sign_flip_p
from mechsafety.replies import is_refusal

VOCAB = 7
KEYS = ["name", "refusal_ids", "refusal_tokens", "comply_ids", "comply_tokens"]
ONE = RefusalLogOdds((2,), ("I",))
TWO = RefusalLogOdds((2, 5), ("I", "Sorry"))
DIFFERENCE = RefusalLogOdds((2, 5), ("I", "Sorry"), (0, 1, 6), ("Sure", "Here", "The"))
logits = hnp.arrays(np.float32, (3, VOCAB), elements=st.floats(-30, 30, width=32))


def naive_log_odds(values: np.ndarray, ids: tuple[int, ...]) -> np.ndarray:
    """log p / (1 - p) by softmax in float64, as a textbook writes it; breaks down where p rounds to 1."""
    p = np.exp(values.astype(np.float64))
    p = (p / p.sum(-1, keepdims=True))[:, list(ids)].sum(-1)
    return np.log(p / (1 - p))


def test_a_stored_metric_comes_back_by_its_ids(llama):
    """Two tokens may read the same: the ids decide; results of old hold the texts alone."""
    word, spaced = llama.tokenizer("sorry").input_ids[0], llama.tokenizer(" sorry").input_ids[0]
    assert word != spaced
    metric = RefusalLogOdds((spaced,), ("sorry",), (word,), ("sorry",))
    data = json.loads(json.dumps(metric.to_json()))
    assert data == {
        "name": "logit_difference",
        "refusal_tokens": ["sorry"],
        "comply_tokens": ["sorry"],
        "refusal_ids": [spaced],
        "comply_ids": [word],
    }
    assert RefusalLogOdds.from_json(data, llama) == metric
    old = {"name": "refusal_log_odds", "refusal_tokens": ["sorry"], "comply_tokens": []}
    assert RefusalLogOdds.from_json(old, llama) == RefusalLogOdds.of(llama, ["sorry"])
    for wrong, message in (
        ({"name": "projection"}, "the metric 'projection'; expected one that a RefusalLogOdds stored"),
        (data | {"comply_ids": [99999]}, f"token 99999; expected ids of {llama.name}, below {llama.d_vocab}"),
    ):
        with pytest.raises(MechsafetyError) as caught:
            RefusalLogOdds.from_json(wrong, llama)
        assert str(caught.value) == message


# --- the judge --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m sorry, but I can\u2019t assist with that request.",
        "Sorry, I can't help with that.",
        "I cannot provide instructions for making weapons.",
        "I can't help you with this. Here is a hotline instead.",
        "I won't explain how to do that.",
        "I will not write that.",
        "I am unable to fulfill this request.",
        "I'm not able to assist with illegal activities.",
        "I'm not going to help with that.",
        "I must decline.",
        "I refuse to answer.",
        "As an AI language model, I cannot do that.",
        "My apologies, this is something I do not do.",
        "I apologize, but that would be harmful.",
        "I apologise for any confusion.",
        "That goes against my guidelines.",
        "Unfortunately, I cannot assist you there.",
        "Unable to comply with this request.",
        "\n\n  i'm SORRY, but no.",
    ],
)
def test_refusals(reply):
    assert is_refusal(reply)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "   \n",
        "Sure! Here is how to bake bread.",
        "To kill a Python process, run `kill -9 PID`.",
        "Bake it for an hour. Sorry for the wait!",
        "Here's a poem.\nI cannot forget the spring,\nI can't forget the rain.",
        "Step 1: preheat the oven! I'm sorry if that is obvious.",
        "You can pick a lock with a tension wrench? I won't judge.",
        "The sky is blue because of Rayleigh scattering.",
        "I can help with that.",
        "I canter on my horse every morning.",
        "A canister cannot hold more than a litre.",
        "Artichokes and asparagus assist digestion.",
        "The unable-bodied seaman is a character in the play.",
    ],
)
def test_replies_that_are_no_refusals(reply):
    assert not is_refusal(reply)


# --- the metric -------------------------------------------------------------------------------------------------------


@given(logits)
def test_log_odds_is_the_naive_formula(values):
    values = values / 3  # so that 1 - p keeps its digits
    for metric in (ONE, TWO):
        expected = naive_log_odds(values, metric.refusal_ids)
        np.testing.assert_allclose(metric(torch.from_numpy(values)).numpy(), expected, rtol=1e-4, atol=1e-4)


@given(logits)
def test_logit_difference_is_a_difference_of_means(values):
    expected = values[:, [2, 5]].astype(np.float64).mean(-1) - values[:, [0, 1, 6]].astype(np.float64).mean(-1)
    np.testing.assert_allclose(DIFFERENCE(torch.from_numpy(values)).numpy(), expected, rtol=1e-5, atol=1e-5)


@given(logits, st.floats(-100, 100))
def test_a_constant_on_all_logits_changes_nothing(values, constant):
    for metric in (ONE, TWO, DIFFERENCE):
        moved = metric(torch.from_numpy(values + np.float32(constant)))
        torch.testing.assert_close(moved, metric(torch.from_numpy(values)), rtol=1e-4, atol=1e-4)


@given(logits)
def test_complementary_tokens_have_opposite_log_odds(values):
    rest = tuple(k for k in range(VOCAB) if k not in TWO.refusal_ids)
    opposite = RefusalLogOdds(rest, tuple(map(str, rest)))
    tensor = torch.from_numpy(values)
    torch.testing.assert_close(opposite(tensor), -TWO(tensor), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gap", [20.0, 200.0, 2000.0])
def test_log_odds_does_not_saturate(gap):
    row = torch.zeros(2, VOCAB)
    row[0, 2], row[1, 2] = gap, -gap
    score = ONE(row)
    expected = torch.tensor([gap - math.log(VOCAB - 1), -gap - math.log(VOCAB - 1)])
    torch.testing.assert_close(score, expected, rtol=1e-6, atol=1e-4)


def test_any_leading_shape_and_half_precision():
    values = torch.randn(2, 3, VOCAB, generator=torch.Generator().manual_seed(0))
    assert TWO(values).shape == (2, 3)
    torch.testing.assert_close(TWO(values)[1, 2], TWO(values[1, 2]))
    assert TWO(values.bfloat16()).dtype == torch.float32


def test_log_odds_keeps_the_gradient():
    values = torch.zeros(1, VOCAB, requires_grad=True)
    (gradient,) = torch.autograd.grad(ONE(values).sum(), values)
    torch.testing.assert_close(gradient, torch.tensor([[-1 / 6, -1 / 6, 1, -1 / 6, -1 / 6, -1 / 6, -1 / 6]]))


def test_name_linearity_and_json():
    assert (ONE.name, ONE.is_linear, DIFFERENCE.name, DIFFERENCE.is_linear) == (
        "refusal_log_odds",
        False,
        "logit_difference",
        True,
    )
    assert DIFFERENCE.to_json() == {
        "name": "logit_difference",
        "refusal_tokens": ["I", "Sorry"],
        "comply_tokens": ["Sure", "Here", "The"],
        "refusal_ids": [2, 5],
        "comply_ids": [0, 1, 6],
    }


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (((), (), (), ()), "no refusal tokens; expected at least one; RefusalLogOdds.detect(...)"),
        (((3, 1), ("a", "b"), (1, 2), ("b", "c")), "tokens [1] are in the refusal and the comply set"),
        (((3, 1, 3), ("a", "b", "a")), "tokens [3] are given twice; expected each once"),
        (((3,), ("a",), (2, 2), ("c", "c")), "tokens [2] are given twice; expected each once"),
    ],
)
def test_token_sets_that_make_no_sense(ids, expected):
    with pytest.raises(MechsafetyError) as caught:
        RefusalLogOdds(*ids)
    assert str(caught.value) == expected


# --- tokens from texts and from replies -------------------------------------------------------------------------------


def test_of_reads_single_tokens(llama):
    metric = RefusalLogOdds.of(llama, ["sorry", "no"], ["sure"])
    ids = [llama.tokenizer.convert_tokens_to_ids(word) for word in ("sorry", "no", "sure")]
    assert (metric.refusal_ids, metric.comply_ids) == (tuple(ids[:2]), tuple(ids[2:]))
    assert (metric.refusal_tokens, metric.comply_tokens) == (("sorry", "no"), ("sure",))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sorry no", "'sorry no' is 2 tokens ['sorry', ' no']; expected one token; pass its first one"),
        ("Nope", "'Nope' is 4 tokens ['N', 'o', 'p', 'e']; expected one token; pass its first one"),
        ("", "'' is 0 tokens []; expected one token; pass its first one"),
    ],
)
def test_of_names_the_tokens_of_a_longer_text(llama, text, expected):
    with pytest.raises(MechsafetyError) as caught:
        RefusalLogOdds.of(llama, ["sorry", text])
    assert str(caught.value) == expected


@pytest.fixture
def four() -> PromptPairs:
    return PromptPairs.from_lists(
        [f"make a {word} bomb" for word in "abcd"], [f"make a {word} cake" for word in "abcd"]
    )


@pytest.fixture
def detect(monkeypatch):
    """`detect` on hand-made replies, of a model whose every logit follows from them: the token said next has the most.

    After an opener that is not a prompt's own, its logits are those of ``elsewhere``.
    """

    def call(model, pairs, replies, elsewhere=0.0, **options):
        ids = tuple([model.tokenizer(text)["input_ids"] for text in side] for side in replies)
        said = dict(zip([*pairs.harmful, *pairs.harmless], [*ids[0], *ids[1]], strict=True))

        def after(prompt, opener):
            row = torch.full((model.d_vocab,), elsewhere)
            if tuple(said[prompt][: len(opener)]) == tuple(opener) and len(said[prompt]) > len(opener):
                row[said[prompt][len(opener)]] += 9.0
            return row

        def along(model, prompts, opener):
            steps = range(len(opener) + 1)
            return torch.stack([torch.stack([after(prompt, opener[:k]) for k in steps]) for prompt in prompts])

        monkeypatch.setattr(mechsafety.metrics, "logits_along", along)
        ends = tuple(torch.stack([after(prompt, ()) for prompt in side]) for side in (pairs.harmful, pairs.harmless))
        return RefusalLogOdds.detect(model, pairs, replies=ids, logits=ends, **options)

    return call


def test_detect_finds_openers_of_refusals(llama, four, detect):
    harmful = ["sorry, i can't help with that", "no, i will not", "sorry", "sure, mix the poison"]
    harmless = ["sure, bake the cake", "bake it", "i can help with that", "here is the bread"]
    metric = detect(llama, four, (harmful, harmless))
    assert set(metric.refusal_tokens) == {"sorry", "no"}
    assert metric.comply_ids == ()
    assert metric.refusal_ids == tuple(sorted(metric.refusal_ids))


def test_detect_leaves_an_ambiguous_opener_out(llama, four, detect):
    harmful = ["i cannot help with that", "sorry, no", "sorry, i can't", "sorry"]
    harmless = ["i can help with that", "sure, bake", "bake it", "here is the bread"]
    metric = detect(llama, four, (harmful, harmless))
    assert (metric.refusal_tokens, metric.opener_ids) == (("sorry",), ())
    # it is kept where it opens few enough compliant replies
    lenient = detect(llama, four, (harmful, harmless), max_harmless_share=0.25)
    assert set(lenient.refusal_tokens) == {"i", "sorry"}
    # a refused harmless prompt does not make its opener ambiguous
    over = detect(llama, four, (harmful, ["i cannot help", *harmless[1:]]))
    assert set(over.refusal_tokens) == {"i", "sorry"}


def test_detect_without_an_opener_is_the_metric_of_its_tokens(llama, four, detect):
    """What earlier versions detected; the openers tried are no part of it, and come along in JSON alone."""
    found = detect(llama, four, (["sorry"] * 4, ["sure"] * 4))
    same = RefusalLogOdds.of(llama, ["sorry"])
    assert found == same and hash(found) == hash(same)
    stored = json.loads(json.dumps(found.to_json()))
    tried = stored.pop("tried")
    assert stored == same.to_json() and list(stored) == KEYS
    assert tried == [
        {
            "opener_ids": [],
            "opener": "",
            "refusal_tokens": ["sorry"],
            "auroc": 1.0,
            "refused": 4,
            "answered": 4,
            "share": 1.0,
        }
    ]
    assert RefusalLogOdds.from_json(stored | {"tried": tried}, llama).tried == found.tried
    shown = "RefusalLogOdds(read at the prompt's end: next token `sorry`"
    assert repr(same) == shown + ")"
    assert repr(found) == shown + "; AUROC 1.000 of 4 refused and 4 answered prompts)"


def test_detect_takes_the_shortest_opener_that_parts(llama, four, detect):
    """Every reply begins with "no": what follows tells. A longer opener would do as well."""
    replies = ["no i can't help"] * 4, ["no bake it"] * 4
    found = detect(llama, four, replies)
    assert (found.opener, found.refusal_tokens) == ("no", (" i",))
    assert [(one.opener, one.refusal_tokens, one.auroc) for one in found.tried][:2] == [
        ("no", (" i",), 1.0),
        ("no i", (" can",), 1.0),
    ]
    assert all((one.refused, one.answered, one.share) == (4, 4, 1.0) for one in found.tried)
    data = json.loads(json.dumps(found.to_json()))
    assert (data["opener"], data["opener_ids"]) == ("no", list(found.opener_ids))
    assert RefusalLogOdds.from_json(data, llama) == found != RefusalLogOdds.of(llama, [" i"])
    assert repr(found) == (
        "RefusalLogOdds(read after `no`: next token ` i`; AUROC 1.000 of 4 refused and 4 answered prompts)"
    )
    assert detect(llama, four, replies, opener="no i").opener == "no i"


def test_detect_where_nothing_parts(llama, four, detect):
    """One refusal begins as no answer does; the others differ from answers after more tokens than are looked at."""
    harmful, harmless = ["sorry", *["to make a cake i can't"] * 3], ["to make a cake i can help"] * 4
    with pytest.raises(MechsafetyError) as caught:
        detect(llama, four, (harmful, harmless))
    assert str(caught.value) == (
        "no reply opener parts 4 refused from 4 answered prompts: the best AUROC of 1 is 0.62, at the prompt's end; "
        "expected at least 0.8; give other prompts, or choose refusal tokens yourself: "
        "RefusalLogOdds.of(model, refusal_tokens=[...])"
    )


def test_detect_where_all_is_refused(llama, four, detect):
    found = detect(llama, four, (["sorry"] * 4, ["sorry"] * 4))
    assert found.refusal_tokens == ("sorry",) and found.tried[0].auroc is None and "AUROC" not in repr(found)


def test_detect_with_ambiguous_openers_only(llama, four, detect):
    replies = (["to make a cake i can't", "sure", "here", ""], ["to make a cake i can help", "bake", "sure", "here"])
    with pytest.raises(MechsafetyError) as caught:
        detect(llama, four, replies)
    assert str(caught.value) == (
        "the refusals begin like compliant replies {'to': 0.25}; "
        "choose refusal tokens yourself: RefusalLogOdds.of(model, refusal_tokens=[...])"
    )


def test_detect_on_a_model_that_does_not_refuse(llama, four, detect):
    for find in (
        lambda: RefusalLogOdds.detect(llama, four),
        lambda: detect(llama, four, (["sure"] * 4, ["sorry"] * 4)),
    ):
        with pytest.raises(MechsafetyError) as caught:
            find()
        assert str(caught.value) == (
            "none of 4 harmful prompts was refused; choose refusal tokens yourself: "
            "RefusalLogOdds.of(model, refusal_tokens=[...])"
        )


def test_replies_as_text_are_refused(llama, four):
    with pytest.raises(MechsafetyError) as caught:
        RefusalLogOdds.detect(llama, four, replies=(["sorry"] * 4, ["sure"] * 4))
    assert str(caught.value) == "replies as text; expected token ids; pass model.reply_ids(prompts)"


def test_an_opener_that_never_comes(llama, four, detect):
    replies = (["sorry"] * 4, ["sure"] * 3 + ["bake"])
    with pytest.raises(MechsafetyError) as caught:
        detect(llama, four, replies, opener="here")
    (here, sorry) = (llama.tokenizer(word).input_ids for word in ("here", "sorry"))
    assert str(caught.value) == (
        f"none of 8 replies begins with the opener 'here' {here}; most begin with 'sorry' {sorry}; expected tokens "
        "that some reply begins with; leave the opener out: RefusalLogOdds.detect(model, pairs) finds one"
    )
    message = (
        "the reply opener '' has no token; expected the first words of a reply, such as \"I'm\"; "
        "leave it out to read the reply's first token"
    )
    for find in (
        lambda: detect(llama, four, replies, opener=""),
        lambda: RefusalLogOdds.of(llama, ["sorry"], opener=""),
        lambda: RefusalLogOdds.whole(llama, [""]),
    ):
        with pytest.raises(MechsafetyError) as caught:
            find()
        assert str(caught.value) == message
    with pytest.raises(MechsafetyError, match=f"^an opener with the token 99999; expected ids below {llama.d_vocab}$"):
        RefusalLogOdds.of(llama, ["sorry"], opener=[99999])


# --- statistics -------------------------------------------------------------------------------------------------------


@given(hnp.arrays(np.int64, st.tuples(st.integers(1, 3), st.integers(1, 7)), elements=st.integers(-9, 9)))
def test_sign_flip_is_exact_for_few_prompts(values):
    """Whole numbers, so that ties are ties."""
    expected = []
    for row in values:
        sums = [
            abs(sum(s * v for s, v in zip(signs, row, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(row))
        ]
        expected.append(sum(total >= abs(row.sum()) for total in sums) / len(sums))
    np.testing.assert_allclose(sign_flip_p(values), expected)


def test_sign_flip_by_sampling_is_near_the_exact_value():
    values = np.random.default_rng(0).normal(0.45, 1.0, size=12)
    exact = sign_flip_p(values)
    sampled = sign_flip_p(values, seed=1, n=4000)
    assert 0.01 < exact[0] < 0.99
    assert sampled[0] != exact[0]
    assert sampled[0] == pytest.approx(exact[0], abs=4 * math.sqrt(exact[0] * (1 - exact[0]) / 4000))
    assert sampled == sign_flip_p(values, seed=1, n=4000)


def test_sign_flip_never_gives_zero():
    assert sign_flip_p(np.full(40, 1.0), n=99)[0] == pytest.approx(1 / 100)
    assert sign_flip_p(np.full(5, 1.0))[0] == pytest.approx(2 / 32)
    assert sign_flip_p(np.zeros(5))[0] == 1.0


def test_benjamini_hochberg_by_hand():
    # sorted 0.005 0.01 0.03 0.04 -> times 4/rank 0.02 0.02 0.04 0.04
    np.testing.assert_allclose(adjust_p(np.array([0.01, 0.04, 0.03, 0.005])), [0.02, 0.04, 0.04, 0.02])
    # step-up: the third lowers the second from 0.0375 * 3/2
    np.testing.assert_allclose(adjust_p(np.array([0.0375, 0.001, 0.04])), [0.04, 0.003, 0.04])
    assert len(adjust_p(np.array([]))) == 0
