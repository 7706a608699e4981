"""How evenly an effect is spread over parts."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import public


@dataclass(frozen=True, slots=True)
class Concentration:
    """How evenly effects are spread over parts; sizes count, not signs.

    Attributes:
        n: Number of parts.
        gini: Gini coefficient of the sizes: 0 if all parts are alike, ``1 - 1/n`` if one part has everything.
        effective: Effective number of parts: exp of the entropy of the parts' shares (the Hill number of order 1; Hill
            1973). ``n`` if all parts are alike, 1 if one part has everything.

    Example:
        >>> found = ms.robustness.concentration([1.0, 1.0, 0.0, 0.0])
        >>> found.gini, round(found.effective, 6)  # as concentrated as in two equal parts of four
        (0.5, 2.0)
    """

    n: int
    gini: float
    effective: float


@public
def concentration(effects: Any) -> Concentration:
    """Gini coefficient and effective number of parts.

    There is no interval. The mean of noise has a size too, so a part without effect counts a little; resampling prompts
    adds more noise, and a bootstrap interval often lies beside its own estimate.

    Args:
        effects: Effect of each part: one value per part, or one per part and prompt, which are averaged over prompts.

    Raises:
        MechsafetyError: No parts, values that are not finite, or only zeros.

    Example:
        >>> even, one = concentration([1.0, 1.0, 1.0, 1.0]), concentration([1.0, 0.0, 0.0, 0.0])
        >>> even.gini, round(even.effective, 6), one.gini, round(one.effective, 6)
        (0.0, 4.0, 0.75, 1.0)
    """
    from scipy.stats import entropy

    values = np.asarray(effects, dtype=np.float64)
    if values.ndim not in (1, 2) or not values.size or not np.isfinite(values).all() or not values.any():
        raise MechsafetyError(
            f"effects of shape {values.shape}", expected="finite numbers [part] or [part prompt], not all 0"
        )
    rows = values if values.ndim == 2 else values[:, None]
    sizes = np.sort(np.abs(rows.mean(1)))
    n, shares = len(sizes), sizes / sizes.sum()
    gini = float((2 * np.arange(1, n + 1) - n - 1) @ shares / n)
    return Concentration(n, gini, float(np.exp(entropy(shares))))
