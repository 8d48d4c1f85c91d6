"""Triton kernels that import nothing of the house."""
