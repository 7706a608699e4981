# %% [markdown]
# # Exercises 07 · Verifying a circuit
#
# These exercises go with notebook 07 of the course. A circuit is a set of parts, with the claim that they do the
# work. You write the four numbers that test such a claim: faithfulness, completeness, minimality, and a p value
# against random circuits.
#
# Everything here runs at once, on a model with four layers whose refusal circuit was written into its weights.

# %%
from collections.abc import Callable, Sequence, Set

import torch
from jaxtyping import Float
from torch import Tensor

import mechsafety as ms
from mechsafety.teaching import checks

made = ms.testbed.planted(seed=3, backups=1)
model = ms.load_model((made.model, made.tokenizer))
metric = ms.RefusalLogOdds.of(model, ["Sorry"], ["Sure"])  # the logit of Sorry minus that of Sure
runs = ms.patching.pair_runs(model, made.pairs.sample(8))
meter = ms.circuits.FaithfulnessMeter(model, runs, metric)
print(made.truth)

# %% [markdown]
# ## 1. Faithfulness
#
# Run the harmful prompts, but give every part **outside** the circuit C its value from the harmless counterfactual. How
# much of the refusal is left?
#
# `F(C) = (m(C) - m(empty)) / (m(model) - m(empty))`
#
# Here `m(C)` is the mean metric over prompts of that run. `m(model)` is that of the whole model, and `m(empty)` that of
# the empty circuit, where everything is patched. `F` is 0 for the empty circuit and 1 for the whole model.


# %% tags=["exercise"] difficulty="easy" minutes=10
def faithfulness(
    kept: Float[Tensor, "circuit prompt"], full: Float[Tensor, " prompt"], empty: Float[Tensor, " prompt"]
) -> Float[Tensor, " circuit"]:
    """Faithfulness of each circuit.

    Args:
        kept: Metric with everything outside each circuit patched.
        full: Metric of the whole model.
        empty: Metric with everything patched.
    """
    return (kept.mean(dim=1) - empty.mean()) / (full.mean() - empty.mean())


# %% [markdown] tags=["hint"]
# All three means come first. Then one difference is divided by another.

# %% [markdown] tags=["hint"]
# `kept.mean(dim=1)` has one number per circuit. The denominator is one number for all of them.

# %%
checks.faithfulness(faithfulness)

# %%
full, empty = (torch.from_numpy(scores).float() for scores in meter.ends())
circuits = {
    "nothing": [],
    "the circuit": list(made.truth.nodes),
    "its heads": [n for n in made.truth.nodes if n.kind == "head"],
}
kept = torch.from_numpy(meter.kept(list(circuits.values()))).float()
for name, value in zip(circuits, faithfulness(kept, full, empty).tolist(), strict=True):
    print(f"F({name}) = {value:.2f}")


# %%
def faithfulness_of(parts: Set[ms.Node]) -> float:
    """Faithfulness of a set of parts; you will need it below."""
    return meter.faithfulness([list(parts)])[0]


# %% [markdown]
# ## 2. Completeness
#
# A faithful circuit may still lack something, such as a backup that would take over. A complete circuit behaves like
# the model under *any* damage. Take a subset K of the circuit out of both, and compare. The worst subset counts:
#
# `gap = max over K of |F(C without K) - F(M without K)|`
#
# Here M is the set of all parts. A circuit has too many subsets to try them all, so some are given.


# %% tags=["exercise"] difficulty="medium" minutes=15
def completeness_gap(
    faithfulness_of: Callable[[Set[ms.Node]], float],
    model: Set[ms.Node],
    circuit: Set[ms.Node],
    subsets: Sequence[Set[ms.Node]],
) -> float:
    """Largest difference between circuit and model when the same parts leave both.

    Args:
        faithfulness_of: Faithfulness of a set of parts.
        model: All parts of the model.
        circuit: The circuit.
        subsets: Subsets K of the circuit.
    """
    return max(abs(faithfulness_of(circuit - gone) - faithfulness_of(model - gone)) for gone in subsets)


# %% [markdown] tags=["hint"]
# Sets have a minus: `circuit - gone` are the parts of the circuit that are not in `gone`.

# %% [markdown] tags=["hint"]
# For each subset compute the absolute value of one difference. `max(... for gone in subsets)` takes the largest.

# %%
checks.completeness_gap(completeness_gap)

# %% [markdown]
# This model has a backup: two heads do the same work. **What do you expect** of a circuit that has only one of them?

# %%
everything, truth = set(meter.parts), set(made.truth.nodes)
first, second = made.truth.backups[0]
for name, circuit in (("the whole circuit", truth), (f"without {second}", truth - {second})):
    gap = completeness_gap(faithfulness_of, everything, circuit, [set(), {first}])
    print(f"{name}: faithfulness {faithfulness_of(circuit):.2f}, completeness gap {gap:.2f}")

# %% [markdown]
# ## 3. Minimality
#
# Does the circuit need all its parts? The *marginal effect* of a part is what the circuit loses without it:
#
# `F(C) - F(C without the part)`
#
# A part whose marginal effect is like that of a part added at random has no business in the circuit.


# %% tags=["exercise"] difficulty="easy" minutes=10
def marginal_effects(
    faithfulness_of: Callable[[Set[ms.Node]], float], circuit: Sequence[ms.Node]
) -> Float[Tensor, " part"]:
    """What the circuit's faithfulness loses when each of its parts leaves it.

    Args:
        faithfulness_of: Faithfulness of a set of parts.
        circuit: Parts of the circuit, in order.
    """
    whole = set(circuit)
    return torch.tensor([faithfulness_of(whole) - faithfulness_of(whole - {node}) for node in circuit])


# %% [markdown] tags=["hint"]
# Make a set of the circuit, so that one part can be taken out with a minus.

# %% [markdown] tags=["hint"]
# `faithfulness_of(whole) - faithfulness_of(whole - {node})` for each node, collected in a tensor.

# %%
checks.marginal_effects(marginal_effects)

# %%
nodes = made.truth.nodes
for node, effect in zip(nodes, marginal_effects(faithfulness_of, nodes).tolist(), strict=True):
    print(f"{node} ({made.truth.roles[node]}): {effect:+.2f}")

# %% [markdown]
# ## 4. Better than chance?
#
# Draw random circuits with as many heads and MLPs as yours, and measure each. If many of them are as faithful, your
# circuit is nothing special. The p value is the share of draws that are at least as good, where the circuit itself
# counts as one draw:
#
# `p = (1 + number of controls that are at least as good) / (1 + number of controls)`
#
# With 99 controls, p cannot be smaller than 0.01.


# %% tags=["exercise"] difficulty="easy" minutes=5
def control_p(observed: Float[Tensor, ""], controls: Float[Tensor, " control"]) -> float:
    """Chance of a random circuit that is at least as good.

    Args:
        observed: Faithfulness of the circuit.
        controls: Faithfulness of random circuits of its size.
    """
    return (1 + int((controls >= observed).sum())) / (1 + len(controls))


# %% [markdown] tags=["hint"]
# Count with a comparison and a sum: `(controls >= observed).sum()`.

# %% [markdown] tags=["hint"]
# Add 1 above and below the line. A random circuit that equals yours counts against it.

# %%
checks.control_p(control_p)

# %%
generator = torch.Generator().manual_seed(0)
by_kind = {kind: [node for node in meter.parts if node.kind == kind] for kind in ("head", "mlp")}
drawn = []
for _ in range(99):
    circuit = []
    for kind, pool in by_kind.items():
        count = sum(node.kind == kind for node in truth)
        circuit += [pool[k] for k in torch.randperm(len(pool), generator=generator)[:count].tolist()]
    drawn.append(circuit)
controls = torch.tensor(meter.faithfulness(drawn))
observed = torch.tensor(faithfulness_of(truth))
print(f"the circuit: {observed:.2f}; random circuits: mean {controls.mean():.2f}, best {controls.max():.2f}")
print(f"p = {control_p(observed, controls):.2f}")
