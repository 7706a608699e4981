"""Which candidate direction is the refusal direction: the published rule, and COSMIC."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

MAX_KL = 0.1
MAX_DEPTH = 0.8
# COSMIC compares activations at this share of the layers: those where harmful and harmless prompts differ most
LOW_LAYERS = 0.1


@dataclass(frozen=True, slots=True)
class Conditions:
    """How many candidates each condition of the published rule leaves.

    Attributes:
        candidates: All candidates.
        shallow: Candidates below the depth limit. The next three counts are of these.
        induce: Candidates with induce > 0.
        kl: Candidates with a KL of at most ``max_kl``.
        both: Candidates that pass: they meet both conditions and have a bypass score.
        max_kl: The limit on the KL. None where there is no limit; the KL may then be missing.

    Example:
        >>> left = direction.conditions
        >>> left.shallow, left.candidates  # candidates below the depth limit, and all
        (6, 8)
    """

    candidates: int
    shallow: int
    induce: int
    kl: int
    both: int
    max_kl: float | None

    def __str__(self) -> str:
        shallow = f"{self.shallow} of {self.candidates} candidates are below the depth limit"
        if self.max_kl is None:
            return f"{shallow}, of which induce > 0 leaves {self.induce}; no KL is asked for"
        quiet = f"KL <= {self.max_kl:g} {self.kl}"
        return f"{shallow}, of which induce > 0 leaves {self.induce}, {quiet}, and both {self.both}"


def passing(
    bypass: Float[Tensor, "layer position"],
    induce: Float[Tensor, "layer position"],
    kl: Float[Tensor, "layer position"],
    layers: Sequence[int],
    n_layers: int,
    *,
    max_kl: float | None = MAX_KL,
    max_depth: float = MAX_DEPTH,
    keep_missing_kl: bool = False,
) -> Tensor:
    """True where a candidate may be chosen: no score is missing, induce > 0, KL at most ``max_kl``, not too deep.

    Args:
        bypass: Mean bypass score; NaN where missing.
        induce: Mean induce score; NaN where missing.
        kl: Mean KL; NaN where missing.
        layers: Layer of each row.
        n_layers: Number of layers of the model.
        max_kl: Largest KL on harmless prompts. Infinity lets every measured KL pass. None drops the condition. The
            publishers of the Gemma-3 run did so, because no candidate met it.
        max_depth: Only layers below ``int(max_depth * n_layers)``: later ones act on the output tokens themselves.
        keep_missing_kl: Whether candidates without a measured KL may pass; the published code drops them.
    """
    quiet = _quiet(kl, max_kl, keep_missing_kl=keep_missing_kl)
    return _shallow(bypass, layers, n_layers, max_depth) & (induce > 0) & quiet & ~bypass.isnan()


def conditions(
    bypass: Float[Tensor, "layer position"],
    induce: Float[Tensor, "layer position"],
    kl: Float[Tensor, "layer position"],
    layers: Sequence[int],
    n_layers: int,
    *,
    max_kl: float | None = MAX_KL,
    max_depth: float = MAX_DEPTH,
) -> Conditions:
    """How many candidates each condition of `passing` leaves; the arguments are those of `passing`.

    Example:
        >>> import torch
        >>> induce, kl = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0, 0.0]])
        >>> print(conditions(torch.zeros(1, 2), induce, kl, [0], n_layers=2))
        2 of 2 candidates are below the depth limit, of which induce > 0 leaves 1, KL <= 0.1 1, and both 0
    """
    shallow = _shallow(bypass, layers, n_layers, max_depth)
    allowed = passing(bypass, induce, kl, layers, n_layers, max_kl=max_kl, max_depth=max_depth)
    masks = (shallow, shallow & (induce > 0), shallow & _quiet(kl, max_kl), allowed)
    left, induced, quiet, both = (int(mask.sum()) for mask in masks)
    return Conditions(bypass.numel(), left, induced, quiet, both, max_kl)


def _shallow(like: Float[Tensor, "layer position"], layers: Sequence[int], n_layers: int, max_depth: float) -> Tensor:
    """True at the candidates below the depth limit."""
    rows = torch.tensor([layer < int(max_depth * n_layers) for layer in layers], device=like.device)
    return rows[:, None].expand_as(like)


def _quiet(kl: Float[Tensor, "layer position"], max_kl: float | None, *, keep_missing_kl: bool = False) -> Tensor:
    """True where a KL meets its condition; a missing KL (NaN) does not, because comparisons with NaN are false."""
    if max_kl is None:
        return torch.ones_like(kl, dtype=torch.bool)
    return (kl <= max_kl) | (kl.isnan() if keep_missing_kl else False)


def select_published(
    bypass: Float[Tensor, "layer position"],
    induce: Float[Tensor, "layer position"],
    kl: Float[Tensor, "layer position"],
    layers: Sequence[int],
    n_layers: int,
    *,
    max_kl: float | None = MAX_KL,
    max_depth: float = MAX_DEPTH,
    keep_missing_kl: bool = False,
) -> tuple[int, int] | None:
    """(row, position) of the smallest bypass score among the candidates that pass (Arditi et al. 2024, section 2.3).

    Args:
        bypass: Mean refusal log-odds on harmful prompts with the direction removed.
        induce: Mean refusal log-odds on harmless prompts with the direction added.
        kl: Mean KL on harmless prompts with the direction removed; NaN where missing.
        layers: Layer of each row.
        n_layers: Number of layers of the model.
        max_kl: As for `passing`.
        max_depth: As for `passing`.
        keep_missing_kl: As for `passing`.

    Returns:
        (row, position), or None if no candidate passes (`conditions` counts what each condition leaves). Ties go to the
        lower layer, then to the earlier position.

    Example:
        >>> import torch
        >>> bypass = torch.tensor([[-1.0, 2.0], [-3.0, -2.0]])
        >>> induce, kl = torch.ones(2, 2), torch.tensor([[0.0, 0.0], [0.5, 0.05]])
        >>> select_published(bypass, induce, kl, [0, 1], n_layers=4)
        (1, 1)
    """
    allowed = passing(
        bypass,
        induce,
        kl,
        layers,
        n_layers,
        max_kl=max_kl,
        max_depth=max_depth,
        keep_missing_kl=keep_missing_kl,
    )
    return smallest(bypass, allowed)


def select_cosmic(
    cosmic: Float[Tensor, "layer position"],
    layers: Sequence[int],
    n_layers: int,
    *,
    max_depth: float = MAX_DEPTH,
) -> tuple[int, int] | None:
    """(row, position) of the largest COSMIC score below the depth limit (Siu et al. 2025); no output is read.

    Args:
        cosmic: Sum of two cosines of mean activations over `cosmic_layers`. The first compares harmful prompts, with
            the direction removed, to harmless ones. The second compares harmless prompts, with it added, to harmful
            ones.
        layers: Layer of each row.
        n_layers: Number of layers of the model.
        max_depth: As for `passing`.

    Example:
        >>> ms.directions.select_cosmic(torch.tensor([[0.2, 0.9], [0.4, 0.1]]), layers=[0, 1], n_layers=4)
        (0, 1)
    """
    return smallest(-cosmic, _shallow(cosmic, layers, n_layers, max_depth) & ~cosmic.isnan())


def smallest(scores: Float[Tensor, "layer position"], allowed: Tensor) -> tuple[int, int] | None:
    """(row, position) of the smallest allowed score; None if no score is allowed."""
    if not bool(allowed.any()):
        return None
    masked = torch.where(allowed, scores.double(), torch.inf).cpu().numpy()
    row, position = np.unravel_index(int(masked.argmin()), masked.shape)
    return int(row), int(position)


def cosmic_layers(harmful: Float[Tensor, "layer d_model"], harmless: Float[Tensor, "layer d_model"]) -> list[int]:
    """The tenth of the layers (at least one) at which mean harmful and harmless outputs have the lowest cosine."""
    cosines = torch.nn.functional.cosine_similarity(harmful.double(), harmless.double(), dim=-1)
    count = max(1, round(LOW_LAYERS * len(cosines)))
    return sorted(cosines.argsort(stable=True)[:count].tolist())


def joint_cosine(a: Float[Tensor, "*rows layer d_model"], b: Float[Tensor, "layer d_model"]) -> Float[Tensor, "*rows"]:
    """Cosine of two stacks of layers' mean activations, each flattened to one long vector."""
    return torch.nn.functional.cosine_similarity(a.double().flatten(-2), b.double().flatten(-2), dim=-1).float()
