"""Scores and reports of generated images.

Each layer imports only those before it: metrics, features, distances and score, checks, measures, page, commands.
"""
