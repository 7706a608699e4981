# %% [markdown]
# # Exercises 02 · Direct logit attribution and heads
#
# These exercises go with notebook 02 of the course. You compute where heads look. Then you split a model's leaning to
# refuse into what each head adds to it directly.
#
# Everything here runs at once, on a model with four layers whose refusal circuit was written into its weights.

# %%
import torch
from einops import einsum, repeat
from jaxtyping import Float
from torch import Tensor

import mechsafety as ms
from mechsafety.teaching import checks

made = ms.testbed.planted(seed=3)
model = ms.load_model((made.model, made.tokenizer))
metric = ms.RefusalLogOdds.of(model, ["Sorry"], ["Sure"])  # the logit of Sorry minus that of Sure
tokens = model.tokenize(made.pairs.harmful[:6])

# %% [markdown]
# ## 1. Where does a head look?
#
# A head compares its query at one position with its keys at all positions up to that one. The scores go through a
# softmax and become the attention *pattern*: how much of each source position the head takes.
#
# `pattern[t, s] = softmax over s of (q[t] · k[s] / sqrt(d_head))`
#
# Here `q[t]` is the query at position `t` and `k[s]` the key at source position `s`. Later positions, `s > t`, get no
# attention. In many models several heads share one set of keys (*grouped queries*).
# With 6 heads and 2 key-value heads, heads 0, 1 and 2 use the first set of keys and heads 3, 4 and 5 the second.


# %% tags=["exercise"] difficulty="medium" minutes=20
def attention_pattern(
    q: Float[Tensor, "head batch pos d_head"], k: Float[Tensor, "kv_head batch pos d_head"]
) -> Float[Tensor, "head batch pos source"]:
    """Causal attention pattern of every head.

    Args:
        q: Queries.
        k: Keys. `head` is a multiple of `kv_head`; neighbouring heads share keys.
    """
    keys = repeat(k, "kv_head batch pos d_head -> (kv_head group) batch pos d_head", group=len(q) // len(k))
    scores = einsum(q, keys, "head batch pos d_head, head batch source d_head -> head batch pos source")
    scores = scores / q.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(diagonal=1)
    return scores.masked_fill(later, -torch.inf).softmax(dim=-1)


# %% [markdown] tags=["hint"]
# Repeat the keys until there is one set per head. Then compute all scores in one `einsum`, scale them, mask them, and
# take the softmax last.

# %% [markdown] tags=["hint"]
# `repeat(k, "kv_head ... -> (kv_head group) ...")` puts copies of the same keys next to each other. The mask of later
# positions is `torch.ones(pos, pos, dtype=torch.bool).triu(diagonal=1)`; give those scores minus infinity.

# %%
checks.attention_pattern(attention_pattern)

# %% [markdown]
# A real model also rotates queries and keys before it compares them, so that scores depend on the distance. The package
# stores patterns as the model computes them, in `cache.pattern`. Here is what one head of the planted circuit looks at.

# %%
detection = next(node for node, role in made.truth.roles.items() if role == "detection")
model.attention(made.pairs.harmful[0], detection).plot()

# %% [markdown]
# ## 2. A part of the stream through the final norm
#
# The residual stream is a sum of parts: the embedding, what each head writes, what each MLP writes. Before the
# unembedding stands a norm. An RMSNorm divides by the root of the mean square, its *scale*, and multiplies by a weight:
#
# `N(x) = x / s(x) * weight`, with `s(x) = sqrt(mean of x² over d_model + eps)`
#
# A norm is not linear, because `s(x)` depends on `x`. If we *freeze* the scale at that of the whole stream, it is
# linear, and the images of the parts add up to `N(x)`.


# %% tags=["exercise"] difficulty="easy" minutes=10
def through_final_norm(
    parts: Float[Tensor, "part batch d_model"],
    resid: Float[Tensor, "batch d_model"],
    weight: Float[Tensor, " d_model"],
    eps: float,
) -> Float[Tensor, "part batch d_model"]:
    """Parts of a residual stream through its final RMSNorm, with the scale of the whole stream.

    Args:
        parts: Parts of the stream.
        resid: The whole stream, which sets the scale.
        weight: Weight of the norm.
        eps: What the norm adds to the mean square.
    """
    scale = (resid.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    return parts / scale * weight


# %% [markdown] tags=["hint"]
# The scale is one number per prompt. It comes from `resid`, not from `parts`.

# %% [markdown] tags=["hint"]
# `keepdim=True` keeps an axis of length 1, so that the scale `[batch, 1]` divides parts of shape `[part, batch,
# d_model]`.

# %%
checks.through_final_norm(through_final_norm)

# %% [markdown]
# ## 3. Direct logit attribution
#
# The metric is a difference of two logits. It reads the normed stream at the last position along one direction: the
# unembedding `W_U` of the refusing token minus that of the complying token. So every head adds its own number to the
# metric:
#
# `contribution = N(what the head writes) · (W_U[refuse] - W_U[comply])`
#
# The norm `N` has the scale of the whole stream. This is the head's *direct* contribution. What it changes in later
# layers does not count.


# %% tags=["exercise"] difficulty="medium" minutes=15
def logit_attribution(
    head_out: Float[Tensor, "layer head batch pos d_model"],
    resid: Float[Tensor, "batch pos d_model"],
    weight: Float[Tensor, " d_model"],
    eps: float,
    W_U: Float[Tensor, "d_model d_vocab"],
    refuse: int,
    comply: int,
) -> Float[Tensor, "layer head batch"]:
    """Direct contribution of every head to the logit difference at the last position.

    Args:
        head_out: What each head writes.
        resid: The residual stream that the final norm reads.
        weight: Weight of the final norm, an RMSNorm.
        eps: What the norm adds to the mean square.
        W_U: Unembedding weights.
        refuse: Id of the refusing token, whose logit counts positive.
        comply: Id of the complying token, whose logit counts negative.
    """
    last = resid[:, -1]
    scale = (last.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    normed = head_out[..., -1, :] / scale * weight
    return normed @ (W_U[:, refuse] - W_U[:, comply])


# %% [markdown] tags=["hint"]
# Take the last position of `head_out` and of `resid` first. Then the previous exercise does the norm.

# %% [markdown] tags=["hint"]
# `head_out[..., -1, :]` has the shape `[layer, head, batch, d_model]`. A matrix product with the one direction
# `W_U[:, refuse] - W_U[:, comply]` removes the last axis.

# %%
checks.logit_attribution(logit_attribution)

# %% [markdown]
# The package's `direct_logit_attribution` also has the MLPs, the embedding and the rest, and all of them sum to the
# metric. **What do you expect?** Will the head that detects harm have a large direct contribution?

# %%
cache = model.cache(tokens, ["resid", "head_out"])
norm = made.model.model.norm
mine = logit_attribution(
    cache.head_out,
    cache.resid[-1],
    norm.weight.detach(),
    norm.variance_epsilon,
    model.W_U.detach(),
    metric.refusal_ids[0],
    metric.comply_ids[0],
)
theirs = ms.direct_logit_attribution(model, tokens, metric, progress=False)
print("largest difference from the package:", f"{(mine - theirs.heads).abs().max():.1e}")
print(f"metric {theirs.total.mean():.2f}; all heads together {theirs.heads.sum((0, 1)).mean():.2f}")
print(f"{detection}, which detects harm: {mine[detection.layer, detection.index].mean():.3f}")
print("MLPs:", [round(value, 2) for value in theirs.mlps.mean(-1).tolist()])
