"""Samples clips at a requested frame rate, scaled to cover and cropped, for training, cues and curves.

No frames are invented: a file that cannot be read, is too short or too slow raises `Unusable` with the reason. Files
are read in the same way as by `Video.open`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from higen.media import open_clip
from higen.media.animations import Each
from higen.media.files import reason
from higen.media.timing import effective_rate, last_gap

__all__ = [
    "SAME",
    "Damaged",
    "Held",
    "Placement",
    "Source",
    "Unusable",
    "choose_frames",
    "clip_from",
    "cover",
    "first_moment",
    "opened",
    "pictures_from",
    "rate_of",
    "read_part",
    "reading",
    "sampled_rate",
    "stride_words",
    "video_length",
]

SAME = 0.01
"""Relative difference between two rates that is not visible."""

SLOWER = 0.9
"""A video is too slow if no two frames follow each other at this part of the wanted rate or faster. Its frames would be
repeated, and the motion cue would take that for stillness. Long frames of an animation really are still."""


class Source(Protocol):
    """Frames that are accessed by index."""

    times: NDArray[np.float64]
    """Start of each frame in seconds, ascending, [n]."""
    end: float
    """End of the last frame in seconds."""

    def pictures(self, chosen: Sequence[int], hold: float, each: Each) -> list[NDArray[np.uint8]]:
        """The results of `each` for the `chosen` frames, which are in ascending order; see `Each`."""
        ...


class Held:
    """Frames in memory, uint8 [n,H,W,3], as a source."""

    def __init__(self, frames: NDArray[np.uint8], fps: float) -> None:
        self._frames = frames
        self.times = np.arange(len(frames)) / fps
        self.end = len(frames) / fps

    def pictures(self, chosen: Sequence[int], hold: float, each: Each) -> list[NDArray[np.uint8]]:
        """See `Source.pictures`."""
        return [each(place, self._frames[index]) for place, index in enumerate(chosen)]


class Unusable(Exception):
    """A file cannot be used. The message is the reason, without the file's name."""


class Damaged(Unusable):
    """The wanted part of the file cannot be used. Another part may be usable."""


@dataclass(frozen=True)
class Placement:
    """The position of a clip in its file, each value from 0 (first, left, top) to 1 (last, right, bottom)."""

    start: float = 0.5
    x: float = 0.5
    y: float = 0.5


def read_part(path: Path, width: int, height: int, fps: float, frames: int, placement: Placement) -> NDArray[np.uint8]:
    """Like `read_video` (higen/train/media.py), but without a search for cuts."""
    source = opened(path)
    first, _ = first_moment(source.times, source.end, fps, frames, placement.start)
    return pictures_from(source, fps, frames, first, width, height, placement, None)


def clip_from(source: Source, fps: float, frames: int, first: int, width: int, height: int) -> NDArray[np.uint8]:
    """The clip that begins at moment `first`, in the middle of the picture. Raises Unusable if it is too short."""
    available = first_moment(source.times, source.end, fps, frames, 0.0)[1]
    if available - first < frames:
        at = f" from {first / fps:.2f} s on" if first else ""
        raise Unusable(f"{max(available - first, 0)} frames at {fps:g} a second{at}: the request has {frames}")
    return pictures_from(source, fps, frames, first, width, height, Placement(), None)


def video_length(path: Path, fps: float) -> int:
    """Number of frames that a file has at about `fps` frames a second. Raises Unusable."""
    source = opened(path)
    return _available(source.times, effective_rate(source.times, fps), source.end)


def sampled_rate(path: Path, fps: float, frames: int) -> float:
    """Frames a second at which a clip of a file is sampled for `fps`: a whole stride of its frames, if this is near.

    Raises Unusable.
    """
    source = opened(path)
    rate = rate_of(source.times, source.end, fps, frames)
    return fps if abs(rate / fps - 1) < SAME else rate


def choose_frames(
    times: NDArray[np.float64], fps: float, frames: int, start: float, end: float | None = None
) -> NDArray[np.int64]:
    """Indices of the frames shown at the moments of a clip, int64 [frames].

    `times`: start of each frame in seconds, ascending; `end`: end of the last frame (None: it lasts as long as the
    others). `start`: position of the clip, from 0 (first) to 1 (last). Raises Unusable.
    """
    end = float(times[-1]) + last_gap(times) if end is None else end
    return _shown(times, end, fps, frames, first_moment(times, end, fps, frames, start)[0])


@contextmanager
def reading(failure: type[Unusable]) -> Iterator[None]:
    """Turn any error of a decoder into a `failure`: on corrupt data a decoder may raise anything."""
    try:
        yield
    except Unusable:
        raise
    except Exception as error:
        raise failure(f"cannot be read: {reason(error)}") from error


def opened(path: Path) -> Source:
    with reading(Unusable):
        return open_clip(path)


def pictures_from(
    source: Source,
    fps: float,
    frames: int,
    first: int,
    width: int,
    height: int,
    placement: Placement,
    wanted: Sequence[int] | None,
) -> NDArray[np.uint8]:
    """The clip that begins at moment `first`, or only its frames `wanted`."""
    shown = _shown(source.times, source.end, fps, frames, first)
    chosen = shown if wanted is None else shown[list(wanted)]
    with reading(Damaged):
        # Tolerance of half a step: in a faster video a missing frame may be replaced by its neighbour.
        pictures = source.pictures(chosen.tolist(), 0.5 / fps, lambda _, each: cover(each, width, height, placement))
    return np.stack(pictures)


def first_moment(times: NDArray[np.float64], end: float, fps: float, frames: int, start: float) -> tuple[int, int]:
    """The first moment of a clip, and the number of moments in the file. Raises Unusable."""
    available = _available(times, rate_of(times, end, fps, frames), end)
    if available < frames:
        raise Unusable(f"shorter than {frames} frames at {fps:g} frames a second")
    gaps = np.diff(times)
    gap = float(gaps[gaps > 0].min(initial=np.inf))
    if len(gaps) and SLOWER * fps * gap > 1:
        raise Unusable(f"slower than {fps:g} frames a second")
    return min(int(start * (available - frames + 1)), available - frames), available


def _shown(times: NDArray[np.float64], end: float, fps: float, frames: int, first: int) -> NDArray[np.int64]:
    """The frame shown at each moment. For a steady video, adding half a gap makes it the nearest frame."""
    rate = rate_of(times, end, fps, frames)
    gaps = np.diff(times)
    gap = float(gaps[gaps > 0].min(initial=np.inf))
    moments = times[0] + (first + np.arange(frames)) / rate
    due = moments + 0.5 * min(gap, 1 / rate) - 1e-6
    found: NDArray[np.int64] = np.searchsorted(times, due, side="right").astype(np.int64) - 1
    return found


def rate_of(times: NDArray[np.float64], end: float, fps: float, frames: int) -> float:
    """The rate at which a clip is sampled.

    If the video is too short for the nearest stride but long enough at `fps`, a shorter stride is taken.
    """
    rate = effective_rate(times, fps)
    stride = round(1 / (last_gap(times) * rate)) if rate < fps else 1
    if stride > 1 and _available(times, rate, end) < frames <= _available(times, fps, end):
        return rate * stride / (stride - 1)
    return rate


def stride_words(times: NDArray[np.float64], rate: float) -> str:
    stride = round(1 / (last_gap(times) * rate))
    return {1: "every frame", 2: "every 2nd frame", 3: "every 3rd frame"}.get(stride, f"every {stride}th frame")


def _available(times: NDArray[np.float64], rate: float, end: float) -> int:
    """Number of moments at which a frame is shown. The last frame is shown until `end`."""
    until_last = int((times[-1] - times[0]) * rate + 1e-3) + 1
    return max(until_last, int(np.ceil((end - times[0]) * rate - 0.05)))


def cover(picture: NDArray[np.uint8], width: int, height: int, placement: Placement) -> NDArray[np.uint8]:
    """The picture scaled to cover [height,width] with a box filter, as in the reference, and cropped."""
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
