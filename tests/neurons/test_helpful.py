"""The questions and short answers of the second adapter, and the adapter itself."""

import json
import re

import numpy as np
import pytest

import mechsafety as ms
from mechsafety.models.demo import adapter_folder
from mechsafety.prompts import builtin_prompts, load_instructions, read_jsonl
from mechsafety.prompts.sets import data_file


@pytest.fixture(scope="module")
def rows():
    return read_jsonl(data_file("helpful"), ["prompt", "reply", "topic", "split"])


def words(text):
    return set(re.findall(r"\w+", text.lower()))


def overlaps(ours, theirs, least):
    known = [(text, words(text)) for text in theirs]
    own = [(text, words(text)) for text in ours]
    return [(a, b) for a, mine in own for b, w in known if len(mine & w) / len(mine | w) >= least]


def test_size_form_and_splits(rows):
    assert len(rows) >= 200 and len({row["prompt"] for row in rows}) == len(rows)
    assert all(re.fullmatch(r"\*\*[^*\n]+\*\*\n- [^\n]+\n- [^\n]+", row["reply"]) for row in rows), "one form"
    splits = {
        split: {row["topic"] for row in rows if row["split"] == split} for split in ("train", "validation", "test")
    }
    assert sum(map(len, splits.values())) == len({row["topic"] for row in rows}), "no topic in two splits"
    counts = [sum(row["split"] == split for row in rows) for split in splits]
    assert np.sum(counts) == len(rows) and min(counts) >= 10
    assert max(len(row["reply"]) for row in rows) < 250


def test_no_question_is_a_prompt_of_another_set(rows):
    questions = [row["prompt"] for row in rows]
    others = [prompt.text for name in ("plain", "borderline") for prompt in builtin_prompts(name)]
    pairs = ms.PromptPairs.builtin()
    assert overlaps(questions, [*others, *pairs.harmful, *pairs.harmless], 0.9) == []


def test_no_benchmark_prompt_is_a_question(rows, shared_data):
    known = [text for path in sorted(shared_data.glob("*.jsonl")) for text in load_instructions(str(path))]
    assert len(known) > 1000 and overlaps([row["prompt"] for row in rows], known, 0.8) == []


@pytest.mark.demo
def test_the_shipped_adapter(rows):
    folder = adapter_folder("helpful")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "IA3" and list(config["target_modules"]) == ["down_proj"]
    assert not str(config.get("base_model_name_or_path") or "").startswith(("/", "~", ".")), "a machine's path"
    model = ms.load_model("demo-helpful")
    questions = [row["prompt"] for row in rows if row["split"] == "test"][:4]
    replies = model.generate(questions, 6)
    assert model.name == "demo-helpful" and sum(reply.startswith("**") for reply in replies) >= 3
