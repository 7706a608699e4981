"""Folders that are kept in the user's cache: whole, checked, made once."""

import json
import threading
import time

import pytest

from mechsafety.errors import MechsafetyError
from mechsafety.models import kept


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, and a place for temporary files."""
    monkeypatch.setattr(kept, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(kept.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def make():
    """Fills a folder and counts how often it was asked to."""
    calls = []

    def fill(folder):
        calls.append(folder)
        (folder / "a.bin").write_bytes(b"one")
        (folder / "b.bin").write_bytes(b"two")

    fill.calls = calls
    return fill


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".bin"}


WHOLE = {"a.bin": b"one", "b.bin": b"two"}


def test_made_once(make, cache):
    folder = kept.kept_folder("x", make)
    assert folder == cache / "x" and contents(folder) == WHOLE
    assert kept.kept_folder("x", make) == folder and len(make.calls) == 1
    assert kept.kept_folder("y", make) == cache / "y" and len(make.calls) == 2
    assert sorted(path.name for path in cache.iterdir()) == ["x", "x.lock", "y", "y.lock"]


@pytest.mark.parametrize("fault", ["changed", "shorter", "gone", "no manifest", "broken manifest", "empty manifest"])
def test_what_is_not_whole_is_made_anew(fault, make):
    folder = kept.kept_folder("x", make)
    if fault == "no manifest":
        (folder / kept.MANIFEST).unlink()
    elif "manifest" in fault:
        (folder / kept.MANIFEST).write_text("{" if fault == "broken manifest" else "{}")
    elif fault == "gone":
        (folder / "b.bin").unlink()
    else:
        (folder / "b.bin").write_bytes(b"twO" if fault == "changed" else b"tw")
    again = kept.kept_folder("x", make)
    assert again == folder and contents(folder) == WHOLE and len(make.calls) == 2
    assert sorted(json.loads((folder / kept.MANIFEST).read_text())) == ["a.bin", "b.bin"]
    kept.kept_folder("x", make)
    assert len(make.calls) == 2


def test_what_a_killed_process_leaves_is_not_read(make, cache):
    half = cache / "x.making"
    half.mkdir(parents=True)
    (half / "a.bin").write_bytes(b"on")
    (half / "c.bin").write_bytes(b"")
    assert contents(kept.kept_folder("x", make)) == WHOLE and not half.exists()


def test_a_failure_leaves_nothing(make, cache):
    def fail(folder):
        make(folder)
        raise MechsafetyError("no")

    with pytest.raises(MechsafetyError, match=r"^no$"):
        kept.kept_folder("x", fail)
    assert [path.name for path in cache.iterdir()] == ["x.lock"]
    assert contents(kept.kept_folder("x", make)) == WHOLE


def test_of_several_one_makes_it(make):
    found = []

    def slow(folder):
        make(folder)
        time.sleep(0.1)

    threads = [threading.Thread(target=lambda: found.append(contents(kept.kept_folder("x", slow)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [WHOLE] * 4 and len(make.calls) == 1


def test_where_nothing_can_be_kept(make, cache, tmp_path, monkeypatch, caplog):
    free = {cache: 5, tmp_path / "tmp": 50}
    monkeypatch.setattr(kept.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free[path]}))
    folder = kept.kept_folder("x", make, needed=10)
    assert folder.parent == tmp_path / "tmp" and contents(folder) == WHOLE
    assert caplog.messages == [
        f"x cannot be kept in {cache} (No space left on device); it is made for this process alone"
    ]
    assert kept.kept_folder("x", make, needed=10) == folder and len(make.calls) == 1
    with pytest.raises(MechsafetyError) as caught:
        kept.kept_folder("y", make, needed=2**30)
    assert str(caught.value) == (
        f"y cannot be made in {tmp_path / 'tmp'} either (No space left on device); expected 1.0 GiB of free space; "
        f"free some in {cache}"
    )
    assert len(make.calls) == 1
