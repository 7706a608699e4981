"""Checks for notebook 03: activation patching both ways, and where ablation misleads."""

import functools
from typing import Any

import torch
from einops import reduce, repeat
from jaxtyping import Float
from torch import Tensor

from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.nodes import Node
from mechsafety.patching import activation_patching
from mechsafety.patching.activation import PatchDirection
from mechsafety.patching.masks import pair_runs, replacement
from mechsafety.patching.sources import source_values
from mechsafety.prompts import Tokens
from mechsafety.sites import Site, SiteKind
from mechsafety.teaching.check import Case, Check, Mistake
from mechsafety.teaching.models import equal_pairs, logit_difference, shared_model, shared_runs, some_pairs

Z = Float[Tensor, "batch pos head d_head"]


def _with(base: Tensor, new: Tensor | float, *place: Any) -> Tensor:
    """A copy of ``base`` with ``new`` at one place."""
    out = base.clone()
    out[place] = new[place] if isinstance(new, Tensor) else new
    return out


@functools.cache
def _activations() -> list[Case]:
    cases = []
    for size, (layer, head, position) in enumerate(((1, 2, -1), (2, 5, -3), (1, 0, -2))):
        runs = shared_runs(size)
        base, source = (run.acts[SiteKind.Z][layer].clone() for run in (runs.harmful, runs.harmless))
        where, heads = torch.zeros(1, *base.shape[:2]).bool(), torch.zeros(1, base.shape[2]).bool()
        where[:, :, position], heads[:, head] = True, True
        ((_, edit),) = replacement(SiteKind.Z, layer, source, where, heads)
        inputs = {"base": base, "source": source, "head": head, "position": position}
        patched = edit(base)
        assert patched is not None
        cases.append(Case(inputs, patched))
    return cases


_EVERY = slice(None)

patch_head = Check(
    "patch_head",
    _activations,
    (
        Mistake(
            "an ablation",
            "Patching puts the source run's value there, not zero.",
            lambda base, source, head, position: _with(base, 0.0, _EVERY, position, head),
        ),
        Mistake(
            "a patch at every position",
            "Replace the one position only.",
            lambda base, source, head, position: _with(base, source, _EVERY, _EVERY, head),
        ),
        Mistake(
            "a patch of every head",
            "Replace the one head only.",
            lambda base, source, head, position: _with(base, source, _EVERY, position),
        ),
        Mistake(
            "the two runs the wrong way round",
            "The base run is edited; the source run only gives the value.",
            lambda base, source, head, position: _with(source, base, _EVERY, position, head),
        ),
        Mistake(
            "a mean over the batch",
            "Each prompt takes the value of its own counterfactual.",
            lambda base, source, head, position: _with(
                base, source.mean(0, keepdim=True).expand_as(base), _EVERY, position, head
            ),
        ),
    ),
)


@functools.cache
def _models() -> list[Case]:
    cases = []
    places: tuple[tuple[int, int, PatchDirection], ...] = ((1, 3, "noising"), (2, 0, "denoising"), (2, 1, "noising"))
    for size, (layer, head, direction) in enumerate(places):
        model, metric = shared_model(size), logit_difference(shared_model(size))
        tokens = model.tokenize_pairs(some_pairs(size))
        base, source = (
            (tokens.harmful, tokens.harmless) if direction == "noising" else (tokens.harmless, tokens.harmful)
        )
        found = activation_patching(
            model, some_pairs(size), metric, nodes=[Node("head", layer, head)], direction=direction, progress=False
        )
        expected = found.harmful - found.changes[0] if direction == "noising" else found.harmless + found.changes[0]
        inputs = {"model": model, "metric": metric, "base": base, "source": source, "layer": layer, "head": head}
        cases.append(Case(inputs, expected))
    return cases


def _edited(
    model: LensModel,
    metric: RefusalLogOdds,
    base: Tokens,
    source: Tokens,
    layer: int,
    head: int,
    *,
    of: int | None = None,
    share: float = 1.0,
    every: bool = False,
    mean: bool = False,
    last: bool = False,
) -> Float[Tensor, " prompt"]:
    """Scores of the base run with a head's source value; or one of the mistakes.

    These are: another layer (``of``), the value times a number (``share``), all heads (``every``), the source's
    mean over prompts (``mean``), and the last position alone (``last``).
    """
    site = Site(SiteKind.Z, layer if of is None else of)
    values = share * model.read(source, [site])[site]
    if mean:
        values = repeat(values.mean(0), "pos head d_head -> batch pos head d_head", batch=len(values))
    place = (_EVERY, -1 if last else _EVERY, _EVERY if every else head)
    with model.hooks([(site, lambda own: _with(own, values, *place))]):
        return metric(model.logits(base))


patched_scores = Check(
    "patched_scores",
    _models,
    (
        Mistake(
            "an ablation",
            "Patching gives the head its value from the source run, not zero.",
            lambda *inputs: _edited(*inputs, share=0.0),
        ),
        Mistake(
            "a layer too early",
            "Layers are counted from 0: read and edit at Site('z', layer).",
            lambda *inputs: _edited(*inputs, of=inputs[4] - 1),
        ),
        Mistake(
            "the two runs the wrong way round",
            "Read the head in the source run; edit and score the base run.",
            lambda model, metric, base, source, *rest: _edited(model, metric, source, base, *rest),
        ),
        Mistake(
            "a patch of every head",
            "Replace [:, :, head] only.",
            lambda *inputs: _edited(*inputs, every=True),
        ),
        Mistake(
            "a mean over the batch",
            "Each prompt takes the value of its own counterfactual.",
            lambda *inputs: _edited(*inputs, mean=True),
        ),
        Mistake(
            "a patch at the last position alone",
            "Replace the head's value at all positions: [:, :, head].",
            lambda *inputs: _edited(*inputs, last=True),
        ),
        Mistake(
            "a run without a patch",
            "Score the model inside the hooks' context, and let the hook return the new activation.",
            lambda model, metric, base, *rest: metric(model.logits(base)),
        ),
    ),
)


@functools.cache
def _effects() -> list[Case]:
    cases = []
    directions: tuple[PatchDirection, ...] = ("noising", "denoising", "denoising")
    for size, direction in enumerate(directions):
        model = shared_model(size)
        found = activation_patching(
            model, some_pairs(size), logit_difference(model), direction=direction, progress=False
        )
        ends = {"base": found.harmful, "source": found.harmless}
        patched = found.harmful - found.changes
        if direction == "denoising":
            ends, patched = {"base": found.harmless, "source": found.harmful}, found.harmless + found.changes
        cases.append(Case({"patched": patched, **ends}, found.effects))
    return cases


share_of_gap = Check(
    "share_of_gap",
    _effects,
    (
        Mistake(
            "a mean of ratios",
            "Average above and below the line first: a pair with hardly any gap would dominate the mean of ratios.",
            lambda patched, base, source: ((patched - base) / (source - base)).mean(1),
        ),
        Mistake(
            "the opposite sign",
            "An effect is positive where the patch moves the metric from the base towards the source.",
            lambda patched, base, source: (base - patched).mean(1) / (source - base).mean(),
        ),
        Mistake(
            "what is left of the gap",
            "Measure from the base run: 0 where the patch changes nothing, 1 where it gives the source's metric.",
            lambda patched, base, source: (source - patched).mean(1) / (source - base).mean(),
        ),
        Mistake(
            "a change in nats",
            "Divide by the mean gap, so that effects of different metrics compare.",
            lambda patched, base, source: (patched - base).mean(1),
        ),
    ),
)


@functools.cache
def _references() -> list[Case]:
    cases = []
    for size, (layer, head) in enumerate(((0, 1), (2, 4), (3, 2))):
        model = shared_model(size)
        # means over prompts are per column, so that all must have one length
        runs = pair_runs(model, equal_pairs(size), start=0)
        base, reference = (run.acts[SiteKind.Z][layer].clone() for run in (runs.harmful, runs.harmless))
        mean = source_values(runs.harmless, (SiteKind.Z,), "mean", 0)[SiteKind.Z][layer]
        expected = _with(base, mean, _EVERY, _EVERY, head)
        cases.append(Case({"base": base, "reference": reference, "head": head}, expected))
    return cases


def _at_mean(base: Z, over: Tensor, head: int) -> Z:
    return _with(base, over.expand_as(base), _EVERY, _EVERY, head)


mean_ablated = Check(
    "mean_ablated",
    _references,
    (
        Mistake(
            "a zero ablation",
            "Zero is a value that the model may never have seen there: use the mean of the reference prompts.",
            lambda base, reference, head: _with(base, 0.0, _EVERY, _EVERY, head),
        ),
        Mistake(
            "a mean over positions too",
            "Average over prompts only: each position has a mean of its own.",
            lambda base, reference, head: _at_mean(base, reduce(reference, "b p h d -> 1 1 h d", "mean"), head),
        ),
        Mistake(
            "a mean over all axes",
            "Average over prompts only: each position, and each number of the head's vector, has a mean of its own.",
            lambda base, reference, head: _with(base, float(reference[:, :, head].mean()), _EVERY, _EVERY, head),
        ),
        Mistake(
            "the mean of the edited prompts themselves",
            "The mean must not know what the prompts ask: take it over the reference prompts.",
            lambda base, reference, head: _at_mean(base, base.mean(0, keepdim=True), head),
        ),
        Mistake(
            "patching instead of an ablation",
            "All prompts take the same value, the mean; not each its own counterfactual's.",
            lambda base, reference, head: _with(base, reference, _EVERY, _EVERY, head),
        ),
        Mistake(
            "an ablation of every head",
            "Replace the one head only.",
            lambda base, reference, head: reference.mean(0, keepdim=True).expand_as(base),
        ),
    ),
)
