"""The gallery's script on a map of one's own."""

import importlib.util
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.viz import layout_svg

SCRIPT = Path(__file__).parents[2] / "scripts" / "gallery.py"


def test_every_picture_is_named_once_and_drawn(
    small: RefusalCircuit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("gallery", SCRIPT)
    gallery = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gallery)
    shown = RefusalCircuit.load(gallery.DEMO)
    assert shown.provenance.model == "demo" and shown.to_json() == gallery.DEMO.read_text(encoding="utf-8")
    path = small.save(tmp_path / "circuit.json")
    monkeypatch.setattr(gallery, "planted_circuit", lambda level: small)  # `make gallery` maps them
    found = list(gallery.pictures([path]))
    names = [name for name, *_ in found]
    assert len(set(names)) == len(names) and "demo-smollm2-135m-instruct-refusal-adapt-diagram" in names
    for _, text, layout, width in found:
        assert text and layout.nodes
        ElementTree.fromstring(layout_svg(layout, width_mm=width))
    synthetic = [text for name, text, *_ in found if not name.startswith(("demo-", "planted-"))]
    assert all(gallery.NOTE in text for text in synthetic)


def test_committed_pictures_are_listed_and_small() -> None:
    folder = SCRIPT.parents[1] / "docs" / "gallery"
    listed = (folder / "README.md").read_text()
    pictures = [path for path in folder.iterdir() if path.suffix in (".svg", ".png")]
    assert len(pictures) > 20
    assert all(f"({path.name})" in listed and path.stat().st_size < 700_000 for path in pictures)
    assert {f"demo-{kind}.svg" for kind in ("roles", "parts", "folded", "diagram")} <= {path.name for path in pictures}
    every = {path.stem for path in pictures if path.suffix == ".svg"}
    assert all((folder / f"{name}.png").is_file() for name in every)
    assert "are photographs, PNG alone" in listed and "demo.json" in listed
