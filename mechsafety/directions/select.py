"""Which candidate direction is the refusal direction: the published rule, and COSMIC."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

MAX_KL = 0.1
MAX_DEPTH = 0.8
# share of layers, those where harmful and harmless prompts differ most, at which COSMIC looks
LOW_LAYERS = 0.1


def passing(
    bypass: Float[Tensor, "layer column"],
    induce: Float[Tensor, "layer column"],
    kl: Float[Tensor, "layer column"],
    layers: Sequence[int],
    n_layers: int,
    *,
    max_kl: float = MAX_KL,
    max_depth: float = MAX_DEPTH,
    keep_missing_kl: bool = False,
) -> Tensor:
    """True where a candidate may be chosen: no score is missing, induce > 0, KL at most ``max_kl``, not too deep.

    Args:
        bypass: Mean bypass score; NaN where missing.
        induce: Mean induce score; NaN where missing.
        kl: Mean KL; NaN where missing.
        layers: Layer of each row.
        n_layers: Of the model.
        max_kl: Largest KL on harmless prompts; infinity for no limit.
        max_depth: Only layers below ``int(max_depth * n_layers)``: later ones act on the output tokens themselves.
        keep_missing_kl: Let candidates pass whose KL was not measured; the published code drops them.
    """
    shallow = torch.tensor([layer < int(max_depth * n_layers) for layer in layers], device=bypass.device)
    # a comparison with NaN is false: what is missing does not pass
    quiet = (kl <= max_kl) | (kl.isnan() if keep_missing_kl else False)
    return shallow[:, None] & (induce > 0) & quiet & ~bypass.isnan()


def select_published(
    bypass: Float[Tensor, "layer column"],
    induce: Float[Tensor, "layer column"],
    kl: Float[Tensor, "layer column"],
    layers: Sequence[int],
    n_layers: int,
    *,
    max_kl: float = MAX_KL,
    max_depth: float = MAX_DEPTH,
    keep_missing_kl: bool = False,
) -> tuple[int, int] | None:
    """(row, column) of the smallest bypass score among the candidates that pass (Arditi et al. 2024, section 2.3).

    Args:
        bypass: Mean refusal log-odds on harmful prompts, the direction removed.
        induce: Mean refusal log-odds on harmless prompts, the direction added.
        kl: Mean KL on harmless prompts, the direction removed; NaN where missing.
        layers: Layer of each row.
        n_layers: Of the model.
        max_kl: As for `passing`.
        max_depth: As for `passing`.
        keep_missing_kl: As for `passing`.

    Returns:
        None if no candidate passes. Ties go to the lower layer, then to the earlier column.

    Example:
        >>> import torch
        >>> bypass = torch.tensor([[-1.0, 2.0], [-3.0, -2.0]])
        >>> induce, kl = torch.ones(2, 2), torch.tensor([[0.0, 0.0], [0.5, 0.05]])
        >>> select_published(bypass, induce, kl, [0, 1], n_layers=4)
        (1, 1)
    """
    limits = {"max_kl": max_kl, "max_depth": max_depth}
    allowed = passing(bypass, induce, kl, layers, n_layers, **limits, keep_missing_kl=keep_missing_kl)
    return smallest(bypass, allowed)


def select_cosmic(
    cosmic: Float[Tensor, "layer column"],
    layers: Sequence[int],
    n_layers: int,
    *,
    max_depth: float = MAX_DEPTH,
) -> tuple[int, int] | None:
    """(row, column) of the largest COSMIC score below the depth limit (Siu et al. 2025); no output is read.

    Args:
        cosmic: Sum of two cosines over `cosmic_layers`: of harmful prompts with the direction removed to harmless
            ones, and of harmless prompts with it added to harmful ones.
        layers: Layer of each row.
        n_layers: Of the model.
        max_depth: As for `passing`.
    """
    shallow = torch.tensor([layer < int(max_depth * n_layers) for layer in layers], device=cosmic.device)
    return smallest(-cosmic, shallow[:, None] & ~cosmic.isnan())


def smallest(scores: Float[Tensor, "layer column"], allowed: Tensor) -> tuple[int, int] | None:
    """(row, column) of the smallest allowed score, None if none is allowed."""
    if not bool(allowed.any()):
        return None
    masked = torch.where(allowed, scores.double(), torch.inf).cpu().numpy()
    row, column = np.unravel_index(int(masked.argmin()), masked.shape)
    return int(row), int(column)


def cosmic_layers(harmful: Float[Tensor, "layer d_model"], harmless: Float[Tensor, "layer d_model"]) -> list[int]:
    """The tenth of layers (at least one) whose mean outputs on the two kinds of prompts have the lowest cosine."""
    cosines = torch.nn.functional.cosine_similarity(harmful.double(), harmless.double(), dim=-1)
    count = max(1, round(LOW_LAYERS * len(cosines)))
    return sorted(cosines.argsort(stable=True)[:count].tolist())


def joint_cosine(a: Float[Tensor, "*rows layer d_model"], b: Float[Tensor, "layer d_model"]) -> Float[Tensor, "*rows"]:
    """Cosine of two stacks of layers' mean activations, each seen as one long vector."""
    return torch.nn.functional.cosine_similarity(a.double().flatten(-2), b.double().flatten(-2), dim=-1).float()
