"""Neurons of one model that tell harmful from harmless prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Count, public
from mechsafety.models import LensModel
from mechsafety.neurons.runs import batches, hooked
from mechsafety.nodes import Node
from mechsafety.progress import progress_bar
from mechsafety.prompts import PromptPairs, omissions
from mechsafety.prompts.spans import SPANS
from mechsafety.results import Provenance, Result
from mechsafety.scale.work import sweeps, work


@dataclass(frozen=True, slots=True, repr=False)
class NeuronContrast(Result):
    """How much each neuron's activation differs between harmful and harmless prompts, span by span.

    Attributes:
        provenance: Model, options, versions.
        spans: Names of the spans, along the first axis of the tensors.
        effects: Cohen's d: mean harmful less mean harmless activation, over the pooled standard deviation between
            prompts. Positive where the neuron is more active on harmful prompts. Infinite where the means differ but
            the neuron does not vary within a kind.
        harmful_mean, harmless_mean: Mean over prompts of the activation. Each prompt's activation is the mean over the
            span's tokens.
        n: Number of prompts of each kind.

    Example:
        >>> contrast = ms.neurons.contrast_neurons(model, pairs)
        >>> contrast.effects.shape  # span, layer, neuron
        torch.Size([2, 4, 30])
        >>> contrast.at("suffix").shape
        torch.Size([4, 30])
    """

    provenance: Provenance
    spans: tuple[str, ...]
    effects: Float[Tensor, "span layer d_mlp"]
    harmful_mean: Float[Tensor, "span layer d_mlp"]
    harmless_mean: Float[Tensor, "span layer d_mlp"]
    n: int

    def __repr__(self) -> str:
        _, layers, width = self.effects.shape
        return f"NeuronContrast({layers} x {width} neurons, {self.n} pairs, spans {', '.join(self.spans)})"

    def at(self, span: str) -> Float[Tensor, "layer d_mlp"]:
        """Effect sizes at one span.

        Raises:
            MechsafetyError: The result does not hold this span.
        """
        if span not in self.spans:
            raise MechsafetyError(f"no effects at the span {span!r}", expected=f"one of {self.spans}")
        return self.effects[self.spans.index(span)]

    def ranked(self, span: str, count: int = 20) -> list[Node]:
        """The neurons with the largest absolute effect at a span, strongest first."""
        effects = self.at(span)
        order = effects.abs().flatten().sort(descending=True, stable=True).indices[:count].tolist()
        return [Node("neuron", k // effects.shape[1], k % effects.shape[1]) for k in order]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per span and neuron, strongest effect first."""
        spans, layers, width = self.effects.shape
        grid = torch.cartesian_prod(torch.arange(spans), torch.arange(layers), torch.arange(width)).numpy()
        frame = pd.DataFrame(
            {
                "span": [self.spans[k] for k in grid[:, 0]],
                "node": [f"L{layer}.N{index}" for _, layer, index in grid],
                "effect": self.effects.flatten().numpy(),
                "harmful_mean": self.harmful_mean.flatten().numpy(),
                "harmless_mean": self.harmless_mean.flatten().numpy(),
            }
        )
        return frame.sort_values("effect", key=abs, ascending=False, kind="stable", ignore_index=True)

    def plot(self) -> go.Figure:
        """Number of neurons per span and layer with an absolute effect of at least 0.8 ("large")."""
        import plotly.express as px

        counts = (self.effects.abs() >= 0.8).sum(-1)
        rows = [(s, k, int(n)) for s, row in zip(self.spans, counts, strict=True) for k, n in enumerate(row)]
        frame = pd.DataFrame(rows, columns=["span", "layer", "neurons with |d| of at least 0.8"])
        return px.bar(frame, x="layer", y=frame.columns[2], color="span", barmode="group")


@sweeps
@public
def contrast_neurons(
    model: LensModel,
    pairs: PromptPairs,
    *,
    spans: Sequence[str] = ("instruction", "suffix"),
    batch_size: Count = 16,
    progress: bool = True,
) -> NeuronContrast:
    """Contrast of one model's neurons between harmful and harmless prompts, as a signed effect size.

    A neuron's activation is its value at the input of the down-projection. It is averaged over the tokens of a span of
    each prompt. Cohen's d then compares harmful with harmless prompts: ``(mean - mean) / sqrt((var + var) / 2)``, with
    unbiased variances over prompts. Pairs need not align. Sums are streamed.

    Args:
        model: The model.
        pairs: At least two pairs.
        spans: Some of ``prefix``, ``instruction`` and ``suffix``. The reply is decided at the suffix.
        batch_size: Number of prompts in one batch.
        progress: Whether to show a bar, after two seconds.

    Raises:
        MechsafetyError: Fewer than two pairs, or an unknown span.

    Example:
        >>> contrast = ms.neurons.contrast_neurons(model, pairs, spans=["suffix"])
        >>> contrast.spans, contrast.effects.shape
        (('suffix',), torch.Size([1, 4, 30]))
    """
    unknown = [span for span in spans if span not in SPANS]
    if unknown or not spans or isinstance(spans, str):
        raise MechsafetyError(f"spans {unknown or spans!r}", expected=f"some of {SPANS}")
    if len(pairs) < 2:
        raise MechsafetyError("one pair", expected="at least 2: an effect size needs variances")
    n, sides = len(pairs), (pairs.harmful, pairs.harmless)
    with progress_bar(total=2 * n, desc="reading prompts", delay=2, show=progress) as bar:
        moments = [_moments(model, prompts, spans, batch_size, bar.update) for prompts in sides]
    means = [first / n for first, _ in moments]
    variances = [
        (second - n * mean**2).clamp(min=0) / (n - 1) for (_, second), mean in zip(moments, means, strict=True)
    ]
    gap, spread = means[0] - means[1], ((variances[0] + variances[1]) / 2).sqrt()
    # between batches, float32 activations of the same tokens differ by about this much: a share of their layer's size
    noise = 1e-5 * ((moments[0][1] + moments[1][1]) / (2 * n)).mean(-1, keepdim=True).sqrt()
    spread = torch.where(spread > noise, spread, torch.zeros_like(spread))
    effects = torch.where(gap.abs() > noise, gap / spread, torch.zeros_like(gap))
    options = {"spans": list(spans), "pairs": n, "set": pairs.name, **omissions(pairs)}
    return NeuronContrast(
        model.provenance(options=options),
        tuple(spans),
        effects.float(),
        means[0].float(),
        means[1].float(),
        n,
    )


def _moments(
    model: LensModel, prompts: Sequence[str], spans: Sequence[str], batch_size: int, report: Callable[[int], object]
) -> tuple[Float[Tensor, "span layer d_mlp"], Float[Tensor, "span layer d_mlp"]]:
    """Sum and sum of squares, over prompts, of each neuron's mean over a span, in float64."""
    chunks = batches([model.n_tokens(prompt) for prompt in prompts], batch_size)
    first, second = torch.zeros(2, len(spans), model.n_layers, model.d_mlp, dtype=torch.float64)

    def read(chunk: Sequence[int]) -> tuple[Tensor, Tensor]:
        return _sums(model, [prompts[k] for k in chunk], spans)

    for chunk, (one, two) in zip(chunks, work("batches", chunks, read, tuple[Tensor, Tensor]), strict=True):
        first, second = first + one, second + two
        report(len(chunk))
    return first, second


def _sums(model: LensModel, prompts: Sequence[str], spans: Sequence[str]) -> tuple[Tensor, Tensor]:
    """`_moments` of one batch."""
    first, second = torch.zeros(2, len(spans), model.n_layers, model.d_mlp, dtype=torch.float64)
    tokens = model.tokenize(prompts)
    weights = [tokens.span_mask(span).float() for span in spans]
    if any(bool((weight.sum(1) == 0).any()) for weight in weights):
        raise MechsafetyError(f"a prompt has no token in one of the spans {list(spans)}")

    def add(layer: int) -> Callable[[Tensor], None]:
        def hook(tensor: Tensor) -> None:
            for k, weight in enumerate(weights):
                weight = weight / weight.sum(1, keepdim=True)
                mean = einsum(tensor.float(), weight, "batch pos d_mlp, batch pos -> batch d_mlp").cpu().double()
                first[k, layer] += mean.sum(0)
                second[k, layer] += mean.square().sum(0)

        return hook

    with hooked((model, add)):
        model.forward(tokens)
    return first, second
