"""Honesty checks of generated images."""
