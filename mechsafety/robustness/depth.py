"""How many tokens deep refusal is: where an aligned model parts from its base, and what an opener undoes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechsafety.circuits.verification.side_effects import next_token_kl
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Count, Prompts, public
from mechsafety.intervals import mean_of_known
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.progress import progress_bar
from mechsafety.prompts import Tokens, distinct
from mechsafety.results import Provenance, Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

# the first words of an answer that says nothing about what was asked
OPENER = "Sure, here is what you wanted:"


@dataclass(frozen=True, slots=True, repr=False)
class RefusalDepth(Result):
    """KL between an aligned model and its base along the aligned model's replies, and refusal after an opener.

    Attributes:
        provenance, base: The aligned model and its base; None without a base.
        metric: Name and tokens of the metric.
        opener: The opener, token by token.
        scores: Metric after the first k tokens of the opener, for k from 0 on.
        kl: KL(aligned || base) at the t-th token of the aligned model's own reply, in nats; NaN after a reply's end.
            None without a base.

    Example:
        >>> found = ms.robustness.refusal_depth(model, harmful, metric, base, opener="Sure !", n_tokens=8)
        >>> found.kl.shape  # reply token, prompt
        torch.Size([8, 8])
    """

    provenance: Provenance
    base: Provenance | None
    metric: dict[str, object]
    opener: tuple[str, ...]
    scores: Float[Tensor, "tokens_given prompt"]
    kl: Float[Tensor, "token prompt"] | None = None

    def __repr__(self) -> str:
        means = self.scores.mean(1)
        text = (
            f"metric {float(means[0]):.2f} at the prompt's end, {float(means[-1]):.2f} after {len(self.opener)} tokens"
        )
        if self.kl is not None:
            frame = self.to_dataframe()
            kl = frame[frame.measure == "KL(aligned || base)"].value.dropna()
            text += f"; KL {kl.iloc[0]:.2f} at the first reply token, {kl.iloc[-1]:.2f} at token {len(kl)}"
        return f"RefusalDepth({self.provenance.model}: {text})"

    def to_dataframe(self) -> pd.DataFrame:
        """One row per measure and token: mean over prompts with its 95 % interval.

        ``metric after opener`` counts tokens given from 0. ``KL(aligned || base)`` counts reply tokens from 1.
        """
        rows = [("metric after opener", k, *mean_of_known(values)) for k, values in enumerate(self.scores)]
        if self.kl is not None:
            rows += [("KL(aligned || base)", k, *mean_of_known(values)) for k, values in enumerate(self.kl, 1)]
        return pd.DataFrame(rows, columns=["measure", "token", "value", "ci_low", "ci_high"])

    def plot(self) -> "go.Figure":
        """Both curves, with intervals."""
        import plotly.express as px

        frame = self.to_dataframe()
        frame = frame.assign(up=frame.ci_high - frame.value, down=frame.value - frame.ci_low)
        return px.line(
            frame, x="token", y="value", facet_col="measure", error_y="up", error_y_minus="down", markers=True
        ).update_yaxes(matches=None, showticklabels=True)


@public
def refusal_depth(
    model: LensModel,
    prompts: Prompts,
    metric: RefusalLogOdds,
    base: LensModel | None = None,
    *,
    opener: str = OPENER,
    n_tokens: Count = 20,
    progress: bool = True,
) -> RefusalDepth:
    """How deep in the reply refusal is.

    A refusal that is a few tokens deep is undone by the first words of an answer. Two measurements show it: the metric
    after the first k tokens of an opener that says nothing about the prompt; and, with the base model, the KL between
    the two models along the aligned model's reply, which falls to 0 after the first tokens if alignment changed these
    alone (Qi et al. 2024, Safety alignment should be made more than just a few tokens deep, 2406.05946). No answer is
    generated: the only replies are the aligned model's own.

    Args:
        model: The aligned model.
        prompts: Harmful prompts.
        metric: The metric; it reads the token after the prompt, or after the given part of the opener.
        base: The model before alignment, with the same vocabulary; without it, no KL is measured.
        opener: First words of an answer.
        n_tokens: Reply tokens along which the KL is measured.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: No prompts, a metric that reads after an opener of its own or along whole openers, or a base
            with another vocabulary.

    Example:
        >>> found = ms.robustness.refusal_depth(model, harmful, metric, base, opener="Sure !", n_tokens=8)
        >>> found.to_dataframe().measure.unique().tolist()
        ['metric after opener', 'KL(aligned || base)']
    """
    asked = distinct(prompts, "harmful prompts")
    metric.check_one_column()
    if metric.opener_ids:
        raise MechsafetyError(
            f"a metric that reads after the opener {metric.opener!r}", expected="one that reads at the prompt's end"
        )
    if base is not None and base.d_vocab != model.d_vocab:
        raise MechsafetyError(
            f"{base.name} has {base.d_vocab} tokens, {model.name} {model.d_vocab}", expected="one vocabulary"
        )
    ids = model.tokenizer(opener, add_special_tokens=False)["input_ids"]
    if not ids:
        raise MechsafetyError("an empty opener", expected="the first words of an answer")
    scores = [metric(model.reading(ids[:k]).logits(asked)).cpu() for k in range(len(ids) + 1)]
    options = {"opener": opener, "n_tokens": n_tokens, "prompts": len(asked)}
    return RefusalDepth(
        model.provenance(options=options),
        None if base is None else base.provenance(),
        metric.to_json(),
        tuple(model.tokenizer.decode([token]) for token in ids),
        torch.stack(scores),
        None if base is None else _along(model, base, asked, n_tokens, progress),
    )


def _along(
    model: LensModel, base: LensModel, prompts: Sequence[str], n_tokens: int, progress: bool
) -> Float[Tensor, "token prompt"]:
    """KL(model || base) at each token of the model's own replies; NaN after a reply's end."""
    replies, plain = model.reply_ids(prompts, n_tokens, progress=False), model.reading(())
    kl = torch.full((n_tokens, len(prompts)), torch.nan)
    for k, (prompt, reply) in enumerate(
        zip(progress_bar(prompts, desc="replies", show=progress), replies, strict=True)
    ):
        tokens, said = plain.tokenize([prompt]), torch.tensor([list(reply)])
        if not said.numel():
            continue
        ids = torch.cat([tokens.ids, said.to(tokens.ids)], 1)
        whole = Tokens(ids, torch.ones_like(ids).bool(), tokens.spans)
        n = said.shape[1]
        with torch.no_grad():
            # the token after the prompt is the first reply token, so that the last column predicts beyond the reply
            one, other = (side.forward(whole, keep=n + 1)[0, :-1].float().cpu() for side in (plain, base.reading(())))
        kl[:n, k] = next_token_kl(one, other).float()
    return kl
