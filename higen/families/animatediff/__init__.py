"""AnimateDiff: Stable Diffusion 1.5 with motion modules between its blocks, as one loop over frames."""
