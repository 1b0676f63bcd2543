"""Reads pictures and clips from files, for `Video.open`, picture and clip controls, cues and training."""

from __future__ import annotations

from pathlib import Path

from higen.media.animations import Animation
from higen.media.files import head, is_animation
from higen.media.streams import VideoStream

__all__ = ["open_clip"]


def open_clip(path: Path) -> Animation | VideoStream:
    """The clip in a file. Its format is found from the contents, not from the name.

    Raises OutputError with the reason, OSError, and any error of the decoders.
    """
    return Animation(path) if is_animation(head(path)) else VideoStream(path)
