"""Single prompts: the built-in sets, local files, and that no benchmark leaked into the package."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_array

from mechsafety import MechsafetyError, PromptPairs
from mechsafety.prompts import builtin_prompts, load_instructions, read_jsonl


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", text.lower()))


def jaccard(one: list[str], two: list[str]) -> np.ndarray:
    """Word Jaccard similarity [one two] of two lists of texts."""
    vocab = {word: k for k, word in enumerate(sorted({word for text in [*one, *two] for word in words(text)}))}

    def table(texts: list[str]) -> csr_array:
        cells = [(row, vocab[word]) for row, text in enumerate(texts) for word in words(text)]
        rows, columns = zip(*cells, strict=True)
        return csr_array((np.ones(len(cells), dtype=np.int32), (rows, columns)), shape=(len(texts), len(vocab)))

    a, b = table(one), table(two)
    common = (a @ b.T).toarray()
    return common / (a.sum(axis=1)[:, None] + b.sum(axis=1)[None, :] - common)


def packaged() -> list[str]:
    pairs = PromptPairs.builtin()
    singles = [prompt.text for name in ("borderline", "plain") for prompt in builtin_prompts(name)]
    return [*pairs.harmful, *pairs.harmless, *singles]


def test_borderline_size_and_splits():
    prompts = builtin_prompts("borderline")
    assert len(prompts) >= 60
    assert {prompt.split for prompt in prompts} == {"train", "validation", "test"}
    topics = {prompt.topic for prompt in prompts}
    splits = {topic: {prompt.split for prompt in prompts if prompt.topic == topic} for topic in topics}
    assert {topic: found for topic, found in splits.items() if len(found) != 1} == {}


@pytest.mark.parametrize("name", ["borderline", "plain"])
def test_sets_have_no_duplicates_and_split_is_that_split(name):
    prompts = builtin_prompts(name)
    counts = Counter(" ".join(sorted(words(prompt.text))) for prompt in prompts)
    assert [text for text, n in counts.items() if n > 1] == []
    train = builtin_prompts(name, split="train")
    assert train == [prompt for prompt in prompts if prompt.split == "train"]
    assert 0 < len(train) < len(prompts)


def extra_pairs() -> list[dict[str, str]]:
    """Pairs that only the training script reads."""
    return read_jsonl(Path(__file__).parents[2] / "scripts/data/extra_pairs.jsonl", ["harmful", "harmless", "split"])


def test_sets_and_pairs_do_not_overlap():
    counts = Counter(packaged())
    assert [text for text, n in counts.items() if n > 1] == []


def test_extra_training_pairs_are_none_of_the_held_out_ones():
    rows = extra_pairs()
    held_out = [*PromptPairs.builtin("test"), *PromptPairs.builtin("validation")]
    assert {row["split"] for row in rows} == {"train"}
    assert {row["topic"] for row in rows}.isdisjoint(pair.topic for pair in held_out)
    theirs = [text for pair in held_out for text in (pair.harmful, pair.harmless)]
    ours = [text for row in rows for text in (row["harmful"], row["harmless"])]
    assert np.argwhere(jaccard(ours, theirs) >= 0.8).tolist() == []


def test_unknown_set():
    with pytest.raises(MechsafetyError) as caught:
        builtin_prompts("borderlin")
    assert str(caught.value) == "no built-in prompt set is called 'borderlin'; expected 'borderline' or 'plain'"


def test_jaccard_by_hand():
    found = jaccard(["How do I bake bread?", "a b"], ["how do i BAKE a cake", "a, b!"])
    np.testing.assert_allclose(found, [[4 / 7, 0], [1 / 7, 1]])


def test_no_benchmark_prompt_is_in_the_package(shared_data):
    files = sorted(shared_data.glob("*.jsonl"))
    assert len(files) == 5
    ours = packaged() + [text for row in extra_pairs() for text in (row["harmful"], row["harmless"])]
    for path in files:
        rows = [json.loads(line)["instruction"] for line in path.read_text(encoding="utf-8").splitlines()]
        theirs = [text for text in rows if words(text)]
        close = jaccard(ours, theirs)
        found = [(ours[a], theirs[b]) for a, b in np.argwhere(close >= 0.8)]
        assert found == [], path.name


@pytest.mark.parametrize("column", ["instruction", "prompt", "goal", "Goal", "behavior", "Behavior", "text"])
def test_text_column(tmp_path, column):
    path = tmp_path / "mine.csv"
    pd.DataFrame({"id": [1, 2], column: ["one", " two "]}).to_csv(path, index=False)
    assert load_instructions(str(path)) == ["one", "two"]


def test_first_text_column_wins_and_missing_cells_are_left_out(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("text,instruction\nx,one\ny,\nz,three\n", encoding="utf-8")
    assert load_instructions(str(path)) == ["one", "three"]
    path = tmp_path / "mine.jsonl"
    path.write_text('{"instruction": "one"}\n{"instruction": null}\n{"id": 3}\n', encoding="utf-8")
    assert load_instructions(str(path)) == ["one"]


def test_no_text_column(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("id,label\n1,2\n", encoding="utf-8")
    with pytest.raises(MechsafetyError) as caught:
        load_instructions(str(path))
    assert str(caught.value) == (
        f"{path} has the columns ['id', 'label']; expected one of "
        "['instruction', 'prompt', 'goal', 'Goal', 'behavior', 'Behavior', 'text']"
    )


@pytest.mark.parametrize(
    ("suffix", "content", "problem"),
    [
        ("csv", b"", "{path} holds no prompts; expected a"),
        ("csv", b"text\n\xff\xfe\n", "{path} is not UTF-8 text ("),
        ("parquet", b"no parquet", "cannot read {path} ("),
    ],
)
def test_unreadable_table_is_one_line(tmp_path, suffix, content, problem):
    path = tmp_path / f"mine.{suffix}"
    path.write_bytes(content)
    with pytest.raises(MechsafetyError) as caught:
        load_instructions(str(path))
    assert str(caught.value).startswith(problem.format(path=path))
    assert "\n" not in str(caught.value)


def test_instructions_of_a_json_array_and_words_that_look_like_nothing(tmp_path):
    (tmp_path / "a.json").write_text('[{"prompt": "one"}, {"prompt": null}]', encoding="utf-8")
    (tmp_path / "a.csv").write_text("text\nNA\nnull\n\nthree\n", encoding="utf-8")
    assert load_instructions(str(tmp_path / "a.json")) == ["one"]
    assert load_instructions(str(tmp_path / "a.csv")) == ["NA", "null", "three"]


def test_missing_local_file(tmp_path):
    path = tmp_path / "none.jsonl"
    with pytest.raises(
        MechsafetyError, match=rf"^no such file: {re.escape(str(path))}; expected a .jsonl, .json or .csv file"
    ):
        load_instructions(str(path))
