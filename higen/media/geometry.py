"""Turns a decoded frame into the picture that players show: pixel aspect, rotation, mirroring, alpha over white."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen.errors import OutputError
from higen.media.files import check_pixels
from higen.media.pictures import over_white

__all__ = ["oriented", "pixel_aspect", "shown"]

_WIDEST = 16


def pixel_aspect(stream: Any) -> Fraction:
    """Width of a stored pixel divided by its height; 1 if the file has none. Raises OutputError for an absurd value."""
    found = stream.sample_aspect_ratio
    if not found or found <= 0:
        return Fraction(1)
    aspect = Fraction(found)
    if not Fraction(1, _WIDEST) <= aspect <= _WIDEST:
        raise OutputError(f"its pixels are {aspect} as wide as high: 1/{_WIDEST} to {_WIDEST}")
    return aspect


def shown(frame: Any, aspect: Fraction) -> NDArray[np.uint8]:
    """A PyAV frame as uint8 [H,W,3]. Raises OutputError for an absurd size."""
    check_pixels(frame.width, frame.height)
    width = max(1, round(frame.width * aspect))
    check_pixels(width, frame.height)
    if any(component.is_alpha for component in frame.format.components):
        picture = over_white(frame.to_ndarray(format="rgba"))
    else:
        picture = frame.to_ndarray(format="rgb24")
    if width != frame.width:
        import PIL.Image

        wide = PIL.Image.fromarray(picture).resize((width, frame.height), PIL.Image.Resampling.BICUBIC)
        picture = np.asarray(wide)
    return oriented(picture, _display_matrix(frame))


def oriented(picture: NDArray[np.uint8], matrix: tuple[int, ...]) -> NDArray[np.uint8]:
    """A picture [H,W,3] rotated and mirrored by a display matrix (libavutil/display.h), to the nearest quarter turn.

    The matrix maps the stored pixel (x, y) to (a x + c y, b x + d y), with y pointing down. a, b, c and d are the
    matrix's elements 0, 1, 3 and 4.
    """
    a, b, c, d = (matrix[i] for i in (0, 1, 3, 4))
    if abs(a) + abs(d) >= abs(b) + abs(c):
        across, down = a, d
    else:
        picture, across, down = picture.swapaxes(0, 1), c, b
    if across < 0:
        picture = picture[:, ::-1]
    if down < 0:
        picture = picture[::-1]
    return np.ascontiguousarray(picture)


def _display_matrix(frame: Any) -> tuple[int, ...]:
    """The frame's display matrix. `frame.rotation` does not suffice: it leaves out mirroring."""
    from av.sidedata.sidedata import Type

    found = frame.side_data.get(Type.DISPLAYMATRIX)
    data = bytes(found) if found is not None else b""
    if len(data) != 36:
        return (1, 0, 0, 0, 1, 0, 0, 0, 1)
    return tuple(np.frombuffer(data, np.int32).tolist())
