"""Write files completely or not at all, and JSON that every reader accepts."""

import json
import math
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mechsafety.errors import MechsafetyError, first_line

SCRATCH = ".mechsafety-"
# near the beginning of every file that marks a folder as a result
MARK = b'"format": "mechsafety.'
# files that operating systems put into folders by themselves; they are left in place
OF_THE_SYSTEM = ("lost+found", ".DS_Store", "Thumbs.db", "desktop.ini")


def json_text(data: Any, indent: int | None = 1) -> str:
    """Standard JSON, in which NaN and infinite numbers become ``null``.

    Example:
        >>> json_text({"p": float("nan"), "share": (0.5, 1.0)}, indent=None)
        '{"p": null, "share": [0.5, 1.0]}'
    """
    return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


@contextmanager
def output_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A scratch file beside ``path`` that takes its place on success and vanishes on failure.

    It is on the disk before it takes its place, so that a power cut leaves the old file or the new one. Missing folders
    are made. A new file takes over the permissions of the file that it replaces. A link stays a link,
    and the file that it points to is replaced. Anything that is not an ordinary file (a pipe, ``/dev/stdout``) is
    written to directly.

    Raises:
        MechsafetyError: ``path`` is a folder, or cannot be written to. The message gives the system's reason.
    """
    with writing(path):
        target = Path(path)
        if target.is_dir():
            raise MechsafetyError(f"{str(path)!r} is a folder", expected="the name of a file to write")
        if target.exists() and not target.is_file():
            yield target
            return
        target = target.resolve()
        scratch = _scratch(target.parent, target.suffix)
        with _folders(target.parent, path):
            try:
                yield scratch
                if target.exists():
                    shutil.copymode(target, scratch)
                _to_disk(scratch)
                os.replace(scratch, target)
                _to_disk(target.parent)
            finally:
                scratch.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    r"""Write a text file (UTF-8, lines end in ``\n``), completely or not at all.

    Raises:
        MechsafetyError: As `output_file`.
    """
    with output_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8", newline="\n")
    return Path(path)


@contextmanager
def output_folder(path: str | os.PathLike[str], names: Sequence[str]) -> Iterator[Path]:
    """A scratch folder whose files move to ``path`` on success; on failure it vanishes.

    A new ``path`` appears with all its files at once. An existing folder (it may be a mount, or a shell's working
    folder) stays, and its files are replaced one by one. If it holds an earlier result, all other files in it are kept.
    Otherwise it may hold only files of the given names, so that no file of the user is lost.

    Args:
        path: The folder; missing folders above it are made.
        names: Names of the files of such a result. The first name is the file that marks the folder as a result. This
            file is removed first and written last, so that nobody reads parts of two results together.

    Raises:
        MechsafetyError: ``path`` holds something else, or cannot be written to. Either error comes before any work is
            done.
    """
    with writing(path):
        target = Path(path).resolve()
        check_output_folder(target, names)
        # the scratch folder lies inside an existing folder, so that both are on one file system, even if it is a mount
        place = target if target.is_dir() else target.parent
    with _folders(place, path):
        scratch = _scratch(place)
        with writing(path):
            scratch.mkdir()
        try:
            yield scratch
            check_output_folder(target, names)
            with writing(path), uninterrupted():
                _move_in(scratch, target, names)
        finally:
            with uninterrupted():
                shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Context in which Ctrl-C and SIGTERM do nothing, for a step of milliseconds that must not stop halfway.

    Outside the main thread, which alone sets what signals do, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def check_output_folder(path: Path, names: Sequence[str]) -> None:
    """Refuse an output folder that holds something else than an earlier result.

    Files that somebody has put beside an earlier result do not matter: they are kept.

    Args:
        path: The folder.
        names: Names of a result's files. The first name is the file that marks the folder as a result.

    Raises:
        MechsafetyError: ``path`` is a file, or a folder that holds other things and no earlier result, or a folder that
            holds a folder with the name of one of a result's files.
    """
    if path.exists() and not path.is_dir():
        raise MechsafetyError(f"{path.name!r} is a file", expected="a folder to write into", hint="choose another name")
    entries = sorted(path.iterdir()) if path.is_dir() else []
    taken = [entry.name for entry in entries if entry.name in names and entry.is_dir()]
    if taken:
        raise MechsafetyError(
            f"the output folder {path.name!r} holds a folder named {taken[0]!r}",
            expected="that name for a file of the result",
            hint="move that folder away, or choose another output folder",
        )
    strange = [entry.name for entry in entries if not _may_stay(entry, names)]
    if strange and not _is_result(path / names[0]):
        raise MechsafetyError(
            f"the output folder {path.name!r} holds something else ({', '.join(strange[:3])})",
            expected="a new or empty folder, or one with an earlier result",
            hint="choose another folder",
        )


def check_free_space(folder: Path, needed: int) -> None:
    """Refuse a folder on a disk that is nearly full.

    Args:
        folder: An absolute path of a folder, which need not be there yet.
        needed: Bytes that must be free.

    Raises:
        MechsafetyError: The disk has fewer free bytes. If the system does not report its size, the disk passes.
    """
    disk = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists()))
    if disk.total and disk.free < needed:
        raise MechsafetyError(
            f"the disk of {folder.parent.name!r} has {disk.free / 2**20:.0f} MiB left",
            expected=f"at least {needed // 2**20} MiB",
            hint="free some space, or choose another folder",
        )


def check_within(folder: Path, path: Path) -> None:
    """Refuse a file of a folder that is a link to somewhere else, so that nobody's folder makes one read other files.

    Raises:
        MechsafetyError: It leads out of the folder, or nowhere.
    """
    try:
        inside = path.resolve(strict=path.is_symlink()).is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a link to itself
        inside = False
    if not inside:
        raise MechsafetyError(
            f"{path.name!r} in {str(folder)!r} is a link that leads out of the folder",
            expected="a file in the folder",
            hint="copy the folder with the files that its links lead to (cp -rL)",
        )


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Context that turns a write error of the system into one line that names the user's path, not a scratch file.

    Raises:
        MechsafetyError: An OSError was raised inside. The message gives its reason.
    """
    try:
        yield
    except (OSError, MechsafetyError) as error:
        # of nested contexts, the outermost one has the path that the user gave
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        reason = cause.strerror or first_line(cause)
        raise MechsafetyError(
            f"cannot write {str(path)!r} ({reason})", expected="a place that can be written to"
        ) from cause


def _to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk; without that, a power cut leaves empty files."""
    if path.is_dir() and os.name != "posix":
        return  # other systems open no folders
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _scratch(folder: Path, suffix: str = "") -> Path:
    return folder / f"{SCRATCH}{uuid.uuid4().hex[:12]}{suffix}"


def _may_stay(entry: Path, names: Sequence[str]) -> bool:
    """Whether an entry is a result's file, scratch that a killed process left, or a file of the system."""
    return entry.name.startswith(SCRATCH) or entry.name in OF_THE_SYSTEM or entry.name in names


def _is_result(marker: Path) -> bool:
    """Whether a file says that it is a result of this package; other programs write a ``result.json`` too."""
    if not marker.is_file():
        return False
    with marker.open("rb") as file:
        return MARK in file.read(100)


@contextmanager
def _folders(path: Path, asked: str | os.PathLike[str]) -> Iterator[None]:
    """Make a folder and its parents, and remove those on failure; messages name the path ``asked``."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        with writing(asked):
            path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise


def _move_in(scratch: Path, target: Path, names: Sequence[str]) -> None:
    if not target.exists():
        os.replace(scratch, target)
        return
    made, earlier = ([name for name in names if (place / name).exists()] for place in (scratch, target))
    aside = scratch / "earlier"
    aside.mkdir()
    try:
        for name in earlier:
            os.replace(target / name, aside / name)
        for name in reversed(made):
            os.replace(scratch / name, target / name)
    except BaseException:
        for name in made:
            if not (scratch / name).exists():
                (target / name).unlink(missing_ok=True)
        for name in earlier:
            if (aside / name).exists():
                os.replace(aside / name, target / name)
        raise
