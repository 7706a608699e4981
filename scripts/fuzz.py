"""Spoil files and load them: each must load, or be refused by one MechsafetyError of one line.

    python scripts/fuzz.py all --seconds 600 --seed 0 --out .work/fuzz.json
    python scripts/fuzz.py circuit guards --cases 500
    python scripts/fuzz.py circuit --coverage --seconds 600

A case is a folder of valid files, of which one is spoilt: its bytes, its JSON values, or its safetensors header. Files
may also be missing, be a folder, or be a link that leads out of the folder. A finding is any other exception, an error
of several lines, a file that is opened outside the case's folder, a process, a socket, new code, more than 512 MiB or
more than 5 seconds. The case of each finding is kept.

With --coverage, libFuzzer (the package atheris) decides by the branches that a case reaches which cases to spoil again.
"""

import argparse
import faulthandler
import importlib
import inspect
import json
import logging
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fuzzing.mutations import spoilt
from fuzzing.targets import MAKERS, Target
from fuzzing.watching import Finding, Watch, judged

# modules whose branches guide libFuzzer
READERS = (
    *("codec", "conversation", "inputs", "results", "circuits.files", "prompts.files", "scale.folder", "scale.items"),
    *("models.parts_adapter", "monitors.guard", "monitors.activation", "service.judge"),
)
WARM_UP = 300
HANGS = 60
# odd things that may befall a file, or the folder beside it; most cases have none
ODDITIES = (
    "missing",
    "folder",
    "empty",
    "link to a valid file",
    "link to another file",
    "link to nothing",
    "link to itself",
)


@dataclass
class Tally:
    """What came of a target's cases.

    Attributes:
        cases: Number of cases.
        outcomes: Numbers of those that load, that are refused, and that are findings.
        findings: One of each kind, with the number of cases that had it.
    """

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: dict[Any, tuple[Any, int]] = field(default_factory=dict)


class Cases:
    """Cases of a target: the bytes of a case name a folder of valid files, a file of it, an oddity, and its content.

    Args:
        target: The target.
        place: A folder of its own for all that is written.
        keep: Folder for the cases of findings.
    """

    def __init__(self, target: Target, place: Path, keep: Path) -> None:
        self.target, self.keep, self.tally = target, keep, Tally()
        self.box, self.outside = place / "box", place / "outside"
        self.watch = WATCH[0] if WATCH else Watch()
        WATCH[:] = [self.watch]
        self.names = [sorted(files) for files in target.valid]
        self.contents = [content for files in target.valid for content in files.values()]
        self.current = keep / f"{target.name}.current"
        self.box.mkdir(parents=True)
        for k, files in enumerate(target.valid):
            self._write(self.outside / str(k), files)
        (self.outside / "canary").write_text("untouched")
        keep.mkdir(parents=True, exist_ok=True)

    def valid(self) -> Iterator[bytes]:
        """All valid files as cases."""
        for k, names in enumerate(self.names):
            for at, name in enumerate(names):
                yield bytes((k, at, 0)) + self.target.valid[k][name]

    def mutated(self, case: bytes, rng: random.Random) -> bytes:
        """A case, spoilt once more."""
        head, content = case[:3].ljust(3, b"\0"), case[3:]
        if rng.random() < 0.06:
            head = head[:2] + bytes((rng.randrange(256),))
        return head + spoilt(rng, content, self.contents)

    def run(self, case: bytes, *, alarm: bool = True, count: bool = True) -> None:
        """Write a case, load it, and note what came of it."""
        case = case[:3].ljust(3, b"\0") + case[3:]
        k = case[0] % len(self.names)
        name = self.names[k][case[1] % len(self.names[k])]
        folder = self.box / "case"
        self._write(folder, {**self.target.valid[k], name: case[3:]})
        odd = ODDITIES[case[2] % len(ODDITIES)] if case[2] > 100 else ""
        # a link that the user names is followed; one in a folder that somebody else made is not
        if odd.startswith("link") and not (self.target.whole or "/" in name):
            odd = ""
        if odd:
            self._befall(folder / name, odd, self.outside / str(k) / name)
        self.current.write_bytes(case)
        outcome, found = judged(self.target.name, self.target.load, folder, self.box, self.watch, alarm)
        if odd and self._touched():
            found.append(Finding(self.target.name, "path", "a file outside was written", ""))
        if count:
            self.tally.cases += 1
            self.tally.outcomes["finding" if found else outcome] += 1
            for one in found:
                known, times = self.tally.findings.get(one.key, (one, 0))
                self.tally.findings[one.key] = (known, times + 1)
                if not times:
                    number = len(self.tally.findings)
                    (self.keep / f"{self.target.name}-{number}.case").write_bytes(case)
                    print(f"{self.target.name} {number}: {one.kind} {one.what} at {one.where}", flush=True)
        self._clear(folder)

    def _touched(self) -> bool:
        """Whether a file outside is not as it was."""
        whole = {"canary": b"untouched"}
        for k, files in enumerate(self.target.valid):
            whole |= {f"{k}/{name}": content for name, content in files.items()}
        found = {str(path.relative_to(self.outside)): path for path in self.outside.rglob("*") if path.is_file()}
        return found.keys() != whole.keys() or any(found[name].read_bytes() != whole[name] for name in whole)

    @staticmethod
    def _write(folder: Path, files: dict[str, bytes]) -> None:
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def _befall(self, path: Path, oddity: str, valid: Path) -> None:
        path.unlink()
        if oddity == "folder":
            path.mkdir()
        elif oddity == "empty":
            path.touch()
        elif oddity.startswith("link"):
            ends = {"valid": valid, "another": self.outside / "canary", "nothing": self.outside / "new", "itself": path}
            path.symlink_to(next(end for word, end in ends.items() if word in oddity.split()))

    @staticmethod
    def _clear(folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)


# audit events cannot be switched off, so that there is one watch in a process
WATCH: list[Watch] = []


def warm_up(cases: Cases, seed: int, most: int = WARM_UP) -> None:
    """Load everything that the loaders load at their first use, without counting."""
    rng = random.Random(f"warm-up {seed}")
    valid = list(cases.valid())
    for case in valid:
        cases.run(case, count=False)
    for _ in range(min(most, 40 * len(valid))):
        cases.run(cases.mutated(rng.choice(valid), rng), count=False)


def by_chance(cases: Cases, seed: int, *, seconds: float = float("inf"), limit: float = float("inf")) -> None:
    """Cases spoilt one to three times by chance, and again where that was not refused."""
    rng = random.Random(f"{cases.target.name} {seed}")
    pool = list(cases.valid())
    n_valid, end = len(pool), time.monotonic() + seconds
    while time.monotonic() < end and cases.tally.cases < limit:
        case = cases.mutated(rng.choice(pool), rng)
        loads = cases.tally.outcomes["loads"]
        cases.run(case)
        if cases.tally.outcomes["loads"] > loads and len(case) < 200_000 and rng.random() < 0.2:
            # what loads is spoilt again, beside the valid files
            if len(pool) < n_valid + 200:
                pool.append(case)
            else:
                pool[rng.randrange(n_valid, len(pool))] = case


def classes(module: Any) -> list[type]:
    """The classes that a module defines."""
    return [one for one in vars(module).values() if isinstance(one, type) and one.__module__ == module.__name__]


def by_coverage(cases: Cases, seed: int, seconds: float, tell: Callable[[], None]) -> None:
    """Cases that libFuzzer chooses; it ends the process."""
    import atheris

    for name in READERS:
        module = importlib.import_module(f"mechsafety.{name}")
        for value in [*vars(module).values(), *(part for one in classes(module) for part in vars(one).values())]:
            function = inspect.unwrap(getattr(value, "__func__", getattr(value, "fget", None) or value))
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                atheris.instrument_func(function)
    corpus = Path(tempfile.mkdtemp())
    for k, case in enumerate(cases.valid()):
        (corpus / str(k)).write_bytes(case)

    def mutate(data: bytes, largest: int, number: int) -> bytes:
        rng = random.Random(number)
        if rng.random() < 0.15:
            return bytes(atheris.Mutate(data, largest))
        return cases.mutated(bytes(data), rng)[:largest]

    def case(data: bytes) -> None:
        cases.run(data, alarm=False)
        tell()

    flags = [
        f"-max_total_time={int(seconds)}",
        f"-seed={seed + 1}",
        "-max_len=400000",
        "-rss_limit_mb=6000",
        "-timeout=60",
        f"-artifact_prefix={cases.keep}/",
    ]
    atheris.Setup(
        [sys.argv[0], *flags, "-print_final_stats=1", str(corpus)],
        case,
        custom_mutator=mutate,
        internal_libfuzzer=True,
    )
    atheris.Fuzz()


def record(cases: Cases, seconds: float, seed: int, coverage: bool) -> dict[str, Any]:
    """What is stored of a target."""
    return {
        "target": cases.target.name,
        "about": cases.target.about,
        "coverage": coverage,
        "seed": seed,
        "seconds": round(seconds, 1),
        "cases": cases.tally.cases,
        "outcomes": dict(sorted(cases.tally.outcomes.items())),
        "findings": [{**asdict(one), "cases": times} for one, times in cases.tally.findings.values()],
    }


def fuzzed(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Fuzz a target in this process."""
    target = MAKERS[name]()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        cases = Cases(target, Path(place), args.keep)
        warm_up(cases, args.seed)
        faulthandler.dump_traceback_later(args.seconds + HANGS, exit=True)
        began = time.monotonic()
        if args.coverage:
            written = began

            def tell() -> None:
                """Store what was found so far, every 5 seconds: libFuzzer ends the process without a word."""
                nonlocal written
                if time.monotonic() - written > 5:
                    written = time.monotonic()
                    write(args.out, [record(cases, written - began, args.seed, True)])

            by_coverage(cases, args.seed, args.seconds, tell)
        by_chance(cases, args.seed, seconds=args.seconds, limit=args.cases or float("inf"))
        faulthandler.cancel_dump_traceback_later()
        return record(cases, time.monotonic() - began, args.seed, False)


def write(path: Path | None, rows: Sequence[dict[str, Any]]) -> None:
    """Add targets to a record, in place of earlier ones of the same name and kind."""
    from mechsafety.output import json_text, write_text

    for row in rows:
        print(f"{row['target']}: {row['cases']} cases in {row['seconds']:.0f} s, {row['outcomes']}", flush=True)
    if path is None:
        return
    stored = json.loads(path.read_text()) if path.is_file() else {"targets": []}
    fresh = {(row["target"], row["coverage"]) for row in rows}
    kept = [row for row in stored["targets"] if (row["target"], row["coverage"]) not in fresh]
    everything = sorted([*kept, *rows], key=lambda row: (row["target"], row["coverage"]))
    write_text(path, json_text({"python": platform.python_version(), "targets": everything}) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", choices=["all", *MAKERS])
    parser.add_argument("--seconds", type=float, default=60.0, help="time per target")
    parser.add_argument("--cases", type=int, help="end a target after so many cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--coverage", action="store_true", help="guided by coverage; one target; needs atheris")
    parser.add_argument("--out", type=Path, help="JSON file to which the results are added")
    parser.add_argument("--keep", type=Path, default=Path(".work/fuzz"), help="folder for the cases of findings")
    args = parser.parse_args(arguments)
    names = list(MAKERS) if "all" in args.targets else args.targets
    logging.disable(logging.CRITICAL)
    rows = [fuzzed(name, args) for name in names]
    write(args.out, rows)
    return int(any(row["findings"] for row in rows))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import mechsafety.circuits
    import mechsafety.monitors
    import mechsafety.robustness
    import mechsafety.scale
    import mechsafety.service.judge  # noqa: F401

    sys.exit(main())
