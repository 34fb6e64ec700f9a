"""Kernels for what compilers leave on the table, each with a twin in plain JAX."""
