"""README.md: the code of its sections runs in order, on a small model in a folder of one's own."""

import json
import re
from pathlib import Path

from mechsafety import testbed
from mechsafety.monitors import SafetyGuard

TEXT = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SECTIONS = ("Your own model", "A guard before generation", "Steering", "Models whose circuit is known")


def code(section: str) -> list[str]:
    """The Python blocks of a section."""
    body = TEXT.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", body, flags=re.S | re.M)


def test_the_code_of_the_sections_runs_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = testbed.planted()
    folder = Path("path/to/model")
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    rows = [json.dumps({"harmful": pair.harmful, "harmless": pair.harmless}) for pair in made.pairs.sample(36)]
    Path("pairs.jsonl").write_text("\n".join(rows), encoding="utf-8")
    names: dict = {}
    exec("import mechsafety as ms", names)
    for section in SECTIONS:
        blocks = code(section)
        assert blocks, section
        for block in blocks:
            exec(block, names)
    assert names["circuit"].preliminary and len(names["circuit"].nodes) > 0
    replies = names["answer"].replies
    assert replies[0] is None and replies[1].startswith("Sure"), "the unsafe prompt is stopped, and the other answered"
    loaded = SafetyGuard.load("guard", names["model"])
    assert loaded.threshold == names["guard"].threshold
    assert set(names["sweep"].to_dataframe()["strength"]) == {-1.0, 0.0, 1.0}
    assert testbed.score(names["found"], names["built"].truth).found_nodes.f1 == 1.0


def test_the_first_block_is_python_and_samples():
    """It runs on the demo model, which takes minutes; with a sample of the pairs, not hours."""
    (block,) = code("In Python")
    compile(block, "README.md", "exec")
    assert 'PromptPairs.builtin("test").sample(8)' in block
