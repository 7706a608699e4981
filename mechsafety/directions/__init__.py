"""Directions of the residual stream: the refusal direction and what writes and reads it."""

from mechsafety.directions.refusal import ControlScores, RefusalDirection, refusal_direction
from mechsafety.directions.select import select_cosmic, select_published

__all__ = ["ControlScores", "RefusalDirection", "refusal_direction", "select_cosmic", "select_published"]
