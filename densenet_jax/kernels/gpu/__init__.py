"""Kernels for GPUs, in Pallas for Triton."""
