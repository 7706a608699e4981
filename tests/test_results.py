"""Results: saved whole or not at all, read back the same, refused with one line."""

import dataclasses
import errno
import json
import math
import subprocess
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import jaxtyping
import pytest
import torch

import mechsafety as ms
from mechsafety import Edge, MechsafetyError, Node, RefusalCircuit
from mechsafety.attribution import NodeAttribution
from mechsafety.patching import PatchMap
from mechsafety.results import FORMAT_VERSION, NO_RESULTS, Provenance, Result, _import_rooms, package_versions
from mechsafety.sites import Site

PROVENANCE = Provenance(
    "tiny", "ab" * 32, "float32", "cpu", "cd" * 32, 3, {"pairs": 4, "where": {"x": None}}, {"a": "1"}
)
NODE = Node("head", 1, 0)
METRIC = {"name": "refusal_log_odds", "refusal_tokens": ("I", " can't ≥ é"), "comply_tokens": ()}


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
    loaded = Result.load(made.save(tmp_path / "out"))
    assert type(loaded) is Made
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
    assert (data["format"], data["version"], data["result"]["type"]) == (
        "mechsafety.result",
        FORMAT_VERSION,
        "PatchMap",
    )
    assert data["result"]["fields"]["changes"] == {"tensor": "changes"}


def example(kind: object) -> object:
    """A value of an annotated type; the last part of a union."""
    parts = [part for part in get_args(kind) if part is not type(None)]
    if kind in (Node, Edge, Site):
        return {Node: NODE, Edge: Edge(NODE, Node("logits"), "resid"), Site: Site("resid_pre", 1)}[kind]
    if kind is ms.PromptPairs:  # two prompts that differ
        return ms.PromptPairs.from_lists(["harmful"], ["harmless"])
    if kind is ms.RefusalLogOdds:  # tokens of one set are in no other
        return ms.RefusalLogOdds((3,), ("no",), opener_ids=(4, 5), opener="I'm")
    if get_origin(kind) is Literal:
        return parts[0]
    if get_origin(kind) in (Union, types.UnionType):
        return example(parts[-1])
    if get_origin(kind) is tuple:
        return (example(parts[0]),) if parts[-1] is Ellipsis else tuple(map(example, parts))
    if get_origin(kind) in (dict, Mapping):
        return {"a": example(parts[1])}
    if issubclass(kind, jaxtyping.AbstractArray):
        sizes = [int(name) if name.isdigit() else 1 for name in kind.dim_str.split()]
        return torch.ones(sizes, dtype=torch.bool if "bool" in kind.dtypes else torch.float32)
    if dataclasses.is_dataclass(kind):
        return kind(**{field.name: example(field.type) for field in dataclasses.fields(kind)})
    return {str: "text", float: math.nan, int: 3, bool: True, object: None, Any: None}[kind]


def kinds_of_results() -> list[type[Result]]:
    """Every class of result that the package saves to a folder."""
    _import_rooms(ms)
    made = [kind for kind in Result.TYPES.values() if kind.__module__.startswith("mechsafety.")]
    return [kind for kind in made if issubclass(kind, Result) and kind is not RefusalCircuit]


def test_every_kind_of_result_loads_after_a_bare_import(tmp_path):
    """Classes of results are imported when they are used first; loading must find them all by itself."""
    kinds = kinds_of_results()
    assert len(kinds) >= 25 and {"PathMap", "TruthScore", "AlignmentTax", "GuardReport"} <= {k.__name__ for k in kinds}
    # one with parts of other modules comes first, where nothing but what it needs is imported
    for kind in sorted(kinds, key=lambda kind: kind.__name__ != "PathMap"):
        example(kind).save(tmp_path / kind.__name__)
    code = """if True:
        import sys
        from mechsafety.results import Result
        assert "torch" not in sys.modules
        for name in sys.argv[2:]:
            assert type(Result.load(f"{sys.argv[1]}/{name}")).__name__ == name, name
            print(name)
    """
    names = [path.name for path in sorted(tmp_path.iterdir(), key=lambda path: path.name != "PathMap")]
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path), *names], capture_output=True, text=True)
    assert (ran.stderr, ran.stdout.split()) == ("", names)


def test_names_of_result_parts_are_unique():
    """They are stored by name alone."""
    _import_rooms(ms)
    homes: dict[str, set[str]] = {}
    for place, module in list(sys.modules.items()):
        if place.startswith("mechsafety.") and not place.startswith(NO_RESULTS):
            for name, value in vars(module).items():
                if isinstance(value, type) and dataclasses.is_dataclass(value):
                    homes.setdefault(name, set()).add(value.__module__)
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}


# --- what is refused at loading ---------------------------------------------------------------------------------------


def test_not_a_result(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(MechsafetyError) as caught:
            PatchMap.load(path)
        assert str(caught.value) == f"{path} is not a saved result; expected a folder that .save(path) wrote"


def test_wrong_type(attribution, tmp_path):
    path = attribution.save(tmp_path / "out")
    with pytest.raises(MechsafetyError) as caught:
        PatchMap.load(path)
    assert str(caught.value) == f"{path} holds a NodeAttribution; expected PatchMap"


def edit(path: Path, change) -> None:
    source = path / "result.json"
    data = json.loads(source.read_text(encoding="utf-8"))
    change(data)
    source.write_text(json.dumps(data), encoding="utf-8")


def test_newer_version(patch_map, tmp_path):
    path = patch_map.save(tmp_path / "out")
    edit(path, lambda data: data.update(version=FORMAT_VERSION + 1))
    with pytest.raises(MechsafetyError) as caught:
        PatchMap.load(path)
    assert str(caught.value) == f"{path} has format version 3; expected at most 2; pip install --upgrade mechsafety"


def test_unknown_type(patch_map, tmp_path):
    path = patch_map.save(tmp_path / "out")
    edit(path, lambda data: data["result"].update(type="PathMap9"))
    with pytest.raises(MechsafetyError) as caught:
        PatchMap.load(path)
    assert str(caught.value) == (
        "unknown result type 'PathMap9'; expected one of mechsafety's; import the module that defines it"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"format": ', "malformed JSON (Expecting value)"),
        ("[1]", "no result in it"),
        ('{"format": "mechsafety.circuit", "version": 1}', "no result in it"),
        ("", "malformed JSON (Expecting value)"),
        ('{"version": "2", "result": {}}', "format version '2'"),
        ('{"result": {"map": 1}}', "'int' object has no attribute 'items'"),
        ('{"result": {}}', "'type' is missing"),
    ],
)
def test_other_json_in_its_place(patch_map, tmp_path, text, reason):
    path = patch_map.save(tmp_path / "out")
    (path / "result.json").write_text(text, encoding="utf-8")
    with pytest.raises(MechsafetyError) as caught:
        PatchMap.load(path)
    assert str(caught.value) == f"{path} is not a saved result ({reason}); expected a folder that .save(path) wrote"


def test_damaged_parts_are_one_line(patch_map, tmp_path):
    path = patch_map.save(tmp_path / "out")
    edit(path, lambda data: data["result"]["fields"].update(colour="red"))
    with pytest.raises(MechsafetyError, match=r"is not a saved result \(.*unexpected keyword argument 'colour'\)"):
        PatchMap.load(path)
    patch_map.save(path)
    (path / "tensors.safetensors").unlink()
    with pytest.raises(MechsafetyError, match=r"is not a saved result \('changes' is missing\)"):
        PatchMap.load(path)
    patch_map.save(path)
    (path / "tensors.safetensors").write_bytes(b"nonsense")
    with pytest.raises(MechsafetyError, match=r"is not a saved result \("):
        PatchMap.load(path)
    (path / "result.json").write_bytes(b'{"result": "\xff"}')
    with pytest.raises(MechsafetyError, match=r"is not a saved result \(not UTF-8 text\)"):
        PatchMap.load(path)


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
        "expected a new or empty folder, or one with an earlier result and nothing more; choose another folder"
    )
    assert listing(tmp_path) == before


def test_a_file_is_no_folder(patch_map, tmp_path):
    path = tmp_path / "notes"
    path.write_text("mine")
    with pytest.raises(MechsafetyError) as caught:
        patch_map.save(path)
    assert str(caught.value) == "'notes' is a file; expected a folder to write into; choose another name"
    assert path.read_text() == "mine"


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
    for odd, found in (({"name": object()}, "metric.name is a object"), ({"by": {3: 1}}, "metric.by is a dict")):
        with pytest.raises(MechsafetyError) as caught:
            replace(patch_map, metric=odd).save(tmp_path / "out")
        assert str(caught.value) == f"{found}; expected a tensor, number, text, None, or tuples, mappings of them"
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_none_come_back_and_the_file_is_json(tmp_path):
    numbers = (float("nan"), float("inf"), -float("inf"), 0.5)
    path = Made(replace(PROVENANCE, options={"budget": float("inf")}), {}, (numbers,), 0, True).save(tmp_path / "out")
    text = (path / "result.json").read_text(encoding="utf-8")
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    loaded = Made.load(path)
    assert str(loaded.nested) == str((numbers,)) and loaded.provenance.options == {"budget": float("inf")}
    # files of version 1 hold the literals
    (path / "result.json").write_text(
        text.replace('{\n      "float": "nan"\n     }', "NaN").replace('"version": 2', '"version": 1')
    )
    assert "NaN" in (path / "result.json").read_text() and str(Made.load(path).nested) == str((numbers,))


# --- provenance -------------------------------------------------------------------------------------------------------


def test_provenance_round_trip_and_unknown_field():
    assert Provenance.from_json(json.loads(json.dumps(PROVENANCE.to_json()))) == PROVENANCE
    with pytest.raises(MechsafetyError) as caught:
        Provenance.from_json({**PROVENANCE.to_json(), "user": "me"})
    assert str(caught.value).startswith("provenance has the unknown fields ['user']; expected some of ['device', ")


def test_versions_are_those_installed():
    versions = package_versions()
    assert list(versions) == ["mechsafety", "torch", "transformers", "transformer_lens"]
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
