"""Sweeps of arms by seeds, and a report of which differences are real and what they cost."""
