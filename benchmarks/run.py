"""Ours against TransformerLens' own functions, memory, growth, and GPUs: every case in a process of its own.

    python benchmarks/run.py [--only CASE ...] [--resume]     # or: make bench

After every case its result is merged into benchmarks/results.json, and benchmarks/RESULTS.md and growth.svg are written
from that. The exit status is not zero if a case failed or its values differ from the peer's. `--resume` leaves out what
was measured with these versions on this machine; `--tiny` runs a random model of two layers, to try the code (with
`--out`).
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from cases import PEER_CASES
from gpu import gpu, gpu_cases
from growth import grow, growth_cases, plot
from measure import cpu_model
from memory import NAME as MEMORY
from memory import memory
from models import load
from report import markdown
from tqdm.auto import tqdm

from mechsafety.output import json_text, write_text
from mechsafety.results import package_versions

HERE = Path(__file__).parent
CASES = (*PEER_CASES, MEMORY, *growth_cases(), *gpu_cases())


def measure(name: str, tiny: bool) -> dict[str, Any]:
    """One case, in this process."""
    if name in gpu_cases():
        shape, dtype = gpu_cases()[name]
        return gpu("tiny", dtype, "cpu") if tiny else gpu(shape, dtype)
    model = load(tiny)
    if name in PEER_CASES:
        return PEER_CASES[name][0](model)
    return memory(model) if name == MEMORY else grow(model, *growth_cases()[name])


def measure_apart(name: str, tiny: bool) -> dict[str, Any]:
    """One case, in a fresh process.

    Raises:
        RuntimeError: The process failed; its error output is in the message.
    """
    command = [sys.executable, __file__, "--worker", name, *(["--tiny"] if tiny else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def here() -> dict[str, Any]:
    """What the figures of a case depend on besides the code."""
    machine = {
        "cpu": f"{cpu_model()} ({platform.machine()})",
        "cores": os.cpu_count(),
        "ram_gib": round(psutil.virtual_memory().total / 2**30),
        "threads": torch.get_num_threads(),
    }
    return {"date": datetime.date.today().isoformat(), "versions": package_versions(), "machine": machine}


def same_place(case: dict[str, Any]) -> bool:
    """Whether a stored case was measured with these versions on such a machine."""
    now = here()
    return all(case.get(key) == now[key] for key in ("versions", "machine"))


def unequal_cases(cases: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Which of the named cases have values that differ from the peer's."""
    return [name for name in names if cases.get(name, {}).get("equal") is False]


def write(results: dict[str, Any], out: Path) -> None:
    """results.json, RESULTS.md and growth.svg, whole or not at all."""
    docs = {name: (case.__doc__ or "").split("\n")[0] for name, (case, _) in PEER_CASES.items()}
    texts = {
        "results.json": json_text(results) + "\n",
        "RESULTS.md": markdown(results, docs, {name: target for name, (_, target) in PEER_CASES.items()}),
    }
    for name, text in texts.items():
        write_text(out / name, text)
    if any(name in results["cases"] for name in growth_cases()):
        plot(results["cases"], out / "growth.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--resume", action="store_true", help="leave out what was measured in this place")
    parser.add_argument("--tiny", action="store_true", help="a random model of two layers, to try the code")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the results")
    parser.add_argument("--worker", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.worker, args.tiny), allow_nan=False))
        return
    if args.tiny and args.out == HERE:
        parser.error("--tiny needs --out: its figures are no results")
    store = args.out / "results.json"
    results: dict[str, Any] = json.loads(store.read_text()) if store.is_file() else {"cases": {}}
    results["cases"] = {name: case for name, case in results["cases"].items() if "date" in case}
    names = [n for n in args.only if not (args.resume and same_place(results["cases"].get(n, {})))]
    bar, failed = tqdm(names), []
    for name in bar:
        bar.set_description(name)
        try:
            results["cases"][name] = measure_apart(name, args.tiny) | here()
        except RuntimeError as error:
            failed.append(name)
            tqdm.write(str(error))
        write(results | here(), args.out)
    write(results | here(), args.out)
    problems = [f"failed: {', '.join(failed)}"] if failed else []
    unequal = unequal_cases(results["cases"], args.only)
    if unequal:
        problems.append(f"values differ from the peer's: {', '.join(unequal)}")
    if problems:
        sys.exit("; ".join(problems))


if __name__ == "__main__":
    main()
