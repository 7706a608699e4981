"""Circuits: what they are made of, how they are found, and how they are checked."""
