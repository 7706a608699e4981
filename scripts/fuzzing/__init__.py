"""Fuzzing of everything that reads files: what is tried, how files are spoilt, and what counts as a finding."""
