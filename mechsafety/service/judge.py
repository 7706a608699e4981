"""What stands between a prompt and its reply: a guard with or without monitors, or a monitor alone."""

import os
from pathlib import Path
from typing import Any

from mechsafety.codec import parse
from mechsafety.conversation import PromptLike
from mechsafety.errors import MechsafetyError
from mechsafety.models import LensModel
from mechsafety.monitors import ActivationMonitor, ReplyWatch, SafetyGuard, Verdict
from mechsafety.output import check_within
from mechsafety.results import FILES, FORMAT, FORMAT_VERSION

Protection = SafetyGuard | ActivationMonitor


def load_protection(path: str | os.PathLike[str], model: LensModel) -> Protection:
    """A guard or a monitor from a file or folder that its ``save`` wrote.

    Raises:
        MechsafetyError: There is neither at ``path``, or it was fitted on another model.
    """
    if protection_type(path) == "GuardWeights":
        return SafetyGuard.load(path, model)
    return ActivationMonitor.load(path, model)


def protection_type(path: str | os.PathLike[str]) -> str:
    """``GuardWeights`` or ``MonitorWeights``, as a file says; the model is not needed.

    Raises:
        MechsafetyError: There is neither at ``path``.
    """
    source = Path(path) / FILES[0] if Path(path).is_dir() else Path(path)
    expected = "what SafetyGuard.save or ActivationMonitor.save wrote"
    if source != Path(path):
        check_within(Path(path), source)
    if not source.is_file():
        raise MechsafetyError(f"no such guard: {path}", expected=expected)
    try:
        found = parse(source.read_bytes().decode(), FORMAT, FORMAT_VERSION, FORMAT_VERSION).get("type")
    except (UnicodeDecodeError, MechsafetyError):
        found = None
    if found not in ("GuardWeights", "MonitorWeights"):
        raise MechsafetyError(f"{path} is no guard", expected=expected)
    return str(found)


class Judge:
    """A guard or a monitor, as the service asks it."""

    def __init__(self, model: LensModel, protection: Protection | None) -> None:
        self.guard = protection if isinstance(protection, SafetyGuard) else None
        weights = self.guard.weights.monitors if self.guard else ()
        self.monitors = tuple(ActivationMonitor(model, one) for one in weights)
        if isinstance(protection, ActivationMonitor):
            self.monitors = (protection,)
        self._model = model

    def __bool__(self) -> bool:
        return self.guard is not None or bool(self.monitors)

    def verdict(self, prompt: PromptLike) -> Verdict | None:
        """The guard's verdict on one prompt; None without a guard."""
        return None if self.guard is None else self.guard.predict(prompt)

    def watch(self) -> ReplyWatch | None:
        """A watch that stops one reply before a flagged token; None without monitors."""
        monitors = [monitor.weights for monitor in self.monitors]
        return ReplyWatch(self._model, monitors, stop=True) if monitors else None

    def score(self, prompt: PromptLike) -> dict[str, Any]:
        """What guard and monitors say of one prompt, read alone, so that it does not depend on other prompts."""
        verdict, found = self.verdict(prompt), []
        for monitor in self.monitors:
            scores = monitor.score([prompt])
            found.append(
                {
                    "score": float(scores.scores[0]),
                    "p_value": scores.p_values[0],
                    "threshold": scores.threshold,
                    "flagged": bool(scores.flagged[0]),
                }
            )
        return {
            "unsafe": (verdict is not None and verdict.unsafe) or any(one["flagged"] for one in found),
            "probability": None if verdict is None else verdict.probability,
            "threshold": None if verdict is None else verdict.threshold,
            "monitors": found,
        }
