"""Robustness: how concentrated refusal is, how redundant, how entangled with ability, and how deep in the reply."""

from mechsafety.robustness.concentration import Concentration, concentration
from mechsafety.robustness.depth import RefusalDepth, refusal_depth
from mechsafety.robustness.entanglement import Entanglement, entanglement
from mechsafety.robustness.finetune import finetune_parts
from mechsafety.robustness.finetuned import ControlTraining, Outcome, PartsFineTuning
from mechsafety.robustness.fragility import FragilityCurve, fragility
from mechsafety.robustness.parts import matched_ranking
from mechsafety.robustness.redundancy import Redundancy, redundancy
from mechsafety.robustness.relocation import Relocation, relocation
from mechsafety.robustness.report import RobustnessOptions, RobustnessReport, RobustnessRow, robustness_report
from mechsafety.robustness.training import FineTuneOptions

__all__ = [
    "Concentration",
    "ControlTraining",
    "Entanglement",
    "FineTuneOptions",
    "FragilityCurve",
    "Outcome",
    "PartsFineTuning",
    "Redundancy",
    "RefusalDepth",
    "Relocation",
    "RobustnessOptions",
    "RobustnessReport",
    "RobustnessRow",
    "concentration",
    "entanglement",
    "finetune_parts",
    "fragility",
    "matched_ranking",
    "redundancy",
    "refusal_depth",
    "relocation",
    "robustness_report",
]
