"""Pairs: the built-in ones, readers and their errors, splits, samples and halves."""

import csv
import json
import re
from collections import Counter
from functools import partial

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechsafety import MechsafetyError, PromptPairs
from mechsafety.prompts import PromptPair
from mechsafety.prompts.pairs import HUB

SPLITS = {"train", "validation", "test"}


@pytest.fixture(scope="module")
def builtin() -> PromptPairs:
    return PromptPairs.builtin()


def grouped(sizes: dict[str, int]) -> PromptPairs:
    """Made-up pairs with ``sizes[topic]`` pairs of each topic, topics interleaved as little as possible."""
    pairs = [PromptPair(f"bad {t} {k}", f"good {t} {k}", t) for t, n in sizes.items() for k in range(n)]
    return PromptPairs(tuple(pairs), "made up")


def write(path, *lines: object):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


# --- the built-in pairs -----------------------------------------------------------------------------------------------


def test_builtin_size_and_topics(builtin):
    assert len(builtin) >= 160
    assert len(builtin.topics) >= 8
    assert builtin.name == "builtin"
    assert all(builtin.topics)


def test_builtin_splits_never_share_a_topic(builtin):
    assert {pair.split for pair in builtin} == SPLITS
    splits = {topic: {pair.split for pair in builtin.topic(topic)} for topic in builtin.topics}
    assert {topic: found for topic, found in splits.items() if len(found) != 1} == {}


def test_builtin_split_is_that_split(builtin):
    parts = {name: PromptPairs.builtin(name) for name in sorted(SPLITS)}
    assert sum(map(len, parts.values())) == len(builtin)
    for name, part in parts.items():
        assert {pair.split for pair in part} == {name}
        assert part.pairs == builtin.split(name).pairs


def test_builtin_has_no_duplicates(builtin):
    counts = Counter(re.sub(r"\W+", " ", text.lower()).strip() for text in [*builtin.harmful, *builtin.harmless])
    assert [text for text, n in counts.items() if n > 1] == []


def test_builtin_twins_have_equal_token_length(builtin):
    from transformers import AutoTokenizer

    from mechsafety.models.demo import base_folder

    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    harmful = tokenizer(builtin.harmful, add_special_tokens=False)["input_ids"]
    harmless = tokenizer(builtin.harmless, add_special_tokens=False)["input_ids"]
    wrong = [pair for pair, a, b in zip(builtin, harmful, harmless, strict=True) if len(a) != len(b)]
    assert wrong == []


def test_builtin_twins_differ_in_few_words(builtin):
    shares = []
    for pair in builtin:
        a, b = (Counter(re.findall(r"[\w'-]+", text.lower())) for text in (pair.harmful, pair.harmless))
        assert pair.harmful != pair.harmless
        shares.append((a & b).total() / max(a.total(), b.total()))
    assert sum(shares) / len(shares) >= 0.5
    assert min(shares) > 0


# --- selection --------------------------------------------------------------------------------------------------------


def test_split_and_topic_of_nothing_name_what_there_is():
    pairs = PromptPairs((PromptPair("a", "b", "cyber", "train"), PromptPair("c", "d", "fraud", "test")), "mine")
    assert pairs.topic("fraud").harmful == ["c"]
    assert pairs.split("train", "test").harmful == ["a", "c"]
    with pytest.raises(MechsafetyError) as caught:
        pairs.split("validation")
    assert str(caught.value) == (
        "mine has no pair of split validation; expected topics ['cyber', 'fraud'], splits ['test', 'train']"
    )
    with pytest.raises(MechsafetyError, match=r"^mine has no pair of topic drugs\+guns; expected topics \['cyber'"):
        pairs.topic("drugs", "guns")


def test_where_keeps_the_pairs_that_are_true():
    pairs = grouped({"a": 3})
    assert pairs.where([True, False, True]).pairs == (pairs[0], pairs[2])
    assert pairs.where(torch.tensor([-1.0, 2.0, 0.0]) > 0).pairs == (pairs[1],)
    with pytest.raises(MechsafetyError, match=r"^2 entries for 3 pairs; expected one true or false per pair$"):
        pairs.where([True, False])
    with pytest.raises(
        MechsafetyError, match=r"^no entry is true for the 3 pairs; expected at least one pair to keep$"
    ):
        pairs.where([False] * 3)


def test_sample_is_deterministic_and_keeps_order():
    pairs = grouped({"a": 20, "b": 20, "c": 20})
    one, two = pairs.sample(9, seed=3), pairs.sample(9, seed=3)
    assert one == two
    assert [pairs.pairs.index(pair) for pair in one] == sorted(pairs.pairs.index(pair) for pair in one)
    assert any(pairs.sample(9, seed) != one for seed in range(4, 8))


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 9), min_size=1), st.integers(1, 40), st.integers(0, 9))
def test_sample_is_spread_over_topics(sizes, n, seed):
    pairs = grouped(sizes)
    sample = pairs.sample(n, seed)
    assert len(sample) == len(set(sample)) == min(n, len(pairs))
    counts = Counter(pair.topic for pair in sample)
    most = max(counts.values())
    # a topic may lag behind the fullest one by one pair, or because it has no more
    assert all(counts[topic] >= min(size, most - 1) for topic, size in sizes.items())


def test_sample_takes_later_editions_last():
    """A sample stays what it was when pairs are added, as long as the earlier ones of every topic suffice."""
    old = grouped({"a": 6, "b": 6})
    new = PromptPairs((*old.pairs, *(PromptPair(f"late {k}", f"fine {k}", "ab"[k % 2], edition=2) for k in range(8))))
    for n, seed in ((1, 0), (7, 3), (12, 1)):
        assert new.sample(n, seed).pairs == old.sample(n, seed).pairs
    more = new.sample(16, 3)
    assert set(old.pairs) < set(more.pairs) and [pair.edition for pair in more].count(2) == 4
    assert set(new.sample(13, 3).pairs) <= set(more.pairs), "a smaller sample is part of a larger one"


def test_builtin_samples_are_those_of_the_first_edition(builtin):
    """What was drawn for the stored results, and what the demo model was trained on."""
    first = PromptPairs.builtin(edition=1)
    assert len(first) == 800 < len(builtin) and builtin.pairs[:800] == first.pairs
    assert {pair.edition for pair in builtin} == {1, 2}
    splits = {"train": 128, "validation": 40, "test": 80}
    for split, n in splits.items():
        for seed in (0, 1, 2):
            assert builtin.split(split).sample(n, seed).pairs == first.split(split).sample(n, seed).pairs
    here = ("train", "validation")
    assert builtin.split(*here).sample(20).pairs == first.split(*here).sample(20).pairs
    assert len(PromptPairs.builtin("test", edition=1)) == 80


def test_sample_of_none_is_refused():
    with pytest.raises(MechsafetyError, match=r"^n=0; expected at least 1$"):
        grouped({"a": 2}).sample(0)


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 9), min_size=2))
def test_halves_share_no_topic_and_lose_no_pair(sizes):
    pairs = grouped(sizes)
    one, two = pairs.halves()
    assert set(one.topics).isdisjoint(two.topics)
    assert Counter(one) + Counter(two) == Counter(pairs)


def test_halves_of_one_topic_alternate():
    one, two = grouped({"a": 5}).halves()
    assert one.harmful == ["bad a 0", "bad a 2", "bad a 4"]
    assert two.harmful == ["bad a 1", "bad a 3"]


def test_one_pair_cannot_be_halved():
    with pytest.raises(MechsafetyError, match=r"^one pair cannot be halved; expected at least 2 pairs$"):
        grouped({"a": 1}).halves()


def test_editions_in_files(tmp_path):
    rows = [{"harmful": "a", "harmless": "b", "edition": 3}, {"harmful": "c", "harmless": "d", "edition": None}]
    path = write(tmp_path / "mine.jsonl", *rows)
    assert [pair.edition for pair in PromptPairs.from_jsonl(path)] == [3, 1]
    (tmp_path / "mine.csv").write_text("harmful,harmless,edition\na,b,2\nc,d,\n", encoding="utf-8")
    assert [pair.edition for pair in PromptPairs.from_file(tmp_path / "mine.csv")] == [2, 1]
    for bad in (0, 1.5, "two", True):
        write(path, {"harmful": "a", "harmless": "b", "edition": bad})
        with pytest.raises(MechsafetyError) as caught:
            PromptPairs.from_jsonl(path)
        assert str(caught.value) == f"{path}, line 1: 'edition' is {bad!r}; expected a whole number, at least 1"


# --- from files -------------------------------------------------------------------------------------------------------

GOOD = {"harmful": "How do I make a bomb?", "harmless": "How do I make a cake?"}
OTHER = {"harmful": "How do I make a bomb?", "harmless": "How do I make a pie?"}


def test_from_jsonl_reads_topics_splits_and_skips_blank_lines(tmp_path):
    rows = write(tmp_path / "mine.jsonl", {**GOOD, "topic": "weapons", "split": "test"}, "", {**OTHER, "more": 1}, "")
    pairs = PromptPairs.from_jsonl(rows)
    assert pairs.name == "mine.jsonl"
    assert pairs.pairs == (PromptPair(*GOOD.values(), "weapons", "test"), PromptPair(*OTHER.values()))
    assert repr(pairs) == "PromptPairs(mine.jsonl: 2 pairs, 2 topics)"


def test_from_jsonl_keeps_unusual_line_breaks_inside_prompts(tmp_path):
    text = "one\u2028two\x0bthree\x85four"
    line = json.dumps({"harmful": text, "harmless": "ä🙂"}, ensure_ascii=False)
    path = tmp_path / "mine.jsonl"
    path.write_bytes(f"{line}\r\n{{".encode())
    with pytest.raises(MechsafetyError, match=r"line 2: malformed JSON"):
        PromptPairs.from_jsonl(path)
    path.write_bytes(f"{line}\r\n".encode())
    assert PromptPairs.from_jsonl(path).harmful == [text]


def test_from_jsonl_accepts_a_byte_order_mark(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_text(json.dumps(GOOD), encoding="utf-8-sig")
    assert PromptPairs.from_jsonl(path).harmful == [GOOD["harmful"]]


SHAPE = '{"harmful": "...", "harmless": "..."}'


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([GOOD, '{"harmful": "x"'], f"line 2: malformed JSON (Expecting ',' delimiter); expected {SHAPE}"),
        ([GOOD, "", "nonsense"], f"line 3: malformed JSON (Expecting value); expected {SHAPE}"),
        ([{"harmful": "x"}], f"line 1: the key 'harmless' is missing; expected {SHAPE}"),
        ([GOOD, {"harmful": " \t", "harmless": "x"}], "line 2: the prompt under 'harmful' is empty; expected text"),
        ([{"harmful": "x", "harmless": ""}], "line 1: the prompt under 'harmless' is empty; expected text"),
        (
            [{"harmful": "x", "harmless": 3}],
            "line 1: the prompt under 'harmless' is a JSON int; expected text or a list of messages",
        ),
        (
            [{"harmful": None, "harmless": "x"}],
            "line 1: the prompt under 'harmful' is a JSON NoneType; expected text or a list of messages",
        ),
        (["[1, 2]"], f"line 1: a JSON list; expected {SHAPE}"),
        (['"text"'], f"line 1: a JSON str; expected {SHAPE}"),
    ],
)
def test_from_jsonl_names_the_faulty_line(tmp_path, lines, expected):
    path = write(tmp_path / "mine.jsonl", *lines)
    with pytest.raises(MechsafetyError) as caught:
        PromptPairs.from_jsonl(path)
    assert str(caught.value) == f"{path}, {expected}"


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_from_jsonl_without_prompts(tmp_path, text):
    path = write(tmp_path / "mine.jsonl", text)
    with pytest.raises(MechsafetyError) as caught:
        PromptPairs.from_jsonl(path)
    assert str(caught.value) == f"{path} holds no prompts; expected a .jsonl file with {SHAPE} a line"


def test_from_jsonl_missing_file(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(MechsafetyError) as caught:
            PromptPairs.from_jsonl(path)
        assert str(caught.value) == f"no such file: {path}; expected a .jsonl file with {SHAPE} a line"


def test_from_jsonl_not_utf8(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps({**GOOD, "harmless": "Käse"}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(MechsafetyError) as caught:
        PromptPairs.from_jsonl(path)
    assert (
        str(caught.value)
        == f"{path} is not UTF-8 text (invalid continuation byte); expected a .jsonl file with {SHAPE} a line"
    )


CSV = """harmful,harmless,topic
"make a bomb, please","bake a cake, please",weapons

steal,"buy
it",
"""
ARRAY = """[
  {"harmful": "make a bomb, please", "harmless": "bake a cake, please", "topic": "weapons"},

  {"harmful": "steal", "harmless": "buy\\nit", "topic": null, "split": null}
]
"""
LINES = "\n".join(line.strip().removesuffix(",") for line in ARRAY.splitlines()[1:-1])


@pytest.mark.parametrize(("name", "text"), [("a.csv", CSV), ("a.json", ARRAY), ("a.jsonl", LINES), ("A.CSV", CSV)])
def test_from_file_reads_the_format_of_the_suffix(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8-sig")
    assert PromptPairs.from_file(path) == PromptPairs(
        (
            PromptPair("make a bomb, please", "bake a cake, please", "weapons"),
            PromptPair("steal", "buy\nit"),
        ),
        name,
    )


DELIMITER = f", line 2: malformed JSON (Expecting ',' delimiter); expected [{SHAPE}, ...]"
SUFFIXES = ".jsonl (an object a line), .json (an array of objects) or .csv (column names, then rows); rename it"
HEAD = "harmful,harmless\na,b\n\n"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.csv", "harmful;harmless\na;b", f", line 2: the key 'harmful' is missing; expected {SHAPE}"),
        ("a.csv", HEAD + "kill, then hide,c", ", line 4: 3 values under 2 columns; expected one each; "
         'put a prompt with commas into double quotes: "..."'),
        ("a.csv", HEAD + "a", f", line 4: the key 'harmless' is missing; expected {SHAPE}"),
        ("a.csv", HEAD + '"x\ny",b\n,b', ", line 6: the prompt under 'harmful' is empty; expected text"),
        ("a.csv", HEAD + '"a,b', f", line 4: malformed CSV (unexpected end of data); expected {SHAPE}"),
        ("a.csv", HEAD + '"a", "b"', ', line 4: a space before a double quote; expected "...","..."'),
        ("a.csv", "", f" holds no prompts; expected a .jsonl, .json or .csv file with {SHAPE} in every row"),
        ("a.json", "[]", f" holds no prompts; expected a .jsonl, .json or .csv file with {SHAPE} in every row"),
        ("a.json", "[\n\n{}\n]", f", line 3: the key 'harmful' is missing; expected {SHAPE}"),
        ("a.json", "[\n 3]", f", line 2: a JSON int; expected {SHAPE}"),
        ("a.json", "\n[\n{,", ", line 3: malformed JSON (Expecting property name enclosed in double quotes); "
         f"expected [{SHAPE}, ...]"),
        ("a.json", f"[\n{json.dumps(GOOD)}\n{json.dumps(GOOD)}]",
         f", line 3: malformed JSON (Expecting ',' delimiter); expected [{SHAPE}, ...]"),
        ("a.json", f"[{json.dumps(GOOD)},\n]", f", line 2: malformed JSON (Expecting value); expected [{SHAPE}, ...]"),
        ("a.json", f"[{json.dumps(GOOD)}\n", DELIMITER),
        ("a.json", f"[{json.dumps(GOOD)}]\n]",
         f", line 1: malformed JSON (the array does not end the file); expected [{SHAPE}, ...]"),
        ("a.json", "{}", f", line 1: no JSON array; expected [{SHAPE}, ...]; "
         "name it .jsonl if it has one object a line"),
        ("a.json", f'[{{"topic": ["x"], {json.dumps(GOOD)[1:]}]',
         ", line 1: 'topic' is a JSON list; expected text, or null for none"),
        ("a.txt", "x", f" ends in '.txt'; expected {SUFFIXES}"),
        ("a", "x", f" has no suffix; expected {SUFFIXES}"),
    ],
)  # fmt: skip
def test_from_file_names_file_and_line(tmp_path, name, text, expected):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(MechsafetyError) as caught:
        PromptPairs.from_file(path)
    assert str(caught.value) == f"{path}{expected}"


def test_nulls_are_no_topics_and_numbers_are(tmp_path):
    path = write(tmp_path / "mine.jsonl", {**GOOD, "topic": None, "split": None}, {**OTHER, "topic": 7})
    assert [(pair.topic, pair.split) for pair in PromptPairs.from_jsonl(path)] == [("", ""), ("7", "")]


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\0")).filter(str.strip)


@settings(max_examples=25)
@given(st.lists(st.tuples(TEXT, TEXT).filter(lambda row: row[0] != row[1]), min_size=1, unique=True))
def test_every_text_comes_back_from_every_format(tmp_path_factory, rows):
    folder, frame = tmp_path_factory.mktemp("files"), pd.DataFrame(rows, columns=["harmful", "harmless"])
    frame.to_csv(folder / "a.csv", index=False, quoting=csv.QUOTE_ALL)
    (folder / "a.json").write_text(json.dumps(frame.to_dict("records"), indent=2), encoding="utf-8")
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, frame.to_dict("records"))), encoding="utf-8")
    for suffix in ("csv", "json", "jsonl"):
        pairs = PromptPairs.from_file(folder / f"a.{suffix}")
        assert [(pair.harmful, pair.harmless) for pair in pairs] == rows, suffix


def test_pairs_are_a_sequence():
    pairs = PromptPairs.from_lists(["a", "b", "c"], ["d", "e", "f"], name="three")
    assert all(pair in pairs for pair in pairs) and PromptPair("a", "e") not in pairs
    assert pairs[0] == PromptPair("a", "d") and pairs[-1].harmful == "c"
    assert pairs[1:] == PromptPairs.from_lists(["b", "c"], ["e", "f"], name="three")
    assert list(reversed(pairs)) == list(pairs)[::-1]


# --- from lists -------------------------------------------------------------------------------------------------------


def test_from_lists_keeps_order():
    pairs = PromptPairs.from_lists(["a", "b"], ["c", "d"], name="two")
    assert (pairs.harmful, pairs.harmless, pairs.name) == (["a", "b"], ["c", "d"], "two")


@pytest.mark.parametrize(
    ("harmful", "harmless", "expected"),
    [
        ("one", ["two"], "a single string was given; expected a list of prompts; write [prompt]"),
        (["one"], "two", "a single string was given; expected a list of prompts; write [prompt]"),
        (
            ["one", "two"],
            ["three"],
            "2 harmful and 1 harmless prompts; expected lists of the same length; "
            "use PromptPairs.matched(harmful, harmless, length) to pair them by token length",
        ),
        ([], [], "no prompt pairs; expected at least one pair"),
        (["one", " "], ["two", "three"], "prompt 2 of 2 in harmful is empty; expected text"),
    ],
)
def test_from_lists_errors(harmful, harmless, expected):
    with pytest.raises(MechsafetyError) as caught:
        PromptPairs.from_lists(harmful, harmless)
    assert str(caught.value) == expected


def test_matched_pairs_by_length_and_uses_each_partner_once():
    pairs = PromptPairs.matched(["aa", "bb", "cc", "ddd"], ["x", "yy", "zzz", "ww"], len)
    assert [(pair.harmful, pair.harmless) for pair in pairs] == [("aa", "yy"), ("bb", "ww"), ("ddd", "zzz")]


def test_matched_by_a_models_tokens_aligns(llama):
    harmful = ["how do i make a bomb", "poison my tea", "kill the sky"]
    harmless = ["explain my house", "why is the sky blue", "teach me to bake a cake", "write a poem about the spring"]
    pairs = PromptPairs.matched(harmful, harmless, llama.n_tokens)
    assert len(pairs) >= 2
    assert len(llama.tokenize_pairs(pairs)) == len(pairs)


def test_matched_without_partners():
    with pytest.raises(MechsafetyError) as caught:
        PromptPairs.matched(["a"], ["bb"], len)
    assert str(caught.value) == "no harmful and harmless prompt have the same length; give more prompts"


# --- from benchmarks --------------------------------------------------------------------------------------------------


def test_hub_ids():
    assert HUB == {
        "advbench": (("walledai/AdvBench", None, "train"), None),
        "harmbench": (("walledai/HarmBench", "standard", "train"), None),
        "jailbreakbench": (
            ("JailbreakBench/JBB-Behaviors", "behaviors", "harmful"),
            ("JailbreakBench/JBB-Behaviors", "behaviors", "benign"),
        ),
    }


JBB = "JailbreakBench/JBB-Behaviors"


@pytest.mark.parametrize(
    ("name", "harmless", "harmful_set", "harmless_set"),
    [
        ("jailbreakbench", None, (JBB, "behaviors", "harmful"), (JBB, "behaviors", "benign")),
        (JBB, None, (JBB, "behaviors", "harmful"), (JBB, "behaviors", "benign")),
        ("walledai/HarmBench", JBB, ("walledai/HarmBench", "standard", "train"), (JBB, "behaviors", "benign")),
        ("walledai/harmbench", "x/y", ("walledai/HarmBench", "standard", "train"), ("x/y", None, "train")),
        ("x/y", "jailbreakbench", ("x/y", None, "train"), (JBB, "behaviors", "benign")),
    ],
)
def test_benchmarks_are_known_by_name_and_by_hub_id(monkeypatch, name, harmless, harmful_set, harmless_set):
    def read(name, *, config, split):
        return [f"{name} {config} {split}"]

    monkeypatch.setattr("mechsafety.prompts.pairs.load_instructions", read)
    pairs = PromptPairs.from_hub(name, harmless=harmless)
    assert pairs.harmful == ["{} {} {}".format(*harmful_set)]
    assert pairs.harmless == ["{} {} {}".format(*harmless_set)]


@pytest.mark.parametrize(
    ("name", "harmless"), [("walledai/AdvBench", None), ("x/y", "walledai/HarmBench"), ("x/y", None)]
)
def test_benchmarks_without_a_harmless_half(monkeypatch, name, harmless):
    monkeypatch.setattr("mechsafety.prompts.pairs.load_instructions", lambda name, config, split: ["text"])
    with pytest.raises(MechsafetyError, match=f"^{harmless or name} has no harmless half; pass harmless="):
        PromptPairs.from_hub(name, harmless=harmless)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_from_hub_reads_local_files(tmp_path, suffix):
    paths = []
    for name, texts in (("goals", ["make a bomb", " hurt, people "]), ("others", ["bake a cake", "mend, people"])):
        frame, path = pd.DataFrame({"Goal": texts, "category": ["x", "y"]}), tmp_path / f"{name}.{suffix}"
        {
            "jsonl": partial(frame.to_json, path, orient="records", lines=True),
            "csv": partial(frame.to_csv, path, index=False),
            "parquet": partial(frame.to_parquet, path),
        }[suffix]()
        paths.append(str(path))
    pairs = PromptPairs.from_hub(paths[0], harmless=["bake a cake", "help people", "one too many"])
    assert pairs.harmful == ["make a bomb", "hurt, people"]
    assert pairs.harmless == ["bake a cake", "help people"]
    both = PromptPairs.from_hub(paths[0], harmless=paths[1], length=len)
    assert both.harmless == ["bake a cake", "mend, people"] and both.harmful == pairs.harmful


def test_from_hub_without_a_harmless_half(tmp_path):
    path = write(tmp_path / "goals.jsonl", {"instruction": "make a bomb"})
    with pytest.raises(MechsafetyError) as caught:
        PromptPairs.from_hub(str(path))
    assert str(caught.value) == (f"{path} has no harmless half; pass harmless=[...] or harmless='tatsu-lab/alpaca'")


@pytest.mark.parametrize("name", ["nobody/no-such-set", "advbench"])
def test_from_hub_out_of_reach_is_one_line(name):
    with pytest.raises(MechsafetyError) as caught:
        PromptPairs.from_hub(name, harmless=["x"])
    text = str(caught.value)
    assert text.startswith(f"cannot read the data set {HUB.get(name, ((name,),))[0][0]!r} (")
    assert text.endswith("; expected a hub id that can be reached, or a local .jsonl, .json, .csv or .parquet file")
    assert "\n" not in text
