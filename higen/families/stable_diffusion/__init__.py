"""Stable Diffusion 1 and 2: text to image, image to image, as one loop of one frame."""
