"""Recipes: each a short diff of `configs/default.py`."""
