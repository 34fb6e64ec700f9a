"""Writes models as files for other programs and checks the files against the model."""
