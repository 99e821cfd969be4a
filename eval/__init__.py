"""Scores for generators: features, distances, reports."""
