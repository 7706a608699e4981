"""The checks of all exercises, by the name of the function that each asks for."""

from mechsafety.teaching.checks.attribution import attention_pattern, logit_attribution, through_final_norm
from mechsafety.teaching.checks.circuits import completeness_gap, control_p, faithfulness, marginal_effects
from mechsafety.teaching.checks.detective import average_precision, circuit_scores, joint_excess
from mechsafety.teaching.checks.directions import difference_direction, probe_and_control, remove_direction
from mechsafety.teaching.checks.neurons import change_scores, dynamic_reply, matched_control
from mechsafety.teaching.checks.patching import mean_ablated, patch_head, patched_scores, share_of_gap
from mechsafety.teaching.checks.paths import carry_through_mlps, direct_path, sender_change
from mechsafety.teaching.checks.tokens import head_outputs, span_mean, token_positions

# in the order of the course
__all__ = [
    "token_positions",
    "span_mean",
    "head_outputs",
    "attention_pattern",
    "through_final_norm",
    "logit_attribution",
    "patch_head",
    "patched_scores",
    "share_of_gap",
    "mean_ablated",
    "sender_change",
    "direct_path",
    "carry_through_mlps",
    "change_scores",
    "matched_control",
    "dynamic_reply",
    "difference_direction",
    "remove_direction",
    "probe_and_control",
    "faithfulness",
    "completeness_gap",
    "marginal_effects",
    "control_p",
    "circuit_scores",
    "average_precision",
    "joint_excess",
]
