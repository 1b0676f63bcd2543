"""Frames that a request gives by index: checks the indices, puts frames at their places, averages a mask over cells."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen.errors import RequestError, quoted

__all__ = ["as_video", "by_frame", "latent_mask", "placed", "spread"]

_INDEX = re.compile(r"-?\d{1,6}")


def by_frame(name: str, value: object, frames: int) -> dict[int, Any]:
    """The pictures of known frames, by index and in order; the keys are from 0 to `frames` - 1.

    `value`: pictures by index. An index is a whole number or its digits; it counts from 0, or backwards from -1 (the
    last frame). Raises RequestError, beginning with `name`, if `value` is not a mapping of this kind, for an index that
    the clip does not have, and for two indices of one frame.
    """
    if not isinstance(value, Mapping) or not value:
        wanted = "a picture for each known frame, by its index: {0: 'first.png', -1: 'last.png'}"
        raise RequestError(f"{name}={quoted(value)}: {wanted}")
    found: dict[int, Any] = {}
    for key, picture in value.items():
        index = _index(name, key)
        if not -frames <= index < frames:
            allowed = f"0 to {frames - 1}, or -1 to {-frames} from the end"
            raise RequestError(f"{name}: frame {index}: the clip has {frames} frames: {allowed}")
        place = index % frames
        if place in found:
            raise RequestError(f"{name}: frame {index}: frame {place} is given twice; one picture for each frame")
        found[place] = picture
    return dict(sorted(found.items()))


def _index(name: str, key: object) -> int:
    if isinstance(key, str) and _INDEX.fullmatch(key):
        return int(key)
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        return int(key)
    raise RequestError(f"{name}: frame {quoted(key)}: the index of a frame, a whole number")


def as_video(frames: NDArray[Any]) -> NDArray[Any]:
    """Single frames [N, C, H, W] as one clip [1, C, N, H, W]."""
    return np.ascontiguousarray(frames.swapaxes(0, 1))[None]


def placed(values: NDArray[Any], places: Sequence[int], frames: int, elsewhere: float = 0.0) -> NDArray[np.float32]:
    """Values of n frames [1, C, n, ...] at their `places` in a clip: float32 [1, C, frames, ...], else `elsewhere`.
    Places from `frames` on are left out.
    """
    made = np.full((*values.shape[:2], frames, *values.shape[3:]), elsewhere, np.float32)
    kept = [i for i, place in enumerate(places) if place < frames]
    made[:, :, [places[i] for i in kept]] = values[:, :, kept]
    return made


def spread(latents: NDArray[Any], frames: int) -> NDArray[Any]:
    """Latents [B,C,1,H,W] of a picture repeated for all frames; latents of a clip unchanged."""
    return latents.repeat(frames, axis=2) if latents.shape[2] == 1 else latents


def latent_mask(bright: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    """The mean of a mask [n, Y, X] over each latent cell: [n, Y / factor, X / factor]."""
    n, height, width = bright.shape
    cells = bright.reshape(n, height // factor, factor, width // factor, factor)
    means: NDArray[np.float32] = cells.mean(axis=(2, 4), dtype=np.float64).astype(np.float32)
    return means
