"""Segmentation with a U-Net."""

from core.cli.errors import explain_early_interrupts

explain_early_interrupts()
