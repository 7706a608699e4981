"""Logit lens for the refusal metric: what the residual stream already says at each layer and position."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd
import plotly.graph_objects as go
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mechsafety.attribution.direct import DIRECT_SITES, direct_parts
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Count, public
from mechsafety.intervals import mean_interval, mean_of_known
from mechsafety.metrics import RefusalLogOdds, check_gap
from mechsafety.models import LensModel
from mechsafety.models.engine import base_run, unembed
from mechsafety.patching.norms import block_norms_option
from mechsafety.progress import progress_bar
from mechsafety.prompts import PromptPairs, Tokens, omissions
from mechsafety.results import Provenance, Result, norms_note

_BATCH = 16


@dataclass(frozen=True, slots=True)
class LogitLens(Result):
    """The metric read from the residual stream before each block, and after the last, at the last positions.

    Attributes:
        provenance: Model, options, versions.
        metric: Name and tokens of the metric.
        positions: Positions from the prompt's end, -1 the last token.
        harmful, harmless: The metric as if the model ended there. NaN if a prompt has no such position.
        share_positions: Positions of ``attention`` and ``mlps``: the last one, or all ``positions``.
        attention, mlps: What each layer's heads, and its MLP, add through the unembedding alone to the gap that the
            stream shows at a position. The unit is the metric's own gap, which is the gap at the last position. NaN if
            a prompt has no such position.

    Example:
        >>> found = ms.logit_lens(model, pairs, metric)
        >>> int(found.gap[:, -1].argmax())  # after the last of four blocks
        4
    """

    provenance: Provenance
    metric: dict[str, object]
    positions: tuple[int, ...]
    harmful: Float[Tensor, "layer_plus_1 place prompt"]
    harmless: Float[Tensor, "layer_plus_1 place prompt"]
    share_positions: tuple[int, ...]
    attention: Float[Tensor, "layer share_column prompt"] | None
    mlps: Float[Tensor, "layer share_column prompt"] | None

    def __repr__(self) -> str:
        layers, positions, prompts = self.harmful.shape
        return f"LogitLens({layers} layers x {positions} positions, {prompts} pairs{norms_note(self.provenance)})"

    @property
    def gap(self) -> Float[Tensor, "layer_plus_1 place"]:
        """Mean metric of harmful minus harmless prompts."""
        return (self.harmful - self.harmless).nanmean(-1)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer and position: mean metric of both sides, and the gap with its interval over pairs."""
        rows = []
        for layer in range(self.harmful.shape[0]):
            for place, position in enumerate(self.positions):
                bad, good = (side[layer, place] for side in (self.harmful, self.harmless))
                there = ~(bad.isnan() | good.isnan())
                gap = (bad - good)[there].cpu().double().numpy()
                low, high = mean_interval(gap)
                rows.append(
                    (layer, position, float(bad[there].mean()), float(good[there].mean()), gap.mean(), low, high)
                )
        return pd.DataFrame(rows, columns=["layer", "position", "harmful", "harmless", "gap", "ci_low", "ci_high"])

    def shares_dataframe(self) -> pd.DataFrame:
        """One row per layer, part (heads or MLP) and position: mean share of the metric's gap, interval over pairs.

        Raises:
            MechsafetyError: The result has no shares: an older version made it, of a model with norms after its blocks.
        """
        if self.attention is None or self.mlps is None:
            raise MechsafetyError(
                "a LogitLens without shares, of an older version", hint="call logit_lens(model, pairs, metric) again"
            )
        rows = []
        for part, values in (("attention", self.attention), ("mlp", self.mlps)):
            for layer in range(len(values)):
                for place, position in enumerate(self.share_positions):
                    rows.append((part, layer, position, *mean_of_known(values[layer, place].cpu())))
        return pd.DataFrame(rows, columns=["part", "layer", "position", "share", "ci_low", "ci_high"])

    def plot(self) -> go.Figure:
        """Heatmap of the gap, layers by positions."""
        import plotly.express as px

        return px.imshow(
            self.gap.cpu().numpy(),
            x=[str(position) for position in self.positions],
            origin="lower",
            color_continuous_scale="RdBu_r",
            color_continuous_midpoint=0,
            labels={"x": "position", "y": "residual stream before layer", "color": "harmful - harmless"},
            aspect="auto",
        )


@public
def logit_lens(
    model: LensModel,
    pairs: PromptPairs,
    metric: RefusalLogOdds,
    *,
    n_positions: Count | None = None,
    positions: Literal["last", "all"] = "last",
    progress: bool = True,
) -> LogitLens:
    """Read the metric from the residual stream at every layer and the last positions (nostalgebraist 2020).

    The stream goes through the final norm, with the stream's own scale at that place, and through the unembedding.
    Pairs need not align.

    Args:
        model: The model.
        pairs: Harmful and harmless prompts.
        metric: What is read.
        n_positions: Number of last positions. By default it is the number of tokens in the shortest instruction and the
            template's suffix after it.
        positions: Where the shares of layers are taken: the ``last`` position, or ``all`` positions that are read.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: ``n_positions`` is less than 1, or ``positions`` is unknown.

    Example:
        >>> found = ms.logit_lens(model, pairs, metric)
        >>> found.gap.shape  # residual stream before each block and after the last, token
        torch.Size([5, 8])
    """
    sides = [model.tokenize(side) for side in (pairs.harmful, pairs.harmless)]
    shortest = min(span.length - span.instruction[0] for tokens in sides for span in tokens.spans)
    width = n_positions if n_positions is not None else shortest
    width = min(width, *(tokens.ids.shape[1] for tokens in sides))
    read_at = tuple(range(-width, 0))
    shared = read_at if positions == "all" else (-1,)
    with progress_bar(total=4 * len(pairs), desc="logit lens", show=progress) as bar:
        read = [_read(model, tokens, metric, width, bar.update) for tokens in sides]
        # the lens' last row is the metric itself, so the layers' shares are shares of its gap
        check_gap(read[0][-1, -1], read[1][-1, -1])
        gap = (read[0] - read[1])[-1, -1].mean()
        bad, good = (_shares(model, tokens, metric, shared, bar.update) for tokens in sides)
        parts = [(a - b) / gap for a, b in zip(bad, good, strict=True)]
    options = {"pairs": len(pairs), "n_positions": width, "positions": positions, **omissions(pairs)}
    options |= block_norms_option(model, "frozen")
    return LogitLens(model.provenance(options=options), metric.to_json(), read_at, read[0], read[1], shared, *parts)


def _shares(
    model: LensModel,
    tokens: Tokens,
    metric: RefusalLogOdds,
    read_at: Sequence[int],
    done: Callable[[int], object],
) -> list[Float[Tensor, "layer place prompt"]]:
    """What each layer's heads together, and its MLP, add to the metric read at each position."""
    attention: list[Tensor] = []
    mlps: list[Tensor] = []
    for part in _batches(tokens):
        cache = model.cache(part, sites=DIRECT_SITES)
        found = [direct_parts(model, cache, metric, position=position) for position in read_at]
        real = rearrange(part.mask[:, list(read_at)], "prompt place -> 1 place prompt")
        for out, rows in ((attention, [parts[0].sum(1) for parts in found]), (mlps, [parts[1] for parts in found])):
            out.append(torch.where(real, torch.stack(rows, dim=1), torch.nan))
        done(len(part))
    return [torch.cat(rows, dim=-1) for rows in (attention, mlps)]


def _batches(tokens: Tokens) -> Iterator[Tokens]:
    """A few prompts at a time, padded to the columns of the whole batch."""
    for first in range(0, len(tokens), _BATCH):
        rows = slice(first, first + _BATCH)
        yield replace(tokens, ids=tokens.ids[rows], mask=tokens.mask[rows], spans=tokens.spans[rows])


def _read(
    model: LensModel, tokens: Tokens, metric: RefusalLogOdds, width: int, read: Callable[[int], object]
) -> Float[Tensor, "layer_plus_1 place prompt"]:
    done = []
    with torch.no_grad():
        for part in _batches(tokens):
            run = base_run(model, part, keep=())
            scores = torch.stack([metric(unembed(model, layer[:, -width:])) for layer in run.resid])
            real = rearrange(part.mask[:, -width:], "prompt place -> 1 prompt place")
            scores = torch.where(real, scores, torch.nan)
            done.append(rearrange(scores, "layer prompt place -> layer place prompt"))
            read(len(part))
    return torch.cat(done, dim=-1)
