"""The model as a file for other programs, checked against the model."""
