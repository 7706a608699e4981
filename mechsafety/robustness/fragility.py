"""How much refusal is left as its parts are ablated one after the other, against random parts of the same kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, product
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechsafety.circuits.circuit import CircuitEdge, RefusalCircuit
from mechsafety.circuits.verification.side_effects import next_token_kl
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Amount, Count, public
from mechsafety.intervals import mean_interval, perplexity_of, ratio_interval
from mechsafety.interventions import Direction, ablate
from mechsafety.interventions.checks import check_once, check_strength
from mechsafety.interventions.steering import Placed, remove_directions
from mechsafety.metrics import RefusalLogOdds, check_gap
from mechsafety.models import LensModel
from mechsafety.nodes import Edge, Node, NodeLike
from mechsafety.progress import progress_bar
from mechsafety.prompts import PromptPairs
from mechsafety.replies import REPLY_TOKENS, ReplyKinds, check_unedited, judge_replies, loss_limit, reply_loss
from mechsafety.results import Provenance, Result
from mechsafety.robustness.ablating import Ablating, AtCounterfactual, CutEdges, InContext, Source, Speaking
from mechsafety.robustness.parts import (
    matched_directions,
    matched_edges,
    matched_ranking,
    mean_values,
    ranked_edges,
    ranked_parts,
)
from mechsafety.scale.work import sweeps, work
from mechsafety.sites import SiteKind

if TYPE_CHECKING:
    import plotly.graph_objects as go

RESAMPLES = 2000
# of a curve: one blue per strength, the kinds of reply, and what is random
SHADES = ("#00588C", "#0072B2", "#56B4E9", "#A9D6F2")
KIND_LINES = {"refuses": "#0072B2", "degenerate": "#D55E00"}
GREY, FAINT = "#6B7280", "rgba(107, 114, 128, 0.25)"


@dataclass(frozen=True, slots=True, repr=False)
class FragilityCurve(Result):
    """Refusal and harmless behaviour as the first k of some parts are ablated, prompt by prompt.

    Attributes:
        provenance: Model, options, versions.
        metric: Name and tokens of the metric.
        parts: The heads, MLPs and neurons, in the order of their ablation; empty if edges or directions were ablated.
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
        kinds_harmless, random_kinds_harmless: The same for the replies to the harmless prompts. Empty also in results
            saved by earlier versions.
        loss, random_loss: Loss per token, in nats, of the unedited model's replies to the harmless prompts, in the same
            order as the kinds. None where none were generated.
        edges: The edges, in the order of their ablation; empty if others were ablated.
        directions: Names of the directions, in the order of their ablation; empty if others were ablated.

    Example:
        >>> curve = ms.fragility(model, circuit, pairs, metric, sizes=[1, 5], n_random=2)
        >>> curve.lost.shape  # strength, size
        torch.Size([1, 2])
        >>> parts, interval = curve.half()
        >>> parts  # enough to lose half of the gap
        1
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
    kinds_harmless: tuple[ReplyKinds, ...] = ()
    random_kinds_harmless: tuple[ReplyKinds, ...] = ()
    loss: Float[Tensor, "row harmless"] | None = None
    random_loss: Float[Tensor, "size harmless"] | None = None
    edges: tuple[Edge, ...] = ()
    directions: tuple[str, ...] = ()

    def __repr__(self) -> str:
        value, (low, high) = self.area()
        half, (first, last) = self.half()
        halves = "never" if half is None else f"after {half}"
        ends = f" (95 % {_size(first)} to {_size(last)})" if self.sizes else ""
        return (
            f"FragilityCurve({self.provenance.model}: {len(self.names)} {self.what}, half of the {self._lost_what} is "
            f"lost {halves}{ends}; area over random {self.what} {value:.2f} [{low:.2f}, {high:.2f}])"
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of what is ablated, in order."""
        return self.directions or tuple(map(str, self.edges or self.parts))

    @property
    def what(self) -> str:
        """What is ablated: ``parts``, ``edges`` or ``directions``."""
        return "directions" if self.directions else "edges" if self.edges else "parts"

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
    def _lost_what(self) -> str:
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
        number of random rankings that lose at least as much) / (1 + number of rankings). Shares of replies, and the
        perplexity of the unedited model's replies to the harmless prompts, are those at the largest strength and NaN
        elsewhere.
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
                row |= self._said(k if s == len(self.strengths) - 1 else None)
                rows.append(row)
        return pd.DataFrame(rows)

    def _said(self, k: int | None) -> dict[str, float]:
        """Shares of replies and perplexity at a size; NaN where nothing was said."""
        nothing, row = float("nan"), dict[str, float]()
        harmful = {"": self.kinds[1:], "random_": self.random_kinds}
        harmless = {"harmless_": self.kinds_harmless[1:], "random_harmless_": self.random_kinds_harmless}
        for name, kinds in (harmful | harmless).items():
            for kind in ("refuses", "degenerate"):
                row[f"{name}{kind}"] = nothing if k is None or not kinds else kinds[k].share(kind)
        value, low, high, other = (nothing,) * 4
        if k is not None and self.loss is not None and self.random_loss is not None:
            value, low, high = perplexity_of(self.loss[1 + k])
            other, _, _ = perplexity_of(self.random_loss[k])
        return row | {"perplexity": value, "perplexity_low": low, "perplexity_high": high, "random_perplexity": other}

    def plot(self) -> "go.Figure":
        """Share of the gap lost and KL against the number of ablated parts, with random parts as bands."""
        from plotly.subplots import make_subplots

        frame = self.to_dataframe()
        last = frame[frame.strength == self.strengths[-1]]
        panels = ["share of<br>the gap lost", "KL on harmless<br>prompts, nats"]
        panels += ["replies to<br>harmful prompts"] if self.kinds else []
        panels += ["replies to<br>harmless prompts"] if self.kinds_harmless else []
        figure = make_subplots(1, len(panels), subplot_titles=panels)
        band: dict[str, Any] = {"x": [*last.parts, *last.parts[::-1]], "y": [*last.random_high, *last.random_low[::-1]]}
        band |= {"fill": "toself", "mode": "lines", "line": {"color": GREY, "width": 1}, "fillcolor": FAINT}
        figure.add_scatter(**band, name="random parts", row=1, col=1)
        strengths = list(frame.groupby("strength"))[::-1]  # the strongest one first: it has the darkest blue
        for colour, (strength, rows) in zip(cycle(SHADES), strengths, strict=False):
            up, down = rows.ci_high - rows.lost, rows.lost - rows.ci_low
            error = {"symmetric": False, "array": up, "arrayminus": down}
            line: dict[str, Any] = {"line": {"color": colour}, "name": f"these parts, strength {strength:g}"}
            figure.add_scatter(x=rows.parts, y=rows.lost, error_y=error, **line, row=1, col=1)
            figure.add_scatter(x=rows.parts, y=rows.kl, **line, showlegend=False, row=1, col=2)
        random = {"line": {"color": GREY, "dash": "dot"}}
        figure.add_scatter(x=last.parts, y=last.random_kl, name="random parts, mean", **random, row=1, col=2)
        shares = [("refuses", 3), ("degenerate", 3), ("random_refuses", 3)] if self.kinds else []
        shares += [("harmless_refuses", 4), ("harmless_degenerate", 4)] if self.kinds_harmless else []
        for name, column in shares:
            kind = name.removeprefix("harmless_")
            line = random if kind == "random_refuses" else {"line": {"color": KIND_LINES[kind]}}
            words = "refuses, random parts" if kind == "random_refuses" else kind
            shown = {"name": words, "showlegend": column == 3}
            figure.add_scatter(x=last.parts, y=last[name], **line, **shown, row=1, col=column)
        title = {"text": repr(self).replace("; ", ";<br>"), "font_size": 14}  # in one line it leaves a notebook's page
        figure.update_xaxes(title_text=f"{self.what} ablated")
        legend = {"orientation": "h", "yanchor": "top", "y": -0.25, "x": 0}
        return figure.update_layout(
            template="none", title=title, legend=legend, margin={"t": 130, "b": 120}, height=480
        )


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
    parts: RefusalCircuit | Sequence[NodeLike] | Sequence[Edge | CircuitEdge] | Sequence[Direction | Placed],
    pairs: PromptPairs,
    metric: RefusalLogOdds,
    *,
    sizes: Sequence[int] | None = None,
    strengths: Sequence[float] = (1.0,),
    source: Source | None = None,
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
        parts: What is ablated. A circuit, whose parts are ablated in the order of their effect; or, in the order in
            which they are ablated, heads, MLPs and neurons, edges (such as ``circuit.edges``), or directions.
        pairs: Pairs, of which those that align are taken. They should not be those that the parts were found on.
        metric: The metric of refusal.
        sizes: The measured k; by default 1, 2, 5, 10, 20, 50 and so on, and all parts.
        strengths: Strengths of the ablation, above 0 and up to 1: the share of the way from a part's own value to the
            source's.
        source: What an ablated part takes. ``mean``: its mean over all tokens of the harmless prompts. ``zero``: zero;
            of a direction, it is removed. ``counterfactual``: its value on the other prompt of the pair, at every token
            of prompt and reply. By default ``mean`` for heads, MLPs and neurons, ``counterfactual`` for edges and
            ``zero`` for directions, of which each is the only one.
        n_random: Random rankings of parts.
        replies: Whether to generate replies too, to harmful and harmless prompts, at the largest strength: for these
            parts, and for the first random ranking. A model that babbles refuses less but does not comply. The
            perplexity of the unedited model's own replies to the harmless prompts is then measured as well. An edge is
            cut in stored runs of the prompts, so that edges have no replies.
        reply_tokens: Length of replies, in tokens.
        seed: Seed of the random rankings.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: Parts that the model lacks, parts of several sorts, a source that they do not have, sizes or
            strengths out of range, no gap to take shares of, or a model that is already edited. For
            ``counterfactual``, pairs of unequal length, or a metric of whole openers.

    Example:
        >>> curve = ms.fragility(model, circuit, pairs, metric, sizes=[1, 2], n_random=2)
        >>> bool(curve.lost[0, 0] > 0.9)  # the first part alone
        True
    """
    check_unedited(model)
    pairs = pairs.aligned(model)
    ranked = _ranked(model, parts, source, replies)
    chosen, swept = _sizes(len(ranked), sizes), tuple(sorted({check_strength(s, share=True) for s in strengths}))
    if not swept or swept[0] <= 0:
        raise MechsafetyError(f"strengths {list(strengths)}", expected="at least one, above 0 and up to 1")
    unedited = model.reading(()).logits(pairs.harmless)  # the KL is that of a reply's first token
    before, harmless = (metric.scores(model, side).cpu() for side in (pairs.harmful, pairs.harmless))
    check_gap(before, harmless)

    rankings = [ranked, *(_matched(model, ranked, seed + k) for k in range(n_random))]
    ablation, used = _ablation(model, rankings, pairs, metric, source)
    scores = torch.zeros(len(swept), len(chosen), len(rankings), len(before))
    kl = torch.zeros(len(swept), len(chosen), len(rankings), len(harmless))
    with progress_bar(total=scores[..., 0].numel(), desc="fragility", show=progress) as bar:
        cells = list(product(range(len(swept)), range(len(chosen)), range(len(rankings))))

        def measured(cell: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
            s, k, r = cell
            found, after = ablation.read(rankings[r][: chosen[k]], swept[s])
            return found.cpu(), next_token_kl(unedited, after).clamp(min=0).float().cpu()

        for cell, values in zip(cells, work("fragility", cells, measured, tuple[Tensor, Tensor]), strict=True):
            scores[cell], kl[cell] = values
            bar.update()
    said: dict[str, Any] = {}
    if replies and not isinstance(ablation, CutEdges):
        said = _said(ablation, rankings[:2], chosen, swept[-1], reply_tokens, progress)
    options = {"source": used, "random_sets": n_random, "pairs": len(pairs)}
    options |= {"reply_tokens": reply_tokens} if replies else {}
    return FragilityCurve(
        model.provenance(seed=seed, options=options),
        metric.to_json(),
        tuple(part for part in ranked if isinstance(part, Node)),
        chosen,
        swept,
        before,
        harmless,
        scores[:, :, 0],
        scores[:, :, 1:],
        tuple(_overlap(rankings, size) for size in chosen),
        kl[:, :, 0],
        kl[:, :, 1:],
        **said,
        edges=tuple(part for part in ranked if isinstance(part, Edge)),
        directions=tuple(part.name for part in ranked if isinstance(part, Direction)),
    )


# one sort of part, in the order of its ablation
_Ranking = tuple[Node, ...] | tuple[Edge, ...] | tuple[Direction, ...]
SOURCES: dict[type, tuple[Source, ...]] = {
    Node: ("mean", "zero", "counterfactual"),
    Edge: ("counterfactual",),
    Direction: ("zero",),
}
SORTS = {Node: "heads, MLPs and neurons", Edge: "edges", Direction: "directions"}


def _ranked(model: LensModel, parts: Any, source: Source | None, replies: bool) -> _Ranking:
    """The parts in the order in which they are ablated.

    Raises:
        MechsafetyError: As `fragility`.
    """
    if isinstance(parts, Direction | Placed | Edge | CircuitEdge):
        parts = [parts]
    listed = [] if isinstance(parts, RefusalCircuit | str | Node) else list(parts)
    sorts = {_sort(part) for part in listed} or {Node}
    if len(sorts) > 1:
        raise MechsafetyError(
            f"parts of several sorts ({'; '.join(sorted(SORTS[sort] for sort in sorts))})",
            expected="one sort at a time",
        )
    (sort,) = sorts
    if source is not None and source not in SOURCES[sort]:
        raise MechsafetyError(f"source={source!r} for {SORTS[sort]}", expected=" or ".join(map(repr, SOURCES[sort])))
    if sort is Edge:
        if replies:
            raise MechsafetyError(
                "replies while edges are cut (an edge is cut in stored runs of the prompts)",
                expected="replies=False",
                hint="or ablate the nodes at the edges' ends",
            )
        return ranked_edges(model, listed)
    if sort is Direction:
        placed = tuple(part.direction if isinstance(part, Placed) else part for part in listed)
        check_once([direction.name for direction in placed], "directions")
        return placed
    return ranked_parts(model, parts)


def _sort(part: Any) -> type:
    if isinstance(part, Direction | Placed):
        return Direction
    return Edge if isinstance(part, Edge | CircuitEdge) else Node


def _matched(model: LensModel, ranked: _Ranking, seed: int) -> _Ranking:
    """A random part for each part (`matched_ranking`)."""
    sort = _sort(ranked[0])
    if sort is Direction:
        return matched_directions([part for part in ranked if isinstance(part, Direction)], seed)
    if sort is Edge:
        return matched_edges(model, [part for part in ranked if isinstance(part, Edge)], seed)
    return matched_ranking(model, [part for part in ranked if isinstance(part, Node)], seed)


def _ablation(
    model: LensModel,
    rankings: Sequence[_Ranking],
    pairs: PromptPairs,
    metric: RefusalLogOdds,
    source: Source | None,
) -> tuple[Ablating, Source]:
    """What reads the model while these parts are ablated, and the source."""
    sort = _sort(rankings[0][0])
    used = SOURCES[sort][0] if source is None else source
    if sort is Edge:
        return CutEdges.of(model, pairs, metric), used
    if sort is Direction:
        return InContext(model, pairs, metric, partial(remove_directions, model)), used
    if used == "counterfactual":
        neurons = any(isinstance(node, Node) and node.kind == "neuron" for node in rankings[0])
        return AtCounterfactual.of(model, pairs, metric, [SiteKind.NEURONS] if neurons else []), used
    every = {node for ranking in rankings for node in ranking if isinstance(node, Node)}
    means = mean_values(model, every, pairs.harmless) if used == "mean" else {}
    return InContext(model, pairs, metric, partial(ablate, model, source=used, values=means)), used


def _overlap(rankings: Sequence[_Ranking], size: int) -> float:
    """Share of the first random parts that are among the first given ones, mean over the random rankings."""
    if isinstance(rankings[0][0], Direction):
        return 0.0
    given = set(rankings[0][:size])
    return sum(part in given for ranking in rankings[1:] for part in ranking[:size]) / (size * (len(rankings) - 1))


def _said(
    ablation: Speaking,
    rankings: Sequence[_Ranking],
    sizes: Sequence[int],
    strength: float,
    reply_tokens: int,
    progress: bool,
) -> dict[str, Any]:
    """Kinds of reply to both sides, and the loss of the harmless side's unedited replies.

    For the given parts, the unedited model comes first and then each size; for random ones, each size.
    """
    model, pairs = ablation.model, ablation.pairs
    limit, sides = loss_limit(model), ("harmful", "harmless")
    prompts: dict[str, list[str]] = {side: getattr(pairs, side) for side in sides}
    unedited = {side: model.generate(prompts[side], reply_tokens, progress=False) for side in sides}
    references = unedited["harmless"]

    def judged(side: str, texts: list[str]) -> ReplyKinds:
        return judge_replies(model, prompts[side], texts, limit=limit).without_text()

    kinds: dict[str, list[list[ReplyKinds]]] = {side: [[judged(side, unedited[side])], []] for side in sides}
    loss = [[reply_loss(model, prompts["harmless"], references)], []]
    with progress_bar(total=2 * len(sizes), desc="replies", show=progress) as bar:
        for place, ranking in enumerate(rankings):
            for size in sizes:
                some = ranking[:size]
                for side in sides:
                    kinds[side][place].append(judged(side, ablation.replies(some, strength, side, reply_tokens)))
                loss[place].append(ablation.loss(some, strength, references))
                bar.update()
    (own, random), (own_harmless, random_harmless) = (map(tuple, kinds[side]) for side in sides)
    return {
        "kinds": own,
        "random_kinds": random,
        "kinds_harmless": own_harmless,
        "random_kinds_harmless": random_harmless,
        "loss": torch.stack(loss[0]).cpu(),
        "random_loss": torch.stack(loss[1]).cpu(),
    }
