# %% [markdown]
# # Exercises 05 · Safety neurons of an aligned/base pair
#
# These exercises go with notebook 05 of the course. You have two models: a *base* model, and an *aligned* model that
# was made from it by safety training. You find the neurons that the training changed, you draw a fair control, and
# you let the base model speak with the aligned model's neurons.
#
# Everything here runs at once. The aligned model has a refusal circuit that was written into its weights. Its base is
# the same model with the circuit's neurons silenced.

# %%
import copy
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

import mechsafety as ms
from mechsafety.teaching import checks

made = ms.testbed.planted(seed=3)
without = copy.deepcopy(made.model)
with torch.no_grad():
    for node in made.truth.neurons:
        without.model.layers[node.layer].mlp.gate_proj.weight[node.index] = 0
aligned = ms.load_model((made.model, made.tokenizer))
base = ms.load_model((without, made.tokenizer))
prompts = made.pairs.harmful[:8]
for model in (base, aligned):
    print(model.generate(prompts[:1], progress=False))

# %% [markdown]
# ## 1. How much did each neuron change?
#
# A *neuron* is one input of an MLP's output weights. Both models read the same tokens. The change score of Chen et al.
# (2024) is a root mean square over all tokens of all prompts together:
#
# `score = sqrt(mean over tokens of (a_base - a_aligned)²)`
#
# Here `a_base` and `a_aligned` are the neuron's activation in the two models. Padding is no token.


# %% tags=["exercise"] difficulty="easy" minutes=10
def change_scores(
    base: Float[Tensor, "layer batch pos d_mlp"],
    aligned: Float[Tensor, "layer batch pos d_mlp"],
    mask: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "layer d_mlp"]:
    """Root mean square of each neuron's change, pooled over the tokens of all prompts.

    Args:
        base: Neurons of the base model.
        aligned: Neurons of the aligned model on the same tokens.
        mask: True at the tokens that count.
    """
    squares = (base - aligned).square() * rearrange(mask, "batch pos -> batch pos 1")
    return (squares.sum(dim=(1, 2)) / mask.sum()).sqrt()


# %% [markdown] tags=["hint"]
# The order is: subtract, square, average over the tokens that count, take the root.

# %% [markdown] tags=["hint"]
# Set the squares at padding to 0 with the mask, add up over `batch` and `pos`, and divide by the number of True values
# in the mask. `values[:, mask]` works as well: it keeps the tokens that count.

# %%
checks.change_scores(change_scores)

# %%
tokens = base.tokenize(prompts)
neurons = [model.cache(tokens, ["neurons"]).neurons for model in (base, aligned)]
scores = change_scores(*neurons, tokens.mask)
theirs = ms.safety_neurons(aligned, base, prompts, positions="prompt", progress=False)
print("largest difference from the package:", f"{(scores - theirs.change).abs().max():.1e}")
print("highest scores:", ", ".join(map(str, theirs.ranked(6))))
print("the circuit:   ", ", ".join(map(str, made.truth.neurons)))

# %% [markdown]
# ## 2. A control that is matched by layer
#
# Suppose that patching the top neurons restores refusal. Would *any* neurons do? A control answers that. It has as
# many neurons in each layer as the chosen set, and none of the chosen ones. Layers must match, because neurons of
# late layers act on the logits more directly than those of early layers.
#
# So that your control can be checked, the random numbers are given: `noise` has one per neuron. In each layer, take the
# neurons with the largest numbers among those that are not chosen.


# %% tags=["exercise"] difficulty="medium" minutes=15
def matched_control(
    chosen: Bool[Tensor, "layer d_mlp"], noise: Float[Tensor, "layer d_mlp"]
) -> Bool[Tensor, "layer d_mlp"]:
    """A random set with as many neurons in each layer as the chosen set, and no neuron of it.

    Args:
        chosen: The chosen neurons; in each layer at most half of all.
        noise: A random number from 0 to 1 for each neuron. The largest ones of free neurons win.
    """
    control = torch.zeros_like(chosen)
    free = noise.masked_fill(chosen, -torch.inf)
    for layer, count in enumerate(chosen.sum(dim=1).tolist()):
        control[layer, free[layer].topk(count).indices] = True
    return control


# %% [markdown] tags=["hint"]
# Make the chosen neurons unable to win: give them a random number below all others.

# %% [markdown] tags=["hint"]
# Then go layer by layer. `free[layer].topk(count).indices` are the winners, where `count` is the number of chosen
# neurons in that layer.

# %%
checks.matched_control(matched_control)

# %%
chosen = theirs.top(count=len(made.truth.neurons))
control = matched_control(chosen, torch.rand(chosen.shape, generator=torch.Generator().manual_seed(0)))
print("neurons per layer:", chosen.sum(1).tolist(), control.sum(1).tolist(), "| shared:", int((chosen & control).sum()))

# %% [markdown]
# ## 3. Dynamic activation patching
#
# Does the base model refuse if it has the aligned model's values in those neurons? While it writes a reply, both models
# must read the same tokens. The steps for every new token are:
#
# 1. The aligned model reads the prompt and the reply so far.
# 2. The base model reads the same tokens. Its chosen neurons take the aligned model's values at every position.
# 3. The base model's most probable next token is appended to the reply.
#
# The reply ends after `length` tokens, or with the token `end`, which still belongs to it.
#
# Both models are given as functions: `logits, neurons = model(ids)` or `model(ids, chosen, values)`.


# %% tags=["exercise"] difficulty="hard" minutes=20
def dynamic_reply(
    base: Callable[..., tuple[Tensor, Tensor]],
    aligned: Callable[..., tuple[Tensor, Tensor]],
    chosen: Bool[Tensor, "layer d_mlp"],
    prompt: Sequence[int],
    length: int,
    end: int,
) -> list[int]:
    """Greedy reply of the base model with some neurons taken from the aligned model.

    Args:
        base: Function of token ids. It gives the next-token logits `[d_vocab]` and all neurons `[layer, pos, d_mlp]`.
            `base(ids, chosen, values)` first puts `values` in the place of the chosen neurons.
        aligned: The same function of the aligned model.
        chosen: The neurons that are taken.
        prompt: Token ids of the prompt.
        length: Largest number of tokens in the reply.
        end: Token that ends a reply.

    Returns:
        Token ids of the reply, without the prompt.
    """
    reply: list[int] = []
    while len(reply) < length and end not in reply:
        ids = [*prompt, *reply]
        _, values = aligned(ids)
        logits, _ = base(ids, chosen, values)
        reply.append(int(logits.argmax()))
    return reply


# %% [markdown] tags=["hint"]
# Write a loop that builds the list of reply tokens. In each step both models read `[*prompt, *reply]`.

# %% [markdown] tags=["hint"]
# From the aligned model you need the neurons, not the logits. From the base model you need the logits under the patch.
# Their `argmax` is the next token.

# %%
checks.dynamic_reply(dynamic_reply)

# %% [markdown]
# The package does this for many prompts at once. **What do you expect** of the chosen neurons, of the control, and of
# all neurons?

# %%
for name, mask in (("chosen", chosen), ("control", control), ("all", torch.ones_like(chosen))):
    found = ms.neurons.dynamic_patching(base, aligned, mask, prompts, judge=None, max_new_tokens=10, progress=False)
    refused = sum(map(ms.replies.is_refusal, found.replies))
    print(f"{name:8} {int(mask.sum()):4d} neurons: {refused} of {len(prompts)} refused, such as {found.replies[0]!r}")
