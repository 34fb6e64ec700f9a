"""Kernels in Pallas (Mosaic) for TPUs: the backward pass of a dense layer, each of its maps read once."""
