"""Turns Pillow's pictures into what viewers show: upright, on white, 8 bits per channel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from higen.errors import OutputError
from higen.media.files import check_pixels, head

if TYPE_CHECKING:
    import PIL.Image

__all__ = ["load", "load_still", "over_white", "upright", "visible"]

_WIDE = 65535
_DEEP = "higen.16-bit"
"""Key in Pillow's `info` that marks a file with 16 bits per channel."""

_ANIMATED = ("GIF", "PNG", "WEBP")


def load(path: Path) -> tuple[NDArray[np.uint8], dict[Any, Any]]:
    """A picture file as uint8 [H,W,3], and Pillow's `info`. An animation gives its first frame.

    Raises what Pillow raises, and OutputError with the reason.
    """
    import PIL.Image

    head(path)
    with PIL.Image.open(path) as file:
        return upright(file), dict(file.info)


def load_still(path: Path) -> NDArray[np.uint8]:
    """Like `load`, but without `info`, and an animation raises OutputError."""
    import PIL.Image

    head(path)
    with PIL.Image.open(path) as file:
        if file.format in _ANIMATED and getattr(file, "n_frames", 1) > 1:
            raise OutputError("an animation among the pictures: save it as a video")
        return upright(file)


def upright(picture: PIL.Image.Image) -> NDArray[np.uint8]:
    """A picture as uint8 [H,W,3], rotated as its EXIF data says. Raises what `visible` raises."""
    import PIL.ImageOps

    check_pixels(*picture.size)
    if any(";16" in str(part[3]) for part in getattr(picture, "tile", ()) if len(part) > 3):
        picture.info[_DEEP] = True  # loading clears `tile` but keeps `info`
    return visible(PIL.ImageOps.exif_transpose(picture))


def visible(picture: PIL.Image.Image) -> NDArray[np.uint8]:
    """A picture of any mode as uint8 [H,W,3]: transparency on white, 16-bit grey scaled to 8 bits.

    Raises OutputError for samples outside the known range, and what Pillow raises on corrupt data.
    """
    if picture.mode.startswith("I") or picture.mode == "F":
        return _grey(picture)
    key = picture.info.get("transparency")
    if isinstance(key, tuple) and picture.info.get(_DEEP):  # Pillow reduces the pixels to 8 bits, not the key
        picture.info["transparency"] = tuple(value >> 8 for value in key)
    if picture.mode in ("RGB", "CMYK", "YCbCr", "HSV", "LAB") and key is None:
        return np.asarray(picture.convert("RGB"))
    return over_white(np.asarray(picture.convert("RGBA")))


def over_white(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Composites straight (not premultiplied) RGBA uint8 [H,W,4] on white with Pillow: uint8 [H,W,3]."""
    import PIL.Image

    if (pixels[..., 3] == 255).all():
        return np.ascontiguousarray(pixels[..., :3])
    picture = PIL.Image.fromarray(pixels)
    white = PIL.Image.new("RGBA", picture.size, "white")
    return np.ascontiguousarray(np.asarray(PIL.Image.alpha_composite(white, picture))[..., :3])


def _grey(picture: PIL.Image.Image) -> NDArray[np.uint8]:
    """A grey picture with samples of 16 bits, 32 bits or floating point."""
    values = np.asarray(picture).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        scale, allowed = 255 / _WIDE, _WIDE
    elif picture.mode == "I":
        scale, allowed = 1.0, 255
    else:
        scale, allowed = 255.0, 1
    if not (low >= 0 and high <= allowed):  # also true for NaN
        raise OutputError(f"its samples are {low:g} to {high:g} in Pillow's mode {picture.mode!r}: 0 to {allowed}")
    grey = np.rint(values * scale).astype(np.uint8)
    key = picture.info.get("transparency")
    if isinstance(key, int):
        grey[values == key] = 255
    return np.repeat(grey[..., None], 3, axis=2)
