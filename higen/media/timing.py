"""Timing of frames: a steady rate for uneven times, and whole strides between rates that do not divide evenly."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from higen.errors import OutputError

__all__ = ["effective_rate", "last_gap", "steady_plan"]

MAX_RATE = 60.0
"""Maximum rate, in frames a second, to which uneven times are resampled."""

MOST = 100_000
"""Maximum number of frames to which uneven times are resampled."""

WHOLE = 3.0
"""Below this ratio of a video's rate to the wanted rate, whole strides are taken. Otherwise strides would alternate
between one and two frames, or two and three, and would be measured as motion. From this ratio on, the frame that is due
is taken."""

_EVEN = 0.1  # tolerance, as part of a gap
_NEAR = 0.5  # tolerance, as part of a frame


def last_gap(times: NDArray[np.float64]) -> float:
    """Duration in seconds of the last frame if the file has none: the median of the others; 0 if it is the only one."""
    gaps = np.diff(times)
    gaps = gaps[gaps > 0]
    return float(np.median(gaps)) if len(gaps) else 0.0


def steady_plan(times: NDArray[np.float64], end: float) -> tuple[NDArray[np.int64], float]:
    """Which frames to show at a steady rate: indices int64 [m], ascending, and the rate (0: unknown).

    times   start of each frame in seconds, ascending
    end     end of the last frame

    If each frame is within half a frame of its place at the mean rate, every frame is taken once. Otherwise the rate is
    chosen so that all gaps are whole multiples of its period, at most 60 frames a second, and each moment gets the
    frame shown then. The duration is kept. Raises OutputError if this needs more than MOST frames.
    """
    count, span = len(times), end - float(times[0])
    every = np.arange(count, dtype=np.int64)
    if span <= 0:
        return every, 0.0
    places = times[0] + every * (span / count)
    if np.abs(times - places).max() <= _NEAR * span / count + 1e-6:
        return every, _rounded(count / span)
    gaps = np.diff(np.append(times, end))
    unit = _common(gaps[gaps > 1e-6])
    shown = max(1, round(span / unit))
    if shown > MOST:
        raise OutputError(f"its {count} frames are spread unevenly over {span:.0f} s: at most {MOST} frames are made")
    moments = times[0] + (np.arange(shown) + 0.5) * (span / shown)
    return np.searchsorted(times, moments, side="right").astype(np.int64) - 1, _rounded(shown / span)


def effective_rate(times: NDArray[np.float64], fps: float) -> float:
    """The actual sampling rate for a clip of `fps` frames a second. In a steady video, every n-th frame is sampled.

    The result is `fps` if the video is not steady, or if its rate is at least three times or below half of `fps`.
    """
    gap = last_gap(times)
    gaps = np.diff(times)
    if not gap or np.mean(np.abs(gaps - gap) <= 0.25 * gap) < 0.9:
        return fps
    ratio = 1 / (gap * fps)
    if ratio >= WHOLE or ratio < 0.5:
        return fps
    # More exact than the rate from one gap, because gaps are rounded to the container's clock.
    rate = float(np.rint(gaps / gap).sum()) / float(times[-1] - times[0])
    return rate / max(1, int(ratio + 0.5))


def _common(gaps: NDArray[np.float64]) -> float:
    """The longest period such that all gaps are nearly whole multiples of it; 1/60 s if it would be shorter."""
    shortest = max(float(gaps.min()), 1 / MAX_RATE)
    for parts in range(1, 5):
        unit = shortest / parts
        if unit < 0.999 / MAX_RATE:
            break
        counts = gaps / unit
        if (np.abs(counts - np.rint(counts)) <= _EVEN).all():
            return unit
    return 1 / MAX_RATE


def _rounded(rate: float) -> float:
    """A rate rounded to seven digits, which removes rounding errors of the division."""
    return float(f"{rate:.7g}")
