"""Image sets and the features of their images."""
