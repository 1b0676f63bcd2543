"""The .png sequence: one picture per frame. Each picture has a mark with its clip and frame number.

Only pictures with such a mark are replaced or removed; another program's file of the same name is never touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from higen.errors import OutputError
from higen.output_file import check_writable
from higen.video_record import Clip, numbered, unpack

__all__ = ["FRAME", "clip_id", "frame_mark", "frame_text", "replaced"]

FRAME = "higen.frame"
"""The key of the text in a picture that contains the mark."""


def clip_id(clip: Clip) -> str:
    """A digest of a clip; equal only for equal clips."""
    digest = hashlib.sha256(json.dumps([clip.fps, list(clip.frames.shape), dict(clip.metadata)]).encode())
    for frame in clip.frames:
        digest.update(frame.tobytes())
    return digest.hexdigest()[:32]


def frame_text(clip: str, index: int) -> str:
    """A picture's mark: it is frame `index` (from 0) of the clip with the id `clip`."""
    return json.dumps({"clip": clip, "frame": index})


def frame_mark(info: Mapping[Any, Any]) -> tuple[str, int | None] | None:
    """The clip and frame of a picture, from Pillow's `info`; None for another program's picture.

    Pictures of older higen versions have no mark: their clip id is the clip's whole payload, their frame number None.
    """
    payload = str(info.get("Comment", ""))
    if unpack(payload)[1] is None:
        return None
    try:
        mark = json.loads(str(info[FRAME]))
        return (mark["clip"], mark["frame"]) if isinstance(mark["frame"], int) else None
    except KeyError:
        return payload, None
    except (ValueError, TypeError):
        return None


def replaced(path: Path, count: int) -> list[Path]:
    """The pictures from frame `count` on, to be removed when a clip of `count` frames replaces the sequence `path`.

    Raises OutputError naming the first file that has the name of a frame but was not written by higen as that frame.
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
        check_writable(file)
        clips.add(mark[0])
        longest = max(longest, mark[1])
    beyond = [
        file
        for index, file in _numbered_files(path)
        if count <= index < longest and (mark := _mark(file, index)) is not None and mark[0] in clips
    ]
    for file in beyond:
        check_writable(file)
    return beyond


def _mark(file: Path, index: int) -> tuple[str, int] | None:
    """Id and length of the clip in which a file is frame `index`; None if higen did not write it as that frame."""
    from PIL import Image

    try:
        if not stat.S_ISREG(file.lstat().st_mode):
            return None
        with Image.open(file, formats=["PNG"]) as image:
            info = dict(image.info)
    except Exception:  # Pillow may raise anything on corrupt data
        return None
    mark, record = frame_mark(info), unpack(str(info.get("Comment", "")))[1]
    if mark is None or record is None or mark[1] not in (index, None):
        return None
    return mark[0], record.frames


def _numbered_files(path: Path) -> list[tuple[int, Path]]:
    """The existing files with names of a sequence, with their numbers, in ascending order."""
    pattern = re.compile(re.escape(f"{path.stem}_") + "([0-9]+)" + re.escape(path.suffix), re.DOTALL)
    found = {int(name[1]) for file in path.parent.iterdir() if (name := pattern.fullmatch(file.name))}
    return [(index, file) for index in sorted(found) if os.path.lexists(file := numbered(path, index))]
