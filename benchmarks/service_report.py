"""service.json, to which the benchmarks of monitors and of the service write, and SERVICE.md drawn from it."""

import datetime
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mechsafety.output import json_text, write_text
from mechsafety.results import package_versions

HERE = Path(__file__).parent
LIMIT = 1.10


def store(part: str, found: Mapping[str, Any], folder: Path = HERE) -> None:
    """Replace one part of service.json, and draw SERVICE.md again."""
    place = folder / "service.json"
    record = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
    about = {"date": f"{datetime.date.today():%Y-%m-%d}", "cores": os.cpu_count(), "processor": platform.machine()}
    record[part] = {**about, "versions": package_versions(), **found}
    write_text(place, json_text(record) + "\n")
    write_text(folder / "SERVICE.md", markdown(record))


def markdown(record: Mapping[str, Any]) -> str:
    """The whole page."""
    lines = ["# Benchmarks of monitors and of the service", ""]
    if "monitors" in record:
        lines += [*_monitors(record["monitors"]), ""]
    if "service" in record:
        lines += [*_service(record["service"]), ""]
    return "\n".join(lines)


def _about(part: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in part["versions"].items())
    return f"{part['date']}, {part['cores']} cores ({part['processor']}), {versions}."


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


def _monitors(part: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            case["monitor"],
            case["sites"],
            case["call"],
            f"{case['plain_s']:.2f} s",
            f"{case['watched_s']:.2f} s",
            f"{case['ratio']:.3f} ({case['low']:.3f} to {case['high']:.3f})",
            "yes" if case["same"] else "NO",
            "met" if case["ratio"] <= LIMIT else "missed",
        )
        for case in part["cases"]
    ]
    head = ["monitor", "sites", "call", "without", "with", "ratio", "same tokens", f"at most {LIMIT:.2f}"]
    return [
        "## Monitors: time beside generation",
        "",
        f"{_about(part)} {part['model']}, float32, replies of up to {part['tokens']} tokens. `python "
        "benchmarks/monitor_overhead.py`.",
        f"Runs without and with a monitor take turns, {part['repeats']} of each. *without*, *with*: medians of the "
        "process' own processor time, which leaves out what else runs on the machine. *ratio*: the median over the "
        "turns of with / without, and in brackets the smallest and the largest. A monitor reads every token in the "
        "forwards of the generation itself.",
        "",
        *table(head, rows),
    ]


def _service(part: Mapping[str, Any]) -> list[str]:
    load, kill, full = part["load"], part["killed"], part["overload"]
    growth = load["rss_mib"][-1] - load["rss_mib"][0]
    rows = [
        ("requests", load["requests"]),
        ("parallel clients", load["clients"]),
        ("answers lost", load["lost"]),
        ("answers mixed up, or other than the model's own reply to the prompt alone", load["different"]),
        ("requests per second", f"{load['per_second']:.1f}"),
        ("seconds per request: median, 95 %, longest", ", ".join(f"{s:.2f}" for s in load["seconds"])),
        ("memory of the service after 0, 25, 50, 75, 100 %", ", ".join(f"{m:.0f} MiB" for m in load["rss_mib"])),
        ("growth of the memory", f"{growth:+.1f} MiB"),
        ("clients killed while they waited or read", kill["killed"]),
        ("places held afterwards (running, waiting)", f"{kill['running']}, {kill['waiting']}"),
        ("answers afterwards that differ", kill["different"]),
        ("memory after the killed clients", f"{kill['rss_mib']:.0f} MiB"),
        (
            f"with room for {full['waiting']} waiting: answered, refused with 429, others",
            f"{full['answered']}, {full['refused']}, {full['others']}",
        ),
        ("  answers among them that differ", full["different"]),
        ("exit code after SIGTERM", part["exit_code"]),
    ]
    return [
        "## Service: many clients at once",
        "",
        f"{_about(part)} {part['model']}, replies of up to {part['tokens']} tokens ({part['replies']} different ones), "
        "half of them streamed, on loopback. `python benchmarks/service_load.py`.",
        " ".join(
            [
                "Every answer is compared with `LensModel.generate` for its prompt alone, computed before in another "
                "process. The service runs one request at a time, so the seconds per request are mostly waiting behind "
                "other clients.",
                *filter(None, [part.get("note")]),
            ]
        ),
        "",
        *table(["figure", "value"], rows),
    ]
