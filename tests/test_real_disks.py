"""A disk that is really full, and one that is really read-only: small file systems in memory, mounted by root."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import swept

import mechsafety as ms

MOUNT = shutil.which("mount")


def mount(folder: Path, options: str) -> None:
    assert MOUNT is not None
    subprocess.run([MOUNT, "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of 64 MB; it is unmounted whatever happens."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if MOUNT is None or os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    try:
        mount(folder, "size=64m")
    except subprocess.CalledProcessError:
        pytest.skip("this system lets nobody mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, left: int) -> Path:
    """A file that leaves so many bytes."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - left))
    return ballast


def patched() -> object:
    return swept.CALLS["patching each position"]()


def test_a_result_on_a_full_disk_leaves_the_earlier_one(disk):
    kept = disk / "circuit.json"
    kept.write_text("earlier")
    fill(disk, 8192)
    with pytest.raises(ms.MechsafetyError, match="No space left on device"):
        ms.RefusalCircuit.builtin().save(kept)
    assert kept.read_text() == "earlier" and sorted(os.listdir(disk)) == ["ballast", "circuit.json"]


def test_a_run_on_a_full_disk_is_refused_before_work_begins(disk):
    fill(disk, 8192)
    with pytest.raises(ms.MechsafetyError, match="has 0 MiB left"), ms.running(disk / "run"):
        raise AssertionError("work began")
    assert os.listdir(disk) == ["ballast"]


def test_a_run_goes_on_once_its_full_disk_has_room(disk, monkeypatch):
    alone = swept.as_bytes(patched())
    monkeypatch.setattr("mechsafety.scale.folder.NEEDED_BYTES", 0)
    ballast = fill(disk, 16384)
    with pytest.raises(ms.MechsafetyError, match="No space left on device"), ms.running(disk / "run"):
        patched()
    ballast.unlink()
    with ms.running(disk / "run"):
        assert swept.as_bytes(patched()) == alone


def test_a_read_only_disk_takes_nothing_and_says_so(disk):
    subprocess.run([str(MOUNT), "-o", "remount,ro", str(disk)], check=True)
    for write in (
        lambda: ms.RefusalCircuit.builtin().save(disk / "circuit.json"),
        lambda: ms.running(disk / "run").__enter__(),
    ):
        with pytest.raises(ms.MechsafetyError, match=r"cannot write .*Read-only file system"):
            write()
    assert os.listdir(disk) == []
