"""Monitors: a guard that reads a prompt's activations before the first token is generated."""

from mechsafety.monitors.evaluation import GuardReport, compare_guards
from mechsafety.monitors.features import LabelledPrompts, label_by_replies
from mechsafety.monitors.guard import GuardedOutput, GuardWeights, SafetyGuard, Verdict

__all__ = [
    "GuardReport",
    "GuardWeights",
    "GuardedOutput",
    "LabelledPrompts",
    "SafetyGuard",
    "Verdict",
    "compare_guards",
    "label_by_replies",
]
