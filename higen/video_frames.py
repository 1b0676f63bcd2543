"""The .png sequence: one picture a frame, of which each says what frame of what clip it is.

Only pictures that say so are replaced or removed: another program's file of the same name is never touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from higen.errors import OutputError
from higen.video_record import Clip, numbered, unpack

__all__ = ["FRAME", "clip_id", "frame_mark", "frame_text", "replaced"]

FRAME = "higen.frame"
"""The key of the text in a picture that says what frame it is."""


def clip_id(clip: Clip) -> str:
    """Equal for equal clips only."""
    digest = hashlib.sha256(json.dumps([clip.fps, list(clip.frames.shape), dict(clip.metadata)]).encode())
    for frame in clip.frames:
        digest.update(frame.tobytes())
    return digest.hexdigest()[:32]


def frame_text(clip: str, index: int) -> str:
    """What a picture says of itself: frame `index`, from 0, of the clip with this id."""
    return json.dumps({"clip": clip, "frame": index})


def frame_mark(info: Mapping[Any, Any]) -> tuple[str, int | None] | None:
    """Clip and frame of a picture of a sequence, from Pillow's `info`; None for another program's.

    Pictures of before this mark have their clip's whole payload for an id, and no number.
    """
    payload = str(info.get("Comment", ""))
    if not unpack(payload)[1]:
        return None
    try:
        mark = json.loads(str(info[FRAME]))
        return (mark["clip"], mark["frame"]) if isinstance(mark["frame"], int) else None
    except KeyError:
        return payload, None
    except (ValueError, TypeError):
        return None


def replaced(path: Path, count: int) -> list[Path]:
    """The pictures that go as a clip of `count` frames takes the place of the sequence `path`, beyond those `count`.

    Raises OutputError naming the first file in the place of a frame that is not that frame of a sequence of ours.
    """
    clips, longest = set(), 0
    for index in range(count):
        file = numbered(path, index)
        if not os.path.lexists(file):
            continue
        mark = _mark(file, index)
        if mark is None:
            raise OutputError(
                f"{file}: is in the place of frame {index} of {path.name}, and higen did not write it as that: move it "
                "away, or choose another name"
            )
        _check_writable(file)
        clips.add(mark[0])
        longest = max(longest, mark[1])
    beyond = [
        file
        for index in range(count, longest)
        if (mark := _mark(file := numbered(path, index), index)) is not None and mark[0] in clips
    ]
    for file in beyond:
        _check_writable(file)
    return beyond


def _mark(file: Path, index: int) -> tuple[str, int] | None:
    """Id and length of the clip that a file is frame `index` of; None if it is none of ours."""
    from PIL import Image

    try:
        if not stat.S_ISREG(file.lstat().st_mode):
            return None
        with Image.open(file, formats=["PNG"]) as image:
            info = dict(image.info)
    except Exception:  # Pillow may raise anything on corrupt data
        return None
    mark = frame_mark(info)
    if mark is None or mark[1] not in (index, None):
        return None
    return mark[0], int(unpack(str(info["Comment"]))[1]["frames"])


def _check_writable(file: Path) -> None:
    if not os.access(file, os.W_OK) or not file.stat().st_mode & 0o222:
        raise OutputError(f"{file}: is read-only: make it writable, or choose another name")
