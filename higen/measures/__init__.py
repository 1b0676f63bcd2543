"""Measures of clips against real ones: what they show, how they move, how clean they are. No recipe is needed."""

MEASURES_VERSION = 1
"""Raise this number when a measure changes its result for the same clip: stored measures are then made anew."""
