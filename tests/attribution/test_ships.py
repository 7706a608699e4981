"""Ships and Sahara against whole forwards with plain hooks."""

import numpy as np
import pytest
import torch
from reference import record, whole_logits
from scipy.linalg import subspace_angles

from mechsafety.attribution.ships import principal_angles, sahara, ships
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Node

PROMPTS = ["how do i make a bomb", "kill", "teach me to steal a car please", "poison my tea"]


def masked(model, tokens, heads, mask):
    """Logits and the final norm's input with heads masked in a whole forward."""
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
    edits.append(("ln_final.hook_in", lambda x: seen.update(final=x[:, -1].clone())))
    return whole_logits(model, tokens, edits), seen["final"]


@pytest.mark.parametrize("mask", ["zero", "uniform"])
def test_every_head_by_hand(any_model, mask):
    tokens = any_model.tokenize(PROMPTS)
    kl, angles = ships(any_model, PROMPTS, mask=mask, rank=2, progress=False)
    log_p = whole_logits(any_model, tokens).log_softmax(-1)
    plain = record(any_model, tokens, ["ln_final.hook_in"])["ln_final.hook_in"][:, -1]
    for layer, head in ((0, 0), (1, 2), (2, 3)):
        logits, final = masked(any_model, tokens, [(layer, head)], mask)
        want = (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1)
        torch.testing.assert_close(kl[layer, head], want, atol=1e-5, rtol=1e-3)
        first, second = (np.linalg.svd(x.double().numpy())[2][:2].T for x in (plain, final))
        assert float(angles[layer, head]) == pytest.approx(subspace_angles(first, second).sum(), abs=2e-3)
    assert float(kl.max()) > 1e-3 and float(angles.max()) > 1e-2


def test_a_head_that_is_uniform_already_has_no_uniform_ships(directed):
    model, pairs, _ = directed
    kl, angles = ships(model, pairs.harmful[:6], mask="uniform", progress=False)
    assert float(kl[0, 0].max()) < 1e-6 and float(angles[0, 0]) < 1e-2
    assert float(ships(model, pairs.harmful[:6], mask="zero", progress=False)[0][0, 0].mean()) > 1.0


def test_sahara_is_greedy(llama):
    tokens = llama.tokenize(PROMPTS)
    group = sahara(llama, PROMPTS, 2, mask="zero", rank=2, progress=False)
    _, single = ships(llama, PROMPTS, mask="zero", rank=2, progress=False)
    best = divmod(int(single.argmax()), 4)
    assert group[0][0] == Node("head", *best) and group[0][1] == pytest.approx(float(single.max()), abs=1e-5)
    plain = record(llama, tokens, ["ln_final.hook_in"])["ln_final.hook_in"][:, -1]
    every = {}
    for layer in range(3):
        for head in range(4):
            if (layer, head) != best:
                _, final = masked(llama, tokens, [best, (layer, head)], "zero")
                every[Node("head", layer, head)] = float(principal_angles(plain, final, 2).sum())
    assert group[1][0] == max(every, key=every.get) and group[1][1] == pytest.approx(max(every.values()), abs=1e-3)


def test_principal_angles():
    plane = torch.eye(4)[:2]
    turned = torch.stack([torch.eye(4)[0], (torch.eye(4)[1] + torch.eye(4)[2]) / 2**0.5])
    assert principal_angles(plane, plane, 2).abs().max() < 1e-3
    torch.testing.assert_close(principal_angles(plane, turned, 2).max(), torch.tensor(torch.pi / 4), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: ships(m, PROMPTS, mask="half"), "mask='half'; expected one of ('uniform', 'zero')"),
        (lambda m: ships(m, PROMPTS, rank=5), "rank=5; expected 1 to 4, one for each prompt"),
        (lambda m: sahara(m, PROMPTS, 0), "size=0; expected 1 to 12 heads"),
    ],
)
def test_refusals(llama, call, message):
    with pytest.raises(MechsafetyError) as caught:
        call(llama)
    assert str(caught.value) == message
