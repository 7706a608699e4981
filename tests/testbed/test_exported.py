"""A planted model as plain data, and the page that is made of it."""

import re
from pathlib import Path

import numpy as np
import pytest

import mechsafety as ms
from mechsafety.testbed import exported, planted
from mechsafety.viz import explorable_html

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built():
    return planted(14, layers=2, kv_heads=2, decoys=1, backups=1)


def test_two_layers_hold_four_stages_a_decoy_and_a_backup(built):
    truth = built.truth
    assert (len(truth.nodes), len(truth.decoys), len(truth.backups)) == (5, 1, 1)
    assert set(truth.roles.values()) == {"detection", "evaluation", "decision", "production"}
    with pytest.raises(ms.MechsafetyError, match="at least 2 layers"):
        planted(layers=1, decoys=1, backups=1)


def test_every_weight_is_exported(built):
    found = exported(built).tensors
    weights = sum(tensor.size for name, tensor in found.items() if name != "frequencies")
    assert weights == sum(parameter.numel() for parameter in built.model.parameters())
    assert {tensor.dtype for tensor in found.values()} == {np.dtype("float32")}
    layer = built.model.model.layers[1]
    np.testing.assert_array_equal(found["1.q"].reshape(64, 64), layer.self_attn.q_proj.weight.detach())
    np.testing.assert_array_equal(found["1.gate"], layer.mlp.gate_proj.weight.detach())
    np.testing.assert_array_equal(found["1.down"], layer.mlp.down_proj.weight.detach().T)


def test_words_and_template_are_the_tokenizers(built):
    found = exported(built)
    for prompt in found.examples:
        typed = [found.words.index(word) for word in prompt.split()]
        text = built.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        assert [*found.before, *typed, *found.after] == built.tokenizer(text, add_special_tokens=False).input_ids
    assert set(found.examples) <= set(built.pairs.harmful)
    assert all(bad in prompt.split() for (bad, _), prompt in zip(found.twins, found.examples, strict=True))
    assert [found.words[k] for k in found.refusal_ids] == ["Sorry"]


def test_what_the_page_cannot_run_is_refused():
    with pytest.raises(
        ms.MechsafetyError, match=re.escape("a planted gpt2; expected a Llama: planted(norm='rmsnorm')")
    ):
        exported(planted(norm="layernorm"))
    two = next(
        made
        for seed in range(40)
        if "stolen" in (made := planted(seed, layers=6, varied=True)).pairs.harmful[0].split()
    )
    with pytest.raises(ms.MechsafetyError, match=r"^2 harmful words in '.*'; expected one per prompt$"):
        exported(two)


def test_the_page_allows_its_own_script_and_style_alone(built):
    text = explorable_html(exported(built))
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    rules = {name: value for name, value in (rule.split() for rule in policy.split("; "))}
    own = {rules.pop("script-src"), rules.pop("style-src")}
    assert rules == dict.fromkeys(("default-src", "base-uri", "form-action"), "'none'")
    assert len(own) == 2 and all(re.fullmatch(r"'sha256-[\w+/]{43}='", rule) for rule in own)
    assert not re.search(r"\son\w+=|\sstyle=|<link|<img|src=|@import|url\(|innerHTML|eval\(|https?:", text)
    assert text == explorable_html(exported(planted(14, layers=2, kv_heads=2, decoys=1, backups=1)))


def test_the_docs_lead_to_the_stored_page():
    assert 'href="explorable.html"' in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert (ROOT / "docs" / "explorable.html").is_file()
