"""Checks for the exercises of the course: they say whether a function is right, and which mistake it looks like.

Example:
    >>> from mechsafety.teaching import checks
    >>> checks.faithfulness(lambda kept, full, empty: kept.mean(1) / full.mean())
    Traceback (most recent call last):
    mechsafety.teaching.check.CheckFailed: faithfulness: this looks like a ratio without the empty circuit. Subtract \
the mean metric of the empty circuit above and below the line.
"""

from mechsafety.teaching import checks
from mechsafety.teaching.check import Case, Check, CheckFailed, Mistake, Passed

__all__ = ["Case", "Check", "CheckFailed", "Mistake", "Passed", "checks"]
