"""Finds cuts in a clip, which the motion cue would take for motion."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["FEWEST", "find_cuts"]

FEWEST = 6
"""Frames that a clip needs for a cut to be told from motion."""

_SIDE = 16  # cells of a frame's small picture, each way
_JUMP = 16.0  # mean change of a cell, of 255
_ABOVE = 4.0  # times the changes around it
_AROUND = 3  # pairs of frames, each way
_FLASH = 4  # frames that something may show up for and be gone again
_MOST = 0.7  # of the cells change
_ALIKE = 0.7  # correlation of two pictures of one scene in another light


def find_cuts(frames: NDArray[np.uint8]) -> list[int]:
    """Indices of the frames that begin another shot, of a clip uint8 [F,H,W,3]; none of fewer than 6 frames.

    A cut is a change of most of the picture that stands out from the changes around it, after which the picture does
    not come back within four frames (a flash), and which is no other light on the same scene. Fast motion does not
    stand out; a dissolve and a cut within fast motion are not found.
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
    # Whichever side is the flash, the other shot is there behind it.
    returns = [np.abs(small[at] - frame).mean() for frame in after[1:]]
    returns += [np.abs(small[at + 1] - frame).mean() for frame in before[:-1]]
    return not (returns and min(returns) < size[at] / 2) and not _same_scene(small[at], small[at + 1])


def _same_scene(one: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    """Whether two small pictures have the same bright and dark places; of an even picture nobody can tell."""
    a, b = (picture.mean(axis=-1).ravel() for picture in (one, other))
    if min(a.std(), b.std()) < 2:
        return False
    return float(np.corrcoef(a, b)[0, 1]) > _ALIKE


def _small(frame: NDArray[np.uint8]) -> NDArray[np.float64]:
    import PIL.Image

    small = PIL.Image.fromarray(frame).resize((_SIDE, _SIDE), PIL.Image.Resampling.BOX)
    return np.asarray(small).astype(np.float64)
