"""Files that somebody else made: what the fuzzer found, and a short fuzz of each kind of file."""

import contextlib
import dataclasses
import json
import os

import fuzz
import pytest
import torch
from fuzzing.targets import MAKERS
from safetensors.torch import load_file, save_file

import mechsafety as ms
from mechsafety.codec import read_json
from mechsafety.monitors import GuardWeights, LabelledPrompts, SafetyGuard
from mechsafety.service.judge import protection_type

pytestmark = pytest.mark.unchecked


@pytest.mark.parametrize("name", MAKERS)
def test_a_short_fuzz(name, tmp_path):
    """As `python scripts/fuzz.py NAME`, which docs/results/fuzzing.md reports for longer times."""
    cases = fuzz.Cases(MAKERS[name](), tmp_path / "place", tmp_path / "keep")
    fuzz.warm_up(cases, 0, most=20)
    fuzz.by_chance(cases, 0, limit=60)
    assert cases.tally.cases == 60 and cases.tally.outcomes["refused"] > 0
    assert [one for one, _ in cases.tally.findings.values()] == []


def test_the_fuzz_sees_what_it_looks_for(tmp_path):
    """A loader with each fault is found out; otherwise the short fuzz could not fail."""

    def load(folder):
        found = (folder / "a.json").read_text(errors="replace")
        open(folder.parents[1] / "outside" / "canary").close()
        eval("1 + 1")
        with contextlib.suppress(OSError):
            __import__("socket").create_connection(("127.0.0.1", 1), timeout=0.1)
        raise ValueError(found)

    target = fuzz.Target("faulty", "", [{"a.json": b'{"a": [1, 2]}'}], load)
    cases = fuzz.Cases(target, tmp_path / "place", tmp_path / "keep")
    fuzz.by_chance(cases, 0, seconds=5.0, limit=3)
    kinds = {one.kind: one.what for one, _ in cases.tally.findings.values()}
    assert {"exception", "event", "path"} <= kinds.keys() and cases.tally.outcomes["finding"] == 3
    assert (tmp_path / "keep" / "faulty-1.case").is_file()


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["lock", "owner.json", "001-squares", "001-squares/run.json"])
def test_a_run_folder_with_a_link_is_refused_and_nothing_outside_is_touched(inside, tmp_path):
    (tmp_path / "mine").write_text("mine")
    link = tmp_path / "run" / inside
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path if inside == "001-squares" else tmp_path / "mine")
    with pytest.raises(ms.MechsafetyError) as caught, ms.running(tmp_path / "run"):
        pass
    assert f"holds something else (the link {inside!r})" in str(caught.value)
    assert (tmp_path / "mine").read_text() == "mine" and sorted(os.listdir(tmp_path)) == ["mine", "run"]


@pytest.mark.parametrize("name", ["result.json", "tensors.safetensors"])
def test_a_saved_result_does_not_lead_out_of_its_folder(name, llama, pairs, log_odds, tmp_path):
    found = ms.activation_patching(llama, pairs, log_odds, nodes=["L0.H0"], progress=False)
    saved, other = found.save(tmp_path / "saved"), found.save(tmp_path / "other")
    (saved / name).unlink()
    (saved / name).symlink_to(other / name)
    for read in (ms.patching.PatchMap.load, *([protection_type] if name == "result.json" else [])):
        with pytest.raises(ms.MechsafetyError, match="is a link that leads out of the folder"):
            read(saved)
    (saved / name).unlink()
    (saved / "kept").write_bytes((other / name).read_bytes())
    (saved / name).symlink_to("kept")
    assert torch.equal(ms.patching.PatchMap.load(saved).changes, found.changes), "inside the folder links are fine"
    (saved / name).unlink()
    (saved / name).symlink_to(name)
    with pytest.raises(ms.MechsafetyError, match="link"):
        ms.patching.PatchMap.load(saved)


# --- guards -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guard(llama):
    prompts = [
        f"{verb} a {what}" for what in ("bomb", "cake") for verb in ("make", "explain", "teach me", "help", "poison")
    ]
    labelled = LabelledPrompts("mine", tuple(prompts), (True,) * 5 + (False,) * 5)
    return SafetyGuard.fit(llama, torch.rand(3, 48, generator=torch.Generator().manual_seed(0)) < 0.1, labelled)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"mean": torch.zeros(3)}, "neurons, 3 means,"),
        ({"scale": 0.0}, "weights that give no probability; expected finite numbers, and no scale of 0"),
        ({"weights": float("nan")}, "weights that give no probability; expected finite numbers"),
        ({"intercept": float("inf")}, "weights that give no probability; expected finite numbers"),
        ({"threshold": float("nan")}, "threshold=nan; expected a number from 0 to 1"),
    ],
)
def test_a_guard_that_could_give_no_probability_is_not_stored(guard, change, line, tmp_path):
    weights = guard.weights
    full = {
        name: torch.full_like(weights.mean, value) for name, value in change.items() if name in ("scale", "weights")
    }
    with pytest.raises(ms.MechsafetyError, match=line.replace("(", r"\(")):
        dataclasses.replace(weights, **{**change, **full}).save(tmp_path / "guard")
    assert os.listdir(tmp_path) == []


def test_activations_that_are_no_numbers_are_unsafe(guard):
    weights = dataclasses.replace(guard.weights, mean=torch.full_like(guard.weights.mean, float("nan")))
    assert all(verdict.unsafe for verdict in SafetyGuard(guard.model, weights).predict_all(["make a cake"]))


def test_a_tensor_of_another_type_or_shape_is_refused_by_its_place(guard, tmp_path):
    path = guard.save(tmp_path / "guard")
    stored = load_file(path / "tensors.safetensors")
    for name, odd in (("neurons", stored["neurons"].float()), ("mean", stored["mean"][None])):
        save_file({**stored, name: odd}, path / "tensors.safetensors")
        with pytest.raises(ms.MechsafetyError, match=f"{name}: a tensor of float32 with shape"):
            GuardWeights.load(path)


def test_a_number_that_no_float_holds(guard, tmp_path):
    path = guard.save(tmp_path / "guard.json")
    data = json.loads(path.read_text())
    for number, line in ((10**400, "intercept: 10"), (10**300, "no probability"), (10**30, None)):
        data["result"]["intercept"] = number
        path.write_text(json.dumps(data))
        if line is None:
            assert float(GuardWeights.load(path).intercept) == 1e30
        else:
            with pytest.raises(ms.MechsafetyError, match=line):
                GuardWeights.load(path)


# --- JSON and errors --------------------------------------------------------------------------------------------------


def test_json_that_cannot_be_used_is_refused_in_one_way():
    for text in ("[" * 65 + "]" * 65, "[" * 100_000, '{"a":' * 900 + "1" + "}" * 900, "9" * 5000, "{", "\x00"):
        with pytest.raises(json.JSONDecodeError):
            read_json(text)
    assert read_json("[" * 63 + "]" * 63) and read_json("[1e999]") == [float("inf")]


def test_an_error_is_one_line_of_a_readable_length():
    odd = "a\nb\r\x1b[2J\u2028\u202e\ud800"
    line = str(ms.MechsafetyError(odd + "x" * 9000, expected=odd, hint="'é 漢 👩\u200d👧 مرحبا'"))
    assert line.startswith(r"a\nb\r\x1b[2J\u2028\u202e\ud800xxx") and len(line) < 1200
    assert line.endswith("...; expected a\\nb\\r\\x1b[2J\\u2028\\u202e\\ud800; 'é 漢 👩\u200d👧 مرحبا'")
    line.encode()


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_code_and_pickles_of_a_checkpoint_are_not_run(make_hf_model, make_tokenizer, tmp_path):
    """A folder whose configuration names a class of its own, and whose weights are a pickle."""
    folder, seen = tmp_path / "model", tmp_path / "it ran"
    make_hf_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "own.py").write_text(f"open({str(seen)!r}, 'w')\nfrom transformers import LlamaForCausalLM as Own\n")
    config = json.loads((folder / "config.json").read_text())
    named = {"AutoModelForCausalLM": "own.Own", "AutoConfig": "own.Own"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": named}))
    ms.load_model(folder)  # the library's own class of that architecture
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": named, "model_type": "own"}))
    with pytest.raises(ms.MechsafetyError, match="cannot load the model"):
        ms.load_model(folder)
    assert not seen.exists()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(ms.MechsafetyError, match=r"model\.safetensors"):
        ms.load_model(folder)


def test_a_pickled_adapter_is_not_read(tmp_path):
    from mechsafety.models.adapters import read_config

    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ms.MechsafetyError, match=r"holds adapter_model.bin, which is a pickle"):
        read_config(tmp_path)
