"""Kernels for what compilers do worse, each with a reference in plain JAX."""
