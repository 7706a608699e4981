"""Folders that are made once and kept in the user's cache, complete or not at all, and checked before each use."""

import atexit
import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mechsafety.codec import read_json
from mechsafety.errors import MechsafetyError, first_line

logger = logging.getLogger(__name__)

MANIFEST = "kept.json"
_MAKING, _OLD = ".making", ".old"
# folders made for this process alone because they cannot be kept; they are removed when it ends
_UNKEPT: dict[str, Path] = {}


def kept_folder(name: str, make: Callable[[Path], None], needed: int = 0) -> Path:
    """A folder that ``make`` filled, now or in an earlier process.

    A new folder moves to its place only when it is complete, with a manifest that holds the SHA-256 of each file. It is
    used only while all files match the manifest; otherwise it is made again. If several processes need it, one makes it
    and the others wait. If the disk is full or the cache cannot be written to, the folder is made for this process
    alone, and a warning says so.

    Args:
        name: The folder's name. Other contents need another name.
        make: Fills an empty folder.
        needed: Bytes that the folder needs while it is made.

    Raises:
        MechsafetyError: No disk has enough room. An error of ``make`` is passed on, and no folder is left.
    """
    folder = cache_folder() / name
    if _whole(folder):
        return folder
    if name in _UNKEPT:
        return _UNKEPT[name]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _check_room(folder.parent, needed)
        with _lock(folder):
            if not _whole(folder):  # another process may have made it meanwhile
                _fill(folder, make)
        return folder
    except OSError as error:
        reason = error.strerror or first_line(error)
    logger.warning("%s cannot be kept in %s (%s); it is made for this process alone", name, folder.parent, reason)
    try:
        return _unkept(name, make, needed)
    except OSError as error:
        raise MechsafetyError(
            f"{name} cannot be made in {tempfile.gettempdir()} either ({error.strerror or first_line(error)})",
            expected=f"{needed / 2**30:.1f} GiB of free space",
            hint=f"free some in {folder.parent}",
        ) from error


def cache_folder() -> Path:
    """The package's folder in the user's cache."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("mechsafety", appauthor=False))


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _whole(folder: Path) -> bool:
    """Whether the folder holds what its manifest says."""
    try:
        wanted = read_json((folder / MANIFEST).read_bytes())
        return bool(wanted) and _digests(folder, wanted) == wanted
    except (OSError, ValueError):
        return False


def _digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        found = {name: pool.submit(sha256_of, folder / name) for name in names}
        return {name: digest.result() for name, digest in found.items()}


def _check_room(folder: Path, needed: int) -> None:
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _lock(folder: Path) -> AbstractContextManager[Any]:
    from filelock import FileLock

    return FileLock(f"{folder}.lock")


def _fill(folder: Path, make: Callable[[Path], None]) -> None:
    """Make the folder; the caller holds its lock."""
    scratch, old = (folder.with_name(folder.name + end) for end in (_MAKING, _OLD))
    for left in (scratch, old):  # left by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    scratch.mkdir()
    try:
        make(scratch)
        names = sorted(path.name for path in scratch.iterdir())
        (scratch / MANIFEST).write_text(
            json.dumps(_digests(scratch, names), indent=1, allow_nan=False), encoding="utf-8"
        )
        if folder.exists():
            os.replace(folder, old)
        os.replace(scratch, folder)
    finally:
        for left in (scratch, old):
            shutil.rmtree(left, ignore_errors=True)


def _unkept(name: str, make: Callable[[Path], None], needed: int) -> Path:
    """A folder among the system's temporary files, for this process alone."""
    _check_room(Path(tempfile.gettempdir()), needed)
    folder = Path(tempfile.mkdtemp(prefix="mechsafety-"))
    try:
        make(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _UNKEPT[name] = folder
    return folder
