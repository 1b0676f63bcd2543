"""Times of frames: a steady rate for uneven times, and whole strides for rates that do not divide each other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from higen.errors import OutputError

__all__ = ["effective_rate", "last_gap", "steady_plan"]

MAX_RATE = 60.0
"""Frames a second that uneven times are resampled to at most."""

MOST = 100_000
"""Frames that uneven times are resampled to at most."""

WHOLE = 3.0
"""Below this ratio of a video's rate to the wanted one whole strides are taken: beats between one and two frames, or
two and three, would be measured as motion. Beyond it the frame that is due is taken."""

_EVEN = 0.1  # of a gap
_NEAR = 0.5  # of a frame


def last_gap(times: NDArray[np.float64]) -> float:
    """Seconds that the last frame is shown where the file does not say: as most of the others; 0 for one frame."""
    gaps = np.diff(times)
    gaps = gaps[gaps > 0]
    return float(np.median(gaps)) if len(gaps) else 0.0


def steady_plan(times: NDArray[np.float64], end: float) -> tuple[NDArray[np.int64], float]:
    """Which frames to show at a steady rate: indices int64 [m], ascending, and the rate (0: the file does not say).

    times   seconds at which each frame begins to be shown, ascending
    end     when the last one ends

    Where each frame is within half a frame of its place at the mean rate, all are taken once. Else the rate is one
    that the gaps are whole multiples of, at most 60 a second, and for each moment the frame shown then is taken. The
    duration is kept. Raises OutputError for a duration that is none.
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
    """The rate that a clip of `fps` frames a second is really sampled at: a whole stride of a steady video's frames.

    A video whose frames do not follow each other steadily, or more than three times as fast, gives `fps` itself.
    """
    gap = last_gap(times)
    gaps = np.diff(times)
    if not gap or np.mean(np.abs(gaps - gap) <= 0.25 * gap) < 0.9:
        return fps
    ratio = 1 / (gap * fps)
    if ratio >= WHOLE or ratio < 0.5:
        return fps
    # More exact than one gap, which is rounded to the container's clock.
    rate = float(np.rint(gaps / gap).sum()) / float(times[-1] - times[0])
    return rate / max(1, int(ratio + 0.5))


def _common(gaps: NDArray[np.float64]) -> float:
    """The longest time that all gaps are nearly whole multiples of; 1/60 s if it would be shorter."""
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
    """A rate without the noise of its division, to seven digits."""
    return float(f"{rate:.7g}")
