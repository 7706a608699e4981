"""In which layers two models part: one speaks with the other's residual stream, layer by layer and token by token."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Count, Prompts, public
from mechsafety.intervals import mean_interval, ratio_interval
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.models.decode import check_room, decode_replies
from mechsafety.models.rows import Rows, lay_out, prompt_rows
from mechsafety.neurons.runs import batches, check_twins
from mechsafety.neurons.scores import digest
from mechsafety.progress import progress_bar
from mechsafety.prompts import distinct
from mechsafety.replies import (
    REPLY_TOKENS,
    Judge,
    ReplyKinds,
    check_judge,
    check_unedited,
    judge_replies,
    loss_limit,
    phrase_judge,
)
from mechsafety.results import Provenance, Result
from mechsafety.robustness.fragility import RESAMPLES
from mechsafety.robustness.lockstep import Edit, Lockstep, Side
from mechsafety.scale.work import sweeps, work
from mechsafety.sites import Site, SiteKind

if TYPE_CHECKING:
    import plotly.graph_objects as go

# a second model, or an edit of the first one in memory; `public` checks plain models only
Edited = Annotated[LensModel | Edit, "a model, or a function that returns an edit's context"]
Into = Literal["edited", "aligned"]
Measure = Literal["refusals", "log_odds"]


@dataclass(frozen=True, slots=True, repr=False)
class Relocation(Result):
    """Refusals of a receiver that speaks with a donor's residual stream after one layer, for each layer.

    With ``into="edited"``, the edited model is the receiver and the aligned model the donor. With ``into="aligned"`` it
    is the reverse. The floor is the receiver alone, the ceiling the donor alone.

    Attributes:
        provenance: The aligned model, options, versions.
        edited: The edited model; of an edit in memory, the model inside it.
        metric: Name and tokens of the metric.
        into: Which model receives.
        layers: The layers after which the residual stream is replaced.
        floor, ceiling: Kinds of the replies of the receiver alone and of the donor alone.
        self_patch: The same for the receiver with its own values put back at all layers; the same as the floor.
        patched: Kinds of the replies for each layer.
        floor_log_odds, ceiling_log_odds, self_log_odds, log_odds: The metric, in the same conditions.

    Example:
        >>> edited = lambda: ms.ablate(model, "L0.H1", source="zero")
        >>> found = ms.robustness.relocation(model, edited, harmful, metric, max_new_tokens=2)
        >>> found.layers, len(found.recovered())
        ((0, 1, 2, 3), 4)
    """

    provenance: Provenance
    edited: Provenance
    metric: dict[str, object]
    into: Into
    layers: tuple[int, ...]
    floor: ReplyKinds
    ceiling: ReplyKinds
    self_patch: ReplyKinds
    patched: tuple[ReplyKinds, ...]
    floor_log_odds: Float[Tensor, " prompt"]
    ceiling_log_odds: Float[Tensor, " prompt"]
    self_log_odds: Float[Tensor, " prompt"]
    log_odds: Float[Tensor, "layer prompt"]

    def __repr__(self) -> str:
        low, high = self.floor.share("refuses"), self.ceiling.share("refuses")
        first, (start, end) = self.half()
        found = "no layer recovers half" if first is None else f"the first layer that recovers half is {first}"
        return (
            f"Relocation({self.provenance.model} into the {self.into} model: refused {low:.0%} alone, {high:.0%} as "
            f"the donor; {found} (95 % {_layer(start)} to {_layer(end)}))"
        )

    def values(self, measure: Measure = "refusals") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Floor [prompt], ceiling [prompt] and patched [layer prompt]: refused (0 or 1), or the metric."""
        if measure == "log_odds":
            sides = (self.floor_log_odds, self.ceiling_log_odds, self.log_odds)
        elif measure == "refusals":
            sides = (self.floor.refused, self.ceiling.refused, torch.stack([one.refused for one in self.patched]))
        else:
            raise MechsafetyError(f"measure={measure!r}", expected="one of ('refusals', 'log_odds')")
        floor, ceiling, patched = (side.double().numpy() for side in sides)
        return floor, ceiling, patched

    def recovered(self, measure: Measure = "refusals") -> list[tuple[float, tuple[float, float]]]:
        """Share of the way from floor to ceiling for each layer, and its 95 % interval over prompts.

        The share is (patched - floor) / (ceiling - floor), of means over the same prompts. It is NaN, and its interval
        unbounded, where floor and ceiling have the same mean.
        """
        floor, ceiling, patched = self.values(measure)
        way = ceiling - floor
        if not way.mean():
            return [(float("nan"), (-np.inf, np.inf))] * len(patched)
        return [(float((row - floor).mean() / way.mean()), ratio_interval(row - floor, way)) for row in patched]

    def half(self, measure: Measure = "refusals", seed: int = 0) -> tuple[int | None, tuple[int | None, int | None]]:
        """The first measured layer that recovers at least half, and its 95 % interval over prompts.

        None stands for: no measured layer does, or floor and ceiling have the same mean. The interval is a percentile
        bootstrap over prompts.
        """
        values, layers = self.values(measure), [*self.layers, None]
        drawn = _drawn(len(values[0]), seed)
        found = [_first(*(side[..., rows] for side in values)) for rows in drawn]
        low, high = (int(end) for end in np.percentile(found, [2.5, 97.5], method="nearest"))
        return layers[_first(*values)], (layers[low], layers[high])

    def moved(
        self, after: "Relocation", measure: Measure = "refusals", seed: int = 0
    ) -> tuple[int | None, tuple[float, float]]:
        """By how many layers the first layer that recovers half is later than here; and its 95 % interval.

        A model that was hardened at the mapped place alone can carry its refusal elsewhere afterwards. Compare the
        relocation before with the one after: an interval without 0 says that the mechanism moved. The bootstrap draws
        the same prompts for both. A layer that is never found counts as one after the last.

        Args:
            after: A relocation of the hardened model, with the same prompts, layers and direction.
            measure: ``refusals`` or ``log_odds``.
            seed: Seed of the bootstrap.

        Returns:
            The number of layers, below 0 for an earlier one; None where one of the two has no such layer. Both ends of
            its interval.

        Raises:
            MechsafetyError: Other prompts, layers, or another direction.

        Example:
            >>> early, late = (
            ...     ms.robustness.relocation(
            ...         model, lambda: ms.ablate(model, head, source="zero"), harmful, metric, max_new_tokens=2
            ...     )
            ...     for head in ("L0.H1", "L3.H1")
            ... )
            >>> layers, interval = early.moved(late)
            >>> layers
            3
        """
        about = [(one.provenance.options.get("prompts_sha256"), one.layers, one.into) for one in (self, after)]
        for what, mine, theirs in zip(("prompts", "layers", "direction"), *about, strict=True):
            if mine != theirs:
                raise MechsafetyError(f"two relocations with other {what}", expected=f"the same {what} in both")
        both = [one.values(measure) for one in (self, after)]
        drawn = _drawn(len(both[0][0]), seed)
        places = [*self.layers, self.layers[-1] + 1]
        firsts = [[places[_first(*(side[..., rows] for side in one))] for rows in drawn] for one in both]
        low, high = np.percentile(np.subtract(firsts[1], firsts[0]), [2.5, 97.5], method="nearest")
        was, now = (one.half(measure)[0] for one in (self, after))
        return (None if was is None or now is None else now - was), (float(low), float(high))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per control and layer: share of refusals, recovered shares and metric, with 95 % intervals.

        ``run`` is ``floor``, ``ceiling``, ``self-patch`` or ``patched``. ``refused`` has a Wilson interval. The
        recovered shares are those of `recovered`; they are 0 and 1 for floor and ceiling by definition.
        """
        shares = [self.recovered(measure) for measure in ("refusals", "log_odds")]
        rows: list[dict[str, Any]] = []
        runs: list[tuple[str, int | None, ReplyKinds, Tensor]] = [
            ("floor", None, self.floor, self.floor_log_odds),
            ("ceiling", None, self.ceiling, self.ceiling_log_odds),
            ("self-patch", None, self.self_patch, self.self_log_odds),
        ]
        runs += [("patched", *one) for one in zip(self.layers, self.patched, self.log_odds, strict=True)]
        for k, (name, layer, kinds, scores) in enumerate(runs):
            row: dict[str, Any] = {"run": name, "layer": layer, "refused": kinds.share("refuses")}
            row |= dict(zip(("refused_low", "refused_high"), kinds.interval("refuses"), strict=True))
            row["degenerate"] = kinds.share("degenerate")
            own = scores.double().numpy()
            found_here = (float(own.mean()), *mean_interval(own))
            row |= dict(zip(("log_odds", "log_odds_low", "log_odds_high"), found_here, strict=True))
            for what, found in zip(("recovered", "recovered_log_odds"), shares, strict=True):
                fixed = float(name == "ceiling")
                value, (low, high) = found[k - 3] if name == "patched" else (fixed, (fixed, fixed))
                row |= {what: value, f"{what}_low": low, f"{what}_high": high}
            rows.append(row)
        return pd.DataFrame(rows).astype({"layer": "Int64"})

    def plot(self) -> "go.Figure":
        """Share of refusals and the metric for each layer, with intervals; floor and ceiling as lines."""
        from plotly.subplots import make_subplots

        frame = self.to_dataframe().set_index("run")
        rows = frame.loc[["patched"]]
        figure = make_subplots(1, 2, subplot_titles=["share of replies that refuse", "log-odds of refusal"])
        for column, name in enumerate(("refused", "log_odds"), 1):
            up, down = rows[f"{name}_high"] - rows[name], rows[name] - rows[f"{name}_low"]
            error = {"symmetric": False, "array": up, "arrayminus": down}
            figure.add_scatter(
                x=rows.layer, y=rows[name], error_y=error, name="patched", showlegend=column == 1, row=1, col=column
            )
            for control, dash in (("floor", "dot"), ("ceiling", "dash")):
                line: dict[str, Any] = {"x": [self.layers[0], self.layers[-1]], "y": [frame.loc[control, name]] * 2}
                line |= {"line_dash": dash, "name": control, "mode": "lines", "showlegend": column == 1}
                figure.add_scatter(**line, row=1, col=column)
        figure.update_xaxes(title_text="layer after which the residual stream is the donor's")
        return figure.update_layout(template="none", title=repr(self))


def _layer(layer: int | None) -> str:
    return "never" if layer is None else str(layer)


def _drawn(n: int, seed: int) -> np.ndarray:
    """Prompts of each bootstrap sample."""
    return np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))


def _first(floor: np.ndarray, ceiling: np.ndarray, patched: np.ndarray) -> int:
    """Index of the first layer that recovers half; the number of layers where none does."""
    way = ceiling.mean() - floor.mean()
    there = np.flatnonzero((patched.mean(-1) - floor.mean()) * np.sign(way) >= abs(way) / 2)
    return int(there[0]) if len(there) and way else len(patched)


def _lockstep(receiver: Side, donor: Side | None, layers: Sequence[int]) -> Lockstep:
    """The receiver's residual stream after some layers is the donor's."""
    return Lockstep(receiver, donor, [(Site(SiteKind.RESID_POST, layer), _given) for layer in layers])


def _given(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda own: value.to(own)


@dataclass(frozen=True, slots=True)
class _Run:
    """Replies and metric under one condition."""

    tokens: tuple[tuple[int, ...], ...]
    scores: Float[Tensor, " prompt"]


@dataclass(frozen=True, slots=True)
class _Runner:
    """What all conditions share."""

    speaker: LensModel
    metric: RefusalLogOdds
    prompts: Sequence[str]
    max_new_tokens: int
    batch_size: int

    def run(self, receiver: Side, donor: Side | None, layers: Sequence[int], done: Callable[[], object]) -> _Run:
        """Greedy replies, and the metric where it reads."""
        plain, opened = (prompt_rows(self.speaker, self.prompts), self._opened())
        tokens: list[list[int]] = [[] for _ in plain]
        scores = torch.empty(len(plain))
        for chunk in batches([len(row) for row in plain], self.batch_size):
            rows = self._rows(plain, chunk)
            step = _lockstep(receiver, donor, layers)
            found, logits = decode_replies(step.last, rows.pieces(), self.speaker.end_ids, self.max_new_tokens, 1)
            last = logits[0]
            if opened is not None:
                step = _lockstep(receiver, donor, layers)
                for ids, real in self._rows(opened, chunk).pieces():
                    last = step.last(ids, real)
            scores[chunk] = self.metric(last).float().cpu()
            for k, reply in zip(chunk, found, strict=True):
                tokens[k] = reply
            done()
        return _Run(tuple(map(tuple, tokens)), scores)

    def _opened(self) -> list[list[int]] | None:
        """Token rows that end in the metric's opener; None where it reads at the prompt's end."""
        if not self.metric.opener_ids:
            return None
        return [[*row, *self.metric.opener_ids] for row in prompt_rows(self.speaker, self.prompts)]

    def _rows(self, rows: Sequence[Sequence[int]], chunk: Sequence[int]) -> Rows:
        return lay_out(self.speaker, [rows[k] for k in chunk])


@sweeps
@public
def relocation(
    aligned: LensModel,
    edited: Edited,
    prompts: Prompts,
    metric: RefusalLogOdds,
    *,
    into: Into = "edited",
    layers: Sequence[int] | None = None,
    max_new_tokens: Count = REPLY_TOKENS,
    judge: Judge = phrase_judge,
    limit: float | None = None,
    batch_size: Count = 16,
    progress: bool = True,
) -> Relocation:
    """In which layer the refusals of two models part (whole-layer patching through generation, arXiv 2610.00320).

    For each layer, both models read the same tokens in lockstep, and the receiver speaks:

    1. The donor reads the tokens so far, unpatched and with its own key-value cache.
    2. The receiver reads them too. Its residual stream after the layer takes the donor's values, at every position of
       the prompt and of the reply.
    3. The receiver's most probable token is appended for both.

    The patched model is therefore the donor up to this layer, and the receiver from the next layer on. With
    ``into="edited"``, a layer that recovers the refusals has everything before it that the edit took away. Three
    controls are run: the receiver alone (floor), the donor alone (ceiling), and the receiver with its own values put
    back at all layers (self-patch), which must equal the floor exactly.

    Args:
        aligned: The aligned model. Its chat template, end tokens and losses are used in every condition.
        edited: A second model of the same architecture and tokenizer (its base, an attacked or a hardened copy). Or,
            for an edit of ``aligned`` in memory, a function without arguments that returns the edit's context manager.
            It is entered for every forward pass of the edited side. Compute what is costly beforehand, such as the
            ``values`` of `mechsafety.ablate`.
        prompts: Harmful prompts.
        metric: The metric of the first token.
        into: Which model receives: ``edited`` takes the aligned model's values, ``aligned`` takes the edited model's.
        layers: The layers after which to patch; all by default.
        max_new_tokens: Longest reply, in tokens.
        judge: Function of prompts and replies that gives the kind of each reply.
        limit: Loss per token under the aligned model above which a reply is degenerate, in nats; by default
            `mechsafety.replies.loss_limit`.
        batch_size: Number of prompts in one batch.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: Models that do not correspond or are under an intervention already; something else than a model
            or a function that returns a context manager; layers that the model lacks; an edit that changes nothing on
            these prompts; a self-patch that is not the floor (the edit is not the same at each forward pass); or a
            metric of whole openers.

    Example:
        >>> edited = lambda: ms.ablate(model, "L3.H1", source="zero")
        >>> found = ms.robustness.relocation(model, edited, harmful, metric, max_new_tokens=2)
        >>> layer, interval = found.half()
        >>> layer  # the edit takes effect here
        3
    """
    asked = distinct(prompts, "harmful prompts")
    metric.check_one_column()
    check_judge(judge)
    check_unedited(aligned)
    chosen = _layers(aligned, layers)
    one, other = Side(aligned.reading(())), _edited_side(aligned, edited)
    receiver, donor = (other, one) if into == "edited" else (one, other)
    longest = max(len(row) for row in prompt_rows(aligned, asked))
    for side in (one, other):
        check_room(side.model.backend, longest, max(max_new_tokens, len(metric.opener_ids) + 1))
    with other.hooked([]):
        about = other.model.provenance()
    runner = _Runner(one.model, metric, asked, max_new_tokens, batch_size)
    n_batches = len(batches([len(row) for row in prompt_rows(aligned, asked)], batch_size))
    with progress_bar(total=(3 + len(chosen)) * n_batches, desc="relocation", show=progress) as bar:
        controls = [(receiver, None, ()), (donor, None, ()), (receiver, receiver, chosen)]
        known = work("controls", range(3), lambda k: runner.run(*controls[k], bar.update), _Run)
        floor, ceiling = next(known), next(known)
        if floor.tokens == ceiling.tokens and torch.equal(floor.scores, ceiling.scores):
            raise MechsafetyError(
                "both models give the same replies and the same log-odds to these prompts",
                expected="an edit that changes something, or another model",
            )
        (again,) = known
        if again.tokens != floor.tokens or not torch.equal(again.scores, floor.scores):
            raise MechsafetyError(
                f"the {into} model with its own values put back is not the {into} model",
                expected="the same replies and log-odds, bit for bit",
                hint="pass an edit that is the same at each forward pass, without random draws",
            )
        patched = list(work("layers", chosen, lambda layer: runner.run(receiver, donor, [layer], bar.update), _Run))
    runs = [floor, ceiling, again, *patched]
    alone, taken, back, *changed = _judged(one.model, asked, [run.tokens for run in runs], judge, limit)
    options: dict[str, Any] = {"into": into, "max_new_tokens": max_new_tokens, "prompts": len(asked)}
    options |= {"edit": "in memory" if other.edit else "another model", "prompts_sha256": digest(asked)}
    return Relocation(
        aligned.provenance(options=options),
        about,
        metric.to_json(),
        into,
        chosen,
        alone,
        taken,
        back,
        tuple(changed),
        floor.scores,
        ceiling.scores,
        again.scores,
        torch.stack([run.scores for run in patched]),
    )


def _layers(model: LensModel, asked: Sequence[int] | None) -> tuple[int, ...]:
    """The measured layers, in order.

    Raises:
        MechsafetyError: No layer, or one that the model lacks.
    """
    if asked is None:
        return tuple(range(model.n_layers))
    if not asked or not all(type(layer) is int and 0 <= layer < model.n_layers for layer in asked):
        raise MechsafetyError(f"layers {list(asked)}", expected=f"at least one, from 0 to {model.n_layers - 1}")
    return tuple(sorted(set(asked)))


def _edited_side(aligned: LensModel, edited: Edited) -> Side:
    """The edited side, checked.

    Raises:
        MechsafetyError: It is neither a model that corresponds to the aligned one nor a function that returns a context
            manager.
    """
    if isinstance(edited, LensModel):
        check_twins(aligned, edited)
        check_unedited(edited)
        if edited.d_model != aligned.d_model:
            raise MechsafetyError(
                f"{edited.name} has a residual stream of {edited.d_model} numbers, {aligned.name} of {aligned.d_model}",
                expected="two models of one architecture",
            )
        return Side(edited.reading(()))
    wanted = {"expected": "a LensModel, or a function that returns a context manager"}
    hint = "write edited=lambda: ms.ablate(model, nodes, source='zero')"
    if not callable(edited):
        raise MechsafetyError(f"edited is of type {type(edited).__name__}", **wanted, hint=hint)
    try:
        made = edited()
    except TypeError as error:
        raise MechsafetyError(f"edited cannot be called without arguments ({error})", **wanted, hint=hint) from None
    if not isinstance(made, AbstractContextManager):
        raise MechsafetyError(f"edited returns an object of type {type(made).__name__}", **wanted, hint=hint)
    return Side(aligned.reading(()), edited)


def _judged(
    model: LensModel,
    prompts: Sequence[str],
    runs: Sequence[Sequence[Sequence[int]]],
    judge: Judge,
    limit: float | None,
) -> list[ReplyKinds]:
    """Kinds of the replies of each run. Many layers give the same reply, which is judged once."""
    texts = [model.decode(tokens) for tokens in runs]
    rows = list(dict.fromkeys((k, reply) for replies in texts for k, reply in enumerate(replies)))
    most = loss_limit(model) if limit is None else float(limit)
    found = judge_replies(model, [prompts[k] for k, _ in rows], [reply for _, reply in rows], judge=judge, limit=most)
    place = {row: number for number, row in enumerate(rows)}

    def of(replies: Sequence[str]) -> ReplyKinds:
        picked = [place[k, reply] for k, reply in enumerate(replies)]
        return replace(found.without_text(), kinds=tuple(found.kinds[p] for p in picked), loss=found.loss[picked])

    return [of(replies) for replies in texts]
