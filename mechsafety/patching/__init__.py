"""Exact interventions: activation patching, and the masked runs that circuits are measured by."""

from mechsafety.patching.activation import PatchMap, activation_patching
from mechsafety.patching.masks import (
    PairRuns,
    Patch,
    masked_logits,
    pair_runs,
    patched_logits,
)
from mechsafety.patching.paths import PathMap, path_patching

__all__ = [
    "PairRuns",
    "Patch",
    "PatchMap",
    "PathMap",
    "activation_patching",
    "masked_logits",
    "pair_runs",
    "patched_logits",
    "path_patching",
]
