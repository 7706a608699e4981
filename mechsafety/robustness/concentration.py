"""How evenly an effect is spread over parts."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Amount, public

RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Concentration:
    """How evenly effects are spread over parts; sizes count, not signs.

    Attributes:
        n: Number of parts.
        gini: Gini coefficient of the sizes: 0 if all parts are alike, ``1 - 1/n`` if one part has everything.
        gini_ci: Its 95 % interval over prompts; None without prompts.
        effective: Effective number of parts: exp of the entropy of the parts' shares (the Hill number of order 1; Hill
            1973). ``n`` if all parts are alike, 1 if one part has everything.
        effective_ci: Its 95 % interval over prompts; None without prompts.
    """

    n: int
    gini: float
    gini_ci: tuple[float, float] | None
    effective: float
    effective_ci: tuple[float, float] | None


@public
def concentration(effects: Any, seed: Amount = 0) -> Concentration:
    """Gini coefficient and effective number of parts.

    Args:
        effects: Effect of each part: one value per part, or one per part and prompt. With prompts, the effects are
            averaged over them, and the intervals are percentile bootstraps over prompts. The mean of noise has a size
            too, so a part without effect still counts a little.
        seed: Seed of the bootstrap.

    Raises:
        MechsafetyError: No parts, values that are not finite, or only zeros.

    Example:
        >>> even, one = concentration([1.0, 1.0, 1.0, 1.0]), concentration([1.0, 0.0, 0.0, 0.0])
        >>> even.gini, round(even.effective, 6), one.gini, round(one.effective, 6)
        (0.0, 4.0, 0.75, 1.0)
    """
    values = np.asarray(effects, dtype=np.float64)
    if values.ndim not in (1, 2) or not values.size or not np.isfinite(values).all() or not values.any():
        raise MechsafetyError(
            f"effects of shape {values.shape}", expected="finite numbers [part] or [part prompt], not all 0"
        )
    rows = values if values.ndim == 2 else values[:, None]
    found = _figures(rows.mean(1, keepdims=True))
    gini_ci = effective_ci = None
    if values.ndim == 2 and rows.shape[1] > 1:
        drawn = np.random.default_rng(seed).integers(rows.shape[1], size=(RESAMPLES, rows.shape[1]))
        means = np.stack([rows[:, some].mean(1) for some in drawn], axis=1)
        gini_ci, effective_ci = (
            (float(low), float(high)) for low, high in np.percentile(_figures(means), [2.5, 97.5], axis=1).T
        )
    return Concentration(len(rows), float(found[0, 0]), gini_ci, float(found[1, 0]), effective_ci)


def _figures(effects: Float[np.ndarray, "part draw"]) -> Float[np.ndarray, "2 draw"]:
    """Gini coefficient and effective number of each column."""
    sizes = np.sort(np.abs(effects), axis=0)
    total, n = sizes.sum(0), len(sizes)
    shares = np.divide(sizes, total, out=np.full_like(sizes, 1 / n), where=total > 0)
    place = np.arange(1, n + 1)[:, None]
    gini = (2 * place - n - 1).T @ shares / n
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(shares > 0, shares * np.log(shares), 0.0).sum(0)
    return np.stack([gini[0], np.exp(entropy)])
