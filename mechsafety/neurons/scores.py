"""Safety neurons: the neurons whose activation differs most between an aligned model and its base."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from mechsafety.conversation import PromptLike
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Count, Prompts, prompt_list, public
from mechsafety.models import LensModel
from mechsafety.models.decode import Cursor
from mechsafety.models.rows import Rows, lay_out, prompt_rows
from mechsafety.neurons.masks import share_count, top_mask
from mechsafety.neurons.runs import batches, check_pair, greedy, hooked
from mechsafety.nodes import Node
from mechsafety.prompts import distinct
from mechsafety.results import Provenance, Result
from mechsafety.scale.work import sweeps, work

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, slots=True, repr=False)
class NeuronScores(Result):
    """How much every MLP neuron's activation differs between an aligned model and its base.

    Attributes:
        provenance: The base model, options, versions.
        aligned: The aligned model.
        score: ``rms`` or ``ratio``: what ``scores`` holds.
        positions: Tokens that were read: ``completion``, ``prompt`` or ``last``.
        scores: The chosen score of each neuron.
        change: Root mean square of base less aligned activation, pooled over all tokens of all prompts.
        base_rms: Root mean square of the base model's activation on the same tokens.
        mean_change: Mean of aligned less base activation, which tells the sign of the change.
        halves: The chosen score on the even prompts alone, and on the odd prompts alone.
        n_prompts, n_tokens: Numbers of prompts and tokens that were read.

    Example:
        >>> ranking = ms.safety_neurons(model, base, harmful)
        >>> sorted(str(node) for node in ranking.ranked()[:4])
        ['L0.N11', 'L1.N3', 'L3.N13', 'L3.N3']
        >>> int(ranking.top(0.05).sum())  # 5 % of 120 neurons
        6
    """

    provenance: Provenance
    aligned: Provenance
    score: str
    positions: str
    scores: Float[Tensor, "layer d_mlp"]
    change: Float[Tensor, "layer d_mlp"]
    base_rms: Float[Tensor, "layer d_mlp"]
    mean_change: Float[Tensor, "layer d_mlp"]
    halves: Float[Tensor, "half layer d_mlp"]
    n_prompts: int
    n_tokens: int

    def __repr__(self) -> str:
        layers, width = self.scores.shape
        return f"NeuronScores({layers} x {width} neurons, {self.score}, {self.n_tokens} {self.positions} tokens)"

    def top(self, share: float | None = None, *, count: int | None = None) -> Bool[Tensor, "layer d_mlp"]:
        """Mask of the highest scores: a share (0 to 1] of all neurons, or a count.

        Raises:
            MechsafetyError: Neither or both are given, or the given one is out of range.
        """
        if (share is None) == (count is None):
            raise MechsafetyError(f"share={share}, count={count}", expected="one of the two")
        return top_mask(self.scores, share_count(share, self.scores.numel()) if share is not None else int(count or 0))

    def above(self, threshold: float) -> Bool[Tensor, "layer d_mlp"]:
        """Mask of the neurons with a score of at least ``threshold``."""
        return self.scores.cpu() >= threshold

    def ranked(self, count: int = 20) -> list[Node]:
        """The neurons with the highest scores, best first."""
        width = self.scores.shape[1]
        order = self.scores.flatten().sort(descending=True, stable=True).indices[:count].tolist()
        return [Node("neuron", k // width, k % width) for k in order]

    def layer_shares(self, share: float = 0.05) -> Float[Tensor, " layer"]:
        """Share of the highest scores that lies in each layer; the shares sum to 1."""
        counts = self.top(share).sum(1).float()
        return counts / counts.sum()

    @property
    def ratio(self) -> Float[Tensor, "layer d_mlp"]:
        """Change divided by ``base_rms``, whichever ``score`` was chosen."""
        return _over(self.change, self.base_rms)

    @property
    def reliability(self) -> float:
        """Spearman correlation of the scores on even and on odd prompts; NaN with a single prompt."""
        from scipy.stats import spearmanr

        if self.n_prompts < 2:
            return float("nan")
        return float(spearmanr(self.halves[0].flatten().numpy(), self.halves[1].flatten().numpy()).statistic)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per neuron, highest score first."""
        layers, width = self.scores.shape
        frame = pd.DataFrame(
            {
                "layer": torch.arange(layers).repeat_interleave(width).numpy(),
                "index": torch.arange(width).repeat(layers).numpy(),
                **{
                    name: getattr(self, attribute).flatten().cpu().numpy()
                    for name, attribute in (
                        ("score", "scores"),
                        ("change", "change"),
                        ("base_rms", "base_rms"),
                        ("mean_change", "mean_change"),
                    )
                },
            }
        )
        frame = frame.sort_values("score", ascending=False, kind="stable", ignore_index=True)
        frame.insert(0, "node", "L" + frame.layer.astype(str) + ".N" + frame["index"].astype(str))
        return frame

    def plot(self, share: float = 0.05) -> "go.Figure":
        """Bar chart of how the highest scores spread over the layers."""
        import plotly.express as px

        shares = self.layer_shares(share).tolist()
        labels = {"x": "layer", "y": f"share of the top {share:.1%} of neurons"}
        return px.bar(x=list(range(len(shares))), y=shares, labels=labels)


@sweeps
@public
def safety_neurons(
    aligned: LensModel,
    base: LensModel,
    prompts: Prompts,
    *,
    positions: Literal["completion", "prompt", "last"] = "completion",
    score: Literal["rms", "ratio"] = "rms",
    max_new_tokens: Count = 64,
    replies: Sequence[Sequence[int]] | None = None,
    batch_size: Count | None = None,
    progress: bool = True,
) -> NeuronScores:
    """Inference-time activation contrasting (Chen et al. 2024).

    1. The base model replies greedily to every prompt.
    2. Both models read the same prompt and reply.
    3. The change of a neuron is ``sqrt(mean over tokens of (a_base - a_aligned)^2)``, pooled over the tokens of all
       prompts. Here ``a`` is the neuron's activation, an input of the MLP's down-projection.

    Sums are streamed: memory does not grow with the number of prompts.

    Args:
        aligned: The model after safety training.
        base: The model before safety training.
        prompts: Prompts, usually harmful ones.
        positions: ``completion``: the reply's tokens, including its end token. ``prompt``: every token of the chat
            prompt. ``last``: the prompt's last token. Only ``completion`` generates replies.
        score: ``rms``: the change. ``ratio``: the change over the root mean square of the base model's activation, for
            neurons of different scales.
        max_new_tokens: Length of the replies, in tokens.
        replies: Token ids of the base model's replies (`greedy_replies`); nothing is then generated. Useful where
            several aligned models are compared with one base model. Only for ``completion``.
        batch_size: Number of prompts in one batch; by default the number of tokens sets it.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: Unknown option, no prompts, replies that do not fit, or models that are not a pair.

    Example:
        >>> ranking = ms.safety_neurons(model, base, harmful)
        >>> set(ranking.ranked()[:4]) == set(made.truth.neurons)
        True
    """
    from mechsafety.progress import progress_bar

    if replies is not None and (positions != "completion" or len(replies) != len(prompts) or not all(replies)):
        raise MechsafetyError(
            f"{len(replies)} replies to {len(prompts)} prompts, positions {positions!r}",
            expected="one reply of at least one token per prompt, positions 'completion'",
        )
    check_pair(base, aligned)
    if replies is None:
        prompts = distinct(prompts, "prompts")
    rows = prompt_rows(base, prompts)
    given = [list(reply) for reply in replies] if replies is not None else None
    generated = max_new_tokens if positions == "completion" else 0
    lengths = [len(row) + (len(given[k]) if given else generated) for k, row in enumerate(rows)]
    chunks = batches(lengths, batch_size)

    def contrasted(chunk: list[int]) -> _Sums:
        said: list[list[int]] = [given[k] if given else [] for k in chunk]
        if positions == "completion" and given is None:
            said = greedy(base, None, None, lay_out(base, [rows[k] for k in chunk]), max_new_tokens)[0]
        whole = [rows[k] + reply for k, reply in zip(chunk, said, strict=True)]
        # with 'prompt', the tokens of every prompt are counted, so each prompt needs its own columns
        shared = 0 if positions == "prompt" else min(len(rows[k]) for k in chunk) - 1
        batch = lay_out(base, whole, shared)
        tail = {"completion": max(map(len, said)), "prompt": batch.ids.shape[1], "last": 1}[positions]
        read = torch.zeros_like(batch.mask[:, -tail:])
        for row, (k, reply) in enumerate(zip(chunk, said, strict=True)):
            n = {"completion": len(reply), "prompt": len(rows[k]), "last": 1}[positions]
            read[row, tail - n :] = True
        return _contrast(aligned, base, batch, read, [k % 2 for k in chunk])

    sums = _Sums.zero(base)
    found = work("neurons", chunks, contrasted, _Sums)
    for own in progress_bar(found, total=len(chunks), desc="scoring neurons", show=progress and len(chunks) > 1):
        sums.add(own)
    options = {
        "positions": positions,
        "score": score,
        "max_new_tokens": max(map(len, given)) if given else max_new_tokens,
        "prompts": len(prompts),
        "prompts_sha256": digest(prompts),
    }
    change, base_rms = sums.root(sums.change.sum(0)), sums.root(sums.base.sum(0))
    halves = torch.stack([sums.root(sums.change[half], half) for half in (0, 1)])
    if score == "ratio":
        halves = _over(halves, torch.stack([sums.root(sums.base[half], half) for half in (0, 1)]))
    return NeuronScores(
        base.provenance(options=options),
        aligned.provenance(),
        score,
        positions,
        _over(change, base_rms) if score == "ratio" else change,
        change,
        base_rms,
        (sums.signed / sum(sums.tokens)).float(),
        halves,
        len(prompts),
        sum(sums.tokens),
    )


def digest(prompts: Sequence[PromptLike]) -> str:
    """Hash of a list of prompts, for provenance."""
    return hashlib.sha256("\0".join(prompt_list(prompts)).encode()).hexdigest()


@dataclass(slots=True)
class _Sums:
    """Sums over tokens; even and odd prompts are kept apart.

    Attributes:
        change, base: Squared changes, and squared activations of the base model.
        signed: Changes.
        tokens: Numbers of tokens.
    """

    change: Float[Tensor, "half layer d_mlp"]
    base: Float[Tensor, "half layer d_mlp"]
    signed: Float[Tensor, "layer d_mlp"]
    tokens: tuple[int, ...]

    @classmethod
    def zero(cls, model: LensModel) -> "_Sums":
        """Sums over no token."""
        shape = (2, model.n_layers, model.d_mlp)
        zeros = torch.zeros(shape, dtype=torch.float64)
        return cls(zeros, zeros.clone(), zeros[0].clone(), (0, 0))

    def add(self, other: "_Sums") -> None:
        """Count the tokens of some more prompts."""
        self.change += other.change
        self.base += other.base
        self.signed += other.signed
        self.tokens = tuple(a + b for a, b in zip(self.tokens, other.tokens, strict=True))

    def root(self, total: Tensor, half: int | None = None) -> Tensor:
        """Root mean square from a sum of squares."""
        tokens = sum(self.tokens) if half is None else self.tokens[half]
        return (total / max(tokens, 1)).sqrt().float()


def _over(change: Tensor, base_rms: Tensor) -> Tensor:
    """The ratio score; the clamp avoids division by 0 for a neuron that is never active in the base model."""
    return change / base_rms.clamp(min=1e-12)


def _contrast(aligned: LensModel, base: LensModel, batch: Rows, read: Tensor, halves: Sequence[int]) -> _Sums:
    """Run both models on one batch and add up, layer by layer, the tokens that ``read`` marks."""
    sums = _Sums.zero(base)
    tail = read.shape[1]
    half = torch.tensor(halves, device=read.device)
    picks = [read & rearrange(half == side, "batch -> batch 1") for side in (0, 1)]
    kept: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[Tensor], None]:
        return lambda tensor: kept.__setitem__(layer, tensor[:, -tail:].detach())

    def compare(layer: int) -> Callable[[Tensor], None]:
        def hook(tensor: Tensor) -> None:
            own, other = tensor[:, -tail:].float(), kept.pop(layer).to(tensor.device).float()
            for side, pick in enumerate(picks):
                if own.shape[0] == len(pick) and bool(pick.any()):
                    a, b = own[pick], other[pick]
                    sums.change[side, layer] += (a - b).square().sum(0).cpu().double()
                    sums.base[side, layer] += a.square().sum(0).cpu().double()
                    sums.signed[layer] += (b - a).sum(0).cpu().double()

        return hook

    with hooked((base, compare), (aligned, keep)):
        other, own = Cursor(aligned.backend), Cursor(base.backend)
        for ids, real in batch.pieces():
            other.feed(ids.to(aligned.device), real.to(aligned.device))
            own.feed(ids, real)
    sums.tokens = tuple(int(pick.sum()) for pick in picks)
    return sums
