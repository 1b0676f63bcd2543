"""Random numbers. They are part of the contract: the same seed gives the same noise on every runtime.

One stream per sample and purpose: Philox4x64-10 (Salmon et al. 2011; numpy's `Philox`) with key (seed, purpose) and
counter 0. Its 64-bit outputs are taken in pairs (a, b) and turned into two normal numbers by Box and Muller, in
float64:

    r = sqrt(-2 log(((a >> 11) + 1) 2^-53)),   w = 2 pi (b >> 11) 2^-53,   (r cos w, r sin w)

then rounded to float32. numpy increments the counter before its first block, so the first block has counter 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["again", "frame_noise", "frame_order", "normal", "offset_noise", "row_purpose", "shaped"]


def normal(seed: int, purpose: int, count: int) -> NDArray[np.float32]:
    """`count` standard normal numbers, float32, of the stream (seed, purpose); both 0 to 2^64 - 1."""
    raw = np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64)).random_raw(count + count % 2)
    a, b = (raw >> np.uint64(11)).reshape(-1, 2).T.astype(np.float64)
    radius = np.sqrt(-2.0 * np.log((a + 1.0) * 2.0**-53))
    angle = 2.0 * np.pi * 2.0**-53 * b
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs.reshape(-1)[:count].astype(np.float32)


def frame_noise(seed: int, purpose: int, channels: int, frames: int, height: int, width: int) -> NDArray[np.float32]:
    """Noise of one sample, float32 [C, F, H, W]. It is drawn frame by frame, so the first frames do not depend on F."""
    flat = normal(seed, purpose, frames * channels * height * width)
    return np.ascontiguousarray(flat.reshape(frames, channels, height, width).transpose(1, 0, 2, 3))


def offset_noise(seed: int, purpose: int, channels: int, frames: int) -> NDArray[np.float32]:
    """Noise that is constant within each frame, float32 [C, F, 1, 1] (HiGen's training: strength 0.1)."""
    flat = normal(seed, purpose, frames * channels)
    return np.ascontiguousarray(flat.reshape(frames, channels).T)[:, :, None, None]


def shaped(seed: int, purpose: int, shape: Sequence[int], frame_axis: int | None = None) -> NDArray[np.float32]:
    """Noise of any shape, float32, drawn with the last axis fastest; with a frame axis, drawn frame by frame."""
    order = list(range(len(shape)))
    if frame_axis is not None:
        order = [frame_axis, *(axis for axis in order if axis != frame_axis)]
    drawn = normal(seed, purpose, math.prod(shape)).reshape([shape[axis] for axis in order])
    return np.ascontiguousarray(drawn.transpose(np.argsort(order)))


def row_purpose(purpose: int, row: int) -> int:
    """The stream of the fresh noise in a solver's row (from 0); `purpose`: the stream of the loop's initial noise."""
    return purpose + ((row + 1) << 32)


def again(purpose: int, iteration: int) -> int:
    """The stream that replaces `purpose` in iteration number `iteration` (from 0) of a loop that is run repeatedly."""
    return purpose + (iteration << 56)


def frame_order(
    seed: int, purpose: int, frames: int, length: int, stride: int, kind: str = "shuffled"
) -> NDArray[np.int64]:
    """For each frame of a long clip, the frame with its noise, int64 [frames] (Qiu et al. 2024, FreeNoise, equation 7).

    fresh     each frame has its own noise
    shuffled  the first `length` frames have their own noise; each following group of `stride` frames takes the noise of
              the frames `length` earlier, in an order drawn from the stream (seed, purpose + 2^31)
    repeated  the noise of the first `length` frames is repeated
    """
    order = np.arange(frames)
    if kind == "fresh" or frames <= length:
        return order
    if kind == "repeated":
        return order % length
    starts = range(length, frames, stride)
    key = np.array([seed, purpose + 2**31], dtype=np.uint64)
    drawn = np.random.Philox(key=key).random_raw(len(starts) * stride).reshape(-1, stride)
    for start, numbers in zip(starts, drawn, strict=True):
        places = start - length + np.argsort(numbers, kind="stable")
        order[start : start + stride] = order[places][: frames - start]
    return order
