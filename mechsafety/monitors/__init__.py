"""Monitors: a guard that reads a prompt before the first token, and monitors that read every token of the reply."""

from mechsafety.monitors.activation import (
    ActivationMonitor,
    MonitorScores,
    MonitorWeights,
    ReplyWatch,
    ScoredToken,
    WatchedReply,
)
from mechsafety.monitors.evaluation import GuardReport, compare_guards
from mechsafety.monitors.features import LabelledPrompts, label_by_replies
from mechsafety.monitors.guard import GuardedOutput, GuardWeights, SafetyGuard, Verdict

__all__ = [
    "ActivationMonitor",
    "GuardReport",
    "GuardWeights",
    "GuardedOutput",
    "LabelledPrompts",
    "MonitorScores",
    "MonitorWeights",
    "ReplyWatch",
    "SafetyGuard",
    "ScoredToken",
    "Verdict",
    "WatchedReply",
    "compare_guards",
    "label_by_replies",
]
