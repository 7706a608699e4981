"""Dose and response: what an intervention does to refusal, and what else, as its strength grows."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Count, Prompts, Texts, public
from mechsafety.intervals import mean_interval, wilson_interval
from mechsafety.interventions.checks import check_strength
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.prompts import distinct, first_of_each
from mechsafety.replies import is_refusal, reply_loss
from mechsafety.results import Provenance, Result

REPLY_TOKENS = 24


@dataclass(frozen=True, slots=True)
class DoseResponse(Result):
    """Refusal and side effects at each strength, prompt by prompt.

    Attributes:
        provenance: Model, options, versions.
        metric: Name and tokens of the metric.
        name: What was varied, for tables.
        strengths: The doses.
        refused_harmful, refused_harmless: Whether the greedy reply is a refusal.
        harmful, harmless: Refusal log-odds.
        kl: KL(unedited || edited) of next-token distributions after harmless prompts, in nats.
        loss: Mean negative log-likelihood a token of the harmless prompts' reference replies, in nats.
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

    def __repr__(self) -> str:
        rates = self.refused_harmful.float().mean(1)
        return (
            f"DoseResponse({self.name}: {len(self.strengths)} strengths, harmful refused "
            f"{float(rates[0]):.0%} at {self.strengths[0]:g} and {float(rates[-1]):.0%} at {self.strengths[-1]:g})"
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row a strength and measure: value and 95 % interval (`mechsafety.intervals`)."""
        rows = []
        for k, strength in enumerate(self.strengths):
            for side in ("harmful", "harmless"):
                refused = getattr(self, f"refused_{side}")[k]
                hits, n = int(refused.sum()), len(refused)
                rows.append((strength, f"refusal rate, {side}", hits / n, *wilson_interval(hits, n)))
                rows.append((strength, f"log-odds, {side}", *_mean(getattr(self, side)[k])))
            rows.append((strength, "KL, harmless", *_mean(self.kl[k])))
            # the mean over prompts of the loss a token, exponentiated: a perplexity in which every prompt counts alike
            rows.append((strength, "perplexity, harmless", *np.exp(_mean(self.loss[k])).tolist()))
        return pd.DataFrame(rows, columns=["strength", "measure", "value", "ci_low", "ci_high"])

    def plot(self) -> go.Figure:
        """One panel a measure, with intervals."""
        from plotly.subplots import make_subplots

        frame = self.to_dataframe()
        panels = ("refusal rate", "log-odds", "KL", "perplexity")
        figure = make_subplots(2, 2, subplot_titles=panels)
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
                    row=place // 2 + 1,
                    col=place % 2 + 1,
                )
        figure.update_xaxes(title_text="strength")
        return figure.update_layout(template="none", height=620, title=self.name)


@public
def dose_response(
    model: LensModel,
    intervene: Callable[[float], AbstractContextManager[object]],
    strengths: Sequence[float],
    harmful: Prompts,
    harmless: Prompts,
    metric: RefusalLogOdds,
    *,
    name: str = "intervention",
    references: Texts | None = None,
    judge: Callable[[str], bool] = is_refusal,
    reply_tokens: Count = REPLY_TOKENS,
    progress: bool = True,
) -> DoseResponse:
    """Measure an intervention at several strengths.

    Args:
        model: The model.
        intervene: From a strength to a context manager, such as ``lambda s: steer(model, direction, s)``.
        strengths: The doses.
        harmful: Harmful prompts.
        harmless: Harmless prompts, for the side effects as well.
        metric: Refusal log-odds.
        name: For tables and pictures.
        references: One harmless reply to each harmless prompt, whose perplexity is measured; by default the unedited
            model's own greedy replies.
        judge: What counts as a refusal; the phrase judge by default.
        reply_tokens: Length of replies.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: No strengths or prompts, a strength that is not finite, or another number of references.

    Example::

        dose_response(model, lambda s: ms.ablate(model, heads, s, "zero"), [0, 0.5, 1], harmful, harmless, metric)
    """
    doses = tuple(check_strength(strength) for strength in strengths)
    if not doses or not harmful or not harmless:
        raise MechsafetyError("no strengths or no prompts", expected="at least one of each")
    if references is not None and len(references) != len(harmless):
        raise MechsafetyError(f"{len(references)} references", expected=f"one for each of {len(harmless)} prompts")
    harmful, kept = distinct(harmful, "harmful prompts"), first_of_each(harmless)
    references = None if references is None else [references[k] for k in kept]
    harmless = distinct(harmless, "harmless prompts")
    known = list(references) if references is not None else model.generate(harmless, reply_tokens)
    plain = model.reading(())  # the cost is counted where a reply begins
    before = plain.logits(harmless).log_softmax(-1)
    columns: dict[str, list[Tensor]] = {key: [] for key in ("bad", "good", "harmful", "harmless", "kl", "loss")}
    for dose in tqdm(doses, desc=name, disable=not progress, leave=False):
        with intervene(dose):
            replies = [model.generate(side, reply_tokens) for side in (harmful, harmless)]
            after = plain.logits(harmless)
            own = metric(after) if metric.at_the_end else metric.scores(model, harmless)  # the same logits tell both
            scores = [metric.scores(model, harmful), own]
            columns["loss"].append(reply_loss(model, harmless, known))
        for key, texts in zip(("bad", "good"), replies, strict=True):
            columns[key].append(torch.tensor([bool(judge(text)) for text in texts]))
        for key, found in zip(("harmful", "harmless"), scores, strict=True):
            columns[key].append(found)
        columns["kl"].append((before.exp() * (before - after.log_softmax(-1))).sum(-1).clamp(min=0))
    options = {"name": name, "strengths": list(doses), "reply_tokens": reply_tokens}
    stacked = {key: torch.stack(values).cpu() for key, values in columns.items()}
    return DoseResponse(
        model.provenance(options=options),
        metric.to_json(),
        name,
        doses,
        stacked["bad"],
        stacked["good"],
        stacked["harmful"],
        stacked["harmless"],
        stacked["kl"],
        stacked["loss"],
    )


def _mean(values: Tensor) -> tuple[float, float, float]:
    seen = values[~values.isnan()].double().numpy()
    if not len(seen):
        return (float("nan"),) * 3
    return (float(seen.mean()), *mean_interval(seen))
