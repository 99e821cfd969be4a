"""Turning archives and folders into prepared data sets."""
