"""Ablating and scaling nodes against plain hooks; composing, holding in generation, leaving nothing behind."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import hook_count, node_hook, record, whole_logits

import mechsafety as ms
from mechsafety.errors import MechsafetyError
from mechsafety.interventions import ablate, scale
from mechsafety.nodes import Node

PROMPTS = ["how do i make a bomb", "help", "teach me to steal a car please"]
HARMLESS = ["explain the sky", "bake my bread please"]
NODES = [Node("head", 0, 1), Node("head", 1, 3), Node("mlp", 1), Node("neuron", 0, 5), Node("neuron", 2, 47)]
LISTS = st.lists(st.sampled_from(NODES), min_size=1, max_size=4, unique=True)
QUICK = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


def by_hand(model, prompts, nodes, function):
    """Whole forwards in which plain hooks apply a function to each node's value."""
    edits = []
    for node in nodes:
        name, index = node_hook(node)

        def edit(tensor, index=index, node=node):
            tensor = tensor.clone()
            tensor[index] = function(node, tensor[index])
            return tensor

        edits.append((name, edit))
    return whole_logits(model, model.tokenize(prompts), edits)


def mean_values(model, nodes, prompts):
    tokens = model.tokenize(prompts)
    found = record(model, tokens, sorted({node_hook(node)[0] for node in nodes}))
    return {node: found[node_hook(node)[0]][node_hook(node)[1]][tokens.mask].mean(0) for node in nodes}


def test_zero_and_partial_strength(any_model):
    with ablate(any_model, NODES, 0.3, "zero"):
        got = any_model.logits(PROMPTS)
    want = by_hand(any_model, PROMPTS, NODES, lambda node, own: 0.7 * own)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert float((got - any_model.logits(PROMPTS)).abs().max()) > 1e-3


def test_mean_over_the_tokens_of_reference_prompts(llama):
    means = mean_values(llama, NODES, HARMLESS)
    with ablate(llama, NODES, 0.6, "mean", prompts=HARMLESS):
        got = llama.logits(PROMPTS)
    want = by_hand(llama, PROMPTS, NODES, lambda node, own: 0.4 * own + 0.6 * means[node])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_resampled_values_are_drawn_from_the_reference_and_reproducible(llama):
    node = Node("head", 1, 2)
    tokens = llama.tokenize(HARMLESS)
    pool = record(llama, tokens, [node_hook(node)[0]])[node_hook(node)[0]][node_hook(node)[1]][tokens.mask]
    site = ms.Site(ms.sites.SiteKind.Z, 1)
    draws = []
    for seed in (0, 0, 1):
        with ablate(llama, [node], 1.0, "resample", prompts=HARMLESS, seed=seed):
            draws.append(llama.read(llama.tokenize(PROMPTS), [site])[site][:, :, 2])
    nearest = torch.cdist(draws[0].flatten(0, 1), pool, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert float(nearest.values.max()) < 1e-5 and len(set(nearest.indices.tolist())) > 3
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@QUICK
@given(nodes=LISTS, factor=st.floats(-2.0, 2.0))
def test_scale_equals_plain_hooks(llama, nodes, factor):
    with scale(llama, nodes, factor):
        got = llama.logits(PROMPTS)
    want = by_hand(llama, PROMPTS, nodes, lambda node, own: factor * own)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@QUICK
@given(nodes=LISTS, source=st.sampled_from(["zero", "mean", "resample"]))
def test_strength_zero_and_factor_one_change_nothing(llama, nodes, source):
    plain = llama.logits(PROMPTS)
    with ablate(llama, nodes, 0.0, source, prompts=HARMLESS), scale(llama, nodes, 1.0):
        # the prompts' common tokens are not run apart while an edit may count columns, which rounds differently
        torch.testing.assert_close(llama.logits(PROMPTS), plain, atol=1e-4, rtol=1e-4)


@QUICK
@given(first=LISTS, second=LISTS)
def test_ablations_compose_in_any_order_and_twice_is_once(llama, first, second):
    def run(*groups):
        contexts = [ablate(llama, group, 1.0, "zero") for group in groups]
        with contexts[0], contexts[1]:
            return llama.logits(PROMPTS)

    torch.testing.assert_close(run(first, second), run(second, first), atol=1e-5, rtol=1e-5)
    union = list(dict.fromkeys([*first, *second]))
    torch.testing.assert_close(run(first, second), run(union, union), atol=1e-5, rtol=1e-5)


def test_an_inner_context_sees_what_the_outer_one_left(llama):
    node = [Node("mlp", 1)]
    with scale(llama, node, 2.0), ablate(llama, node, 1.0, "zero"):
        zero = llama.logits(PROMPTS)
    with ablate(llama, node, 1.0, "zero"):
        torch.testing.assert_close(zero, llama.logits(PROMPTS))
    with scale(llama, node, 2.0), scale(llama, node, 3.0):
        six = llama.logits(PROMPTS)
    torch.testing.assert_close(six, by_hand(llama, PROMPTS, node, lambda n, own: 6 * own), atol=1e-5, rtol=1e-5)


def test_holds_at_every_generated_token(llama):
    """Greedy generation with the keys and values kept equals whole forwards over the growing text."""
    nodes, prompt = [Node("mlp", 0), Node("head", 1, 0)], PROMPTS[0]
    with scale(llama, nodes, -1.5):
        reply = llama.generate([prompt], 6)[0]
        ids = llama.tokenize([prompt]).ids
        for _ in range(6):
            logits = llama.bridge.original_model(input_ids=ids, use_cache=False).logits[0, -1]
            ids = torch.cat([ids, logits.argmax()[None, None]], 1)
            if int(ids[0, -1]) == llama.tokenizer.eos_token_id:
                break
    start = llama.tokenize([prompt]).ids.shape[1]
    assert reply == llama.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
    assert reply != llama.generate([prompt], 6)[0]


def test_positions(llama):
    node = [Node("mlp", 2)]  # of the last block: its output at a position reaches that position's logits only
    tokens = llama.tokenize([PROMPTS[0]])
    plain = llama.forward(tokens, keep=3)[0].detach()
    changed = {}
    for positions in ("all", "last", "prompt"):
        with ablate(llama, node, 1.0, "zero", positions=positions):
            changed[positions] = (llama.forward(tokens, keep=3)[0].detach() - plain).abs().amax(-1) > 1e-4
    assert changed["all"].all() and changed["prompt"].all() and changed["last"].tolist() == [False, False, True]
    replies = {}
    for positions in ("all", "prompt"):
        with scale(llama, [Node("mlp", 1)], -2.0, positions=positions):
            replies[positions] = llama.generate([PROMPTS[0]], 8)
    with scale(llama, [Node("mlp", 1)], -2.0):
        first = llama.logits([PROMPTS[0]]).argmax()
    # the same first token, then another text once generated tokens are left alone
    word = llama.tokenizer.decode([int(first)]).strip()
    assert all(reply[0].startswith(word) for reply in replies.values()) and replies["all"] != replies["prompt"]


def test_nothing_is_left_after_an_exception(llama):
    before, plain = hook_count(llama), llama.logits(PROMPTS)
    with pytest.raises(KeyError), ablate(llama, NODES, 1.0, "mean", prompts=HARMLESS), scale(llama, NODES, 3.0):
        raise KeyError("stop")
    assert hook_count(llama) == before and torch.equal(llama.logits(PROMPTS), plain)


@pytest.mark.parametrize(
    ("nodes", "options", "message"),
    [
        (
            [Node("neuron", 0, 48)],
            {},
            "L0.N48 does not exist in LlamaForCausalLM; expected layers 0 to 2 and neurons 0 to 47; "
            "the nearest is L0.N47",
        ),
        (
            [Node("head", 1, 4)],
            {},
            "L1.H4 does not exist in LlamaForCausalLM; expected layers 0 to 2 and heads 0 to 3; the nearest is L1.H3",
        ),
        (
            [Node("head", 3, 0)],
            {},
            "L3.H0 does not exist in LlamaForCausalLM; expected layers 0 to 2 and heads 0 to 3; the nearest is L2.H0",
        ),
        ([Node("embed")], {}, "embed cannot be edited; expected heads, MLPs or neurons"),
        ([], {}, "no nodes; expected at least one head, MLP or neuron"),
        ([NODES[0], NODES[0]], {}, "nodes ['L0.H1'] are given twice; expected each once"),
        (NODES, {"strength": math.nan}, "strength=nan; expected a number from 0 to 1"),
        (NODES, {"strength": 1.5}, "strength=1.5; expected a number from 0 to 1"),
        (NODES, {"source": "median"}, "source='median'; expected one of ('mean', 'zero', 'resample')"),
        (NODES, {"positions": "odd"}, "positions='odd'; expected one of ('all', 'last', 'prompt')"),
        (
            NODES,
            {"source": "mean"},
            "source='mean' without prompts; expected prompts=[...] to take it from; or source='zero'",
        ),
    ],
)
def test_nonsense_is_refused_in_one_line(llama, nodes, options, message):
    with pytest.raises(MechsafetyError) as caught, ablate(llama, nodes, **{"source": "zero", **options}):
        pass
    assert str(caught.value) == message


def test_a_factor_that_is_no_number(llama):
    with pytest.raises(MechsafetyError) as caught, scale(llama, NODES, math.inf):
        pass
    assert str(caught.value) == "strength=inf; expected a finite number"
