"""Attention kernels: one module per way of computing the same masked softmax."""
