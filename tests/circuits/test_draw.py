"""A map's pairs: drawn from enough that the model was tried on, each prompt run once."""

import math
from dataclasses import replace

import pytest
import torch

import mechsafety as ms
from mechsafety.circuits import draw, map_refusal_circuit
from mechsafety.circuits.behaviour import MIN_SHARE, Seen, check_behaviour
from mechsafety.circuits.circuit import Behaviour
from mechsafety.errors import MechsafetyError, NoRefusal
from mechsafety.metrics import RefusalLogOdds
from mechsafety.prompts import PromptPair, PromptPairs, Spans, TokenPairs, Tokens
from mechsafety.results import Provenance


class Standing(ms.LensModel):
    """Stands where a model is asked for: all of its chat prompts align."""

    name = "model"

    def __init__(self) -> None:
        """Without weights."""

    def spans(self, prompts):
        return [Spans((1, 3), 5) for _ in prompts]

    def tokenize_pairs(self, pairs):
        """Pair k needs ``length`` columns: the two prompts differ from there to the end."""
        lengths = torch.tensor([[length(pair)] for pair in pairs])
        harmful = torch.zeros(len(pairs), 10, dtype=torch.int64)
        differs = (torch.arange(10, 0, -1) == lengths).int()
        spans = tuple(self.spans(pairs))
        sides = (Tokens(ids, torch.ones_like(ids, dtype=torch.bool), spans) for ids in (harmful, harmful + differs))
        return TokenPairs.of(*sides)

    def provenance(self, **options):
        return Provenance("model", "weights", "float32", "cpu", "template", **options)


def length(pair: PromptPair) -> int:
    """Number of columns that a pair needs; 3 to 9."""
    return 3 + int(pair.harmful.split()[1]) % 7


MODEL = Standing()
METRIC = RefusalLogOdds((3,), ("no",))


def many(n: int, n_test: int) -> PromptPairs:
    rows = [PromptPair(f"bad {k}", f"good {k}", f"t{k % 5}", "train") for k in range(n)]
    rows += [PromptPair(f"bad {k}", f"good {k}", f"u{k % 3}", "test") for k in range(n, n + n_test)]
    return PromptPairs(tuple(rows), "many")


@pytest.fixture
def refuses(monkeypatch):
    """Puts a model in the place of the real one that refuses the pairs that a function picks; gives what was tried."""

    def install(picks):
        rounds = []

        def behave(model, pairs, metric, *, detect_on, seen, seed, progress):
            keep = [picks(int(pair.harmful.split()[1])) for pair in pairs]
            rounds.append((len(pairs), detect_on))
            n = len(pairs)
            row = Behaviour(n, sum(keep) / n, (0.0, 1.0), 0.0, (0.0, 0.0), "reply")
            return METRIC, {"harmful": row, "harmless": row}, (), keep

        monkeypatch.setattr(draw, "check_behaviour", behave)
        return rounds

    return install


def test_a_model_that_refuses_a_third_is_mapped_on_that_third(refuses):
    rounds = refuses(lambda k: k % 3 == 0)
    pairs = many(300, 120)
    found = draw.draw_pairs(MODEL, pairs, limit=40)
    tried = found.behaviour["harmful"].n
    assert rounds[0] == (40, 8) and tried == rounds[-1][0] > 40
    assert len(found.here) >= 4 and len(found.there) >= 16 and len(found.here) + len(found.there) < tried / 2
    assert all(int(pair.harmful.split()[1]) % 3 == 0 for pair in (*found.here, *found.there))
    assert {pair.split for pair in found.here} == {"train"} and {pair.split for pair in found.there} == {"test"}


def test_enough_at_first_is_enough(refuses):
    """Half of what was asked for can be used: nothing more is tried."""
    rounds = refuses(lambda k: k % 2 == 0)
    found = draw.draw_pairs(MODEL, PromptPairs(many(100, 100).pairs[::2], "even"), limit=40)
    assert rounds == [(40, 8)] and len(found.here) == 8 and len(found.there) == 32


def test_pairs_are_drawn_at_random_from_the_shorter_ones(refuses):
    refuses(lambda k: True)
    pairs = many(350, 140)
    found = [draw.draw_pairs(MODEL, pairs, limit=42, seed=seed) for seed in (0, 0, 1)]
    assert found[0].here == found[1].here != found[2].here
    for side, sampled in zip(draw.two_sides(pairs), (found[0].here, found[0].there), strict=True):
        most = math.ceil(draw.SHORTEST * math.ceil(len(sampled) / len(side.topics)))
        for topic in side.topics:
            every = sorted(length(pair) for pair in side if pair.topic == topic)
            own = [length(pair) for pair in sampled if pair.topic == topic]
            assert own and max(own) <= every[most - 1] < every[-1]


def test_pairs_aligned_at_the_suffix_are_drawn_from_all_of_them(refuses):
    refuses(lambda k: True)
    pairs = replace(many(350, 140), align="suffix")
    drawn = [length(pair) for seed in range(4) for pair in draw.draw_pairs(MODEL, pairs, limit=42, seed=seed).here]
    assert max(drawn) == 9, "all of them run the same columns"


@pytest.mark.parametrize(("limit", "here"), [(4, 2), (8, 4), (9, 5), (16, 8), (40, 8), (72, 9), (80, 10), (104, 13)])
def test_an_eighth_is_searched_on(refuses, limit, here):
    rounds = refuses(lambda k: True)
    draw.draw_pairs(MODEL, many(100, 100), limit=limit)
    assert rounds == [(limit, here)]


def test_where_few_can_be_held_out_more_are_searched_on(refuses):
    rounds = refuses(lambda k: True)
    draw.draw_pairs(MODEL, many(100, 10), limit=80)
    assert rounds == [(80, 70)]


def test_pairs_that_end_are_all_tried(refuses):
    rounds = refuses(lambda k: k % 4 == 0)
    found = draw.draw_pairs(MODEL, many(30, 25), limit=40)
    assert rounds[-1][0] == 30 + 25 and len(found.here) + len(found.there) == 14


def test_a_model_that_refuses_a_tenth_is_not_mapped(refuses):
    rounds = refuses(lambda k: k % 10 == 0)
    with pytest.raises(NoRefusal) as caught:
        draw.draw_pairs(MODEL, many(1000, 1000), limit=40)
    here, there = (round(size * draw.ENOUGH / MIN_SHARE) for size in (8, 32))
    assert rounds[-1] == (here + there, here), "more would not change the verdict"
    assert (
        "pairs have a refused harmful prompt and an answered harmless one; use a model that refuses, or pairs it tells"
        in str(caught.value)
    )


def test_pairs_too_few_to_hold_any_out_say_both_numbers():
    with pytest.raises(MechsafetyError) as caught:
        draw.draw_pairs(MODEL, many(3, 1), limit=8)
    assert str(caught.value) == (
        "many leaves 1 pair to hold out of 4 that align; expected at least 2; give more pairs (or more topics)"
    )


def test_each_prompt_is_run_once(planted, monkeypatch):
    model, pairs = planted
    asked, replied = [], type(model).replies_and_logits
    monkeypatch.setattr(
        type(model),
        "replies_and_logits",
        lambda self, prompts, *a, **k: (asked.extend(prompts), replied(self, prompts, *a, **k))[1],
    )
    monkeypatch.setattr(type(model), "logits", lambda *_: pytest.fail("the replies' first step has the logits"))
    seen, some = Seen(), PromptPairs(pairs.pairs[:5], "some")
    check_behaviour(model, some, seen=seen)
    found = check_behaviour(model, pairs, seen=seen, progress=False)
    every = sorted([*pairs.harmful, *pairs.harmless])
    assert sorted(asked) == every
    whole = check_behaviour(model, pairs, progress=False)
    assert found[3] == whole[3] and found[1]["harmful"].refusal_rate == whole[1]["harmful"].refusal_rate


def test_a_map_of_pairs_drawn_before_is_the_map_that_draws(planted, tmp_path):
    """Byte for byte, also where the draw was stored and read again, and where pairs were left out."""
    model, pairs = planted
    odd = PromptPairs((PromptPair("make a bomb", "make a big cake", "bombs"), *pairs.pairs), "odd")
    few = ms.MapOptions(limit=8, n_random=3, n_added=3, n_resamples=1, n_backup_parts=1, seed=3)
    drawn = draw.draw_pairs(model, odd, limit=8, seed=3, progress=False)
    drawn.save(tmp_path / "drawn")
    again = draw.Draw.load(tmp_path / "drawn")
    assert again.here == drawn.here and again.metric == drawn.metric and again.samples == drawn.samples
    own = map_refusal_circuit(model, odd, options=few, progress=False)
    other = map_refusal_circuit(model, again, options=replace(few, limit=40), progress=False)
    assert own.to_json() == other.to_json(), "the limit is that of the draw"
    assert own.provenance.options["left_out"] == list(drawn.here.left_out) and own.provenance.options["limit"] == 8
    assert repr(drawn).startswith(f"Draw({model.name}: {len(drawn.here)} pairs to search on and ")
    assert drawn.to_dataframe().kind.tolist() == ["harmful", "harmless"]


def test_pairs_that_another_model_or_metric_drew_are_refused(planted, llama):
    model, pairs = planted
    drawn = draw.draw_pairs(model, pairs, limit=8, progress=False)
    with pytest.raises(MechsafetyError, match=r"^pairs drawn with other weights \(.*; draw_pairs\(model, pairs\)$"):
        map_refusal_circuit(llama, drawn)
    other = RefusalLogOdds((drawn.metric.refusal_ids[0] + 1,), ("x",))
    with pytest.raises(MechsafetyError, match=r"^pairs drawn with another metric; expected theirs, or none"):
        map_refusal_circuit(model, drawn, other)


def test_a_small_topic_gives_what_it_has_and_the_others_fill_up(refuses):
    rounds = refuses(lambda k: True)
    rows = [PromptPair(f"bad {k}", f"good {k}", "large" if k < 100 else f"t{k % 3}", "train") for k in range(106)]
    rows += [PromptPair(f"bad {k}", f"good {k}", "u", "test") for k in range(200, 300)]
    found = draw.draw_pairs(MODEL, PromptPairs(tuple(rows), "uneven"), limit=100)
    assert rounds == [(100, 13)] and len(found.here) == 13
    assert sum(pair.topic != "large" for pair in found.here) == 6


def test_widening_favours_no_topic_and_goes_on_to_the_end(refuses):
    rounds = refuses(lambda k: k % 4 == 0)
    found = draw.draw_pairs(MODEL, many(400, 300), limit=160)
    tried = rounds[-1][1]
    assert tried > 20, "more were tried"
    counts = [sum(pair.topic == topic for pair in found.here) for topic in found.here.topics]
    assert len(counts) == 5 and max(counts) - min(counts) <= 2
