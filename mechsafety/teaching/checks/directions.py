"""Checks for notebook 06: the refusal direction, and probes with their controls."""

import functools
from typing import Any

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from mechsafety.directions.scores import mean_differences
from mechsafety.interventions.steering import orthonormal, removal_hooks
from mechsafety.teaching.check import Case, Check, Mistake
from mechsafety.teaching.models import SIZES, random_numbers, shared_model, some_pairs

Stream = Float[Tensor, "prompt pos d_model"]


def _unit(vector: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
    unit: Tensor = vector / vector.norm(dim=-1, keepdim=True)
    return unit


@functools.cache
def _prompts() -> list[Case]:
    cases = []
    for size, layer in enumerate((1, 2, 1)):
        model, pairs = shared_model(size), some_pairs(size)
        harmful, harmless = pairs.harmful, some_pairs(2).harmless[: len(pairs) - 1]  # not equally many
        difference = mean_differences(model, harmful, harmless, n_positions=1)[0][layer, 0]
        sides = (model.cache(prompts, ["resid"]).resid[layer].clone() for prompts in (harmful, harmless))
        inputs = dict(zip(("harmful", "harmless"), sides, strict=True))
        cases.append(Case(inputs, difference / difference.norm()))
    return cases


difference_direction = Check(
    "difference_direction",
    _prompts,
    (
        Mistake(
            "a non-unit vector",
            "Divide the difference by its length.",
            lambda harmful, harmless: harmful[:, -1].mean(0) - harmless[:, -1].mean(0),
        ),
        Mistake(
            "the opposite sign",
            "The direction points to refusal: harmful minus harmless.",
            lambda harmful, harmless: _unit(harmless[:, -1].mean(0) - harmful[:, -1].mean(0)),
        ),
        Mistake(
            "a mean over positions",
            "The model decides at the last position: read there alone.",
            lambda harmful, harmless: _unit(harmful.mean((0, 1)) - harmless.mean((0, 1))),
        ),
        Mistake(
            "prompts of length 1",
            "Average the activations as they are; bring only the difference to length 1.",
            lambda harmful, harmless: _unit(_unit(harmful[:, -1]).mean(0) - _unit(harmless[:, -1]).mean(0)),
        ),
        Mistake(
            "a difference of two unit vectors",
            "Subtract the means as they are; bring only the difference to length 1.",
            lambda harmful, harmless: _unit(_unit(harmful[:, -1].mean(0)) - _unit(harmless[:, -1].mean(0))),
        ),
    ),
)


@functools.cache
def _streams() -> list[Case]:
    cases = []
    for size in range(len(SIZES)):
        model = shared_model(size)
        x = model.cache(some_pairs(size).harmful, ["resid"]).resid[1].clone()
        direction = 3 * torch.randn(model.d_model, generator=random_numbers(size))
        basis = orthonormal(rearrange(direction, "d -> 1 d"))
        (_, remove), *_ = removal_hooks(model, rearrange(basis, "rank d -> 1 rank d"))
        left = remove(x)
        assert left is not None
        cases.append(Case({"x": x, "direction": direction}, left))
    return cases


def _along(x: Tensor, vector: Tensor) -> Tensor:
    return rearrange(x @ vector, "... -> ... 1") * vector


remove_direction = Check(
    "remove_direction",
    _streams,
    (
        Mistake(
            "a non-unit vector",
            "Divide the direction by its length before you project, or by its squared length once.",
            lambda x, direction: x - _along(x, direction),
        ),
        Mistake(
            "steering in place of removal",
            "Remove what each activation has along the direction, not the same vector everywhere.",
            lambda x, direction: x - _unit(direction),
        ),
        Mistake(
            "the part along the direction",
            "Keep what is left: subtract the projection from x.",
            lambda x, direction: _along(x, _unit(direction)),
        ),
        Mistake(
            "a reflection",
            "Subtract the projection once; twice turns the sign of what lies along the direction.",
            lambda x, direction: x - 2 * _along(x, _unit(direction)),
        ),
        Mistake(
            "a mean over the batch",
            "Each activation loses its own projection.",
            lambda x, direction: x - _along(reduce(x, "prompt pos d -> 1 1 d", "mean"), _unit(direction)),
        ),
    ),
)


def _probe() -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))


def _accuracy(
    x: Float[Tensor, "prompt d_model"],
    labels: Int[Tensor, " prompt"],
    topics: Int[Tensor, " prompt"],
    *,
    against: Int[Tensor, " prompt"] | None = None,
    held_out: bool = True,
) -> float:
    """Accuracy of a probe, with whole topics held out; or one of the mistakes.

    These are: other labels to score against (``against``), and folds with prompts of every topic (not ``held_out``).
    """
    from sklearn.model_selection import LeaveOneGroupOut, StratifiedKFold, cross_val_predict

    folds = {"groups": topics.numpy(), "cv": LeaveOneGroupOut()} if held_out else {"cv": StratifiedKFold(5)}
    found = cross_val_predict(_probe(), x.numpy(), labels.numpy(), **folds)
    return float(np.mean(found == (labels if against is None else against).numpy()))


def _both(
    x: Float[Tensor, "prompt d_model"],
    labels: Int[Tensor, " prompt"],
    shuffled: Int[Tensor, " prompt"],
    topics: Int[Tensor, " prompt"],
    *,
    held_out: bool = True,
) -> Float[Tensor, " 2"]:
    return torch.tensor([_accuracy(x, target, topics, held_out=held_out) for target in (labels, shuffled)])


@functools.cache
def _probes() -> list[Case]:
    cases = []
    for seed, (n, width, n_topics) in enumerate(((60, 9, 4), (84, 14, 6), (45, 7, 3))):
        rng = random_numbers(seed)
        topics = torch.arange(n) % n_topics
        # most prompts of a topic are of one kind, so that a probe that knows the topic seems to know the kind
        labels = ((topics % 2 + (torch.rand(n, generator=rng) < 0.25)) % 2).long()
        means = 1.5 * torch.randn(n_topics, width, generator=rng)
        harm = torch.randn(width, generator=rng)
        x = means[topics] + 0.4 * rearrange(2.0 * labels - 1, "prompt -> prompt 1") * harm
        x = x + torch.randn(n, width, generator=rng)
        shuffled = labels[torch.randperm(n, generator=rng)]
        inputs = {"x": x, "labels": labels, "shuffled": shuffled, "topics": topics}
        cases.append(Case(inputs, _both(x, labels, shuffled, topics)))
    return cases


def _trained_on(
    x: Float[Tensor, "prompt d_model"], labels: Int[Tensor, " prompt"], shuffled: Int[Tensor, " prompt"]
) -> Float[Tensor, " 2"]:
    scores = [_probe().fit(x.numpy(), target.numpy()).score(x.numpy(), target.numpy()) for target in (labels, shuffled)]
    return torch.tensor(scores)


probe_and_control = Check(
    "probe_and_control",
    _probes,
    (
        Mistake(
            "a score on the training prompts",
            "Predict every prompt with a probe that has not seen the prompt's topic.",
            lambda x, labels, shuffled, topics: _trained_on(x, labels, shuffled),
        ),
        Mistake(
            "folds that ignore the topics",
            "Hold out whole topics: otherwise a probe that recognises the topic seems to recognise harm.",
            lambda x, labels, shuffled, topics: _both(x, labels, shuffled, topics, held_out=False),
        ),
        Mistake(
            "a control that is scored against the true labels",
            "Score the control against the shuffled labels that it was trained on.",
            lambda x, labels, shuffled, topics: torch.tensor(
                [_accuracy(x, labels, topics), _accuracy(x, shuffled, topics, against=labels)]
            ),
        ),
        Mistake(
            "a control that is trained on the true labels",
            "Train the control on the shuffled labels: it shows what the procedure finds where there is nothing.",
            lambda x, labels, shuffled, topics: torch.tensor(
                [_accuracy(x, labels, topics), _accuracy(x, labels, topics, against=shuffled)]
            ),
        ),
    ),
)
