"""Finds cuts in a clip. The motion cue would mistake a cut for motion."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["FEWEST", "find_cuts"]

FEWEST = 6
"""Minimum number of frames of a clip in which a cut can be told from motion."""

_SIDE = 16  # cells of the reduced frame, per side
_JUMP = 16.0  # smallest mean change of the cells, in levels of 255
_ABOVE = 4.0  # smallest ratio to the changes around it
_AROUND = 3  # neighbouring changes to compare with, on each side
_FLASH = 4  # longest flash, in frames
_MOST = 0.7  # smallest part of the cells that change
_ALIKE = 0.7  # correlation above which two pictures show one scene in different light


def find_cuts(frames: NDArray[np.uint8]) -> list[int]:
    """Indices of the frames of a clip uint8 [F,H,W,3] that begin another shot; none for fewer than 6 frames.

    A cut changes most of the picture, and much more than the changes around it. Two changes are not cuts: a flash,
    after which the picture comes back within four frames, and a change of light on the same scene. Fast motion does not
    stand out from the changes around it. Dissolves, and cuts within fast motion, are not found.
    """
    if len(frames) < FEWEST:
        return []
    small = np.stack([_small(frame) for frame in frames])
    change = np.abs(np.diff(small, axis=0)).reshape(len(frames) - 1, -1)
    size = change.mean(axis=1)
    return [at + 1 for at in range(len(size)) if _is_cut(at, small, change, size)]


def _is_cut(at: int, small: NDArray[np.float64], change: NDArray[np.float64], size: NDArray[np.float64]) -> bool:
    """Whether frame `at` + 1 begins another shot."""
    around = np.delete(size, at)[max(at - _AROUND, 0) : at + _AROUND]
    if size[at] < max(_JUMP, _ABOVE * around.max()) or (change[at] > _JUMP / 2).mean() < _MOST:
        return False
    before, after = small[max(at - _FLASH + 1, 0) : at + 1], small[at + 1 : at + 1 + _FLASH]
    # If one side of the change is a flash, the frames beyond it look like the other side.
    returns = [np.abs(small[at] - frame).mean() for frame in after[1:]]
    returns += [np.abs(small[at + 1] - frame).mean() for frame in before[:-1]]
    return not (returns and min(returns) < size[at] / 2) and not _same_scene(small[at], small[at + 1])


def _same_scene(one: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    """Whether two reduced pictures are bright and dark in the same places; False if one is nearly uniform."""
    a, b = (picture.mean(axis=-1).ravel() for picture in (one, other))
    if min(a.std(), b.std()) < 2:
        return False
    return float(np.corrcoef(a, b)[0, 1]) > _ALIKE


def _small(frame: NDArray[np.uint8]) -> NDArray[np.float64]:
    import PIL.Image

    small = PIL.Image.fromarray(frame).resize((_SIDE, _SIDE), PIL.Image.Resampling.BOX)
    return np.asarray(small).astype(np.float64)
