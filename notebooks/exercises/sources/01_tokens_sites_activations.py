# %% [markdown]
# # Exercises 01 · Tokens, sites, activations
#
# These exercises go with notebook 01 of the course. You write three functions that every later analysis needs: where a
# token stands, what a span of tokens looks like inside the model, and what each attention head writes.
#
# Everything here runs at once, on a model with four layers whose refusal circuit was written into its weights.

# %%
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

import mechsafety as ms
from mechsafety.teaching import checks

made = ms.testbed.planted(seed=3)
model = ms.load_model((made.model, made.tokenizer))
prompts = [pair.harmful for pair in made.pairs[:6:2]]
tokens = model.tokenize(prompts)

# %% [markdown]
# ## 1. Where does a token stand?
#
# A batch is a rectangle, but prompts have different lengths. mechsafety pads short prompts **on the left**, so that the
# last token of every prompt is in the last column. A mask is True at real tokens and False at padding.
#
# The model must be told at which position of its own prompt each token stands. The first real token of a prompt has
# position 0, whatever its column is. At padding we write 0, because some number has to stand there and no one reads it.
#
# Example: the mask `[False, False, True, True, True]` gives the positions `[0, 0, 0, 1, 2]`.


# %% tags=["exercise"] difficulty="easy" minutes=5
def token_positions(mask: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Position of each token in its own prompt, and 0 at padding.

    Args:
        mask: True at real tokens. Rows are padded on the left.
    """
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


# %% [markdown] tags=["hint"]
# Count real tokens from the left. `cumsum` along the positions does that in one call.

# %% [markdown] tags=["hint"]
# `mask.long().cumsum(dim=1)` is 1 at the first real token and 0 at padding. One subtraction and one `clamp` are left.

# %%
checks.token_positions(token_positions)

# %%
print(tokens.ids)
print(token_positions(tokens.mask))

# %% [markdown]
# ## 2. One vector per prompt and span
#
# A chat prompt has three spans. The *prefix* is what the template writes before the request. The *instruction* is the
# request. The *suffix* is what the template writes after it. We often want one vector per prompt: the mean of the
# residual stream over the tokens of one span.
#
# `mean[b] = sum over t of mask[b, t] * x[b, t] / sum over t of mask[b, t]`
#
# Here `x[b, t]` is the residual stream of prompt `b` at column `t`, and `mask[b, t]` is 1 at the span's tokens and 0
# elsewhere.


# %% tags=["exercise"] difficulty="easy" minutes=10
def span_mean(
    resid: Float[Tensor, "batch pos d_model"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch d_model"]:
    """Mean of the residual stream over the tokens of a span, for each prompt.

    Args:
        resid: Residual stream of a batch of prompts.
        mask: True at the tokens of the span. Each prompt has at least one.
    """
    weights = mask / mask.sum(dim=1, keepdim=True)
    return einsum(resid, weights, "batch pos d_model, batch pos -> batch d_model")


# %% [markdown] tags=["hint"]
# Spans of two prompts differ in length. Each prompt therefore needs its own denominator.

# %% [markdown] tags=["hint"]
# Make weights that sum to 1 in each row: the mask divided by its row's sum. Then the mean is a weighted sum, one
# `einsum`.

# %%
checks.span_mean(span_mean)

# %%
cache = model.cache(tokens, ["resid", "z", "head_out"])
for span in ("prefix", "instruction", "suffix"):
    means = span_mean(cache.resid[1], tokens.span_mask(span))
    print(f"{span:12} mean length of the vectors after one layer: {means.norm(dim=-1).mean():.2f}")

# %% [markdown]
# ## 3. What does each head write?
#
# An attention head mixes values into a vector `z` of `d_head` numbers. It then multiplies `z` by its own part of the
# output weights and adds the product to the residual stream. That product is what the head *writes*.
#
# PyTorch and Hugging Face store the output weights of all heads in one linear layer, `o_proj`. A linear layer stores
# its weight as `[out, in]`. Its input is all heads' `z` side by side, first all numbers of head 0, then all of head
# 1, and so on.


# %% tags=["exercise"] difficulty="medium" minutes=15
def head_outputs(
    z: Float[Tensor, "batch pos head d_head"], weight: Float[Tensor, "d_model head_d_head"]
) -> Float[Tensor, "batch pos head d_model"]:
    """What each head adds to the residual stream.

    Args:
        z: Mixed values of each head.
        weight: Weight of the linear layer `o_proj`. Its second axis is as long as `head` times `d_head`.
    """
    per_head = rearrange(weight, "d_model (head d_head) -> head d_head d_model", head=z.shape[2])
    return einsum(z, per_head, "batch pos head d_head, head d_head d_model -> batch pos head d_model")


# %% [markdown] tags=["hint"]
# First split the weight into one matrix per head. `rearrange` names the axes, so that none can be mixed up.

# %% [markdown] tags=["hint"]
# The pattern of the split is `"d_model (head d_head) -> head d_head d_model"`. Then each head's `z` meets its own
# matrix in one `einsum` that keeps the axis `head`.

# %%
checks.head_outputs(head_outputs)

# %% [markdown]
# The package does the same in `cache.head_out`. Heads of a layer add up to what attention as a whole writes.
#
# **What do you expect** of the heads of layer 0, at the last two tokens of the prompt? One of them was planted to detect
# harm, and writes what it found at the end of the user's turn.

# %%
layer = 0
z = rearrange(cache.z[layer], "head batch pos d_head -> batch pos head d_head")
written = head_outputs(z, made.model.model.layers[layer].self_attn.o_proj.weight)
theirs = rearrange(cache.head_out[layer], "head batch pos d_model -> batch pos head d_model")
print("largest difference from the package:", f"{(written - theirs).abs().max():.1e}")
for column, token in zip((-2, -1), model.token_strings(prompts[0])[-2:], strict=True):
    lengths = written[0, column].norm(dim=-1).tolist()
    print(f"length of what each head writes at {token}:", [round(length, 2) for length in lengths])
