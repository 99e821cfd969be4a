"""Generators of faces: models, losses, training, sampling."""

from core.cli.errors import explain_early_interrupts

explain_early_interrupts()
