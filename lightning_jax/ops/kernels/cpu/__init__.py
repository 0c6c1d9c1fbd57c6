"""Kernels in plain XLA for CPUs."""
