"""Rankings from masks that are trained together, in place of gradients that look at one part at a time.

Every part has a gate between 0 (its value from the harmless run) and 1 (its own value). All gates are trained at once
to keep the metric while open gates cost more and more. The later a part's gate closes, the more the part is needed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechsafety.circuits.faithfulness import FaithfulnessMeter
from mechsafety.circuits.goal import GoalKind
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Count, check_fields, public
from mechsafety.nodes import Part
from mechsafety.patching.masks import PairRuns, pair_runs
from mechsafety.scale.work import once, sweeps

# hard concrete gates: temperature, and the interval that is clipped to [0, 1] (Louizos et al. 2018, section 4)
TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
# a gate that is open 95 times out of 100
START = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How masks are trained.

    Attributes:
        steps: Steps of Adam, one batch of pairs each.
        batch: Pairs in a batch.
        rate: Learning rate of the gates' logits.
        penalty: Cost of all gates open, at the first step, and cost of one open gate, at the last step. The cost of one
            gate grows geometrically between them. Costs are in squared shares of the metric gap: at a cost of 0.01 a
            gate closes that keeps the metric from being 0.1 of the gap off.
        seed: Of the gates' noise and the order of batches.

    Raises:
        MechsafetyError: A penalty that is not above 0.

    Example:
        >>> ms.circuits.Training(steps=50).steps
        50
        >>> ms.circuits.Training(steps=0)
        Traceback (most recent call last):
        mechsafety.errors.MechsafetyError: steps=0; expected at least 1
    """

    steps: Count = 250
    batch: Count = 8
    rate: float = 0.1
    penalty: tuple[float, float] = (0.3, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if not all(cost > 0 for cost in self.penalty):
            raise MechsafetyError(f"penalty {self.penalty}", expected="two numbers above 0")


@dataclass(frozen=True, slots=True)
class Trained:
    """Gates after training.

    Attributes:
        ranking: The parts, the most needed first: the one whose gate closed last, or is open widest.
        path: After each step: number of open gates, and the loss without the penalty.

    Example:
        >>> meter = ms.circuits.FaithfulnessMeter(model, runs, metric)
        >>> trained = ms.circuits.train_masks(meter, training=ms.circuits.Training(steps=20))
        >>> len(trained.ranking)  # heads and MLPs
        20
    """

    ranking: tuple[Part, ...]
    path: tuple[tuple[int, float], ...]


@sweeps
@public
def train_masks(
    meter: FaithfulnessMeter,
    goal: GoalKind = "reach",
    training: Training | None = None,
    *,
    weights: Sequence[int] | None = None,
) -> Trained:
    """Train one hard concrete gate per part (Louizos et al. 2018), and rank the parts by when their gates close.

    The loss of a pair is the squared difference between its metric under the gates and its metric in the whole model,
    as a share of the mean gap. With the goal ``reach`` it counts only where the gates give less than the whole model.
    Each step draws new gates, so that a part counts that is needed whichever other parts are left.

    Args:
        meter: Pairs and parts.
        goal: ``reach`` or ``match``.
        training: How the gates are trained.
        weights: How often each pair counts; once by default.

    Example:
        >>> meter = ms.circuits.FaithfulnessMeter(model, runs, metric)
        >>> trained = ms.circuits.train_masks(meter, training=ms.circuits.Training(steps=50))
        >>> set(trained.ranking) == set(meter.parts)
        True
    """
    training = training or Training()
    return once("masks", lambda: _trained(meter, goal, training, weights), Trained, of=(goal, training, weights))


def _trained(meter: FaithfulnessMeter, goal: GoalKind, training: Training, weights: Sequence[int] | None) -> Trained:
    """Training in one piece: each step depends on the one before it."""
    made = torch.Generator().manual_seed(training.seed)
    order = np.random.default_rng(training.seed)
    device, n = meter.model.device, len(meter.parts)
    counts = torch.ones(len(meter.runs.harmful)) if weights is None else torch.tensor(list(weights)).float()
    batches = batches_of_pairs(meter, training.batch, counts)
    logits = torch.full((n,), START, device=device, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=training.rate)
    closed_at = torch.full((n,), math.inf)
    path: list[tuple[int, float]] = []
    waiting: list[int] = []
    harmful, harmless = meter.ends()
    share = counts.numpy() / counts.sum().item()
    gap = float(share @ (harmful - harmless))
    first, last = training.penalty[0] / n, training.penalty[1]
    with meter.bar(training.steps, "masks") as bar:
        for step in range(training.steps):
            waiting = waiting or order.permutation(len(batches)).tolist()
            runs, count = batches[waiting.pop()]
            noise = torch.rand(n, generator=made).to(device).clamp(1e-6, 1 - 1e-6)
            cost = first * (last / first) ** (step / max(1, training.steps - 1))
            with torch.enable_grad():
                lost = (meter.soft(runs, _gates(logits, noise)) - meter.metric(runs.harmful.logits)) / gap
                lost = lost.clamp(max=0) if goal == "reach" else lost
                error = (count * lost.square()).sum() / count.sum()
                (gradient,) = torch.autograd.grad(error + cost * _open(logits).sum(), [logits])
            logits.grad = gradient
            optimiser.step()
            is_open = (logits.detach() > 0).cpu()
            closed_at = torch.where(is_open, math.inf, closed_at.clamp(max=step))
            path.append((int(is_open.sum()), float(error.detach())))
            bar.update()
    width = logits.detach().cpu()
    ranking = sorted(range(n), key=lambda k: (-float(closed_at[k]), -float(width[k]), k))
    return Trained(tuple(meter.parts[k] for k in ranking), tuple(path))


def _gates(logits: Float[Tensor, "*rows part"], noise: Float[Tensor, "*rows part"]) -> Float[Tensor, "*rows part"]:
    """Gates drawn from the hard concrete distribution."""
    soft = torch.sigmoid((noise.log() - (1 - noise).log() + logits) / TEMPERATURE)
    return (soft * (HIGH - LOW) + LOW).clamp(0, 1)


def _open(logits: Float[Tensor, " part"]) -> Float[Tensor, " part"]:
    """Probability that each gate is not 0."""
    return torch.sigmoid(logits - TEMPERATURE * math.log(-LOW / HIGH))


def batches_of_pairs(
    meter: FaithfulnessMeter, size: int, counts: Float[Tensor, " pair"]
) -> list[tuple[PairRuns, Float[Tensor, " row"]]]:
    """Runs of a few pairs of similar length each, with how often each pair counts; pairs that never count are out."""
    tokens, kinds = meter.runs.tokens, tuple(meter.runs.harmful.acts)
    order = [k for k in tokens.first_differences.argsort(stable=True).tolist() if counts[k] > 0]
    parts = [order[k : k + size] for k in range(0, len(order), size)]
    constants = meter.runs.constants
    return [
        (
            pair_runs(meter.model, tokens.rows(rows), extra=kinds, constants=constants),
            counts[rows].to(meter.model.device),
        )
        for rows in parts
    ]
