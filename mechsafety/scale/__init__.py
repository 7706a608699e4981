"""Runs that resume after a stop, and runs on several machines: the same sweeps, with the same numbers."""

from mechsafety.scale.cluster import RayExecutor
from mechsafety.scale.work import Executor, once, running, sweeps, work

__all__ = ["running", "RayExecutor", "Executor", "once", "sweeps", "work"]
