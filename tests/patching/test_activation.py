"""Activation patching against whole forwards with plain hooks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import hook_count, random_model, whole_logits
from whole_forwards import patched_whole

import mechsafety as ms
from mechsafety.errors import MechsafetyError
from mechsafety.metrics import adjust_p, sign_flip_p
from mechsafety.nodes import Node, head_and_mlp_nodes
from mechsafety.patching import Patch, activation_patching, masked_logits, pair_runs, patched_logits
from mechsafety.patching.effects import effect_intervals
from mechsafety.patching.masks import SoftMask, patched_scores
from mechsafety.sites import Site, SiteKind

NEURONS = [Node("neuron", 0, 0), Node("neuron", 1, 17), Node("neuron", 2, 47)]


def slow_changes(model, pairs, metric, nodes, direction, positions):
    tokens = model.tokenize_pairs(pairs)
    base, source = (tokens.harmful, tokens.harmless) if direction == "noising" else (tokens.harmless, tokens.harmful)
    where = None
    if positions != "all":
        where = torch.zeros_like(base.mask)
        for row, spans in enumerate(base.spans):
            first, last = spans.instruction
            offset = base.ids.shape[1] - spans.length
            here = slice(first, last) if positions == "instruction" else slice(last, spans.length)
            where[row, offset + here.start : offset + here.stop] = True
    clean = metric(whole_logits(model, base))
    sign = 1 if direction == "noising" else -1
    rows = [sign * (clean - metric(patched_whole(model, base, source, [node], where))) for node in nodes]
    return torch.stack(rows)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("positions", ["all", "instruction", "suffix"])
def test_every_effect_equals_the_slow_reference(any_model, pairs, log_odds, direction, positions):
    nodes = [*head_and_mlp_nodes(any_model.n_layers, any_model.n_heads), *NEURONS]
    result = activation_patching(
        any_model, pairs, log_odds, nodes=nodes, direction=direction, positions=positions, progress=False
    )
    slow = slow_changes(any_model, pairs, log_odds, nodes, direction, positions)
    assert float(slow.abs().max()) > 0.05
    torch.testing.assert_close(result.changes, slow, atol=1e-4, rtol=1e-4)
    tokens = any_model.tokenize_pairs(pairs)
    high, low = (log_odds(whole_logits(any_model, side)) for side in (tokens.harmful, tokens.harmless))
    torch.testing.assert_close(result.harmful, high, atol=1e-4, rtol=1e-4)
    assert result.gap == pytest.approx(float((high - low).mean()), abs=1e-4)
    torch.testing.assert_close(result.effects, slow.mean(1) / (high - low).mean(), atol=1e-3, rtol=1e-3)
    assert result.nodes == tuple(nodes) and (result.direction, result.positions) == (direction, positions)


def test_very_different_lengths(any_model, ragged, log_odds):
    nodes = [Node("head", 0, 1), Node("mlp", 1), Node("head", 2, 3)]
    for positions in ("all", "instruction"):
        result = activation_patching(any_model, ragged, log_odds, nodes=nodes, positions=positions, progress=False)
        slow = slow_changes(any_model, ragged, log_odds, nodes, "noising", positions)
        torch.testing.assert_close(result.changes, slow, atol=1e-4, rtol=1e-4)


def test_patching_everything_gives_the_other_run(any_model, pairs):
    runs = pair_runs(any_model, pairs, extra=[SiteKind.NEURONS])
    everything = head_and_mlp_nodes(any_model.n_layers, any_model.n_heads)
    for base, source in ((runs.harmful, runs.harmless), (runs.harmless, runs.harmful)):
        out = patched_logits(any_model, base, source.acts, Patch.of(any_model, [everything]))[0]
        # the token embedding is no node, but at the last column both prompts have the same token
        torch.testing.assert_close(out, source.logits, atol=1e-4, rtol=1e-4)


def test_patching_nothing_changes_nothing(any_model, pairs):
    runs = pair_runs(any_model, pairs)
    out = patched_logits(any_model, runs.harmful, runs.harmless.acts, Patch.of(any_model, [[]]))[0]
    torch.testing.assert_close(out, runs.harmful.logits, atol=1e-5, rtol=1e-5)


def test_instruction_and_suffix_together_are_everything(llama, pairs, log_odds):
    """The two masks do not overlap and cover all columns that can differ."""
    runs = pair_runs(llama, pairs)
    patch = Patch.of(llama, [[node] for node in head_and_mlp_nodes(3, 4)])
    masks = [runs.harmful.tokens.span_mask(span)[:, runs.start :] for span in ("instruction", "suffix")]
    assert not bool((masks[0] & masks[1]).any())
    either = patched_scores(llama, runs.harmful, runs.harmless.acts, patch, log_odds, positions=masks[0] | masks[1])
    every = patched_scores(llama, runs.harmful, runs.harmless.acts, patch, log_odds)
    torch.testing.assert_close(either, every, atol=1e-5, rtol=1e-5)
    only = [patched_scores(llama, runs.harmful, runs.harmless.acts, patch, log_odds, positions=mask) for mask in masks]
    assert float((only[0] - every).abs().max()) > 1e-3 and float((only[1] - every).abs().max()) > 1e-3


SUBSETS = st.lists(
    st.one_of(
        st.builds(lambda layer, head: Node("head", layer, head), st.integers(0, 2), st.integers(0, 3)),
        st.builds(lambda layer: Node("mlp", layer), st.integers(0, 2)),
        st.builds(lambda layer, index: Node("neuron", layer, index), st.integers(0, 2), st.integers(0, 47)),
    ),
    min_size=1,
    max_size=8,
    unique=True,
)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["llama", "gpt2", "gpt_neox"]),
    seed=st.integers(0, 99),
    kv_heads=st.sampled_from([1, 2, 4]),
    variants=st.lists(SUBSETS, min_size=1, max_size=3),
    noising=st.booleans(),
)
def test_any_node_sets_equal_the_slow_reference(
    make_hf_model, make_tokenizer, ragged, kind, seed, kv_heads, variants, noising
):
    model = ms.load_model((random_model(kind, seed, kv_heads, make_hf_model), make_tokenizer()))
    runs = pair_runs(model, ragged, extra=[SiteKind.NEURONS])
    base, source = (runs.harmful, runs.harmless) if noising else (runs.harmless, runs.harmful)
    found = patched_logits(model, base, source.acts, Patch.of(model, variants))
    for row, nodes in enumerate(variants):
        # a patched MLP output hides its layer's neurons, in the reference as well as here
        slow = patched_whole(model, base.tokens, source.tokens, nodes)
        torch.testing.assert_close(found[row], slow, atol=1e-4, rtol=1e-4)


def test_soft_masks_blend(any_model, pairs):
    runs = pair_runs(any_model, pairs, extra=[SiteKind.NEURONS])
    layers, heads = any_model.n_layers, any_model.n_heads
    ends = {0.0: runs.harmless.logits, 1.0: runs.harmful.logits}
    for alpha, expected in ends.items():
        mask = SoftMask(torch.full((layers, heads), alpha), torch.full((layers,), alpha))
        with torch.no_grad():
            out = masked_logits(any_model, runs.harmful, runs.harmless.acts, mask)
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    # one head fully off is a hard patch of it
    off = torch.ones(layers, heads)
    off[1, 2] = 0.0
    with torch.no_grad():
        out = masked_logits(any_model, runs.harmful, runs.harmless.acts, SoftMask(off, torch.ones(layers)))
    hard = patched_logits(any_model, runs.harmful, runs.harmless.acts, Patch.of(any_model, [[Node("head", 1, 2)]]))[0]
    torch.testing.assert_close(out, hard, atol=1e-5, rtol=1e-5)


def test_order_of_nodes_does_not_matter(llama, pairs, log_odds):
    nodes = list(head_and_mlp_nodes(3, 4))
    forward = activation_patching(llama, pairs, log_odds, nodes=nodes, progress=False)
    backward = activation_patching(llama, pairs, log_odds, nodes=nodes[::-1], progress=False)
    torch.testing.assert_close(forward.changes, backward.changes.flip(0), atol=1e-5, rtol=1e-5)
    assert backward.nodes == tuple(nodes[::-1])


@pytest.mark.parametrize("positions", ["all", "instruction", "suffix"])
def test_prompts_in_batches_are_prompts_at_once(llama, ragged, log_odds, monkeypatch, positions):
    nodes = [*head_and_mlp_nodes(3, 4), Node("neuron", 1, 17), Site(SiteKind.PATTERN, 1, 2)]
    whole = activation_patching(llama, ragged, log_odds, nodes=nodes, positions=positions, progress=False)
    monkeypatch.setattr("mechsafety.patching.activation.BATCH_TOKENS", 1)
    single = activation_patching(llama, ragged, log_odds, nodes=nodes, positions=positions, progress=False)
    torch.testing.assert_close(single.changes, whole.changes, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(single.harmful, whole.harmful, atol=1e-4, rtol=1e-4)
    assert single.provenance.options == whole.provenance.options and float(whole.changes.abs().max()) > 0.05


def test_statistics(llama, pairs, log_odds):
    result = activation_patching(llama, pairs, log_odds, progress=False)
    assert len(result.nodes) == 15 and result.changes.shape == (15, 4)
    again = activation_patching(llama, pairs, log_odds, progress=False)
    assert result.intervals(seed=3) == again.intervals(seed=3) and result.p_values(3) == again.p_values(3)
    gaps = result.harmful - result.harmless
    assert result.intervals() == effect_intervals(result.changes, gaps)
    assert (-math.inf, math.inf) in result.intervals(), "four pairs whose gap may be 0 bound no share of it"
    rows = result.changes.double().numpy()
    assert result.p_values() == pytest.approx(list(adjust_p(sign_flip_p(rows))))
    for effect, (low, high) in zip(result.effects.tolist(), result.intervals(), strict=True):
        assert low <= effect + 1e-6 and effect - 1e-6 <= high
    assert all(p + 1e-9 >= 2 / 16 and p <= 1 for p in result.p_values())  # 16 sign patterns, two of them extreme
    frame = result.to_dataframe()
    assert list(frame.node) == [str(node) for node in result.nodes]
    np.testing.assert_allclose(frame.effect, result.effects, rtol=1e-6)
    assert result.provenance.options == {
        "direction": "noising",
        "positions": "all",
        "source": "other",
        "seed": 0,
        "pairs": 4,
    }
    assert len(result.plot().data[0].x) > 0
    assert repr(result) == "PatchMap(15 rows x 4 pairs, noising, all)"


def test_saved_and_loaded(llama, pairs, log_odds, tmp_path):
    result = activation_patching(llama, pairs, log_odds, nodes=[Node("head", 0, 1), Node("mlp", 2)], progress=False)
    back = ms.patching.PatchMap.load(result.save(tmp_path / "map"))
    assert back.nodes == result.nodes and torch.equal(back.changes, result.changes)
    assert back.provenance == result.provenance


ERRORS = [
    ({"direction": "sideways"}, r"direction='sideways'; expected one of \('noising', 'denoising'\)"),
    ({"positions": "tail"}, "no span is called 'tail'; expected one of"),
    (
        {"nodes": [Node("head", 3, 0)]},
        r"L3\.H0 does not exist in \w+; expected layers 0 to 2 and heads 0 to 3; the nearest is L2\.H0",
    ),
    ({"nodes": [Node("head", 0, 4)]}, r"L0\.H4 does not exist"),
    ({"nodes": [Node("neuron", 0, 48)]}, r"L0\.N48 does not exist"),
    ({"nodes": [Node("mlp", -1)]}, r"L-1\.MLP does not exist"),
    ({"nodes": [Node("embed")]}, "embed cannot be patched; expected heads, MLPs, neurons or sites"),
    ({"nodes": [Node("logits")]}, "logits cannot be patched"),
]


@pytest.mark.parametrize(("options", "message"), ERRORS)
def test_errors(llama, pairs, log_odds, options, message):
    clean = hook_count(llama)
    with pytest.raises(MechsafetyError, match=message):
        activation_patching(llama, pairs, log_odds, progress=False, **options)
    assert hook_count(llama) == clean


def test_neurons_without_stored_neurons(llama, pairs, log_odds):
    runs = pair_runs(llama, pairs)
    with pytest.raises(
        MechsafetyError, match=r"these runs hold no neurons; use pair_runs\(model, pairs, extra=\[SiteKind.NEURONS\]\)"
    ):
        activation_patching(llama, runs, log_odds, nodes=[Node("neuron", 0, 1)], progress=False)


def test_no_nodes(llama, pairs, log_odds):
    with pytest.raises(MechsafetyError, match="no nodes to patch; expected at least one"):
        activation_patching(llama, pairs, log_odds, nodes=[], progress=False)


def test_pairs_that_do_not_align(llama, log_odds):
    crooked = ms.PromptPairs.from_lists(["make a bomb"], ["make a big cake"])
    with pytest.raises(MechsafetyError, match=r"^0 of 1 pairs of lists align under the tokenizer of LlamaForC"):
        activation_patching(llama, crooked, log_odds, progress=False)


def test_saved_in_one_process_loaded_in_another(llama, pairs, log_odds, tmp_path):
    """What a result is made of is known to a process that has saved none."""
    import subprocess
    import sys

    targets = [Node("head", 0, 1), Site(SiteKind.Q, 1, 2)]
    result = activation_patching(llama, pairs, log_odds, nodes=targets, progress=False)
    result.save(tmp_path / "map")
    code = (
        "import sys, mechsafety as ms; r = ms.patching.PatchMap.load(sys.argv[1]);"
        "assert [str(n) for n in r.nodes] == ['L0.H1', 'L1.q.2'], r.nodes;"
        "assert r.nodes[1].kind is ms.sites.SiteKind.Q"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "map")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_single_node_needs_no_list(llama, pairs, log_odds):
    given = [ms.activation_patching(llama, pairs, log_odds, nodes=one) for one in ("L1.H2", ["L1.H2"])]
    assert given[0].nodes == given[1].nodes and torch.equal(given[0].changes, given[1].changes)


@pytest.mark.unchecked
def test_a_bare_position_is_refused(llama, pairs, log_odds):
    with pytest.raises(ms.MechsafetyError, match=r"^positions=-1; expected a span, 'each', or positions from the end"):
        ms.activation_patching(llama, pairs, log_odds, positions=-1)
