"""Interventions: composable context managers that edit a model's activations, in memory and reversibly."""

from mechsafety.interventions.dose import DoseResponse, dose_response
from mechsafety.interventions.nodes import ablate, scale
from mechsafety.interventions.steering import Direction, project_out, steer
from mechsafety.interventions.weights import orthogonalized

__all__ = ["Direction", "DoseResponse", "ablate", "dose_response", "orthogonalized", "project_out", "scale", "steer"]
