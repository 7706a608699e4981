"""Output files and folders: whole or not at all, and never anybody's own file."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from mechsafety.errors import MechsafetyError
from mechsafety.output import (
    SCRATCH,
    check_free_space,
    check_output_folder,
    json_text,
    output_file,
    output_folder,
    write_text,
)


@pytest.fixture
def umask():
    """Another umask than the usual one."""
    before = os.umask(0o027)
    yield
    os.umask(before)


def listing(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_json_is_json():
    text = json_text({"a": (math.nan, [math.inf, -math.inf]), "b": {"c": 0.5, "d": None, "e": True, "f": 1}})
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [None, [None, None]],
        "b": {"c": 0.5, "d": None, "e": True, "f": 1},
    }


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_new_folder_appears_whole(tmp_path, umask):
    path = tmp_path / "a" / "b"
    with output_folder(path, names=["done"]) as scratch:
        (scratch / "done").write_text("1")
        assert not path.exists()
        assert scratch.parent == path.parent, "a rename must stay on one file system"
    assert listing(tmp_path) == {"a/b/done": "1"}
    assert [p.name for p in path.parent.iterdir()] == ["b"]
    assert (mode(path), mode(path / "done")) == (0o750, 0o640), "as the umask says"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MechsafetyError, OSError])
def test_a_failure_leaves_nothing(tmp_path, error):
    def interrupted():
        with output_folder(tmp_path / "a" / "out", names=["done"]) as scratch:
            (scratch / "done").write_text("1")
            raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_stays_the_same_folder(tmp_path, monkeypatch):
    """A mount cannot be moved, and a shell whose own folder goes away is lost."""
    monkeypatch.chdir(tmp_path)
    real = os.replace

    def mounted(source, target):
        if Path(target) == tmp_path or Path(source) == tmp_path:
            raise OSError(errno.EBUSY, "Device or resource busy")
        real(source, target)

    monkeypatch.setattr(os, "replace", mounted)
    before = tmp_path.stat().st_ino
    for names in (["main", "more"], ["main"]):
        with output_folder(".", names=["main", "more"]) as scratch:
            assert scratch.stat().st_dev == tmp_path.stat().st_dev and scratch.parent == tmp_path
            for name in names:
                (scratch / name).write_text(f"{name} of {len(names)}")
        assert listing(tmp_path) == {name: f"{name} of {len(names)}" for name in names}, "the earlier one is gone whole"
    assert Path.cwd() == tmp_path and tmp_path.stat().st_ino == before


def test_the_file_that_makes_it_a_result_goes_first_and_comes_last(tmp_path, monkeypatch):
    (tmp_path / "main").write_text("old")
    (tmp_path / "more").write_text("old")
    seen, real = [], os.replace

    def watched(source, target):
        real(source, target)
        seen.append(listing(tmp_path))

    monkeypatch.setattr(os, "replace", watched)
    with output_folder(tmp_path, names=["main", "more"]) as scratch:
        (scratch / "main").write_text("new")
        (scratch / "more").write_text("new")
    states = [{name: text for name, text in state.items() if "/" not in name} for state in seen]
    assert states == [{"more": "old"}, {}, {"more": "new"}, {"main": "new", "more": "new"}]


@pytest.mark.parametrize("step", range(4))
def test_a_failure_between_two_files_brings_the_earlier_ones_back(tmp_path, monkeypatch, step):
    (tmp_path / "main").write_text("old")
    (tmp_path / "more").write_text("old")
    real, calls = os.replace, []

    def fails(source, target):
        calls.append(target)
        if len(calls) == step + 1:
            raise KeyboardInterrupt
        real(source, target)

    def write():
        with output_folder(tmp_path, names=["main", "more"]) as scratch:
            (scratch / "main").write_text("new")
            (scratch / "more").write_text("new")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(KeyboardInterrupt):
        write()
    assert listing(tmp_path) == {"main": "old", "more": "old"} and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("there_before", [True, False])
def test_a_process_that_is_killed_leaves_the_earlier_result(tmp_path, there_before):
    code = """if True:
        import os, signal, sys
        from mechsafety.output import output_folder
        with output_folder(sys.argv[1], names=["main", "more"]) as scratch:
            (scratch / "more").write_text("new")
            if sys.argv[2] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            (scratch / "main").write_text("new")
    """
    out = tmp_path / "out"
    before = {"main": "old"} if there_before else {}
    for name, text in before.items():
        write_text(out / name, text)
    for how, code_of_exit in (("killed", -signal.SIGKILL), ("whole", 0)):
        ran = subprocess.run([sys.executable, "-c", code, str(out), how], check=False)
        assert ran.returncode == code_of_exit
        seen = {name: text for name, text in listing(out).items() if not name.startswith(SCRATCH)}
        assert seen == (before if how == "killed" else {"main": "new", "more": "new"})


def test_it_is_checked_again_at_the_end(tmp_path):
    """Someone else may have written there while the analysis ran."""
    path = tmp_path / "out"

    def overtaken():
        with output_folder(path, names=["done"]) as scratch:
            (scratch / "done").write_text("1")
            path.mkdir()
            (path / "theirs").write_text("2")

    with pytest.raises(MechsafetyError, match="holds something else"):
        overtaken()
    assert listing(tmp_path) == {"out/theirs": "2"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_new_empty_and_earlier_folders_are_accepted(tmp_path):
    check_output_folder(tmp_path / "new", ["done"])
    check_output_folder(tmp_path, ["done"])
    (tmp_path / "done").write_text("")
    (tmp_path / "lost+found").mkdir()  # of a freshly made file system
    (tmp_path / ".mechsafety-0123456789ab").mkdir()  # of a process that was killed
    check_output_folder(tmp_path, ["done"])
    with pytest.raises(MechsafetyError, match="holds something else"):
        check_output_folder(tmp_path, ["other"])


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        ("my-notes.md", r"holds something else \(my-notes.md\)"),
        ("done/thesis.tex", "holds a folder named 'done'; expected that name for a file of the result"),
    ],
)
def test_a_users_own_file_is_never_lost(tmp_path, theirs, reason):
    own = tmp_path / "out" / theirs
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    with pytest.raises(MechsafetyError, match=reason):
        output_folder(tmp_path / "out", names=["done"]).__enter__()
    assert listing(tmp_path) == {f"out/{theirs}": "mine"}


def test_files_beside_an_earlier_result_are_kept(tmp_path):
    """Only where the marking file says that it is a result: other programs write a result.json too."""
    names, place = ["result.json", "more"], tmp_path / "out"
    theirs = {"notes.md": "mine", "talk/slides.tex": "mine"}
    for name, text in theirs.items():
        write_text(place / name, text)
    result = '{\n "format": "mechsafety.result",\n "version": 3}'
    for text in ("", "{}", '{"format": "other"}'):
        write_text(place / "result.json", text)
        with pytest.raises(MechsafetyError, match=r"holds something else \(notes.md, talk\)"):
            check_output_folder(place, names)
    for earlier in ({"result.json": result}, {"result.json": result, "more": "old"}):
        for name, text in earlier.items():
            write_text(place / name, text)
        with output_folder(place, names) as scratch:
            (scratch / "result.json").write_text(result + "\n")
        assert listing(place) == {**theirs, "result.json": result + "\n"}


def test_a_place_that_cannot_be_written_to_is_known_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(MechsafetyError) as caught:
        output_folder(tmp_path / "file" / "out", names=["done"]).__enter__()
    assert str(caught.value) == (
        f"cannot write '{tmp_path}/file/out' (File exists); expected a place that can be written to"
    )

    def refused(self, *args, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refused)
    for place in (tmp_path / "new" / "out", tmp_path):
        with pytest.raises(MechsafetyError) as caught:
            output_folder(place, names=["done", "file"]).__enter__()
        assert str(caught.value) == (
            f"cannot write '{place}' (Permission denied); expected a place that can be written to"
        )
    assert listing(tmp_path) == {"file": "mine"}


def test_an_almost_full_disk(tmp_path, monkeypatch):
    check_free_space(tmp_path, 1)
    disk = types.SimpleNamespace(total=2**40, free=5 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    with pytest.raises(MechsafetyError) as caught:
        check_free_space(tmp_path / "scratch", 32 * 2**20)
    assert str(caught.value) == (
        f"the disk of '{tmp_path.name}' has 5 MiB left; expected at least 32 MiB; "
        "free some space, or choose another folder"
    )
    disk.total = 0  # what some network file systems say
    check_free_space(tmp_path / "scratch", 32 * 2**20)


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_in_a_new_folder(tmp_path, umask):
    path = tmp_path / "new" / "dir" / "a.txt"
    assert write_text(path, "é\n") == path
    assert path.read_bytes() == "é\n".encode()
    assert (mode(path), mode(path.parent)) == (0o640, 0o750)
    assert listing(tmp_path) == {"new/dir/a.txt": "é\n"}


def test_a_failure_leaves_the_file_as_it_was(tmp_path):
    def full(path):
        with output_file(path) as scratch:
            scratch.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device", str(scratch))

    (tmp_path / "a.txt").write_text("old")
    for path in (tmp_path / "a.txt", tmp_path / "new" / "b.txt"):
        with pytest.raises(MechsafetyError) as caught:
            full(path)
        assert str(caught.value) == (
            f"cannot write '{path}' (No space left on device); expected a place that can be written to"
        )
    assert listing(tmp_path) == {"a.txt": "old"} and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_private_file_stays_private_and_a_link_stays_a_link(tmp_path):
    own, link = tmp_path / "own.txt", tmp_path / "link.txt"
    own.write_text("old")
    own.chmod(0o600)
    link.symlink_to(own)
    write_text(link, "new")
    assert link.is_symlink() and own.read_text() == "new" and mode(own) == 0o600


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    reader, writer = os.pipe()
    try:
        write_text(f"/dev/fd/{writer}", "through")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
        os.close(writer)
    device = Path(os.devnull)
    write_text(device, "gone")
    assert not device.is_file()


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(MechsafetyError) as caught:
        write_text(tmp_path, "x")
    assert str(caught.value) == f"'{tmp_path}' is a folder; expected the name of a file to write"
    assert list(tmp_path.iterdir()) == []
