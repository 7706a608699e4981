# %% [markdown]
# # Exercises 08 · Planted-model detective
#
# These exercises go with notebook 08 of the course. A *planted* model has a refusal circuit that was written into its
# weights, so that we know the truth. You write the scores that compare a finding with the truth, and the measurement
# that finds backups.
#
# Everything here runs at once.

# %%
from collections.abc import Callable, Sequence, Set

import torch
from jaxtyping import Bool, Float
from torch import Tensor

import mechsafety as ms
from mechsafety.teaching import checks

made = ms.testbed.planted(seed=3, backups=1)
model = ms.load_model((made.model, made.tokenizer))
metric = ms.RefusalLogOdds.of(model, ["Sorry"], ["Sure"])  # the logit of Sorry minus that of Sure
pairs = made.pairs.sample(6)
# how much each head and MLP matters, exact: the share of the gap that patching it alone takes away
patched = ms.activation_patching(model, pairs, metric, progress=False)
patched

# %% [markdown]
# ## 1. Score a circuit
#
# You claim a set of parts. Three numbers compare it with the true set:
#
# - *precision*: the share of what you found that is true;
# - *recall*: the share of what is true that you found;
# - *F1*: their harmonic mean, `2 * precision * recall / (precision + recall)`.


# %% tags=["exercise"] difficulty="easy" minutes=10
def circuit_scores(found: Set[ms.Node], true: Set[ms.Node]) -> Float[Tensor, " 3"]:
    """Precision, recall and F1 of a found set.

    Args:
        found: Parts that were found.
        true: Parts of the true circuit. At least one of them was found.
    """
    hits = len(found & true)
    precision, recall = hits / len(found), hits / len(true)
    return torch.tensor([precision, recall, 2 * precision * recall / (precision + recall)])


# %% [markdown] tags=["hint"]
# `found & true` are the hits.

# %% [markdown] tags=["hint"]
# Precision divides the number of hits by `len(found)`, recall by `len(true)`.

# %%
checks.circuit_scores(circuit_scores)

# %%
found = {node for node, effect in zip(patched.nodes, patched.effects.tolist(), strict=True) if abs(effect) > 0.1}
print("found:", ", ".join(sorted(map(str, found))))
precision, recall, f1 = circuit_scores(found, set(made.truth.nodes))
print(f"precision {precision:.2f}, recall {recall:.2f}, F1 {f1:.2f}")

# %% [markdown]
# ## 2. Score a ranking
#
# The threshold 0.1 was a choice. *Average precision* needs none. Rank all parts by **absolute** score, the largest
# first: a part that works against refusal belongs to the mechanism too. Go down the ranking. At every true part, note
# the precision so far: the share of the parts up to this rank that are true. Average precision is the mean of these
# notes.
#
# Example: if the true parts have the ranks 1 and 4, it is `(1/1 + 2/4) / 2 = 0.75`.


# %% tags=["exercise"] difficulty="medium" minutes=15
def average_precision(scores: Float[Tensor, " part"], is_true: Bool[Tensor, " part"]) -> Float[Tensor, ""]:
    """Average precision of a ranking by absolute score.

    Args:
        scores: Score of each part. No two have the same absolute value.
        is_true: Whether each part belongs to the true circuit.
    """
    ranked = is_true[scores.abs().argsort(descending=True)]
    precision = ranked.cumsum(dim=0) / torch.arange(1, len(ranked) + 1)
    return precision[ranked].mean()


# %% [markdown] tags=["hint"]
# First put `is_true` into the order of the ranking, with `argsort`.

# %% [markdown] tags=["hint"]
# `cumsum` counts the true parts up to each rank, and `torch.arange(1, n + 1)` counts all parts. Their quotient is the
# precision at each rank. Average it where the ranked part is true.

# %%
checks.average_precision(average_precision)

# %%
is_true = torch.tensor([node in made.truth.nodes for node in patched.nodes])
mine = average_precision(patched.effects, is_true)
theirs = ms.testbed.score(patched, made.truth).nodes.average_precision
print(f"average precision {float(mine):.3f}, the package says {theirs:.3f}")

# %% [markdown]
# ## 3. Find the backups
#
# Two heads of this model do the same work. Patch one of them, and the other still does it: each seems not to matter.
# Only *together* do they show what they do. The **joint excess** of two parts a and b is
#
# `excess = effect of a and b together - effect of a alone - effect of b alone`
#
# An *effect* is the share of the gap that is lost by a patch. The excess is large for backups of each other. It is
# below zero for two parts on one path, because each alone takes away what both do.


# %% tags=["exercise"] difficulty="medium" minutes=15
def joint_excess(effect: Callable[[Sequence[ms.Node]], float], nodes: Sequence[ms.Node]) -> Float[Tensor, "node other"]:
    """What patching two nodes together does beyond what each does alone; 0 on the diagonal.

    Args:
        effect: Share of the gap that is lost when all of some nodes are patched.
        nodes: The nodes.
    """
    alone = [effect([node]) for node in nodes]
    excess = torch.zeros(len(nodes), len(nodes))
    for i in range(len(nodes)):
        for j in range(i):
            excess[i, j] = excess[j, i] = effect([nodes[i], nodes[j]]) - alone[i] - alone[j]
    return excess


# %% [markdown] tags=["hint"]
# Measure every node alone first. Then go through the pairs of nodes.

# %% [markdown] tags=["hint"]
# The matrix is symmetric: `excess[i, j] = excess[j, i] = ...`. Two loops, `for i in range(n)` and `for j in range(i)`,
# visit each pair once and leave the diagonal at 0.

# %%
checks.joint_excess(joint_excess)

# %% [markdown]
# **What do you expect**: which two heads stand out? Then reveal the truth.

# %%
meter = ms.circuits.FaithfulnessMeter(model, ms.patching.pair_runs(model, pairs), metric)
heads = [node for node in meter.parts if node.kind == "head"]
excess = joint_excess(lambda nodes: 1 - meter.without([list(nodes)])[0], heads)
row, column = divmod(int(excess.argmax()), len(heads))
print(f"largest joint excess: {heads[row]} and {heads[column]}, {excess.max():.2f}")
print(
    f"alone they take away {patched.effects[patched.nodes.index(heads[row])]:.3f} and "
    f"{patched.effects[patched.nodes.index(heads[column])]:.3f}"
)

# %%
print("backups:", [tuple(map(str, group)) for group in made.truth.backups])
print("decoys: ", [str(node) for node in made.truth.decoys])
print("circuit:", {str(node): made.truth.roles[node] for node in made.truth.nodes})
