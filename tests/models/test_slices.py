"""Slices of weights: each holds the numbers of its own parts and no others, whatever the architecture."""

import pytest
import torch

import mechsafety as ms
from mechsafety.errors import MechsafetyError
from mechsafety.models.slices import (
    check_values,
    in_layout_of,
    n_parameters,
    on_copies,
    part_slices,
    replaced,
    values_of,
    whole_slices,
)
from mechsafety.nodes import Node
from mechsafety.sites import Site, SiteKind

Z, OUT = Site(SiteKind.Z, 1), Site(SiteKind.ATTN_OUT, 1)
NEURONS, MLP_OUT = Site(SiteKind.NEURONS, 1), Site(SiteKind.MLP_OUT, 1)


def moved(model, part):
    """The slice with other numbers."""
    torch.manual_seed(0)
    own = values_of(model, [part])[part.name]
    return {part.name: own + torch.randn(own.shape)}


def changed(model, part, tokens, sites):
    """Largest change of each site's activations when one slice gets other numbers."""
    before = model.read(tokens, sites)
    with replaced(model, [part], moved(model, part)):
        after = model.read(tokens, sites)
    return [(after[site] - before[site]).abs() for site in sites]


def test_a_heads_numbers_move_that_head_alone(any_model, architecture, pairs):
    tokens = any_model.tokenize(pairs.harmful)
    slices, _ = part_slices(any_model, [Node("head", 1, 1)])
    assert {"L1.W_Q", "L1.W_O"} <= {part.name for part in slices}
    for part in slices:
        z, out = changed(any_model, part, tokens, [Z, OUT])
        others = [head for head in range(any_model.n_heads) if head != 1]
        if part.name == "L1.W_O":
            assert not z.any() and out.any()
        elif part.name[3:] in ("W_Q", "b_Q", "W_K", "b_K") and architecture == "olmo2":
            assert z.any(), "its norm of queries and keys is over all heads"
        else:
            assert not z[:, :, others].any(), part.name
            assert z[:, :, 1].any() or part.name == "L1.b_K", (
                "a key's bias adds the same to all scores without rotation"
            )


def test_a_neurons_numbers_move_that_neuron_alone(any_model, pairs):
    tokens = any_model.tokenize(pairs.harmful)
    slices, _ = part_slices(any_model, [Node("neuron", 1, 7), Node("neuron", 1, 3)])
    names = {part.name for part in slices}
    assert {"L1.W_in", "L1.W_out"} <= names and "L1.b_out" not in names
    for part in slices:
        assert part.index == (3, 7)
        act, out = changed(any_model, part, tokens, [NEURONS, MLP_OUT])
        moving = act.amax((0, 1)).nonzero().flatten().tolist()
        assert (moving, bool(out.any())) == (([], True) if part.name == "L1.W_out" else ([3, 7], True))


def test_only_the_slices_entries_change_and_the_original_objects_come_back(any_model):
    before = {name: (parameter, parameter.clone()) for name, parameter in any_model.hf_model.named_parameters()}
    slices, _ = part_slices(any_model, [Node("head", 1, 1), Node("head", 0, 2), Node("neuron", 2, 5)])
    new = {name: values + 1 for name, values in values_of(any_model, slices).items()}
    sha = any_model.weights_sha256

    def fail():
        with replaced(any_model, slices, new):
            inside = dict(any_model.hf_model.named_parameters())
            moving = sum(int((inside[name] != old).sum()) for name, (_, old) in before.items())
            assert moving == sum(part.numel for part in slices), "no other number moves"
            assert any_model.weights_sha256 != sha
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    for name, parameter in any_model.hf_model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])
    assert any_model.weights_sha256 == sha


def test_what_parts_share_is_taken_with_all_of_them(llama, gpt2):
    """Llama has two query heads per key-value head; GPT-2 has output biases."""
    slices, shared = part_slices(llama, [Node("head", 1, 1), Node("head", 1, 2)])
    assert {"L1.W_K", "L1.W_V"} <= set(shared) and not {"L1.W_K", "L1.W_V"} & {part.name for part in slices}
    slices, shared = part_slices(llama, [Node("head", 1, k) for k in (1, 2, 3)])
    keys = next(part for part in slices if part.name == "L1.W_K")
    assert keys.index == (1,) and "L1.W_K" in shared, "head 1's group is not complete"
    slices, shared = part_slices(gpt2, [Node("head", 0, 0), Node("neuron", 0, 1)])
    assert shared == ("L0.b_O", "L0.b_out") and "L0.b_O" not in {part.name for part in slices}
    slices, shared = part_slices(gpt2, [*(Node("head", 0, k) for k in range(4)), Node("mlp", 0)])
    assert shared == () and {"L0.b_O", "L0.b_out"} <= {part.name for part in slices}


def test_sizes_and_counts(llama):
    slices, _ = part_slices(llama, [Node("head", 1, 1), Node("neuron", 2, 0)])
    by_name = {part.name: part for part in slices}
    assert by_name["L1.W_Q"].shape == (1, llama.d_model, llama.d_head) and by_name["L2.W_out"].shape == (1, 32)
    whole = whole_slices(llama)
    assert sum(part.numel for part in whole) == n_parameters(llama)
    assert all(
        torch.equal(values, dict(llama.hf_model.named_parameters())[name])
        for name, values in values_of(llama, whole).items()
    )


@pytest.mark.generation("TransformerBridge", reason="a HookedTransformer has biases that the Hugging Face model lacks")
def test_parameters_are_counted_as_hugging_face_does(any_model, architecture, make_hf_model):
    own = sum(parameter.numel() for parameter in make_hf_model(architecture).parameters())
    assert n_parameters(any_model) == own


def test_gradients_lie_as_the_parameters_do(gpt2, pairs):
    """A fused layer's parts have strides of their own; a gradient need not have them."""
    slices, _ = part_slices(gpt2, [Node("head", 1, 1)])
    tokens = gpt2.tokenize(pairs.harmful[:1])
    with on_copies(gpt2, slices) as copies, torch.enable_grad():
        part = next(one for one in slices if one.name == "L1.W_Q")
        copy = copies[part.parameter].requires_grad_(True)
        gpt2.forward(tokens).square().sum().backward()
        gradient = part.read(in_layout_of(copy, copy.grad))
        step = 1e-3
        place = tuple(int(k) for k in torch.unravel_index(gradient.abs().argmax(), gradient.shape))
        own = part.read(copy)
        sums = []
        for sign in (1, -1):
            new = own.clone()
            new[place] += sign * step
            part.write(copy, new)
            with torch.no_grad():
                sums.append(float(gpt2.forward(tokens).double().square().sum()))
    assert (sums[0] - sums[1]) / (2 * step) == pytest.approx(float(gradient[place]), rel=0.02)


def test_numbers_that_do_not_fit_are_refused(llama):
    slices, _ = part_slices(llama, [Node("neuron", 0, 1)])
    good = values_of(llama, slices)
    for wrong, message in (
        ({}, r"^x has nothing for L0.W_in; expected shape \(32, 1\)$"),
        (good | {"L0.W_in": torch.zeros(2)}, r"^x has numbers of shape \(2,\) for L0.W_in; expected shape"),
        (good | {"L0.W_in": good["L0.W_in"] * torch.nan}, r"^x has NaN or infinite numbers in L0.W_in; expected"),
        (good | {"L0.W_Q": torch.zeros(2)}, r"^x has numbers for L0.W_Q; expected those of its own parts$"),
    ):
        with pytest.raises(MechsafetyError, match=message):
            check_values(slices, wrong, "x")


def test_experts_have_heads_to_train_and_no_mlps(monkeypatch, make_model):
    model = make_model("llama")
    monkeypatch.setattr(model, "experts", True)
    monkeypatch.setattr(model, "d_mlp", 0)
    layers = model.backend.part_weights

    def without_neurons(layer):
        return {name: found for name, found in layers(layer).items() if name[2:] not in ("in", "gate", "out")}

    monkeypatch.setattr(model.backend, "part_weights", without_neurons)
    assert part_slices(model, [Node("head", 0, 1)])[0]
    with pytest.raises(MechsafetyError, match="a mixture of experts"):
        part_slices(model, [Node("mlp", 0)])


def test_weights_of_an_unknown_form_are_refused(monkeypatch, make_model):
    model = make_model("llama")
    monkeypatch.setattr(model.backend, "part_weights", lambda layer: {})
    with pytest.raises(MechsafetyError, match="with weights of an unknown form; expected one linear layer each"):
        part_slices(model, [Node("head", 0, 1)])


def test_the_model_is_the_same_object_inside(llama):
    slices, _ = part_slices(llama, [Node("head", 0, 0)])
    with replaced(llama, slices, values_of(llama, slices)) as inside:
        assert inside is llama and isinstance(inside, ms.LensModel)


def test_the_hash_of_a_view_is_that_of_the_numbers_inside(llama):
    view = llama.reading((3,))
    part = part_slices(llama, [Node("head", 1, 1)])[0][0]
    before = view.weights_sha256
    with replaced(llama, [part], moved(llama, part)):
        assert view.weights_sha256 == llama.weights_sha256 == llama.hash_weights() != before
    assert view.weights_sha256 == llama.weights_sha256 == before
