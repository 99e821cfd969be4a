"""Generators of faces: models, losses, training, sampling."""
