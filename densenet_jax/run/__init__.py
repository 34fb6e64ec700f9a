"""Training, evaluating and preparing: the loops and what they write."""
