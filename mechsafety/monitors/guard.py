"""`SafetyGuard`: predicts, before the first token, whether the reply to a prompt will be unsafe."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechsafety.conversation import PromptLike
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Amount, Prompts, public
from mechsafety.models import LensModel
from mechsafety.monitors.activation import ActivationMonitor, MonitorWeights, ReplyWatch, WatchedReply
from mechsafety.monitors.features import LabelledPrompts, LastToken, check_fitted_on, read_prompts, read_tokens
from mechsafety.monitors.regression import INVERSE_PENALTY, cross_validated, fit_regression
from mechsafety.neurons.masks import mask_nodes, neuron_mask
from mechsafety.nodes import Node
from mechsafety.results import Provenance, Result


@dataclass(frozen=True, slots=True)
class Verdict:
    """A guard's answer for one prompt.

    Attributes:
        unsafe: Whether ``probability`` reaches the threshold.
        probability: Predicted probability that the reply is unsafe.
        threshold: Probability from which the guard calls a reply unsafe.

    Example:
        >>> verdict = guard.predict(harmful[0])
        >>> verdict.unsafe, verdict.probability >= verdict.threshold
        (True, True)
    """

    unsafe: bool
    probability: float
    threshold: float


@dataclass(frozen=True, slots=True)
class GuardedOutput:
    """What a wrapped ``generate`` returns.

    Attributes:
        verdicts: One verdict per prompt, made before the first token.
        output: What ``generate`` returned for the prompts that were not stopped; None if it was not called.
        answered: Numbers of these prompts, in the order of the output's rows.
        watched: What the guard's monitors saw of each of these replies; empty without monitors.

    Example:
        >>> generate = guard.wrap(model.generate, stop=True)
        >>> out = generate([harmful[0], harmless[0]], 8)
        >>> out.answered, out.replies
        ((1,), [None, 'Sure ! here is how .'])
    """

    verdicts: tuple[Verdict, ...]
    output: Any
    answered: tuple[int, ...]
    watched: tuple[WatchedReply, ...] = ()

    @property
    def replies(self) -> list[Any]:
        """One entry per prompt: its row of the output, or None if it was stopped."""
        rows = dict(zip(self.answered, range(len(self.answered)), strict=True))
        return [self.output[rows[k]] if k in rows else None for k in range(len(self.verdicts))]


@dataclass(frozen=True, slots=True, repr=False)
class GuardWeights(Result):
    """What a guard has learned: logistic regression on standardised activations of chosen neurons.

    Attributes:
        provenance: Model, options, versions.
        neurons: Mask of the neurons read at the last prompt token.
        mean, scale: Mean and standard deviation of each feature in training.
        weights, intercept: Weights and intercept of the regression.
        threshold: Probability from which a reply counts as unsafe.
        n_safe, n_unsafe: Numbers of safe and unsafe training prompts.
        monitors: Monitors that watch the reply while it is generated.

    Example:
        >>> path = guard.weights.save(folder / "guard.json")
        >>> ms.monitors.GuardWeights.load(path)
        GuardWeights(6 neurons, 60 safe and 60 unsafe prompts)
    """

    provenance: Provenance
    neurons: Bool[Tensor, "layer d_mlp"]
    mean: Float[Tensor, " neuron"]
    scale: Float[Tensor, " neuron"]
    weights: Float[Tensor, " neuron"]
    intercept: float
    threshold: float
    n_safe: int
    n_unsafe: int
    monitors: tuple[MonitorWeights, ...] = ()

    def check_stored(self) -> None:
        """Refuse a file whose parts do not belong together, or that would give no probability."""
        sizes = [int(self.neurons.sum()), len(self.mean), len(self.scale), len(self.weights)]
        if len(set(sizes)) > 1:
            raise MechsafetyError(
                "{} neurons, {} means, {} scales and {} weights".format(*sizes), expected="one of each per neuron"
            )
        numbers = (self.mean, self.scale, self.weights, torch.tensor(float(self.intercept)))
        if not all(bool(part.isfinite().all()) for part in numbers) or bool((self.scale == 0).any()):
            raise MechsafetyError("weights that give no probability", expected="finite numbers, and no scale of 0")
        _share("threshold", self.threshold)
        for monitor in self.monitors:
            monitor.check_stored()

    def __repr__(self) -> str:
        return f"GuardWeights({len(self.weights)} neurons, {self.n_safe} safe and {self.n_unsafe} unsafe prompts)"

    @public
    def probabilities(self, acts: Float[Tensor, "prompt neuron"]) -> Float[Tensor, " prompt"]:
        """Predicted probability that each reply is unsafe."""
        return (((acts - self.mean) / self.scale) @ self.weights + self.intercept).sigmoid()

    def to_dataframe(self) -> pd.DataFrame:
        """One row per neuron, largest absolute weight first."""
        frame = pd.DataFrame({"node": [str(node) for node in mask_nodes(self.neurons)], "weight": self.weights.numpy()})
        return frame.sort_values("weight", key=abs, ascending=False, kind="stable", ignore_index=True)

    def plot(self) -> go.Figure:
        """Bar chart of the 30 largest weights."""
        import plotly.express as px

        return px.bar(self.to_dataframe().head(30), x="node", y="weight")


class SafetyGuard:
    """Predicts from neurons at the last prompt token whether the model's reply will be unsafe (Chen et al. 2024).

    Make one with `fit` or `load`. What it has learned is in ``weights``; it never changes the model.

    Example:
        >>> guard = ms.monitors.SafetyGuard.fit(model, ranking.top(0.05), labelled)
        >>> guard.predict(harmful[0]).unsafe, guard.predict(harmless[0]).unsafe
        (True, False)
        >>> guard.wrap(model.generate, stop=True)([harmful[0], harmless[0]], 8).replies
        [None, 'Sure ! here is how .']
    """

    __slots__ = ("model", "weights")
    model: LensModel
    weights: GuardWeights

    def __init__(self, model: LensModel, weights: GuardWeights) -> None:
        if tuple(weights.neurons.shape) != (model.n_layers, model.d_mlp):
            raise MechsafetyError(
                f"a guard for {tuple(weights.neurons.shape)} neurons", expected=f"one that was fitted on {model!r}"
            )
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "weights", weights)

    def __setattr__(self, name: str, value: object) -> None:
        raise MechsafetyError(f"guard.{name} cannot be assigned", hint="guard.with_threshold(...) gives another guard")

    @property
    def threshold(self) -> float:
        """Probability from which a reply counts as unsafe."""
        return self.weights.threshold

    def with_threshold(self, threshold: float) -> "SafetyGuard":
        """The same guard with another threshold.

        Raises:
            MechsafetyError: The threshold is not a number from 0 to 1.
        """
        return SafetyGuard(self.model, replace(self.weights, threshold=_share("threshold", threshold)))

    @public
    def with_false_positive_rate(self, rate: float, safe: Prompts) -> "SafetyGuard":
        """The same guard with the lowest threshold that flags at most this share of safe prompts.

        Args:
            rate: Largest share of the safe prompts that may be flagged.
            safe: Prompts whose replies are safe, other than those that the guard has learned from. With few of them
                the true rate can lie far from this share: of n prompts with none flagged, the 95 % upper limit is
                about 3 / n.

        Raises:
            MechsafetyError: No prompts, a rate outside 0 to 1, or a rate above 0 of which a single flagged prompt would
                be more.
        """
        rate = _share("rate", rate)
        if not len(safe):
            raise MechsafetyError("no safe prompts", expected="at least one")
        found = sorted((verdict.probability for verdict in self.predict_all(safe)), reverse=True)
        may = math.floor(rate * len(found) + 1e-9)
        if rate and not may:
            raise MechsafetyError(
                f"{len(found)} safe prompts for a false-positive rate of {rate:g}",
                expected=f"at least {math.ceil(1 / rate - 1e-9)}",
                hint="give more prompts, or a larger rate",
                page="too-few-harmless-prompts",
            )
        # just above the first probability that must not be flagged
        return self.with_threshold(0.0 if may == len(found) else min(1.0, math.nextafter(found[may], math.inf)))

    def __repr__(self) -> str:
        return f"SafetyGuard({self.model.name}, {self.weights!r}, unsafe from {self.threshold:.2f})"

    def with_monitor(self, monitor: ActivationMonitor) -> "SafetyGuard":
        """The same guard with one more monitor: it judges the prompt, and the monitors watch the reply.

        `wrap` then reads every generated token in the generation's own forwards. With ``stop=True`` a reply ends before
        the first token that a monitor flags. `save` stores the monitors with the guard.

        Raises:
            MechsafetyError: The monitor was fitted on a model with other weights, another chat template or other
                template options.
        """
        other = monitor.weights.provenance.difference(self.weights.provenance)
        if other is not None:
            raise MechsafetyError(
                f"this monitor was fitted on {monitor.model.name}, whose {other[0]} differ from the guard's model",
                hint="fit one: ActivationMonitor.fit(guard.model, source, prompts)",
            )
        return SafetyGuard(self.model, replace(self.weights, monitors=(*self.weights.monitors, monitor.weights)))

    def watch(self, *, stop: bool = False) -> ReplyWatch:
        """A fresh watch of all monitors for one call of `LensModel.generate` or `LensModel.stream`.

        Args:
            stop: Whether a reply ends before the first token that a monitor flags.

        Raises:
            MechsafetyError: The guard has no monitors.
        """
        if not self.weights.monitors:
            raise MechsafetyError(
                "a guard without monitors watches no reply", hint="guard.with_monitor(monitor).watch()"
            )
        return ReplyWatch(self.model, self.weights.monitors, stop=stop)

    @classmethod
    @public
    def fit(
        cls,
        model: LensModel,
        neurons: Tensor | Sequence[Node],
        train: LabelledPrompts,
        *,
        target_tpr: float = 0.95,
        seed: Amount = 0,
        progress: bool = False,
    ) -> "SafetyGuard":
        """Learn from labelled prompts.

        The threshold is the highest probability that catches ``target_tpr`` of the unsafe training prompts. For this
        choice, a regression that has not seen the prompt's group predicts each prompt (five folds).

        Args:
            model: The model that is watched.
            neurons: Mask or nodes to read.
            train: Labelled prompts, with at least five groups per label (without groups, five prompts per label).
            target_tpr: Share of unsafe prompts to catch.
            seed: Seed of the folds.
            progress: Whether to show a bar.

        Raises:
            MechsafetyError: No neuron, a share out of range, too few prompts, or a regression that does not converge.
        """
        mask = neuron_mask(model, neurons)
        if not bool(mask.any()):
            raise MechsafetyError("no neuron to read", expected="at least one")
        if not 0 < target_tpr <= 1:
            raise MechsafetyError(f"target_tpr={target_tpr}", expected="above 0 and at most 1")
        acts = read_prompts(model, train.prompts, progress=progress)
        features = acts.chosen(mask).double().numpy()
        unsafe = np.array(train.unsafe)
        out_of_fold = cross_validated(features, train, seed)
        caught = math.ceil(target_tpr * unsafe.sum() - 1e-9)
        threshold = float(np.sort(out_of_fold[unsafe])[-caught])
        scaler, rotation, regression = (step for _, step in fit_regression(features, unsafe).steps)
        learned = rotation.components_.T @ regression.coef_[0]
        options = {"set": train.name, "target_tpr": target_tpr, "inverse_penalty": INVERSE_PENALTY}
        weights = GuardWeights(
            model.provenance(seed=seed, options=options),
            mask,
            torch.from_numpy(scaler.mean_).float(),
            torch.from_numpy(scaler.scale_).float(),
            torch.from_numpy(learned).float(),
            float(regression.intercept_[0] - rotation.mean_ @ learned),
            threshold,
            int((~unsafe).sum()),
            int(unsafe.sum()),
        )
        return cls(model, weights)

    @public
    def predict(self, prompt: PromptLike) -> Verdict:
        """Verdict on one chat prompt, from one forward pass over its tokens; nothing is generated.

        Raises:
            MechsafetyError: Several prompts.
        """
        if isinstance(prompt, list | tuple) and prompt and all(isinstance(one, str) for one in prompt):
            raise MechsafetyError(
                f"a list of {len(prompt)} texts", expected="one prompt", hint="use guard.predict_all(prompts)"
            )
        return self.predict_all([prompt])[0]

    @public
    def predict_all(self, prompts: Prompts) -> list[Verdict]:
        """Verdicts on several chat prompts, in order."""
        return self._verdicts(read_prompts(self.model, prompts))

    def wrap(
        self,
        generate: Callable[..., Any],
        *,
        stop: bool = False,
        on_verdicts: Callable[[tuple[Verdict, ...]], object] | None = None,
    ) -> Callable[..., GuardedOutput]:
        """A ``generate`` that first gives the guard's verdicts.

        Args:
            generate: `LensModel.generate` (takes a list of prompts) or the ``generate`` of a Hugging Face model (takes
                ``input_ids`` and ``attention_mask``, padded on the left). Its model must compute the same as the
                guard's model. A guard with monitors takes `LensModel.generate` or `LensModel.reply_ids` of its own
                model.
            stop: Whether prompts that are judged unsafe are left out of the call. Nothing is generated for them, and
                the others are answered. A reply ends before the first token that a monitor flags.
            on_verdicts: Called with the verdicts before anything is generated. An exception from it ends the call.

        Returns:
            A function with the arguments of ``generate`` that returns a `GuardedOutput`.

        Raises:
            MechsafetyError: ``generate`` cannot be called; or the guard has monitors, and it is not its own model's.
        """
        if not callable(generate):
            raise MechsafetyError(
                f"generate is of type {type(generate).__name__}", expected="a function", hint="pass model.generate"
            )
        if self.weights.monitors:
            self._check_watchable(generate)

        def guarded(*args: Any, **kwargs: Any) -> GuardedOutput:
            verdicts = tuple(self._verdicts(self._read(args, kwargs)))
            if on_verdicts is not None:
                on_verdicts(verdicts)
            rows = tuple(k for k, verdict in enumerate(verdicts) if not (stop and verdict.unsafe))
            if not rows:
                return GuardedOutput(verdicts, None, ())
            if len(rows) < len(verdicts):
                args, kwargs = _some_rows(args, kwargs, rows)
            if not self.weights.monitors:
                return GuardedOutput(verdicts, generate(*args, **kwargs), rows)
            watch = self.watch(stop=stop)
            output = generate(*args, **kwargs, watch=watch)
            return GuardedOutput(verdicts, output, rows, tuple(watch.reply(k) for k in range(len(rows))))

        return guarded

    def _check_watchable(self, generate: Callable[..., Any]) -> None:
        """Refuse a function whose forwards the monitors cannot read."""
        owner = getattr(generate, "__self__", None)
        own = isinstance(owner, LensModel) and owner.hf_model is self.model.hf_model
        if not own or getattr(generate, "__name__", "") not in ("generate", "reply_ids"):
            raise MechsafetyError(
                f"a guard with monitors was given {getattr(generate, '__qualname__', generate)!r}",
                expected="generate or reply_ids of its own model",
                hint="write guard.wrap(guard.model.generate)",
            )

    def _read(self, args: Sequence[Any], kwargs: dict[str, Any]) -> LastToken:
        given = next((kwargs[key] for key in ("input_ids", "inputs", "prompts") if key in kwargs), None)
        given = args[0] if args else given
        if isinstance(given, Tensor):
            mask = kwargs.get("attention_mask")
            return read_tokens(self.model, given, torch.ones_like(given).bool() if mask is None else mask.bool())
        if isinstance(given, str) or given is None:
            raise MechsafetyError(f"generate was called with {given!r}", expected="a list of prompts or input_ids")
        return read_prompts(self.model, given)

    def _verdicts(self, acts: LastToken) -> list[Verdict]:
        found = self.weights.probabilities(acts.chosen(self.weights.neurons)).tolist()
        # activations that are no numbers give no probability, and no reason to call a reply safe
        limit = self.weights.threshold
        return [Verdict(p >= limit or math.isnan(p), p, limit) for p in found]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write what was learned, monitors included, to a folder or to one file that ends in ``.json``.

        The model is not in it.
        """
        return self.weights.save(path)

    @classmethod
    @public
    def load(cls, path: str | os.PathLike[str], model: LensModel) -> "SafetyGuard":
        """Load a saved guard for the model that it was fitted on.

        Raises:
            MechsafetyError: There is no guard at ``path``; or it was fitted on a model with other weights, another chat
                template or other template options.
        """
        weights = GuardWeights.load(path)
        check_fitted_on("guard", weights.provenance, model, "fit one: SafetyGuard.fit(model, neurons, train)")
        return cls(model, weights)


def _share(name: str, value: Any) -> float:
    """The number, if it is one from 0 to 1."""
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= 1:
        raise MechsafetyError(f"{name}={value!r}", expected="a number from 0 to 1")
    return number


def _some_rows(
    args: tuple[Any, ...], kwargs: dict[str, Any], rows: Sequence[int]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call of ``generate`` with some of its prompts: lists and tensors of one row per prompt are cut alike."""

    def cut(value: Any) -> Any:
        return value[list(rows)] if isinstance(value, Tensor) else [list(value)[k] for k in rows]

    per_row = ("input_ids", "inputs", "prompts", "attention_mask")
    named: dict[str, Any] = {key: cut(kwargs[key]) for key in per_row if key in kwargs}
    return (cut(args[0]), *args[1:]) if args else args, {**kwargs, **named}
