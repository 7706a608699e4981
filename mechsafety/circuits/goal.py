"""What a circuit has to restore: the goal of a search, and of the claims about what the search found."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from mechsafety.errors import MechsafetyError

GoalKind = Literal["reach", "match"]
# rounding error of the whole model's faithfulness, which is 1
ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Goal:
    """Which faithfulness is good enough.

    ``reach`` asks for at least the target. A circuit that leaves out parts that work against the behaviour may then
    restore more than the whole model. ``match`` asks for a faithfulness that is at most ``1 - target`` away from 1, on
    either side.

    Attributes:
        target: Smallest faithfulness that is good enough, in (0, 1].
        kind: ``reach`` or ``match``.

    Raises:
        MechsafetyError: An unknown kind.

    Example:
        >>> Goal(0.8).met(1.7), Goal(0.8, "match").met(1.7), Goal(0.8, "match").met(1.1)
        (True, False, True)
    """

    target: float = 0.8
    kind: GoalKind = "reach"

    def __post_init__(self) -> None:
        if self.kind not in get_args(GoalKind):
            raise MechsafetyError(f"goal {self.kind!r}", expected=f"one of {get_args(GoalKind)}")

    @property
    def most(self) -> float:
        """The largest faithfulness that is good enough."""
        return math.inf if self.kind == "reach" else 2 - self.target

    def met(self, *values: float) -> bool:
        """Whether every one of these values of faithfulness is good enough, up to rounding."""
        return all(self.target - ROUNDING <= value <= self.most + ROUNDING for value in values)

    def missing(self, *values: float) -> float:
        """How far the worst of these values is from being good enough; 0 if all are."""
        return max(0.0, *(max(self.target - value, value - self.most) for value in values))

    def near(self, faithfulness: float, cost: float, factor: float) -> bool:
        """Whether a change by ``cost`` uses up at most ``factor`` times what a good enough value can still change.

        Args:
            faithfulness: The value as it is.
            cost: What would be lost; below 0 for a gain.
            factor: The factor.
        """
        if cost >= 0 or self.kind == "reach":
            return cost <= factor * (faithfulness - self.target + ROUNDING)
        return -cost <= factor * (self.most + ROUNDING - faithfulness)

    def size(self, effect: float) -> float:
        """How much an effect counts: to reach the target as much as it adds, to match the model in either direction.

        Parts are ranked by it, the largest first. To reach the target, those against the behaviour therefore come last.
        """
        return effect if self.kind == "reach" else abs(effect)

    @property
    def words(self) -> str:
        """The goal in words."""
        if self.kind == "reach":
            return f"at least {self.target:g}"
        return f"{self.target:g} to {self.most:g}"
