"""Hydra configuration files; a package so that they install with the code."""
