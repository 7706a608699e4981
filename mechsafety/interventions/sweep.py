"""The strength sweep: refusal and side effects of an intervention as its strength grows."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Count, Prompts, Texts, public
from mechsafety.intervals import mean_of_known, perplexity_of, wilson_interval
from mechsafety.interventions.checks import check_strength
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.progress import progress_bar
from mechsafety.prompts import distinct, first_of_each
from mechsafety.replies import (
    KINDS,
    REPLY_TOKENS,
    Judge,
    ReplyKinds,
    check_judge,
    check_unedited,
    judge_replies,
    loss_limit,
    phrase_judge,
    reply_loss,
)
from mechsafety.results import Provenance, Result
from mechsafety.scale.work import work

SIDES = ("harmful", "harmless")
# measures by name, and kinds of the replies of both sides
Point = tuple[dict[str, Tensor], ReplyKinds, ReplyKinds]


@dataclass(frozen=True, slots=True)
class StrengthSweep(Result):
    """Refusal and side effects at each strength, prompt by prompt.

    Attributes:
        provenance: Model, options, versions.
        metric: Name and tokens of the metric.
        name: What was varied, for tables.
        strengths: The strengths of the sweep.
        refused_harmful, refused_harmless: Whether the greedy reply is a refusal (of the kind ``refuses``).
        harmful, harmless: Refusal log-odds.
        kl: KL(unedited || edited) of next-token distributions after harmless prompts, in nats.
        loss: Mean negative log-likelihood per token of the harmless prompts' reference replies under the edited model,
            in nats.
        kinds_harmful, kinds_harmless: Kinds of the greedy replies at each strength, and their loss under the unedited
            model. Empty in results saved by earlier versions, which did not measure them.

    Example:
        >>> edit = lambda strength: ms.steer(model, direction.direction, strength)
        >>> sweep = ms.interventions.strength_sweep(model, edit, [0, 4], harmful, harmless, metric)
        >>> sweep.to_dataframe().columns.tolist()
        ['strength', 'measure', 'value', 'ci_low', 'ci_high']
    """

    provenance: Provenance
    metric: dict[str, object]
    name: str
    strengths: tuple[float, ...]
    refused_harmful: Bool[Tensor, "strength harmful"]
    refused_harmless: Bool[Tensor, "strength harmless"]
    harmful: Float[Tensor, "strength harmful"]
    harmless: Float[Tensor, "strength harmless"]
    kl: Float[Tensor, "strength harmless"]
    loss: Float[Tensor, "strength harmless"]
    kinds_harmful: tuple[ReplyKinds, ...] = ()
    kinds_harmless: tuple[ReplyKinds, ...] = ()

    def __repr__(self) -> str:
        rates, ends = self.refused_harmful.float().mean(1), (self.strengths[0], self.strengths[-1])
        text = (
            f"StrengthSweep({self.name}: {len(self.strengths)} strengths, harmful refused "
            f"{float(rates[0]):.0%} at {ends[0]:g} and {float(rates[-1]):.0%} at {ends[1]:g}; "
        )
        if not self.kinds_harmful:
            return text + "degenerate replies not measured)"
        first, last = self.kinds_harmful[0], self.kinds_harmful[-1]
        text += f"degenerate {first.share('degenerate'):.0%} and {last.share('degenerate'):.0%}, "
        text += f"perplexity {first.perplexity:.3g} and {last.perplexity:.3g}"
        note = last.lost_note(first)
        return text + (f"; {note})" if note else ")")

    def to_dataframe(self) -> pd.DataFrame:
        """One row per strength and measure: value and 95 % interval (`mechsafety.intervals`).

        ``perplexity`` is the edited model's perplexity on fixed reference replies. ``reply perplexity`` is the unedited
        model's perplexity on the replies at this strength. Kinds of reply and reply perplexity are NaN in results saved
        by earlier versions.
        """
        rows = []
        for k, strength in enumerate(self.strengths):
            for side in SIDES:
                refused = getattr(self, f"refused_{side}")[k]
                hits, n = int(refused.sum()), len(refused)
                rows.append((strength, f"refusal rate, {side}", hits / n, *wilson_interval(hits, n)))
                rows += [(strength, f"{name}, {side}", *row) for name, row in self._said(k, side)]
                rows.append((strength, f"log-odds, {side}", *mean_of_known(getattr(self, side)[k])))
            rows.append((strength, "KL, harmless", *mean_of_known(self.kl[k])))
            rows.append((strength, "perplexity, harmless", *perplexity_of(self.loss[k])))
        return pd.DataFrame(rows, columns=["strength", "measure", "value", "ci_low", "ci_high"])

    def _said(self, k: int, side: str) -> list[tuple[str, tuple[float, float, float]]]:
        """Shares of the other kinds of reply at a strength, and the replies' perplexity."""
        kinds, found = KINDS[1:], getattr(self, f"kinds_{side}")
        if not found:
            return [(name, (float("nan"),) * 3) for name in (*kinds, "reply perplexity")]
        shares = [(kind, (found[k].share(kind), *found[k].interval(kind))) for kind in kinds]
        return [*shares, ("reply perplexity", perplexity_of(found[k].loss))]

    def plot(self) -> go.Figure:
        """One panel per measure, with intervals; the panel of a measure without values stays empty."""
        from plotly.subplots import make_subplots

        frame = self.to_dataframe()
        panels = ("refusal rate", "degenerate", "reply perplexity", "log-odds", "KL", "perplexity")
        figure = make_subplots(2, 3, subplot_titles=panels)
        colours = {"harmful": "#9C2F6B", "harmless": "#00588C"}
        for place, panel in enumerate(panels):
            part = frame[frame.measure.str.startswith(panel)]
            for measure, rows in part.groupby("measure", sort=False):
                side = str(measure).split(", ")[1]
                error = {"symmetric": False, "array": rows.ci_high - rows.value, "arrayminus": rows.value - rows.ci_low}
                figure.add_scatter(
                    x=rows.strength,
                    y=rows.value,
                    error_y=error,
                    name=side,
                    line={"color": colours[side]},
                    showlegend=place == 0,
                    row=place // 3 + 1,
                    col=place % 3 + 1,
                )
        figure.update_xaxes(title_text="strength")
        return figure.update_layout(template="none", height=620, title=self.name)


@public
def strength_sweep(
    model: LensModel,
    intervene: Callable[[float], AbstractContextManager[object]],
    strengths: Sequence[float],
    harmful: Prompts,
    harmless: Prompts,
    metric: RefusalLogOdds,
    *,
    name: str = "intervention",
    references: Texts | None = None,
    judge: Judge = phrase_judge,
    limit: float | None = None,
    reply_tokens: Count = REPLY_TOKENS,
    progress: bool = True,
) -> StrengthSweep:
    """Measure an intervention at several strengths: refusals, kinds of reply, and side effects.

    A strong edit often makes a model babble. Such a model refuses less without complying more. Each refusal rate
    therefore comes with the share of degenerate replies and with the unedited model's perplexity on the replies
    (`mechsafety.judge_replies`).

    Args:
        model: The model.
        intervene: Function from a strength to a context manager, such as ``lambda s: steer(model, direction, s)``.
        strengths: The strengths of the sweep.
        harmful: Harmful prompts.
        harmless: Harmless prompts, which the side effects are measured on as well.
        metric: Refusal log-odds.
        name: Name of the intervention, for tables and pictures.
        references: One harmless reply per harmless prompt; the edited model's perplexity on it is measured. By default
            the unedited model's own greedy replies.
        judge: Function of prompts and replies that gives the kind of each reply.
        limit: Loss per token above which a reply is degenerate, in nats. By default `mechsafety.replies.loss_limit`,
            computed once: the unedited model answers some ordinary prompts for it.
        reply_tokens: Length of replies, in tokens. 100 as in published protocols, because the kind of a reply often
            shows only after its opener.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: No strengths or prompts, a strength that is not finite, or not one reference per harmless
            prompt. Also a judge that cannot be called, or a model that is already edited.

    Example:
        >>> edit = lambda strength: ms.ablate(model, "L0.H1", strength, "zero")
        >>> sweep = ms.interventions.strength_sweep(model, edit, [0, 1], harmful, harmless, metric)
        >>> sweep.refused_harmful.float().mean(-1)  # all, then none
        tensor([1., 0.])
    """
    check_judge(judge)
    check_unedited(model)
    swept = tuple(check_strength(strength) for strength in strengths)
    if not swept or not harmful or not harmless:
        raise MechsafetyError("no strengths or no prompts", expected="at least one of each")
    if references is not None and len(references) != len(harmless):
        raise MechsafetyError(f"{len(references)} references", expected=f"one for each of {len(harmless)} prompts")
    harmful, kept = distinct(harmful, "harmful prompts"), first_of_each(harmless)
    references = None if references is None else [references[k] for k in kept]
    harmless = distinct(harmless, "harmless prompts")
    known = list(references) if references is not None else model.generate(harmless, reply_tokens)
    plain = model.reading(())  # the KL is that of a reply's first token, not of the token after an opener
    before = plain.logits(harmless).log_softmax(-1)
    most = loss_limit(model) if limit is None else float(limit)
    measured: dict[str, list[Tensor]] = {key: [] for key in ("harmful", "harmless", "kl", "loss")}
    kinds: dict[str, list[ReplyKinds]] = {side: [] for side in SIDES}

    def measured_at(strength: float) -> Point:
        with intervene(strength):
            replies = [model.generate(side, reply_tokens) for side in (harmful, harmless)]
            after = plain.logits(harmless)
            own = metric(after) if metric.at_the_end else metric.scores(model, harmless)  # one run gives both
            scores = (metric.scores(model, harmful), own)
            loss = reply_loss(model, harmless, known)
        judged = [
            judge_replies(model, prompts, texts, judge=judge, limit=most).without_text()
            for prompts, texts in zip((harmful, harmless), replies, strict=True)
        ]
        kl = (before.exp() * (before - after.log_softmax(-1))).sum(-1).clamp(min=0)
        return dict(zip(measured, (*scores, kl, loss), strict=True)), judged[0], judged[1]

    found = work(name, swept, measured_at, Point)
    for values, *judged in progress_bar(found, total=len(swept), desc=name, show=progress):
        for key, value in values.items():
            measured[key].append(value)
        for side, own in zip(SIDES, judged, strict=True):
            kinds[side].append(own)
    options = {"name": name, "strengths": list(swept), "reply_tokens": reply_tokens}
    stacked = {key: torch.stack(values).cpu() for key, values in measured.items()}
    refused = {side: torch.stack([one.refused for one in found]) for side, found in kinds.items()}
    return StrengthSweep(
        model.provenance(options=options),
        metric.to_json(),
        name,
        swept,
        refused["harmful"],
        refused["harmless"],
        stacked["harmful"],
        stacked["harmless"],
        stacked["kl"],
        stacked["loss"],
        tuple(kinds["harmful"]),
        tuple(kinds["harmless"]),
    )
