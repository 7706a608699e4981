"""The software bill of materials: every installed library, what mechsafety needs, and the same bytes each time."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sbom import bill, normal, required

import mechsafety as ms

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """Two files of the same environment, written one after the other."""
    folder = tmp_path_factory.mktemp("sbom")
    tool = os.environ.get("CYCLONEDX", "cyclonedx-py")
    for name in ("first.json", "second.json"):
        command = [sys.executable, ROOT / "scripts" / "sbom.py", folder / name, "--tool", tool]
        subprocess.run(command, check=True, capture_output=True)
    return folder / "first.json", folder / "second.json"


def test_the_same_environment_gives_the_same_bytes(files):
    assert files[0].read_bytes() == files[1].read_bytes()


def test_it_is_cyclonedx_and_lists_what_is_installed(files):
    said = json.loads(files[0].read_text(encoding="utf-8"))
    assert (said["bomFormat"], said["specVersion"], said["version"]) == ("CycloneDX", "1.5", 1)
    own = said["metadata"]["component"]
    assert (own["name"], own["version"], own["licenses"]) == (
        "mechsafety",
        ms.__version__,
        [{"license": {"id": "MIT"}}],
    )
    assert own["purl"] == f"pkg:pypi/mechsafety@{ms.__version__}"
    components = {normal(one["name"]): one for one in said["components"]}
    installed = {normal(one.metadata["Name"]): one.version for one in importlib.metadata.distributions()}
    assert {name: one["version"] for name, one in components.items()} | {"mechsafety": own["version"]} == installed
    assert all(one["purl"].startswith("pkg:pypi/") and one["type"] == "library" for one in components.values())
    assert sum("licenses" in one for one in components.values()) > 0.9 * len(components)
    assert {one["ref"] for one in said["dependencies"]} == {one["bom-ref"] for one in (own, *said["components"])}


def test_it_tells_what_mechsafety_needs_from_what_tests_need(files):
    said = json.loads(files[0].read_text(encoding="utf-8"))
    scopes = {normal(one["name"]): one["scope"] for one in said["components"]}
    assert {scopes[name] for name in ("torch", "transformer-lens", "numpy", "safetensors")} == {"required"}
    assert {scopes[name] for name in ("pytest", "mypy", "hypothesis")} == {"excluded"}


def test_no_path_of_this_machine_is_in_it(files):
    text = files[0].read_text(encoding="utf-8")
    assert "file:" not in text and str(ROOT) not in text


def test_a_requirement_of_an_extra_counts_where_the_extra_is_asked_for():
    assert "pytest" not in required(["mechsafety"]) and "numpy" in required(["mechsafety"])
    assert "pytest" in required(["mechsafety[dev]"])


def test_local_references_alone_are_dropped():
    def component(name: str, *urls: str) -> dict:
        return {"name": name, "version": "1", "externalReferences": [{"url": url} for url in urls]}

    found = {
        "metadata": {},
        "components": [component("mechsafety", "file:///x"), component("A.b", "https://a", "file:///y")],
    }
    written = bill(found, {"a-b"})
    assert "externalReferences" not in written["metadata"]["component"]
    assert written["components"] == [
        {"name": "A.b", "version": "1", "externalReferences": [{"url": "https://a"}], "scope": "required"}
    ]
