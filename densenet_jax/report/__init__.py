"""HTML reports about runs and data sets, with their charts and CSV tables."""
