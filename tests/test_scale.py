"""Runs: the same bytes alone, in a run folder and after a stop; folders that are damaged, foreign, in use or full."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import swept
import torch
from safetensors.torch import load_file

import mechsafety as ms
from mechsafety import output
from mechsafety.models.engine import resume
from mechsafety.models.memory import batch_bytes
from mechsafety.scale import folder as folders
from mechsafety.scale import machine
from mechsafety.scale.folder import opened
from mechsafety.scale.identity import identity
from mechsafety.scale.items import Place, pack, unpack
from mechsafety.scale.work import once, work

PLACE = Place("run", "sweep", 3)


def items_of(path):
    return sorted(Path(path).rglob("*.safetensors"))


def patched():
    return swept.CALLS["patching each position"]()


@pytest.mark.parametrize("name", swept.CALLS)
def test_a_run_gives_the_same_bytes_and_so_does_a_second_one(name, tmp_path):
    alone = swept.as_bytes(swept.CALLS[name]())
    with ms.running(tmp_path):
        assert swept.as_bytes(swept.CALLS[name]()) == alone
    made = {path: path.stat().st_mtime_ns for path in items_of(tmp_path)}
    assert made
    with ms.running(tmp_path):
        assert swept.as_bytes(swept.CALLS[name]()) == alone
    assert {path: path.stat().st_mtime_ns for path in items_of(tmp_path)} == made  # nothing is computed again


def test_work_without_a_run_is_a_loop():
    seen = []
    found = work("squares", range(3), lambda k: seen.append(k) or k * k, int)
    assert next(found) == 0 and seen == [0]  # one at a time: nothing is held
    assert list(found) == [1, 4] and once("answer", lambda: 42, int) == 42


def test_several_calls_in_one_folder(tmp_path):
    for _ in range(2):
        with ms.running(tmp_path):
            first, second = patched(), swept.CALLS["path matrix"]()
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert names == ["001-activation_patching", "002-path_matrix"]
    assert first.changes.shape[0] > 0 and second.q.ndim == 3


def damage_flip(data):
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: b"", damage_flip, lambda data: b"\xff" * 8 + data[8:]],
    ids=["truncated", "empty", "one bit", "header"],
)
def test_a_damaged_item_is_computed_again_and_said_once(damage, tmp_path, caplog):
    with ms.running(tmp_path):
        whole = swept.as_bytes(patched())
    items = items_of(tmp_path)
    for path in items[:2]:
        path.write_bytes(damage(path.read_bytes()))
    with ms.running(tmp_path):
        assert swept.as_bytes(patched()) == whole
    assert [record.message for record in caplog.records if "computed again" in record.message][1:] == []
    assert "computed again" in caplog.text


def test_an_item_of_another_place_is_computed_again(tmp_path, caplog):
    with ms.running(tmp_path):
        whole = swept.as_bytes(patched())
    first, second, *_ = items_of(tmp_path)
    first.write_bytes(second.read_bytes())
    with ms.running(tmp_path):
        assert swept.as_bytes(patched()) == whole
    assert "of another run" in caplog.text


def test_a_damaged_header_begins_the_call_again(tmp_path, caplog):
    with ms.running(tmp_path):
        whole = swept.as_bytes(patched())
    header = next(tmp_path.rglob("run.json"))
    header.write_text(header.read_text()[:50])
    with ms.running(tmp_path):
        assert swept.as_bytes(patched()) == whole
    assert "is damaged" in caplog.text


def test_the_folder_of_another_call_is_refused(tmp_path, llama, pairs, log_odds):
    with ms.running(tmp_path):
        patched()
    with pytest.raises(ms.MechsafetyError, match="with another metric; expected the run"), ms.running(tmp_path):
        ms.activation_patching(llama, pairs, log_odds, positions="each", progress=False)
    other = r"a call of .*activation_patching, not of .*path_matrix"
    with pytest.raises(ms.MechsafetyError, match=other), ms.running(tmp_path):
        swept.CALLS["path matrix"]()


def test_another_model_is_told_apart_by_its_weights(tmp_path, make_model, pairs, log_odds):
    model = make_model("llama", seed=5)
    with ms.running(tmp_path):
        ms.activation_patching(model, pairs, log_odds, progress=False)
    with torch.no_grad():
        next(model.hf_model.parameters()).mul_(1.5)
    with pytest.raises(ms.MechsafetyError, match="with another model"), ms.running(tmp_path):
        ms.activation_patching(model, pairs, log_odds, progress=False)


def test_an_edited_model_is_refused(tmp_path, make_model, pairs, log_odds):
    model = make_model("llama")
    edited = pytest.raises(ms.MechsafetyError, match="under an intervention")
    with ms.running(tmp_path), ms.ablate(model, "L0.H0", source="zero"), edited:
        ms.activation_patching(model, pairs, log_odds, progress=False)
    assert not items_of(tmp_path)


def test_a_second_process_is_refused_while_the_first_runs(tmp_path):
    code = "import sys; from mechsafety.scale.folder import opened\nwith opened(sys.argv[1]): pass"
    with opened(tmp_path):
        done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=120)
        with pytest.raises(ms.MechsafetyError, match="in use"), opened(tmp_path):
            pass
    assert done.returncode and f"in use by process {os.getpid()} on " in done.stderr
    with opened(tmp_path):
        pass


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ms.MechsafetyError, match=r"holds something else \(thesis.tex\)"), ms.running(tmp_path):
        pass
    with pytest.raises(ms.MechsafetyError, match="is a file"), ms.running(tmp_path / "thesis.tex"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_read_only_folder_is_said_before_work_begins(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write everywhere
    with pytest.raises(ms.MechsafetyError, match=r"cannot write .*Permission denied"), ms.running(tmp_path / "new"):
        raise AssertionError("work began")


def test_a_full_disk_is_said_before_work_begins(tmp_path, monkeypatch):
    full = type("Usage", (), {"total": 2**40, "free": 2**20})
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: full)
    with pytest.raises(ms.MechsafetyError, match="has 1 MiB left"), ms.running(tmp_path):
        raise AssertionError("work began")


def test_a_disk_that_fills_up_stops_the_run_which_then_goes_on(tmp_path, monkeypatch):
    alone, left = swept.as_bytes(patched()), [1]
    write = Path.write_bytes

    def fill(self, data):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(ms.MechsafetyError, match="No space left on device"), ms.running(tmp_path):
        patched()
    monkeypatch.setattr(Path, "write_bytes", write)
    assert len(items_of(tmp_path)) == 1
    with ms.running(tmp_path):
        assert swept.as_bytes(patched()) == alone


def test_a_run_inside_a_run_is_refused(tmp_path):
    with ms.running(tmp_path), pytest.raises(ms.MechsafetyError, match="a run inside a run"), ms.running(tmp_path):
        pass


def test_a_run_keeps_the_threads_and_batches_that_it_began_with(tmp_path, monkeypatch):
    seen = []

    def noted(*args, **options):
        seen.append((torch.get_num_threads(), batch_bytes(torch.device("cpu"))))
        return resume(*args, **options)

    monkeypatch.setattr("mechsafety.patching.activation.resume", noted)
    with ms.running(tmp_path):
        patched()
    first, threads = seen[0], torch.get_num_threads()
    seen.clear()
    # another machine goes on
    monkeypatch.setattr(machine.Machine, "here", classmethod(lambda cls: cls(threads + 1, {"cpu": 12345})))
    for path in items_of(tmp_path):
        path.unlink()
    with ms.running(tmp_path):
        patched()
    assert set(seen) == {first} and first[0] == threads == torch.get_num_threads()


def test_an_item_is_what_was_packed():
    value = (torch.tensor([[1.0, float("nan")]], dtype=torch.bfloat16), 0.1, "a\ud800", (1, 2), torch.zeros(0, 3))
    kind = tuple[torch.Tensor, float, str, tuple[int, ...], torch.Tensor]
    found = unpack(kind, pack(kind, value, PLACE), PLACE)
    assert torch.equal(found[0].view(torch.int16), value[0].view(torch.int16)) and found[1:4] == value[1:4]
    assert found[4].shape == (0, 3)
    with pytest.raises(ms.MechsafetyError, match="of another run"):
        unpack(kind, pack(kind, value, PLACE), Place("run", "sweep", 4))


def test_the_files_are_plain_safetensors(tmp_path):
    with ms.running(tmp_path):
        patched()
    assert all(tensor.dtype == torch.float32 for path in items_of(tmp_path) for tensor in load_file(path).values())


def enclosing(value):
    return lambda: value


def test_identities():
    same = [{"a": (1, 2.0)}, ms.PromptPairs.from_lists(["a"], ["b"]), torch.arange(3), enclosing(3), slice(1, 2)]
    assert all(identity(one) == identity(one) for one in same)
    assert identity(enclosing(3)) == identity(enclosing(3)) != identity(enclosing(4))
    assert identity({3, 1}) == identity({1, 3}) and identity(1) != identity(True) != identity("True")
    assert identity(torch.zeros(2, 3)) != identity(torch.zeros(3, 2)) != identity(torch.zeros(3, 2).half())
    loop = []
    loop.append(loop)
    with pytest.raises(ms.MechsafetyError, match="pairs holds itself"):
        identity(loop, "pairs")
    with pytest.raises(ms.MechsafetyError, match="whose content a run cannot tell"):
        identity(iter([1]), "pairs")


@pytest.mark.parametrize("after", [0, 11, 29])
def test_a_killed_run_goes_on(tmp_path, after):
    """What tests/study_resume.py does 20 times."""
    alone, folder, out = swept.as_bytes(swept.CALLS["map"]()), tmp_path / "run", tmp_path / "out"
    at = swept.killed("map", folder, out, after)
    assert at is not None and at >= after and not out.exists()
    assert os.waitpid(swept.forked("map", folder, out), 0)[1] == 0
    assert out.read_bytes() == alone
    assert not list(tmp_path.rglob(f"{output.SCRATCH}*")) and (folder / folders.LOCK).exists()
