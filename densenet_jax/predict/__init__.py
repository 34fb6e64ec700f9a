"""Predictions for images that users bring."""
