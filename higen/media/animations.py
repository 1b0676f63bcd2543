"""Reads GIF, WebP and PNG animations with Pillow: each frame as it is displayed, on white."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from higen.errors import OutputError
from higen.media.files import check_bytes, check_pixels
from higen.media.pictures import upright

if TYPE_CHECKING:
    import PIL.Image

__all__ = ["Animation", "Each"]

Each = Callable[[int, NDArray[np.uint8]], NDArray[np.uint8]]
"""Called for each wanted frame with its position among them and its pixels [H,W,3]; returns what to keep."""

_FORMATS = ("GIF", "PNG", "WEBP")
_TOO_SHORT = {"GIF": 10.0, "PNG": 0.0, "WEBP": 0.0}  # milliseconds: browsers show a frame as short as this for 100
_INSTEAD = 100.0
_MOST_WORK = 2**36  # maximum bytes of all pixels of an animation
_TRAILER = b"\x3b"


class Animation:
    """The frames of an animation.

    times      float64 [n], start of each frame in seconds; `end`: end of the last frame
    payload    the file's comment (for WebP, EXIF ImageDescription)
    timed      whether the file has durations of frames
    complete   whether the file is not cut off
    """

    def __init__(self, path: Path) -> None:
        """Raises what Pillow raises, and OutputError with the reason."""
        self.path = path
        with self._opened() as image:
            check_pixels(*image.size)
            self.size = image.size
            lasting = []
            # To reach a frame, Pillow renders all frames before it. This takes time but no memory.
            check_bytes(_count(image), *image.size, most=_MOST_WORK)
            for index in range(*self._range(image)):
                image.seek(index)
                if image.width * image.height > 2 * self.size[0] * self.size[1]:  # then Pillow enlarges the canvas
                    raise OutputError(f"frame {index} lies outside its {self.size[0]}x{self.size[1]} pixels")
                if image.format == "WEBP":  # only decoding gives the frame's duration
                    image.load()
                lasting.append(float(image.info.get("duration") or 0))
            image.seek(0)
            self.payload = _payload(image)
            self.timed = any(lasting)
            shortest = _TOO_SHORT[str(image.format)]
            self.complete = image.format != "GIF" or _has_trailer(path)
        if len(lasting) > 1:
            lasting = [each if each > shortest else _INSTEAD for each in lasting]
        edges = np.cumsum([0.0, *lasting]) / 1000
        self.times, self.end = edges[:-1], float(edges[-1])
        self.rate = 0.0

    def pictures(self, chosen: Sequence[int], hold: float, each: Each) -> list[NDArray[np.uint8]]:
        """The results of `each` for the `chosen` frames, which are in ascending order; see `Each`.

        `hold` is not used, because an animation has no gaps.
        """
        check_bytes(len(chosen), *self.size)
        found: list[NDArray[np.uint8]] = []
        with self._opened() as image:
            first = self._range(image)[0]
            for index in chosen:
                image.seek(first + index)
                found.append(each(len(found), upright(image)))
        return found

    def _opened(self) -> PIL.Image.Image:
        import PIL.Image

        return PIL.Image.open(self.path, formats=_FORMATS)

    @staticmethod
    def _range(image: Any) -> tuple[int, int]:
        """First and end index of the frames. Skips a PNG's first picture if it is only for programs without APNG."""
        count = _count(image)
        first = int(count > 1 and bool(image.info.get("default_image")))
        if count <= first:
            raise OutputError("no frame in it")
        return first, count


def _count(image: Any) -> int:
    """Number of pictures in an opened file."""
    return int(getattr(image, "n_frames", 1))


def _payload(image: PIL.Image.Image) -> str:
    if image.format == "WEBP":
        return str(image.getexif().get(0x010E, ""))
    comment = image.info.get("comment") or image.info.get("Comment") or ""
    return comment.decode("utf-8", "replace") if isinstance(comment, bytes) else str(comment)


def _has_trailer(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == _TRAILER
