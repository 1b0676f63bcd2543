"""The record of a clip in its file: the JSON in all formats with metadata, and the names of a .png sequence.

The JSON is the clip's metadata and, under the key `higen.video`, the rate, length and size that were saved.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from higen.media.sound import Sound

__all__ = ["DEFAULT_FPS", "Clip", "Record", "numbered", "pack", "unpack"]

RECORD = "higen.video"
DEFAULT_FPS = 8.0


@dataclass(frozen=True, eq=False)
class Clip:
    """The data that is written and read: frames uint8 [F, H, W, 3], their rate, and metadata in JSON's types.

    `sound` is written with the frames; it is not read.
    """

    frames: NDArray[np.uint8]
    fps: float
    metadata: Mapping[str, Any] = field(default_factory=dict)
    sound: Sound | None = None

    @property
    def prompt(self) -> str:
        """The metadata's prompt, "" if there is none."""
        return str(self.metadata.get("prompt") or "")


def pack(clip: Clip) -> tuple[str, str]:
    """Title and payload: the prompt without characters that a C string or UTF-8 cannot hold; metadata and record as
    ASCII."""
    count, height, width, _ = clip.frames.shape
    record = {"fps": clip.fps, "frames": count, "height": height, "width": width}
    title = clip.prompt.replace("\0", " ").encode("utf-8", "replace").decode("utf-8")
    return title, json.dumps({**clip.metadata, RECORD: record})


@dataclass(frozen=True)
class Record:
    """The record of the saved clip in a file that higen wrote."""

    fps: float
    frames: int
    height: int
    width: int

    @property
    def seconds(self) -> float:
        """The duration in seconds."""
        return self.frames / self.fps


def unpack(payload: str) -> tuple[dict[str, Any], Record | None]:
    """Metadata and record of a payload; empty and None for another program's text."""
    try:
        metadata = json.loads(payload)
        record = metadata.pop(RECORD)
        fps, *sizes = (record[name] for name in ("fps", "frames", "height", "width"))
        if not all(number > 0 for number in (fps, *sizes)):
            return {}, None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}, None
    fits = isinstance(fps, (int, float)) and math.isfinite(fps) and all(type(size) is int for size in sizes)
    return metadata, Record(float(fps), *sizes) if fits else None


def numbered(path: Path, index: int) -> Path:
    """out.png -> out_0000.png"""
    return path.with_name(f"{path.stem}_{index:04d}{path.suffix}")
