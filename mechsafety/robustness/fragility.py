"""How much refusal is left as its parts are ablated one after the other, against random parts of the same kind."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.circuits.verification.side_effects import next_token_kl
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Amount, Count, public
from mechsafety.intervals import mean_interval, ratio_interval
from mechsafety.interventions import ablate
from mechsafety.interventions.checks import check_strength
from mechsafety.metrics import RefusalLogOdds, check_gap
from mechsafety.models import LensModel
from mechsafety.nodes import Node, NodeLike
from mechsafety.progress import progress_bar
from mechsafety.prompts import PromptPairs
from mechsafety.replies import REPLY_TOKENS, ReplyKinds, check_unedited, judge_replies, loss_limit
from mechsafety.results import Provenance, Result
from mechsafety.robustness.parts import matched_ranking, mean_values, ranked_parts
from mechsafety.scale.work import sweeps, work
from mechsafety.sites import Site

if TYPE_CHECKING:
    import plotly.graph_objects as go

Source = Literal["mean", "zero"]
RESAMPLES = 2000


@dataclass(frozen=True, slots=True, repr=False)
class FragilityCurve(Result):
    """Refusal and harmless behaviour as the first k of some parts are ablated, prompt by prompt.

    Attributes:
        provenance: Model, options, versions.
        metric: Name and tokens of the metric.
        parts: The parts, in the order of their ablation.
        sizes: The measured k.
        strengths: The measured strengths; 1 replaces a part's value wholly.
        before, before_harmless: Metric of the unedited model on the harmful and the harmless prompts.
        after: Metric on the harmful prompts with the first k parts ablated.
        random: The same with the first k of each random ranking (`matched_ranking`).
        overlaps: Of the first k random parts, the share that is among the first k given ones, mean over rankings. It is
            0 where the model has enough others of each kind. A random curve with much overlap says little.
        kl, random_kl: KL(unedited || edited) of the next token after the harmless prompts, in nats.
        kinds: Kinds of the replies to the harmful prompts, of the unedited model and then at each size, at the largest
            strength. Empty where no replies were generated.
        random_kinds: The same for the first random ranking, without the unedited model.
    """

    provenance: Provenance
    metric: dict[str, object]
    parts: tuple[Node, ...]
    sizes: tuple[int, ...]
    strengths: tuple[float, ...]
    before: Float[Tensor, " harmful"]
    before_harmless: Float[Tensor, " harmless"]
    after: Float[Tensor, "strength size harmful"]
    random: Float[Tensor, "strength size set harmful"]
    overlaps: tuple[float, ...]
    kl: Float[Tensor, "strength size harmless"]
    random_kl: Float[Tensor, "strength size set harmless"]
    kinds: tuple[ReplyKinds, ...] = ()
    random_kinds: tuple[ReplyKinds, ...] = ()

    def __repr__(self) -> str:
        value, (low, high) = self.area()
        half, (first, last) = self.half()
        halves = "never" if half is None else f"after {half}"
        ends = f" (95 % {_size(first)} to {_size(last)})" if self.sizes else ""
        return (
            f"FragilityCurve({self.provenance.model}: {len(self.parts)} parts, half of the {self._what} is lost "
            f"{halves}{ends}; area over random parts {value:.2f} [{low:.2f}, {high:.2f}])"
        )

    @property
    def gap(self) -> float:
        """Mean metric of the unedited model on the harmful prompts less that on the harmless ones."""
        return float(self.before.mean() - self.before_harmless.mean())

    @property
    def lost(self) -> Float[Tensor, "strength size"]:
        """Share of the gap that is lost; above 1 where a harmful prompt scores lower than harmless ones did."""
        return (self.before - self.after).mean(-1) / self.gap

    @property
    def random_lost(self) -> Float[Tensor, "strength size set"]:
        """The same for each random ranking."""
        return (self.before - self.random).mean(-1) / self.gap

    @property
    def _gaps(self) -> Float[np.ndarray, " pair"]:
        """Gap of each pair."""
        return (self.before - self.before_harmless).double().numpy()

    @property
    def _what(self) -> str:
        return "refusals" if self.kinds else "gap"

    def area(self) -> tuple[float, tuple[float, float]]:
        """Mean over k, at the largest strength, of the share of the gap lost less what random parts lose.

        The mean is the area between the two curves over k as a share of the largest measured k, by the trapezoid rule
        from k = 0 on, where nothing is lost. 0: these parts matter no more than random ones. The interval is over
        pairs.
        """
        extra = (self.random[-1].mean(1) - self.after[-1]).double().numpy()  # [size prompt]
        points = np.concatenate([np.zeros_like(extra[:1]), extra])
        where = np.array([0, *self.sizes]) / self.sizes[-1]
        by_prompt = np.trapezoid(points, where, axis=0)
        return float(by_prompt.mean() / self.gap), ratio_interval(by_prompt, self._gaps)

    def half(self, seed: int = 0) -> tuple[int | None, tuple[int | None, int | None]]:
        """The smallest measured k at which half of the refusals are lost, and its 95 % interval over prompts.

        Where replies were generated, refusals are replies of the kind ``refuses``. A degenerate reply is no refusal
        either; ``kinds`` tells them apart. Without replies it is half of the metric's gap. None stands for: at no
        measured size, or no refusals to lose. The interval is a percentile bootstrap over the harmful prompts.
        """
        if self.kinds:
            whole, left = (
                self.kinds[0].refused.double().numpy(),
                np.stack([one.refused.double().numpy() for one in self.kinds[1:]]),
            )
        else:
            floor = float(self.before_harmless.mean())
            sign = 1 if self.gap > 0 else -1
            whole, left = (sign * (side.double().numpy() - floor) for side in (self.before, self.after[-1]))
        rng = np.random.default_rng(seed)
        drawn = rng.integers(len(whole), size=(RESAMPLES, len(whole)))
        beyond = len(self.sizes)  # stands for: at no size
        found = [self._first(whole[rows], left[:, rows]) for rows in drawn]
        low, high = (int(value) for value in np.percentile(found, [2.5, 97.5], method="nearest"))
        sizes = [*self.sizes, None]
        return sizes[self._first(whole, left)], (sizes[low], sizes[min(high, beyond)])

    @staticmethod
    def _first(whole: np.ndarray, left: np.ndarray) -> int:
        """Index of the first size at which at most half is left; the number of sizes where none is."""
        below = np.flatnonzero(left.mean(1) <= whole.mean() / 2)
        return int(below[0]) if len(below) and whole.mean() > 0 else len(left)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per strength and size: share of the gap lost, KL, refusals, with 95 % intervals and random parts.

        ``random_low`` and ``random_high`` are the lowest and the highest of the random rankings. ``p_value`` is (1 +
        number of random rankings that lose at least as much) / (1 + number of rankings). Shares of replies are those at
        the largest strength and NaN elsewhere.
        """
        rows: list[dict[str, Any]] = []
        control = self.random_lost
        for s, strength in enumerate(self.strengths):
            for k, size in enumerate(self.sizes):
                by_prompt = (self.before - self.after[s, k]).double().numpy()
                low, high = ratio_interval(by_prompt, self._gaps)
                kl, others = self.kl[s, k].double().numpy(), control[s, k]
                row: dict[str, Any] = {"strength": strength, "parts": size, "lost": float(self.lost[s, k])}
                row |= {"ci_low": low, "ci_high": high, "random_mean": float(others.mean())}
                row |= {"random_low": float(others.min()), "random_high": float(others.max())}
                row["p_value"] = (1 + int((others >= self.lost[s, k]).sum())) / (1 + len(others))
                row |= dict(zip(("kl", "kl_low", "kl_high"), (kl.mean(), *mean_interval(kl)), strict=True))
                row["random_overlap"] = self.overlaps[k]
                row["random_kl"] = float(self.random_kl[s, k].mean())
                said = s == len(self.strengths) - 1 and bool(self.kinds)
                for name, kinds in (("", self.kinds[1:]), ("random_", self.random_kinds)):
                    for kind in ("refuses", "degenerate"):
                        row[f"{name}{kind}"] = kinds[k].share(kind) if said else float("nan")
                rows.append(row)
        return pd.DataFrame(rows)

    def plot(self) -> "go.Figure":
        """Share of the gap lost and KL against the number of ablated parts, with random parts as bands."""
        from plotly.subplots import make_subplots

        frame = self.to_dataframe()
        last = frame[frame.strength == self.strengths[-1]]
        panels = ["share of the gap lost", "KL on harmless prompts, nats"] + (["replies"] if self.kinds else [])
        figure = make_subplots(1, len(panels), subplot_titles=panels)
        band = {"x": [*last.parts, *last.parts[::-1]], "y": [*last.random_high, *last.random_low[::-1]]}
        figure.add_scatter(
            **band, fill="toself", mode="none", fillcolor="rgba(128,128,128,0.35)", name="random parts", row=1, col=1
        )
        for strength, rows in frame.groupby("strength"):
            up, down = rows.ci_high - rows.lost, rows.lost - rows.ci_low
            error = {"symmetric": False, "array": up, "arrayminus": down}
            name = f"these parts, strength {strength:g}"
            figure.add_scatter(x=rows.parts, y=rows.lost, error_y=error, name=name, row=1, col=1)
            figure.add_scatter(x=rows.parts, y=rows.kl, name=name, showlegend=False, row=1, col=2)
        figure.add_scatter(x=last.parts, y=last.random_kl, name="random parts, mean", line_dash="dot", row=1, col=2)
        for name in ("refuses", "degenerate", "random_refuses") if self.kinds else ():
            figure.add_scatter(x=last.parts, y=last[name], name=name.replace("_", " "), row=1, col=3)
        return figure.update_xaxes(title_text="parts ablated").update_layout(template="none", title=repr(self))


def _size(size: int | None) -> str:
    return "never" if size is None else str(size)


def _sizes(n: int, asked: Sequence[int] | None) -> tuple[int, ...]:
    """The measured k: those that were asked for, or 1, 2, 5, 10, 20, 50 and so on, and all.

    Raises:
        MechsafetyError: A size that is not between 1 and the number of parts.
    """
    if asked is None:
        steps = [m * 10**e for e in range(6) for m in (1, 2, 5)]
        return tuple(sorted({size for size in steps if size < n} | {n}))
    wrong = [size for size in asked if not 1 <= size <= n]
    if wrong or not asked:
        raise MechsafetyError(f"sizes {list(asked)}", expected=f"numbers of parts from 1 to {n}")
    return tuple(sorted(set(asked)))


@sweeps
@public
def fragility(
    model: LensModel,
    parts: RefusalCircuit | Sequence[NodeLike],
    pairs: PromptPairs,
    metric: RefusalLogOdds,
    *,
    sizes: Sequence[int] | None = None,
    strengths: Sequence[float] = (1.0,),
    source: Source = "mean",
    n_random: Count = 20,
    replies: bool = False,
    reply_tokens: Count = REPLY_TOKENS,
    seed: Amount = 0,
    progress: bool = True,
) -> FragilityCurve:
    """Ablate the first k parts for growing k, and measure what is left of the refusal and of harmless behaviour.

    Every point is also measured with random parts of the same kinds and, as far as possible, of the same layers. A
    curve that falls steeply, while the random one does not, shows a mechanism in few parts. The model is unedited again
    afterwards, even after an exception.

    Args:
        model: The model.
        parts: A circuit, whose parts are ablated in the order of their effect; or heads, MLPs and neurons in the order
            in which they are ablated.
        pairs: Pairs, of which those that align are taken. They should not be those that the parts were found on.
        metric: The metric of refusal.
        sizes: The measured k; by default 1, 2, 5, 10, 20, 50 and so on, and all parts.
        strengths: Strengths of the ablation (`mechsafety.ablate`), above 0 and up to 1.
        source: ``mean``: each part takes its mean over all tokens of the harmless prompts. ``zero``: zero.
        n_random: Random rankings of parts.
        replies: Whether to generate replies too, at the largest strength: for these parts, and for the first random
            ranking. A model that babbles refuses less but does not comply.
        reply_tokens: Length of replies, in tokens.
        seed: Seed of the random rankings.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: Parts that the model lacks, sizes or strengths out of range, no gap to take shares of, or a
            model that is already edited.

    Example::

        curve = ms.fragility(model, circuit, fresh_pairs, metric)
        print(curve)  # after how many parts half of the gap is lost, and the area over random parts
    """
    check_unedited(model)
    nodes, pairs = ranked_parts(model, parts), pairs.aligned(model)
    chosen, swept = _sizes(len(nodes), sizes), tuple(sorted({check_strength(s, share=True) for s in strengths}))
    if not swept or swept[0] <= 0:
        raise MechsafetyError(f"strengths {list(strengths)}", expected="at least one, above 0 and up to 1")
    plain = model.reading(())  # the KL is that of a reply's first token
    unedited = plain.logits(pairs.harmless)
    before, harmless = (metric.scores(model, side).cpu() for side in (pairs.harmful, pairs.harmless))
    check_gap(before, harmless)

    rankings = [nodes, *(matched_ranking(model, nodes, seed + k) for k in range(n_random))]
    every = {node for ranking in rankings for node in ranking}
    means = mean_values(model, every, pairs.harmless) if source == "mean" else {}

    def measured(some: Sequence[Node], strength: float) -> tuple[Tensor, Tensor]:
        """Metric on the harmful prompts, and KL on the harmless ones."""
        with ablate(model, some, strength, source, values=means):
            scores, after = metric.scores(model, pairs.harmful), plain.logits(pairs.harmless)
        return scores.cpu(), next_token_kl(unedited, after).clamp(min=0).float().cpu()

    scores = torch.zeros(len(swept), len(chosen), len(rankings), len(before))
    kl = torch.zeros(len(swept), len(chosen), len(rankings), len(harmless))
    with progress_bar(total=scores[..., 0].numel(), desc="fragility", show=progress) as bar:
        cells = list(product(range(len(swept)), range(len(chosen)), range(len(rankings))))
        found = work(
            "fragility",
            cells,
            lambda cell: measured(rankings[cell[2]][: chosen[cell[1]]], swept[cell[0]]),
            tuple[Tensor, Tensor],
        )
        for cell, values in zip(cells, found, strict=True):
            scores[cell], kl[cell] = values
            bar.update()
    said: tuple[tuple[ReplyKinds, ...], tuple[ReplyKinds, ...]] = ((), ())
    if replies:
        said = _kinds(model, rankings[:2], chosen, swept[-1], source, means, pairs.harmful, reply_tokens, progress)
    options = {"source": source, "random_sets": n_random, "pairs": len(pairs)}
    options |= {"reply_tokens": reply_tokens} if replies else {}
    return FragilityCurve(
        model.provenance(seed=seed, options=options),
        metric.to_json(),
        nodes,
        chosen,
        swept,
        before,
        harmless,
        scores[:, :, 0],
        scores[:, :, 1:],
        tuple(_overlap(rankings, size) for size in chosen),
        kl[:, :, 0],
        kl[:, :, 1:],
        *said,
    )


def _overlap(rankings: Sequence[Sequence[Node]], size: int) -> float:
    """Share of the first random parts that are among the first given ones, mean over the random rankings."""
    given = set(rankings[0][:size])
    return sum(node in given for ranking in rankings[1:] for node in ranking[:size]) / (size * (len(rankings) - 1))


def _kinds(
    model: LensModel,
    rankings: Sequence[Sequence[Node]],
    sizes: Sequence[int],
    strength: float,
    source: Source,
    means: Mapping[Site, Tensor],
    prompts: Sequence[str],
    reply_tokens: int,
    progress: bool,
) -> tuple[tuple[ReplyKinds, ...], tuple[ReplyKinds, ...]]:
    """Kinds of reply to the harmful prompts: unedited and by size for the parts, by size for random ones."""
    limit = loss_limit(model)

    def judged(texts: list[str]) -> ReplyKinds:
        return judge_replies(model, prompts, texts, limit=limit).without_text()

    found: list[list[ReplyKinds]] = [[judged(model.generate(prompts, reply_tokens, progress=False))], []]
    with progress_bar(total=2 * len(sizes), desc="replies", show=progress) as bar:
        for rows, ranking in zip(found, rankings, strict=True):
            for size in sizes:
                with ablate(model, ranking[:size], strength, source, values=means):
                    texts = model.generate(prompts, reply_tokens, progress=False)
                rows.append(judged(texts))
                bar.update()
    return tuple(found[0]), tuple(found[1])
