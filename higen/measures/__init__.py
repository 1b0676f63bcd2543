"""Measures of clips against real ones: what is shown, how it moves, how clean it is. None knows a recipe or a model."""
