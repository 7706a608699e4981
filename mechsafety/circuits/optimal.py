"""Constants that disturb a model least when parts take them: optimal ablation (Li and Janson 2024)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from mechsafety.circuits.faithfulness import FaithfulnessMeter
from mechsafety.circuits.masks import batches_of_pairs
from mechsafety.inputs import Count, public
from mechsafety.models.engine import BaseRun
from mechsafety.patching.masks import Constants, PairRuns, SoftMask, masked_logits
from mechsafety.scale.work import once, sweeps
from mechsafety.sites import SiteKind


@dataclass(frozen=True, slots=True, kw_only=True)
class _Learning:
    steps: int
    batch: int
    rate: float
    seed: int
    columns: int


@sweeps
@public
def optimal_constants(
    meter: FaithfulnessMeter,
    *,
    columns: Count | None = None,
    steps: Count = 300,
    batch: Count = 16,
    rate: float = 0.03,
    seed: int = 0,
) -> Constants:
    """Learn one constant per part and column, so that parts at their constants change the metric least.

    Each step takes a few pairs. In each prompt, harmful or harmless, a random share of the parts takes its constants.
    The loss is the squared change of the metric, as a share of the mean gap. A constant cannot tell the two prompts of
    a pair apart. With everything patched, the best constants therefore give about the middle between them. The
    constants begin at the mean over the harmless prompts. The learning rate falls to 0 along a cosine.

    One set serves all circuits. Li and Janson 2024 optimise the constants of each circuit anew. With one set, the loss
    of a circuit is an upper bound of theirs. Parts can also make up for each other: the constant of one part may undo
    what is lost with another. The faithfulness of one circuit therefore depends on ``seed`` more than under the other
    ablations.

    Args:
        meter: Pairs to learn on, and the metric. Its runs hold the kinds that constants are made for.
        columns: Number of columns, counted from the end, that the constants cover; those of the meter's runs by
            default. Columns that no pair reaches take the mean over the others.
        steps: Steps of Adam, one batch of pairs each.
        batch: Number of pairs per batch.
        rate: First learning rate, in root mean squares of each layer's deviation from its mean.
        seed: Of the random shares and the order of batches.

    Example:
        >>> meter = ms.circuits.FaithfulnessMeter(model, runs, metric)
        >>> optimal = meter.at_constants(ms.circuits.optimal_constants(meter, steps=20))
        >>> whole, nothing = optimal.faithfulness([meter.parts, []])
        >>> round(whole, 2), round(abs(nothing), 2)
        (1.0, 0.0)
    """
    columns = max(columns or 0, meter.runs.harmful.n_pos)
    learning = _Learning(steps=steps, batch=batch, rate=rate, seed=seed, columns=columns)
    return once("constants", lambda: _learned(meter, learning), Constants, of=learning)


def _learned(meter: FaithfulnessMeter, learning: _Learning) -> Constants:
    """The constants; in one piece, because each step depends on the one before it."""
    mean = Constants.mean(meter.runs.harmless).padded(learning.columns)
    scale = {kind: _deviation(meter.runs, mean, kind) for kind in mean.acts}
    shift = {kind: torch.zeros_like(values, requires_grad=True) for kind, values in mean.acts.items()}
    optimiser = torch.optim.Adam(shift.values(), lr=learning.rate)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, learning.steps)
    harmful, harmless = meter.runs.scores(meter.metric)
    gap = (harmful.double().mean() - harmless.double().mean()).item()
    made = torch.Generator().manual_seed(learning.seed)
    batches = batches_of_pairs(meter, learning.batch, torch.ones(len(meter.runs.harmful)))
    rng, waiting = np.random.default_rng(learning.seed), list[int]()

    def constants() -> Constants:
        return Constants({kind: values + scale[kind] * shift[kind] for kind, values in mean.acts.items()})

    with meter.bar(learning.steps, "constants") as bar:
        for _ in range(learning.steps):
            waiting = waiting or rng.permutation(len(batches)).tolist()
            runs, _ = batches[waiting.pop()]
            with torch.enable_grad():
                values = constants()
                errors = [_error(meter, runs, run, values, made) for run in (runs.harmful, runs.harmless)]
                loss = torch.stack(errors).sum() / gap**2
                gradients = torch.autograd.grad(loss, list(shift.values()))
            for parameter, gradient in zip(shift.values(), gradients, strict=True):
                parameter.grad = gradient
            optimiser.step()
            slower.step()
            bar.update()
    with torch.no_grad():
        return constants()


def _error(
    meter: FaithfulnessMeter, runs: PairRuns, run: BaseRun, constants: Constants, made: torch.Generator
) -> Float[Tensor, ""]:
    """Mean squared change of the metric of one side, with a random share of the parts at their constants."""
    first = runs.tokens.first_differences if runs.align == "tokens" else None
    model, source = meter.model, constants.of(run, first)
    mask = _random_mask(len(run), {kind: values.shape for kind, values in source.items()}, made, model.device)
    return (meter.metric(masked_logits(model, run, source, mask)) - meter.metric(run.logits)).square().mean()


def _random_mask(
    n: int, shapes: Mapping[SiteKind, torch.Size], made: torch.Generator, device: torch.device
) -> SoftMask:
    """Which parts keep their own values: of each prompt, a share that is drawn from 0 to 1."""
    share = torch.rand(n, generator=made)

    def drawn(*axes: int) -> Tensor:
        own = torch.rand(n, *axes, generator=made) < rearrange(share, f"batch -> batch{' 1' * len(axes)}")
        return own.float().to(device)

    n_layers, heads = shapes[SiteKind.Z][0], shapes[SiteKind.Z][3]
    neurons = drawn(n_layers, shapes[SiteKind.NEURONS][3]) if SiteKind.NEURONS in shapes else None
    return SoftMask(drawn(n_layers, heads), drawn(n_layers), neurons)


def _deviation(runs: PairRuns, mean: Constants, kind: SiteKind) -> Float[Tensor, "layer ..."]:
    """Root mean square, per layer, of what both sides' values differ by from the mean."""
    total = torch.stack(
        [
            reduce((run.acts[kind] - mean.of(run)[kind]).float().square(), "layer batch ... -> layer", "mean")
            for run in (runs.harmful, runs.harmless)
        ]
    )
    deviation = total.mean(0).sqrt().to(mean.acts[kind].dtype)
    return rearrange(deviation, f"layer -> layer{' 1' * (mean.acts[kind].ndim - 1)}")
