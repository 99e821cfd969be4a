"""Scores and reports of generated images.

Each layer imports only those before it: metrics, features, distances and score, checks, measures, page, commands.
"""

from core.cli.errors import explain_early_interrupts

explain_early_interrupts()
