"""docs/figures.md: its code runs as it stands there, on the demo model's committed map."""

import re
import shutil
from pathlib import Path

import mechsafety as ms

DOCS = Path(__file__).parents[2] / "docs"
BLOCKS = re.findall(r"^```python\n(.*?)^```", (DOCS / "figures.md").read_text(encoding="utf-8"), flags=re.S | re.M)


def test_every_example_runs(tmp_path, monkeypatch, planted, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    shutil.copy(DOCS / "gallery" / "demo.json", tmp_path / "out" / "circuit.json")
    names: dict = {}
    drawing = [block for block in BLOCKS if "model" not in block]
    assert len(BLOCKS) == 7 and len(drawing) == 6
    for block in drawing:
        exec(block, names)
    said = capsys.readouterr().out
    assert "of 58 nodes are drawn one by one" in said and r"95 \% interval" in said and r"\[0.44, 1.15\]" in said
    assert "23 of 58 nodes one by one" in "".join(BLOCKS), "the page's comment"
    assert {path.name for path in tmp_path.iterdir()} == {
        "out", "circuit.html", "circuit.pdf", "circuit.png", "circuit.tex", "column.pdf", "page.pdf",
        "panels.pdf", "german.pdf", "roles.pdf",
    }  # fmt: skip
    model, pairs = planted
    metric = ms.RefusalLogOdds.of(model, ["sorry"], ["sure"])
    options = ms.MapOptions(limit=8, n_random=2, n_added=2, n_resamples=1, n_backup_parts=0)
    circuit = ms.map_refusal_circuit(model, pairs, metric, options, progress=False)
    names |= {"model": model, "pairs": pairs, "metric": metric, "circuit": circuit, "node": circuit.nodes[0].node}
    exec(next(block for block in BLOCKS if "model" in block), names)
    assert names["before_after"].score
