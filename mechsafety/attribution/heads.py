"""All heads in one table: direct and total effect, path to the refusal direction, attention, Ships and Sahara."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from mechsafety.attribution.direct import direct_logit_attribution
from mechsafety.attribution.ships import RANK, Mask, divergences, masked_heads, rotations
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Amount, Count, public
from mechsafety.intervals import mean_interval
from mechsafety.metrics import RefusalLogOdds, check_gap
from mechsafety.models import LensModel
from mechsafety.nodes import Node
from mechsafety.patching import PairRuns, Projection, activation_patching, pair_runs, path_projection
from mechsafety.patching.effects import mean_gap
from mechsafety.patching.masks import aligned_pairs
from mechsafety.patching.norms import block_norms_option
from mechsafety.prompts import PromptPairs, omissions
from mechsafety.prompts.spans import SPANS
from mechsafety.results import Provenance, Result, norms_note
from mechsafety.sites import Site, SiteKind

SCORES = ("direct", "total", "path", "attention", "ships", "sahara")


@runtime_checkable
class DirectionAt(Protocol):
    """A direction of the residual stream at a place, such as a `RefusalDirection`."""

    @property
    def vector(self) -> Tensor:
        """The direction."""

    @property
    def layer(self) -> int:
        """Block at whose input the direction lies."""

    @property
    def position(self) -> int:
        """Position, counted from the prompt's end."""


@dataclass(frozen=True, slots=True)
class HeadAttribution(Result):
    """Scores of every head; scores that were not computed are None.

    Attributes:
        provenance: Model, options, versions.
        metric: Name and tokens of the metric.
        direct: Share of the metric's gap that the head adds through the unembedding alone (see
            `direct_logit_attribution`). In this score alone, norms after attention keep each run's own scale.
        total: Share of the gap that is lost when the head takes its value from the harmless prompt and everything after
            it is live.
        path: Share of the gap along the refusal direction that is lost when the head alone takes its value from the
            harmless prompt. MLPs between head and direction respond, and attention is frozen. 0 for heads at or after
            the direction's block.
        attention: Attention of the last token to prefix, instruction and suffix in the harmful prompts.
        ships: KL(p || p with the head masked) of the next token on the harmful prompts, nats.
        sahara: Generalised Ships: rotation, in degrees, of the harmful prompts' leading left singular vectors when the
            head is masked.

    Example:
        >>> found = ms.head_attribution(model, pairs, metric, scores=["direct", "total"])
        >>> found.to_dataframe().set_index("node").total.idxmax()
        'L0.H1'
    """

    provenance: Provenance
    metric: dict[str, object]
    direct: Float[Tensor, "layer head prompt"] | None
    total: Float[Tensor, "layer head prompt"] | None
    path: Float[Tensor, "layer head prompt"] | None
    attention: Float[Tensor, "layer head prompt 3"] | None
    ships: Float[Tensor, "layer head masked_prompt"] | None
    sahara: Float[Tensor, "layer head"] | None

    def __repr__(self) -> str:
        layers, heads = self._means()[1].shape
        scores = ", ".join(self._means()[0])
        return f"HeadAttribution({layers} layers x {heads} heads: {scores}{norms_note(self.provenance)})"

    def to_dataframe(self, seed: int = 0) -> pd.DataFrame:
        """One row per head: the mean of each score, with intervals for ``direct``, ``total``, ``path`` and ``ships``.

        The row with the largest absolute total effect comes first. Without total effects, the first score decides.
        """
        names, first = self._means()
        layers, heads = first.shape
        frame = pd.DataFrame(
            {
                "node": [str(Node("head", k, h)) for k in range(layers) for h in range(heads)],
                "layer": np.repeat(np.arange(layers), heads),
                "index": np.tile(np.arange(heads), layers),
            }
        )
        for name, mean in names.items():
            frame[name] = rearrange(mean, "layer head -> (layer head)").cpu().numpy()
        for name in ("direct", "total", "path", "ships"):
            values = getattr(self, name)
            if values is not None:
                flat = rearrange(values, "layer head prompt -> (layer head) prompt").cpu().double().numpy()
                ends = [mean_interval(row, seed) for row in flat]
                frame[f"{name}_low"], frame[f"{name}_high"] = zip(*ends, strict=True)
        order = "total" if "total" in frame else next(iter(names))
        return frame.sort_values(order, key=abs, ascending=False, kind="stable")

    def rank_agreement(self) -> pd.DataFrame:
        """Spearman's rank correlation of the scores' absolute values over all heads, a square table.

        A score that is the same for all heads has no ranks: its row and column are NaN.
        """
        from scipy.stats import spearmanr

        names, _ = self._means()
        flat = {name: mean.abs().flatten().cpu().numpy() for name, mean in names.items()}
        varied = {name: bool(np.ptp(values) > 0) for name, values in flat.items()}
        rows = [
            [float(spearmanr(flat[a], flat[b]).statistic) if varied[a] and varied[b] else np.nan for b in flat]
            for a in flat
        ]
        return pd.DataFrame(rows, index=list(flat), columns=list(flat))

    def plot(self) -> go.Figure:
        """One heatmap per score, layers by heads."""
        from plotly.subplots import make_subplots

        names, first = self._means()
        figure = make_subplots(1, len(names), subplot_titles=list(names), shared_yaxes=True)
        for place, mean in enumerate(names.values(), 1):
            heat = go.Heatmap(z=mean.cpu().numpy(), colorscale="RdBu_r", zmid=0, showscale=False)
            figure.add_trace(heat, row=1, col=place)
        figure.update_xaxes(title_text="head")
        figure.update_yaxes(title_text="layer", col=1)
        return figure.update_layout(template="none", height=max(320, 60 + 16 * first.shape[0]))

    def _means(self) -> tuple[dict[str, Tensor], Tensor]:
        """Mean over prompts of each score that was computed, and the first of these means."""
        means: dict[str, Tensor] = {}
        for name in SCORES:
            values = getattr(self, name)
            if values is None:
                continue
            if name == "attention":
                means |= {f"attention_{span}": values.mean(2)[..., k] for k, span in enumerate(SPANS)}
            else:
                means[name] = values if name == "sahara" else values.mean(-1)
        return means, next(iter(means.values()))


@public
def head_attribution(
    model: LensModel,
    pairs: PromptPairs | PairRuns,
    metric: RefusalLogOdds,
    *,
    direction: DirectionAt | None = None,
    scores: Sequence[str] | None = None,
    mask: Mask = "uniform",
    rank: Count = RANK,
    n_masked: Amount = 8,
    progress: bool = True,
) -> HeadAttribution:
    """Score every head in several ways on the same prompts, so that the ways can be compared.

    Args:
        model: The model.
        pairs: Pairs, of which only those that align are used; or their stored runs.
        metric: What the effects are on.
        direction: A `RefusalDirection`, needed for ``path``.
        scores: Some of ``direct total path attention ships sahara``; by default all that can be computed. ``path``
            needs a direction, and ``sahara`` needs more prompts than its rank.
        mask: How Ships and Sahara mask a head: ``uniform`` or ``zero``.
        rank: Number of left singular vectors that Sahara compares; it must be smaller than the number of prompts used.
            The published code takes 1.
        n_masked: Number of harmful prompts that Ships and Sahara use.
        progress: Whether to show bars.

    Raises:
        MechsafetyError: A score is unknown; ``path`` is wanted without a direction; or the direction has another width
            than the model.

    Example:
        >>> found = ms.head_attribution(model, pairs, metric, scores=["direct", "total"])
        >>> found.rank_agreement().columns.tolist()
        ['direct', 'total']
    """
    pairs = aligned_pairs(model, pairs)
    impossible = {"path"} if direction is None else set()
    if n_masked <= rank or len(pairs.harmful) <= rank:
        impossible = impossible | {"sahara"}
    chosen = tuple(scores) if scores is not None else tuple(name for name in SCORES if name not in impossible)
    unknown = [name for name in chosen if name not in SCORES]
    if unknown or not chosen:
        raise MechsafetyError(f"scores {unknown or list(chosen)}", expected=f"some of {SCORES}")
    if "path" in chosen and direction is None:
        raise MechsafetyError("scores=['path'] without a direction", hint="pass direction=refusal_direction(...)")
    runs = pairs if isinstance(pairs, PairRuns) else pair_runs(model, pairs)
    heads = [Node("head", layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    harmful, harmless = runs.scores(metric)
    check_gap(harmful, harmless)
    gap = mean_gap(harmful, harmless)
    found: dict[str, Tensor | None] = dict.fromkeys(SCORES)
    if "direct" in chosen:
        sides = [
            direct_logit_attribution(model, run.tokens, metric, progress=progress).heads
            for run in (runs.harmful, runs.harmless)
        ]
        found["direct"] = (sides[0] - sides[1]) / gap
    if "total" in chosen:
        changes = activation_patching(model, runs, metric, nodes=heads, progress=progress).changes / gap
        found["total"] = rearrange(changes, "(layer head) prompt -> layer head prompt", head=model.n_heads)
    if "path" in chosen and direction is not None:
        found["path"] = path_to_direction(model, runs, direction)
    if "attention" in chosen:
        found["attention"] = span_attention(model, runs)
    if {"ships", "sahara"} & set(chosen):
        tokens = runs.harmful.tokens.rows(slice(0, n_masked))
        states, plain = masked_heads(model, tokens, mask, rank if "sahara" in chosen else None, progress)
        found["ships"] = divergences(model, plain, states)
        if "sahara" in chosen:
            found["sahara"] = rotations(model, plain, states, rank)
    options: dict[str, Any] = {
        "scores": list(chosen),
        "mask": mask,
        "rank": rank,
        "n_masked": n_masked,
        "pairs": len(runs.harmful),
    }
    options |= omissions(pairs)
    if "direct" in chosen:
        options |= block_norms_option(model, "frozen")
    if direction is not None:
        options |= {"direction": [direction.layer, direction.position]}
    kept = {name: found[name] if name in chosen else None for name in SCORES}
    return HeadAttribution(model.provenance(options=options), metric.to_json(), **kept)


def path_to_direction(model: LensModel, runs: PairRuns, direction: DirectionAt) -> Float[Tensor, "layer head prompt"]:
    """Share of the pairs' gap along a direction that each head alone makes (path patching into the direction).

    Raises:
        MechsafetyError: The direction has another width than the model, its layer is not in the model, or its position
            lies before the first difference of the pairs.
    """
    if direction.vector.shape[-1] != model.d_model:
        raise MechsafetyError(
            f"a direction of width {direction.vector.shape[-1]}", expected=f"this model's d_model, {model.d_model}"
        )
    base = runs.harmful
    if not -base.n_pos <= direction.position < 0 or not 0 <= direction.layer < model.n_layers:
        raise MechsafetyError(
            f"a direction at layer {direction.layer}, position {direction.position}",
            expected=f"layers 0 to {model.n_layers - 1}, positions {-base.n_pos} to -1",
        )
    unit = direction.vector / direction.vector.norm()
    receiver = Projection(unit, Site(SiteKind.RESID_PRE, direction.layer), positions=(direction.position,))
    paths = path_projection(model, runs, receiver)
    return rearrange(paths.changes[:, 0] / paths.gap, "(layer head) prompt -> layer head prompt", head=model.n_heads)


def span_attention(model: LensModel, runs: PairRuns) -> Float[Tensor, "layer head prompt 3"]:
    """Attention of the last token of each harmful prompt to its prefix, instruction and suffix."""
    tokens = runs.harmful.tokens
    pattern = model.cache(tokens, ["pattern"]).pattern[:, :, :, -1].float()
    spans = torch.stack([tokens.span_mask(span) for span in SPANS]).to(pattern)
    return einsum(pattern, spans, "layer head prompt source, span prompt source -> layer head prompt span")
