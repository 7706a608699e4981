"""Results: saved whole or not at all, read back the same, refused with one line."""

import base64
import dataclasses
import errno
import importlib
import json
import math
import pkgutil
import re
import subprocess
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import jaxtyping
import pytest
import torch

import mechsafety as ms
from mechsafety import Edge, MechsafetyError, Node, RefusalCircuit, results
from mechsafety.attribution import NodeAttribution
from mechsafety.circuits.circuit import Behaviour, KindCounts, Notes
from mechsafety.codec import encode
from mechsafety.conversation import Conversation
from mechsafety.patching import PatchMap
from mechsafety.results import FORMAT_VERSION, Provenance, Result, package_versions
from mechsafety.sites import Site

PROVENANCE = Provenance(
    "tiny", "ab" * 32, "float32", "cpu", "cd" * 32, 3, {"pairs": 4, "where": {"x": None}}, {"a": "1"}
)
NODE = Node("head", 1, 0)
METRIC = {"name": "refusal_log_odds", "refusal_tokens": ["I", " can't ≥ é"], "comply_tokens": []}


@pytest.fixture
def patch_map() -> PatchMap:
    torch.manual_seed(0)
    nodes = (Node("head", 0, 1), Node("mlp", 1), Node("neuron", 2, 47))
    return PatchMap(PROVENANCE, METRIC, nodes, torch.randn(3, 4), torch.randn(4), torch.randn(4), "noising", "all")


@pytest.fixture
def attribution() -> NodeAttribution:
    torch.manual_seed(1)
    return NodeAttribution(PROVENANCE, METRIC, torch.randn(2, 3).double(), torch.randn(2), None, math.pi)


@dataclass(frozen=True, slots=True)
class Made(Result):
    """A result with every kind of field."""

    provenance: Provenance
    tensors: dict[str, torch.Tensor]
    nested: tuple[tuple[float, ...], ...]
    number: int
    flag: bool
    nothing: None = None


def listing(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_same(one: PatchMap, two: PatchMap):
    for name in ("changes", "harmful", "harmless"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    empty = {name: torch.zeros(0) for name in ("harmful", "harmless")}
    stripped = [replace(r, changes=torch.zeros(0, 0), **empty) for r in (one, two)]
    for field in ("provenance", "metric", "nodes", "direction", "positions"):
        assert getattr(stripped[0], field) == getattr(stripped[1], field)


# --- there and back ---------------------------------------------------------------------------------------------------


def test_round_trip(patch_map, tmp_path):
    path = tmp_path / "new" / "folder"
    assert patch_map.save(path) == path
    assert sorted(listing(path)) == ["result.json", "tensors.safetensors"]
    loaded = PatchMap.load(path)
    assert_same(patch_map, loaded)
    assert repr(loaded) == "PatchMap(3 rows x 4 pairs, noising, all)"
    assert torch.equal(loaded.effects, patch_map.effects)
    assert loaded.to_dataframe().equals(patch_map.to_dataframe())


def test_round_trip_keeps_dtype_none_and_float(attribution, tmp_path):
    loaded = NodeAttribution.load(attribution.save(tmp_path / "out"))
    assert loaded.heads.dtype == torch.float64
    assert torch.equal(loaded.heads, attribution.heads)
    assert loaded.neurons is None
    assert loaded.total == math.pi


def test_round_trip_of_every_kind_of_field(tmp_path):
    made = Made(PROVENANCE, {"b": torch.arange(3), "a": torch.tensor(2.5)}, ((0.1, 1e-300), ()), -7, True)
    loaded = Made.load(made.save(tmp_path / "out"))
    assert loaded.tensors["b"].tolist() == [0, 1, 2]
    assert loaded.tensors["a"].item() == 2.5
    assert (loaded.nested, loaded.number, loaded.flag, loaded.nothing) == (((0.1, 1e-300), ()), -7, True, None)
    assert loaded.provenance == PROVENANCE


def test_a_result_without_tensors_has_no_tensor_file(tmp_path):
    path = Made(PROVENANCE, {}, (), 0, False).save(tmp_path / "out")
    assert list(listing(path)) == ["result.json"]
    assert Made.load(path) == Made(PROVENANCE, {}, (), 0, False)


def test_tensors_that_share_memory_and_are_no_rows(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    shared = Made(PROVENANCE, {"whole": whole, "row": whole[1], "turned": whole.T, "same": whole}, (), 0, False)
    loaded = Made.load(shared.save(tmp_path / "out"))
    assert {name: tensor.tolist() for name, tensor in loaded.tensors.items()} == {
        name: tensor.tolist() for name, tensor in shared.tensors.items()
    }


def test_same_result_same_bytes(patch_map, tmp_path):
    one, two = patch_map.save(tmp_path / "one"), patch_map.save(tmp_path / "two")
    assert listing(one) == listing(two)


def test_saved_text_is_plain_json(patch_map, tmp_path):
    data = json.loads((patch_map.save(tmp_path / "out") / "result.json").read_text(encoding="utf-8"))
    assert (data["format"], data["version"], data["type"]) == (
        "mechsafety.result",
        FORMAT_VERSION,
        "PatchMap",
    )
    assert data["result"]["changes"] == {"tensor": "changes"}


def test_a_single_file_where_the_path_says_so(patch_map, tmp_path):
    path = patch_map.save(tmp_path / "new" / "map.json")
    assert path.is_file() and [entry.name for entry in path.parent.iterdir()] == ["map.json"]
    assert_same(patch_map, PatchMap.load(path))
    data = json.loads(path.read_text())
    assert list(data) == ["format", "version", "type", "result", "tensors"]
    assert base64.b64decode(data["tensors"]) == (patch_map.save(tmp_path / "out") / "tensors.safetensors").read_bytes()
    assert PatchMap.from_json(patch_map.to_json()).to_json() == path.read_text()
    for name in ("map", "map.v1", "map.JSON.d"):
        assert patch_map.save(tmp_path / name).is_dir()


def example(kind: object) -> object:
    """A value of an annotated type; the last part of a union."""
    parts = [part for part in get_args(kind) if part is not type(None)]
    if kind in (Node, Edge, Site):
        return {Node: NODE, Edge: Edge(NODE, Node("logits"), "resid"), Site: Site("resid_pre", 1)}[kind]
    if kind is Conversation:
        return Conversation([{"role": "system", "content": "help"}, {"role": "user", "content": "text"}])
    if kind is ms.PromptPairs:  # two prompts that differ
        return ms.PromptPairs.from_lists(["harmful"], ["harmless"]).with_system("help")
    if kind is ms.RefusalLogOdds:  # tokens of one set are in no other
        return ms.RefusalLogOdds((3,), ("no",), opener_ids=(4, 5), opener="I'm")
    if kind is ms.monitors.TamperAudit:  # readings that fit each other
        made = ms.testbed.planted()
        return kind.fingerprint(ms.load_model((made.model, made.tokenizer)), made.pairs.sample(4))
    if kind is RefusalCircuit:  # parts of its own, between which its edges run
        fields = {field.name: example(get_type_hints(kind)[field.name]) for field in dataclasses.fields(kind)}
        behaviour = dict.fromkeys(("harmful", "harmless"), example(Behaviour))
        return finite(kind(**fields | {"metric": METRIC, "behaviour": behaviour}))
    if kind is Behaviour:  # as many replies as prompts
        return Behaviour(3, 0.5, (0.1, 0.9), math.nan, (-math.inf, math.inf), kinds=KindCounts(1, 1, 1, 0))
    if get_origin(kind) in (Union, types.UnionType):
        return example(parts[-1])
    if get_origin(kind) in (Annotated, Literal):
        return example(parts[0]) if get_origin(kind) is Annotated else parts[-1]
    if get_origin(kind) is tuple:
        return (example(parts[0]),) if parts[-1] is Ellipsis else tuple(map(example, parts))
    if get_origin(kind) in (dict, Mapping):
        return {"a" if parts[0] is str else example(parts[0]): example(parts[1])}
    if kind is torch.Tensor:
        return torch.ones(1, 1, 1)
    if issubclass(kind, jaxtyping.AbstractArray):
        sizes = [int(name) if name.isdigit() else 1 for name in kind.dim_str.split()]
        return torch.ones(sizes, dtype=torch.bool if "bool" in kind.dtypes else torch.float32)
    if kind is Notes:
        return Notes(("a",), (), {"suffix": 0.5}, ((("a",), (math.nan,)),))
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind, localns={"Tensor": torch.Tensor}, include_extras=True)
        named = {"metric": METRIC} if get_origin(hints.get("metric")) in (dict, Mapping) else {}
        named |= {"false_positive_rate": 0.5} if "false_positive_rate" in hints else {}
        # a guard is stored only if it can give a probability
        named |= {"intercept": 0.5, "threshold": 0.5} if kind is ms.monitors.GuardWeights else {}
        return kind(**{field.name: example(hints[field.name]) for field in dataclasses.fields(kind)} | named)
    return {str: "text", float: math.nan, int: 3, bool: True, object: None, Any: None}[kind]


def finite(value: object) -> object:
    """A value with 0.5 in place of each NaN: circuit.json has no NaN where something must have been measured."""
    if isinstance(value, float):
        return 0.5 if math.isnan(value) else value
    if dataclasses.is_dataclass(value):
        return replace(value, **{field.name: finite(getattr(value, field.name)) for field in dataclasses.fields(value)})
    if isinstance(value, tuple):
        return tuple(map(finite, value))
    return {key: finite(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def alike(one: object, two: object) -> bool:
    """Whether two values are equal in every field, tensors and NaN included; a list counts as a tuple."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, float) and isinstance(two, float):
        return one == two or (math.isnan(one) and math.isnan(two))
    if dataclasses.is_dataclass(one):
        names = [field.name for field in dataclasses.fields(one)]
        return type(one) is type(two) and all(alike(getattr(one, name), getattr(two, name)) for name in names)
    if isinstance(one, Mapping):
        return isinstance(two, Mapping) and list(one) == list(two) and all(alike(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return isinstance(two, list | tuple) and len(one) == len(two) and all(map(alike, one, two))
    return type(one) is type(two) and one == two


@pytest.mark.unchecked
def test_what_cannot_be_loaded_cannot_be_saved(patch_map, tmp_path):
    """Neither as a folder nor as a file; the message is that of loading, and nothing is written."""
    circuit = example(RefusalCircuit)
    twice, bad = circuit.nodes * 2, circuit.behaviour["harmful"]
    two_ids = {**METRIC, "refusal_ids": [1, 2, 3], "comply_ids": []}
    odd = [
        (replace(circuit, metric={"name": "x"}), "metric: field 'comply_tokens' is missing; expected the fields of "),
        (
            replace(circuit, metric=two_ids),
            "metric: [3, 0] refusal_ids, comply_ids of [2, 0] tokens; expected one each",
        ),
        (replace(circuit, behaviour={"harmful": bad}), "behaviour: field 'harmless' is missing"),
        (
            replace(circuit, behaviour=circuit.behaviour | {"harmful": replace(bad, n=4, kinds=None, judge=3)}),
            "behaviour.harmful.judge",
        ),
        (replace(circuit, nodes=twice), "nodes[1]: L1.H0; expected heads, MLPs and neurons, each once"),
        (replace(circuit, nodes=()), "edges[0].from: L1.H0; expected a node of this circuit"),
        (replace(circuit, n_candidates=-1), "n_candidates: -1; expected at least 0"),
        (replace(circuit, level="nodes"), "level: 'nodes'; expected one of ('node', 'neuron', 'edge')"),
        (replace(patch_map, metric={"by": {3: 1}}), "metric.by is a dict; expected a number, text, None, or lists"),
        (replace(patch_map, changes=None), "changes: None; expected a tensor"),
    ]
    for result, reason in odd:
        for name in ("out", "out.json"):
            with pytest.raises(MechsafetyError) as caught:
                result.save(tmp_path / name)
            assert str(caught.value).startswith(reason), (type(result), name)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_the_command_says_which_file_to_load(tmp_path):
    """It holds a circuit.json in place of a result.json."""
    example(RefusalCircuit).save(tmp_path / "circuit.json")
    with pytest.raises(
        MechsafetyError,
        match=r"no such file: .*result.json; expected what RefusalCircuit.save wrote; "
        r"RefusalCircuit.load\('.*circuit.json'\) reads the file there",
    ):
        RefusalCircuit.load(tmp_path)


def kinds_of_results() -> list[type[Result]]:
    """Every class of result that the package has."""
    for entry in pkgutil.walk_packages(ms.__path__, "mechsafety."):
        importlib.import_module(entry.name)
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("mechsafety.")]
    classes = {id(value): value for module in modules for value in vars(module).values() if isinstance(value, type)}
    found = (kind for kind in classes.values() if issubclass(kind, Result) and kind is not Result)
    return sorted(found, key=lambda kind: kind.__name__)


def test_every_kind_of_result_is_saved_and_loaded(tmp_path):
    """Each in both ways; and again where nothing but its own module was imported."""
    kinds = kinds_of_results()
    known = {"PathMap", "TruthScore", "AlignmentTax", "GuardReport", "Draw", "EdgeCircuit", "RefusalCircuit"}
    assert len(kinds) >= 25 and known <= {kind.__name__ for kind in kinds}
    for kind in kinds:
        made = example(kind)
        first, second = made.save(tmp_path / kind.__name__), made.save(tmp_path / f"{kind.__name__}.json")
        again, single = kind.load(first), kind.load(second)
        assert alike(again, made), kind
        # circuit.json does not hold the details
        assert alike(single, made.without_details() if kind is RefusalCircuit else made), kind
        assert listing(again.save(tmp_path / "again" / kind.__name__)) == listing(first), kind
        assert single.to_json() == second.read_text(), kind
    with_metric = [kind.__name__ for kind in kinds if "metric" in {field.name for field in dataclasses.fields(kind)}]
    assert len(with_metric) >= 12 and {"Draw", "PatchMap", "RefusalCircuit"} <= set(with_metric)
    code = """if True:
        import importlib, sys
        for place in sys.argv[2:]:
            module, _, name = place.rpartition(".")
            getattr(importlib.import_module(module), name).load(f"{sys.argv[1]}/{name}")
            print(name)
    """
    places = [f"{kind.__module__}.{kind.__name__}" for kind in kinds]
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path), *places], capture_output=True, text=True)
    assert (ran.stderr, ran.stdout.split()) == ("", [kind.__name__ for kind in kinds])


# --- what is refused at loading ---------------------------------------------------------------------------------------


def refused(path: Path, kind: type[Result] = PatchMap) -> str:
    with pytest.raises(MechsafetyError) as caught:
        kind.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}: ")


def test_not_a_result(tmp_path):
    assert refused(tmp_path) == f"no such file: {tmp_path / 'result.json'}; expected what PatchMap.save wrote"
    assert refused(tmp_path / "none") == f"no such file: {tmp_path / 'none'}; expected what PatchMap.save wrote"


def test_wrong_type(attribution, tmp_path):
    path = attribution.save(tmp_path / "out")
    assert refused(path) == "a NodeAttribution; expected a PatchMap; NodeAttribution.load reads it"
    assert refused(path, Result) == "a NodeAttribution; expected a Result; NodeAttribution.load reads it"


def edit(path: Path, change) -> None:
    source = path / "result.json" if path.is_dir() else path
    data = json.loads(source.read_text(encoding="utf-8"))
    change(data)
    source.write_text(json.dumps(data), encoding="utf-8")


@pytest.mark.parametrize(("step", "hint"), [(1, "pip install --upgrade mechsafety"), (-1, "make the result again")])
def test_another_version(patch_map, tmp_path, step, hint):
    path = patch_map.save(tmp_path / "out")
    edit(path, lambda data: data.update(version=FORMAT_VERSION + step))
    assert refused(path) == f"result format version {FORMAT_VERSION + step}; expected {FORMAT_VERSION}; {hint}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"format": ', "malformed JSON (Expecting value: line 1 column 12 (char 11)); expected a result.json"),
        ("[1]", 'not a result file; expected "format": "mechsafety.result"'),
        (
            '{"format": "mechsafety.circuit", "version": 1}',
            'not a result file; expected "format": "mechsafety.result"',
        ),
        ("", "malformed JSON (Expecting value: line 1 column 1 (char 0)); expected a result.json"),
        (
            '{"format": "mechsafety.result", "version": "3"}',
            "result format version '3'; expected 3; make the result again",
        ),
        (
            '{"format": "mechsafety.result", "version": 3}',
            "a None; expected a PatchMap; None.load reads it",
        ),
        ('{"format": "mechsafety.result", "version": 3, "type": "PatchMap"}', "None; expected an object"),
    ],
)
def test_other_json_in_its_place(patch_map, tmp_path, text, reason):
    path = patch_map.save(tmp_path / "out")
    (path / "result.json").write_text(text, encoding="utf-8")
    assert refused(path) == reason


def put(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(data):
        for key in keys:
            data = data[key]
        data[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (put("colour", "red"), "unknown field 'colour'; expected the fields of PatchMap"),
        (put("changes", 3), "changes: 3; expected a tensor"),
        (put("changes", {"tensor": "other"}), "changes: no tensor 'other'; expected it beside the JSON"),
        (put("changes", {"tensor": ["changes"]}), "changes: {'tensor': ['changes']}; expected a tensor"),
        (put("direction", 3), "direction: 3; expected text"),
        (put("nodes", 1, "layer", "x"), "nodes[1].layer: 'x'; expected a whole number"),
        (put("nodes", 1, "index", 2), "nodes[1]: a node of kind 'mlp' with layer 1 and index 2"),
        (put("nodes", 1, "type", "Edge"), "nodes[1].type: 'Edge'; expected one of ('Node', 'Site')"),
        (
            put("nodes", 1, {"type": "Site", "kind": "q", "layer": 0, "at": 1}),
            "nodes[1]: unknown field 'at'; expected the fields of Site",
        ),
        (put("nodes", 1, {"type": "Site", "kind": "p", "layer": 0}), "nodes[1].kind: 'p'; expected one of ("),
        (put("nodes", 1, []), "nodes[1]: []; expected an object"),
        (put("row_positions", [1, 2.5]), "row_positions[1]: 2.5; expected a whole number"),
        (put("provenance", "seed", True), "provenance.seed: True; expected a whole number"),
        (put("provenance", "versions", "a", None), "provenance.versions.a: None; expected text"),
        (put("provenance", {}), "provenance: field 'device' is missing; expected the fields of Provenance"),
    ],
)
def test_a_wrong_field_is_named_by_its_place(patch_map, tmp_path, change, reason):
    for path in (patch_map.save(tmp_path / "out"), patch_map.save(tmp_path / "out.json")):
        edit(path, lambda data: change(data["result"]))
        assert refused(path).startswith(reason)


def test_damaged_parts_are_one_line(patch_map, tmp_path):
    path, single = patch_map.save(tmp_path / "out"), patch_map.save(tmp_path / "out.json")
    (path / "tensors.safetensors").unlink()
    assert refused(path) == "changes: no tensor 'changes'; expected it beside the JSON"
    patch_map.save(path)
    (path / "tensors.safetensors").write_bytes(b"nonsense")
    assert refused(path).startswith("damaged tensors (")
    for text in ("nonsense!", 3):
        edit(single, lambda data, text=text: data.update(tensors=text))
        assert refused(single) == "tensors: no base64 text; expected safetensors bytes as such"
    (path / "result.json").write_bytes(b'{"result": "\xff"}')
    assert refused(path) == f"{path / 'result.json'}: not UTF-8 text; expected what PatchMap.save wrote"


# --- nothing is lost, nothing half-written ----------------------------------------------------------------------------


def test_a_strangers_folder_is_left_alone(patch_map, tmp_path):
    path = tmp_path / "thesis"
    path.mkdir()
    (path / "chapter1.tex").write_text("years of work")
    before = listing(tmp_path)
    with pytest.raises(MechsafetyError) as caught:
        patch_map.save(path)
    assert str(caught.value) == (
        "the output folder 'thesis' holds something else (chapter1.tex); "
        "expected a new or empty folder, or one with an earlier result; choose another folder"
    )
    assert listing(tmp_path) == before


def test_a_file_is_no_folder(patch_map, tmp_path):
    path = tmp_path / "notes"
    path.write_text("mine")
    with pytest.raises(MechsafetyError) as caught:
        patch_map.save(path)
    assert str(caught.value) == "'notes' is a file; expected a folder to write into; choose another name"
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", ["map.png", "map.SVG", "map.pdf", "map.html", "map.csv"])
def test_a_picture_is_no_place_for_a_result(patch_map, name, tmp_path):
    with pytest.raises(MechsafetyError, match=r"^a result cannot be saved as 'map\.\w+'; expected a folder, or a file"):
        patch_map.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_an_earlier_result_is_replaced(patch_map, attribution, tmp_path):
    path = tmp_path / "out"
    patch_map.save(path)
    attribution.save(path)
    assert torch.equal(NodeAttribution.load(path).heads, attribution.heads)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("there_before", [True, False])
def test_saving_that_fails_midway_leaves_everything_as_it_was(patch_map, tmp_path, monkeypatch, there_before):
    path = tmp_path / "out"
    if there_before:
        patch_map.save(path)
    before = listing(tmp_path)

    def full(self, content):
        self.open("wb").write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(MechsafetyError) as caught:
        replace(patch_map, direction="denoising").save(path)
    assert str(caught.value) == (
        f"cannot write '{path}' (No space left on device); expected a place that can be written to"
    )
    monkeypatch.undo()
    assert listing(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if there_before else [])


def test_a_field_that_json_cannot_hold_leaves_nothing(patch_map, tmp_path):
    free = "a number, text, None, or lists and mappings (by text) of them"
    for odd, found in (
        ({"metric": {"name": object()}}, f"metric.name is a object; expected {free}"),
        ({"metric": {"by": {3: 1}}}, f"metric.by is a dict; expected {free}"),
        ({"metric": {"node": [NODE]}}, f"metric.node[0] is a Node; expected {free}"),
        ({"metric": {"scores": torch.ones(2)}}, f"metric.scores is a Tensor; expected {free}"),
    ):
        for name in ("out", "out.json"):
            with pytest.raises(MechsafetyError) as caught:
                replace(patch_map, **odd).save(tmp_path / name)
            assert str(caught.value) == found
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MechsafetyError, match=r"^nodes\[1\] is a Provenance; expected Node or Site, as annotated$"):
        encode(tuple[Node | Site, ...], (NODE, PROVENANCE), "nodes")


def test_numbers_that_are_none_come_back_and_the_file_is_json(tmp_path):
    numbers = (float("nan"), float("inf"), -float("inf"), 0.5)
    path = Made(replace(PROVENANCE, options={"budget": float("inf")}), {}, (numbers,), 0, True).save(tmp_path / "out")
    text = (path / "result.json").read_text(encoding="utf-8")
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    loaded = Made.load(path)
    assert str(loaded.nested) == str((numbers,)) and loaded.provenance.options == {"budget": float("inf")}


# --- provenance -------------------------------------------------------------------------------------------------------


def test_provenance_round_trip_and_unknown_field():
    assert Provenance.from_json(json.loads(json.dumps(PROVENANCE.to_json()))) == PROVENANCE
    with pytest.raises(MechsafetyError) as caught:
        Provenance.from_json({**PROVENANCE.to_json(), "user": "me"})
    assert str(caught.value) == "provenance: unknown field 'user'; expected the fields of Provenance"


def test_versions_are_those_of_the_modules(monkeypatch):
    """Not those of the list of installed packages, which may be of another day."""
    versions = package_versions()
    assert list(versions) == ["mechsafety", "torch", "transformers", "transformer_lens"]
    assert (versions["mechsafety"], versions["torch"]) == (ms.__version__, str(torch.__version__))
    assert re.fullmatch(r"\d+(\.\w+)+", versions["transformer_lens"]), "it has no __version__"
    monkeypatch.setattr(torch, "__version__", "9.9.9+mine")
    assert package_versions() == versions | {"torch": "9.9.9+mine"}
    monkeypatch.setattr(results, "PACKAGES", ("no_such_package",))
    assert package_versions() == {"no_such_package": "not installed"}


def test_versions_without_an_attribute_are_those_beside_the_module(monkeypatch, tmp_path):
    """A package may be installed twice; the version is that of the folder it is imported from."""
    for place, version in (("first", "1.0"), ("second", "2.0")):
        (tmp_path / place / "made_twice").mkdir(parents=True)
        (tmp_path / place / "made_twice" / "__init__.py").write_text("")
        listed = tmp_path / place / f"made_twice-{version}.dist-info"
        listed.mkdir()
        (listed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: made-twice\nVersion: {version}\n")
    monkeypatch.setattr(results, "PACKAGES", ("made_twice",))
    monkeypatch.syspath_prepend(tmp_path / "second")
    importlib.import_module("made_twice")
    monkeypatch.syspath_prepend(tmp_path / "first")
    assert package_versions() == {"made_twice": "2.0"}
    del sys.modules["made_twice"]
