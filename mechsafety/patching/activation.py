"""Activation patching (causal tracing, Meng et al. 2022): the exact effect of single nodes."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.metrics import RefusalLogOdds, adjust_p, bootstrap_interval, sign_flip_p
from mechsafety.models import LensModel
from mechsafety.nodes import Node, head_and_mlp_nodes
from mechsafety.patching.masks import PairRuns, Patch, pair_runs, patched_scores
from mechsafety.prompts import PromptPairs
from mechsafety.results import Provenance, Result

DIRECTIONS = ("noising", "denoising")


@dataclass(frozen=True, slots=True)
class PatchMap(Result):
    """Exact effects of patching single nodes.

    Attributes:
        provenance: Model, options, versions.
        metric: Name and tokens of the metric.
        nodes: What was patched, one after the other.
        changes: Change of the metric towards the source run when the node is patched, in metric units (nats).
        harmful, harmless: Metric of the unpatched runs.
        direction: ``noising`` (the harmful run gets harmless values) or ``denoising`` (the reverse).
        positions: Where: ``all``, ``instruction`` or ``suffix``.
    """

    provenance: Provenance
    metric: dict[str, object]
    nodes: tuple[Node, ...]
    changes: Float[Tensor, "node prompt"]
    harmful: Float[Tensor, " prompt"]
    harmless: Float[Tensor, " prompt"]
    direction: str
    positions: str

    def __repr__(self) -> str:
        return f"PatchMap({len(self.nodes)} nodes x {self.changes.shape[1]} pairs, {self.direction}, {self.positions})"

    @property
    def gap(self) -> float:
        """Mean metric on harmful less on harmless prompts."""
        return float((self.harmful - self.harmless).mean())

    @property
    def effects(self) -> Float[Tensor, " node"]:
        """Share of the gap that each node carries: its mean change over the gap."""
        return self.changes.mean(dim=1) / self.gap

    def intervals(self, seed: int = 0) -> list[tuple[float, float]]:
        """95 % bootstrap interval of each effect over prompts (the gap held fixed)."""
        return [bootstrap_interval(row / self.gap, seed) for row in self.changes.double().cpu().numpy()]

    def p_values(self, seed: int = 0) -> list[float]:
        """Sign-flip permutation p of each effect, Benjamini-Hochberg adjusted over all nodes."""
        return [float(p) for p in adjust_p(sign_flip_p(self.changes.double().cpu().numpy(), seed))]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a node: effect (share of the gap), interval, adjusted p."""
        import pandas as pd

        intervals = self.intervals()
        rows = {
            "node": [str(node) for node in self.nodes],
            "kind": [node.kind for node in self.nodes],
            "layer": [node.layer for node in self.nodes],
            "index": [node.index for node in self.nodes],
            "effect": self.effects.tolist(),
            "ci_low": [low for low, _ in intervals],
            "ci_high": [high for _, high in intervals],
            "p_value": self.p_values(),
        }
        return pd.DataFrame(rows)

    def plot(self) -> go.Figure:
        """Bar chart of the 30 strongest effects with intervals."""
        import plotly.express as px

        frame = self.to_dataframe()
        frame = frame.reindex(frame.effect.abs().sort_values(ascending=False).index).head(30)
        frame["up"], frame["down"] = frame.ci_high - frame.effect, frame.effect - frame.ci_low
        return px.bar(
            frame,
            x="node",
            y="effect",
            color="kind",
            error_y="up",
            error_y_minus="down",
            category_orders={"node": list(frame.node)},
            labels={"effect": "share of the harmful-harmless gap", "node": ""},
        )


def activation_patching(
    model: LensModel,
    pairs: PromptPairs | PairRuns,
    metric: RefusalLogOdds,
    *,
    nodes: Sequence[Node] | None = None,
    direction: str = "noising",
    positions: str = "all",
    progress: bool = True,
) -> PatchMap:
    """Patch single nodes with their values from the other prompt of each pair, exactly (Meng et al. 2022).

    Args:
        model: The model.
        pairs: Aligned pairs, or their stored runs.
        metric: What is measured.
        nodes: Heads, MLPs and neurons to patch; every head and MLP by default.
        direction: ``noising``: the harmful run gets harmless values; ``denoising``: the reverse.
        positions: ``all``, ``instruction`` or ``suffix``.
        progress: Whether to show a bar.

    Returns:
        Changes per prompt; a positive effect moves the metric towards the source run.

    Raises:
        MechsafetyError: Unknown direction or span, a node that the model lacks, pairs that do not align.
    """
    from tqdm.auto import tqdm

    if direction not in DIRECTIONS:
        raise MechsafetyError(f"direction {direction!r}", expected=f"one of {DIRECTIONS}")
    chosen = tuple(nodes) if nodes is not None else head_and_mlp_nodes(model.n_layers, model.n_heads)
    _check_nodes(model, chosen)
    neurons = any(node.kind == "neuron" for node in chosen)
    runs = pairs if isinstance(pairs, PairRuns) else pair_runs(model, pairs, neurons=neurons)
    base, source = (runs.harmful, runs.harmless) if direction == "noising" else (runs.harmless, runs.harmful)
    where = None if positions == "all" else base.tokens.span_mask(positions)[:, runs.start :]
    order = sorted(range(len(chosen)), key=lambda k: chosen[k].order)
    with tqdm(total=len(chosen), desc=f"patching ({positions})", disable=not progress, leave=False) as bar:
        patch = Patch.of(model, [[chosen[k]] for k in order])
        scores = patched_scores(model, base, source.acts, patch, metric, positions=where, progress=bar.update)
    harmful, harmless = runs.scores(metric)
    changes = (harmful - scores) if direction == "noising" else (scores - harmless)
    back = sorted(range(len(order)), key=order.__getitem__)
    options = {"direction": direction, "positions": positions, "pairs": len(harmful)}
    return PatchMap(
        model.provenance(options=options),
        metric.to_json(),
        chosen,
        changes[back],
        harmful,
        harmless,
        direction,
        positions,
    )


def _check_nodes(model: LensModel, nodes: Sequence[Node]) -> None:
    if not nodes:
        raise MechsafetyError("no nodes to patch", expected="at least one head, MLP or neuron")
    sizes = {"head": model.n_heads, "neuron": model.d_mlp, "mlp": 1}
    for node in nodes:
        if node.kind not in sizes:
            raise MechsafetyError(f"{node} cannot be patched", expected="heads, MLPs and neurons")
        if not (0 <= (node.layer or 0) < model.n_layers and 0 <= (node.index or 0) < sizes[node.kind]):
            raise MechsafetyError(f"{node} does not exist in {model!r}")
