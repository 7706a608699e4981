"""The refusal direction (Arditi et al. 2024): found by mean differences, chosen by what it does."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mechsafety.attribution.promoted import NodeCards, node_cards
from mechsafety.directions.scores import (
    DirectionScores,
    Validation,
    mean_differences,
    positional_vectors,
    score_directions,
)
from mechsafety.directions.select import (
    MAX_DEPTH,
    MAX_KL,
    Conditions,
    conditions,
    passing,
    select_cosmic,
    select_published,
    smallest,
)
from mechsafety.errors import MechsafetyError, NoRefusal
from mechsafety.inputs import Amount, Count, Prompts, public
from mechsafety.intervals import mean_interval
from mechsafety.interventions import Direction
from mechsafety.interventions.checks import check_layers, check_vector
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.patching import pair_runs
from mechsafety.prompts import PromptPairs, Tokens, distinct, omissions, unseen
from mechsafety.results import Provenance, Result
from mechsafety.scale.work import sweeps
from mechsafety.sites import Site, SiteKind

logger = logging.getLogger(__name__)

Selector = Literal["published", "cosmic"]
# a mean with an interval needs at least this many prompts of a kind
MIN_PROMPTS = 2
_LIMITS = {"max_kl": MAX_KL, "max_depth": MAX_DEPTH}


@dataclass(frozen=True, slots=True)
class ControlScores(Result):
    """Bypass, induce and KL of directions that should do nothing, at the chosen direction's layer and norm.

    Attributes:
        names: ``random 1`` ... and ``harmless - harmless``: the difference between the means of two random halves of
            the harmless prompts.
        bypass, induce, kl: As for the candidates (see `DirectionScores`).

    Example:
        >>> direction.controls.names[:2]
        ('random 1', 'random 2')
        >>> direction.controls.to_dataframe().columns[:4].tolist()
        ['control', 'bypass', 'bypass_low', 'bypass_high']
    """

    names: tuple[str, ...]
    bypass: Float[Tensor, "control harmful"]
    induce: Float[Tensor, "control harmless"]
    kl: Float[Tensor, "control harmless"]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per control, with intervals over prompts."""
        return pd.DataFrame([_row({"control": name}, self, k) for k, name in enumerate(self.names)])


@dataclass(frozen=True, slots=True)
class RefusalDirection(Result):
    """All candidate directions with their scores, and the chosen one.

    Attributes:
        provenance: Model, options, versions.
        metric: Name and tokens of the metric.
        layer, position: Where the chosen candidate stands: at the input of this block, at this position. Positions
            count from the prompt's end; -1 is the last.
        selector: ``published`` (bypass, induce and KL) or ``cosmic``.
        passes: Whether the chosen candidate meets the published conditions. If no candidate does, the published
            selector takes the smallest bypass score below the depth limit, and ``passes`` is False.
        layers, positions: Layer and position of each candidate, along the first two axes of ``vectors`` and the scores.
        vectors: Mean harmful less mean harmless activation; zero where both kinds of prompts have the same token.
        bypass, induce, kl, cosmic: See `DirectionScores`.
        harmful, harmless: Metric of the validation prompts in the unedited model.
        n_train: Numbers of harmful and of harmless prompts in the means.
        n_layers: Number of layers of the model.
        controls: Scores of directions that should do nothing; None where `choose` dropped them.

    Example:
        >>> direction = ms.refusal_direction(model, pairs, metric, max_kl=None)
        >>> direction.vector.shape
        torch.Size([64])
        >>> path = direction.save(folder / "direction.json")
        >>> ms.RefusalDirection.load(path).layer == direction.layer
        True
    """

    provenance: Provenance
    metric: dict[str, object]
    layer: int
    position: int
    selector: str
    passes: bool
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    vectors: Float[Tensor, "layer position d_model"]
    bypass: Float[Tensor, "layer position harmful"]
    induce: Float[Tensor, "layer position harmless"]
    kl: Float[Tensor, "layer position harmless"]
    cosmic: Float[Tensor, "layer position"]
    harmful: Float[Tensor, " harmful"]
    harmless: Float[Tensor, " harmless"]
    n_train: tuple[int, int]
    n_layers: int
    controls: ControlScores | None = None

    def __repr__(self) -> str:
        row, position = self._cell
        scores = ", ".join(
            f"{name} {float(x[row, position].mean()):.3g}"
            for name, x in (("bypass", self.bypass), ("induce", self.induce), ("KL", self.kl))
        )
        verdict = "" if self.passes else f"; does not pass the published conditions: {self.conditions}"
        if not self.passes and self.conditions.both == 0 < self.conditions.induce:
            verdict += "; direction.choose(max_kl=None) chooses without the limit on the KL"
        return f"RefusalDirection(layer {self.layer}, position {self.position}, by {self.selector}: {scores}{verdict})"

    @property
    def vector(self) -> Float[Tensor, " d_model"]:
        """The chosen direction, at its own length."""
        return self.vectors[self._cell]

    @property
    def conditions(self) -> Conditions:
        """How many candidates each condition of the published rule leaves, at the limits of this choice."""
        limits = {name: self.provenance.options.get(name, default) for name, default in _LIMITS.items()}
        bypass, induce, kl = (x.mean(-1) for x in (self.bypass, self.induce, self.kl))
        return conditions(bypass, induce, kl, self.layers, self.n_layers, **limits)

    @property
    def direction(self) -> Direction:
        """The chosen direction as a `Direction`, which can be added, removed and projected on."""
        site = Site(SiteKind.RESID_PRE, self.layer)
        return Direction(self.provenance, "refusal", (site,), self.vector[None], everywhere=True)

    @public
    @contextmanager
    def ablate(self, model: LensModel, strength: float = 1.0) -> Iterator[None]:
        """Context in which the direction is removed from all that is written to the residual stream."""
        with self.direction.ablate(model, strength):
            yield

    @public
    @contextmanager
    def add(self, model: LensModel, strength: float = 1.0) -> Iterator[None]:
        """Context in which ``strength`` times the direction is added at its layer, at all positions."""
        with self.direction.add(model, strength):
            yield

    @public
    def project(self, model: LensModel, prompts: Prompts | Tokens) -> Float[Tensor, " prompt"]:
        """How far each prompt's last token lies along the direction at its layer."""
        return self.direction.project(model, prompts)[0]

    @public
    def choose(
        self, selector: Selector = "published", *, max_kl: float | None = MAX_KL, max_depth: float = MAX_DEPTH
    ) -> "RefusalDirection":
        """Choose again among the same candidates; the model is not run.

        Controls belong to the first choice. They are dropped where another candidate is chosen. ``max_kl=None`` drops
        the condition on the KL. The authors of a published run did so, because no candidate met it.

        Raises:
            MechsafetyError: Unknown selector, or no layer below the depth limit has a direction.
        """
        layer, position, passes = _choose(self, selector, self.layers, self.positions, self.n_layers, max_kl, max_depth)
        same = (layer, position) == (self.layer, self.position)
        options = {**self.provenance.options, "selector": selector, "max_kl": max_kl, "max_depth": max_depth}
        return replace(
            self,
            provenance=replace(self.provenance, options=options),
            layer=layer,
            position=position,
            selector=selector,
            passes=passes,
            controls=self.controls if same else None,
        )

    @public
    def describe(self, model: LensModel, pairs: PromptPairs, *, n_tokens: Count = 8) -> NodeCards:
        """Tokens that the direction promotes where it reaches the logits directly, as `attribution.describe_nodes`.

        The final norm has the scale that it has on the harmful prompts.

        Args:
            model: The model.
            pairs: Pairs, of which only those that align are used.
            n_tokens: Number of promoted tokens, and of suppressed tokens.

        Raises:
            MechsafetyError: A model of another width, or no pair aligns.
        """
        vector = check_vector(self.vector, model.d_model).to(model.device).float()
        pairs = pairs.aligned(model)
        run = pair_runs(model, pairs).harmful
        norm, rows = model.frozen_final_norm(run.resid[-1][:, -1]), vector.expand(len(run), -1)
        written = (norm(rows) - norm(torch.zeros_like(rows))).mean(0)
        options = {"pairs": len(run), "n_tokens": n_tokens, **omissions(pairs)}
        return node_cards(model, {f"direction of layer {self.layer}": written}, n_tokens, options)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per candidate: means of three scores with intervals over prompts, COSMIC's score, norm, choice.

        The controls of the chosen candidate have a table of their own: ``direction.controls.to_dataframe()``.
        """
        rows = []
        for k, layer in enumerate(self.layers):
            for c, position in enumerate(self.positions):
                start = {"layer": layer, "position": position, "norm": float(self.vectors[k, c].norm())}
                rest = {"cosmic": float(self.cosmic[k, c]), "chosen": (layer, position) == (self.layer, self.position)}
                rows.append(_row(start, self, (k, c)) | rest)
        return pd.DataFrame(rows)

    def plot(self) -> go.Figure:
        """Heatmaps (layers by positions) of bypass, induce, KL and COSMIC's score; a frame marks the choice."""
        from plotly.subplots import make_subplots

        titles = ("bypass<br>(harmful, removed)", "induce<br>(harmless, added)", "KL<br>(harmless, removed)", "COSMIC")
        gap, width = 0.1, (1 - 3 * 0.1) / 4  # the gaps hold the colour bars and their numbers
        figure = make_subplots(1, 4, subplot_titles=titles, shared_yaxes=True, horizontal_spacing=gap)
        x, y = [str(position) for position in self.positions], list(self.layers)
        parts = [score.mean(-1) for score in (self.bypass, self.induce, self.kl)] + [self.cosmic]
        for place, (part, scale) in enumerate(zip(parts, ("RdBu_r", "RdBu_r", "Greys", "Viridis"), strict=True), 1):
            bar = {"x": place * (width + gap) - gap + 0.005, "thickness": 8, "len": 0.9}
            heat = go.Heatmap(z=part.cpu().numpy(), x=x, y=y, colorscale=scale, colorbar=bar)
            if scale == "RdBu_r":
                heat.update(zmid=0)
            figure.add_trace(heat, row=1, col=place)
            marker = {"symbol": "square-open", "size": 14, "color": "black", "line": {"width": 2}}
            mark = go.Scatter(x=[str(self.position)], y=[self.layer], mode="markers", marker=marker, showlegend=False)
            figure.add_trace(mark, row=1, col=place)
        figure.update_xaxes(title_text="position", type="category")
        figure.update_yaxes(title_text="layer", col=1)
        return figure.update_layout(template="none", width=900, height=max(320, 100 + 16 * len(self.layers)))

    @property
    def _cell(self) -> tuple[int, int]:
        return self.layers.index(self.layer), self.positions.index(self.position)


@sweeps
@public
def refusal_direction(
    model: LensModel,
    pairs: PromptPairs,
    metric: RefusalLogOdds | None = None,
    *,
    validation: PromptPairs | None = None,
    layers: Sequence[int] | None = None,
    n_positions: Count | None = None,
    selector: Selector = "published",
    max_kl: float | None = MAX_KL,
    max_depth: float = MAX_DEPTH,
    n_random: Amount = 4,
    seed: Amount = 0,
    progress: bool = True,
) -> RefusalDirection:
    """Find the direction of the residual stream that carries refusal (Arditi et al. 2024).

    1. A candidate is the mean harmful less the mean harmless input of a block, at one of the template's tokens after
       the instruction. Only training prompts that the model treats as expected count.
    2. Validation prompts give each candidate three scores. *Bypass*: refusal log-odds on harmful prompts with the
       direction removed. *Induce*: refusal log-odds on harmless prompts with it added. *KL*: the divergence on harmless
       prompts with it removed.
    3. The published rule chooses the smallest bypass among the candidates with induce > 0, KL at most ``max_kl`` and a
       layer below ``int(max_depth * n_layers)``. COSMIC (Siu et al. 2025) chooses without reading any output.

    Args:
        model: The model.
        pairs: Training prompts; the two sides need not align.
        metric: Refusal log-odds; detected on the training prompts by default.
        validation: Prompts on which the candidates are judged. By default a fifth of ``pairs``, drawn evenly over the
            topics and left out of the means.
        layers: Blocks at whose input candidates are taken; all by default.
        n_positions: Number of last positions of the prompt; by default all template tokens after the instruction.
        selector: ``published`` or ``cosmic``.
        max_kl: Largest KL of the published rule. None drops that condition. The authors of a published run (Gemma-3)
            did so, because no candidate met it.
        max_depth: Depth limit, as a share of the layers.
        n_random: Number of random directions among the controls.
        seed: Seed of the split and of the controls; nothing else is random.
        progress: Whether to show a bar.

    Raises:
        NoRefusal: Fewer than two validation prompts of a kind are treated as expected.
        MechsafetyError: Unknown option, too few pairs.

    Example:
        >>> ms.refusal_direction(model, pairs, metric, max_kl=None)
        RefusalDirection(layer 1, position -2, by published: bypass ..., induce ..., KL ...)
    """
    rows = check_layers(model, layers) if layers is not None else tuple(range(model.n_layers))
    train, held = (pairs, validation) if validation is not None else _split(pairs, seed)
    held = _fresh(held, train)
    if metric is None:
        metric = RefusalLogOdds.detect(model, train)
        model = model.reading(metric.opener_ids)
    sides = (distinct(train.harmful, "harmful training prompts"), distinct(train.harmless, "harmless training prompts"))
    vectors, counts = mean_differences(model, *sides, metric, n_positions=n_positions)
    checked = usable_validation(model, held, metric)
    positions = tuple(range(-vectors.shape[1], 0))
    scores = score_directions(model, checked, metric, vectors[list(rows)], rows, progress=progress)
    layer, position, passes = _choose(scores, selector, rows, positions, model.n_layers, max_kl, max_depth)
    options = {
        "selector": selector,
        "max_kl": max_kl,
        "max_depth": max_depth,
        "train": len(train),
        "validation": len(held),
        "n_random": n_random,
        **omissions(pairs),
    }
    found = RefusalDirection(
        model.provenance(seed=seed, options=options),
        metric.to_json(),
        layer,
        position,
        selector,
        passes,
        rows,
        positions,
        vectors[list(rows)],
        scores.bypass,
        scores.induce,
        scores.kl,
        scores.cosmic,
        checked.harmful_scores,
        checked.harmless_scores,
        counts,
        model.n_layers,
    )
    if not passes:
        logger.warning("%s: the direction does not pass the published conditions: %s", model.name, found.conditions)
    controls = _controls(model, checked, metric, found, sides[1], n_random, seed)
    return replace(found, controls=controls)


def usable_validation(model: LensModel, pairs: PromptPairs, metric: RefusalLogOdds) -> Validation:
    """The prompts that the model treats as expected: harmful ones with a metric above 0, harmless ones below 0.

    Raises:
        NoRefusal: Fewer than two prompts of a kind are left.
    """
    sides = (distinct(pairs.harmful, "harmful prompts"), distinct(pairs.harmless, "harmless prompts"))
    whole = Validation.of(model, *sides, metric)
    harmful = [p for p, score in zip(sides[0], whole.harmful_scores.tolist(), strict=True) if score > 0]
    harmless = [p for p, score in zip(sides[1], whole.harmless_scores.tolist(), strict=True) if score < 0]
    if min(len(harmful), len(harmless)) < MIN_PROMPTS:
        raise NoRefusal(
            f"of {len(pairs)} validation pairs {len(harmful)} harmful prompts are refused and {len(harmless)} harmless "
            f"ones answered",
            expected=f"at least {MIN_PROMPTS} of each",
            hint="give other prompts, or check the metric's refusal tokens",
        )
    if (len(harmful), len(harmless)) == (len(sides[0]), len(sides[1])):
        return whole
    return Validation.of(model, harmful, harmless, metric)


def _fresh(validation: PromptPairs, train: PromptPairs) -> PromptPairs:
    """The validation pairs of which neither prompt was trained on."""
    harmful = set(unseen(validation.harmful, train.harmful, "harmful validation prompts"))
    harmless = set(unseen(validation.harmless, train.harmless, "harmless validation prompts"))
    kept = tuple(pair for k, pair in enumerate(validation.pairs) if k in harmful & harmless)
    if not kept:
        raise MechsafetyError(
            f"{validation.name}: all {len(validation)} pairs hold a training prompt", expected="others"
        )
    return replace(validation, pairs=kept)


def _split(pairs: PromptPairs, seed: int) -> tuple[PromptPairs, PromptPairs]:
    if len(pairs) < 2 * MIN_PROMPTS:
        raise MechsafetyError(f"{len(pairs)} pairs", expected=f"at least {2 * MIN_PROMPTS}, or validation=...")
    held = pairs.sample(max(MIN_PROMPTS, len(pairs) // 5), seed)
    left = list(pairs.pairs)
    for pair in held:
        left.remove(pair)
    return replace(pairs, pairs=tuple(left)), held


def _choose(
    scores: "DirectionScores | RefusalDirection",
    selector: str,
    layers: Sequence[int],
    positions: Sequence[int],
    n_layers: int,
    max_kl: float | None,
    max_depth: float,
) -> tuple[int, int, bool]:
    """Layer, position, and whether the choice meets the published conditions."""
    rows = tuple(layers)
    bypass, induce, kl = (x.mean(-1) for x in (scores.bypass, scores.induce, scores.kl))
    allowed = passing(bypass, induce, kl, rows, n_layers, max_kl=max_kl, max_depth=max_depth)
    if selector == "cosmic":
        cell = select_cosmic(scores.cosmic, rows, n_layers, max_depth=max_depth)
    else:
        cell = select_published(bypass, induce, kl, rows, n_layers, max_kl=max_kl, max_depth=max_depth)
    if cell is None:  # none passes: the smallest bypass; candidates without a direction have no COSMIC score
        shallow = passing(bypass, torch.ones_like(induce), torch.zeros_like(kl), rows, n_layers, max_depth=max_depth)
        cell = smallest(bypass, shallow & ~scores.cosmic.isnan())
    if cell is None:
        raise MechsafetyError(
            f"no direction among layers {rows[0]} to {rows[-1]}", expected=f"layers below {int(max_depth * n_layers)}"
        )
    return rows[cell[0]], positions[cell[1]], bool(allowed[cell])


def _controls(
    model: LensModel,
    validation: Validation,
    metric: RefusalLogOdds,
    found: RefusalDirection,
    harmless: Sequence[str],
    n_random: int,
    seed: int,
) -> ControlScores:
    """Random directions and the difference of two halves of the harmless prompts, at the chosen norm."""
    generator = torch.Generator().manual_seed(seed)
    rows = list(torch.randn(n_random, model.d_model, generator=generator))
    names = [f"random {k + 1}" for k in range(n_random)]
    if len(harmless) >= 2 * MIN_PROMPTS:
        order = torch.randperm(len(harmless), generator=generator)
        seen = positional_vectors(model, harmless, found.layer, found.position).cpu().double()[order]
        half = len(seen) // 2
        rows.append((seen[:half].mean(0) - seen[half:].mean(0)).float())
        names.append("harmless - harmless")
    if not rows:
        empty = torch.zeros(0, len(validation.harmless_scores))
        return ControlScores((), torch.zeros(0, len(validation.harmful_scores)), empty, empty)
    stacked = torch.stack(rows).to(found.vector)
    stacked = stacked / stacked.norm(dim=-1, keepdim=True) * found.vector.norm()
    scores = score_directions(
        model, validation, metric, rearrange(stacked, "row d -> 1 row d"), [found.layer], progress=False
    )
    return ControlScores(tuple(names), scores.bypass[0], scores.induce[0], scores.kl[0])


def _row(
    start: dict[str, Any], scores: "RefusalDirection | ControlScores", at: "int | tuple[int, int]"
) -> dict[str, Any]:
    row = dict(start)
    for name in ("bypass", "induce", "kl"):
        values = getattr(scores, name)[at].cpu().double().numpy()
        low, high = mean_interval(values)
        row |= {name: float(np.mean(values)), f"{name}_low": low, f"{name}_high": high}
    return row
