"""Kernels that are faster than XLA's own, each with a reference in plain JAX."""
