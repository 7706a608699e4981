"""Run folders: finished work items on disk, from which a stopped run goes on.

run_dir/
lock, owner.json                             held by the one process that uses the folder
001-activation_patching/                     one folder per call
run.json                                   what the call was given, and the machine's settings
000000-patching/000000.safetensors         one file per item of a sweep
"""

import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mechsafety.codec import decode, encode, parse, read_json
from mechsafety.errors import MechsafetyError
from mechsafety.output import OF_THE_SYSTEM, SCRATCH, check_free_space, json_text, output_file, write_text, writing
from mechsafety.scale.identity import identity
from mechsafety.scale.items import Place, unpack
from mechsafety.scale.machine import Machine

FORMAT = "mechsafety.run"
VERSION = 1
LOCK, OWNER, HEADER = "lock", "owner.json", "run.json"
# free space that a run begins with; what it will need in the end depends on its results
NEEDED_BYTES = 64 * 2**20

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Header:
    """What the items of a call depend on.

    Attributes:
        call: Name of the function.
        arguments: Hash of each argument.
        about: The model, its weights' hash, versions and the like, for people who look into the folder.
        versions: Versions of the packages that numbers depend on.
        machine: The settings that the call computes with.
    """

    call: str
    arguments: Mapping[str, str]
    about: Mapping[str, Any]
    versions: Mapping[str, str]
    machine: Machine

    @property
    def run(self) -> str:
        """Hash that every item carries."""
        return identity((self.call, self.arguments, self.versions, self.machine))

    def difference(self, stored: "Header") -> str:
        """What a stored call has other than this one, in words; empty if it is the same call."""
        if self.call != stored.call:
            return f"a call of {stored.call}, not of {self.call}"
        names = {**self.arguments, **stored.arguments}
        other = [name for name in names if self.arguments.get(name) != stored.arguments.get(name)]
        if other:
            return f"{self.call} with another {' and '.join(other)}"
        changed = [f"{name} {was}" for name, was in stored.versions.items() if self.versions.get(name) != was]
        return f"{self.call} by {', '.join(changed)}" if changed else ""


@dataclass(eq=False)
class CallFolder:
    """The items of one call.

    Attributes:
        path: Where they are.
        header: What they depend on.
        redone: Number of items that were found damaged or foreign, and are computed again.
    """

    path: Path
    header: Header
    redone: int = field(default=0, init=False)

    @property
    def run(self) -> str:
        """Hash that every item carries."""
        return self.header.run

    @property
    def machine(self) -> Machine:
        """The settings that the call computes with."""
        return self.header.machine

    def bytes_of(self, sweep: str, place: Place) -> bytes | None:
        """The stored outcome of an item; None if there is none that is whole and this item's.

        Args:
            sweep: Name of the sweep's folder.
            place: The item.
        """
        source = self._file(sweep, place)
        try:
            data = source.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._again(source, error.strerror or "it cannot be read")
            return None
        try:
            unpack(Any, data, place)
        except MechsafetyError as error:
            self._again(source, error.problem)
            return None
        return data

    def put(self, sweep: str, place: Place, data: bytes) -> None:
        """Store an outcome, whole or not at all."""
        with output_file(self._file(sweep, place)) as scratch:
            scratch.write_bytes(data)

    def _file(self, sweep: str, place: Place) -> Path:
        return self.path / sweep / f"{place.item:06d}.safetensors"

    def _again(self, source: Path, why: str) -> None:
        self.redone += 1
        if self.redone == 1:
            logger.warning("%s is %s: it and any other such item are computed again", source, why)


class RunFolder:
    """An open run folder; see `opened`.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def call(self, number: int, header: Header) -> CallFolder:
        """The folder of a call: what an earlier run has begun, or a new one.

        Args:
            number: Number of the call in the run, from 1 on.
            header: What the call depends on, as this process would compute it.

        Raises:
            MechsafetyError: The folder holds another call there, or one of other arguments or versions.
        """
        name = header.call.rpartition(".")[2]
        known = next(iter(sorted(self.path.glob(f"{number:03d}-*"))), None)
        stored = None if known is None else _read(known / HEADER)
        if known is not None and stored is None and known.name != f"{number:03d}-{name}":
            raise self._other(f"call {number} in {known.name!r}")
        if stored is not None:
            what = header.difference(stored)
            if what:
                raise self._other(what)
            return CallFolder(known or self.path, stored)
        place = self.path / f"{number:03d}-{name}"
        write_text(place / HEADER, _text(header))
        return CallFolder(place, header)

    def _other(self, what: str) -> MechsafetyError:
        return MechsafetyError(
            f"the run folder {str(self.path)!r} holds {what}",
            expected="the run that began there, with the same arguments and versions",
            hint="choose another folder, or delete this one",
            page="run-folders",
        )


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[RunFolder]:
    """A run folder, made if it is missing, that no other process uses meanwhile.

    Raises:
        MechsafetyError: Another process uses it; it holds something else; it cannot be written to; or its disk is
            nearly full.
    """
    from filelock import FileLock, Timeout

    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise MechsafetyError(f"{str(folder)!r} is a file", expected="a folder for the run")
    with writing(path):
        check_free_space(folder.resolve(), NEEDED_BYTES)
        folder.mkdir(parents=True, exist_ok=True)
        strange = sorted(entry.name for entry in folder.iterdir() if not _known(entry)) or _links(folder)
        if strange:
            raise MechsafetyError(
                f"the run folder {str(folder)!r} holds something else ({', '.join(strange[:3])})",
                expected="a new or empty folder, or that of an earlier run",
                hint="choose another folder",
            )
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise MechsafetyError(
                f"the run folder {str(folder)!r} is in use by {_owner(folder)}",
                expected="one process per run folder",
                hint="wait until it is done, or choose another folder",
                page="run-folders",
            ) from None
    try:
        with writing(path):
            for left in folder.rglob(f"{SCRATCH}*"):  # of a process that was killed
                left.unlink(missing_ok=True)
            (folder / OWNER).write_text(json_text({"process": os.getpid(), "host": socket.gethostname()}))
        yield RunFolder(folder)
    finally:
        lock.release()


def _known(entry: Path) -> bool:
    own = entry.name in (LOCK, OWNER, *OF_THE_SYSTEM) or entry.name.startswith(SCRATCH)
    return own or (entry.is_dir() and re.fullmatch(r"\d{3,}-\w+", entry.name) is not None)


def _links(folder: Path) -> list[str]:
    """Links anywhere in a folder. A run makes none, and would read and write where they lead."""
    found = []
    for place, folders, files in os.walk(folder):
        links = [Path(place, name) for name in (*folders, *files) if os.path.islink(Path(place, name))]
        found += [f"the link {str(link.relative_to(folder))!r}" for link in links]
    return sorted(found)


def _owner(folder: Path) -> str:
    """Who holds the lock, in words."""
    try:
        found = read_json((folder / OWNER).read_bytes())
        return f"process {int(found['process'])} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _text(header: Header) -> str:
    return json_text({"format": FORMAT, "version": VERSION, **encode(Header, header)}) + "\n"


def _read(path: Path) -> Header | None:
    """A stored header; None where it is missing or damaged, and a warning where it is damaged."""
    try:
        data = parse(path.read_bytes().decode(), FORMAT, VERSION, VERSION)
        found: Header = decode(Header, {name: one for name, one in data.items() if name not in ("format", "version")})
        return found
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, MechsafetyError) as error:
        if isinstance(error, MechsafetyError) and error.page == "a-file-of-another-version":
            raise
        logger.warning("%s is damaged (%s): the call begins again", path, error)
        return None
