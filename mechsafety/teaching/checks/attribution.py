"""Checks for notebook 02: direct logit attribution and heads."""

import functools

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from mechsafety.attribution import direct_logit_attribution
from mechsafety.teaching.check import Case, Check, Mistake
from mechsafety.teaching.models import (
    SIZES,
    final_norm,
    logit_difference,
    random_numbers,
    shared_model,
    some_pairs,
)


@functools.cache
def _queries() -> list[Case]:
    cases = []
    for seed, (heads, kv_heads, batch, width, d_head) in enumerate(((6, 2, 3, 5, 4), (4, 4, 2, 7, 3), (8, 4, 1, 6, 5))):
        rng = random_numbers(seed)
        q = 2 * torch.randn(heads, batch, width, d_head, generator=rng)
        k = 2 * torch.randn(kv_heads, batch, width, d_head, generator=rng)
        query, key = (rearrange(x, "head batch pos d_head -> batch head pos d_head") for x in (q, k))
        # attention to one-hot values gives back the pattern
        values = repeat(torch.eye(width), "pos source -> batch head pos source", batch=batch, head=kv_heads)
        pattern = torch.nn.functional.scaled_dot_product_attention(query, key, values, is_causal=True, enable_gqa=True)
        expected = rearrange(pattern, "batch head pos source -> head batch pos source")
        cases.append(Case({"q": q, "k": k}, expected))
    return cases


def _scores(
    q: Float[Tensor, "head batch pos d_head"],
    k: Float[Tensor, "kv_head batch pos d_head"],
    *,
    pairing: str = "(kv_head group)",
    scaled: bool = True,
    causal: bool = True,
) -> Float[Tensor, "head batch pos source"]:
    keys = repeat(k, f"kv_head batch pos d_head -> {pairing} batch pos d_head", group=len(q) // len(k))
    scores = einsum(q, keys, "head batch pos d, head batch source d -> head batch pos source")
    scores = scores / q.shape[-1] ** 0.5 if scaled else scores
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf) if causal else scores


attention_pattern = Check(
    "attention_pattern",
    _queries,
    (
        Mistake(
            "a softmax over the wrong axis",
            "Each query's attention sums to 1: take the softmax over the source positions, the last axis.",
            lambda q, k: _scores(q, k).softmax(-2),
        ),
        Mistake(
            "scores without their scale",
            "Divide the scores by the square root of d_head before the softmax.",
            lambda q, k: _scores(q, k, scaled=False).softmax(-1),
        ),
        Mistake(
            "attention to later tokens",
            "Set the scores of later source positions to minus infinity before the softmax.",
            lambda q, k: _scores(q, k, causal=False).softmax(-1),
        ),
        Mistake(
            "heads with the wrong keys",
            "Heads that share keys lie next to each other: head h reads the keys of h // (head / kv_head).",
            lambda q, k: _scores(q, k, pairing="(group kv_head)").softmax(-1),
        ),
        Mistake(
            "weights that do not sum to 1",
            "Mask before the softmax: zeros that are put in afterwards leave less than 1 for the rest.",
            lambda q, k: _scores(q, k, causal=False).softmax(-1).tril(),
        ),
        Mistake(
            "later tokens whose score is 0",
            "A score of 0 still gets attention. Set the scores of later source positions to minus infinity.",
            lambda q, k: _scores(q, k, causal=False).tril().softmax(-1),
        ),
        Mistake(
            "a token that does not see itself",
            "Only later positions are hidden, s > t: use triu(diagonal=1).",
            lambda q, k: _scores(q, k).masked_fill(torch.eye(q.shape[2], dtype=torch.bool), -torch.inf).softmax(-1),
        ),
        Mistake(
            "scores that are divided by d_head",
            "Divide the scores by the square root of d_head.",
            lambda q, k: (_scores(q, k) / q.shape[-1] ** 0.5).softmax(-1),
        ),
    ),
)


def _normed(
    parts: Float[Tensor, "*parts d_model"],
    resid: Float[Tensor, "*rows d_model"],
    weight: Float[Tensor, " d_model"],
    eps: float,
) -> Float[Tensor, "*parts d_model"]:
    """Parts of a stream through the RMSNorm of the whole stream, its scale frozen."""
    return parts / (resid.square().mean(-1, keepdim=True) + eps).sqrt() * weight


# of this size the stream is so small that eps matters
TINY = 1


def _centred(resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
    return resid - resid.mean(-1, keepdim=True)


@functools.cache
def _parts() -> list[Case]:
    cases = []
    for size, n in enumerate((3, 7, 2)):
        model = shared_model(size)
        weight, eps = final_norm(size)
        resid = model.cache(some_pairs(size).harmful, ["resid"]).resid[-1, :, -1].clone()
        if size == TINY:
            resid = (eps / resid.square().mean()).sqrt() * resid
        parts = torch.randn(n, *resid.shape, generator=random_numbers(size))
        expected = model.frozen_final_norm(resid)(parts).detach()
        cases.append(Case({"parts": parts, "resid": resid, "weight": weight, "eps": eps}, expected))
    return cases


through_final_norm = Check(
    "through_final_norm",
    _parts,
    (
        Mistake(
            "a forgotten norm weight",
            "After the division, multiply by the final norm's weight.",
            lambda parts, resid, weight, eps: _normed(parts, resid, torch.ones_like(weight), eps),
        ),
        Mistake(
            "a scale of each part's own",
            "Divide all parts by the scale of the whole stream; only then do the results add up.",
            lambda parts, resid, weight, eps: _normed(parts, parts, weight, eps),
        ),
        Mistake(
            "a LayerNorm",
            "An RMSNorm subtracts no mean.",
            lambda parts, resid, weight, eps: _normed(_centred(parts), _centred(resid), weight, eps),
        ),
        Mistake(
            "a division by the vector's length",
            "The scale is the root of the mean square plus eps, not of the sum of squares.",
            lambda parts, resid, weight, eps: parts / resid.norm(dim=-1, keepdim=True) * weight,
        ),
        Mistake(
            "a sum of squares",
            "The scale is the root of the mean square plus eps, not of the sum of squares plus eps.",
            lambda parts, resid, weight, eps: parts / (resid.square().sum(-1, keepdim=True) + eps).sqrt() * weight,
        ),
        Mistake(
            "a forgotten eps",
            "Add eps to the mean square before you take the root.",
            lambda parts, resid, weight, eps: _normed(parts, resid, weight, 0.0),
        ),
        Mistake(
            "an eps outside the root",
            "Add eps to the mean square before you take the root.",
            lambda parts, resid, weight, eps: parts / (resid.square().mean(-1, keepdim=True).sqrt() + eps) * weight,
        ),
    ),
)


@functools.cache
def _heads() -> list[Case]:
    cases = []
    for size in range(len(SIZES)):
        model, metric = shared_model(size), logit_difference(shared_model(size))
        weight, eps = final_norm(size)
        cache = model.cache(some_pairs(size).harmful, ["resid", "head_out"])
        inputs = {
            "head_out": cache.head_out.clone(),
            "resid": cache.resid[-1].clone(),
            "weight": weight,
            "eps": eps,
            "W_U": model.W_U.detach().clone(),
            "refuse": metric.refusal_ids[0],
            "comply": metric.comply_ids[0],
        }
        expected = direct_logit_attribution(model, cache.tokens, metric, progress=False).heads
        cases.append(Case(inputs, expected))
    return cases


def _read(
    head_out: Float[Tensor, "layer head batch pos d_model"],
    resid: Float[Tensor, "batch pos d_model"],
    weight: Float[Tensor, " d_model"],
    eps: float,
    W_U: Float[Tensor, "d_model d_vocab"],
    refuse: int,
    comply: int,
) -> Float[Tensor, "layer head batch pos"]:
    """Direct contributions as if each position were the last."""
    direction = W_U[:, refuse] - W_U[:, comply]
    return _normed(head_out, resid, weight, eps) @ direction


def _own_scale(
    head_out: Float[Tensor, "layer head batch pos d_model"],
    weight: Float[Tensor, " d_model"],
    eps: float,
    W_U: Float[Tensor, "d_model d_vocab"],
    refuse: int,
    comply: int,
) -> Float[Tensor, "layer head batch"]:
    """Contributions if every head had a norm of its own."""
    own = head_out[..., -1, :]
    return _normed(own, own, weight, eps) @ (W_U[:, refuse] - W_U[:, comply])


logit_attribution = Check(
    "logit_attribution",
    _heads,
    (
        Mistake(
            "a forgotten norm weight",
            "Between the stream and the unembedding stands the final norm: use its weight too.",
            lambda head_out, resid, weight, *rest: _read(head_out, resid, torch.ones_like(weight), *rest)[..., -1],
        ),
        Mistake(
            "a forgotten final norm",
            "Divide by the scale of the final stream and multiply by the norm's weight before you unembed.",
            lambda head_out, resid, weight, eps, W_U, refuse, comply: (
                head_out[..., -1, :] @ (W_U[:, refuse] - W_U[:, comply])
            ),
        ),
        Mistake(
            "a scale of each head's own",
            "Divide what every head writes by the scale of the whole stream.",
            lambda head_out, resid, *rest: _own_scale(head_out, *rest),
        ),
        Mistake(
            "the wrong position",
            "The next token is predicted at the last position, -1.",
            lambda *inputs: _read(*inputs)[..., 0],
        ),
        Mistake(
            "a mean over positions",
            "The next token is predicted at the last position: read there alone.",
            lambda *inputs: _read(*inputs).mean(-1),
        ),
        Mistake(
            "the opposite sign",
            "A contribution to refusing is positive: the logit of refuse minus that of comply.",
            lambda *inputs: -_read(*inputs)[..., -1],
        ),
        Mistake(
            "the logit of one token",
            "The metric is a difference: subtract the logit of comply.",
            lambda head_out, resid, weight, eps, W_U, refuse, comply: (
                _normed(head_out, resid, weight, eps)[..., -1, :] @ W_U[:, refuse]
            ),
        ),
        Mistake(
            "a mean over the batch",
            "Keep one contribution per prompt.",
            lambda *inputs: _read(*inputs)[..., -1].mean(-1),
        ),
    ),
)
