"""Motion and appearance cues as arrays: what the conditioner stage is fed (reference: unet_higen.py, spec section 3).

The motion cue of a pair of frames is 10 times the L2 distance of their latents; the appearance cue of frame i is its
similarity to 32 relative positions of the clip (design, section 9).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from higen.errors import RequestError

__all__ = [
    "Appearance",
    "Motion",
    "appearance_cue",
    "appearance_rows",
    "frequencies",
    "motion_cue",
    "motion_values",
    "resample_in_time",
    "sinusoid",
]

Array = NDArray[np.float32]
Motion: TypeAlias = "float | Sequence[float] | NDArray[np.floating] | None"
Appearance: TypeAlias = "float | Sequence[float] | Sequence[Sequence[float]] | NDArray[np.floating] | None"


def sinusoid(values: NDArray[np.generic] | Sequence[float], dim: int) -> Array:
    """Sinusoidal embedding, float32 [..., dim]: cosines first, then sines; frequencies 10000^(-k / (dim/2)).

    Computed in float32 as the reference does; an odd `dim` is padded with a zero.
    """
    angles = np.asarray(values, dtype=np.float32)[..., None] * frequencies(dim)
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    return np.pad(table, [(0, 0)] * (table.ndim - 1) + [(0, dim % 2)])


def frequencies(dim: int) -> Array:
    """Angular frequencies of `sinusoid`, float32 [dim // 2]."""
    half = dim // 2
    exponent = -np.arange(half, dtype=np.float32) / np.float32(half)
    return np.power(10000.0, exponent.astype(np.float64)).astype(np.float32)


def resample_in_time(vectors: Array, frames: int) -> Array:
    """Linear resampling along axis -2 to `frames` rows: source position (i + .5) n/frames - .5, clamped at the ends."""
    n = vectors.shape[-2]
    if n == frames:
        return vectors
    position = np.clip((np.arange(frames) + 0.5) * (n / frames) - 0.5, 0.0, n - 1.0)
    lower = np.floor(position).astype(np.int64)
    upper = np.minimum(lower + 1, n - 1)
    weight = (position - lower).astype(np.float32)[:, None]
    resampled: Array = vectors[..., lower, :] * (1 - weight) + vectors[..., upper, :] * weight
    return resampled.astype(np.float32)


def _numbers(name: str, value: Any, allowed: str) -> NDArray[np.float64]:
    """Numbers as float64, each finite in float32 too; texts and truth values are none. Raises RequestError."""
    try:
        given = np.asarray(value)
    except ValueError:  # rows of different lengths
        raise RequestError(f"{name}={value!r}: {allowed}") from None
    if given.dtype.kind not in "iuf" or not np.all(np.abs(given) <= np.finfo(np.float32).max):
        raise RequestError(f"{name}={value!r}: {allowed}")
    return given.astype(np.float64)


def motion_values(motion: float | Sequence[float] | NDArray[np.floating], frames: int) -> Array:
    """The motion cue as one number per pair of frames ([frames - 1]) or per frame ([frames]), float32.

    One number is repeated for every pair. Raises RequestError for another length, negative or non-finite values.
    """
    allowed = f"one number, {frames - 1} (one per pair of frames) or {frames} (one per frame), each finite and >= 0"
    values = _numbers("motion", motion, allowed).astype(np.float32)
    if values.ndim == 0:
        values = np.repeat(values, max(frames - 1, 1))
    if values.ndim != 1 or len(values) not in (max(frames - 1, 1), frames):
        raise RequestError(f"motion has shape {list(values.shape)}: {allowed}")
    if np.any(values < 0):
        raise RequestError(f"motion={motion!r}: {allowed}")
    return values


def motion_cue(motion: Motion, frames: int, dim: int) -> Array:
    """The conditioner's motion input, float32 [frames, dim]: sinusoids, resampled in time *after* the sinusoid.

    None (for models trained with cue dropout) is a row of zeros, which no value of the cue gives.
    """
    if motion is None:
        return np.zeros((frames, dim), dtype=np.float32)
    return resample_in_time(sinusoid(motion_values(motion, frames), dim), frames)


def _distance(frames: int, columns: int) -> NDArray[np.float64]:
    """|i/(frames-1) - k/(columns-1)| for frame i and column k; a single frame stands at every position at once."""
    if frames == 1:
        return np.zeros((1, columns))
    return np.abs(np.linspace(0, 1, frames)[:, None] - np.linspace(0, 1, columns)[None, :])


def appearance_rows(
    appearance: float | Sequence[float] | Sequence[Sequence[float]] | NDArray[np.floating], frames: int, columns: int
) -> Array:
    """The appearance cue as a matrix, float32 [frames, columns]: wanted similarity of frame i to position k.

    One factor a gives 1 - a |i/(frames-1) - k/(columns-1)| (0: a still appearance, 1: the ends differ wholly); one
    factor per frame gives each row its own. A matrix [frames, columns] is taken as it is; a frame-to-frame matrix
    [frames, frames] is resampled to the columns. Raises RequestError for other shapes and non-finite values.
    """
    allowed = f"one number, {frames} numbers, or a matrix [{frames}, {columns}] or [{frames}, {frames}], each finite"
    values = _numbers("appearance", appearance, allowed)
    if values.ndim == 0 or values.shape == (frames,):
        factor = np.broadcast_to(values, (frames,))[:, None]
        return (1.0 - factor * _distance(frames, columns)).astype(np.float32)
    if values.shape == (frames, columns):
        return values.astype(np.float32)
    if values.shape == (frames, frames):
        source, target = np.linspace(0, 1, frames), np.linspace(0, 1, columns)
        return np.stack([np.interp(target, source, row) for row in values]).astype(np.float32)
    raise RequestError(f"appearance has shape {list(values.shape)}: {allowed}")


def appearance_cue(appearance: Appearance, frames: int, columns: int) -> Array:
    """The conditioner's appearance input, float32 [frames, columns].

    None (for models trained with cue dropout) tells each frame its place alone: minus the distance to each column,
    which differs from every factor by the missing 1 at a frame's own place.
    """
    if appearance is None:
        return (-_distance(frames, columns)).astype(np.float32)
    return appearance_rows(appearance, frames, columns)
