"""Ships and Sahara against whole forwards with plain hooks."""

import numpy as np
import pytest
import torch
from reference import record, whole_logits
from scipy.linalg import subspace_angles
from scipy.stats import spearmanr

from mechsafety.attribution.ships import principal_angles, sahara, ships
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Node

PROMPTS = ["how do i make a bomb", "kill", "teach me to steal a car please", "poison my tea"]


FINAL = "ln_final.hook_out"


def published(plain, final, rank):
    """Equation 11 of Zhou et al. 2024 in numpy: left singular vectors of [prompt d_model], angles in degrees."""
    first, second = (np.linalg.svd(x.double().numpy())[0][:, :rank] for x in (plain, final))
    return float(np.rad2deg(subspace_angles(first, second)).sum())


def masked(model, tokens, heads, mask):
    """Logits and the final norm's output with heads masked in a whole forward."""
    edits = []
    for layer in sorted({layer for layer, _ in heads}):
        chosen = [head for at, head in heads if at == layer]
        if mask == "zero":

            def edit(z, chosen=chosen):
                z = z.clone()
                z[:, :, chosen] = 0.0
                return z

            edits.append((f"blocks.{layer}.attn.hook_z", edit))
        else:

            def level(pattern, chosen=chosen):
                pattern = pattern.clone()
                even = (pattern[:, chosen] > 0).float()
                pattern[:, chosen] = even / even.sum(-1, keepdim=True).clamp(min=1)
                return pattern

            edits.append((f"blocks.{layer}.attn.hook_pattern", level))
    seen = {}
    edits.append((FINAL, lambda x: seen.update(final=x[:, -1].clone())))
    return whole_logits(model, tokens, edits), seen["final"]


@pytest.mark.parametrize("mask", ["zero", "uniform"])
def test_every_head_by_hand(any_model, mask):
    tokens = any_model.tokenize(PROMPTS)
    swept = {rank: ships(any_model, PROMPTS, mask=mask, rank=rank, progress=False) for rank in (1, 2)}
    kl, angles = swept[1]
    log_p = whole_logits(any_model, tokens).log_softmax(-1)
    plain = record(any_model, tokens, [FINAL])[FINAL][:, -1]
    for layer, head in ((0, 0), (1, 2), (2, 3)):
        logits, final = masked(any_model, tokens, [(layer, head)], mask)
        want = (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1)
        torch.testing.assert_close(kl[layer, head], want, atol=1e-5, rtol=1e-3)
        for rank, (_, found) in swept.items():
            assert float(found[layer, head]) == pytest.approx(published(plain, final, rank), abs=0.05, rel=1e-3)
    assert float(kl.max()) > 1e-3 and float(angles.max()) > 0.2
    assert torch.equal(ships(any_model, PROMPTS, mask=mask, progress=False)[1], angles), "the published rank is 1"


def test_masking_is_the_limit_of_the_published_scaling(llama):
    """The published code multiplies a head's queries with 1e-5 and runs the whole model."""
    tokens = llama.tokenize(PROMPTS)
    kl, angles = ships(llama, PROMPTS, progress=False)
    log_p = whole_logits(llama, tokens).log_softmax(-1)
    plain = record(llama, tokens, [FINAL])[FINAL][:, -1]
    wanted = np.zeros((3, 4))
    for layer in range(3):
        for head in range(4):

            def shrink(q, head=head):
                q = q.clone()
                q[:, :, head] *= 1e-5
                return q

            seen = {}
            edits = [(f"blocks.{layer}.attn.hook_q", shrink), (FINAL, lambda x: seen.update(final=x[:, -1].clone()))]  # noqa: B023
            log_q = whole_logits(llama, tokens, edits).log_softmax(-1)
            torch.testing.assert_close(kl[layer, head], (log_p.exp() * (log_p - log_q)).sum(-1), atol=1e-5, rtol=1e-3)
            wanted[layer, head] = published(plain, seen["final"], 1)
    np.testing.assert_allclose(angles.numpy(), wanted, atol=0.05)
    assert spearmanr(angles.flatten(), wanted.flatten()).statistic > 0.99


def test_a_head_that_is_uniform_already_has_no_uniform_ships(directed):
    model, pairs, _ = directed
    kl, angles = ships(model, pairs.harmful[:6], mask="uniform", progress=False)
    assert float(kl[0, 0].max()) < 1e-6 and float(angles[0, 0]) < 0.05
    assert float(ships(model, pairs.harmful[:6], mask="zero", progress=False)[0][0, 0].mean()) > 1.0


def test_sahara_is_greedy(llama):
    tokens = llama.tokenize(PROMPTS)
    group = sahara(llama, PROMPTS, 2, mask="zero", rank=2, progress=False)
    _, single = ships(llama, PROMPTS, mask="zero", rank=2, progress=False)
    best = divmod(int(single.argmax()), 4)
    assert group[0][0] == Node("head", *best) and group[0][1] == pytest.approx(float(single.max()), abs=1e-5)
    plain = record(llama, tokens, [FINAL])[FINAL][:, -1]
    every = {}
    for layer in range(3):
        for head in range(4):
            if (layer, head) != best:
                _, final = masked(llama, tokens, [best, (layer, head)], "zero")
                every[Node("head", layer, head)] = published(plain, final, 2)
    assert group[1][0] == max(every, key=every.get) and group[1][1] == pytest.approx(max(every.values()), abs=0.05)


def test_principal_angles():
    """Of the prompts' side: turning the stream alike for all prompts changes nothing, mixing prompts does."""
    states = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1))).Q
    assert principal_angles(states, 3 * states @ turn, 2).max() < 1e-3
    plane = torch.tensor([[3.0, 0], [0, 2], [0, 0]])
    turned = torch.tensor([[3.0, 0], [0, 2**0.5], [0, 2**0.5]])
    torch.testing.assert_close(principal_angles(plane, turned, 2).max(), torch.tensor(45.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: ships(m, PROMPTS, mask="half"), "mask='half'; expected one of ('uniform', 'zero')"),
        (
            lambda m: ships(m, PROMPTS, rank=4),
            "rank=4 of 4 prompts; expected a rank of 1 to 32 and more prompts than that",
        ),
        (
            lambda m: sahara(m, PROMPTS[:1]),
            "rank=1 of 1 prompts; expected a rank of 1 to 32 and more prompts than that",
        ),
        (lambda m: sahara(m, PROMPTS, 0), "size=0; expected at least 1"),
        (lambda m: sahara(m, PROMPTS, 13), "size=13; expected 1 to 12 heads"),
    ],
)
def test_refusals(llama, call, message):
    with pytest.raises(MechsafetyError) as caught:
        call(llama)
    assert str(caught.value) == message
