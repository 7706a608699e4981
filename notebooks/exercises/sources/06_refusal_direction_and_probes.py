# %% [markdown]
# # Exercises 06 · The refusal direction, and probes with their controls
#
# These exercises go with notebook 06 of the course. You compute a direction of the residual stream, you remove it, and
# you measure a probe together with a control that shows what the measurement is worth.
#
# Everything here runs at once, on a model with four layers whose refusal circuit was written into its weights.

# %%
import torch
from einops import einsum
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import mechsafety as ms
from mechsafety.teaching import checks

made = ms.testbed.planted(seed=3)
model = ms.load_model((made.model, made.tokenizer))
metric = ms.RefusalLogOdds.of(model, ["Sorry"], ["Sure"])  # the logit of Sorry minus that of Sure
pairs = made.pairs

# %% [markdown]
# ## 1. A difference of means
#
# Arditi et al. (2024) find refusal along one direction of the residual stream: the mean over harmful prompts minus
# the mean over harmless prompts, at one layer and one position. We read at the **last** position, where the model
# decides how to begin its reply. The two sets need not have equally many prompts.
#
# `direction = r / |r|`, with `r = mean of x over harmful prompts - mean of x over harmless prompts`
#
# Here `x` is the residual stream of a prompt, and `|r|` is the length of `r`.


# %% tags=["exercise"] difficulty="easy" minutes=10
def difference_direction(
    harmful: Float[Tensor, "prompt pos d_model"], harmless: Float[Tensor, "other pos2 d_model"]
) -> Float[Tensor, " d_model"]:
    """Unit vector from the mean of harmless to the mean of harmful prompts, at the last position.

    Args:
        harmful: Residual stream at one layer on harmful prompts, padded on the left.
        harmless: The same on harmless prompts.
    """
    difference = harmful[:, -1].mean(dim=0) - harmless[:, -1].mean(dim=0)
    return difference / difference.norm()


# %% [markdown] tags=["hint"]
# Select the last position first. Then two means over prompts, and one difference.

# %% [markdown] tags=["hint"]
# Only the difference is brought to length 1, at the very end: `difference / difference.norm()`.

# %%
checks.difference_direction(difference_direction)

# %% [markdown]
# Is there such a direction in this model? What enters layer 0 is the same in all prompts at the last token, so we begin
# behind that layer.

# %%
streams = [model.cache(side, ["resid"]).resid for side in (pairs.harmful, pairs.harmless)]
# stream[layer + 1] is what a layer hands on
directions = {layer: difference_direction(*(stream[layer + 1] for stream in streams)) for layer in range(4)}
for layer, direction in directions.items():
    harmful, harmless = (stream[layer + 1][:, -1] @ direction for stream in streams)
    print(
        f"behind layer {layer}: harmful prompts lie at {harmful.mean():+.2f} ± {harmful.std():.2f} along it, "
        f"harmless prompts at {harmless.mean():+.2f} ± {harmless.std():.2f}"
    )

# %% [markdown]
# ## 2. Remove a direction
#
# To ask whether the model *uses* the direction, take it away. Every activation `x` loses its own part along the
# direction and keeps the rest:
#
# `x - (x · u) u`, with `u = r / |r|`
#
# The vector `r` that you are given may have any length.


# %% tags=["exercise"] difficulty="easy" minutes=10
def remove_direction(
    x: Float[Tensor, "prompt pos d_model"], direction: Float[Tensor, " d_model"]
) -> Float[Tensor, "prompt pos d_model"]:
    """Activations without their part along a direction.

    Args:
        x: Activations.
        direction: A vector that is not zero, of any length.
    """
    unit = direction / direction.norm()
    along = einsum(x, unit, "prompt pos d_model, d_model -> prompt pos")
    return x - einsum(along, unit, "prompt pos, d_model -> prompt pos d_model")


# %% [markdown] tags=["hint"]
# The dot product `x @ unit` is one number per activation: how far it lies along the direction.

# %% [markdown] tags=["hint"]
# That number times the unit vector is the part to subtract. The result has no part along the direction left: its dot
# product with it is 0.

# %%
checks.remove_direction(remove_direction)

# %% [markdown]
# At every layer the two kinds of prompts lie far apart. The package removes a direction from everything that is
# written to the stream: `project_out`. **What do you expect** of each of your directions, and of a random one?
# Refusal gets weaker where the metric falls.

# %%
random = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
print(f"intact: metric {metric.scores(model, pairs.harmful).mean():+.2f}")
for name, vector in (
    {f"direction behind layer {layer}": one for layer, one in directions.items()} | {"random direction": random}
).items():
    with ms.interventions.project_out(model, vector):
        print(f"without the {name}: metric {metric.scores(model, pairs.harmful).mean():+.2f}")

# %% [markdown]
# Only the direction behind the last layer carries refusal. The others separate the prompts as clearly, and without them
# the model refuses **more**. They come from a *decoy*: a head that tells harmful from harmless prompts and that nothing
# reads. Without its large vectors, later norms divide by less, and the neurons that write the refusal get stronger. A
# separation is no cause.
#
# How do we know that the decoy makes them? Ablate it, and look whether the difference is still there. The package's own
# search is not misled: it tries every position of the template and chooses by what removal does.

# %%
decoy = next(node for node in made.truth.decoys if node.kind == "head")
control = ms.Node("head", decoy.layer, (decoy.index + 1) % model.n_heads)
for name, node in (("the decoy", decoy), ("another head of its layer", control)):
    with ms.ablate(model, node, prompts=pairs.harmless):
        means = [model.cache(side, ["resid"]).resid[1:, :, -1].mean(1) for side in (pairs.harmful, pairs.harmless)]
    sizes = (means[0] - means[1]).norm(dim=-1).tolist()
    print(f"without {name}: length of the difference behind each layer", [round(size, 2) for size in sizes])
print(ms.refusal_direction(model, pairs, metric, progress=False))

# %% [markdown]
# ## 3. A probe and its control
#
# A *probe* is a classifier that reads a label from activations. A high accuracy alone says little. Two mistakes make it
# too high:
#
# - The probe recognises the **topic** in place of the harm. So hold out whole topics: every prompt is predicted by a
#   probe that has seen no prompt of its topic.
# - With many dimensions, a probe finds something in anything. So run a **control** in the same way on shuffled labels.
#   It is trained on them and scored against them, and should be near chance.
#
# The probe is scikit-learn's logistic regression on scaled data, with its default strength:
# `make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))`.


# %% tags=["exercise"] difficulty="medium" minutes=20
def probe_and_control(
    x: Float[Tensor, "prompt d_model"],
    labels: Int[Tensor, " prompt"],
    shuffled: Int[Tensor, " prompt"],
    topics: Int[Tensor, " prompt"],
) -> Float[Tensor, " 2"]:
    """Accuracy of a probe, and of its control, with whole topics held out.

    Args:
        x: Activations.
        labels: 1 for harmful prompts and 0 for harmless ones.
        shuffled: The same labels in a random order, for the control.
        topics: Number of each prompt's topic.

    Returns:
        Share of prompts whose label is predicted right: of the probe, then of the control.
    """
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    accuracies = []
    for target in (labels, shuffled):
        predicted = cross_val_predict(probe, x.numpy(), target.numpy(), groups=topics.numpy(), cv=LeaveOneGroupOut())
        accuracies.append((torch.from_numpy(predicted) == target).float().mean())
    return torch.stack(accuracies)


# %% [markdown] tags=["hint"]
# Probe and control differ in the labels alone. One loop over `(labels, shuffled)` does both.

# %% [markdown] tags=["hint"]
# `cross_val_predict(probe, x.numpy(), target.numpy(), groups=topics.numpy(), cv=LeaveOneGroupOut())` gives the
# prediction for every prompt from a probe that has not seen its topic.

# %%
checks.probe_and_control(probe_and_control)

# %% [markdown]
# A probe finds information. It does not say that the model uses it. Look at the layers before and behind the head that
# detects harm. (A control a little below 0.5 is usual where folds are few: a label that is rare in the training
# topics is frequent in the one that is held out.)

# %%
topic_names = sorted({pair.topic for pair in pairs})
topics = torch.tensor([topic_names.index(pair.topic) for pair in pairs] * 2)
labels = torch.tensor([1] * len(pairs) + [0] * len(pairs))
shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
detection = next(node for node, role in made.truth.roles.items() if role == "detection")
print(f"{detection} detects harm")
resid = model.cache([*pairs.harmful, *pairs.harmless], ["resid"]).resid[..., -1, :].clone()
for name, x in zip(["embedding", *(f"behind layer {layer}" for layer in range(4))], resid, strict=True):
    accuracy, control = probe_and_control(x, labels, shuffled, topics).tolist()
    print(f"{name}: probe {accuracy:.2f}, control {control:.2f}")
