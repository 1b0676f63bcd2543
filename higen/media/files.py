"""Finds the kind of a file from its suffix and its first bytes, and limits sizes.

This module and the others of the package raise OutputError with only the reason: the caller adds the file's name.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import BinaryIO

from higen.errors import OutputError

__all__ = [
    "ANIMATIONS",
    "MAX_BYTES",
    "MAX_PIXELS",
    "STREAMS",
    "check_bytes",
    "check_pixels",
    "head",
    "is_animation",
    "moves",
    "reason",
]

STREAMS = (
    *(".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi"),
    *(".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".ogv", ".wmv", ".flv", ".3gp"),
)
"""Suffixes of containers for video streams."""

ANIMATIONS = (".gif", ".webp", ".apng", ".png")
"""Suffixes of picture formats that may be animated."""

MAX_PIXELS = 178_956_970
"""Maximum number of pixels of one picture: Pillow's own limit."""

MAX_BYTES = 2**33
"""Maximum size in bytes of a clip's frames in memory."""

_HEAD = 512
_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_SIDE = 65_535  # the limit of JPEG
_WEBP_ANIMATED = 0x02  # in the flags of the chunk VP8X
_TEXTS = {
    b"<!doctype html": "an HTML page",
    b"<html": "an HTML page",
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself with `git lfs pull`",
    b"<?xml": "an XML text",
    b"{": "a JSON text",
    b"#extm3u": "a playlist",
}


def reason(error: Exception) -> str:
    """Why a file cannot be read, in words. The error may be of any type: decoders raise anything on corrupt data."""
    if isinstance(error, EOFError):
        return "it ends too early"
    if type(error).__name__ == "UnidentifiedImageError":
        return "its contents are not in a supported picture format"
    if words := getattr(error, "strerror", None):  # of the system or FFmpeg: without number and path
        return str(words)
    inside = isinstance(error, (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError))
    if isinstance(error, MemoryError):
        return "there is too little memory for it; cut or shrink it"
    if inside or not str(error):
        said = f": {error}" if str(error) else ""
        return f"its data is corrupt ({type(error).__name__}{said})"
    return str(error)


def head(path: Path) -> bytes:
    """The first bytes of a file. Raises OSError, and OutputError for a file that is clearly not a picture or video."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise OutputError("a folder" if stat.S_ISDIR(mode) else "not a regular file")  # reading a pipe would block
    with path.open("rb") as file:
        start = file.read(_HEAD)
    if not start:
        raise OutputError("the file is empty")
    text = start[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for beginning, what in _TEXTS.items():
        if text.startswith(beginning):
            raise OutputError(f"it is {what}, not a picture or video")
    return start


def is_animation(start: bytes) -> bool:
    """Whether a file that begins with these bytes is a GIF, WebP or PNG, which Pillow reads."""
    return start.startswith((b"GIF8", _PNG)) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")


def moves(path: Path) -> bool:
    """Whether a WebP or PNG file is marked as an animation; False for a file that cannot be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as file:
            start = file.read(21)
            if start[:4] == b"RIFF" and start[8:16] == b"WEBPVP8X":
                return len(start) > 20 and bool(start[20] & _WEBP_ANIMATED)
            return start.startswith(_PNG) and _has_frames(file)
    except (OSError, ValueError):  # ValueError: an invalid path
        return False


def _has_frames(file: BinaryIO) -> bool:
    """Whether a PNG file is animated: it has a chunk acTL before its first IDAT."""
    place = len(_PNG)
    while True:
        file.seek(place)
        chunk = file.read(8)
        if len(chunk) < 8 or chunk[4:] in (b"acTL", b"IDAT"):
            return chunk[4:] == b"acTL"
        place += 12 + int.from_bytes(chunk[:4], "big")


def check_pixels(width: int, height: int) -> None:
    """Raise OutputError for a picture with no pixels or too many."""
    if width < 1 or height < 1:
        raise OutputError(f"it has {width}x{height} pixels: at least 1x1")
    if width * height > MAX_PIXELS or max(width, height) > _MAX_SIDE:
        raise OutputError(f"it has {width}x{height} pixels: at most {_MAX_SIDE} each way and {MAX_PIXELS} in all")


def check_bytes(frames: int, width: int, height: int, most: int | None = None) -> None:
    """Raise OutputError for a clip with more than `most` bytes of pixels; None: MAX_BYTES."""
    check_pixels(width, height)
    size, most = 3 * frames * width * height, MAX_BYTES if most is None else most
    if size > most:
        raise OutputError(
            f"{frames} frames of {width}x{height} pixels are {size / 2**30:.3g} GiB in memory: at most "
            f"{most / 2**30:g} GiB; cut or shrink it"
        )
