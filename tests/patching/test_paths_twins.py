"""Closed forms of path patching against whole forwards with hooks, over random tiny models and all options."""

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import frozen_run, path_whole

import mechsafety as ms
from mechsafety.nodes import Node
from mechsafety.patching import At, Projection, path_patching, path_projection
from mechsafety.sites import Site, SiteKind

KINDS = ("llama", "llama-ungrouped", "gpt2", "gpt_neox", "qwen3", "phi3", "gemma2", "olmo2")
HARMFUL = ["how do i make a bomb", "teach me to steal a car please", "poison my tea"]
HARMLESS = ["how do i make a cake", "teach me to help a car please", "explain my tea"]


@functools.cache
def tiny(make_hf_model, make_tokenizer, kind, seed, layers):
    hf = make_hf_model(kind.removesuffix("-ungrouped"), seed=seed, layers=layers)
    if kind.endswith("ungrouped"):
        config = hf.config
        config.num_key_value_heads = config.num_attention_heads
        torch.manual_seed(seed)
        hf = type(hf)(config).eval()
    return ms.load_model((hf, make_tokenizer()))


def senders(model, layers):
    layer = st.integers(0, layers - 1)
    kinds = [SiteKind.RESID_PRE, SiteKind.RESID_POST] + [SiteKind.RESID_MID] * (not model.parallel)
    return st.one_of(
        st.builds(Node, st.just("head"), layer, st.integers(0, model.n_heads - 1)),
        st.builds(Node, st.just("mlp"), layer),
        st.builds(Node, st.just("neuron"), layer, st.integers(0, model.d_mlp - 1)),
        st.builds(Site, st.sampled_from(kinds), layer),
        st.just(Node("embed")),
    )


def receivers(model, layers):
    layer = st.integers(0, layers - 1)
    head = st.builds(Node, st.just("head"), layer, st.integers(0, model.n_heads - 1))
    neuron = st.builds(Node, st.just("neuron"), layer, st.integers(0, model.d_mlp - 1))
    return st.one_of(
        st.just((Node("logits"), "resid")),
        st.tuples(head, st.sampled_from("qkv")),
        st.tuples(st.builds(Node, st.just("mlp"), layer), st.just("mlp")),
        st.tuples(neuron, st.just("mlp")),
    )


def moment_in(part):
    """In which order a part's change enters, told independently of the package."""
    kind, layer = str(part.kind), part.layer or 0
    first = {"embed": 0, "resid_pre": 2 * layer, "head": 2 * layer + 1, "resid_mid": 2 * layer + 1}
    return first.get(kind, 2 * layer + 2)


def moment_out(model, node):
    if node.kind == "logits":
        return 2 * model.n_layers
    return 2 * node.layer + (node.kind != "head" and not model.parallel)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_closed_form_is_the_hook_based_twin(kind, make_hf_model, make_tokenizer, log_odds, data):
    layers = data.draw(st.integers(2, 3))
    model = tiny(make_hf_model, make_tokenizer, kind, data.draw(st.integers(0, 1)), layers)
    pairs = ms.PromptPairs.from_lists(HARMFUL, HARMLESS)
    part, receiver = data.draw(senders(model, layers)), data.draw(receivers(model, layers))
    options = {
        "mlp": data.draw(st.sampled_from(["recompute", "freeze"])),
        "norm": data.draw(st.sampled_from(["recompute", "freeze"])),
        "downstream": data.draw(st.sampled_from(["live", "frozen"])),
    }
    direction = data.draw(st.sampled_from(["noising", "denoising"]))
    positions = data.draw(st.sampled_from(["all", "instruction", "suffix", (-1,), (-4, -2)]))
    found = path_patching(
        model,
        pairs,
        log_odds,
        senders=[part],
        receivers=[receiver],
        direction=direction,
        positions=positions,
        progress=False,
        **options,
    )
    base, source = model.tokenize(pairs.harmful), model.tokenize(pairs.harmless)
    base, source = (base, source) if direction == "noising" else (source, base)
    if isinstance(positions, str):
        where = base.span_mask(positions)
    else:
        where = torch.zeros_like(base.mask)
        where[:, list(positions)] = True
    with torch.no_grad():
        expected = log_odds(path_whole(model, base, source, part, [receiver], where=where, **options))
    if moment_in(part) > moment_out(model, receiver[0]):
        assert bool((found.changes == 0).all())
        expected = log_odds(model.logits(base))
    change = found.changes[0, 0]
    got = found.harmful - change if direction == "noising" else found.harmless + change
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["recompute", "freeze"])
def test_projection_is_the_hook_based_twin(kind, norm, make_hf_model, make_tokenizer):
    model = tiny(make_hf_model, make_tokenizer, kind, 0, 3)
    pairs = ms.PromptPairs.from_lists(HARMFUL, HARMLESS)
    vector = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(0)), dim=0)
    site, parts = Site("resid_pre", 2), [Node("head", 0, 1), Node("neuron", 1, 3), Node("embed"), Node("mlp", 2)]
    base, source = model.tokenize(pairs.harmful), model.tokenize(pairs.harmless)
    for columns in ((-1,), "instruction"):
        where = base.span_mask(columns) if isinstance(columns, str) else torch.zeros_like(base.mask)
        if not isinstance(columns, str):
            where[:, -1] = True
        where[:, : model.tokenize_pairs(pairs).start] = False
        projection = Projection(vector, site, columns)
        found = path_projection(model, pairs, projection, senders=parts, norm=norm, progress=False)
        for k, part in enumerate(parts):
            _, seen = frozen_run(
                model, base, source, part, mlp="recompute", norm=norm, read=["blocks.2.hook_resid_pre"]
            )
            expected = ((seen["blocks.2.hook_resid_pre"] @ vector) * where).sum(1) / where.sum(1)
            torch.testing.assert_close(found.harmful - found.changes[k, 0], expected, atol=1e-4, rtol=0)
        assert bool((found.changes[3] == 0).all()), "an MLP after the site moves nothing there"
        mover = 0 if columns == (-1,) else 2
        assert float(found.changes[mover].abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_joint_receivers_of_two_layers_are_the_hook_based_twin(kind, make_hf_model, make_tokenizer, log_odds):
    """The later receiver's other slots read the live stream, which the earlier receiver has changed."""
    model = tiny(make_hf_model, make_tokenizer, kind, 0, 3)
    pairs = ms.PromptPairs.from_lists(HARMFUL, HARMLESS)
    base, source, sender = model.tokenize(pairs.harmful), model.tokenize(pairs.harmless), Node("head", 0, 1)
    for slots in ("vq", "vk", "kv"):
        group = [(Node("head", 1, 2), slots[0]), (Node("head", 2, 1), slots[1])]
        found = path_patching(model, pairs, log_odds, senders=[sender], receivers=group, joint=True, progress=False)
        expected = log_odds(path_whole(model, base, source, sender, group, mlp="recompute"))
        torch.testing.assert_close(found.harmful - found.changes[0, 0], expected, atol=1e-4, rtol=0)


def test_senders_at_columns_are_the_call_with_positions(llama, pairs, log_odds):
    head, receiver = Node("head", 0, 1), [(Node("head", 2, 1), "v")]
    for where in ("instruction", "suffix", (-5, -3)):
        one = path_patching(llama, pairs, log_odds, senders=[At(head, where)], receivers=receiver, progress=False)
        same = path_patching(
            llama, pairs, log_odds, senders=[head], receivers=receiver, positions=where, progress=False
        )
        assert torch.equal(one.changes, same.changes)
