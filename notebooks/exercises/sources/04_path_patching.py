# %% [markdown]
# # Exercises 04 · Path patching by hand
#
# These exercises go with notebook 04 of the course. Activation patching says that a part matters. Path patching says by
# which way. You compute what a sender changes, how far the change goes straight to the logits, and what the MLPs on the
# way make of it.
#
# Everything here runs at once, on a model with four layers whose refusal circuit was written into its weights.

# %%
from collections.abc import Callable

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

import mechsafety as ms
from mechsafety.teaching import checks

made = ms.testbed.planted(seed=3)
model = ms.load_model((made.model, made.tokenizer))
metric = ms.RefusalLogOdds.of(model, ["Sorry"], ["Sure"])  # the logit of Sorry minus that of Sure
pairs = made.pairs.sample(8)
tokens = model.tokenize_pairs(pairs)
sites = ["resid", "z", "mlp_out"]
harmful, harmless = (model.cache(side, sites) for side in (tokens.harmful, tokens.harmless))

# %% [markdown]
# ## 1. What does a sender change?
#
# The *base* run is the one that is edited. A *sender* is a part that takes its value from the *source* run. If the
# sender is a head, the residual stream changes by
#
# `change = (z_source - z_base) W_O`
#
# Here `z` are the head's mixed values, and `W_O` are its output weights.


# %% tags=["exercise"] difficulty="easy" minutes=10
def sender_change(
    base: Float[Tensor, "batch pos head d_head"],
    source: Float[Tensor, "batch pos head d_head"],
    W_O: Float[Tensor, "head d_head d_model"],
) -> Float[Tensor, "head batch pos d_model"]:
    """Change of the residual stream when each head of a layer, alone, takes its value from the source run.

    Args:
        base: Heads' mixed values in the base run.
        source: The same in the source run.
        W_O: Output weights of each head.
    """
    return einsum(source - base, W_O, "batch pos head d_head, head d_head d_model -> head batch pos d_model")


# %% [markdown] tags=["hint"]
# What the head writes in the base run is in the stream already. Only the difference is new.

# %% [markdown] tags=["hint"]
# Subtract first, then multiply. One `einsum` keeps the heads apart and moves their axis to the front.

# %%
checks.sender_change(sender_change)

# %% [markdown]
# ## 2. Straight to the logits
#
# The shortest path leads from the sender directly to the logits. Everything between stays as it was in the base run:
# attention and MLPs are *frozen*. The final stream is then the base's plus the change, and the metric changes by
#
# `m(N(x + change)) - m(N(x))`
#
# Here `x` is the base run's final stream at the last position, `N` the final norm, and `m` the difference of the two
# logits. The norm sees the changed stream, so its scale changes as well.


# %% tags=["exercise"] difficulty="medium" minutes=15
def direct_path(
    resid: Float[Tensor, "batch d_model"],
    change: Float[Tensor, "head batch d_model"],
    weight: Float[Tensor, " d_model"],
    eps: float,
    W_U: Float[Tensor, "d_model d_vocab"],
    refuse: int,
    comply: int,
) -> Float[Tensor, "head batch"]:
    """Change of the logit difference when each head's change goes straight to the logits.

    Args:
        resid: The base run's stream at the last position, which the final norm reads.
        change: What each head changes there.
        weight: Weight of the final norm, an RMSNorm.
        eps: What the norm adds to the mean square.
        W_U: Unembedding weights.
        refuse: Id of the refusing token, whose logit counts positive.
        comply: Id of the complying token, whose logit counts negative.
    """

    def metric(stream: Tensor) -> Tensor:
        scale = (stream.square().mean(dim=-1, keepdim=True) + eps).sqrt()
        return stream / scale * weight @ (W_U[:, refuse] - W_U[:, comply])

    return metric(resid + change) - metric(resid)


# %% [markdown] tags=["hint"]
# Write the metric of a stream as a small function of its own, and call it twice.

# %% [markdown] tags=["hint"]
# `resid + change` broadcasts to `[head, batch, d_model]`. The scale must come from this sum, not from `resid`.

# %%
checks.direct_path(direct_path)

# %%
layer, norm = 3, made.model.model.norm
z = [rearrange(run.z[layer], "head batch pos d_head -> batch pos head d_head") for run in (harmful, harmless)]
changes = sender_change(*z, model.W_O(layer).detach())
mine = direct_path(
    harmful.resid[-1][:, -1],
    changes[:, :, -1],
    norm.weight.detach(),
    norm.variance_epsilon,
    model.W_U.detach(),
    metric.refusal_ids[0],
    metric.comply_ids[0],
)
senders = [ms.Node("head", layer, head) for head in range(model.n_heads)]
theirs = ms.path_patching(model, pairs, metric, senders=senders, mlp="freeze", progress=False)
# the package counts a fall of the metric in the harmful run as positive: a move towards the harmless run
print("largest difference from the package:", f"{(mine + theirs.changes[:, 0]).abs().max():.1e}")

# %% [markdown]
# ## 3. By way of the MLPs
#
# The paper that introduced path patching freezes attention only. MLPs between the sender and the receiver *recompute*:
# they read the changed stream and change it further. Attention moves nothing between positions while it is frozen, so
# all of this happens at each position by itself.
#
# A layer computes attention first and then its MLP. A head of layer 2 therefore reaches the MLP of layer 2 and those of
# all later layers. To the change that has built up so far, the MLP of layer `k` adds
#
# `MLP_k(x_k + change) - MLP_k(x_k)`
#
# Here `x_k` is what that MLP reads in the base run.


# %% tags=["exercise"] difficulty="hard" minutes=20
def carry_through_mlps(
    change: Float[Tensor, "batch pos d_model"],
    layer: int,
    resid_mid: Float[Tensor, "layer batch pos d_model"],
    mlp: Callable[[int, Tensor], Tensor],
) -> Float[Tensor, "batch pos d_model"]:
    """Change of the final residual stream, with attention frozen and the MLPs recomputed.

    Args:
        change: What the sender, a head, changes in the residual stream.
        layer: The sender's layer.
        resid_mid: What each layer's MLP reads in the base run.
        mlp: Function of a layer and what its MLP reads, `mlp(layer, resid)`. It gives what the MLP adds to the stream,
            its norm included.
    """
    for later in range(layer, len(resid_mid)):
        read = resid_mid[later]
        change = change + mlp(later, read + change) - mlp(later, read)
    return change


# %% [markdown] tags=["hint"]
# Go through the layers from the sender's own to the last, and keep one running change.

# %% [markdown] tags=["hint"]
# In each layer, add `mlp(k, resid_mid[k] + change) - mlp(k, resid_mid[k])` to the change. The next layer reads the
# grown change. The sender's own change is part of the result.

# %%
checks.carry_through_mlps(carry_through_mlps)

# %% [markdown]
# **What do you expect?** One head carries the decision to the last token, where MLP neurons write the refusal. What is
# its effect with the MLPs frozen, and what with the MLPs recomputed?

# %%
head = next(node for node, role in made.truth.roles.items() if role == "decision")
for how in ("freeze", "recompute"):
    found = ms.path_patching(model, pairs, metric, senders=[head], mlp=how, progress=False)
    print(f"{head} -> logits, MLPs {how}: {found.effects[0, 0]:+.3f} of the gap")

z = [rearrange(run.z[head.layer], "head batch pos d_head -> batch pos head d_head") for run in (harmful, harmless)]
sent = sender_change(*z, model.W_O(head.layer).detach())[head.index]
resid_mid = harmful.resid[1:] - harmful.mlp_out
with torch.no_grad():
    arrived = carry_through_mlps(sent, head.layer, resid_mid, model.mlp)
sizes = [change[:, -1].norm(dim=-1).mean() for change in (sent, arrived)]
print(f"length of the change at the last token: {sizes[0]:.2f} as it is sent, {sizes[1]:.2f} as it arrives")
