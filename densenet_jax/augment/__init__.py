"""Augmentations on the accelerator, inside the training step."""
