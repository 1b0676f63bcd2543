"""Edges of a picture: Canny's detector in integer arithmetic. ControlNets for edges were trained on such pictures.

Canny 1986, with the choices of OpenCV's `Canny(picture, 100, 200)`: Sobel's 3x3 kernels with a repeated border,
|x| + |y| as the length of a gradient, the colour channel with the longest gradient at each point, and no blur first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["HIGH", "LOW", "edges"]

LOW, HIGH = 100, 200
"""Lengths of the gradient. All points of an edge are above LOW, and at least one is above HIGH."""

_SHIFT = 15
_TAN = round(0.4142135623730950488 * 2**_SHIFT)
"""The tangent of 22.5 degrees in units of 2^-15."""


def edges(picture: NDArray[np.uint8], low: int = LOW, high: int = HIGH) -> NDArray[np.uint8]:
    """The edges of a picture uint8 [H,W,3]: white on black, uint8 [H,W,3]."""
    across, down = _gradient(picture.astype(np.int32))
    length = np.abs(across) + np.abs(down)
    longest = length.argmax(axis=2)[..., None]
    x, y = (np.take_along_axis(part, longest, axis=2)[..., 0] for part in (across, down))
    thin = _peaks(x, y, np.abs(x) + np.abs(y), low)
    strong = thin & (np.abs(x) + np.abs(y) > high)
    found: NDArray[np.uint8] = np.where(_connected(strong, thin), 255, 0).astype(np.uint8)
    return np.repeat(found[..., None], 3, axis=2)


def _gradient(pixels: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Sobel's gradients in the directions right and down, [H,W,3] each."""
    wide = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    right = wide[:, 2:] - wide[:, :-2]
    smooth = wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]
    return right[:-2] + 2 * right[1:-1] + right[2:], smooth[2:] - smooth[:-2]


def _peaks(x: NDArray[np.int32], y: NDArray[np.int32], length: NDArray[np.int32], low: int) -> NDArray[np.bool_]:
    """Points above `low` with a longer gradient than both neighbours in its direction (non-maximum suppression).

    Of equal neighbours in a row or column, the first one is kept. Outside the picture, the length is 0.
    """
    height, width = length.shape
    around = np.pad(length, 1)

    def at(down: int, right: int) -> NDArray[np.int32]:
        return around[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    tall, flat = np.abs(y).astype(np.int64) << _SHIFT, np.abs(x).astype(np.int64) * _TAN
    steep = flat + (np.abs(x).astype(np.int64) << (_SHIFT + 1))
    row = (length > at(0, -1)) & (length >= at(0, 1))
    column = (length > at(-1, 0)) & (length >= at(1, 0))
    falling = (length > at(-1, -1)) & (length > at(1, 1))
    rising = (length > at(-1, 1)) & (length > at(1, -1))
    diagonal = np.where((x ^ y) < 0, rising, falling)
    peak = np.where(tall < flat, row, np.where(tall > steep, column, diagonal))
    return (length > low) & peak


def _connected(strong: NDArray[np.bool_], thin: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The points of `thin` that are connected to a point of `strong` by neighbours in `thin` (8 directions)."""
    height, width = thin.shape
    open_ones = np.pad(thin, 1).ravel()  # with a border of False, where every path ends
    line = width + 2
    steps = np.array([-line - 1, -line, -line + 1, -1, 1, line - 1, line, line + 1])
    found = np.zeros_like(open_ones)
    front = np.flatnonzero(np.pad(strong, 1))
    while len(front):
        found[front] = True
        open_ones[front] = False
        around = (front[:, None] + steps).ravel()
        front = np.unique(around[open_ones[around]])
    return found.reshape(height + 2, line)[1:-1, 1:-1]
