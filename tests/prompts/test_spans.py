"""Spans of chat prompts, left padding, and aligned pairs."""

import pytest
import torch

from mechsafety import MechsafetyError, PromptPairs
from mechsafety.prompts import Spans, TokenPairs, Tokens


@pytest.fixture
def tokens() -> Tokens:
    """Two prompts of 3 and 5 tokens."""
    ids = torch.tensor([[0, 0, 2, 7, 4], [2, 3, 8, 9, 4]])
    return Tokens(ids, torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool(), (Spans((1, 2), 3), Spans((2, 4), 5)))


def test_ranges_cover_the_row():
    spans = Spans((3, 5), 9)
    assert [spans.range(name) for name in ("prefix", "instruction", "suffix")] == [(0, 3), (3, 5), (5, 9)]
    with pytest.raises(MechsafetyError) as caught:
        spans.range("system")
    assert str(caught.value) == "no span is called 'system'; expected one of ('prefix', 'instruction', 'suffix')"


def test_span_masks_shift_with_the_padding(tokens):
    assert tokens.span_mask("prefix").int().tolist() == [[0, 0, 1, 0, 0], [1, 1, 0, 0, 0]]
    assert tokens.span_mask("instruction").int().tolist() == [[0, 0, 0, 1, 0], [0, 0, 1, 1, 0]]
    assert tokens.span_mask("suffix").int().tolist() == [[0, 0, 0, 0, 1], [0, 0, 0, 0, 1]]
    parts = sum(tokens.span_mask(name).int() for name in ("prefix", "instruction", "suffix"))
    assert torch.equal(parts, tokens.span_mask("all").int())


def test_positions_count_real_tokens(tokens):
    assert tokens.position_ids.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]


def test_rows_drop_columns_that_are_padding_for_all(tokens):
    assert len(tokens) == 2
    first = tokens.rows(slice(0, 1))
    assert first.ids.tolist() == [[2, 7, 4]]
    assert first.mask.all()
    assert tokens.rows(slice(0, 2)).ids.tolist() == tokens.ids.tolist()


def test_instruction_span_is_the_instruction(llama):
    prompts = ["how do i bake a cake", "poison tea", "why, is the sky blue?"]
    tokens = llama.tokenize(prompts)
    for row, prompt in enumerate(prompts):
        inside = tokens.ids[row][tokens.span_mask("instruction")[row]].tolist()
        assert "".join(llama.tokenizer.decode([token]) for token in inside) == prompt
        suffix = tokens.ids[row][tokens.span_mask("suffix")[row]].tolist()
        assert llama.tokenizer.decode(suffix) == "<end><assistant>"


def test_pairs_start_at_the_first_difference_in_any_pair(llama, pairs):
    both = llama.tokenize_pairs(pairs)
    differs = both.harmful.ids != both.harmless.ids
    assert not differs[:, : both.start].any()
    assert differs[:, both.start].any()
    one = both.rows(slice(2, 3))
    assert one.start == int((one.harmful.ids != one.harmless.ids)[0].nonzero()[0])
    assert len(one) == 1


def test_equal_sides_start_at_the_last_token(tokens):
    assert TokenPairs.of(tokens, tokens).start == 4


def test_pairs_that_do_not_align_show_both_rows(llama):
    pairs = PromptPairs.from_lists(["make a cake", "make a bomb"], ["make a tea", "make a blue cake"], name="mine")
    with pytest.raises(MechsafetyError) as caught:
        llama.tokenize_pairs(pairs)
    assert str(caught.value) == (
        "pair 2 of mine does not align: harmful 3 tokens ['make', ' a', ' bomb'], "
        "harmless 4 tokens ['make', ' a', ' blue', ' cake'], first difference at 2; "
        "expected prompts with as many tokens in the instruction; "
        "change a word, or pair prompts with PromptPairs.matched(harmful, harmless, model.n_tokens)"
    )
