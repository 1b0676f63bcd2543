"""Measures of clips against real ones: what is shown, how it moves, how clean it is. None knows a recipe or a model."""

MEASURES_VERSION = 1
"""Raise it when a measure says something else of the same clip: what was kept of clips is then measured anew."""
