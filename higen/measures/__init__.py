"""Measures of generated clips against real clips: content, motion and artefacts. No training recipe is needed."""

MEASURES_VERSION = 1
"""Raise this number when a measure gives another result for the same clip. Stored results are then computed again."""
