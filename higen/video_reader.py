"""Reads clips from files; see higen/video.py for the formats."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from higen.errors import OutputError, is_of_a_handler
from higen.media import open_clip
from higen.media.animations import Animation
from higen.media.files import ANIMATIONS, STREAMS, check_bytes, head, moves, reason
from higen.media.pictures import load
from higen.media.streams import VideoStream
from higen.media.timing import steady_plan
from higen.staging import settle
from higen.video_frames import frame_mark
from higen.video_record import DEFAULT_FPS, Clip, Record, unpack
from higen.video_run import Run, find_run

__all__ = ["READABLE", "read"]

READABLE = (*STREAMS, *ANIMATIONS, ".npy")
"""Suffixes of files that can be read. The contents decide the format: a file named .gif may contain an MP4."""

_HOLD = 0.5
"""In other programs' files, frames that cannot be decoded are replaced by a neighbouring frame, for up to this many
seconds."""

_TRIES = 20
"""How often a sequence is read again while another process saves it."""

_CLOCK = 0.011
"""Seconds that a duration in a file may be off by rounding: a GIF counts hundredths."""


def read(path: Path, most: int | None = None) -> Clip:
    """The clip in a file, or the first `most` frames of it; see `Video.open`.

    Raises OutputError for a missing, corrupt, truncated or too large file.
    """
    suffix = path.suffix.lower()
    if suffix not in READABLE:
        raise OutputError(f"{path}: the suffix {path.suffix!r} is unknown; known are {', '.join(READABLE)}")
    try:
        if suffix == ".npy":
            return _read_npy(path, most)
        if suffix == ".png":
            settle(path.absolute().parent)  # finish a save that was killed while its frames were being renamed
        if suffix == ".png" and not moves(path):
            return _read_while_still(path, most)
        return _read_moving(open_clip(path), most)
    except Exception as error:  # a decoder may raise anything on corrupt data
        if is_of_a_handler(error):
            raise
        raise OutputError(f"{path}: not a readable {path.suffix} file ({reason(error)})") from error


def _read_moving(source: Animation | VideoStream, most: int | None) -> Clip:
    metadata, record = unpack(source.payload)
    if record and not source.complete:
        raise OutputError(f"{len(source.times)} of {record.frames} frames are in it: it is truncated")
    shown, fps = _plan(source, record, most)
    shown = shown[:most]
    check_bytes(len(shown), *source.size)
    wanted, again = np.unique(shown, return_inverse=True)
    stack = _Stack(len(wanted))
    source.pictures(wanted.tolist(), 0.0 if record else _HOLD, stack)
    frames = stack.frames
    if len(again) != len(wanted):
        frames = frames[again]
    return Clip(_cropped(frames, record), fps or DEFAULT_FPS, metadata)


def _plan(source: Animation | VideoStream, record: Record | None, most: int | None) -> tuple[NDArray[np.int64], float]:
    """Indices of the frames to show (at least `most`, if the file has as many), and the frame rate.

    Both come from higen's own record if the file agrees with it; another program may have changed the file.
    """
    count, seconds = len(source.times), source.end - float(source.times[0])
    if record is not None and isinstance(source, Animation):
        # Encoders merge equal frames into one longer frame or into a still picture: repeat it.
        if count == 1 and not source.timed:
            repeated = record.frames if most is None else min(record.frames, most)
            check_bytes(repeated, *source.size)
            return np.zeros(repeated, np.int64), record.fps
        if abs(seconds - record.seconds) <= _CLOCK:
            ends = np.rint(np.append(source.times[1:], source.end) * record.fps).astype(np.int64)
            repeats = np.maximum(np.diff(ends, prepend=0), 1)
            if repeats.sum() == record.frames:
                return np.arange(count).repeat(repeats), record.fps
    shown, fps = steady_plan(source.times, source.end)
    if len(shown) == count:
        # Time stamps are rounded. An exact rate is used if its duration agrees within half a frame and one per cent.
        for exact in (source.rate, record.fps if record else 0.0):
            if exact and abs(count - exact * seconds) < min(0.5, 0.01 * count):
                fps = exact
    return shown, fps


class _Stack:
    """Collects frames in one array. Frames of another size are scaled to the first one's, as players do."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.frames: NDArray[np.uint8] = np.empty((0, 0, 0, 3), np.uint8)

    def __call__(self, place: int, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if not len(self.frames):
            self.frames = np.empty((self.count, *picture.shape), np.uint8)
        height, width = self.frames.shape[1:3]
        if picture.shape[:2] != (height, width):
            import PIL.Image

            same = PIL.Image.fromarray(picture).resize((width, height), PIL.Image.Resampling.BICUBIC)
            picture = np.asarray(same)
        kept: NDArray[np.uint8] = self.frames[place]
        kept[:] = picture
        return kept


def _read_while_still(path: Path, most: int | None) -> Clip:
    """A sequence of pictures. It is read again if another process replaces it meanwhile."""
    for _ in range(_TRIES):
        before = path.parent.stat().st_mtime_ns
        try:
            return _read_run(find_run(path), most)
        except (OutputError, OSError):
            if path.parent.stat().st_mtime_ns == before:
                raise
            time.sleep(0.05)
    return _read_run(find_run(path), most)


def _read_run(run: Run, most: int | None) -> Clip:
    """The pictures of a sequence, after a check that they are from one clip and have one size."""
    first, info = load(run.files[0])
    metadata, record = unpack(str(info.get("Comment", "")))
    mark = frame_mark(info) if run.numbered else None
    whole = len(run.files)  # for another program's sequence: all files
    if mark is not None and record is not None:
        whole = record.frames
        if len(run.files) < whole:
            missing = run.missing or f"{run.files[-1].name} is the last one"
            raise OutputError(f"{missing}: {len(run.files)} of {whole} frames can be read: it is truncated")
    outside = run.member and run.member not in {file.name for file in run.files[:whole]}
    if run.missing and (mark is None or outside):
        raise OutputError(f"{run.missing}: {whole} of {run.length} frames come before it")
    height, width, _ = first.shape
    files = run.files[: whole if most is None else min(whole, most)]
    check_bytes(len(files), width, height)
    frames = np.empty((len(files), *first.shape), np.uint8)
    for index, file in enumerate(files):
        frame, info = load(file)
        other = frame_mark(info)
        if mark is not None and other is not None and other[0] != mark[0]:
            raise OutputError(
                f"{file.name} and {files[0].name} belong to different clips; keep the frames of one clip in the folder"
            )
        if frame.shape != first.shape:
            size = f"{frame.shape[1]}x{frame.shape[0]}"
            raise OutputError(f"{file.name} is {size} pixels and {files[0].name} {width}x{height}: one size is wanted")
        frames[index] = frame
    return Clip(frames, record.fps if record else DEFAULT_FPS, metadata)


def _cropped(frames: NDArray[np.uint8], record: Record | None) -> NDArray[np.uint8]:
    """Frames without the row and column that were added to make an odd size even."""
    if record is None:
        return frames
    padded = (record.height + record.height % 2, record.width + record.width % 2)
    return frames[:, : record.height, : record.width] if frames.shape[1:3] == padded else frames


def _read_npy(path: Path, most: int | None) -> Clip:
    head(path)
    with path.open("rb") as file:
        try:
            first = np.lib.format.read_magic(file) == (1, 0)
            read_header = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
            shape, _, dtype = read_header(file)
        except ValueError as error:  # numpy's message is about Python syntax
            raise OutputError("it has no header of an array") from error
        if dtype == np.uint8 and len(shape) == 4:
            check_bytes(shape[0] if most is None else min(shape[0], most), shape[2], shape[1])
            if path.stat().st_size - file.tell() < math.prod(shape):
                raise OutputError("it is truncated")
        elif not dtype.hasobject:
            raise OutputError(f"frames {dtype} {list(shape)}: uint8 [F, H, W, 3] with F, H, W >= 1")
    frames = np.load(path, mmap_mode=None if most is None else "r", allow_pickle=False)
    return Clip(frames if most is None else np.array(frames[:most]), DEFAULT_FPS)
