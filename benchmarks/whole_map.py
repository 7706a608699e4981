"""The whole map of the demo model, by an earlier commit and by this one, one after the other in one run.

    python benchmarks/whole_map.py [COMMIT] [--repeats N]     # on an idle machine

Each map is the command `mechsafety map demo` with the defaults of its commit, in a process of its own; seconds include
starting it and loading the model. A third map is by this commit, of as many pairs as the earlier one tries. The rows
are merged into benchmarks/results.json, and RESULTS.md is written from that.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from report import WHOLE_MAP
from run import HERE, here, write

ROOT = HERE.parent
# the last commit before maps matched models, trained masks and decided their claims
BEFORE = "540d7ac"


def mapped(code: Path, out: Path, limit: int | None = None) -> dict[str, Any]:
    """Seconds and peak memory of one map, and what it found."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "mechsafety", "map", "demo", "--out", str(out)]
    command += [] if limit is None else ["--limit", str(limit)]
    running = subprocess.Popen(
        command, cwd=out.parent, env=os.environ | {"PYTHONPATH": str(code)}, stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(running.pid, 0)
    seconds = time.perf_counter() - begun
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"{' '.join(command)} failed with the code of {code}")
    circuit = json.loads((out / "circuit.json").read_text())
    options, check = circuit["provenance"]["options"], circuit["verification"]
    claims = [claim["passed"] for claim in check["claims"]]
    return {
        "seconds": seconds,
        "peak_gib": used.ru_maxrss / 2**20,
        "tried": options["limit"],
        "pairs": [options["found_on"], options["held_out"], options["fresh"]],
        "parts": len(circuit["nodes"]),
        "fresh": check["fresh"]["faithfulness"],
        "fresh_ci": check["fresh"]["ci"],
        "claims": {"holds": claims.count(True), "fails": claims.count(False), "undecided": claims.count(None)},
    }


def git(*words: str) -> str:
    """What a git command says about this checkout."""
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", nargs="?", default=BEFORE, help="commit to compare with")
    parser.add_argument("--repeats", type=int, default=1, help="maps of each, interleaved")
    args = parser.parse_args()
    if git("status", "--porcelain", "--", "mechsafety"):
        parser.error("mechsafety/ differs from the last commit; commit it, so that the row says what was measured")
    commits = {"before": git("rev-parse", "--short", args.before), "now": git("rev-parse", "--short", "HEAD")}
    found: dict[str, list[dict[str, Any]]] = {"before": [], "as many pairs": [], "now": []}
    with tempfile.TemporaryDirectory() as scratch:
        old = Path(scratch) / "before"
        git("worktree", "add", "--detach", str(old), args.before)
        try:
            for k in range(args.repeats):
                before = mapped(old, Path(scratch) / f"before-{k}")
                found["before"].append(before)
                found["as many pairs"].append(mapped(ROOT, Path(scratch) / f"as-many-{k}", before["tried"]))
                found["now"].append(mapped(ROOT, Path(scratch) / f"now-{k}"))
        finally:
            git("worktree", "remove", "--force", str(old))
    case = {name: rows[0] | {"seconds": median(row["seconds"] for row in rows)} for name, rows in found.items()}
    results = json.loads((HERE / "results.json").read_text())
    results["cases"][WHOLE_MAP] = case | {"commits": commits, "repeats": args.repeats} | here()
    write(results, HERE)


if __name__ == "__main__":
    main()
