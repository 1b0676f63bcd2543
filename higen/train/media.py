"""Files to pixels for training and cues: pictures, and clips at a wanted rate, scaled to cover and cropped.

Nothing is made up: a file that cannot be read, is too short or too slow raises `Unusable` with the reason. (The
reference turns such clips into black ones without a caption.) What a file shows is read as `Video.open` reads it
(higen/media).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from higen.media import open_clip
from higen.media.animations import Animation
from higen.media.files import STREAMS, moves, reason
from higen.media.pictures import load_still
from higen.media.streams import VideoStream
from higen.media.timing import effective_rate, last_gap
from higen.train.cuts import find_cuts

__all__ = [
    "IMAGES",
    "READING",
    "SUFFIXES",
    "VIDEOS",
    "Damaged",
    "Placement",
    "Unusable",
    "choose_frames",
    "is_video",
    "read_image",
    "read_part",
    "read_video",
    "sampled_rate",
    "video_length",
]

VIDEOS = (*STREAMS, ".gif", ".apng")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SUFFIXES = (*VIDEOS, *IMAGES)
"""A .webp or .png that is an animation is a video."""

READING = 2
"""Another number where files give other pixels than before: latents kept of those are made again."""

SLOWER = 0.9
"""A video whose frames never follow each other at this part of the wanted rate is too slow: frames would be shown
twice, which the motion cue takes for stillness. (A frame that stays, as animations have it, is stillness.)"""

_TRIES = 8  # clips that are looked at for one without a cut
_SAME = 0.01  # part of a rate that nobody sees
_EDGE = 3  # frames at an end of a clip: a cut so near to it is avoided, and borne where it cannot be


class Unusable(Exception):
    """A file cannot serve; the message is the reason, without the file's name."""


class Damaged(Unusable):
    """The part of the file that was wanted cannot serve: another part of it may."""


@dataclass(frozen=True)
class Placement:
    """Where a clip is cut out of its file, each from 0 (first, left, top) to 1 (last, right, bottom)."""

    start: float = 0.5
    x: float = 0.5
    y: float = 0.5


def is_video(path: Path) -> bool:
    """Whether a file with a suffix of VIDEOS or IMAGES is a video; a WebP or PNG file is looked into."""
    suffix = path.suffix.lower()
    return suffix in VIDEOS or (suffix in (".webp", ".png") and moves(path))


def read_image(path: Path, width: int, height: int, placement: Placement) -> NDArray[np.uint8]:
    """A picture as uint8 [1,height,width,3]; transparency is laid over white. Raises Unusable."""
    with _reading(Unusable):
        picture = load_still(path)
    return _cover(picture, width, height, placement)[None]


def read_video(
    path: Path,
    width: int,
    height: int,
    fps: float,
    frames: int,
    placement: Placement,
    wanted: Sequence[int] | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> NDArray[np.uint8]:
    """A clip of `frames` frames at about `fps` frames a second (`sampled_rate`) as uint8 [frames,height,width,3].

    For each moment the frame shown then is taken. `wanted` picks some frames of the clip, in ascending order
    (None: all). A clip with a cut in it is moved to where it has none; see higen/train/cuts.py. `note` is given what
    a person should know of it, a line each.
    Raises Unusable for a file that cannot be read, is shorter than the clip, or slower than `fps`, wherever the clip
    lies; Damaged where the frames taken cannot be decoded, or have a cut wherever the clip is moved.
    """
    source = _opened(path)
    first, available = _first(source.times, source.end, fps, frames, placement.start)
    rate = _rate(source.times, source.end, fps, frames)
    if abs(rate / fps - 1) >= _SAME:
        note(f"sampled at another rate: {_stride(source.times, rate)}, {rate:.4g} a second for {fps:g}")
    at, due, tried = first, {first}, {first}
    clip = original = _read(source, fps, frames, at, width, height, placement, wanted)
    if wanted is not None:
        return clip
    for _ in range(_TRIES):
        cuts = find_cuts(clip)
        if not cuts:
            if at != first:
                note("moved past a cut: its picture changes at once")
            return clip
        due |= {place for place in (at + cuts[-1], at + cuts[0] - frames) if 0 <= place <= available - frames}
        to = min(due - tried, key=lambda place: abs(place - first), default=-1)
        if to < 0:
            break
        tried.add(to)
        with suppress(Damaged):  # then both stay: the cuts that are known are those of `clip`, which begins `at`
            at, clip = to, _read(source, fps, frames, to, width, height, placement, None)
    if any(_EDGE <= cut <= frames - _EDGE for cut in find_cuts(original)):
        raise Damaged("a cut in every clip: split the video where its picture changes at once")
    return original


def read_part(path: Path, width: int, height: int, fps: float, frames: int, placement: Placement) -> NDArray[np.uint8]:
    """As `read_video`, cuts or not."""
    source = _opened(path)
    first, _ = _first(source.times, source.end, fps, frames, placement.start)
    return _read(source, fps, frames, first, width, height, placement, None)


def video_length(path: Path, fps: float) -> int:
    """Number of frames at about `fps` frames a second that a file has. Raises Unusable."""
    source = _opened(path)
    return _available(source.times, effective_rate(source.times, fps), source.end)


def sampled_rate(path: Path, fps: float, frames: int) -> float:
    """Frames a second that a clip of a file is sampled at for `fps`: whole strides of its frames, where that is near.

    Raises Unusable.
    """
    source = _opened(path)
    rate = _rate(source.times, source.end, fps, frames)
    return fps if abs(rate / fps - 1) < _SAME else rate


def choose_frames(
    times: NDArray[np.float64], fps: float, frames: int, start: float, end: float | None = None
) -> NDArray[np.int64]:
    """Indices of the frames shown at the moments of a clip, int64 [frames].

    `times`: seconds of each frame, ascending; `end`: when the last one ends (None: as the others). `start`: which
    part, 0 the first to 1 the last. Raises Unusable.
    """
    end = float(times[-1]) + last_gap(times) if end is None else end
    return _shown(times, end, fps, frames, _first(times, end, fps, frames, start)[0])


@contextmanager
def _reading(failure: type[Unusable]) -> Iterator[None]:
    """What a decoder raises, which may be anything on corrupt data, is a `failure`."""
    try:
        yield
    except Unusable:
        raise
    except Exception as error:
        raise failure(f"cannot be read: {reason(error)}") from error


def _opened(path: Path) -> Animation | VideoStream:
    with _reading(Unusable):
        return open_clip(path)


def _read(
    source: Animation | VideoStream,
    fps: float,
    frames: int,
    first: int,
    width: int,
    height: int,
    placement: Placement,
    wanted: Sequence[int] | None,
) -> NDArray[np.uint8]:
    """The clip that begins at moment `first`."""
    shown = _shown(source.times, source.end, fps, frames, first)
    chosen = shown if wanted is None else shown[list(wanted)]
    with _reading(Damaged):
        # Half a step: a frame of a faster video stands in for its neighbour.
        pictures = source.pictures(chosen.tolist(), 0.5 / fps, lambda _, each: _cover(each, width, height, placement))
    return np.stack(pictures)


def _first(times: NDArray[np.float64], end: float, fps: float, frames: int, start: float) -> tuple[int, int]:
    """The first moment of a clip, and how many moments there are. Raises Unusable."""
    available = _available(times, _rate(times, end, fps, frames), end)
    if available < frames:
        raise Unusable(f"shorter than {frames} frames at {fps:g} frames a second")
    gaps = np.diff(times)
    gap = float(gaps[gaps > 0].min(initial=np.inf))
    if len(gaps) and SLOWER * fps * gap > 1:
        raise Unusable(f"slower than {fps:g} frames a second")
    return min(int(start * (available - frames + 1)), available - frames), available


def _shown(times: NDArray[np.float64], end: float, fps: float, frames: int, first: int) -> NDArray[np.int64]:
    """The frame shown at each moment; half a gap makes it the nearest one where frames follow each other steadily."""
    rate = _rate(times, end, fps, frames)
    gaps = np.diff(times)
    gap = float(gaps[gaps > 0].min(initial=np.inf))
    moments = times[0] + (first + np.arange(frames)) / rate
    return np.searchsorted(times, moments + 0.5 * min(gap, 1 / rate) - 1e-6, side="right").astype(np.int64) - 1


def _rate(times: NDArray[np.float64], end: float, fps: float, frames: int) -> float:
    """The rate that a clip is sampled at. A shorter stride is taken where the video is too short for the nearest one,
    and long enough at `fps`.
    """
    rate = effective_rate(times, fps)
    stride = round(1 / (last_gap(times) * rate)) if rate < fps else 1
    if stride > 1 and _available(times, rate, end) < frames <= _available(times, fps, end):
        return rate * stride / (stride - 1)
    return rate


def _stride(times: NDArray[np.float64], rate: float) -> str:
    stride = round(1 / (last_gap(times) * rate))
    return {1: "every frame", 2: "every 2nd frame", 3: "every 3rd frame"}.get(stride, f"every {stride}th frame")


def _available(times: NDArray[np.float64], rate: float, end: float) -> int:
    """Moments at which a frame is shown: the last one is until `end`."""
    until_last = int((times[-1] - times[0]) * rate + 1e-3) + 1
    return max(until_last, int(np.ceil((end - times[0]) * rate - 0.05)))


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
