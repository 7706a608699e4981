"""How heavy a report is and how long a browser takes to load it, in headless Chromium without network.

    python benchmarks/page_load.py [--repeats N] [--limit SECONDS]

One row per report: its bytes, the time until the page's load event, and the time until the interactive picture inside
it can be used. Times are medians; run it on a quiet machine. The exit status is not zero if a report takes longer than
the limit.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "browser"))

from chromium import FLAGS, chromium
from circuits_drawn import large_circuit, neuron_circuit, small_circuit
from playwright.sync_api import sync_playwright

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.viz import render_report

ROOT = Path(__file__).resolve().parents[1]
REPORTS: dict[str, Callable[[], RefusalCircuit]] = {
    "demo": lambda: RefusalCircuit.load(ROOT / "docs" / "gallery" / "demo.json"),
    "12 nodes, with attention": small_circuit,
    "16 nodes, neurons among them": neuron_circuit,
    "200 nodes, with attention": large_circuit,
}


def load_seconds(browser: Any, path: Path) -> tuple[float, float]:
    """Seconds until the load event, and until the picture has counted its nodes."""
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 800})
    page = context.new_page()
    start = time.perf_counter()
    page.goto(path.as_uri(), wait_until="load")
    loaded = time.perf_counter() - start
    page.locator("iframe").scroll_into_view_if_needed()
    page.frame_locator("iframe").locator("#nodeCount:has-text('nodes shown')").wait_for()
    usable = time.perf_counter() - start
    context.close()
    return loaded, usable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="loads of each report, after one that does not count")
    parser.add_argument("--limit", type=float, default=2.0, help="seconds until the load event, at most")
    args = parser.parse_args()
    path = chromium()
    if path is None:
        parser.error("no Chromium: install it (apt-get install chromium) or set CHROMIUM to its path")
    slow = []
    print(f"{'report':<32}{'bytes':>12}{'load, s':>10}{'usable, s':>11}")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        for name, made in REPORTS.items():
            file = Path(folder) / "report.html"
            size = file.write_bytes(render_report(made()).encode())
            times = [load_seconds(browser, file) for _ in range(args.repeats + 1)][1:]
            loaded, usable = (statistics.median(column) for column in zip(*times, strict=True))
            print(f"{name:<32}{size:>12,}{loaded:>10.2f}{usable:>11.2f}")
            slow += [name] if loaded > args.limit else []
        browser.close()
    if slow:
        sys.exit(f"slower than {args.limit:g} s: {', '.join(slow)}")


if __name__ == "__main__":
    main()
