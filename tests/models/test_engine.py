"""The engine's shortcuts are exact: every number is that of a whole forward without any of them."""

import math

import pytest
import torch
from reference import hook_count, record, whole_logits
from whole_forwards import patched_whole

import mechsafety as ms
from mechsafety.models.engine import base_run, check_engine, expand_rows, max_variants, run_from, split_rows
from mechsafety.nodes import Node
from mechsafety.patching.masks import Patch, patched_logits
from mechsafety.sites import Site, SiteKind

KEEP = (SiteKind.Z, SiteKind.MLP_OUT, SiteKind.NEURONS)
STARTS = ("zero", "middle", "difference")


def start_of(tokens, name):
    return {"zero": 0, "middle": tokens.start // 2, "difference": tokens.start}[name]


@pytest.mark.parametrize("start", STARTS)
def test_running_on_from_every_layer_is_the_whole_forward(any_model, pairs, start):
    tokens = any_model.tokenize_pairs(pairs)
    whole = whole_logits(any_model, tokens.harmful)
    base = base_run(any_model, tokens.harmful, start_of(tokens, start))
    torch.testing.assert_close(base.logits, whole, atol=1e-5, rtol=1e-5)
    for layer in range(any_model.n_layers + 1):
        with torch.no_grad():
            again = run_from(any_model, base, layer, base.resid[layer])
        torch.testing.assert_close(again, whole, atol=1e-5, rtol=1e-5, msg=lambda m, layer=layer: f"layer {layer}: {m}")


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "phi3"])
def test_float64_to_ten_digits(kind, make_hf_model, make_tokenizer, pairs):
    model = ms.load_model((make_hf_model(kind).double(), make_tokenizer()))
    tokens = model.tokenize_pairs(pairs)
    with torch.no_grad():
        whole = model.backend.logits(tokens.harmful, 1)[:, -1]
    base = base_run(model, tokens.harmful, tokens.start)
    for layer in range(model.n_layers):
        with torch.no_grad():
            # the last block's output, because logits come back in float32
            final = run_from(model, base, layer, base.resid[layer], stop=model.n_layers)
            again = model.bridge.unembed(model.bridge.ln_final(final[:, -1]))
        assert final.dtype == torch.float64
        torch.testing.assert_close(again, whole, atol=1e-10, rtol=1e-10)


def test_stored_run_holds_what_a_whole_forward_computes(any_model, ragged):
    tokens = any_model.tokenize_pairs(ragged)
    base = base_run(any_model, tokens.harmful, tokens.start, KEEP)
    names = {SiteKind.Z: "attn.hook_z", SiteKind.MLP_OUT: "hook_mlp_out", SiteKind.NEURONS: "mlp.hook_post"}
    real = tokens.harmful.mask[:, tokens.start :]
    for kind, name in names.items():
        for layer in range(any_model.n_layers):
            full = record(any_model, tokens.harmful, [f"blocks.{layer}.{name}"])[f"blocks.{layer}.{name}"]
            torch.testing.assert_close(
                base.acts[kind][layer][real], full[:, tokens.start :][real], atol=1e-4, rtol=1e-4
            )
    assert base.n_pos == tokens.harmful.ids.shape[1] - tokens.start and len(base) == 3


EDITS = {
    "head": [Node("head", 1, 2)],
    "first head": [Node("head", 0, 0)],
    "mlp": [Node("mlp", 1)],
    "neurons": [Node("neuron", 2, 5), Node("neuron", 2, 7)],
    "mixed": [Node("head", 0, 1), Node("mlp", 0), Node("neuron", 1, 3), Node("head", 2, 3), Node("head", 2, 0)],
}


@pytest.mark.parametrize("start", STARTS)
def test_edits_equal_hooks_on_a_whole_forward(any_model, pairs, start):
    tokens = any_model.tokenize_pairs(pairs)
    first = start_of(tokens, start)
    base, source = (base_run(any_model, side, first, KEEP) for side in (tokens.harmful, tokens.harmless))
    found = patched_logits(any_model, base, source.acts, Patch.of(any_model, list(EDITS.values())))
    for row, (name, nodes) in enumerate(EDITS.items()):
        slow = patched_whole(any_model, tokens.harmful, tokens.harmless, nodes)
        assert float((slow - base.logits).abs().max()) > 1e-4, f"{name}: the edit must matter"
        torch.testing.assert_close(found[row], slow, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_rows_that_are_padding_before_the_first_difference(any_model, ragged):
    tokens = any_model.tokenize_pairs(ragged)
    assert tokens.start == 2 and not bool(tokens.harmful.mask[1, : tokens.start + 3].any())
    base, source = (base_run(any_model, side, tokens.start, KEEP) for side in (tokens.harmful, tokens.harmless))
    torch.testing.assert_close(base.logits, whole_logits(any_model, tokens.harmful), atol=1e-5, rtol=1e-5)
    found = patched_logits(any_model, base, source.acts, Patch.of(any_model, [EDITS["mixed"]]))[0]
    slow = patched_whole(any_model, tokens.harmful, tokens.harmless, EDITS["mixed"])
    torch.testing.assert_close(found, slow, atol=1e-5, rtol=1e-5)


def test_many_variants_equal_one_at_a_time_in_any_batch_size(any_model, pairs):
    tokens = any_model.tokenize_pairs(pairs)
    base, source = (base_run(any_model, side, tokens.start, KEEP) for side in (tokens.harmful, tokens.harmless))
    patch = Patch.of(any_model, list(EDITS.values()))
    together = patched_logits(any_model, base, source.acts, patch)
    alone = [patched_logits(any_model, base, source.acts, patch.rows(slice(k, k + 1))) for k in range(len(patch))]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    for variants in (1, 2, 3):
        limit = variants * len(base) * base.n_pos
        assert max_variants(base, limit) == variants
        small = patched_logits(any_model, base, source.acts, patch, max_batch_tokens=limit)
        torch.testing.assert_close(small, together, atol=1e-5, rtol=1e-5)


def test_a_limit_below_one_run_still_runs(llama, pairs):
    tokens = llama.tokenize_pairs(pairs)
    assert max_variants(base_run(llama, tokens.harmful), 1) == 1


def test_a_single_pair_expands_to_many_variants(any_model, pairs):
    one = ms.PromptPairs(pairs.pairs[:1])  # a batch of one: nothing may mistake another axis of size one for the batch
    tokens = any_model.tokenize_pairs(one)
    base, source = (base_run(any_model, side, tokens.start, KEEP) for side in (tokens.harmful, tokens.harmless))
    found = patched_logits(any_model, base, source.acts, Patch.of(any_model, list(EDITS.values())))
    for row, nodes in enumerate(EDITS.values()):
        slow = patched_whole(any_model, tokens.harmful, tokens.harmless, nodes)
        torch.testing.assert_close(found[row], slow, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("start", STARTS)
def test_gradients_equal_those_of_the_plain_forward(any_model, pairs, start):
    tokens = any_model.tokenize_pairs(pairs)
    first = start_of(tokens, start)
    base = base_run(any_model, tokens.harmful, first)
    for layer in (0, 1):
        resid = base.resid[layer].clone().requires_grad_()
        with torch.enable_grad():
            score = run_from(any_model, base, layer, resid)[:, 20].sum()
        (found,) = torch.autograd.grad(score, resid)

        leaf = []

        def splice(tensor, leaf=leaf):
            leaf.append(tensor.detach().clone().requires_grad_())
            return leaf[0]

        plain = whole_logits(any_model, tokens.harmful, [(f"blocks.{layer}.hook_resid_pre", splice)], grad=True)
        (slow,) = torch.autograd.grad(plain[:, 20].sum(), leaf[0])
        real = tokens.harmful.mask[:, first:]
        size = float(slow.abs().max())
        assert size > 1e-3
        torch.testing.assert_close(found[real] / size, slow[:, first:][real] / size, atol=1e-4, rtol=1e-4)


def test_stop_gives_the_next_blocks_input(any_model, pairs):
    tokens = any_model.tokenize_pairs(pairs)
    base = base_run(any_model, tokens.harmful, tokens.start)
    real = tokens.harmful.mask[:, tokens.start :]
    with torch.no_grad():
        found = run_from(any_model, base, 0, base.resid[0], stop=2)
    torch.testing.assert_close(found[real], base.resid[2][real], atol=1e-5, rtol=1e-5)


def test_runs_do_not_change_the_stored_prefix(any_model, pairs):
    tokens = any_model.tokenize_pairs(pairs)
    base = base_run(any_model, tokens.harmful, tokens.start)
    before = [(keys.clone(), values.clone()) for keys, values in base.prefix]
    assert len(before) == any_model.n_layers and before[0][0].shape[2] == tokens.start
    first = run_from(any_model, base, 1, base.resid[1])
    second = run_from(any_model, base, 1, base.resid[1])
    assert torch.equal(first, second)
    for (keys, values), (old_keys, old_values) in zip(base.prefix, before, strict=True):
        assert torch.equal(keys, old_keys) and torch.equal(values, old_values)


def test_no_hooks_are_left_after_an_exception(any_model, pairs):
    tokens = any_model.tokenize(pairs.harmful)
    base = base_run(any_model, tokens)
    clean = hook_count(any_model)

    def explode(tensor):
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        run_from(any_model, base, 0, base.resid[0], [(Site(SiteKind.Z, 1), explode)])
    assert hook_count(any_model) == clean
    broken = type(tokens)(tokens.ids + 10_000, tokens.mask, tokens.spans)  # no such tokens: the forward itself fails
    with pytest.raises((IndexError, RuntimeError)):
        base_run(any_model, broken)
    assert hook_count(any_model) == clean


def test_rows_group_by_variant_then_prompt():
    rows = torch.arange(3)
    assert expand_rows(rows, 2).tolist() == [0, 1, 2, 0, 1, 2]
    assert split_rows(expand_rows(rows, 2), 2).tolist() == [[0, 1, 2], [0, 1, 2]]


def test_the_load_check_measures_a_wrong_engine(llama, monkeypatch):
    tokens = llama.tokenize(["how do i bake bread"])
    assert check_engine(llama, tokens) < 1e-4
    real = run_from
    monkeypatch.setattr("mechsafety.models.engine.run_from", lambda *args, **options: real(*args, **options) + 0.5)
    assert check_engine(llama, tokens) == pytest.approx(0.5, abs=1e-3)


def test_the_load_check_does_not_lose_a_nan(llama, monkeypatch):
    tokens, real = llama.tokenize(["how do i bake bread"]), run_from
    monkeypatch.setattr(
        "mechsafety.models.engine.run_from", lambda *args, **options: real(*args, **options) * float("nan")
    )
    assert math.isnan(check_engine(llama, tokens))
