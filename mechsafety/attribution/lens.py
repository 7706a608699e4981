"""Logit lens for the refusal metric: what the residual stream already says at each layer and position."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from mechsafety.attribution.direct import direct_logit_attribution
from mechsafety.errors import MechsafetyError
from mechsafety.metrics import RefusalLogOdds, bootstrap_interval
from mechsafety.models import LensModel
from mechsafety.models.engine import base_run, unembed
from mechsafety.prompts import PromptPairs, Tokens
from mechsafety.results import Provenance, Result

_BATCH = 16


@dataclass(frozen=True, slots=True)
class LogitLens(Result):
    """The metric read from the residual stream before each block, and after the last, at the last columns.

    Attributes:
        provenance: Model, options, versions.
        metric: Name and tokens of the metric.
        columns: Columns from the prompt's end, -1 the last token.
        harmful, harmless: The metric as if the model ended there. NaN where a prompt has no such column.
        attention, mlps: Share of the pairs' gap that each layer's heads, and its MLP, make at the last column through
            the unembedding alone; None for a model with norms after its blocks.
    """

    provenance: Provenance
    metric: dict[str, object]
    columns: tuple[int, ...]
    harmful: Float[Tensor, "layer_plus_1 column prompt"]
    harmless: Float[Tensor, "layer_plus_1 column prompt"]
    attention: Float[Tensor, "layer prompt"] | None
    mlps: Float[Tensor, "layer prompt"] | None

    def __repr__(self) -> str:
        layers, columns, prompts = self.harmful.shape
        return f"LogitLens({layers} layers x {columns} columns, {prompts} pairs)"

    @property
    def gap(self) -> Float[Tensor, "layer_plus_1 column"]:
        """Mean metric of harmful less harmless prompts."""
        return (self.harmful - self.harmless).nanmean(-1)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a layer and column: mean metric of both sides, the gap with its interval over pairs."""
        rows = []
        for layer in range(self.harmful.shape[0]):
            for place, column in enumerate(self.columns):
                bad, good = (side[layer, place] for side in (self.harmful, self.harmless))
                there = ~(bad.isnan() | good.isnan())
                gap = (bad - good)[there].cpu().double().numpy()
                low, high = bootstrap_interval(gap)
                rows.append((layer, column, float(bad[there].mean()), float(good[there].mean()), gap.mean(), low, high))
        return pd.DataFrame(rows, columns=["layer", "column", "harmful", "harmless", "gap", "ci_low", "ci_high"])

    def plot(self) -> go.Figure:
        """Heatmap of the gap, layers by columns."""
        import plotly.express as px

        return px.imshow(
            self.gap.cpu().numpy(),
            x=[str(column) for column in self.columns],
            origin="lower",
            color_continuous_scale="RdBu_r",
            color_continuous_midpoint=0,
            labels={"x": "column", "y": "residual stream before layer", "color": "harmful - harmless"},
            aspect="auto",
        )


def logit_lens(
    model: LensModel,
    pairs: PromptPairs,
    metric: RefusalLogOdds,
    *,
    n_columns: int | None = None,
    progress: bool = True,
) -> LogitLens:
    """Read the metric from the residual stream at every layer and the last columns (nostalgebraist 2020).

    The stream is sent through the final norm, with its own scale there, and the unembedding. Pairs need not align.

    Args:
        model: The model.
        pairs: Harmful and harmless prompts.
        metric: What is read.
        n_columns: How many last columns; by default the template's tokens after the instruction and the shortest
            instruction.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: Fewer than one column.
    """
    if n_columns is not None and n_columns < 1:
        raise MechsafetyError(f"n_columns={n_columns}", expected="at least 1")
    sides = [model.tokenize(side) for side in (pairs.harmful, pairs.harmless)]
    shortest = min(span.length - span.instruction[0] for tokens in sides for span in tokens.spans)
    width = n_columns if n_columns is not None else shortest
    width = min(width, *(tokens.ids.shape[1] for tokens in sides))
    with tqdm(total=2 * len(pairs), desc="logit lens", disable=not progress, leave=False) as bar:
        read = [_read(model, tokens, metric, width, bar.update) for tokens in sides]
    parts: list[Tensor | None] = [None, None]
    if not model.post_norm:
        # the lens' last row is the metric itself, so the layers' shares are of the gap that it shows
        direct = direct_logit_attribution(model, pairs, metric, progress=progress)
        gap = direct.total.mean()
        parts = [direct.heads.sum(1) / gap, direct.mlps / gap]
    options = {"pairs": len(pairs), "n_columns": width}
    columns = tuple(range(-width, 0))
    return LogitLens(model.provenance(options=options), metric.to_json(), columns, read[0], read[1], *parts)


def _read(
    model: LensModel, tokens: Tokens, metric: RefusalLogOdds, width: int, read: Callable[[int], object]
) -> Float[Tensor, "layer_plus_1 column prompt"]:
    done = []
    with torch.no_grad():
        for first in range(0, len(tokens), _BATCH):
            rows = slice(first, first + _BATCH)
            part = Tokens(tokens.ids[rows], tokens.mask[rows], tokens.spans[rows])
            run = base_run(model, part, keep=())
            scores = torch.stack([metric(unembed(model, layer[:, -width:])) for layer in run.resid])
            real = rearrange(part.mask[:, -width:], "prompt column -> 1 prompt column")
            scores = torch.where(real, scores, torch.nan)
            done.append(rearrange(scores, "layer prompt column -> layer column prompt"))
            read(len(part))
    return torch.cat(done, dim=-1)
