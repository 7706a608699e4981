"""Interventions: composable context managers that edit a model's activations, in memory and reversibly."""

from mechsafety.interventions.nodes import ablate, scale
from mechsafety.interventions.steering import Direction, project_out, steer
from mechsafety.interventions.sweep import StrengthSweep, strength_sweep
from mechsafety.interventions.weights import orthogonalized

__all__ = ["Direction", "StrengthSweep", "ablate", "strength_sweep", "orthogonalized", "project_out", "scale", "steer"]
