"""GIF, WebP and PNG animations, read with Pillow: each frame as it is shown, over white."""

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
"""What is done with each frame that is wanted: its place among them and its pixels [H,W,3] to what is kept of it."""

_FORMATS = ("GIF", "PNG", "WEBP")
_TOO_SHORT = {"GIF": 10.0, "PNG": 0.0, "WEBP": 0.0}  # milliseconds: browsers show such a frame for 100
_INSTEAD = 100.0
_MOST_WORK = 2**36  # bytes of pixels that a whole animation has
_TRAILER = b"\x3b"


class Animation:
    """The frames of an animation.

    times      float64 [n], seconds at which each frame begins; `end` when the last one ends
    payload    the text in its comment (EXIF ImageDescription of WebP)
    timed      whether the file says how long its frames last
    complete   whether the file has its end
    """

    def __init__(self, path: Path) -> None:
        """Raises what Pillow raises, and OutputError with the reason."""
        self.path = path
        with self._opened() as image:
            check_pixels(*image.size)
            self.size = image.size
            lasting = []
            # Pillow makes each frame on the way to the one that is wanted: that is work, though not memory.
            check_bytes(_count(image), *image.size, most=_MOST_WORK)
            for index in range(*self._range(image)):
                image.seek(index)
                if image.width * image.height > 2 * self.size[0] * self.size[1]:  # Pillow makes the picture larger
                    raise OutputError(f"frame {index} lies outside its {self.size[0]}x{self.size[1]} pixels")
                if image.format == "WEBP":  # Pillow learns a frame's duration when it decodes it
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
        """Some frames, in ascending order, each uint8 [H,W,3] given to `each` with its place among them.

        `hold` is not used: an animation has no gaps.
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
        """A PNG file may begin with a picture for programs that show no animation."""
        count = _count(image)
        first = int(count > 1 and bool(image.info.get("default_image")))
        if count <= first:
            raise OutputError("no frame in it")
        return first, count


def _count(image: Any) -> int:
    """Pictures in an opened file."""
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
