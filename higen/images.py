"""Turns the user's pictures and clips into inputs of stages: in the request's size, with values from -1 to 1."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from higen.edges import edges
from higen.errors import OutputError, RequestError, is_of_a_handler, one_line, quoted
from higen.known_frames import by_frame
from higen.media.files import reason
from higen.media.pictures import load, load_still, upright
from higen.paths import given_path
from higen.plain_values import plain
from higen.request import Picture
from higen.tables import Control
from higen.video_reader import read

if TYPE_CHECKING:
    import PIL.Image

    from higen.video import Video

    Image: TypeAlias = str | os.PathLike[str] | PIL.Image.Image | NDArray[np.uint8]
    Clip: TypeAlias = str | os.PathLike[str] | Video | NDArray[np.uint8]
else:
    Image = Clip = object

ROUNDING = 1e-3
"""How far a picture's floats may lie outside 0 to 1, because resizing in other libraries rounds."""

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""Suffixes of files that count as pictures of a folder."""

__all__ = [
    "Clip",
    "Image",
    "load_clip",
    "load_frames",
    "load_image",
    "load_map",
    "load_mask",
    "load_picture",
    "map_frame",
    "resampling",
]


def load_picture(control: Control, value: object, frames: int, width: int, height: int) -> Picture:
    """The value of a control that has pixels: a picture [3,height,width], a clip or map [3,frames,height,width], known
    frames [n,3,height,width], or a mask [1 or frames,height,width].

    Raises RequestError, beginning with the control's name, for anything that cannot be read.
    """
    if control.kind == "frames":
        return load_frames(value, frames, width, height, control.name)
    if control.kind == "mask":
        return load_mask(value, frames, width, height, control.name)
    if control.kind == "map":
        return load_map(value, frames, width, height, control.name, control.encoding)
    if control.kind == "clip":
        pixels = load_clip(cast("Clip", value), frames, width, height, control.name)
    else:
        pixels = load_image(cast("Image", value), width, height, control.name)
    return Picture(pixels, _digest(pixels))


def _digest(*arrays: NDArray[Any]) -> bytes:
    return hashlib.blake2b(b"".join(array.tobytes() for array in arrays), digest_size=16).digest()


def load_frames(value: object, frames: int, width: int, height: int, name: str) -> Picture:
    """Pictures of single frames, {index: picture}, for a clip of `frames`; each is scaled to cover, then cropped.

    A clip or a folder of pictures gives frame 0, 1, 2, ...; if it has too many, the first ones are used.

    Raises RequestError, beginning with `name`, for an index that the clip does not have, two indices of one frame, one
    picture without an index, and anything that cannot be read.
    """
    if value is None or isinstance(value, Mapping):
        pictures = by_frame(name, value, frames)
        raw = {place: _pixels(cast("Image", picture), f"{name}[{place}]") for place, picture in pictures.items()}
        notes = dict.fromkeys(_resized(f"{name}[{place}]", pixels, width, height) for place, pixels in raw.items())
    else:
        raw = dict(enumerate(_rows(value, max(2, frames), name)[: max(2, frames)]))
        if not raw:
            raise RequestError(f"{name} has 0 frames")
        if len(raw) == 1:
            raise RequestError(f"{name} is one picture: say for which frame, {{0: picture}}; a clip gives every frame")
        raw = {place: pixels for place, pixels in raw.items() if place < frames}
        notes = dict.fromkeys(_resized(name, pixels, width, height) for pixels in raw.values())
    fitted = np.stack([_fit(pixels, width, height) for pixels in raw.values()])
    return Picture(fitted, _digest(fitted, np.array([*raw])), tuple(raw), tuple(note for note in notes if note))


def load_mask(value: object, frames: int, width: int, height: int, name: str) -> Picture:
    """A mask's brightness, float32 [1 or frames,height,width] from 0 to 1; white parts are redrawn.

    `value`: a picture or a clip, as for other controls, or an array without colours: booleans, uint8, or floats from 0
    to 1, [H,W] or [F,H,W]. Raises RequestError, beginning with `name`, for anything else.
    """
    rows = _rows(value, frames + 1, name)
    if len(rows) not in (1, frames):
        raise RequestError(f"{name} has {len(rows)} frames: one picture, or the clip's {frames}")
    bright = np.stack([(_fit(row, width, height).mean(axis=0) + 1) / 2 for row in rows]).astype(np.float32)
    note = _resized(name, rows[0], width, height)
    return Picture(bright, _digest(bright), notes=(note,) if note else ())


def load_map(value: object, frames: int, width: int, height: int, name: str, encoding: str | None = None) -> Picture:
    """A control map, float32 [3,frames,height,width] in -1 to 1: one picture for all frames, or one for each frame.

    `value`: as for a mask, or a folder of pictures in the order of their names, or a list of pictures. If there are too
    many frames, the first ones are used. Each is scaled to cover, then cropped. `encoding` "edges": each picture is
    replaced by its edges. Raises RequestError, beginning with `name`, for anything else, and for too few frames.
    """
    rows = _rows(value, frames, name)
    if len(rows) != 1 and len(rows) < frames:
        raise RequestError(f"{name} has {len(rows)} frames: one picture, or the clip's {frames}")
    notes = dict.fromkeys(_resized(name, row, width, height) for row in rows[:frames])
    fitted = [_fitted(row, width, height) for row in rows[:frames]]
    shown = np.stack([edges(row) if encoding == "edges" else row for row in fitted])
    pixels = np.ascontiguousarray(shown.transpose(3, 0, 1, 2).astype(np.float32) / 127.5 - 1.0)
    whole = np.broadcast_to(pixels, (3, frames, height, width))
    return Picture(whole, _digest(pixels), notes=tuple(note for note in notes if note))


def map_frame(value: object, index: int, name: str) -> NDArray[np.uint8]:
    """The picture of a control map for frame `index`, uint8 [H,W,3] in its own size; `value`: as for `load_map`.

    Raises RequestError, beginning with `name`, for anything else, and for a clip without this frame.
    """
    rows = _rows(value, index + 1, name)
    if len(rows) != 1 and len(rows) <= index:
        raise RequestError(f"{name} has {len(rows)} frames: frame {index} is wanted")
    return rows[0] if len(rows) == 1 else rows[index]


def _rows(value: object, most: int, name: str) -> list[NDArray[np.uint8]]:
    """A picture, or the pictures of a clip, a folder or a list, uint8 [H,W,3] each; at most `most` of a clip file."""
    from higen.video import Video

    if isinstance(value, str) and not value:
        raise RequestError(f"{name}='': a path is wanted")
    if isinstance(value, (list, tuple)) and value and not isinstance(value[0], (int, float, list, tuple)):
        return [_pixels(one, f"{name}[{i}]") for i, one in enumerate(value)]
    array = _array(value.frames if isinstance(value, Video) else value)
    if isinstance(value, (str, os.PathLike)):
        path = given_path(value, name)
        if path.is_dir():
            return [_pixels(file, f"{name}={quoted(file.name)}") for file in _pictures_in(path, name)[:most]]
        array = _file(path, most, name)
    if not isinstance(array, np.ndarray):
        return [_pixels(cast("Image", value), name)]
    array = array.astype(np.uint8) * np.uint8(255) if array.dtype == bool else array
    colours = array.ndim == 4 or (array.ndim == 3 and array.shape[2] == 3)
    array = array if colours else np.repeat(array[..., None], 3, axis=-1)
    return [_from_array(row, name) for row in (array if array.ndim == 4 else array[None])]


def _pictures_in(folder: Path, name: str) -> list[Path]:
    """The pictures of a folder, in the order of their names. Numbers in names are compared as numbers: 2 before 10."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in _PICTURES and not path.name.startswith(".")]
    if not found:
        raise RequestError(f"{name}={quoted(os.fspath(folder))}: no pictures in it: {', '.join(_PICTURES)}")
    parts = {path: re.split(r"(\d+)", path.name) for path in found}
    return sorted(found, key=lambda path: [(int(p), "") if i % 2 else (0, p) for i, p in enumerate(parts[path])])


def _file(path: Path, most: int, name: str) -> NDArray[np.uint8]:
    """A picture [1,H,W,3], or a clip [F,H,W,3] of at most `most` frames, from a file."""
    try:
        return load_still(path)[None]
    except Exception as error:  # a decoder may raise anything on corrupt data
        if is_of_a_handler(error):
            raise
        refused = reason(error)
    try:
        return read(path, most=most).frames
    except OutputError as error:
        said = f"cannot be read as a picture ({refused}) or as a clip ({one_line(error)})"
        raise RequestError(f"{name}={quoted(os.fspath(path))}: {said}") from error


def _resized(name: str, pixels: NDArray[np.uint8], width: int, height: int) -> str:
    """The warning for a picture that has another size than the request; "" if the sizes are equal."""
    tall, wide = pixels.shape[:2]
    if (wide, tall) == (width, height):
        return ""
    return f"{name} has {wide}x{tall} pixels: scaled to cover {width}x{height}, and cropped"


def load_clip(clip: Clip, frames: int, width: int, height: int, name: str = "clip") -> NDArray[np.float32]:
    """A video's path, a Video or frames [n,H,W,3] as float32 [3,frames,height,width] in -1 to 1.

    Frames are uint8, or floats from 0 to 1, of numpy or another library.

    A file is read as `Video.open` reads it. If there are too many frames, the first ones are used. Each is scaled to
    cover, then cropped. Raises RequestError, beginning with `name`, for too few frames.
    """
    from higen.video import Video

    given: object
    if isinstance(clip, (str, os.PathLike)):
        path = given_path(clip, name)
        try:
            given = read(path, most=frames).frames
        except OutputError as error:
            raise RequestError(f"{name}={quoted(str(path))}: cannot be read as a clip: {one_line(error)}") from error
    else:
        given = clip.frames if isinstance(clip, Video) else _array(clip)
    if not isinstance(given, np.ndarray) or not _is_shown(given) or given.ndim != 4 or given.shape[3] != 3:
        raise RequestError(f"{name} is a {type(clip).__name__}: a video file, a Video or uint8 frames [n,H,W,3]")
    if len(given) < frames:
        raise RequestError(f"{name} has {len(given)} frames: the request has {frames}")
    fitted = [load_image(frame, width, height, name) for frame in given[:frames]]
    return np.ascontiguousarray(np.stack(fitted, axis=1))


def resampling(size: int, to: int) -> NDArray[np.float64]:
    """A matrix [to, size] that resamples one axis: a Gaussian blur against aliasing, then bicubic with aligned corners.

    The Gaussian has sigma max((size/to - 1) / 2, 0.001) and max(int(4 sigma), 3) taps, made odd, with reflection at the
    edges. The cubic is Keys' with a = -0.75. Stable Video Diffusion shrinks its picture for CLIP in this way
    (generative-models, svd sampling; diffusers: _resize_with_antialiasing).
    """
    sigma = max((size / to - 1.0) / 2.0, 0.001)
    taps = int(max(2.0 * 2.0 * sigma, 3.0))
    taps += 1 - taps % 2
    offsets = np.arange(taps) - taps // 2
    kernel = np.exp(-(offsets.astype(np.float64) ** 2) / (2.0 * sigma**2))
    kernel /= kernel.sum()
    blur = np.zeros((size, size))
    for row in range(size):
        for offset, weight in zip(offsets, kernel, strict=True):
            blur[row, _reflected(row + int(offset), size)] += weight
    cubic = np.zeros((to, size))
    for row in range(to):
        position = row * (size - 1) / (to - 1) if to > 1 else 0.0
        first = int(np.floor(position))
        for tap in range(-1, 3):
            cubic[row, min(max(first + tap, 0), size - 1)] += _keys(position - first - tap)
    made: NDArray[np.float64] = cubic @ blur
    return made


def _reflected(index: int, size: int) -> int:
    """An index reflected at the edges; the edge itself is not repeated."""
    if size == 1:
        return 0
    period = 2 * (size - 1)
    index %= period
    return min(index, period - index)


def _keys(x: float, a: float = -0.75) -> float:
    """Keys' cubic convolution kernel."""
    x = abs(x)
    if x <= 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a if x < 2 else 0.0


def load_image(image: Image, width: int, height: int, name: str = "image") -> NDArray[np.float32]:
    """A path, PIL image or array [H,W,3] as float32 [3,height,width] in -1 to 1: scaled to cover, then cropped.

    An array is uint8, or floats from 0 to 1, of numpy or another library.
    Transparent pictures are put on white; 16-bit grey is scaled to 8 bits. Raises RequestError, beginning with `name`,
    for anything else, and for files that cannot be read.
    """
    return _fit(_pixels(image, name), width, height)


def _fit(pixels: NDArray[np.uint8], width: int, height: int) -> NDArray[np.float32]:
    """uint8 [H,W,3] as float32 [3,height,width] in -1 to 1: scaled to cover, then cropped."""
    fitted = _fitted(pixels, width, height).astype(np.float32)
    return np.ascontiguousarray(fitted.transpose(2, 0, 1) / 127.5 - 1.0)


def _fitted(pixels: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """uint8 [H,W,3] as uint8 [height,width,3]: scaled to cover, then cropped."""
    import PIL.Image
    import PIL.ImageOps

    fitted = PIL.ImageOps.fit(PIL.Image.fromarray(pixels), (width, height), PIL.Image.Resampling.LANCZOS)
    return np.asarray(fitted)


def _pixels(image: Image, name: str) -> NDArray[np.uint8]:
    """A picture as uint8 [H,W,3]."""
    import PIL.Image

    array = _array(image)
    if isinstance(array, np.ndarray):
        return _from_array(array, name)
    if isinstance(image, PIL.Image.Image):
        if 0 in image.size:
            raise RequestError(f"{name} has {image.width}x{image.height} pixels: at least 1x1")
    elif not isinstance(image, (str, os.PathLike)):
        raise RequestError(f"{name} is a {type(image).__name__}: a path, a PIL image or a uint8 array [H,W,3]")
    try:
        return upright(image) if isinstance(image, PIL.Image.Image) else load(given_path(image, name))[0]
    except Exception as error:  # a decoder may raise anything on corrupt data
        if is_of_a_handler(error):
            raise
        given = image if isinstance(image, PIL.Image.Image) else os.fspath(image)
        raise RequestError(f"{name}={quoted(given)}: cannot be read as a picture: {reason(error)}") from error


def _array(value: object) -> object:
    """A numpy array for another library's tensor; any other value unchanged."""
    if isinstance(value, np.ndarray) or not (hasattr(value, "__array__") and hasattr(value, "ndim")):
        return value
    with suppress(Exception):
        return np.asarray(value)
    # A tensor with gradients, on a GPU or of a type that numpy does not have.
    numbers = plain(value)
    if isinstance(numbers, list):
        with suppress(ValueError):
            array = np.asarray(numbers)
            return array.astype(np.uint8) if array.dtype.kind == "i" else array.astype(np.float32)
    return value


def _is_shown(array: NDArray[Any]) -> bool:
    """Whether an array's type can be a brightness: bytes or floats."""
    return array.dtype == np.uint8 or array.dtype.kind == "f"


def _from_array(array: NDArray[Any], name: str) -> NDArray[np.uint8]:
    wanted = "uint8 [H,W,3] is wanted, or floats from 0 to 1"
    if not _is_shown(array) or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise RequestError(f"{name} is {array.dtype} {list(array.shape)}: {wanted}")
    if array.dtype == np.uint8:
        return array
    low, high = float(array.min()), float(array.max())
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):
        raise RequestError(f"{name} has values from {low:g} to {high:g}: {wanted}")
    return np.rint(np.clip(array.astype(np.float64), 0, 1) * 255).astype(np.uint8)
