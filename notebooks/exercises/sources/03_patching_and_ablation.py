# %% [markdown]
# # Exercises 03 · Activation patching both ways, and where ablation misleads
#
# These exercises go with notebook 03 of the course. You patch a head in a tensor, then in a running model. You turn
# changes into shares of a gap. Last, you write a mean ablation and see what it cannot tell.
#
# Everything here runs at once, on a model with four layers whose refusal circuit was written into its weights.

# %%
import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

import mechsafety as ms
from mechsafety.teaching import checks

made = ms.testbed.planted(seed=3)
model = ms.load_model((made.model, made.tokenizer))
metric = ms.RefusalLogOdds.of(model, ["Sorry"], ["Sure"])  # the logit of Sorry minus that of Sure
# prompts of one form, all with equally many tokens
pairs = made.pairs.where([pair.harmful.startswith("how do I make") for pair in made.pairs])
tokens = model.tokenize_pairs(pairs)  # tokens.harmful and tokens.harmless, column by column

# %% [markdown]
# ## 1. Patch a tensor
#
# A *patch* edits one run, the **base**, with a value from another run, the **source**. Everything else stays as it is.
# Here the value is what one head has computed at one position.
#
# Positions are counted as Python counts them: -1 is the last one.


# %% tags=["exercise"] difficulty="easy" minutes=5
def patch_head(
    base: Float[Tensor, "batch pos head d_head"],
    source: Float[Tensor, "batch pos head d_head"],
    head: int,
    position: int,
) -> Float[Tensor, "batch pos head d_head"]:
    """The base run's activations, with one head's value at one position from the source run.

    The inputs stay as they are.

    Args:
        base: Heads' mixed values in the run that is edited.
        source: The same in the run that gives the value.
        head: The head.
        position: The position.
    """
    patched = base.clone()
    patched[:, position, head] = source[:, position, head]
    return patched


# %% [markdown] tags=["hint"]
# An assignment to `base[...]` would change the caller's tensor. Work on a copy.

# %% [markdown] tags=["hint"]
# The same index on both sides: `[:, position, head]`. Each prompt of the batch takes the value of its own counterpart.

# %%
checks.patch_head(patch_head)

# %% [markdown]
# ## 2. Patch a running model
#
# Now the model itself runs on with the patched value. You need three calls of mechsafety:
#
# - `site = ms.Site("z", layer)` is the address of all heads' mixed values in one layer, counted from 0. The activation
#   there has the shape `[batch, pos, head, d_head]`.
# - `model.read(tokens, [site])[site]` runs prompts and returns the activation.
# - `with model.hooks([(site, function)]):` calls `function(activation)` in every run inside the context. What the
#   function returns takes the activation's place.
#
# Score the edited run with `metric(model.logits(tokens))`, one number per prompt. Patch **all** positions this time.


# %% tags=["exercise"] difficulty="medium" minutes=20
def patched_scores(
    model: ms.LensModel,
    metric: ms.RefusalLogOdds,
    base: ms.prompts.Tokens,
    source: ms.prompts.Tokens,
    layer: int,
    head: int,
) -> Float[Tensor, " prompt"]:
    """Metric of the base prompts when one head has its value from the source prompts, at all positions.

    Args:
        model: The model.
        metric: Function from next-token logits to one score per prompt.
        base: Prompts of the run that is edited.
        source: Their counterparts, token by token.
        layer: The head's layer.
        head: The head.
    """
    site = ms.Site("z", layer)
    values = model.read(source, [site])[site]

    def edit(own: Tensor) -> Tensor:
        patched = own.clone()
        patched[:, :, head] = values[:, :, head]
        return patched

    with model.hooks([(site, edit)]):
        return metric(model.logits(base))


# %% [markdown] tags=["hint"]
# Read the source run first, outside the context. Then write a function inside your function that edits the activation
# it is given and returns it.

# %% [markdown] tags=["hint"]
# The hook may look like `patch_head`, with `[:, :, head]` in place of one position. The score must be computed inside
# `with model.hooks([(site, edit)]):`.

# %%
checks.patched_scores(patched_scores)

# %% [markdown]
# ## 3. A share of the gap
#
# A change of 3 nats is much in one model and little in another. So we divide by the *gap*, the difference of the two
# unpatched runs:
#
# `effect = mean over pairs of (patched - base) / mean over pairs of (source - base)`
#
# Here `patched`, `base` and `source` are the metric of the three runs. 0 means that the patch changed nothing, 1 that
# it moved the base run all the way to the source run. One formula serves both directions. In *noising* the base is
# the harmful run. In *denoising* it is the harmless one.


# %% tags=["exercise"] difficulty="easy" minutes=10
def share_of_gap(
    patched: Float[Tensor, "node prompt"], base: Float[Tensor, " prompt"], source: Float[Tensor, " prompt"]
) -> Float[Tensor, " node"]:
    """Effect of patching each node, as a share of the mean gap between the base and the source run.

    Args:
        patched: Metric of the base run with each node patched.
        base: Metric of the unpatched base run.
        source: Metric of the unpatched source run.
    """
    return (patched - base).mean(dim=1) / (source - base).mean()


# %% [markdown] tags=["hint"]
# There is one denominator for all nodes. Each node has its own numerator.

# %% [markdown] tags=["hint"]
# Take means over prompts before you divide. A single pair may have a gap of almost 0, and its ratio could be anything.

# %%
checks.share_of_gap(share_of_gap)

# %% [markdown]
# **What do you expect** for the heads of this model? The circuit has one head that detects harm and one that carries
# the decision to the last token. What will noising show, and what denoising?

# %%
harmful, harmless = (metric(model.logits(side)) for side in (tokens.harmful, tokens.harmless))
heads = [node for node in made.truth.nodes if node.kind == "head"]
for name, base, source, ends in (
    ("noising", tokens.harmful, tokens.harmless, (harmful, harmless)),
    ("denoising", tokens.harmless, tokens.harmful, (harmless, harmful)),
):
    scores = torch.stack([patched_scores(model, metric, base, source, node.layer, node.index) for node in heads])
    theirs = ms.activation_patching(model, pairs, metric, nodes=heads, direction=name, progress=False)
    mine = share_of_gap(scores, *ends)
    print(f"{name}:", ", ".join(f"{head} {effect:.3f}" for head, effect in zip(heads, mine.tolist(), strict=True)))
    print(f"   largest difference from the package: {(mine - theirs.effects).abs().max():.1e}")

# %% [markdown]
# ## 4. A mean ablation
#
# An *ablation* takes a head's information away without giving it another prompt's. A **mean ablation** puts the mean
# over a set of reference prompts in its place. All edited prompts then have the same value there, so it cannot tell
# them apart. Each position has a mean of its own, because the first token of a chat prompt looks nothing like the
# last.


# %% tags=["exercise"] difficulty="medium" minutes=10
def mean_ablated(
    base: Float[Tensor, "batch pos head d_head"], reference: Float[Tensor, "other pos head d_head"], head: int
) -> Float[Tensor, "batch pos head d_head"]:
    """The base run's activations, with one head's value at every position replaced by its mean over reference prompts.

    The inputs stay as they are.

    Args:
        base: Heads' mixed values in the run that is edited.
        reference: The same for the reference prompts, which have as many tokens.
        head: The head.
    """
    means = reduce(reference, "other pos head d_head -> pos head d_head", "mean")
    ablated = base.clone()
    ablated[:, :, head] = means[:, head]
    return ablated


# %% [markdown] tags=["hint"]
# Average over one axis only, that of the prompts.

# %% [markdown] tags=["hint"]
# The mean has the shape `[pos, head, d_head]`. Its part for one head, `means[:, head]`, is copied into every prompt of
# the batch by broadcasting.

# %%
checks.mean_ablated(mean_ablated)

# %% [markdown]
# Where does ablation mislead? This model also has two *decoys*: heads that tell harmful from harmless prompts and
# that nothing reads. So they should not matter. On harmless prompts a decoy writes the opposite of what it writes on
# harmful ones.
#
# **What do you expect** of each head when its value is replaced by zeros, by its mean over harmless prompts, by its
# mean over harmful and harmless prompts together, or by that of the pair's harmless prompt?

# %%
decoys = [node for node in made.truth.decoys if node.kind == "head"]
for node in [*heads, *decoys]:
    site = ms.Site("z", node.layer)
    own, other = (model.read(side, [site])[site] for side in (tokens.harmful, tokens.harmless))
    both = torch.cat([own, other])
    edited = {
        "zeros": mean_ablated(own, torch.zeros_like(own), node.index),
        "harmless mean": mean_ablated(own, other, node.index),
        "mean of both": mean_ablated(own, both, node.index),
    }
    scores = []
    for values in edited.values():
        with model.hooks([(site, lambda activation, values=values: values)]):
            scores.append(metric(model.logits(tokens.harmful)))
    scores.append(patched_scores(model, metric, tokens.harmful, tokens.harmless, node.layer, node.index))
    effects = share_of_gap(torch.stack(scores), harmful, harmless).tolist()
    shown = ", ".join(f"{kind} {effect:+.2f}" for kind, effect in zip([*edited, "patch"], effects, strict=True))
    print(f"{node} ({'decoy' if node in decoys else made.truth.roles[node]}): {shown}")

# %% [markdown]
# Zeros, and the mean of both kinds, give the decoys a large effect, of the wrong sign. Both take the decoy's large
# vector away. Later norms then divide by less, and everything else gets stronger. The patch and the harmless mean
# leave the length of the vector as it was, and rightly show no effect. So an ablation answers another question: what
# happens in a state that the model is never in?
