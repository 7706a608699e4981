"""The built-in pairs under other tokenizers: stored numbers, measured again where a tokenizer is at hand."""

import hashlib
import runpy
import shutil
from pathlib import Path

import pytest

from mechsafety import PromptPairs
from mechsafety.models.demo import base_folder
from mechsafety.prompts.sets import data_file

ROOT = Path(__file__).resolve().parents[2]
WANTED = ("SmolLM2", "GPT-2", "Qwen2, Qwen2.5, Qwen3", "Gemma-3", "Mistral v1", "Mistral v3", "Mistral Tekken")


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "scripts" / "alignment.py"))


def test_four_in_five_of_every_split_align(script):
    store = script["load"]()
    assert store["pairs_sha256"] == hashlib.sha256(data_file("pairs").read_bytes()).hexdigest(), "measure them again"
    sizes = {split: len(PromptPairs.builtin(split)) for split in ("train", "validation", "test")}
    for name in WANTED:
        cells = store["tokenizers"][name]["splits"]
        assert {split: n for split, (_, n) in cells.items()} == sizes
        assert all(fits >= 0.8 * n for fits, n in cells.values()), name


def test_what_is_at_hand_is_measured_again(script):
    row = script["measure"](base_folder() / "tokenizer.json")
    assert all(fits == n for fits, n in (*row["splits"].values(), *row["topics"].values()))
    stored = script["load"]()["tokenizers"]["SmolLM2"]
    assert {key: row[key] for key in ("splits", "topics")} == {key: stored[key] for key in ("splits", "topics")}


def test_files_of_other_kinds(script, tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(["make a bomb", "make a cake"], vocab_size=300)
    made.save_model(str(tmp_path))
    shutil.move(tmp_path / "vocab.json", tmp_path / "encoder.json")
    shutil.move(tmp_path / "merges.txt", tmp_path / "vocab.bpe")
    texts = ["make a bomb", "a long cake"]
    assert script["encoder"](tmp_path)(texts) == [len(made.encode(text).ids) for text in texts]
    with pytest.raises(SystemExit, match=r"notes\.txt is no tokenizer file that this script reads"):
        script["encoder"](tmp_path / "notes.txt")
