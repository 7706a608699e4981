"""Exact interventions: activation patching, path patching, and the masked runs by which circuits are measured."""

from mechsafety.patching.activation import PatchMap, activation_patching
from mechsafety.patching.difference import EffectDifference, compare_effects
from mechsafety.patching.masks import (
    PairRuns,
    Patch,
    masked_logits,
    pair_runs,
    patched_logits,
)
from mechsafety.patching.matrix import PathMatrix, path_matrix
from mechsafety.patching.path_map import PathMap
from mechsafety.patching.paths import path_patching, path_projection
from mechsafety.patching.receivers import Projection
from mechsafety.patching.senders import At

__all__ = [
    "At",
    "EffectDifference",
    "PairRuns",
    "Patch",
    "PatchMap",
    "PathMap",
    "PathMatrix",
    "Projection",
    "activation_patching",
    "compare_effects",
    "masked_logits",
    "pair_runs",
    "patched_logits",
    "path_matrix",
    "path_patching",
    "path_projection",
]
