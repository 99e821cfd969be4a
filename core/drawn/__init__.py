"""Drawn faces with masks, the built-in data set. `core.drawn.face` is the only module that others import."""
