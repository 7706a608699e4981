"""The logistic regression that guards, monitors and their baselines share."""

from typing import Any

import numpy as np

from mechsafety.errors import MechsafetyError
from mechsafety.monitors.features import LabelledPrompts

# the same for every kind of feature: a comparison must not depend on tuning
INVERSE_PENALTY = 0.1
MAX_STEPS = 5000


def fit_regression(features: np.ndarray, unsafe: np.ndarray) -> Any:
    """Scaler and logistic regression with an L2 penalty, converged, as a scikit-learn pipeline.

    Between the scaler and the regression stands a rotation (PCA) to the span of the training rows. The penalty does not
    change under rotations, and the optimum lies in that span. The predictions are therefore those of a fit to all
    features. The fit itself has only as many features as there are prompts. With thousands of neurons this is a hundred
    times as fast.

    Raises:
        MechsafetyError: The solver stopped before it converged.
    """
    import warnings

    from sklearn.decomposition import PCA
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = LogisticRegression(C=INVERSE_PENALTY, max_iter=MAX_STEPS, solver="newton-cholesky")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            return make_pipeline(StandardScaler(), PCA(svd_solver="full"), regression).fit(features, unsafe)
        except ConvergenceWarning:
            raise MechsafetyError(f"the guard's regression did not converge in {MAX_STEPS} steps") from None


def cross_validated(features: np.ndarray, train: LabelledPrompts, seed: int) -> np.ndarray:
    """Probability of each training prompt from a regression that has not seen its group (five folds).

    Raises:
        MechsafetyError: Too few prompts or groups with a label.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    unsafe = np.array(train.unsafe)
    groups = np.array(train.groups) if train.groups else np.arange(len(unsafe))
    sides = [len(set(groups[unsafe == side])) for side in (False, True)]
    if min(sides) < 5:
        raise MechsafetyError(
            f"{train.name}: {sides[0]} groups with safe and {sides[1]} with unsafe prompts",
            expected="at least 5 of each",
        )
    out = np.zeros(len(unsafe))
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
    for fitted, held_out in folds.split(features, unsafe, groups):
        out[held_out] = fit_regression(features[fitted], unsafe[fitted]).predict_proba(features[held_out])[:, 1]
    return out


def on_features(fitted: Any) -> tuple[np.ndarray, float]:
    """A fitted pipeline as weights [feature] and an intercept: its log-odds are ``features @ weights + intercept``."""
    scaler, rotation, regression = (step for _, step in fitted.steps)
    weights = rotation.components_.T @ regression.coef_[0] / scaler.scale_
    shift = rotation.mean_ @ (weights * scaler.scale_) + scaler.mean_ @ weights
    return weights, float(regression.intercept_[0] - shift)
