"""Guards on safety neurons compared with simple baselines, on data sets that training did not see."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Amount, Count, public
from mechsafety.models import LensModel
from mechsafety.monitors.features import LabelledPrompts, LastToken, read_prompts
from mechsafety.monitors.regression import INVERSE_PENALTY, fit_regression
from mechsafety.neurons.masks import neuron_mask, random_masks
from mechsafety.nodes import Node
from mechsafety.results import Provenance, Result

FEATURES = ("neurons", "random", "resid", "direction", "tfidf")

# the largest number of values in a block of bootstrap draws
RESAMPLED = 2**22


@dataclass(frozen=True, slots=True, repr=False)
class GuardReport(Result):
    """Guards on several kinds of features, trained on one set of prompts and tested on others.

    The features are:

    - ``neurons``: the chosen neurons.
    - ``random``: as many neurons of the same layers, none of them chosen. Where more than half of a layer is chosen, a
      random set has all its other neurons and as few chosen ones as possible.
    - ``resid``: the last layer's residual stream.
    - ``direction``: cosine with the difference between the training means of unsafe and safe prompts, at the layer that
      separates these best.
    - ``tfidf``: the words of the prompt alone.

    Attributes:
        provenance: Model, options, versions.
        trained_on: Name of the training set.
        labels: Whether each prompt's reply is unsafe, by test set.
        probabilities: Predictions [feature prompt] by test set, with the rows of `FEATURES` without ``random``.
        random: Predictions of the random sets, by test set.
        direction_layer: Layer of ``direction``: the residual stream is read before this block.
        random_overlap: Share of the random neurons that are among the chosen ones; 0 where every layer had room.

    Example:
        >>> known, new = (ms.monitors.LabelledPrompts.of_pairs(half) for half in made.pairs.halves())
        >>> report = ms.monitors.compare_guards(model, ranking.top(0.05), known, [new], n_random=2)
        >>> report.to_dataframe().columns[:5].tolist()
        ['test', 'feature', 'unsafe', 'safe', 'auroc']
    """

    provenance: Provenance
    trained_on: str
    labels: Mapping[str, Bool[Tensor, " prompt"]]
    probabilities: Mapping[str, Float[Tensor, "feature prompt"]]
    random: Mapping[str, Float[Tensor, "set prompt"]]
    direction_layer: int
    random_overlap: float

    def __repr__(self) -> str:
        found = ", ".join(f"{name} {self.auroc(name, 'neurons').mean():.3f}" for name in self.labels)
        return f"GuardReport(AUROC of neurons: {found})"

    def predictions(self, test: str, feature: str) -> np.ndarray:
        """Predicted probabilities [set prompt]; one row, or for ``random`` one row per set.

        Raises:
            MechsafetyError: Unknown test set or feature.
        """
        if test not in self.labels or feature not in FEATURES:
            raise MechsafetyError(
                f"{feature!r} on {test!r}", expected=f"one of {FEATURES} on one of {list(self.labels)}"
            )
        if feature == "random":
            return self.random[test].double().numpy()
        fixed = [name for name in FEATURES if name != "random"]
        return self.probabilities[test][fixed.index(feature)][None].double().numpy()

    def auroc(self, test: str, feature: str) -> np.ndarray:
        """Area under the ROC curve, one value per set [set]."""
        return _auroc(self.predictions(test, feature), self.labels[test].numpy())

    def fpr_at_tpr(self, test: str, feature: str, tpr: float = 0.95) -> float:
        """Share of safe prompts flagged at the threshold that catches ``tpr`` of the unsafe; mean over random sets."""
        return float(_false_alarms(self.predictions(test, feature), self.labels[test].numpy(), tpr).mean())

    def accuracy(self, test: str, feature: str) -> float:
        """Share of prompts on the right side of a probability of 0.5; mean over random sets."""
        return float(((self.predictions(test, feature) >= 0.5) == self.labels[test].numpy()).mean())

    def brier(self, test: str, feature: str) -> float:
        """Mean squared error of the probabilities; mean over random sets."""
        unsafe = self.labels[test].numpy()
        return float(((self.predictions(test, feature) - unsafe) ** 2).mean())

    def calibration(self, test: str, feature: str, bins: int = 10) -> pd.DataFrame:
        """Reliability table: predicted and observed share of unsafe replies in bins of equal width.

        For ``random``, it has one row per set and bin; ``set`` counts from 0.
        """
        rows = self.predictions(test, feature)
        unsafe = np.tile(self.labels[test].numpy(), len(rows))
        frame = pd.DataFrame({"predicted": rows.ravel(), "observed": unsafe.astype(float)})
        frame["bin"] = np.minimum((frame.predicted * bins).astype(int), bins - 1)
        frame["set"] = np.repeat(np.arange(len(rows)), rows.shape[1])
        keys = ["set", "bin"] if feature == "random" else ["bin"]
        return frame.groupby(keys).agg(
            predicted=("predicted", "mean"), observed=("observed", "mean"), n=("observed", "size")
        )

    def calibration_error(self, test: str, feature: str, bins: int = 10) -> float:
        """Expected calibration error: mean distance of predicted from observed share, weighted by bin size.

        For ``random``, it is the mean over sets, each with its own bins.
        """
        table = self.calibration(test, feature, bins)
        return float(((table.predicted - table.observed).abs() * table.n).sum() / table.n.sum())

    def margin(
        self, test: str, baseline: str = "random", seed: int = 0, n: int = 1000
    ) -> tuple[float, float, float, bool]:
        """AUROC of the chosen neurons less that of a baseline.

        Returns:
            The margin; the low and the high end of its 95 % bootstrap interval; and whether the margin is null, that
            is, whether the interval contains 0. The interval is over prompts and, against ``random``, also over sets.
        """
        unsafe, draws = self.labels[test].numpy(), list[float]()
        ours, theirs = self.predictions(test, "neurons"), self.predictions(test, baseline)
        for rows, sets, labels in _resamples(unsafe, len(theirs), seed, n):
            found = _auroc(ours[0][rows], labels), _auroc(theirs[sets[..., None], rows[:, None]], labels)
            draws.extend(found[0] - found[1].mean(1))
        low, high = np.percentile(draws, [2.5, 97.5])
        value = float(_auroc(ours, unsafe)[0] - _auroc(theirs, unsafe).mean())
        return value, float(low), float(high), bool(low <= 0 <= high)

    def intervals(self, test: str, feature: str, seed: int = 0, n: int = 1000) -> dict[str, tuple[float, float]]:
        """95 % bootstrap intervals of AUROC, accuracy and FPR, over prompts and, for ``random``, also over sets.

        Prompts are resampled within each label, because an AUROC needs both labels.
        """
        unsafe, values = self.labels[test].numpy(), self.predictions(test, feature)
        draws = list[np.ndarray]()
        for rows, sets, labels in _resamples(unsafe, len(values), seed, n):
            drawn = values[sets[..., None], rows[:, None]]
            right = ((drawn >= 0.5) == labels).mean(-1)
            found = (_auroc(drawn, labels), right, _false_alarms(drawn, labels, 0.95))
            draws.extend(np.stack([part.mean(1) for part in found], axis=1))
        low, high = np.percentile(draws, [2.5, 97.5], axis=0)
        names = ("auroc", "accuracy", "fpr_at_95_tpr")
        return {name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)}

    def to_dataframe(self) -> pd.DataFrame:
        """One row per test set and feature: AUROC, accuracy and FPR with intervals, calibration, margin.

        ``set_min`` and ``set_max`` are the lowest and highest AUROC of the random sets.
        """
        rows = []
        for test in self.labels:
            for feature in FEATURES:
                found, bounds = self.auroc(test, feature), self.intervals(test, feature)
                row = {
                    "test": test,
                    "feature": feature,
                    "unsafe": int(self.labels[test].sum()),
                    "safe": int((~self.labels[test]).sum()),
                    "auroc": found.mean(),
                    "auroc_low": bounds["auroc"][0],
                    "auroc_high": bounds["auroc"][1],
                    "set_min": found.min(),
                    "set_max": found.max(),
                    "accuracy": self.accuracy(test, feature),
                    "accuracy_low": bounds["accuracy"][0],
                    "accuracy_high": bounds["accuracy"][1],
                    "fpr_at_95_tpr": self.fpr_at_tpr(test, feature),
                    "fpr_low": bounds["fpr_at_95_tpr"][0],
                    "fpr_high": bounds["fpr_at_95_tpr"][1],
                    "brier": self.brier(test, feature),
                    "calibration_error": self.calibration_error(test, feature),
                }
                if feature != "neurons":
                    names = ("neurons_margin", "margin_low", "margin_high", "margin_is_null")
                    row |= dict(zip(names, self.margin(test, feature), strict=True))
                rows.append(row)
        return pd.DataFrame(rows)

    def plot(self) -> go.Figure:
        """AUROC of every feature on every test set; whiskers are 95 % intervals."""
        import plotly.express as px

        frame = self.to_dataframe()
        frame = frame.assign(up=frame.auroc_high - frame.auroc, down=frame.auroc - frame.auroc_low)
        figure = px.bar(
            frame, x="test", y="auroc", color="feature", barmode="group", error_y="up", error_y_minus="down"
        )
        return figure.update_yaxes(range=[0, 1])


@public
def compare_guards(
    model: LensModel,
    neurons: Tensor | Sequence[Node],
    train: LabelledPrompts,
    tests: LabelledPrompts | Sequence[LabelledPrompts],
    *,
    n_random: Count = 20,
    seed: Amount = 0,
    progress: bool = True,
) -> GuardReport:
    """Train guards on one set and test them on others, baselines included (Chen et al. 2024).

    Test prompts that are among the training prompts are left out. All features use the same scaler and logistic
    regression. `GuardReport` explains the features.

    Args:
        model: The model that is watched.
        neurons: Mask or nodes of the safety neurons.
        train: Prompts to learn from.
        tests: A set to test on, or several, each with a name of its own.
        n_random: Number of random neuron sets.
        seed: Seed of the random sets.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: No test set, a name used twice, a set without both labels, no random sets, or a mask that holds
            no neuron or all neurons.

    Example:
        >>> few = ms.monitors.LabelledPrompts("few", (*harmful, *harmless), (True,) * 8 + (False,) * 8)
        >>> found = ms.monitors.compare_guards(model, ranking.top(0.05), few, [labelled], n_random=2)
        >>> list(found.probabilities)  # per test set
        ['planted']
    """
    from mechsafety.progress import progress_bar

    tests = [tests] if isinstance(tests, LabelledPrompts) else tests
    names = [test.name for test in tests]
    if not names or len(set(names)) < len(names):
        raise MechsafetyError(f"test sets {names}", expected="at least one, each with a name of its own")
    tests = [test.unseen_by(train) for test in tests]
    mask = neuron_mask(model, neurons)
    if not bool(mask.any()):
        raise MechsafetyError("no neuron to read", expected="at least one")
    sets = random_masks(mask, n_random, seed, fill=True)
    if sets is None:
        raise MechsafetyError("all neurons are chosen", expected="room for random sets")
    acts = {data.name: read_prompts(model, data.prompts, progress=progress) for data in tests}
    own = read_prompts(model, train.prompts, progress=progress)
    unsafe = np.array(train.unsafe)

    def predict(fitted: Tensor, held_out: Mapping[str, Tensor]) -> dict[str, Tensor]:
        regression = fit_regression(fitted.double().numpy(), unsafe)
        return {
            name: torch.from_numpy(regression.predict_proba(rows.double().numpy())[:, 1]).float()
            for name, rows in held_out.items()
        }

    layer, direction = _direction(own, unsafe)
    fixed = [
        predict(own.chosen(mask), {name: found.chosen(mask) for name, found in acts.items()}),
        predict(own.resid[:, -1], {name: found.resid[:, -1] for name, found in acts.items()}),
        predict(
            _cosine(own, layer, direction), {name: _cosine(found, layer, direction) for name, found in acts.items()}
        ),
        _words(train, tests),
    ]
    drawn = [
        predict(own.chosen(one), {name: found.chosen(one) for name, found in acts.items()})
        for one in progress_bar(sets, desc="random neurons", show=progress)
    ]
    options = {
        "neurons": int(mask.sum()),
        "random_sets": n_random,
        "inverse_penalty": INVERSE_PENALTY,
        "train": [train.name, len(unsafe)],
    }
    return GuardReport(
        model.provenance(seed=seed, options=options),
        train.name,
        {test.name: torch.tensor(test.unsafe) for test in tests},
        {name: torch.stack([found[name] for found in fixed]) for name in names},
        {name: torch.stack([found[name] for found in drawn]) for name in names},
        layer,
        float((sets[0] & mask).sum() / mask.sum()),
    )


def _direction(acts: LastToken, unsafe: np.ndarray) -> tuple[int, Float[Tensor, " d_model"]]:
    """Difference of means at the layer where its cosine separates the training prompts best."""
    flags = torch.from_numpy(unsafe)
    gaps = acts.resid[flags].mean(0) - acts.resid[~flags].mean(0)
    layers = range(acts.resid.shape[1])
    scores = [_auroc(_cosine(acts, layer, gaps[layer])[None, :, 0].numpy(), unsafe)[0] for layer in layers]
    best = int(np.argmax(scores))
    return best, gaps[best]


def _cosine(acts: LastToken, layer: int, direction: Float[Tensor, " d_model"]) -> Float[Tensor, "prompt 1"]:
    return torch.nn.functional.cosine_similarity(acts.resid[:, layer], direction, dim=-1).unsqueeze(-1)


def _words(train: LabelledPrompts, tests: Sequence[LabelledPrompts]) -> dict[str, Tensor]:
    """Predictions from word and word-pair frequencies of the prompts."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    counts = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    regression = fit_regression(counts.fit_transform(train.prompts).toarray(), np.array(train.unsafe))
    return {
        test.name: torch.from_numpy(regression.predict_proba(counts.transform(test.prompts).toarray())[:, 1]).float()
        for test in tests
    }


def _resamples(
    unsafe: np.ndarray, n_sets: int, seed: int, n: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Bootstrap draws in blocks: prompts [draw prompt], random sets [draw set], and the labels of the drawn prompts.

    Prompts are drawn within each label, because an AUROC needs both labels. The labels are thus the same in every draw.
    """
    rng = np.random.default_rng(seed)
    sides = [np.flatnonzero(unsafe), np.flatnonzero(~unsafe)]
    labels = np.repeat([True, False], [len(side) for side in sides])
    block = max(1, RESAMPLED // (n_sets * len(unsafe)))
    for start in range(0, n, block):
        drawn = [
            (np.concatenate([rng.choice(side, len(side)) for side in sides]), rng.choice(n_sets, n_sets))
            for _ in range(min(block, n - start))
        ]
        rows, sets = map(np.stack, zip(*drawn, strict=True))
        yield rows, sets, labels


def _false_alarms(scores: np.ndarray, unsafe: np.ndarray, tpr: float) -> np.ndarray:
    """Share of safe prompts at or above the highest threshold that catches ``tpr`` of the unsafe ones [... prompt]."""
    caught = int(np.ceil(tpr * unsafe.sum() - 1e-9))
    cut = np.sort(scores[..., unsafe], axis=-1)[..., -caught]
    rates: np.ndarray = (scores[..., ~unsafe] >= cut[..., None]).mean(-1)
    return rates


def _auroc(scores: np.ndarray, unsafe: np.ndarray) -> np.ndarray:
    """Exact area under the ROC curve of each row [... prompt], from ranks (Mann-Whitney)."""
    from scipy.stats import rankdata

    ranks = rankdata(scores, axis=-1)
    n = int(unsafe.sum())
    areas: np.ndarray = (ranks[..., unsafe].sum(-1) - n * (n + 1) / 2) / (n * (len(unsafe) - n))
    return areas
