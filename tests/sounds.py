"""Sounds for tests, as samples and as WAV files."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["RATE", "beats", "write_wav"]

RATE = 8000


def beats(seconds: float, at: tuple[float, ...], rate: int = RATE) -> NDArray[np.float64]:
    """Decaying tones of 440 Hz that start at these seconds; float64 [n], within -1 to 1."""
    time = np.arange(round(seconds * rate)) / rate
    heard = [(time >= start) * np.exp(-12 * np.maximum(time - start, 0)) for start in at]
    return 0.4 * np.sum(heard, axis=0) * np.sin(2 * np.pi * 440 * time) if heard else np.zeros(len(time))


def write_wav(path: Path, samples: NDArray[np.float64], rate: int = RATE, width: int = 2) -> Path:
    """Samples [n] or [n, channels] from -1 to 1 as a WAV file with `width` bytes per sample."""
    shaped = samples[:, None] if samples.ndim == 1 else samples
    with wave.open(str(path), "wb") as file:
        file.setnchannels(shaped.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        if width == 1:
            data = np.rint(shaped * 127 + 128).astype(np.uint8).tobytes()
        else:
            whole = np.rint(shaped * (2 ** (8 * width - 1) - 1)).astype("<i8")
            data = whole.reshape(-1, 1).view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
        file.writeframes(data)
    return path
