"""Attention of heads on one prompt: the hooks' own patterns, tables and figures."""

import pytest
import torch

import mechsafety as ms
from mechsafety.attribution import AttentionPatterns
from mechsafety.nodes import Node
from mechsafety.sites import Site

PROMPT = "how do i make a <b>bomb</b>"


@pytest.fixture(scope="module")
def found(llama):
    return llama.attention(PROMPT, ["L2.H1", Node("head", 0, 3)])


def test_patterns_are_those_of_the_hooks(llama, found):
    tokens = llama.tokenize([PROMPT])
    for k, (layer, head) in enumerate([(2, 1), (0, 3)]):
        seen = llama.read(tokens, [Site("pattern", layer)])[Site("pattern", layer)]
        torch.testing.assert_close(found.patterns[k], seen[0, head])
    torch.testing.assert_close(found.patterns.sum(-1), torch.ones(2, len(found.tokens)))
    assert found.tokens == tuple(llama.token_strings(PROMPT)) and found.heads == (
        Node("head", 2, 1),
        Node("head", 0, 3),
    )
    assert repr(found) == f"AttentionPatterns(L2.H1, L0.H3 on {len(found.tokens)} tokens)"


def test_the_table_has_every_pair_once(found):
    table, n = found.to_dataframe(), len(found.tokens)
    assert len(table) == 2 * n * (n + 1) // 2 and (table.key <= table["query"]).all()
    row = table[(table["head"] == "L0.H3") & (table["query"] == 4) & (table.key == 2)].iloc[0]
    assert row.attention == pytest.approx(float(found.patterns[1, 4, 2])) and row.key_token == found.tokens[2]


def test_figures_escape_what_the_prompt_holds(found):
    figure = found.plot("0.3")
    assert figure.layout.title.text == "Attention of L0.H3"
    assert list(figure.data[0].z[3]) == pytest.approx(found.patterns[1, 3].tolist())
    assert list(found.plot().data[0].z[3]) == pytest.approx(found.patterns[0, 3].tolist()), "the first one"
    assert not any("<b>" in text for text in figure.layout.xaxis.ticktext)
    page = found.to_html("heads")
    assert "<b>bomb" not in page and "AttentionHeads" in page and "https://" not in page.split("<script>")[0]
    assert found._repr_html_().startswith("<iframe sandbox=")


def test_it_is_a_result_and_follows_an_opener(llama, found, tmp_path):
    again = AttentionPatterns.load(found.save(tmp_path / "attention.json"))
    assert torch.equal(again.patterns, found.patterns) and again.to_html() == found.to_html()
    opened = llama.reading([20]).attention(PROMPT, "L2.H1")
    assert len(opened.tokens) == len(found.tokens) + 1


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([], "no heads; expected at least one, such as 'L14.H2'"),
        ("M1", "L1.MLP has no attention; expected a head, such as 'L14.H2'"),
        (
            "L1.H9",
            "L1.H9 does not exist in LlamaForCausalLM; expected layers 0 to 2 and heads 0 to 3; the nearest is L1.H3",
        ),
    ],
)
def test_what_has_no_attention(llama, heads, message):
    with pytest.raises(ms.MechsafetyError) as caught:
        llama.attention(PROMPT, heads)
    assert str(caught.value) == message


def test_a_head_that_was_not_kept(found):
    with pytest.raises(ms.MechsafetyError, match=r"^L1\.H1 is not among the heads; expected L2\.H1, L0\.H3$"):
        found.plot("L1.H1")
