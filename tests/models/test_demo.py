"""The embedded demo model: its behaviour, with loose bounds; exact rates are in docs/demo-model.md."""

import json

import pytest
import torch
from safetensors.torch import load_file

import mechsafety as ms
from mechsafety.models import demo as demo_module
from mechsafety.prompts import builtin_prompts
from mechsafety.replies import is_refusal

pytestmark = pytest.mark.demo


def refusals(model, prompts):
    return sum(is_refusal(reply) for reply in model.generate(prompts, max_new_tokens=12))


def sample(path, n):
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    column = next(name for name in ("prompt", "instruction", "goal", "Goal", "text") if name in rows[0])
    short = [row[column] for row in rows if len(row[column]) < 120]
    return short[:: len(short) // n][:n]


def test_sizes(demo):
    assert (demo.n_layers, demo.n_heads, demo.n_kv_heads, demo.d_model, demo.d_mlp) == (30, 9, 3, 576, 1536)
    assert demo.name == "demo" and not demo.post_norm


@pytest.fixture(scope="module")
def twins(demo):
    """Built-in twins of topics not trained on, with the replies to both sides."""
    pairs = ms.PromptPairs.builtin().split("test").sample(7, seed=1)
    return pairs, tuple(demo.reply_ids(side, max_new_tokens=12) for side in (pairs.harmful, pairs.harmless))


def test_built_in_twins_of_topics_not_trained_on(demo, twins):
    # of all 80 it refuses 68 and 11: docs/demo-model.md
    pairs, replies = twins
    demo.tokenize_pairs(pairs)
    refused, wrongly = (sum(map(is_refusal, demo.decode(side))) for side in replies)
    assert refused >= 5 and wrongly <= 3


def test_scary_but_harmless(demo):
    assert refusals(demo, [prompt.text for prompt in builtin_prompts("borderline", "test")][:5]) <= 2


def test_jailbreakbench_and_alpaca(demo, shared_data):
    assert refusals(demo, sample(shared_data / "jailbreakbench.jsonl", 4)) >= 3
    assert refusals(demo, sample(shared_data / "alpaca_harmless.jsonl", 4)) <= 1


def test_the_metric_is_detected(demo, twins):
    pairs, replies = twins
    metric = ms.RefusalLogOdds.detect(demo, pairs, replies=replies)
    assert metric == ms.RefusalLogOdds.of(demo, ["Sorry"])  # as every stored result has it: no opener
    gap = metric(demo.logits(pairs.harmful)) - metric(demo.logits(pairs.harmless))
    assert float(gap.mean()) > 3.0 and int((gap > 0).sum()) >= 6


def test_the_adapter_changes_mlps_alone(demo):
    """So that all of its neurons in its base make the demo model: what safety-neuron methods ask of a pair."""
    base = load_file(demo_module.base_folder() / "model.safetensors")
    own = {name.replace("._original_component", ""): weight for name, weight in demo.hf_model.state_dict().items()}
    changed = {name for name, tensor in base.items() if not torch.equal(own[name], tensor)}
    assert changed == {f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(30)}


def test_base_folder_is_made_once():
    folder = demo_module.base_folder()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert demo_module.base_folder() == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert "config.json" in before and "model.safetensors" in before


def test_the_shipped_adapter():
    folder = demo_module.adapter_folder("refusal")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "IA3" and list(config["target_modules"]) == ["down_proj"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2_000_000
    assert not str(config.get("base_model_name_or_path") or "").startswith(("/", "~", ".")), "a machine's path"
