"""Pictures from the user as the encoder wants them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from higen.errors import RequestError

if TYPE_CHECKING:
    import PIL.Image

    Image: TypeAlias = str | os.PathLike[str] | PIL.Image.Image | NDArray[np.uint8]
else:
    Image = object

__all__ = ["Image", "load_image"]


def load_image(image: Image, width: int, height: int) -> NDArray[np.float32]:
    """A path, PIL image or uint8 array [H,W,3] as float32 [3,height,width] in -1 to 1: scaled to cover, then cropped.

    Transparency is laid over white. Raises RequestError for what is none of these or cannot be read.
    """
    import PIL.Image
    import PIL.ImageOps

    with _opened(image) as picture:
        try:
            upright = PIL.ImageOps.exif_transpose(picture).convert("RGBA")
        except Exception as error:  # a decoder may raise anything on corrupt data
            raise RequestError(f"image={image!r}: cannot be read as a picture: {error}") from error
    opaque = PIL.Image.alpha_composite(PIL.Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
    fitted = PIL.ImageOps.fit(opaque, (width, height), PIL.Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(fitted, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1.0)


@contextmanager
def _opened(image: Image) -> Iterator[PIL.Image.Image]:
    """The picture; a file opened here is closed again. What is in it may be read later only."""
    import PIL.Image

    if isinstance(image, (str, os.PathLike)):
        try:
            file = PIL.Image.open(image)
        except Exception as error:  # as above
            raise RequestError(f"image={os.fspath(image)!r}: cannot be read as a picture: {error}") from error
        with file:
            yield file
    elif isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise RequestError(f"image is {image.dtype} {list(image.shape)}: uint8 [H,W,3] is wanted")
        yield PIL.Image.fromarray(image)
    elif isinstance(image, PIL.Image.Image):
        if 0 in image.size:
            raise RequestError(f"image has {image.width}x{image.height} pixels: at least 1x1")
        yield image
    else:
        raise RequestError(f"image is a {type(image).__name__}: a path, a PIL image or a uint8 array [H,W,3]")
