"""Kernels of attention and experts: a folder per device, and the code that they share."""
