"""Probes: where in a model harmful and harmless prompts can be told apart, and whether the model depends on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from mechsafety.conversation import PromptLike
from mechsafety.directions.scores import divergence
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Amount, Prompts, public
from mechsafety.intervals import mean_interval, wilson_interval
from mechsafety.interventions.batched import Later, PromptBatches, removed_runs, run_unedited
from mechsafety.interventions.steering import token_batches
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.progress import progress_bar
from mechsafety.prompts import PromptPairs, builtin_prompts, distinct, omissions, unseen
from mechsafety.results import Provenance, Result
from mechsafety.scale.work import sweeps, work

PROBE_SPANS = ("instruction", "suffix", "last")
# inverse regularisation strengths among which the inner cross-validation chooses
COSTS = (1e-3, 1e-2, 1e-1, 1.0)
MIN_GROUPS = 3
N_ERASE = 16


@dataclass(frozen=True, slots=True)
class ProbeReport(Result):
    """Decision values of probes on prompts that they were not fitted on, and of their controls.

    A probe's accuracy shows that the model holds the information. It does not show that the model uses it; ``erased``
    measures that.

    Attributes:
        provenance: Model, options, versions.
        layers: Blocks before which the residual stream is read (``n_layers`` for the final stream).
        spans: Mean over the tokens of the ``instruction`` or of the ``suffix``, or the ``last`` token.
        labels: 1 harmful, 0 harmless.
        values: Out-of-fold decision values, above 0 for harmful. No probe has seen the topic that it judges.
        shuffled: Decision values of probes whose labels were swapped at random within pairs, one table per draw.
        shuffled_labels: The labels of each draw. Its probes are fitted on them and scored against them.
        lexical: Out-of-fold decision values of a TF-IDF classifier of the prompts' text.
        hard: Decision values on scary but harmless prompts, of probes fitted on all pairs.
        lexical_hard: The same for the TF-IDF classifier.
        directions: Weights of the fitted probes in the residual stream, at length 1; 0 where the prompts do not differ.
        patterns: How activations move with the probe's value: their covariance times the weights, at length 1 (Haufe et
            al. 2014). Weights also cancel noise, so weights and pattern can point far apart.
        unedited: Metric of the unedited model on the harmful prompts used for erasing; None without a metric.
        erased: The same when the direction of the probe's weights is removed from all that is written to the residual
            stream.
        pattern_erased: The same when the pattern is removed.
        random_erased: The same when random directions are removed, one row per direction.
        erased_kl: Side effect of erasing the weights: KL(unedited || erased) of the next token on harmless prompts, in
            nats. None without a metric.
        pattern_erased_kl: The same for the pattern.
        random_erased_kl: The same for the random directions.

    Example:
        >>> few = made.pairs.sample(24)
        >>> found = ms.probe_layers(model, few, layers=[0, 4], spans=["last"], outer=2, inner=2, n_shuffled=2)
        >>> found.to_dataframe().columns[:6].tolist()
        ['layer', 'span', 'accuracy', 'accuracy_low', 'accuracy_high', 'auroc']
    """

    provenance: Provenance
    layers: tuple[int, ...]
    spans: tuple[str, ...]
    labels: Float[Tensor, " prompt"]
    values: Float[Tensor, "layer span prompt"]
    shuffled: Float[Tensor, "draw layer span prompt"]
    shuffled_labels: Float[Tensor, "draw prompt"]
    lexical: Float[Tensor, " prompt"]
    hard: Float[Tensor, "layer span hard"]
    lexical_hard: Float[Tensor, " hard"]
    directions: Float[Tensor, "layer span d_model"]
    patterns: Float[Tensor, "layer span d_model"]
    unedited: Float[Tensor, " harmful"] | None
    erased: Float[Tensor, "layer span harmful"] | None
    pattern_erased: Float[Tensor, "layer span harmful"] | None
    random_erased: Float[Tensor, "random harmful"] | None
    erased_kl: Float[Tensor, "layer span harmless"] | None
    pattern_erased_kl: Float[Tensor, "layer span harmless"] | None
    random_erased_kl: Float[Tensor, "random harmless"] | None

    def __repr__(self) -> str:
        best = self.to_dataframe().iloc[0]
        return (
            f"ProbeReport({len(self.layers)} layers x {len(self.spans)} spans, best accuracy {best.accuracy:.2f} at "
            f"layer {best.layer}, {best.span}; text alone {_accuracy(self.lexical, self.labels):.2f})"
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer and span, most accurate first.

        Columns are:

        - Accuracy with its Wilson interval, and AUROC.
        - The mean accuracy with shuffled labels, scored against those labels, with its interval over draws.
        - The text classifier's accuracy, and the false positives among hard negatives.
        - For erased weights and patterns, the mean change of the metric on harmful prompts and the mean KL on harmless
          prompts. Both have intervals over prompts.
        - For random directions, the mean over all of them, and the change of the direction that changes the metric
          most.
        """
        from sklearn.metrics import roc_auc_score

        rows = []
        for k, layer in enumerate(self.layers):
            for s, span in enumerate(self.spans):
                values = self.values[k, s]
                hits = int(((values > 0) == (self.labels > 0)).sum())
                low, high = wilson_interval(hits, len(values))
                row: dict[str, Any] = {"layer": layer, "span": span, "accuracy": hits / len(values)}
                row |= {"accuracy_low": low, "accuracy_high": high}
                row |= {"auroc": float(roc_auc_score(self.labels.numpy(), values.numpy()))}
                row |= self._shuffled_accuracy(k, s) | {"lexical": _accuracy(self.lexical, self.labels)}
                row |= {"hard_flagged": float((self.hard[k, s] > 0).float().mean())}
                row |= {"lexical_hard_flagged": float((self.lexical_hard > 0).float().mean())}
                for name in ("erased", "pattern_erased"):
                    row |= self._change(name, (k, s))
                row |= self._random_change()
                rows.append(row)
        return pd.DataFrame(rows).sort_values("accuracy", ascending=False, kind="stable", ignore_index=True)

    def plot(self) -> go.Figure:
        """Accuracy over layers, one line per span; a dashed line shows the text classifier."""
        import plotly.express as px

        frame = self.to_dataframe().sort_values(["span", "layer"])
        frame["up"], frame["down"] = frame.accuracy_high - frame.accuracy, frame.accuracy - frame.accuracy_low
        figure = px.line(frame, x="layer", y="accuracy", color="span", error_y="up", error_y_minus="down")
        figure.add_hline(y=_accuracy(self.lexical, self.labels), line_dash="dash", annotation_text="text alone")
        return figure

    def shuffled_accuracies(self, layer: int, span: str) -> list[float]:
        """Accuracy of the probes with shuffled labels, scored against those labels, one value per draw.

        Raises:
            MechsafetyError: A layer or span that was not probed.
        """
        if layer not in self.layers or span not in self.spans:
            raise MechsafetyError(f"layer {layer}, {span!r}", expected=f"one of {self.layers} and of {self.spans}")
        cell = self.shuffled[:, self.layers.index(layer), self.spans.index(span)]
        return [_accuracy(*draw) for draw in zip(cell, self.shuffled_labels, strict=True)]

    def _shuffled_accuracy(self, k: int, s: int) -> dict[str, float]:
        draws = self.shuffled_accuracies(self.layers[k], self.spans[s])
        low, high = mean_interval(draws)
        return {"shuffled": float(np.mean(draws)), "shuffled_low": low, "shuffled_high": high}

    def _change(self, name: str, cell: tuple[int, int]) -> dict[str, float]:
        """Mean change of the metric and mean KL, with intervals, as columns; empty if erasing was not measured."""
        values, kl = getattr(self, name), getattr(self, f"{name}_kl")
        if values is None or self.unedited is None:
            return {}
        return _mean(name, values[cell] - self.unedited) | _mean(f"{name}_kl", kl[cell])

    def _random_change(self) -> dict[str, float]:
        """Mean over random directions with its interval over prompts, and the largest change of one direction."""
        if self.random_erased is None or self.random_erased_kl is None or self.unedited is None:
            return {}
        change = self.random_erased - self.unedited
        means = change.mean(1)
        found = _mean("random_erased", change.mean(0)) | _mean("random_erased_kl", self.random_erased_kl.mean(0))
        return {**found, "random_erased_most": float(means[means.abs().argmax()])}


@sweeps
@public
def probe_layers(
    model: LensModel,
    pairs: PromptPairs,
    metric: RefusalLogOdds | None = None,
    *,
    layers: Sequence[int] | None = None,
    spans: Sequence[str] = PROBE_SPANS,
    hard: Prompts | None = None,
    outer: int = 5,
    inner: int = 3,
    erase_on: Prompts | None = None,
    harmless_on: Prompts | None = None,
    n_random: Amount = 8,
    n_shuffled: int = 5,
    seed: Amount = 0,
    progress: bool = True,
) -> ProbeReport:
    """Fit probes for harmful against harmless prompts at each layer and span, with the controls that they need.

    A probe is a logistic regression on scaled activations. An inner cross-validation chooses its regularisation; an
    outer one judges it. Both keep topics together (or pairs, where there are fewer than three topics). A probe is
    therefore judged on topics that it has not seen.

    Args:
        model: The model.
        pairs: Harmful prompts and harmless ones.
        metric: Refusal log-odds, which measure the effect of erasing each probe's direction. Without a metric, erasing
            is not measured.
        layers: Blocks before which the residual stream is probed, ``n_layers`` for the final stream; all by default.
        spans: Some of ``instruction``, ``suffix`` and ``last``.
        hard: Scary but harmless prompts; by default the built-in ones of the test split.
        outer: Number of folds of the outer cross-validation.
        inner: Number of folds of the inner cross-validation.
        erase_on: Harmful prompts on which erasing is measured, preferably held out. By default those of 16 pairs,
            spread over their topics.
        harmless_on: Harmless prompts on which the side effect of erasing is measured. By default those of the same 16
            pairs.
        n_random: Number of random directions to compare erasing with.
        n_shuffled: Number of draws of shuffled labels.
        seed: Seed of the shuffled labels, the random directions and the default prompts for erasing.
        progress: Whether to show bars.

    Raises:
        MechsafetyError: Unknown span, a layer that the model lacks, too few pairs, or fewer than two draws.

    Example:
        >>> few = made.pairs.sample(24)
        >>> found = ms.probe_layers(model, few, layers=[0, 4], spans=["last"], outer=2, inner=2, n_shuffled=2)
        >>> found.values.shape  # layer, span, prompt
        torch.Size([2, 1, 48])
    """
    chosen = _chosen_layers(model, layers, spans)
    pairs = pairs.without_shared_prompts()
    groups = _groups(pairs)
    _check_groups(pairs, groups, n_shuffled)
    texts = [*pairs.harmful, *pairs.harmless]
    scary = list(hard) if hard is not None else [prompt.text for prompt in builtin_prompts("borderline", "test")]
    scary = distinct(scary, "hard negatives")
    scary = [scary[k] for k in unseen(scary, texts, "hard negatives")]
    labels = np.repeat([1, 0], len(pairs))
    swaps = np.tile(np.random.default_rng(seed).integers(0, 2, (n_shuffled, len(pairs))), 2)
    swapped = np.where(swaps == 1, 1 - labels, labels)
    seen, seen_hard = (span_means(model, prompts, chosen, spans) for prompts in (texts, scary))
    folds = _Folds(np.tile(groups, 2), outer, inner)
    values, shuffled, on_hard, directions = _fit_all(folds, seen, seen_hard, labels, swapped, progress)
    lexical = folds.out_of_fold(_lexical(), texts, labels)
    lexical_hard = torch.from_numpy(folds.fit(_lexical(), texts, labels).decision_function(scary)).float()
    chosen_prompts = pairs.sample(N_ERASE, seed)
    texts_erased = chosen_prompts.harmful if erase_on is None else list(erase_on)
    texts_harmless = chosen_prompts.harmless if harmless_on is None else list(harmless_on)
    unedited: Tensor | None = None
    erased: list[Tensor | None] = [None] * 3
    cost: list[Tensor | None] = [None] * 3
    if metric is not None:
        flat = rearrange(directions, "kind layer span d -> (kind layer span) d")
        noise = torch.randn(n_random, model.d_model, generator=torch.Generator().manual_seed(seed))
        unedited, after, harm = _erase(model, metric, texts_erased, texts_harmless, torch.cat([flat, noise]))
        erased, cost = (_by_cell(rows, len(flat), len(spans)) for rows in (after, harm))
    options = {"outer": outer, "inner": inner, "pairs": len(pairs), "hard": len(scary), "spans": list(spans)}
    options |= {"n_erase": len(texts_erased), "held_out": erase_on is not None, "groups": len(set(groups))}
    options |= {"n_harmless": len(texts_harmless), "n_shuffled": n_shuffled, **omissions(pairs)}
    return ProbeReport(
        model.provenance(seed=seed, options=options),
        chosen,
        tuple(spans),
        torch.from_numpy(labels).float(),
        values,
        shuffled,
        torch.from_numpy(swapped).float(),
        lexical,
        on_hard,
        lexical_hard,
        directions[0],
        directions[1],
        unedited,
        *erased,
        *cost,
    )


def _chosen_layers(model: LensModel, layers: Sequence[int] | None, spans: Sequence[str]) -> tuple[int, ...]:
    """Layers to probe, all by default.

    Raises:
        MechsafetyError: Unknown span, or a layer that the model lacks.
    """
    wrong = [span for span in spans if span not in PROBE_SPANS]
    if wrong or not spans:
        raise MechsafetyError(f"spans {wrong or list(spans)}", expected=f"some of {PROBE_SPANS}")
    chosen = tuple(layers) if layers is not None else tuple(range(model.n_layers + 1))
    if not chosen or any(not 0 <= layer <= model.n_layers for layer in chosen):
        raise MechsafetyError(f"layers {list(chosen)}", expected=f"some of 0 to {model.n_layers}")
    return chosen


def _check_groups(pairs: PromptPairs, groups: np.ndarray, n_shuffled: int) -> None:
    """Refuse what leaves nothing to hold out, a prompt with both labels, or a single draw of shuffled labels."""
    if len(set(groups)) < MIN_GROUPS:
        raise MechsafetyError(f"{len(pairs)} pairs", expected=f"at least {MIN_GROUPS}, so that some can be held out")
    if n_shuffled < 2:
        raise MechsafetyError(f"n_shuffled={n_shuffled}", expected="at least 2 draws, so that there is an interval")
    both = set(pairs.harmful) & set(pairs.harmless)
    if both:
        raise MechsafetyError(f"{min(both)!r} is a harmful and a harmless prompt", expected="one label for each prompt")


def _fit_all(
    folds: "_Folds",
    seen: Float[Tensor, "layer span prompt d_model"],
    seen_hard: Float[Tensor, "layer span hard d_model"],
    labels: np.ndarray,
    shuffled_labels: np.ndarray,
    progress: bool,
) -> tuple[
    Float[Tensor, "layer span prompt"],
    Float[Tensor, "draw layer span prompt"],
    Float[Tensor, "layer span hard"],
    Float[Tensor, "kind layer span d_model"],
]:
    """The probes of every layer and span.

    Returns:
        Out-of-fold values; those under each draw of shuffled labels; values on hard negatives; weights and patterns.
    """
    n_layers, n_spans, n_prompts, d_model = seen.shape
    values = torch.zeros(n_layers, n_spans, n_prompts)
    shuffled = torch.zeros(len(shuffled_labels), n_layers, n_spans, n_prompts)
    on_hard, directions = torch.zeros(seen_hard.shape[:3]), torch.zeros(2, n_layers, n_spans, d_model)

    def fitted(cell: tuple[int, int]) -> tuple[Tensor, ...]:
        data = seen[cell].numpy()
        own = folds.out_of_fold(_linear(), data, labels)
        draws = [folds.out_of_fold(_linear(), data, drawn) for drawn in shuffled_labels]
        probe = folds.fit(_linear(), data, labels)
        hard = torch.from_numpy(probe.decision_function(seen_hard[cell].numpy()))
        return own, torch.stack(draws) if draws else shuffled[:, 0, 0], hard, _directions(probe, data)

    cells = [(k, s) for k in range(n_layers) for s in range(n_spans)]
    with progress_bar(total=len(cells), desc="probes", show=progress) as bar:
        for (k, s), found in zip(cells, work("probes", cells, fitted, tuple[Tensor, ...]), strict=True):
            values[k, s], shuffled[:, k, s], on_hard[k, s], directions[:, k, s] = found
            bar.update()
    return values, shuffled, on_hard, directions


@public
def span_means(
    model: LensModel, prompts: Prompts, layers: Sequence[int], spans: Sequence[str]
) -> Float[Tensor, "layer span prompt d_model"]:
    """Residual stream of each prompt, averaged over the tokens of each span, float32 on the CPU.

    Example:
        >>> means = ms.probes.span_means(model, harmful, layers=[0, 4], spans=["instruction", "last"])
        >>> means.shape  # layer, span, prompt, d_model
        torch.Size([2, 2, 8, 64])
    """
    done = []
    for tokens in token_batches(model, prompts):
        resid = model.cache(tokens, ["resid"]).resid[list(layers)].float()
        rows = []
        for span in spans:
            mask = tokens.span_mask("all" if span == "last" else span).float()
            if span == "last":
                mask = torch.zeros_like(mask)
                mask[:, -1] = 1.0
            weights = mask / mask.sum(1, keepdim=True)
            rows.append(einsum(resid, weights, "layer prompt pos d, prompt pos -> layer prompt d"))
        done.append(torch.stack(rows, dim=1).cpu())
    return torch.cat(done, dim=2)


@dataclass(frozen=True, slots=True)
class _Folds:
    """Nested cross-validation in which no group is on both sides."""

    groups: np.ndarray
    outer: int
    inner: int

    def out_of_fold(self, estimator: Any, data: Any, labels: np.ndarray) -> Float[Tensor, " prompt"]:
        """Decision value of every prompt, from an estimator that has not seen the prompt's group."""
        from sklearn.model_selection import GroupKFold

        values = np.zeros(len(labels))
        n_folds = min(self.outer, len(set(self.groups)))
        for train, test in GroupKFold(n_folds).split(labels, labels, self.groups):
            fitted = self.fit(estimator, _take(data, train), labels[train], self.groups[train])
            values[test] = fitted.decision_function(_take(data, test))
        return torch.from_numpy(values).float()

    def fit(self, estimator: Any, data: Any, labels: np.ndarray, groups: np.ndarray | None = None) -> Any:
        """The estimator fitted on all the data, with the regularisation that the inner cross-validation chooses."""
        from sklearn.model_selection import GridSearchCV, GroupKFold

        kept = self.groups if groups is None else groups
        splits = GroupKFold(min(self.inner, len(set(kept))))
        search = GridSearchCV(estimator, {"logisticregression__C": COSTS}, cv=splits, scoring="accuracy")
        return search.fit(data, labels, groups=kept).best_estimator_


def _linear() -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))


def _lexical() -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    return make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=5000))


def _take(data: Any, index: np.ndarray) -> Any:
    return data[index] if isinstance(data, np.ndarray) else [data[k] for k in index]


def _groups(pairs: PromptPairs) -> np.ndarray:
    topics = [pair.topic for pair in pairs]
    return np.array(topics) if len(set(topics)) >= MIN_GROUPS else np.arange(len(pairs))


def _directions(probe: Any, data: np.ndarray) -> Float[Tensor, "2 d_model"]:
    """The probe's weights on unscaled activations, and its pattern; 0 where the data do not vary."""
    weights = probe[-1].coef_[0] / probe[0].scale_
    centred = data - data.mean(0)
    rows = torch.from_numpy(np.stack([weights, (centred @ weights) @ centred])).float()
    varies = float(data.std(0).max()) > 1e-6 * float(np.abs(data).max())
    norms = rows.norm(dim=-1, keepdim=True)
    return rows / norms if varies and bool((norms > 0).all()) else torch.zeros_like(rows)


def _erase(
    model: LensModel,
    metric: RefusalLogOdds,
    harmful: Sequence[PromptLike],
    harmless: Sequence[PromptLike],
    directions: Float[Tensor, "row d_model"],
) -> tuple[Float[Tensor, " harmful"], Float[Tensor, "row harmful"], Float[Tensor, "row harmless"]]:
    """Metric without an edit, metric with each direction removed, and KL on harmless prompts; NaN for zero vectors."""
    bad, good = PromptBatches.of(model, harmful), PromptBatches.of(model, harmless)
    before = metric(run_unedited(model, bad).logits[0]).cpu()
    log_probs = run_unedited(model, good).logits[0].log_softmax(-1)
    after = torch.full((len(directions), len(harmful)), torch.nan)
    cost = torch.full((len(directions), len(harmless)), torch.nan)
    real = (directions.norm(dim=-1) > 0).nonzero().flatten().tolist()
    bases = [directions[[k]].to(model.device) for k in real]
    reads = ((bad, after, metric), (good, cost, None))
    for prompts, found, read in reads:
        runs = removed_runs(model, prompts, bases)

        def scored(k: int, runs: list[Later] = runs, read: RefusalLogOdds | None = read) -> Scored:
            run = runs[k]()
            values = divergence(log_probs[list(run.index)], run.logits) if read is None else read(run.logits)
            return run.variants, run.index, values.cpu()

        for variants, index, values in work("erasing", range(len(runs)), scored, Scored):
            found[torch.tensor([real[k] for k in variants])[:, None], torch.tensor(index)] = values
    return before, after, cost


# places of directions and of prompts, and their scores
Scored = tuple[tuple[int, ...], tuple[int, ...], Tensor]


def _by_cell(rows: Float[Tensor, "row prompt"], n_flat: int, n_spans: int) -> list[Tensor | None]:
    """The rows of weights and of patterns, by layer and span, and the rows of the random directions."""
    grid = rearrange(rows[:n_flat], "(kind layer span) prompt -> kind layer span prompt", kind=2, span=n_spans)
    return [grid[0], grid[1], rows[n_flat:]]


def _accuracy(values: Float[Tensor, " prompt"], labels: Float[Tensor, " prompt"]) -> float:
    return float(((values > 0) == (labels > 0)).float().mean())


def _mean(name: str, values: Tensor) -> dict[str, float]:
    """Mean over prompts with its interval, as columns; the interval is NaN if a value is NaN."""
    seen = values.double().numpy()
    ends = mean_interval(seen) if not np.isnan(seen).any() else (np.nan, np.nan)
    return {name: float(seen.mean()), f"{name}_low": ends[0], f"{name}_high": ends[1]}
