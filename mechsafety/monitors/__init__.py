"""Monitors: a guard that reads a prompt's activations before the first token, and an audit of a model for tampering."""

from mechsafety.monitors.audit import AuditReport, TamperAudit
from mechsafety.monitors.evaluation import GuardReport, compare_guards
from mechsafety.monitors.features import LabelledPrompts, label_by_replies
from mechsafety.monitors.guard import GuardedOutput, GuardWeights, SafetyGuard, Verdict
from mechsafety.monitors.tampering import AuditTest, Finding

__all__ = [
    "AuditReport",
    "AuditTest",
    "Finding",
    "GuardReport",
    "GuardWeights",
    "GuardedOutput",
    "LabelledPrompts",
    "SafetyGuard",
    "TamperAudit",
    "Verdict",
    "compare_guards",
    "label_by_replies",
]
