"""Encodings: turn a control's value into the array that a stage takes (docs/manifest.md, "controls").

A curve is a number per frame, or per pair of frames. `sinusoid` is the reference's embedding of HiGen's motion cue
(unet_higen.py, spec section 3); `similarity` is the wanted similarity of a frame to relative positions of the clip
(docs/design.md, section 9).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from higen.errors import RequestError, quoted

__all__ = [
    "Curve",
    "check_numbers",
    "curve_rows",
    "curve_values",
    "frequencies",
    "measured_curve",
    "resample_in_time",
    "similarity_rows",
    "sinusoid",
    "sinusoid_rows",
]

Array = NDArray[np.float32]
Curve: TypeAlias = "float | Sequence[float] | Sequence[Sequence[float]] | NDArray[np.floating] | None"
"""None is "unspecified"; only models that were trained for it accept it."""


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


def check_numbers(name: str, value: Any, allowed: str) -> NDArray[np.float64]:
    """Numbers as float64, each finite in float32 too. Raises RequestError for anything else: texts, booleans, ..."""
    try:
        given = np.asarray(value)
    except (ValueError, TypeError, RuntimeError):  # rows of different lengths; GPU tensors
        raise RequestError(f"{name}={quoted(value)}: {allowed}") from None
    if given.dtype.kind not in "iuf" or _has_truth(value) or not np.all(np.abs(given) <= np.finfo(np.float32).max):
        raise RequestError(f"{name}={quoted(value)}: {allowed}")
    return given.astype(np.float64)


def _has_truth(value: Any) -> bool:
    """Whether a value contains a boolean, which numpy would take for 1 or 0."""
    if isinstance(value, (list, tuple)):
        return any(map(_has_truth, value))
    return isinstance(value, (bool, np.bool_))


def curve_values(name: str, value: Curve, frames: int, low: float | None = None, high: float | None = None) -> Array:
    """A curve as one number per pair of frames ([frames - 1]) or per frame ([frames]), float32.

    A single number is repeated for every pair. Raises RequestError for another length, and for values that are not
    finite or outside `low` to `high`.
    """
    limits = "" if low is None else f" and >= {low:g}"
    limits += "" if high is None else f" and <= {high:g}"
    allowed = (
        f"one number, {max(frames - 1, 1)} (one per pair of frames) or {frames} (one per frame), each finite{limits}"
    )
    values = check_numbers(name, value, allowed).astype(np.float32)
    if values.ndim == 0:
        values = np.repeat(values, max(frames - 1, 1))
    if values.ndim != 1 or len(values) not in (max(frames - 1, 1), frames):
        raise RequestError(f"{name} has shape {list(values.shape)}: {allowed}")
    if (low is not None and np.any(values < low)) or (high is not None and np.any(values > high)):
        raise RequestError(f"{name}={quoted(value)}: {allowed}")
    return values


def curve_rows(values: Array, frames: int) -> Array:
    """A curve per frame or pair of frames as one number per frame, float32 [frames]."""
    return resample_in_time(values[:, None], frames)[:, 0]


def sinusoid_rows(values: Array | None, frames: int, dim: int) -> Array:
    """A curve as sinusoids, float32 [frames, dim], resampled in time *after* the sinusoid.

    None (for models trained with cue dropout) gives rows of zeros; no value of a curve gives such a row.
    """
    if values is None:
        return np.zeros((frames, dim), dtype=np.float32)
    return resample_in_time(sinusoid(values, dim), frames)


def _distance(frames: int, columns: int) -> NDArray[np.float64]:
    """|i/(frames-1) - k/(columns-1)| for frame i and column k; 0 for a single frame."""
    if frames == 1:
        return np.zeros((1, columns))
    return np.abs(np.linspace(0, 1, frames)[:, None] - np.linspace(0, 1, columns)[None, :])


def similarity_rows(name: str, value: Curve, frames: int, columns: int) -> Array:
    """Wanted similarity of frame i to position k of the clip, float32 [frames, columns].

    A factor a gives 1 - a |i/(frames-1) - k/(columns-1)| (0: the appearance does not change, 1: first and last frame
    are completely different). There is one factor for all rows, or one per frame. A matrix [frames, columns] is used
    directly; a frame-to-frame matrix [frames, frames] is resampled to the columns. None (for models trained with cue
    dropout) gives only each frame's position: minus the distance to each column. At a frame's own position this is 0,
    and a factor gives 1 there, so the model can tell them apart. Raises RequestError for other shapes and non-finite
    values.
    """
    if value is None:
        return (-_distance(frames, columns)).astype(np.float32)
    allowed = f"one number, {frames} numbers, or a matrix [{frames}, {columns}] or [{frames}, {frames}], each finite"
    values = check_numbers(name, value, allowed)
    if values.ndim == 0 or values.shape == (frames,):
        factor = np.broadcast_to(values, (frames,))[:, None]
        return (1.0 - factor * _distance(frames, columns)).astype(np.float32)
    if values.shape == (frames, columns):
        return values.astype(np.float32)
    if values.shape == (frames, frames):
        source, target = np.linspace(0, 1, frames), np.linspace(0, 1, columns)
        return np.stack([np.interp(target, source, row) for row in values]).astype(np.float32)
    raise RequestError(f"{name} has shape {list(values.shape)}: {allowed}")


def measured_curve(measure: str, latents: NDArray[np.float32]) -> NDArray[np.float64]:
    """The value of a curve that a clip itself has, from its latents [C, F, H, W].

    distance    10 times the L2 distance of neighbouring frames, rounded down: [F - 1]
    similarity  5 cos - 4 of each pair of frames (1: equal, 0 where the cosine is 0.8): [F, F]

    Source: HiGen's cues as its training measures them (higen/train/cues.py).
    """
    frames = latents.astype(np.float64).swapaxes(0, 1).reshape(latents.shape[1], -1)
    if measure == "distance":
        distances: NDArray[np.float64] = np.floor(10 * np.linalg.norm(np.diff(frames, axis=0), axis=1))
        return distances
    unit = frames / np.maximum(np.linalg.norm(frames, axis=1, keepdims=True), 1e-12)
    similarity: NDArray[np.float64] = 5 * (unit @ unit.T) - 4
    return similarity
