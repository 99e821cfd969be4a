"""Distances and statistics of features, in NumPy alone."""
