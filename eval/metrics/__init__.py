"""Distances and statistics of features, in NumPy and SciPy alone: no console, no files, no page."""
