"""Convolutions for XLA's CPU backend: an optional compiled library. See `build`."""
