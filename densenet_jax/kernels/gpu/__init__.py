"""Pallas (Triton) kernels for GPUs: the 1x1 convolutions of dense layers."""
