"""Files to pixels: pictures, and clips at a wanted rate, scaled to cover and cropped.

Nothing is made up: a file that cannot be read, is too short or too slow raises `Unusable` with the reason. (The
reference turns such clips into black ones without a caption.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "IMAGES",
    "VIDEOS",
    "Damaged",
    "Placement",
    "Unusable",
    "choose_frames",
    "read_image",
    "read_video",
    "video_length",
]

VIDEOS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

SLOWER = 0.9
"""A video whose frames never follow each other at this part of the wanted rate is too slow: frames would be shown
twice, which the motion cue takes for stillness. (A frame that stays, as animations have it, is stillness.)"""

REORDERED = 16
"""Decoding order is at most this many frames from the order shown (H.264, A.3.1: MaxDpbFrames)."""


class Unusable(Exception):
    """A file cannot serve; the message is the reason, without the file's name."""


class Damaged(Unusable):
    """Frames that were wanted cannot be decoded: other frames of the file may serve."""


@dataclass(frozen=True)
class Placement:
    """Where a clip is cut out of its file, each from 0 (first, left, top) to 1 (last, right, bottom)."""

    start: float = 0.5
    x: float = 0.5
    y: float = 0.5


def read_image(path: Path, width: int, height: int, placement: Placement) -> NDArray[np.uint8]:
    """A picture as uint8 [1,height,width,3]; transparency is laid over white. Raises Unusable."""
    import PIL.Image
    import PIL.ImageOps

    with _reading(Unusable), PIL.Image.open(path) as file:
        if getattr(file, "n_frames", 1) > 1:
            raise Unusable("an animation among the pictures: save it as a video")
        picture = PIL.ImageOps.exif_transpose(file).convert("RGBA")
    picture = PIL.Image.alpha_composite(PIL.Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return _cover(np.asarray(picture), width, height, placement)[None]


def read_video(
    path: Path,
    width: int,
    height: int,
    fps: float,
    frames: int,
    placement: Placement,
    wanted: Sequence[int] | None = None,
) -> NDArray[np.uint8]:
    """A clip of `frames` frames at `fps` frames a second as uint8 [frames,height,width,3].

    For each moment the frame shown then is taken. `wanted` picks some frames of the clip, in ascending order
    (None: all). Raises Unusable for a file that cannot be read, is shorter than the clip, or slower than `fps`,
    wherever the clip lies; Damaged where the frames taken cannot be decoded.
    """
    with _reading(Unusable):
        times = _frame_times(path)
        shown = choose_frames(times, fps, frames, placement.start)
    chosen = shown if wanted is None else shown[list(wanted)]
    with _reading(Damaged):
        pictures = [_cover(picture, width, height, placement) for picture in _decode(path, times, chosen)]
    if len(pictures) < len(chosen):
        raise Damaged(f"cannot be read: {len(pictures)} of {len(chosen)} frames can be decoded")
    return np.stack(pictures)


def video_length(path: Path, fps: float) -> int:
    """Number of frames at `fps` frames a second that a file has. Raises Unusable."""
    with _reading(Unusable):
        return _available(_frame_times(path), fps)


def choose_frames(times: NDArray[np.float64], fps: float, frames: int, start: float) -> NDArray[np.int64]:
    """Indices of the frames shown at the moments of a clip, int64 [frames].

    `times`: seconds of each frame, ascending. `start`: which part, 0 the first to 1 the last. Raises Unusable.
    """
    available = _available(times, fps)
    if available < frames:
        raise Unusable(f"shorter than {frames} frames at {fps:g} frames a second")
    gaps = np.diff(times)
    gap = float(gaps[gaps > 0].min(initial=np.inf))
    if len(gaps) and SLOWER * fps * gap > 1:
        raise Unusable(f"slower than {fps:g} frames a second")
    first = min(int(start * (available - frames + 1)), available - frames)
    moments = times[0] + (first + np.arange(frames)) / fps
    # The frame shown at the moment; half a gap makes it the nearest one where frames follow each other steadily.
    return np.searchsorted(times, moments + 0.5 * min(gap, 1 / fps) - 1e-6, side="right").astype(np.int64) - 1


@contextmanager
def _reading(failure: type[Unusable]) -> Iterator[None]:
    """What a decoder raises, which may be anything on corrupt data, is a `failure`."""
    try:
        yield
    except Unusable:
        raise
    except Exception as error:
        raise failure(f"cannot be read: {error}") from error


def _available(times: NDArray[np.float64], fps: float) -> int:
    return int((times[-1] - times[0]) * fps + 1e-3) + 1


def _frame_times(path: Path) -> NDArray[np.float64]:
    """Seconds of each frame, ascending, from the packets: nothing is decoded."""
    import av

    with av.open(str(path)) as container:
        stream = _video_stream(container)
        # What an edit list cuts off (a trimmed MP4) is decoded and not shown.
        packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
        if not packets:
            raise Unusable("cannot be read: no frame in it")
        stamps = [p.pts for p in packets]
        if any(stamp is None for stamp in stamps):  # a container without time stamps
            if not stream.average_rate:
                raise Unusable("cannot be read: neither time stamps nor a frame rate in it")
            return np.arange(len(packets)) / float(stream.average_rate)
        return np.sort(np.array(stamps, dtype=np.float64)) * float(stream.time_base)


def _decode(path: Path, times: NDArray[np.float64], chosen: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
    """The chosen frames of a file as uint8 [Y,X,3], in ascending order; fewer where decoding ends early."""
    waiting = chosen.tolist()
    for index, frame in _frames_from(path, times, waiting[0]):
        while waiting and index >= waiting[0]:
            if index > waiting[0]:  # the frame itself is damaged and was left out
                raise Damaged("cannot be read: frames are missing")
            waiting.pop(0)
            yield _upright(frame)
        if not waiting:
            return


def _frames_from(path: Path, times: NDArray[np.float64], first: int) -> Iterator[tuple[int, Any]]:
    """The frames of a file and their indices, from a key frame at or before `first`.

    Some formats are indexed by decoding time (AVI, MPEG-4 part 2 in MP4) or not at all: seeking then leads behind the
    frame or fails, and a seek further back, or the start of the file, serves.
    """
    import av

    for start in (first, first - REORDERED):
        if start > 0:
            with suppress(av.FFmpegError):
                frames = _frames(path, times, start)
                found = next(frames, None)
                if found is not None and found[0] <= first:
                    return chain([found], frames)
    return _frames(path, times, 0)


def _frames(path: Path, times: NDArray[np.float64], start: int) -> Iterator[tuple[int, Any]]:
    """The frames of a file and their indices, from where seeking to frame `start` leads."""
    import av

    with av.open(str(path)) as container:
        stream = _video_stream(container)
        stream.thread_type = "AUTO"
        if start:
            container.seek(int(times[start] / stream.time_base), stream=stream)
        for count, frame in enumerate(container.decode(stream)):
            yield count if frame.time is None else int(np.abs(times - frame.time).argmin()), frame


def _upright(frame: Any) -> NDArray[np.uint8]:
    """The picture as players show it: phones store it lying and note the turn."""
    picture: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90)))


def _video_stream(container: Any) -> Any:
    if not container.streams.video:
        raise Unusable("cannot be read: no video in it")
    stream = container.streams.video[0]
    if stream.codec_context is None:  # PyAV before 18.1 crashes when it decodes such a stream
        raise Unusable("cannot be read: its codec is unknown")
    return stream


def _cover(picture: NDArray[np.uint8], width: int, height: int, placement: Placement) -> NDArray[np.uint8]:
    """Scaled to cover [height,width] with a box filter, as the reference does, and cropped."""
    import PIL.Image
    import PIL.ImageOps

    if picture.shape[:2] == (height, width):
        return picture
    fitted = PIL.ImageOps.fit(
        PIL.Image.fromarray(picture),
        (width, height),
        PIL.Image.Resampling.BOX,
        centering=(placement.x, placement.y),
    )
    return np.asarray(fitted)
