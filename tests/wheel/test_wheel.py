"""The wheel and the source distribution: what is in them, and that the wheel works where nothing else of ours is.

The wheel is installed into an empty environment. That environment sees the libraries that the wheel's metadata asks
for, and those that they ask for in turn; they are linked from the environment that runs the tests, because fetching
torch takes minutes. It does not see the repository, nor any library that only tests or extras need.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from email import message_from_string
from email.message import Message
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from sbom import required

import mechsafety as ms

ROOT = Path(__file__).parents[2]
INFO = f"mechsafety-{ms.__version__}.dist-info"
# beside the package in the source distribution: what builds it, and what a reader wants
BESIDE = {
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "PKG-INFO",
    "README.md",
    "constraints.txt",
    "pyproject.toml",
    "setup.cfg",
}


def run(*command: object, **options: object) -> str:
    """Output of a command that must succeed; its stderr stands in the failure."""
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def package_files() -> set[str]:
    """Files of the package that git knows, or would take: what the wheel has to hold."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "mechsafety", cwd=ROOT).splitlines()
    return {name for name in listed if (ROOT / name).is_file()}


@dataclass(frozen=True)
class Built:
    """Distributions of one tree: the wheel from the tree, the source distribution, and the wheel made from that."""

    direct: Path
    source: Path
    again: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    """Built from a copy without old build folders: what lies there would get into the wheel."""
    tree = tmp_path_factory.mktemp("tree")
    beside = {name for name in BESIDE if name != "PKG-INFO"} | {"tests/test_readme.py", "notebooks/00_quickstart.ipynb"}
    for name in sorted(package_files() | beside):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    out = tmp_path_factory.mktemp("built")
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--wheel", "--outdir", out / "direct", tree)
    run(*build, "--outdir", out / "from_source", tree)  # the source distribution, then a wheel from it
    (direct,) = (out / "direct").glob("*.whl")
    (source,) = (out / "from_source").glob("*.tar.gz")
    (again,) = (out / "from_source").glob("*.whl")
    return Built(direct, source, again)


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def metadata(wheel: Path) -> Message:
    return message_from_string(contents(wheel)[f"{INFO}/METADATA"].decode())


def test_the_wheel_holds_every_file_of_the_package_and_no_other(built):
    held = {name for name in contents(built.direct) if not name.startswith(f"{INFO}/")}
    assert held == package_files()
    for needed in ("py.typed", "__init__.pyi", "circuits/data/demo.json", "prompts/data/pairs.jsonl"):
        assert f"mechsafety/{needed}" in held


def test_the_wheel_says_what_it_is(built):
    said = metadata(built.direct)
    assert (said["Name"], said["Version"]) == ("mechsafety", ms.__version__)
    assert (said["Requires-Python"], said["License"]) == (">=3.11", "MIT")
    assert set(said.get_all("Provides-Extra")) == {
        "demo",
        "widget",
        "notebook",
        "serve",
        "quantised",
        "ray",
        "docs",
        "dev",
    }
    held = contents(built.direct)
    assert held[f"{INFO}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert held[f"{INFO}/entry_points.txt"].decode().split("\n")[:2] == [
        "[console_scripts]",
        "mechsafety = mechsafety.cli:main",
    ]


def test_the_source_distribution_holds_the_package_and_what_builds_it(built):
    with tarfile.open(built.source) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert {name for name in names if ".egg-info/" not in name} == package_files() | BESIDE


def test_the_source_distribution_gives_the_same_wheel(built):
    assert contents(built.again) == contents(built.direct)


def link(one: Distribution, site: Path) -> None:
    """Make one installed distribution visible in another environment."""
    assert one.files, one.metadata["Name"]
    for top in {file.parts[0] for file in one.files} - {"..", "__pycache__"}:
        target = site / top
        if not target.exists():
            target.symlink_to(Path(str(one.locate_file(top))))


@dataclass(frozen=True)
class Environment:
    """An environment with the wheel, and an empty folder to run in."""

    scripts: Path
    folder: Path
    variables: dict[str, str]

    def __call__(self, *command: object) -> str:
        return run(self.scripts / str(command[0]), *command[1:], cwd=self.folder, env=self.variables)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Environment:
    root = tmp_path_factory.mktemp("environment")
    venv.create(root / "venv", symlinks=True, with_pip=False)
    scripts = root / "venv" / ("Scripts" if os.name == "nt" else "bin")
    run(
        *(sys.executable, "-m", "pip", "--python", scripts / "python", "install", "--quiet"),
        *("--disable-pip-version-check", "--no-deps", "--no-index", built.direct),
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    site = Path(run(scripts / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for one in required(metadata(built.direct).get_all("Requires-Dist")).values():
        link(one, site)
    folder = root / "empty"
    folder.mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "TEMP") if name in os.environ}
    return Environment(scripts, folder, {**kept, "HOME": str(root), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})


def test_the_environment_has_no_more_than_the_wheel_asks_for(installed):
    code = "import importlib.util as u, sys; print([u.find_spec(n) is not None for n in sys.argv[1:]])"
    found = installed("python", "-c", code, "torch", "transformer_lens", "pytest", "ray", "hypothesis", "gguf")
    assert found.strip() == "[True, True, False, False, False, False]"


def test_the_package_imported_is_the_wheels(installed):
    code = "import mechsafety, sys; print(mechsafety.__file__.startswith(sys.prefix), mechsafety.__version__)"
    assert installed("python", "-c", code).split() == ["True", ms.__version__]


def test_the_command_says_its_version_and_its_help(installed):
    assert installed("mechsafety", "--version").strip() == ms.__version__
    assert "mechsafety" in installed("mechsafety", "--help")
    assert installed("python", "-m", "mechsafety", "--version").strip() == ms.__version__


USE = """
import json
from pathlib import Path

import mechsafety as ms

assert len(ms.RefusalCircuit.builtin().nodes) > 10
assert len(ms.PromptPairs.builtin("test")) > 10
assert ms.testbed.certified().truth.nodes  # its weights are package data
built = ms.testbed.planted()
built.model.save_pretrained("model")
built.tokenizer.save_pretrained("model")
rows = [json.dumps({"harmful": pair.harmful, "harmless": pair.harmless}) for pair in built.pairs.sample(20)]
Path("pairs.jsonl").write_text("\\n".join(rows), encoding="utf-8")
"""


def test_a_planted_model_is_mapped_and_drawn(installed):
    """The wheel makes a model, maps it from its folder, and writes every file that the README promises."""
    installed("python", "-c", USE)
    said = json.loads(installed("mechsafety", "map", "model", "--pairs", "pairs.jsonl", "--out", "out", "--json"))
    assert said
    out = installed.folder / "out"
    files = {path.name for path in out.iterdir()}
    assert files == {"circuit.json", "circuit.pdf", "circuit.svg", "circuit.tex", "report.html", "scores.csv"}
    circuit = ms.RefusalCircuit.load(out / "circuit.json")
    assert circuit.nodes and circuit.provenance.versions["mechsafety"] == ms.__version__
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") and not re.search(r"""(?:src|href)=["']https?:""", page)
