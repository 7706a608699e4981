"""Kill a map with SIGKILL at random moments, let it go on, and compare the bytes with those of a map left alone.

Each run is killed once, twice or three times before it may end. The moments are drawn over the items that a whole run
stores, so that they do not depend on how fast the machine is. The models are tiny (``tests/swept.py``)::

    python tests/study_resume.py --times 20
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import swept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--call", default="map", choices=swept.CALLS, help="what is run")
    parser.add_argument("--out", type=Path, help="JSON file with what was found")
    given = parser.parse_args()
    rng, rows = random.Random(given.seed), []
    whole = swept.as_bytes(swept.CALLS[given.call]())
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        begun = time.perf_counter()
        if os.waitpid(swept.forked(given.call, work / "alone", work / "alone.out"), 0)[1]:
            sys.exit("the call fails without being killed")
        seconds, total = time.perf_counter() - begun, swept.n_items(work / "alone")
        if (work / "alone.out").read_bytes() != whole:
            sys.exit("a run that nobody kills gives other bytes than the call without a run")
        print(f"{given.call}: {total} items in {seconds:.1f} s", flush=True)
        while len(rows) < given.times:
            folder, out, kills = work / f"run{len(rows)}", work / f"run{len(rows)}.out", []
            for _ in range(rng.choice((1, 2, 3))):
                first = swept.n_items(folder) if folder.exists() else 0
                at = swept.killed(given.call, folder, out, rng.randrange(first, total), 0.02 * rng.random())
                if at is None:
                    break
                kills.append(at)
            if not out.exists() and os.waitpid(swept.forked(given.call, folder, out), 0)[1]:
                sys.exit(f"run {len(rows)} does not go on after {kills}")
            same = out.read_bytes() == whole
            if not kills and same:  # it was done before its moment came
                shutil.rmtree(folder)
                out.unlink()
                continue
            rows.append({"killed_at": kills, "same": same})
            words = "same bytes" if same else "OTHER BYTES"
            print(f"run {len(rows)}: killed at {kills} of {total} items, {words}", flush=True)
    good = sum(row["same"] for row in rows)
    print(f"{good} of {len(rows)} killed runs went on to the same bytes")
    if given.out:
        found = {"call": given.call, "items": total, "seed": given.seed, "runs": rows, "same": good}
        given.out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    sys.exit(good != len(rows))


if __name__ == "__main__":
    main()
