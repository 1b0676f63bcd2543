"""The video that the GPU tests compare, and measures of the difference between two videos."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import higen

Frames = NDArray[np.uint8]

PROMPT = "a red heart beating at night"


def video(pipe: higen.Pipeline, **options: Any) -> Frames:
    """A video of the built-in model."""
    return pipe(PROMPT, **{"steps": 10, "seed": 3, "progress": False, **options}).frames


def on_the_cpu(**options: Any) -> Frames:
    """The same video by ONNX Runtime on the CPU."""
    with higen.load(backend="onnx", device="cpu") as pipe:
        return video(pipe, **options)


def psnr(a: Frames, b: Frames) -> float:
    """Peak signal-to-noise ratio of two clips in dB."""
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return float("inf") if not error else float(10 * np.log10(255**2 / error))


def largest(a: Frames, b: Frames) -> int:
    """The largest difference between two clips, in units of 1/255."""
    return int(np.abs(a.astype(int) - b).max())
