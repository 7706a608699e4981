"""Results: saved whole or not at all, read back the same, refused with one line."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mechsafety import MechsafetyError, Node, NodeAttribution, PatchMap
from mechsafety.results import FORMAT_VERSION, Provenance, Result, check_output_folder, fresh_folder, package_versions

PROVENANCE = Provenance(
    "tiny", "ab" * 32, "float32", "cpu", "cd" * 32, 3, {"pairs": 4, "where": {"x": None}}, {"a": "1"}
)
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
    assert str(caught.value) == f"{path} has format version 2; expected at most 1; pip install --upgrade mechsafety"


def test_unknown_type(patch_map, tmp_path):
    path = patch_map.save(tmp_path / "out")
    edit(path, lambda data: data["result"].update(type="PathMap9"))
    with pytest.raises(MechsafetyError) as caught:
        PatchMap.load(path)
    assert str(caught.value) == "unknown result type 'PathMap9'; import mechsafety before loading"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"format": ', "malformed JSON (Expecting value)"),
        ("[1]", "no result in it"),
        ('{"format": "mechsafety.circuit", "version": 1}', "no result in it"),
        ("", "malformed JSON (Expecting value)"),
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

    def full(tensors, target):
        Path(target).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        replace(patch_map, direction="denoising").save(path)
    assert listing(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if there_before else [])


def test_a_field_that_json_cannot_hold_leaves_nothing(patch_map, tmp_path):
    odd = replace(patch_map, metric={"name": object()})
    with pytest.raises(TypeError, match="not JSON serializable"):
        odd.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_fresh_folder_appears_whole_on_success(tmp_path):
    path = tmp_path / "a" / "b"
    with fresh_folder(path, names=["done"]) as scratch:
        (scratch / "done").write_text("1")
        assert not path.exists()
        assert scratch.parent == path.parent, "a rename must stay on one file system"
    assert listing(path) == {"done": b"1"}
    assert [p.name for p in path.parent.iterdir()] == ["b"]
    assert path.stat().st_mode & 0o777 == 0o755


def test_fresh_folder_vanishes_on_failure(tmp_path):
    def interrupted():
        with fresh_folder(tmp_path / "out", names=["done"]) as scratch:
            (scratch / "done").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_fresh_folder_checks_again_at_the_end(tmp_path):
    """Someone else may have written there while the analysis ran."""
    path = tmp_path / "out"

    def overtaken():
        with fresh_folder(path, names=["done"]) as scratch:
            (scratch / "done").write_text("1")
            path.mkdir()
            (path / "theirs").write_text("2")

    with pytest.raises(MechsafetyError, match="holds something else"):
        overtaken()
    assert listing(tmp_path) == {"out/theirs": b"2"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_fresh_folder_replaces_the_earlier_one_and_an_empty_one(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    for name in ("first", "second"):
        with fresh_folder(path, names=["done"]) as scratch:
            (scratch / "done").write_text(name)
        assert listing(path) == {"done": name.encode()}


def test_check_output_folder_accepts_new_empty_and_earlier(tmp_path):
    check_output_folder(tmp_path / "new", ["done"])
    check_output_folder(tmp_path, ["done"])
    (tmp_path / "done").write_text("")
    check_output_folder(tmp_path, ["done"])
    with pytest.raises(MechsafetyError, match="holds something else"):
        check_output_folder(tmp_path, ["other"])


def test_a_users_own_file_is_never_lost(tmp_path):
    path = tmp_path / "out"
    with fresh_folder(path, names=["done"]) as scratch:
        (scratch / "done").write_text("1")
    (path / "my-notes.md").write_text("mine")
    with pytest.raises(MechsafetyError, match=r"holds something else \(my-notes.md\)"):
        fresh_folder(path, names=["done"])
    assert listing(path) == {"done": b"1", "my-notes.md": b"mine"}


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
