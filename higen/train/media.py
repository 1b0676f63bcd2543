"""Reads pixels for training and cues: pictures, and clips at a requested rate, scaled to cover and cropped.

A file that cannot be read, is too short or too slow raises `Unusable` with the reason. (The reference replaces such
clips with black clips without a caption.) Files are decoded as by `Video.open` (higen/media).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from higen.media.cuts import find_cuts
from higen.media.files import STREAMS, moves
from higen.media.pictures import load_still
from higen.media.sampling import (
    SAME,
    Damaged,
    Placement,
    Unusable,
    choose_frames,
    cover,
    first_moment,
    opened,
    pictures_from,
    rate_of,
    read_part,
    reading,
    sampled_rate,
    stride_words,
    video_length,
)

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
"""Version of the reading code. Raise it if files give other pixels than before: then cached latents are invalid."""

_TRIES = 8  # number of clips that are tried to find one without a cut
_EDGE = 3  # frames: a cut nearer to an end of a clip than this is accepted if there is no clip without a cut


def is_video(path: Path) -> bool:
    """Whether a file with a suffix of VIDEOS or IMAGES is a video. The content of a WebP or PNG file decides."""
    suffix = path.suffix.lower()
    return suffix in VIDEOS or (suffix in (".webp", ".png") and moves(path))


def read_image(path: Path, width: int, height: int, placement: Placement) -> NDArray[np.uint8]:
    """A picture as uint8 [1,height,width,3], composed over white if it is transparent. Raises Unusable."""
    with reading(Unusable):
        picture = load_still(path)
    return cover(picture, width, height, placement)[None]


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
    """A clip of `frames` frames at about `fps` frames per second (`sampled_rate`) as uint8 [frames,height,width,3].

    For each moment, the frame that is shown then is taken. `wanted` selects frames of the clip, in ascending order
    (None: all). A clip with a cut is moved to a place without a cut; see higen/media/cuts.py. `note` receives remarks
    for the user, one line each.
    Raises Unusable for a file that cannot be read, is shorter than the clip, or is slower than `fps`: no other part of
    the file helps. Raises Damaged if the frames of this clip cannot be decoded, or if it has a cut at every place.
    """
    source = opened(path)
    first, available = first_moment(source.times, source.end, fps, frames, placement.start)
    rate = rate_of(source.times, source.end, fps, frames)
    if abs(rate / fps - 1) >= SAME:
        note(f"sampled at another rate: {stride_words(source.times, rate)}, {rate:.4g} a second for {fps:g}")
    at, due, tried = first, {first}, {first}
    clip = original = pictures_from(source, fps, frames, at, width, height, placement, wanted)
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
        with suppress(Damaged):  # if damaged, both stay, so that `clip` is still the clip that begins `at`
            at, clip = to, pictures_from(source, fps, frames, to, width, height, placement, None)
    if any(_EDGE <= cut <= frames - _EDGE for cut in find_cuts(original)):
        raise Damaged("a cut in every clip: split the video where its picture changes at once")
    return original
