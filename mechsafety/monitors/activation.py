"""`ActivationMonitor`: a score of every prompt and of every generated token, read in the generation's own forwards."""

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.codec import Range
from mechsafety.conversation import Conversation, PromptLike
from mechsafety.directions import RefusalDirection
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Amount, Count, Prompts, prompt_list, public
from mechsafety.intervals import wilson_interval
from mechsafety.interventions import Direction
from mechsafety.interventions.checks import check_layers, check_nodes, check_vector
from mechsafety.models import LensModel
from mechsafety.models.engine import Hook
from mechsafety.monitors.features import LabelledPrompts, check_fitted_on, read_sites
from mechsafety.monitors.regression import fit_regression, on_features
from mechsafety.neurons.masks import mask_nodes, neuron_mask
from mechsafety.nodes import NODE_SITES, Node, NodeLike, nodes_of
from mechsafety.probes import ProbeReport
from mechsafety.prompts import PromptPairs
from mechsafety.results import Provenance, Result, prompt_column
from mechsafety.sites import Site, SiteKind

Source = Literal["circuit", "neurons", "direction", "probe"]
Moment = Literal["prompt", "reply"]
MOMENTS: tuple[Moment, ...] = ("prompt", "reply")
Rate = Annotated[float, Range(0, 1, "a number from 0 to 1")]
# what a monitor is made from
SourceLike = RefusalCircuit | RefusalDirection | Direction | ProbeReport | Tensor | Sequence[NodeLike]


@dataclass(frozen=True, slots=True, repr=False)
class MonitorWeights(Result):
    """What a monitor reads, and the scores of held-out prompts that its thresholds come from.

    The score at a token is ``sum over sites of activation . weights + intercept``. It is a log-odds for a circuit and
    for neurons, and a projection for a direction and for a probe.

    Attributes:
        provenance: Model, options, versions.
        source: What the monitor was made from.
        sites: Whole sites that are read. The axes of a site are flattened.
        weights: Weights of each site.
        intercept: Added to the sum.
        false_positive_rate: Largest share of harmless prompts (and of their replies) that may be flagged.
        harmless, harmful: Scores of the held-out prompts at their last token.
        harmless_replies, harmful_replies: Largest score among the later tokens of each of their replies; minus infinity
            for a reply of one token. A reply's first token is chosen where the prompt is scored, so it is not among
            them.
        reply_tokens: Longest of these replies, in tokens.

    Example:
        >>> [str(site) for site in monitor.weights.sites]
        ['L1.resid_pre']
        >>> path = monitor.weights.save(folder / "monitor.json")
        >>> loaded = ms.monitors.MonitorWeights.load(path)
        >>> loaded.threshold("prompt") == monitor.weights.threshold("prompt")
        True
    """

    provenance: Provenance
    source: Source
    sites: tuple[Site, ...]
    weights: tuple[Float[Tensor, " _width"], ...]
    intercept: float
    false_positive_rate: Rate
    harmless: Float[Tensor, " harmless"]
    harmful: Float[Tensor, " harmful"]
    harmless_replies: Float[Tensor, " harmless"]
    harmful_replies: Float[Tensor, " harmful"]
    reply_tokens: int

    def __repr__(self) -> str:
        found = ", ".join(
            f"{row.caught:.0%} of harmful flagged at {row.threshold:.3g} ({row.moment})"
            for row in self.to_dataframe().itertuples()
        )
        # a threshold that long harmless replies have set may be out of reach for short ones
        short = not (self.harmful_replies >= self.threshold("reply")).any()
        found += "; where replies are short, fit it with a smaller reply_tokens" * short
        return f"MonitorWeights({self.source} at {len(self.sites)} sites; {found})"

    def check_stored(self) -> None:
        """Refuse a file whose parts do not belong together."""
        if len(self.sites) != len(self.weights) or not self.sites:
            raise MechsafetyError(
                f"{len(self.weights)} weights at {len(self.sites)} sites", expected="one per site, at least one"
            )
        _rank(len(self.harmless), self.false_positive_rate)

    def calibration(self, moment: Moment) -> tuple[Float[Tensor, " harmless"], Float[Tensor, " harmful"]]:
        """Held-out scores of harmless and of harmful prompts, or of their replies."""
        return (self.harmless, self.harmful) if moment == "prompt" else (self.harmless_replies, self.harmful_replies)

    def threshold(self, moment: Moment) -> float:
        """The score from which a prompt, or a later token of a reply, is flagged.

        It is just above the k-th largest of the n held-out harmless scores, with k = ⌊rate · (n + 1)⌋. A new harmless
        prompt from the same source is then flagged with a probability of at most the rate (split conformal
        prediction, Vovk et al. 2005).
        """
        harmless = self.calibration(moment)[0].double().sort(descending=True).values
        return math.nextafter(float(harmless[_rank(len(harmless), self.false_positive_rate) - 1]), math.inf)

    def p_value(self, scores: Sequence[float], moment: Moment) -> list[float]:
        """(1 + held-out harmless scores at least as large) / (1 + held-out harmless scores), for each score."""
        harmless = np.sort(self.calibration(moment)[0].double().numpy())
        above = len(harmless) - np.searchsorted(harmless, np.asarray(scores, dtype=np.float64), side="left")
        return [float(p) for p in (1 + above) / (1 + len(harmless))]

    def false_positives(self, moment: Moment) -> tuple[float, float]:
        """95 % interval of the true false-positive rate at the threshold.

        With n held-out scores without ties, the true rate at the k-th largest has the distribution Beta(k, n + 1 - k),
        whatever the distribution of the scores (Vovk 2012).
        """
        from scipy.stats import beta

        n = len(self.calibration(moment)[0])
        rank = _rank(n, self.false_positive_rate)
        low, high = beta.ppf([0.025, 0.975], rank, n + 1 - rank)
        return float(low), float(high)

    def to_dataframe(self) -> pd.DataFrame:
        """One row for prompts and one for replies.

        Columns: the threshold; the asked false-positive rate and the 95 % interval of the true one; the share of
        held-out harmful prompts (or their replies) that are flagged, with its Wilson interval; the AUROC of harmful
        against harmless; and both numbers of prompts.
        """
        from sklearn.metrics import roc_auc_score

        rows = []
        for moment in MOMENTS:
            harmless, harmful = (side.double().numpy() for side in self.calibration(moment))
            threshold, (low, high) = self.threshold(moment), self.false_positives(moment)
            hits = int((harmful >= threshold).sum())
            caught_low, caught_high = wilson_interval(hits, len(harmful))
            # minus infinity is no number to scikit-learn; only the order of the scores matters
            order = np.unique(np.concatenate([harmless, harmful]), return_inverse=True)[1]
            labels = np.repeat([0, 1], [len(harmless), len(harmful)])
            row: dict[str, Any] = {"moment": moment, "threshold": threshold}
            row |= {"false_positive_rate": self.false_positive_rate, "true_low": low, "true_high": high}
            row |= {"caught": hits / len(harmful), "caught_low": caught_low, "caught_high": caught_high}
            row |= {"auroc": float(roc_auc_score(labels, order))}
            rows.append(row | {"harmless": len(harmless), "harmful": len(harmful)})
        return pd.DataFrame(rows)

    def plot(self) -> go.Figure:
        """Held-out scores of prompts and replies; a dashed line marks each threshold."""
        from plotly.subplots import make_subplots

        figure = make_subplots(1, 2, subplot_titles=("prompts", f"replies of up to {self.reply_tokens} tokens"))
        for column, moment in enumerate(MOMENTS, 1):
            for name, scores in zip(("harmless", "harmful"), self.calibration(moment), strict=True):
                shown = scores[scores.isfinite()].tolist()
                box = go.Box(y=shown, name=name, boxpoints="all", jitter=0.4, pointpos=0, showlegend=False)
                figure.add_trace(box, row=1, col=column)
            figure.add_hline(y=self.threshold(moment), line_dash="dash", row=1, col=column)
        return figure.update_yaxes(title_text="score", col=1).update_layout(template="none")


@dataclass(frozen=True, slots=True, repr=False)
class MonitorScores(Result):
    """A monitor's scores of prompts.

    Attributes:
        provenance: Model, options, versions.
        prompts: The prompts.
        scores: Score of each at its last token.
        p_values: Share of harmless prompts with at least this score (see `MonitorWeights.p_value`).
        threshold: Score from which a prompt is flagged.

    Example:
        >>> scores = monitor.score([harmful[0], harmless[0]])
        >>> scores.flagged
        tensor([ True, False])
    """

    provenance: Provenance
    prompts: tuple[str | Conversation, ...]
    scores: Float[Tensor, " prompt"]
    p_values: tuple[float, ...]
    threshold: float

    def __repr__(self) -> str:
        return f"MonitorScores({int(self.flagged.sum())} of {len(self.prompts)} prompts flagged)"

    @property
    def flagged(self) -> Bool[Tensor, " prompt"]:
        """Whether each score reaches the threshold, or is not a finite number."""
        return (self.scores.double() >= self.threshold) | ~self.scores.isfinite()

    def to_dataframe(self) -> pd.DataFrame:
        """One row per prompt, in order: prompt, score, p value and whether it is flagged."""
        flags = self.flagged.tolist()
        frame = pd.DataFrame({"score": self.scores.tolist(), "p_value": self.p_values, "flagged": flags})
        frame.insert(0, "prompt", prompt_column(prompt_list(self.prompts)))
        return frame

    def plot(self) -> go.Figure:
        """Scores in the order of the prompts; a dashed line marks the threshold."""
        import plotly.express as px

        figure = px.scatter(self.to_dataframe().reset_index(), x="index", y="score", color="flagged")
        return figure.add_hline(y=self.threshold, line_dash="dash").update_xaxes(title_text="prompt")


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of a reply, and the score of the state that it was chosen from.

    Attributes:
        id: Token id.
        text: What it adds to the reply's text (see `mechsafety.models.ReplyToken`).
        score: Score at the column whose logits gave the token: for the first token the prompt's last one, later the
            token before.
        p_value: Share of harmless prompts (from the second token on, of replies to them) with at least this score.
        flagged: Whether the score reaches the threshold.

    Example:
        >>> tokens = list(monitor.stream(harmless[0], 3))
        >>> tokens[0].text, tokens[0].flagged
        ('Sure', False)
    """

    id: int
    text: str
    score: float
    p_value: float
    flagged: bool


@dataclass(frozen=True, slots=True)
class WatchedReply:
    """What monitors saw of one reply.

    Attributes:
        scores: One row per token, one score per monitor.
        flagged: Number of the first token, from 0, whose score reached a threshold; None without one. If the watch
            stops replies, this token was not generated: the reply has as many tokens as this number.

    Example:
        >>> watch = monitor.watch()
        >>> replies = model.generate(harmful[:1], 8, watch=watch)
        >>> watch.reply().flagged  # the first token was chosen from a flagged state
        0
    """

    scores: tuple[tuple[float, ...], ...]
    flagged: int | None


class ReplyWatch:
    """Monitors that read one call of `LensModel.generate`, `LensModel.reply_ids` or `LensModel.stream`.

    It reads in the generation's own forwards. A token's score is that of the state that it is chosen from, so it is
    known before the token is. Use each watch for one call. A score that is not a finite number counts as flagged.

    Args:
        model: The model.
        monitors: What to read.
        stop: Whether a reply ends before the first token whose score reaches a threshold.

    Example:
        >>> watch = ms.monitors.ReplyWatch(model, [monitor.weights], stop=True)
        >>> model.generate(harmful[:1], 8, watch=watch)  # stopped before the first token
        ['']
        >>> watch.reply().flagged
        0
    """

    def __init__(self, model: LensModel, monitors: Sequence[MonitorWeights], *, stop: bool = False) -> None:
        self._stop = stop
        self._limits = [[monitor.threshold(moment) for monitor in monitors] for moment in MOMENTS]
        self._intercepts = torch.tensor([monitor.intercept for monitor in monitors], device=model.device)
        self._weights = _joint(monitors, model.device)
        self._terms: dict[Site, Tensor] = {}
        self._scores: dict[int, list[tuple[float, ...]]] = {}
        self._flagged: dict[int, int] = {}
        self._begun: set[int] = set()

    def begin(self, numbers: Sequence[int]) -> None:
        """Take the prompts with these numbers.

        Raises:
            MechsafetyError: The watch has read another call.
        """
        if self._begun & set(numbers):
            raise MechsafetyError(
                "this watch has read another call", expected="a fresh watch for each call", hint="monitor.watch()"
            )
        self._begun |= set(numbers)

    def hooks(self) -> list[Hook]:
        """Functions that read the last column of each site; they change nothing."""

        def reader(site: Site, weights: Tensor) -> Callable[[Tensor], None]:
            def read(tensor: Tensor) -> None:
                self._terms[site] = rearrange(tensor[:, -1], "row ... -> row (...)").float() @ weights

            return read

        return [(site, reader(site, weights)) for site, weights in self._weights.items()]

    def ended(self, numbers: Sequence[int], running: Collection[int]) -> Collection[int]:
        """Score the state that the next token of each running row is chosen from; return the rows to stop."""
        scores = sum(self._terms.values(), self._intercepts).tolist()
        stopped = []
        for row in running:
            number, own = numbers[row], tuple(scores[row])
            seen = self._scores.setdefault(number, [])
            limits = self._limits[min(1, len(seen))]
            if number not in self._flagged and any(map(_flagged, own, limits)):
                self._flagged[number] = len(seen)
            if number in self._flagged:
                stopped.append(row)
            seen.append(own)
        return stopped if self._stop else ()

    def reply(self, number: int = 0) -> WatchedReply:
        """What was seen so far of the reply to the prompt with this number, counted from 0."""
        return WatchedReply(tuple(self._scores.get(number, ())), self._flagged.get(number))


class ActivationMonitor:
    """Scores every prompt, and every token of a reply while it is generated, from chosen activations.

    Make one with `fit` or `load`. What it has learned is in ``weights``; it never changes the model.

    Example:
        >>> monitor = ms.monitors.ActivationMonitor.fit(model, direction.direction, labelled)
        >>> monitor.score([harmful[0], harmless[0]]).flagged
        tensor([ True, False])
        >>> guarded = guard.with_monitor(monitor)  # a flagged token stops the reply
    """

    __slots__ = ("model", "weights")
    model: LensModel
    weights: MonitorWeights

    def __init__(self, model: LensModel, weights: MonitorWeights) -> None:
        for site, own in zip(weights.sites, weights.weights, strict=True):
            _check_site(model, site, len(own))
        object.__setattr__(self, "model", model.reading(()))
        object.__setattr__(self, "weights", weights)

    def __setattr__(self, name: str, value: object) -> None:
        raise MechsafetyError(
            f"monitor.{name} cannot be assigned", hint="monitor.with_false_positive_rate(...) gives another monitor"
        )

    def __repr__(self) -> str:
        return f"ActivationMonitor({self.model.name}, {self.weights!r})"

    @classmethod
    @public
    def fit(
        cls,
        model: LensModel,
        source: SourceLike,
        prompts: PromptPairs | LabelledPrompts,
        *,
        false_positive_rate: float = 0.05,
        held_out: float = 0.5,
        reply_tokens: Count = 32,
        seed: Amount = 0,
        progress: bool = False,
    ) -> "ActivationMonitor":
        """Make a monitor, and calibrate its thresholds on prompts that it has not learned from.

        - A circuit: each head and MLP is projected on the difference of its means on harmful and harmless prompts, and
          each neuron is taken as it is. A logistic regression reads these features.
        - Neurons: a logistic regression on their activations, as `SafetyGuard` has it.
        - A direction: the projection on it at its site, as `RefusalDirection.project`. Of several sites, the mean.
        - A probe report: the weights of its most accurate probe of the last token, at length 1.

        Nothing is learned for a direction or a probe, so all their prompts calibrate. Give prompts that the source was
        not found on, whichever of the four it is: a circuit or neurons were chosen because they part the prompts that
        they were found on, so that thresholds from these prompts promise too much.

        Args:
            model: The model that is watched.
            source: A circuit, neurons (mask, nodes or names), a direction, or a probe report.
            prompts: Pairs, or labelled prompts whose ``unsafe`` ones are to be flagged.
            false_positive_rate: Largest share of harmless prompts that may be flagged. The same share may be flagged
                among replies to them. A rate r needs at least 1 / r - 1 held-out harmless prompts.
            held_out: Share of the groups (topics, pairs) that calibrate; the others are learned from.
            reply_tokens: Longest reply that calibrates, in tokens; at least 2. A longer reply has more tokens that
                could be flagged. Replies are only scored, not kept.
            seed: Seed of the split.
            progress: Whether to show bars.

        Raises:
            MechsafetyError: A source of another kind or of a model with other parts; a share out of range; too few
                held-out harmless prompts; or no prompt of one label on one side of the split.
        """
        if not 0 < held_out < 1:
            raise MechsafetyError(f"held_out={held_out}", expected="a number between 0 and 1")
        if reply_tokens < 2:
            raise MechsafetyError(f"reply_tokens={reply_tokens}", expected="at least 2")
        model, labelled = model.reading(()), _labelled(prompts)
        learns = not isinstance(source, RefusalDirection | Direction | ProbeReport)
        fitted, held = _split(labelled, held_out, seed) if learns else (labelled, labelled)
        _rank(held.unsafe.count(False), false_positive_rate, labelled.unsafe.count(False) if learns else None)
        kind, sites, intercept = _readout(model, source, fitted, progress)
        options = {"source": kind, "set": labelled.name, "held_out": held_out if learns else 1.0}
        options |= {"learned_from": len(fitted.prompts) if learns else 0, "calibrated_on": len(held.prompts)}
        harmless, harmful = _sides(_scores(model, sites, intercept, held.prompts, progress), held)
        weights = MonitorWeights(
            model.provenance(seed=seed, options=options),
            kind,
            tuple(sites),
            tuple(sites.values()),
            intercept,
            float(false_positive_rate),
            harmless,
            harmful,
            # in place of those of replies, which come next: a watch that stops nothing makes no use of them
            harmless,
            harmful,
            reply_tokens,
        )
        watch = ReplyWatch(model, [weights])
        model.reply_ids(held.prompts, reply_tokens, watch=watch, progress=progress)
        later = [[score for (score,) in watch.reply(k).scores[1:]] for k in range(len(held.prompts))]
        highest = torch.tensor([max(row, default=-math.inf) for row in later])
        harmless, harmful = _sides(highest, held)
        return cls(model, replace(weights, harmless_replies=harmless, harmful_replies=harmful))

    @public
    def with_false_positive_rate(self, rate: float) -> "ActivationMonitor":
        """The same monitor with thresholds for another false-positive rate; the model is not run.

        Raises:
            MechsafetyError: The rate is not between 0 and 1, or needs more held-out harmless prompts.
        """
        _rank(len(self.weights.harmless), rate)
        return ActivationMonitor(self.model, replace(self.weights, false_positive_rate=float(rate)))

    @public
    def score(self, prompts: Prompts, *, progress: bool = False) -> MonitorScores:
        """Score prompts at their last token, before anything is generated."""
        weights = self.weights
        sites = dict(zip(weights.sites, weights.weights, strict=True))
        scores = _scores(self.model, sites, weights.intercept, prompts, progress)
        return MonitorScores(
            self.model.provenance(options=weights.provenance.options),
            cast("tuple[str, ...]", tuple(prompts)),  # the decorator has made each a text or a conversation
            scores,
            tuple(weights.p_value(scores.tolist(), "prompt")),
            weights.threshold("prompt"),
        )

    @public
    def stream(
        self, prompt: PromptLike, max_new_tokens: Count = 64, *, temperature: float = 0.0, seed: Amount = 0
    ) -> Iterator[ScoredToken]:
        """The reply to one prompt, token by token, each with its score.

        The reply is that of `LensModel.generate`. The scores are read in its own forwards: none is added. To stop at a
        flagged token, leave the loop.

        Raises:
            MechsafetyError: As `LensModel.stream`.
        """
        watch = self.watch()
        options: dict[str, Any] = {"temperature": temperature, "seed": seed, "watch": watch}
        tokens = self.model.stream(prompt, max_new_tokens, **options)

        def scored() -> Iterator[ScoredToken]:
            for number, token in enumerate(tokens):
                moment = MOMENTS[min(1, number)]
                (score,) = watch.reply().scores[number]
                (p_value,) = self.weights.p_value([score], moment)
                yield ScoredToken(token.id, token.text, score, p_value, _flagged(score, self.weights.threshold(moment)))

        return scored()

    def watch(self, *, stop: bool = False) -> ReplyWatch:
        """A fresh watch of this monitor for one call of `LensModel.generate` or `LensModel.stream`.

        Args:
            stop: Whether a reply ends before the first token that is flagged.
        """
        return ReplyWatch(self.model, [self.weights], stop=stop)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write what was learned, to a folder or to one file that ends in ``.json``; the model is not in it."""
        return self.weights.save(path)

    @classmethod
    @public
    def load(cls, path: str | os.PathLike[str], model: LensModel) -> "ActivationMonitor":
        """Load a saved monitor for the model that it was fitted on.

        Raises:
            MechsafetyError: There is no monitor at ``path``; or it was fitted on a model with other weights, another
                chat template or other template options.
        """
        weights = MonitorWeights.load(path)
        hint = "fit one: ActivationMonitor.fit(model, source, prompts)"
        check_fitted_on("monitor", weights.provenance, model, hint)
        return cls(model, weights)


def _flagged(score: float, threshold: float) -> bool:
    """Whether a score reaches the threshold; one that is no finite number says nothing, so that it is flagged too."""
    return score >= threshold or not math.isfinite(score)


def _rank(n: int, rate: float, given: int | None = None) -> int:
    """Rank, from the largest, of the harmless score that must not be flagged: the k of `MonitorWeights.threshold`.

    Args:
        n: Number of held-out harmless prompts.
        rate: False-positive rate.
        given: Number of harmless prompts before some were held out, for the message.

    Raises:
        MechsafetyError: The rate is not between 0 and 1, or needs more harmless prompts.
    """
    if not 0 < rate < 1:
        raise MechsafetyError(f"false_positive_rate={rate}", expected="a number between 0 and 1")
    rank = math.floor(rate * (n + 1) + 1e-9)
    if rank < 1:
        needed = math.ceil(1 / rate - 1 - 1e-9)
        few = f"{n} held-out harmless prompts"
        if given is not None:
            few = f"{n} of {given} harmless prompts held out (whole topics, the others are learned from)"
        raise MechsafetyError(
            f"{few} for a false-positive rate of {rate:g}",
            expected=f"at least {needed}",
            hint="give more prompts, or a larger false_positive_rate",
            page="too-few-harmless-prompts",
        )
    return rank


def _labelled(prompts: object) -> LabelledPrompts:
    if isinstance(prompts, PromptPairs):
        return LabelledPrompts.of_pairs(prompts)
    if not isinstance(prompts, LabelledPrompts):
        raise MechsafetyError(
            f"prompts of type {type(prompts).__name__}",
            expected="PromptPairs or LabelledPrompts",
            hint="pass PromptPairs.from_lists(harmful, harmless)",
        )
    return prompts


def _split(labelled: LabelledPrompts, held_out: float, seed: int) -> tuple[LabelledPrompts, LabelledPrompts]:
    """Prompts to learn from and prompts to calibrate on; groups stay whole.

    Raises:
        MechsafetyError: One side lacks a label.
    """
    groups = labelled.groups or tuple(map(str, range(len(labelled.prompts))))
    labels: dict[str, set[bool]] = {}
    for group, unsafe in zip(groups, labelled.unsafe, strict=True):
        labels.setdefault(group, set()).add(unsafe)
    generator, held = np.random.default_rng(seed), set[str]()
    for kind in ({True, False}, {True}, {False}):  # a group of one label does not stand for a group of the other
        alike = [group for group, found in labels.items() if found == kind]
        chosen = generator.permutation(len(alike))[: round(held_out * len(alike))]
        held |= {alike[k] for k in chosen}
    sides = [[k for k, group in enumerate(groups) if (group in held) is side] for side in (False, True)]
    if any(len({labelled.unsafe[k] for k in side}) < 2 for side in sides):
        raise MechsafetyError(
            f"{labelled.name}: {len(labels)} groups of prompts with held_out={held_out:g}",
            expected="prompts of both labels to learn from and to calibrate on",
            hint="give more prompts",
        )
    fitted, calibrating = (
        LabelledPrompts(
            labelled.name, tuple(labelled.prompts[k] for k in side), tuple(labelled.unsafe[k] for k in side)
        )
        for side in sides
    )
    return fitted, calibrating


def _sides(scores: Float[Tensor, " prompt"], labelled: LabelledPrompts) -> tuple[Tensor, Tensor]:
    """Scores of the harmless and of the harmful prompts."""
    unsafe = torch.tensor(labelled.unsafe)
    return scores[~unsafe], scores[unsafe]


def _scores(
    model: LensModel, sites: Mapping[Site, Tensor], intercept: float, prompts: Prompts, progress: bool
) -> Float[Tensor, " prompt"]:
    found = read_sites(model, prompts, list(sites), progress=progress)
    return torch.stack([found[site] @ weights for site, weights in sites.items()]).sum(0) + intercept


def _readout(
    model: LensModel, source: Any, fitted: LabelledPrompts, progress: bool
) -> tuple[Source, dict[Site, Tensor], float]:
    """Kind of the source, the weights of each site that is read, and the intercept."""
    if isinstance(source, RefusalDirection):
        source = source.direction
    if isinstance(source, Direction):
        return "direction", _of_direction(model, source), 0.0
    if isinstance(source, ProbeReport):
        return "probe", _of_probe(model, source), 0.0
    if isinstance(source, RefusalCircuit):
        nodes = check_nodes(model, nodes_of(member.node for member in source.nodes))
        return "circuit", *_of_nodes(model, nodes, fitted, progress)
    if isinstance(source, str) or not isinstance(source, Tensor | Sequence):
        raise MechsafetyError(
            f"a source of type {type(source).__name__}",
            expected="a RefusalCircuit, neurons, a RefusalDirection or a ProbeReport",
        )
    neurons = mask_nodes(neuron_mask(model, source))
    if not neurons:
        raise MechsafetyError("no neuron to read", expected="at least one")
    return "neurons", *_of_nodes(model, neurons, fitted, progress)


def _of_direction(model: LensModel, direction: Direction) -> dict[Site, Tensor]:
    check_layers(model, sorted({site.layer or 0 for site in direction.sites}))
    found: dict[Site, Tensor] = {}
    for site, unit in zip(direction.sites, direction.unit.float().cpu(), strict=True):
        whole, part = _place(model, site)
        check_vector(unit, part.stop - part.start, "d_model" if site.index is None else "d_head")
        found.setdefault(whole, torch.zeros(_width(model, whole)))[part] += unit / len(direction.sites)
    return found


def _of_probe(model: LensModel, report: ProbeReport) -> dict[Site, Tensor]:
    if "last" not in report.spans:
        raise MechsafetyError(
            f"a report of probes of {list(report.spans)}",
            expected="probes of the last token, which every reply has",
            hint="probe_layers(model, pairs, spans=['last'])",
        )
    table = report.to_dataframe()
    layer = int(table[table.span == "last"].iloc[0].layer)
    weights = report.directions[report.layers.index(layer), report.spans.index("last")].float().cpu()
    check_vector(weights, model.d_model)
    final = layer == model.n_layers
    if not final:
        check_layers(model, [layer])
    return {Site(SiteKind.FINAL_NORM_IN) if final else Site(SiteKind.RESID_PRE, layer): weights.clone()}


def _of_nodes(
    model: LensModel, nodes: Sequence[Node], fitted: LabelledPrompts, progress: bool
) -> tuple[dict[Site, Tensor], float]:
    """Logistic regression on one feature per node, as weights of the sites that hold the nodes."""
    places = [_place(model, Site(NODE_SITES[n.kind], n.layer, None if n.kind == "mlp" else n.index)) for n in nodes]
    acts = read_sites(model, fitted.prompts, list(dict.fromkeys(site for site, _ in places)), progress=progress)
    unsafe = torch.tensor(fitted.unsafe)
    units = []
    for site, part in places:
        own = acts[site][:, part]
        gap = own[unsafe].mean(0) - own[~unsafe].mean(0)
        # a neuron is one number, taken as it is
        units.append(torch.ones(1) if len(gap) == 1 else gap / gap.norm().clamp_min(1e-12))
    features = [acts[site][:, part] @ unit for (site, part), unit in zip(places, units, strict=True)]
    learned, intercept = on_features(fit_regression(torch.stack(features, 1).double().numpy(), unsafe.numpy()))
    found = {site: torch.zeros(_width(model, site)) for site in acts}
    for (site, part), unit, weight in zip(places, units, learned, strict=True):
        found[site][part] += float(weight) * unit
    return found, intercept


def _place(model: LensModel, site: Site) -> tuple[Site, slice]:
    """The whole site, and where a head or neuron stands in its flattened axes."""
    whole = Site(site.kind, site.layer)
    if site.index is None:
        return whole, slice(0, _width(model, whole))
    width = model.d_head if site.kind is SiteKind.Z else 1
    return whole, slice(site.index * width, (site.index + 1) * width)


def _width(model: LensModel, site: Site) -> int:
    if site.kind is SiteKind.Z:
        return model.n_heads * model.d_head
    return model.d_mlp if site.kind is SiteKind.NEURONS else model.d_model


def _check_site(model: LensModel, site: Site, width: int) -> None:
    """Refuse a site that the model lacks."""
    if site.kind is SiteKind.NEURONS:
        model.check_neurons()
    if not 0 <= (site.layer or 0) < model.n_layers or width != _width(model, site):
        raise MechsafetyError(f"a monitor of {width} numbers at {site}", expected=f"one that was fitted on {model!r}")


def _joint(monitors: Sequence[MonitorWeights], device: torch.device) -> dict[Site, Float[Tensor, "width monitor"]]:
    """Weights of all monitors, one column each, so that every site is read once."""
    found: dict[Site, Tensor] = {}
    for column, monitor in enumerate(monitors):
        for site, weights in zip(monitor.sites, monitor.weights, strict=True):
            found.setdefault(site, torch.zeros(len(weights), len(monitors)))[:, column] = weights
    return {site: weights.to(device) for site, weights in found.items()}
