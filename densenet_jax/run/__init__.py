"""Training, evaluating and preparing: the loops and their output files."""
