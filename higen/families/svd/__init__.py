"""Stable Video Diffusion: a picture to a clip of 14 or 25 frames, as one loop over frames."""
