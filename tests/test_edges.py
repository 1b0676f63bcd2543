"""Edges, compared with a second, pointwise Canny detector and with OpenCV's result for a drawn example."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from higen.edges import edges

Picture = NDArray[np.uint8]


def pictures_for_edges() -> list[Picture]:
    """Noise, blocks, slopes and lines of several sizes, starting with a single pixel."""
    random = np.random.default_rng(4)
    made: list[Picture] = [random.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((1, 1), (1, 7), (9, 2), (24, 17))]
    made += [p.repeat(2, axis=0).repeat(3, axis=1) for p in made[-2:]]
    y, x = np.mgrid[:30, :40]
    for slope in (0.0, 0.3, 1.0, 2.5, -0.7):
        side = y - 15 > slope * (x - 20)
        made.append(np.where(side[..., None], (250, 40, 90), (10, 30, 200)).astype(np.uint8))
        made.append(np.clip(6 * (y - slope * x)[..., None] * (1, -1, 2) % 256, 0, 255).astype(np.uint8))
    return made


def by_points(picture: Picture, low: int = 100, high: int = 200) -> Picture:
    """Canny's detector with OpenCV's choices, one point after another, in integers."""
    height, width, _ = picture.shape
    wide = np.pad(picture.astype(int), ((1, 1), (1, 1), (0, 0)), mode="edge")
    sobel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    gradient = {}
    for i, j in np.ndindex(height, width):
        part = wide[i : i + 3, j : j + 3]
        pairs = [(int((part[..., c] * sobel).sum()), int((part[..., c] * sobel.T).sum())) for c in range(3)]
        gradient[i, j] = max(pairs, key=lambda pair: abs(pair[0]) + abs(pair[1]))
    length = {place: abs(x) + abs(y) for place, (x, y) in gradient.items()}
    thin, front = set(), []
    for (i, j), (x, y) in gradient.items():
        own = length[i, j]
        at = lambda di, dj, i=i, j=j: length.get((i + di, j + dj), 0)  # type: ignore[misc]  # noqa: E731
        if abs(y) * 2**15 < abs(x) * 13573:  # within 22.5 degrees of a row
            peak = own > at(0, -1) and own >= at(0, 1)
        elif abs(y) * 2**15 > abs(x) * (13573 + 2**16):
            peak = own > at(-1, 0) and own >= at(1, 0)
        else:
            side = 1 if (x < 0) != (y < 0) else -1
            peak = own > at(-1, side) and own > at(1, -side)
        if own > low and peak:
            thin.add((i, j))
            front += [(i, j)] if own > high else []
    found = np.zeros_like(picture)
    while front:
        i, j = front.pop()
        if (i, j) in thin:
            thin.remove((i, j))
            found[i, j] = 255
            front += [(i + di, j + dj) for di in (-1, 0, 1) for dj in (-1, 0, 1)]
    return found


@pytest.mark.parametrize("i", range(len(pictures_for_edges())))
def test_edges_equal_a_pointwise_detector(i: int) -> None:
    picture = pictures_for_edges()[i]
    np.testing.assert_array_equal(edges(picture), by_points(picture))


def test_a_box_has_a_thin_outline() -> None:
    """As in OpenCV 5.0, a bright box's outline is one point wide. It lies outside the box above and on the left."""
    picture = np.zeros((12, 12, 3), np.uint8)
    picture[4:8, 4:8] = 255
    found = edges(picture)[..., 0] == 255
    assert found.any(axis=1).tolist() == [3 <= i <= 7 for i in range(12)]
    assert not found[5:7, 5:7].any()
    assert edges(np.full((12, 12, 3), 77, np.uint8)).max() == 0
