"""Monitors: a guard of prompts, monitors of every token of a reply, and an audit of a model for tampering."""

from mechsafety.monitors.activation import (
    ActivationMonitor,
    MonitorScores,
    MonitorWeights,
    ReplyWatch,
    ScoredToken,
    WatchedReply,
)
from mechsafety.monitors.audit import AuditReport, TamperAudit
from mechsafety.monitors.evaluation import GuardReport, compare_guards
from mechsafety.monitors.features import LabelledPrompts, label_by_replies
from mechsafety.monitors.guard import GuardedOutput, GuardWeights, SafetyGuard, Verdict
from mechsafety.monitors.tampering import AuditTest, Finding

__all__ = [
    "AuditReport",
    "AuditTest",
    "Finding",
    "ActivationMonitor",
    "GuardReport",
    "GuardWeights",
    "GuardedOutput",
    "LabelledPrompts",
    "MonitorScores",
    "MonitorWeights",
    "ReplyWatch",
    "SafetyGuard",
    "TamperAudit",
    "ScoredToken",
    "Verdict",
    "WatchedReply",
    "compare_guards",
    "label_by_replies",
]
