"""The software bill of materials of the environment that runs this: CycloneDX 1.5, as JSON.

cyclonedx-py lists what is installed, with licenses and what needs what, and checks the file against the schema of
CycloneDX. Three things are added here. mechsafety is what the file is about, not one library of many. What mechsafety
needs without extras is marked as required; all else (tests, linters, optional features) is marked as excluded. Paths of
this machine are left out, and so are times: the same environment gives the same bytes.

Run: make sbom (a minute), or python scripts/sbom.py OUT.json --tool PATH/TO/cyclonedx-py
"""

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement


def required(requirements: Iterable[str]) -> dict[str, Distribution]:
    """Installed distributions that requirements ask for, and all that these ask for, by their normal names."""
    waiting = [(text, "") for text in requirements]
    seen: set[tuple[str, str]] = set()
    found: dict[str, Distribution] = {}
    while waiting:
        text, extra = waiting.pop()
        asked = Requirement(text)
        if asked.marker and not asked.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *asked.extras):
            if (normal(asked.name), wanted) not in seen:
                seen.add((normal(asked.name), wanted))
                one = found[normal(asked.name)] = importlib.metadata.distribution(asked.name)
                waiting += [(text, wanted) for text in one.requires or ()]
    return found


def normal(name: str) -> str:
    """A distribution's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def listed(tool: str) -> dict[str, Any]:
    """What cyclonedx-py says of this environment."""
    command = [tool, "environment", "--spec-version", "1.5", "--output-reproducible", "--short-PURLs", sys.executable]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return found


def bill(found: dict[str, Any], needed: set[str]) -> dict[str, Any]:
    """The bill as it is written: mechsafety on top, scopes, no local paths.

    Args:
        found: What cyclonedx-py says.
        needed: Normal names of what mechsafety needs.
    """
    (own,) = [one for one in found["components"] if one["name"] == "mechsafety"]
    others = [one for one in found["components"] if one is not own]
    own["purl"] = f"pkg:pypi/mechsafety@{own['version']}"
    for one in (own, *others):
        kept = [place for place in one.pop("externalReferences", []) if not place["url"].startswith("file:")]
        if kept:
            one["externalReferences"] = kept
    for one in others:
        one["scope"] = "required" if normal(one["name"]) in needed else "excluded"
    return {**found, "metadata": {**found["metadata"], "component": own}, "components": others}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tool", default="cyclonedx-py", help="cyclonedx-py, which comes with cyclonedx-bom")
    args = parser.parse_args()
    written = bill(listed(args.tool), set(required(["mechsafety"])))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(written, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    scopes = [one["scope"] for one in written["components"]]
    print(f"{args.out}: {scopes.count('required')} libraries that mechsafety needs, {scopes.count('excluded')} others")


if __name__ == "__main__":
    main()
