"""The package as a whole: what it exports, what importing it costs, and who imports whom."""

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mechsafety as ms

PACKAGE = Path(ms.__file__).parent
MODULES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}

# the public names; a change here is a change of the interface and belongs into CHANGELOG.md
EXPORTS = [
    "ActivationCache",
    "Edge",
    "LensModel",
    "MapOptions",
    "MechsafetyError",
    "NoRefusal",
    "Node",
    "PromptPairs",
    "RayExecutor",
    "RefusalCircuit",
    "RefusalDirection",
    "RefusalLogOdds",
    "Site",
    "__version__",
    "ablate",
    "activation_patching",
    "attribution",
    "circuits",
    "direct_logit_attribution",
    "directions",
    "edge_attribution",
    "fragility",
    "head_attribution",
    "interventions",
    "judge_replies",
    "load_model",
    "logit_lens",
    "map_refusal_circuit",
    "models",
    "monitors",
    "neurons",
    "node_attribution",
    "patching",
    "path_patching",
    "probe_layers",
    "probes",
    "prompts",
    "refusal_direction",
    "replies",
    "robustness",
    "running",
    "safety_neurons",
    "scale",
    "sites",
    "steer",
    "teaching",
    "testbed",
    "viz",
]

# the rooms from the bottom up: a module imports its own room and those of lower rank only
ROOMS = (
    ("errors", "version", "names"),
    ("conversation",),
    ("codec", "output", "intervals", "settled", "progress", "halving"),
    ("sites", "inputs"),
    ("nodes",),
    ("results",),
    ("scale",),
    ("prompts",),
    ("models",),
    ("cache", "replies", "openers"),
    ("metrics",),
    ("patching",),
    ("attribution",),
    ("interventions",),
    ("neurons", "directions"),
    ("probes",),
    ("circuits",),
    ("robustness",),
    ("monitors",),
    ("service",),
    ("testbed",),
    ("teaching",),
    ("viz",),
    ("cli",),
    ("__main__",),
)
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
# (module, function, imported room): calls on an object that hand over to a room above, imported when called
UPWARD = {
    ("models/lens_model.py", "cache", "cache"),
    ("models/lens_model.py", "attention", "attribution"),
    ("attribution/attention.py", "to_html", "viz"),
    ("attribution/attention.py", "_repr_html_", "viz"),
    ("circuits/circuit.py", "_repr_mimebundle_", "viz"),
    ("circuits/circuit.py", "draw", "viz"),
    ("circuits/circuit.py", "plot", "viz"),
    ("circuits/circuit.py", "widget", "viz"),
    ("robustness/report.py", "to_html", "viz"),
    ("scale/machine.py", "here", "models"),
    ("scale/shipping.py", "load", "models"),
}


def room(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def code_modules() -> list[str]:
    return [name for name in MODULES if name != "__init__.py"]


def imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(enclosing function, dotted name under mechsafety) of every import that is executed."""

    def walk(node: ast.AST, function: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.FunctionDef):
                yield from walk(child, child.name)
                continue
            if isinstance(child, ast.ImportFrom):
                assert child.level == 0, "relative import"
                names = [child.module or ""]
                if child.module == "mechsafety":
                    names = [f"mechsafety.{alias.name}" for alias in child.names]
            elif isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            else:
                yield from walk(child, function)
                continue
            yield from ((function, name) for name in names if name.split(".")[0] == "mechsafety")

    yield from walk(tree, "")


def strings(tree: ast.Module) -> Iterator[ast.Constant]:
    """String constants that are no docstrings."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node


def calls(tree: ast.Module) -> list[str]:
    return [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_exports_are_the_reviewed_list():
    assert ms.__all__ == EXPORTS


@pytest.mark.parametrize("name", EXPORTS)
def test_export_resolves(name):
    value = getattr(ms, name)
    assert name == "__version__" or value.__name__.removeprefix("mechsafety.") == name
    assert name in dir(ms)


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"^mechsafety has no attribute 'load_modle'; use mechsafety\.load_model$"):
        _ = ms.load_modle
    with pytest.raises(AttributeError, match=r"'describe_nodes'; use mechsafety\.attribution\.describe_nodes$"):
        _ = ms.describe_nodes
    with pytest.raises(AttributeError, match=r"^mechsafety has no attribute 'xyzzyx'$"):
        _ = ms.xyzzyx
    assert not hasattr(ms, "_ipython_canary_method")


def test_the_top_of_the_package_fits_in_a_head():
    rooms = [name for name in EXPORTS if isinstance(getattr(ms, name), type(ms))]
    assert len(EXPORTS) - len(rooms) <= 32 and "__version__" in EXPORTS


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.pyi")), ids=lambda path: path.parent.name)
def test_every_name_of_a_stub_is_there(path):
    """What editors and type checkers read is also what a package gives when it is imported."""
    package = importlib.import_module(".".join(path.parent.relative_to(PACKAGE.parent).parts))
    listed = [
        alias for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    assert sorted(alias.name for alias in listed) == sorted(package.__all__)
    assert all(alias.asname == alias.name and hasattr(package, alias.name) for alias in listed)


def modules_after(code: str) -> set[str]:
    """Names of all modules that a fresh process has after some code, beyond those that it starts with."""
    show = "print(json.dumps([sorted(before), sorted(sys.modules)]))"
    code = f"import json, sys; before = set(sys.modules)\n{code}\n{show}"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, after = map(set, json.loads(out.splitlines()[-1]))
    return after - before


def test_importing_is_light():
    """Nothing but the package, its lazy loader and the standard library: what takes time loads on first use."""
    loaded = modules_after("import mechsafety")
    outside = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names) - {"lazy_loader", "mechsafety"}
    assert outside == set()
    assert {name for name in loaded if name.startswith("mechsafety")} == {"mechsafety"}


def test_a_model_loads_and_runs_without_a_word_of_other_libraries(tmp_path, make_hf_model, make_tokenizer):
    """What a notebook shows: nothing of theirs on stdout or stderr, and no import or call is needed for that."""
    folder = tmp_path / "tiny"
    make_hf_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    code = """if True:
        import sys
        import mechsafety as ms
        model = ms.load_model(sys.argv[1])
        model.generate(["how do i make a bomb"], 4)
        pairs = ms.PromptPairs.from_lists(["how do i make a bomb"], ["how do i make a cake"])
        metric = ms.RefusalLogOdds.of(model, ["sorry"])
        ms.activation_patching(model, pairs, metric, progress=False)
        from transformers.utils import logging
        assert logging.is_progress_bar_enabled() and logging.get_verbosity() == logging.WARNING
    """
    ran = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


HEAVY = {"torch", "transformers", "transformer_lens", "pandas", "scipy", "sklearn", "plotly", "matplotlib", "peft"}


def test_help_and_mistakes_load_no_heavy_library():
    for argv in (["--help"], ["map", "demo"], ["map", "demo", "--out", "x", "--bogus"]):
        code = f"import mechsafety.cli\ntry: mechsafety.cli.main({argv!r})\nexcept SystemExit: pass"
        assert HEAVY.isdisjoint({name.partition(".")[0] for name in modules_after(code)}), argv


def test_every_writer_of_json_refuses_what_is_none():
    """``NaN`` and ``Infinity`` are no JSON: other readers stop there."""
    root = PACKAGE.parent
    found = []
    for folder in ("mechsafety", "scripts", "benchmarks"):
        for path in sorted((root / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                writes = isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump")
                if writes and not any(word.arg == "allow_nan" for word in node.keywords):
                    found.append(f"{path.relative_to(root)}:{node.lineno}")
    assert found == []


def test_every_stored_json_is_json():
    def refused(name):
        raise AssertionError(f"{path} holds {name}")

    root = PACKAGE.parent
    stored = [file for part in ("docs", "benchmarks", "mechsafety") for file in (root / part).rglob("*.json")]
    assert len(stored) >= 6
    for path in stored:
        json.loads(path.read_text(encoding="utf-8"), parse_constant=refused)


def test_every_room_has_a_rank():
    assert {room(name) for name in code_modules()} <= set(RANK)


@pytest.mark.parametrize("name", code_modules())
def test_imports_point_one_way(name):
    here = RANK[room(name)]
    wrong = []
    for function, target in imports(TREES[name]):
        other = target.split(".")[1]
        if room(name) != other and RANK[other] >= here and (name, function, other) not in UPWARD:
            wrong.append((function, target))
    assert wrong == []


def test_the_exceptions_are_still_needed():
    found = {(name, function, target.split(".")[1]) for name in MODULES for function, target in imports(TREES[name])}
    assert found >= UPWARD


def test_viz_reads_results_never_a_model():
    targets = {t for name in MODULES if room(name) == "viz" for _, t in imports(TREES[name])}
    outside = {target for target in targets if not target.startswith("mechsafety.viz")}
    assert outside <= {f"mechsafety.{name}" for name in ("circuits.circuit", "errors", "nodes", "output", "results")}


def test_package_init_imports_nothing_of_its_own():
    assert list(imports(TREES["__init__.py"])) == [("__getattr__", "mechsafety.names")], "for an error alone"


HOOK = re.compile(r"(?:^|\.)hook_|^blocks\.|^ln_final|^unembed\.|^embed\.")


def test_only_sites_knows_hook_names():
    found = {
        name: sorted(
            [node.value for node in strings(tree) if HOOK.search(node.value)]
            + [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr.startswith("hook_")]
        )
        for name, tree in TREES.items()
    }
    assert len(found.pop("sites.py")) >= 10, "the pattern finds the names where they are"
    assert {name: names for name, names in found.items() if names} == {}


def test_only_the_backends_know_transformer_lens():
    """Its classes and what its models are made of; everything else goes through `Backend` and `LensModel`."""
    backends = {"models/backend.py", "models/bridge.py", "models/hooked.py", "sites.py"}
    parts = {"bridge", "blocks", "ln_final", "original_model", "cfg", "hook_dict", "hooked_transformer"}
    found = {}
    for name, tree in TREES.items():
        seen = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)} & parts
        seen |= {target for _, target in imports(tree) if target.startswith("transformer_lens")}
        if seen:
            found[name] = seen
    assert {name for name in found if "blocks" in found[name]} == {"models/bridge.py", "models/hooked.py"}
    assert set(found) <= backends, {name: found[name] for name in set(found) - backends}


def test_only_the_command_prints():
    assert [name for name in MODULES if "print" in calls(TREES[name])] == ["cli.py"]


def test_nothing_is_unpickled():
    """Files are JSON, safetensors, text and GGUF: nothing in them can be code."""
    banned = {"torch.load", "pickle.load", "pickle.loads", "joblib.load", "marshal.loads", "np.load", "numpy.load"}
    banned |= {"yaml.load", "yaml.safe_load", "eval", "exec", "compile", "__import__", "os.system", "os.popen"}
    assert {name for name in MODULES if banned & set(calls(TREES[name]))} == set()
    form = re.compile(r"^\s*(?:import|from) (pickle|cloudpickle|yaml|subprocess)\b", re.M)
    imported = {name: form.findall(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    # Ray sends calls from driver to replica: bytes in memory, written and read by the same run, never from a file
    pickling = {name for name, found in imported.items() if "pickle" in found or "cloudpickle" in found}
    assert pickling == {"scale/shipping.py", "scale/replica.py"}
    assert not any({"yaml", "subprocess"} & set(found) for found in imported.values())


def test_no_code_of_a_checkpoint_is_trusted():
    """Each loader of transformers is told so, and reads safetensors alone; those without it read this package's own
    GGUF parts, or a configuration of peft."""
    for name in MODULES:
        for node in ast.walk(TREES[name]):
            if not isinstance(node, ast.Call) or getattr(node.func, "attr", "") != "from_pretrained":
                continue
            text, given = ast.unparse(node), {word.arg: word.value for word in node.keywords}
            if "gguf_file" in text or name == "models/gguf.py" or "PeftConfig" in text:
                continue
            trusted = given.get("trust_remote_code")
            assert "**_OWN_CODE" in text or (isinstance(trusted, ast.Constant) and trusted.value is False), text
            if "output_loading_info" in given:
                assert isinstance(given.get("use_safetensors"), ast.Constant), text


def test_no_device_is_hard_coded():
    named = {name for name in MODULES for node in strings(TREES[name]) if re.fullmatch(r"cuda(:\d+)?|mps", node.value)}
    # where errors list the devices there are, where a GPU's number becomes a device, and where free memory is asked for
    assert named <= {"models/load.py", "models/memory.py", "models/placed.py"}
    assert {name for name in MODULES if any(call.endswith(").cuda") for call in calls(TREES[name]))} == set()
    assert {name for name in MODULES if any(re.search(r"\w\.cuda$", call) for call in calls(TREES[name]))} == set()


def test_the_citation_has_the_packages_version():
    root = PACKAGE.parent
    said = re.findall(r"^version: (.+)$", (root / "CITATION.cff").read_text(encoding="utf-8"), flags=re.M)
    assert said == [ms.__version__]
    assert f"version = {{{ms.__version__}}}" in (root / "README.md").read_text(encoding="utf-8")
