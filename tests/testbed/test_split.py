"""The split forward against Hugging Face's own, and against a plain transformer with an input for every slot."""

import pytest
import torch
from reference import PlainModel

from mechsafety.nodes import Edge, Node
from mechsafety.testbed.split import edge_mask, possible_edges, receiver_slots, sender_nodes, split_forward


@pytest.fixture(scope="module")
def llama_hf(make_hf_model):
    return make_hf_model("llama", seed=4)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(7, 100, (2, 3, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_logits_are_the_models_own(llama_hf, ids):
    run = split_forward(llama_hf, ids[0])
    torch.testing.assert_close(run.logits, llama_hf(ids[0]).logits, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_swapping_everything_gives_the_other_run(llama_hf, ids):
    other = split_forward(llama_hf, ids[1])
    shape = (len(sender_nodes(llama_hf.config)), len(receiver_slots(llama_hf.config)), 9)
    swapped = split_forward(llama_hf, ids[0], other.senders, torch.ones(shape, dtype=torch.bool))
    torch.testing.assert_close(swapped.logits, other.logits, atol=2e-5, rtol=1e-4)
    same = split_forward(llama_hf, ids[0], other.senders, torch.zeros(shape, dtype=torch.bool))
    torch.testing.assert_close(same.logits, llama_hf(ids[0]).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("slot", ["q", "k", "v", "mlp", "logits"])
@torch.no_grad()
def test_one_edge_is_one_fork(llama_hf, ids, slot):
    """A swapped edge is the sender's change added to what that slot alone reads."""
    plain = PlainModel(llama_hf)
    base, other = split_forward(llama_hf, ids[0]), split_forward(llama_hf, ids[1])
    sender = Node("head", 0, 2)
    row = sender_nodes(llama_hf.config).index(sender)
    receiver = {"mlp": Node("mlp", 1), "logits": Node("logits")}.get(slot, Node("head", 2, 3))
    fork = {"mlp": ("mlp", 1, None), "logits": ("logits", None, None)}.get(slot, (slot, 2, 3))
    edge = Edge(sender, receiver, {"logits": "resid"}.get(slot, slot))
    mask = edge_mask(llama_hf.config, [edge])[:, :, None].expand(-1, -1, 9)
    found = split_forward(llama_hf, ids[0], other.senders, mask).logits[:, -1]
    change = other.senders[row] - base.senders[row]
    expected = torch.stack([plain(one, {fork: change[k]})[0] for k, one in enumerate(ids[0])])
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)
    assert float((found - base.logits[:, -1]).abs().max()) > 1e-4


def test_edges_are_counted(llama_hf):
    layers, heads = 3, 4
    earlier = [1 + layer * (heads + 1) for layer in range(layers)]
    expected = sum(n * heads * 3 + (n + heads) for n in earlier) + 1 + layers * (heads + 1)
    edges = possible_edges(llama_hf.config)
    assert len(edges) == expected
    assert int(edge_mask(llama_hf.config, edges).sum()) == expected
