"""What a file says of the clip in it: the JSON that every format carries, and the names of a .png sequence.

The JSON is the clip's metadata and, as the key `higen.video`, the rate, length and size of what was saved.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DEFAULT_FPS", "RECORD", "SUFFIXES", "Clip", "numbered", "pack", "unpack"]

RECORD = "higen.video"
DEFAULT_FPS = 8.0
SUFFIXES = (".mp4", ".webm", ".gif", ".webp", ".png", ".npy")


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames uint8 [F, H, W, 3], their rate, and metadata in JSON's types: what is written and read."""

    frames: NDArray[np.uint8]
    fps: float
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The metadata's prompt, "" if there is none."""
        return str(self.metadata.get("prompt") or "")


def pack(clip: Clip) -> tuple[str, str]:
    """Title and payload: the prompt without what a C string or UTF-8 cannot hold; metadata and record as ASCII."""
    count, height, width, _ = clip.frames.shape
    record = {"fps": clip.fps, "frames": count, "height": height, "width": width}
    title = clip.prompt.replace("\0", " ").encode("utf-8", "replace").decode("utf-8")
    return title, json.dumps({**clip.metadata, RECORD: record})


def unpack(payload: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and record of a payload; both are empty for the text of another program."""
    try:
        metadata = json.loads(payload)
        record = metadata.pop(RECORD)
        return (metadata, record) if all(record[k] > 0 for k in ("fps", "frames", "height", "width")) else ({}, {})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}, {}


def numbered(path: Path, index: int) -> Path:
    """out.png -> out_0000.png"""
    return path.with_name(f"{path.stem}_{index:04d}{path.suffix}")
