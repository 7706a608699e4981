"""Activation patching of every kind of site against plain hooks on whole forwards, with no shortcut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import random_model

import mechsafety as ms
from mechsafety.patching import activation_patching, pair_runs
from mechsafety.sites import Site, SiteKind

KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern", "neurons")


def slow(model, pairs, metric, site: Site, where, *, swap=False, values=None):
    """Metric of the base run with one site's values replaced at the True columns."""
    base, source = model.tokenize(pairs.harmful), model.tokenize(pairs.harmless)
    if swap:
        base, source = source, base
    plain = Site(site.kind, site.layer)
    new = model.read(source, [plain])[plain] if values is None else values(model.read(source, [plain])[plain])

    def edit(tensor):
        out = tensor.clone()
        for row, column in where.nonzero().tolist():
            if site.kind is SiteKind.PATTERN:
                heads = slice(None) if site.index is None else site.index
                out[row, heads, column] = new[row, heads, column]
            elif site.index is None:
                out[row, column] = new[row, column]
            else:
                out[row, column, site.index] = new[row, column, site.index]
        return out

    if site.kind is SiteKind.RESID_MID:
        # both branches must see the edit: the block's attention output makes up the stream
        before = Site(SiteKind.RESID_PRE, site.layer)
        carrier, stream = Site(SiteKind.ATTN_OUT, site.layer), model.read(base, [before, plain])
        wanted = edit(stream[plain]) - stream[before]
        with model.hooks([(carrier, lambda tensor: torch.where(where[..., None], wanted, tensor))]):
            return metric(model.logits(base))
    with model.hooks([(plain, edit)]):
        return metric(model.logits(base))


def targets(model) -> list[Site]:
    kinds = [kind for kind in KINDS if not (kind == "resid_mid" and model.parallel)]
    whole = [Site(SiteKind(kind), layer) for kind in kinds for layer in (0, 2)]
    parts = [Site(SiteKind(kind), 1, 1) for kind in ("z", "q", "k", "v", "pattern", "neurons")]
    return whole + parts


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_every_site_equals_plain_hooks(any_model, pairs, log_odds, direction):
    sites = targets(any_model)
    swap = direction == "denoising"
    result = activation_patching(any_model, pairs, log_odds, nodes=sites, direction=direction, progress=False)
    real = any_model.tokenize_pairs(pairs).harmful.mask
    before = result.harmless if swap else result.harmful
    for k, site in enumerate(sites):
        expected = slow(any_model, pairs, log_odds, site, real, swap=swap)
        found = before + result.changes[k] if swap else before - result.changes[k]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0, msg=str(site))


def test_each_column_equals_plain_hooks(llama, pairs, log_odds):
    sites = [Site(SiteKind.RESID_PRE, 1), Site(SiteKind.K, 0, 1)]
    result = activation_patching(llama, pairs, log_odds, nodes=sites, positions="each", progress=False)
    tokens = llama.tokenize_pairs(pairs).harmful
    width = tokens.ids.shape[1]
    assert len(result.nodes) == len(result.row_positions) == 2 * (width - llama.tokenize_pairs(pairs).start)
    for k, (site, column) in enumerate(zip(result.nodes, result.row_positions, strict=True)):
        where = torch.zeros_like(tokens.mask)
        where[:, column] = tokens.mask[:, column]
        expected = slow(llama, pairs, log_odds, site, where)
        torch.testing.assert_close(result.harmful - result.changes[k], expected, atol=1e-4, rtol=0)


def test_each_position_as_a_heat_map_with_its_token(llama, pairs, log_odds):
    """Rows are the strongest nodes, in their order; a token is named where all prompts have it."""
    nodes = [ms.Node("mlp", 2), ms.Node("head", 0, 1), ms.Node("mlp", 0)]
    found = activation_patching(llama, pairs, log_odds, nodes=nodes, positions="each", progress=False)
    width = len(found.tokens)
    tokens = llama.tokenize_pairs(pairs).harmful
    for text, at in zip(found.tokens, range(-width, 0), strict=True):
        ids = {int(row[at]) for row, real in zip(tokens.ids, tokens.mask, strict=True) if real[at]}
        assert text == (llama.tokenizer.decode(list(ids)) if len(ids) == 1 else "")
    assert "" in found.tokens and found.tokens[-1]
    figure = found.plot()
    (drawn,) = figure.data
    assert list(drawn.y) == [str(node) for node in nodes] and list(drawn.x) == list(range(-width, 0))
    assert figure.layout.xaxis.ticktext[0].startswith("(differs)<br>-")
    for row in range(3):
        assert list(drawn.z[row]) == pytest.approx(found.effects[row * width : (row + 1) * width].tolist())
    few = found.plot(most=1)
    strongest = int(found.effects.abs().argmax()) // width
    assert list(few.data[0].y) == [str(nodes[strongest])] and "the 1 of 3 with the largest" in few.layout.title.text
    one = activation_patching(llama, ms.PromptPairs(pairs.pairs[:1]), log_odds, positions="each", progress=False)
    assert all(one.tokens) and len(one.plot().data[0].y) == 15


def test_listed_columns_are_patched_together(llama, pairs, log_odds):
    site = Site(SiteKind.RESID_PRE, 1)
    result = activation_patching(llama, pairs, log_odds, nodes=[site], positions=[-1, -2, -3], progress=False)
    where = torch.zeros_like(llama.tokenize_pairs(pairs).harmful.mask)
    where[:, -3:] = True
    expected = slow(llama, pairs, log_odds, site, where)
    torch.testing.assert_close(result.harmful - result.changes[0], expected, atol=1e-4, rtol=0)
    assert result.positions == "-1,-2,-3"


@pytest.mark.parametrize("positions", ["all", "instruction", "prefix", "suffix"])
@pytest.mark.parametrize("kind", ["z", "resid_mid", "pattern", "neurons"])
def test_zero_reaches_the_shared_tokens(llama, ragged, log_odds, kind, positions):
    """Columns before the first difference hold the same values in both prompts, but none of them is zero."""
    site = Site(SiteKind(kind), 1)
    options = {"nodes": [site], "source": "zero", "positions": positions, "progress": False}
    result = activation_patching(llama, ragged, log_odds, **options)
    where = llama.tokenize_pairs(ragged).harmful.span_mask(positions)
    expected = slow(llama, ragged, log_odds, site, where, values=torch.zeros_like)
    torch.testing.assert_close(result.harmful - result.changes[0], expected, atol=1e-4, rtol=0)
    assert float(result.changes.abs().max()) > 1e-3


# pairs 1 and 3, 2 and 4 are of one length; the others' instructions differ before the first difference of any pair
TWO_LENGTHS = ms.PromptPairs.from_lists(
    ["how do i make a bomb", "teach me to steal a car please", "why the bomb is my tea", "help me make a bomb of tea"],
    ["how do i make a cake", "teach me to steal a house please", "why the tea is my tea", "help me make a cake of tea"],
)
SAME_LENGTH = ([0, 2], [1, 3])


def mean_of_same_length(values):
    out = values.clone()
    for rows in SAME_LENGTH:
        out[rows] = values[rows].mean(0, keepdim=True)
    return out


@pytest.mark.parametrize("positions", ["all", "instruction", "suffix"])
@pytest.mark.parametrize("kind", ["z", "resid_mid", "pattern"])
def test_mean_source(llama, log_odds, kind, positions):
    site = Site(SiteKind(kind), 1)
    options = {"nodes": [site], "source": "mean", "positions": positions, "progress": False}
    result = activation_patching(llama, TWO_LENGTHS, log_odds, **options)
    tokens = llama.tokenize_pairs(TWO_LENGTHS)
    where = tokens.harmful.span_mask(positions)
    assert positions == "suffix" or bool(where[:, : tokens.start].any()), "shared tokens are among them"
    expected = slow(llama, TWO_LENGTHS, log_odds, site, where, values=mean_of_same_length)
    torch.testing.assert_close(result.harmful - result.changes[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_resampling_takes_another_pair_of_the_same_length(llama, log_odds, direction):
    for kind in ("z", "resid_mid", "pattern"):
        site, swap = Site(SiteKind(kind), 1), direction == "denoising"
        options = {"nodes": [site], "source": "resample", "direction": direction, "progress": False}
        result = activation_patching(llama, TWO_LENGTHS, log_odds, **options)
        real = llama.tokenize_pairs(TWO_LENGTHS).harmful.mask
        expected = slow(llama, TWO_LENGTHS, log_odds, site, real, swap=swap, values=lambda t: t[[2, 3, 0, 1]])
        found = result.harmless + result.changes[0] if swap else result.harmful - result.changes[0]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_resampling_repeats_by_seed(llama, log_odds):
    words = ["bomb", "car", "poison", "poem", "house", "tea"]
    same = ms.PromptPairs.from_lists([f"make a {word}" for word in words], ["make a cake"] * 6)
    harmless = ms.PromptPairs.from_lists(same.harmless, same.harmful)

    def changes(seed):
        options = {"nodes": [Site(SiteKind.Z, 1)], "source": "resample", "seed": seed, "progress": False}
        return activation_patching(llama, harmless, log_odds, **options).changes

    assert torch.equal(changes(1), changes(1)) and not torch.equal(changes(1), changes(2))


@pytest.mark.parametrize("source", ["mean", "resample"])
def test_pairs_alone_with_their_length(llama, pairs, log_odds, source):
    message = rf"source '{source}' finds no other pair of the same length for pair 1 \(10 tokens\), 2 .*; expected two"
    with pytest.raises(ms.MechsafetyError, match=message):
        activation_patching(llama, pairs, log_odds, nodes=[Site(SiteKind.Z, 1)], source=source, progress=False)


def test_each_column_of_a_mean_begins_at_the_first_token(llama, log_odds):
    site = Site(SiteKind.RESID_PRE, 1)
    options = {"nodes": [site], "source": "mean", "positions": "each", "progress": False}
    result = activation_patching(llama, TWO_LENGTHS, log_odds, **options)
    tokens = llama.tokenize_pairs(TWO_LENGTHS).harmful
    assert result.row_positions == tuple(range(-tokens.ids.shape[1], 0))
    for column, row in ((-1, -1), (-8, -8), (-tokens.ids.shape[1], 0)):
        where = torch.zeros_like(tokens.mask)
        where[:, column] = tokens.mask[:, column]
        expected = slow(llama, TWO_LENGTHS, log_odds, site, where, values=mean_of_same_length)
        torch.testing.assert_close(result.harmful - result.changes[row], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("positions", ["all", "instruction", "each", [-10]])
def test_stored_runs_that_begin_too_late(llama, log_odds, positions):
    site, runs = Site(SiteKind.Z, 1), pair_runs(llama, TWO_LENGTHS)
    options = {"nodes": [site], "source": "zero", "positions": positions, "progress": False}
    message = rf"these runs begin at position {runs.start}, 'zero' at .* replaces earlier ones; use pair_runs"
    with pytest.raises(ms.MechsafetyError, match=message):
        activation_patching(llama, runs, log_odds, **options)
    whole = activation_patching(llama, pair_runs(llama, TWO_LENGTHS, start=0), log_odds, **options)
    again = activation_patching(llama, TWO_LENGTHS, log_odds, **options)
    torch.testing.assert_close(whole.changes, again.changes, atol=1e-5, rtol=0)
    # the last columns are there
    late = activation_patching(llama, runs, log_odds, **options | {"positions": "suffix"})
    expected = activation_patching(llama, TWO_LENGTHS, log_odds, **options | {"positions": "suffix"})
    torch.testing.assert_close(late.changes, expected.changes, atol=1e-4, rtol=0)


VALUES = {
    "other": lambda t: t,
    "mean": mean_of_same_length,
    "resample": lambda t: t[[2, 3, 0, 1]],  # of two, the other one
    "zero": torch.zeros_like,
}
SITES = st.tuples(st.sampled_from(KINDS), st.integers(0, 2), st.none() | st.integers(0, 3))


@settings(max_examples=8)
@given(
    architecture=st.sampled_from(["llama", "gpt2", "gpt_neox"]),
    seed=st.integers(0, 99),
    kv_heads=st.sampled_from([1, 2, 4]),
    drawn=st.lists(SITES, min_size=1, max_size=4, unique=True),
    direction=st.sampled_from(["noising", "denoising"]),
    positions=st.sampled_from(["all", "instruction", "prefix", "suffix", "each"])
    | st.sets(st.integers(-6, -1), min_size=1),
    source=st.sampled_from(sorted(VALUES)),
)
def test_any_patch_equals_the_twin(
    make_hf_model, make_tokenizer, log_odds, architecture, seed, kv_heads, drawn, direction, positions, source
):
    model = ms.load_model((random_model(architecture, seed, kv_heads, make_hf_model), make_tokenizer()))
    tokens, swap = model.tokenize_pairs(TWO_LENGTHS), direction == "denoising"
    parts = dict.fromkeys(("z", "q", "pattern", "neurons"), 4) | dict.fromkeys(("k", "v"), model.n_kv_heads)
    sites = []
    for kind, layer, index in drawn:
        kind = "resid_post" if kind == "resid_mid" and model.parallel else kind
        sites.append(Site(SiteKind(kind), layer, None if index is None or kind not in parts else index % parts[kind]))
    named = positions if isinstance(positions, str) else sorted(positions)
    options = {"direction": direction, "positions": named, "source": source}
    result = activation_patching(model, TWO_LENGTHS, log_odds, nodes=sites, progress=False, **options)
    before, sign = (result.harmless, 1) if swap else (result.harmful, -1)
    columns = result.row_positions or [None] * len(sites)
    assert len(result.nodes) == (len(sites) if named != "each" else len(sites) * len(set(columns)))
    for k in range(0, len(result.nodes), 5 if named == "each" else 1):
        if isinstance(named, list) or named == "each":
            at = [columns[k]] if named == "each" else named
            where = torch.zeros_like(tokens.harmful.mask)
            where[:, at] = tokens.harmful.mask[:, at]
        else:
            where = tokens.harmful.span_mask(named)
        expected = slow(model, TWO_LENGTHS, log_odds, result.nodes[k], where, swap=swap, values=VALUES[source])
        torch.testing.assert_close(before + sign * result.changes[k], expected, atol=1e-4, rtol=1e-4)


def test_resid_mid_reaches_both_branches(llama, pairs, log_odds):
    """Patching the stream after attention everywhere, in the last layer, is patching the whole model."""
    result = activation_patching(llama, pairs, log_odds, nodes=[Site(SiteKind.RESID_MID, 2)], progress=False)
    torch.testing.assert_close(result.harmful - result.changes[0], result.harmless, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "noise"}, "source='noise'; expected one of"),
        ({"nodes": [Site(SiteKind.K, 0, 2)]}, "L0.k.2 does not exist"),
        ({"nodes": [Site(SiteKind.FINAL_NORM_IN)]}, "final.final_norm_in cannot be patched"),
        ({"nodes": [Site(SiteKind.Z, 0)], "positions": [-99]}, r"positions \[-99\]; expected positions from the end"),
    ],
)
def test_errors(llama, pairs, log_odds, options, message):
    with pytest.raises(ms.MechsafetyError, match=message):
        activation_patching(llama, pairs, log_odds, progress=False, **options)


def test_no_stream_between_in_parallel_blocks(shared_model, pairs, log_odds):
    with pytest.raises(ms.MechsafetyError, match="has no residual stream between attention and MLP"):
        activation_patching(
            shared_model("gpt_neox"), pairs, log_odds, nodes=[Site(SiteKind.RESID_MID, 0)], progress=False
        )
