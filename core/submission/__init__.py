"""The submission archive and its rules."""
