"""Do two alignments change the same neurons? Overlap and rank correlation, each against a permutation null."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Amount, Count, public
from mechsafety.neurons.masks import share_count, top_mask
from mechsafety.neurons.scores import NeuronScores
from mechsafety.results import Provenance, Result

MEASURES = ("overlap", "spearman_top", "spearman_all")
NULLS = ("free", "layered", "sized")


@dataclass(frozen=True, slots=True, repr=False)
class NeuronAgreement(Result):
    """Agreement of two rankings of the same neurons.

    How to read the nulls:

    - A change grows with the neuron's activation. Two rankings by change therefore share neurons of large activation,
      whatever the alignments did. Only the ``sized`` null keeps the activations, so compare with it.
    - Both rankings choose the union of the two tops. Without any relation, ``spearman_top`` is therefore far below 0.
      Read it only against a null.

    Attributes:
        provenance: Provenance of the first ranking.
        other: Provenance of the second ranking.
        share: Share of the neurons that counts as the top.
        count: Number of neurons in each top.
        observed: ``overlap`` (share of one top that is in the other), ``spearman_top`` (over the union of the two
            tops), ``spearman_all`` (over all neurons).
        free: The same three measures when the second ranking is permuted over all neurons.
        layered: The same when it is permuted within each layer.
        sized: The same when it is permuted within each layer, among neurons of similar activation in the base model.
        bins: Number of groups of similar activation in each layer.

    Example:
        >>> other = ms.safety_neurons(model, base, harmless)
        >>> agreement = ms.neurons.compare_neurons(ranking, other, bins=5, n_permutations=99)
        >>> agreement.to_dataframe().measure.tolist()
        ['overlap', 'spearman_top', 'spearman_all']
    """

    provenance: Provenance
    other: Provenance
    share: float
    count: int
    observed: dict[str, float]
    free: Float[Tensor, "measure draw"]
    layered: Float[Tensor, "measure draw"]
    sized: Float[Tensor, "measure draw"]
    bins: int

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {value:.3f}" for name, value in self.observed.items())
        return f"NeuronAgreement(top {self.share:.1%}: {shown})"

    def p_value(self, measure: str, null: str = "sized") -> float:
        """One-sided permutation p: (1 + draws at least as high as observed) / (1 + draws)."""
        if measure not in MEASURES or null not in NULLS:
            raise MechsafetyError(f"{measure!r} against {null!r}", expected=f"one of {MEASURES} against one of {NULLS}")
        draws = getattr(self, null)[MEASURES.index(measure)]
        return (1 + int((draws >= self.observed[measure]).sum())) / (1 + len(draws))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per measure: the observed value, and mean, 95 % range and p of each null."""
        rows = []
        for k, name in enumerate(MEASURES):
            row: dict[str, float | str] = {"measure": name, "observed": self.observed[name]}
            for null in NULLS:
                draws = getattr(self, null)[k].double().numpy()
                row |= {f"{null}_mean": draws.mean(), f"{null}_p": self.p_value(name, null)}
                row |= dict(
                    zip((f"{null}_low", f"{null}_high"), map(float, np.percentile(draws, [2.5, 97.5])), strict=True)
                )
            rows.append(row)
        return pd.DataFrame(rows)

    def plot(self) -> go.Figure:
        """Observed values beside the 95 % ranges of the ``sized`` null."""
        frame = self.to_dataframe()
        figure = go.Figure()
        bars = {
            "type": "data",
            "symmetric": False,
            "array": frame.sized_high - frame.sized_mean,
            "arrayminus": frame.sized_mean - frame.sized_low,
        }
        figure.add_scatter(x=frame.measure, y=frame.sized_mean, error_y=bars, mode="markers", name="permuted (95 %)")
        figure.add_scatter(x=frame.measure, y=frame.observed, mode="markers", name="observed")
        return figure


@public
def compare_neurons(
    first: NeuronScores,
    second: NeuronScores,
    *,
    share: float = 0.05,
    bins: int = 20,
    n_permutations: Count = 1000,
    seed: Amount = 0,
) -> NeuronAgreement:
    """Overlap of the tops and Spearman correlations of two rankings, with permutation nulls.

    Args:
        first: Scores of an alignment.
        second: Scores of another alignment of the same base model, or of another seed.
        share: Share of the neurons that counts as the top.
        bins: Number of groups of similar base activation in each layer, for the ``sized`` null. All groups have the
            same number of neurons; one group is the ``layered`` null. More groups remove more of the effect of
            activation size, but leave fewer possible permutations.
        n_permutations: Number of draws of each null.
        seed: Seed of the permutations.

    Raises:
        MechsafetyError: Rankings of different shapes or kinds of score, or ``bins`` outside 1 to half of a layer's
            neurons (a group of one neuron cannot be permuted).

    Example:
        >>> agreement = ms.neurons.compare_neurons(ranking, ranking, bins=5, n_permutations=99)
        >>> agreement.observed["overlap"]
        1.0
    """
    if first.scores.shape != second.scores.shape or first.score != second.score:
        raise MechsafetyError(
            f"{first!r} and {second!r}", expected="scores of the same kind for models of the same shape"
        )
    shape = tuple(first.scores.shape)
    if not 1 <= bins <= shape[1] // 2:
        raise MechsafetyError(f"bins={bins}", expected=f"1 to {shape[1] // 2}, half of a layer's neurons")
    count = share_count(share, first.scores.numel())
    ours, theirs = (_ranks(scores.scores.double().numpy().ravel()) for scores in (first, second))
    tops = [top_mask(scores.scores, count).numpy().ravel() for scores in (first, second)]
    observed = dict(zip(MEASURES, map(float, _agreement(ours, theirs, *tops)), strict=True))
    rng = np.random.default_rng(seed)
    groups = _size_groups(first, second, bins)
    nulls = {}
    for name in NULLS:
        draws = []
        for _ in range(n_permutations):
            order = _within(rng, groups) if name == "sized" else _permutation(rng, shape, within=name == "layered")
            draws.append(_agreement(ours, theirs[order], tops[0], tops[1][order]))
        nulls[name] = torch.from_numpy(np.stack(draws, axis=1))
    return NeuronAgreement(
        first.provenance,
        second.provenance,
        share,
        count,
        observed,
        nulls["free"],
        nulls["layered"],
        nulls["sized"],
        bins,
    )


def _agreement(ours: np.ndarray, theirs: np.ndarray, top: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    union = top | other
    return (
        float((top & other).sum() / top.sum()),
        _pearson(_ranks(ours[union]), _ranks(theirs[union])),
        _pearson(ours, theirs),
    )


def _ranks(values: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    ranks: np.ndarray = rankdata(values)
    return ranks


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    size = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if size else 0.0


def _permutation(rng: np.random.Generator, shape: tuple[int, ...], *, within: bool) -> np.ndarray:
    if not within:
        return rng.permutation(shape[0] * shape[1])
    rows = rearrange(np.arange(shape[0] * shape[1]), "(layer d_mlp) -> layer d_mlp", layer=shape[0])
    return rearrange(rng.permuted(rows, axis=1), "layer d_mlp -> (layer d_mlp)")


def _size_groups(first: NeuronScores, second: NeuronScores, bins: int) -> np.ndarray:
    """Group of each neuron [neuron], by its layer and by the rank of its base activation in that layer."""
    size = (first.base_rms.double() ** 2 + second.base_rms.double() ** 2).numpy()
    layers, width = size.shape
    place = size.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable") * bins // width
    return rearrange(place + bins * np.arange(layers)[:, None], "layer d_mlp -> (layer d_mlp)")


def _within(rng: np.random.Generator, groups: np.ndarray) -> np.ndarray:
    """A random order of all items in which each group keeps its places."""
    order = np.empty(len(groups), dtype=np.int64)
    order[groups.argsort(kind="stable")] = np.lexsort((rng.random(len(groups)), groups))
    return order
