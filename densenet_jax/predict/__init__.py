"""Predictions, features and explanations for user images."""
