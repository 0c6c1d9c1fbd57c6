"""Pallas kernels for GPUs (Triton)."""
