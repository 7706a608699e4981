"""How cost and memory grow with the number of prompts and the length of the sequence, one size a process."""

from pathlib import Path
from typing import Any

from measure import alone, memory_gib
from models import metric_of, pairs_of_width

import mechsafety as ms
from mechsafety.models import LensModel
from mechsafety.nodes import Node

PROMPTS = (4, 16, 64, 256)
COLUMNS = (32, 64, 128, 256, 512)
ANALYSES = {
    "heads": "exact patching of the heads of 3 layers (first, middle, last)",
    "edges": "EAP-IG of every edge, 1 step",
}
# beside the size that grows
AT_COLUMNS, AT_PROMPTS = 32, 2


def growth_cases() -> dict[str, tuple[str, int, int]]:
    """Case name to (analysis, prompts, columns)."""
    sizes = {f"prompts_{n}": (n, AT_COLUMNS) for n in PROMPTS}
    sizes |= {f"columns_{n}": (AT_PROMPTS, n) for n in COLUMNS}
    return {f"{kind}_{name}": (kind, *size) for kind in ANALYSES for name, size in sizes.items()}


def grow(model: LensModel, kind: str, n: int, columns: int) -> dict[str, Any]:
    """Seconds and peak memory of one analysis at one size."""
    pairs, metric = pairs_of_width(model, n, columns), metric_of(model)
    model.provenance()  # hashes the weights, once a model
    layers = sorted({0, model.n_layers // 2, model.n_layers - 1})
    nodes = [Node("head", layer, head) for layer in layers for head in range(model.n_heads)]
    before = memory_gib("VmRSS")

    def run() -> object:
        if kind == "heads":
            return ms.activation_patching(model, pairs, metric, nodes=nodes, progress=False)
        return ms.edge_attribution(model, pairs, metric, steps=1, progress=False)

    result, _ = alone(run)
    return result | {"analysis": kind, "prompts": n, "columns": columns, "before_gib": before}


def plot(cases: dict[str, Any], path: Path) -> None:
    """Seconds and peak memory over each size, as an SVG whose bytes depend on the numbers alone."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    rc = {"svg.hashsalt": "mechsafety", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
    with matplotlib.rc_context(rc):
        figure, axes = plt.subplots(2, 2, figsize=(7.5, 5.2), sharex="col")
        for column, (size, fixed, label) in enumerate(
            (("prompts", "columns", "pairs"), ("columns", "prompts", "columns from the first difference on"))
        ):
            at = AT_COLUMNS if fixed == "columns" else AT_PROMPTS
            for kind, style in zip(ANALYSES, ("o-", "s--"), strict=True):
                names = [name for name in growth_cases() if name.startswith(f"{kind}_{size}_") and name in cases]
                points = [cases[name] for name in names]
                if not points:
                    continue
                for row, key in enumerate(("ours_s", "peak_gib")):
                    axes[row, column].plot([p[size] for p in points], [p[key] for p in points], style, label=kind)
            axes[0, column].set_title(f"{'pairs' if fixed == 'prompts' else fixed}: {at}")
            axes[1, column].set_xlabel(label)
            if not axes[0, column].lines:  # nothing measured: a log axis would fail
                continue
            axes[0, column].set(xscale="log", yscale="log")
            axes[0, column].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes[0, column].yaxis.set_major_formatter("{x:g}")
            axes[0, column].minorticks_off()
            axes[1, column].set(xscale="log", ylim=(0, None))
            ticks = PROMPTS if size == "prompts" else COLUMNS
            axes[1, column].set_xticks(ticks, [str(n) for n in ticks])
            axes[1, column].minorticks_off()
        axes[0, 0].set_ylabel("seconds")
        axes[1, 0].set_ylabel("peak memory (GiB)")
        drawn = next(panel for panel in axes[0] if panel.lines)
        drawn.legend(frameon=False)
        figure.tight_layout()
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
