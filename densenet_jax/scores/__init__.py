"""Scores of predictions and their calibration: exact, pure functions of NumPy arrays."""
