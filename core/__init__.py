"""What the generative and the segmentation side share; imports neither."""
