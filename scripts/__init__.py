"""Command line tools: parse, call the package, print."""

from core.cli.errors import explain_early_interrupts

explain_early_interrupts()
