"""What the generative and the segmentation side share; imports neither."""

__version__ = "0.1.0"
