"""Direct logit attribution: what each part adds to the metric through the unembedding alone."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pandas as pd
import plotly.graph_objects as go
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from mechsafety.cache import ActivationCache
from mechsafety.inputs import Count, Prompts, public
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.nodes import Node
from mechsafety.patching.norms import at_own_scale, block_norms_option, norm_behind
from mechsafety.progress import progress_bar
from mechsafety.prompts import PromptPairs, Tokens
from mechsafety.results import Provenance, Result, norms_note

# prompts per batch; their cached activations take most of the memory
_BATCH = 32
# sites that must be stored for the attribution
DIRECT_SITES = ("resid", "z", "attn_out", "mlp_out")
_PARTS = ("heads", "mlps", "embed", "rest", "total")


@dataclass(frozen=True, slots=True)
class DirectAttribution(Result):
    """Direct contributions to the metric, per prompt; ``heads + mlps + embed + rest`` sum to ``total``.

    Attributes:
        provenance: Model, options, versions.
        metric: Name and tokens of the metric.
        heads, mlps: Contribution of what each head or MLP adds to the residual stream, read by the unembedding.
        embed: Contribution of the token (and position) embedding.
        rest: Contribution of the output biases and of the biases of final norm and unembedding, and the metric of
            all-zero logits.
        total: The metric itself.

    Example:
        >>> found = ms.direct_logit_attribution(model, pairs, metric)
        >>> found.heads.shape, found.mlps.shape
        (torch.Size([4, 4, 8]), torch.Size([4, 8]))
        >>> parts = found.heads.sum((0, 1)) + found.mlps.sum(0) + found.embed + found.rest
        >>> torch.allclose(parts, found.total, atol=1e-3)
        True
    """

    provenance: Provenance
    metric: dict[str, object]
    heads: Float[Tensor, "layer head prompt"]
    mlps: Float[Tensor, "layer prompt"]
    embed: Float[Tensor, " prompt"]
    rest: Float[Tensor, " prompt"]
    total: Float[Tensor, " prompt"]

    def __repr__(self) -> str:
        size = f"{self.heads.shape[0]} layers x {self.heads.shape[1]} heads, {len(self.total)} prompts"
        return f"DirectAttribution({size}{norms_note(self.provenance)})"

    def to_dataframe(self) -> pd.DataFrame:
        """One row per part: mean direct contribution in metric units."""
        layers, heads, _ = self.heads.shape
        rows = [("embed", "embed", float(self.embed.mean())), ("rest", "rest", float(self.rest.mean()))]
        for layer in range(layers):
            for head in range(heads):
                rows.append((str(Node("head", layer, head)), "head", float(self.heads[layer, head].mean())))
            rows.append((str(Node("mlp", layer)), "mlp", float(self.mlps[layer].mean())))
        return pd.DataFrame(rows, columns=["part", "kind", "contribution"])

    def plot(self) -> go.Figure:
        """Heatmap of mean head contributions, layers by heads."""
        import plotly.express as px

        return px.imshow(
            self.heads.mean(-1).cpu().numpy(),
            origin="lower",
            color_continuous_scale="RdBu_r",
            color_continuous_midpoint=0,
            labels={"x": "head", "y": "layer", "color": "direct contribution"},
        )


@public
def direct_logit_attribution(
    model: LensModel,
    prompts: PromptPairs | Prompts | Tokens,
    metric: RefusalLogOdds,
    *,
    steps: Count = 64,
    progress: bool = True,
) -> DirectAttribution:
    """Direct logit attribution at the last position, with the final norm's scale frozen and its weight applied.

    Contributions are linear in the logits, but the refusal log-odds are not. The gradient of the metric is therefore
    averaged over the logits' straight path from 0 (integrated gradients). The parts then sum to the metric. For a logit
    difference, one step is exact. A soft cap on the logits (Gemma-2) is part of what is averaged.

    If a norm follows attention (Gemma-2, OLMo-2), a head's output is its share of the norm of the heads' sum. The scale
    of that norm is frozen at the prompt's own as well. The result says so (``block_norms`` among its options, and its
    ``repr``).

    Args:
        model: The model.
        prompts: Chat prompts; or pairs, for the attribution of the harmful prompts minus that of their counterfactuals.
            The parts of a pair then sum to its gap.
        metric: What is attributed.
        steps: Number of Gauss-Legendre points of that average.
        progress: Whether to show a bar.

    Example:
        >>> found = ms.direct_logit_attribution(model, pairs, metric)
        >>> int(found.mlps.mean(-1).argmax())  # the layer whose MLP writes the refusal
        3
    """
    if isinstance(prompts, PromptPairs):
        bad, good = (
            direct_logit_attribution(model, side, metric, steps=steps, progress=progress)
            for side in (prompts.harmful, prompts.harmless)
        )
        return replace(bad, **{name: getattr(bad, name) - getattr(good, name) for name in _PARTS})
    tokens = prompts if isinstance(prompts, Tokens) else model.tokenize(prompts)
    done = []
    for first in progress_bar(range(0, len(tokens), _BATCH), desc="direct", show=progress):
        cache = model.cache(tokens.rows(slice(first, first + _BATCH)), sites=DIRECT_SITES)
        done.append(direct_parts(model, cache, metric, steps=steps))
    parts = {name: torch.cat(tensors, -1) for name, tensors in zip(_PARTS, zip(*done, strict=True), strict=True)}
    options = {"steps": steps, "prompts": len(tokens), **block_norms_option(model, "frozen")}
    provenance = model.provenance(options=options)
    return DirectAttribution(provenance, metric.to_json(), **parts)


def direct_parts(
    model: LensModel, cache: ActivationCache, metric: RefusalLogOdds, *, position: int = -1, steps: int = 64
) -> tuple[
    Float[Tensor, "layer head prompt"],
    Float[Tensor, "layer prompt"],
    Float[Tensor, " prompt"],
    Float[Tensor, " prompt"],
    Float[Tensor, " prompt"],
]:
    """Heads, MLPs, embedding, rest and total of `DirectAttribution` at one position, from stored `DIRECT_SITES`.

    The metric is read from the stream at that position, as if the prompt ended there.
    """
    final = cache.resid[-1, :, position]
    with torch.no_grad():
        norm = model.frozen_final_norm(final)
        zero = norm(torch.zeros_like(final))
        weights = model.W_U.float()
        shift = zero @ weights + model.b_U.float()
        logits = (norm(final) - zero) @ weights + shift
        capped = model.backend.logit_cap > 0

        def score(logits: Tensor) -> Tensor:
            return metric(model.backend.capped(logits))

        reads = _average_gradient(score, logits, 1 if metric.is_linear and not capped else steps)
        direction = reads @ rearrange(weights, "d_model d_vocab -> d_vocab d_model")

        def through(part: Tensor) -> Tensor:
            return einsum(norm(part) - zero, direction, "... prompt d_model, prompt d_model -> ... prompt")

        written = _heads_out(model, cache, position)
        heads = through(written)
        mlps = through(cache.mlp_out[:, :, position])
        embed = through(cache.resid[0, :, position])
        total = score(logits)
        biases = through(cache.attn_out[:, :, position].float() - written.sum(1)).sum(0)
        rest = biases + (reads * shift).sum(-1) + score(torch.zeros_like(logits))
    return heads, mlps, embed, rest, total


def _heads_out(model: LensModel, cache: ActivationCache, position: int) -> Float[Tensor, "layer head prompt d_model"]:
    """What heads add at one position only, because a tensor of all positions would be the cache's largest."""
    weights = torch.stack([model.W_O(layer) for layer in range(model.n_layers)]).float()
    written = einsum(
        cache.z[:, :, :, position].float(),
        weights,
        "layer head prompt d_head, layer head d_head d_model -> layer head prompt d_model",
    )
    for layer, heads in enumerate(written):
        norm = norm_behind(model, layer, "head")
        if norm is not None:
            written[layer] = at_own_scale(model, norm, heads.sum(0) + model.backend.b_O(layer).float())(heads)
    return written


def _average_gradient(score: Callable[[Tensor], Tensor], logits: Tensor, steps: int) -> Float[Tensor, "prompt d_vocab"]:
    """Gradient of a score in the logits, averaged over their straight path from 0."""
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(steps)
    total = torch.zeros_like(logits)
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        with torch.enable_grad():
            point = (float(node) * logits).requires_grad_()
            (grad,) = torch.autograd.grad(score(point).sum(), point)
        total += float(weight) * grad
    return total
