"""Drawn faces with masks, the built-in data set."""
