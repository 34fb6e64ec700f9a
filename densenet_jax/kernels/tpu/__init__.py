"""Pallas (Mosaic) kernels for TPUs: the backward pass of a dense layer, which reads each feature map once."""
