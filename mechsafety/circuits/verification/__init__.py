"""Checks of a circuit: what each measures, and the claims that follow."""
