"""Predicts, explains and extracts features of the user's images."""
