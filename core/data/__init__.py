"""The prepared format, batch order, images and mask classes."""
