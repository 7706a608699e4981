"""Robustness: how concentrated refusal is, how redundant, how entangled with ability, and how deep in the reply."""

from mechsafety.robustness.concentration import Concentration, concentration
from mechsafety.robustness.depth import RefusalDepth, refusal_depth
from mechsafety.robustness.entanglement import Entanglement, entanglement
from mechsafety.robustness.fragility import FragilityCurve, fragility
from mechsafety.robustness.parts import matched_ranking
from mechsafety.robustness.redundancy import Redundancy, redundancy

__all__ = [
    "Concentration",
    "Entanglement",
    "FragilityCurve",
    "Redundancy",
    "RefusalDepth",
    "concentration",
    "entanglement",
    "fragility",
    "matched_ranking",
    "redundancy",
    "refusal_depth",
]
