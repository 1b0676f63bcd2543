"""Draws curves over time: the measured values together with the requested ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from higen.errors import HigenError, OutputError
from higen.output_file import output_file

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

__all__ = ["Panel", "draw", "save"]

_WIDTH, _HEIGHT, _MARGIN = 640, 180, 46
MEASURED, REQUESTED = "#1f77b4", "#ff7f0e"


@dataclass(frozen=True, eq=False)
class Panel:
    """A curve: one number per frame, or one per pair of frames. A pair's number is drawn at the later frame.

    requested   the requested curve, in the same form; empty if there is none
    """

    name: str
    measured: NDArray[np.float64]
    requested: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))


def draw(panels: Sequence[Panel], frames: int, fps: float) -> Image.Image:
    """The panels of a clip, one below the other, as a PIL RGB image 640 pixels wide."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (_WIDTH, len(panels) * _HEIGHT), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    seconds = max(frames - 1, 1) / fps
    for row, panel in enumerate(panels):
        top, bottom = row * _HEIGHT + 24, (row + 1) * _HEIGHT - 24
        both = np.concatenate([panel.measured, panel.requested])
        low, high = min(0.0, float(both.min())), float(both.max())
        high = high if high > low else low + 1.0
        draw.text((_MARGIN, top - 18), f"{panel.name}, {fps:g} frames a second", "black", font)
        if len(panel.requested):
            draw.text((_WIDTH - _MARGIN - 150, top - 18), "measured", MEASURED, font)
            draw.text((_WIDTH - _MARGIN - 80, top - 18), "requested", REQUESTED, font)
        draw.line([(_MARGIN, top), (_MARGIN, bottom), (_WIDTH - _MARGIN, bottom)], "gray")
        for value, place in ((high, top), (low, bottom)):
            draw.text((4, place - 6), f"{value:.4g}", "gray", font)
        draw.text((_WIDTH - _MARGIN - 24, bottom + 4), f"{seconds:.2f} s", "gray", font)
        for values, colour in ((panel.requested, REQUESTED), (panel.measured, MEASURED)):
            first = frames - len(values)
            x = _MARGIN + (np.arange(len(values)) + first) / fps / seconds * (_WIDTH - 2 * _MARGIN)
            y = bottom - (values - low) / (high - low) * (bottom - top)
            _line(draw, list(zip(x.tolist(), y.tolist(), strict=True)), colour)
    return picture


def _line(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], colour: str) -> None:
    if len(points) > 1:
        draw.line(points, colour, 2)
    for x, y in points:
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), colour)


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture. Raises OutputError if it cannot be written."""
    try:
        with output_file(path) as temporary:
            picture.save(temporary)
    except HigenError:
        raise
    except (OSError, ValueError) as error:  # ValueError: an unknown suffix
        raise OutputError(f"{path}: cannot be written: {error}") from error
