"""Directions of the residual stream: the refusal direction, what writes and reads it, and other ways to find one."""

from mechsafety.directions.concept import iti_direction, repe_direction
from mechsafety.directions.io import DirectionIO, direction_io
from mechsafety.directions.refusal import ControlScores, RefusalDirection, refusal_direction
from mechsafety.directions.select import Conditions, conditions, select_cosmic, select_published
from mechsafety.directions.subspace import RefusalSubspace, refusal_subspace

__all__ = [
    "Conditions",
    "ControlScores",
    "DirectionIO",
    "RefusalDirection",
    "RefusalSubspace",
    "conditions",
    "direction_io",
    "iti_direction",
    "refusal_direction",
    "refusal_subspace",
    "repe_direction",
    "select_cosmic",
    "select_published",
]
