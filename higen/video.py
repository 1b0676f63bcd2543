"""A generated clip: 8-bit frames, their rate and metadata, and the files it is saved to and opened from, by suffix.

.mp4    H.264, yuv420p, BT.709, index first; metadata in the tags `title` (the prompt) and `comment` (JSON)
.webm   VP9, yuv420p, BT.709; the same tags
.gif    one 256-colour palette for the clip, dithered; JSON in the comment; at most 50 frames a second
.webp   animated and lossless; JSON in EXIF ImageDescription
.png    lossless, one file a frame: out.png stands for out_0000.png, out_0001.png, ...; JSON in the text `Comment`
.npy    the array of frames and nothing else: no rate, no metadata

The JSON is the clip's metadata and, as the key `higen.video`, the rate, length and size of what was saved: `Video.open`
restores a rate that the format rounded, crops padding, and tells a truncated file. Suffixes may be in capitals.
"""

from __future__ import annotations

import base64
import html
import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from higen.errors import BackendError, OutputError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Video", "check_output", "contact_sheet", "to_uint8"]

_RECORD = "higen.video"
_DEFAULT_FPS = 8.0
_GAP = 2  # pixels between the frames of a contact sheet


@dataclass(frozen=True, eq=False, repr=False)
class Video:
    """A clip. `frames` is kept as a read-only view, `metadata` as a copy in JSON's types (a tuple becomes a list).

    frames    uint8 [F, H, W, 3], RGB; F, H, W >= 1
    fps       frames per second, finite and > 0
    metadata  what JSON can hold: prompt, seed, cues, model, versions, timings

    Raises OutputError naming the value and what is allowed.
    """

    frames: NDArray[np.uint8]
    fps: float
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        frames = np.asarray(self.frames).view()
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
            raise OutputError(f"frames {frames.dtype} {list(frames.shape)}: uint8 [F, H, W, 3] with F, H, W >= 1")
        if not (isinstance(self.fps, (int, float)) and math.isfinite(self.fps) and self.fps > 0):
            raise OutputError(f"fps={self.fps!r}: a finite number > 0")
        try:
            metadata = json.loads(json.dumps(dict(self.metadata), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise OutputError(f"metadata={self.metadata!r}: a mapping of what JSON can hold ({error})") from error
        frames.flags.writeable = False
        object.__setattr__(self, "frames", frames)
        object.__setattr__(self, "fps", float(self.fps))
        object.__setattr__(self, "metadata", metadata)

    @classmethod
    def from_pixels(cls, pixels: NDArray[np.floating], fps: float, metadata: Mapping[str, Any] | None = None) -> Video:
        """A clip from decoded pixels, float32 [F, 3, H, W] in [-1, 1]; see `to_uint8` for rounding and errors."""
        return cls(to_uint8(pixels), fps, metadata or {})

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Video:
        """Read a file that `save` wrote, or any other of these formats.

        A .png sequence is named as for `save` (out.png) or by its first file (out_0000.png). A file without a rate
        (.npy, another program's .png) has 8 fps. Raises OutputError for a missing, corrupt or truncated file.
        """
        path = Path(path)
        read = _format(path)[1]
        try:
            return read(path)
        except Exception as error:  # a decoder may raise anything on corrupt data
            raise OutputError(f"{path}: not a readable {path.suffix} file ({error})") from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the clip in the format of the path's suffix; returns the file written, for .png the first one.

        An odd height or width of .mp4 and .webm is padded to even by repeating the last row or column. Everything is
        written to a temporary folder beside the target, then renamed: no failure leaves anything behind or harms the
        file that was there. A .png sequence replaces the one of that name whole: its frames past this clip's end go.
        Raises OutputError as `check_output` does, for a rate the format cannot have, a full disk, a failing encoder.
        """
        path = check_output(path)
        write, _, max_fps = _format(path)
        if not 0.01 <= self.fps <= max_fps:
            raise OutputError(f"fps={self.fps:g}: a {path.suffix} file plays 0.01 to {max_fps:g} frames a second")
        folder, sequence = path.parent.absolute(), path.suffix.lower() == ".png"
        try:
            # A folder, not a temporary file: files made in it have the permissions of any new file.
            with tempfile.TemporaryDirectory(dir=folder, prefix=".higen-") as scratch:
                write(self, Path(scratch, path.name))
                for file in sorted(Path(scratch).iterdir()):
                    file.replace(folder / file.name)
            for stale in _sequence(path, start=len(self)) if sequence else ():
                stale.unlink()
        except Exception as error:  # nor do encoders keep to OSError
            raise OutputError(f"{path}: cannot be written ({error})") from error
        return _numbered(path, 0) if sequence else path

    def contact_sheet(self, columns: int = 8, frames: int | None = None, *, labels: bool = False) -> Image.Image:
        """A grid of `frames` evenly spaced frames (None: all), row by row on white, as a PIL RGB image.

        `labels` writes each frame's time below it. Raises OutputError for columns or frames below 1.
        """
        from PIL import Image, ImageDraw, ImageFont

        if columns < 1 or (frames is not None and frames < 1):
            raise OutputError(f"columns={columns}, frames={frames}: whole numbers >= 1")
        shown = np.linspace(0, len(self) - 1, min(frames or len(self), len(self))).round().astype(int)
        columns = min(columns, len(shown))
        wide, high = self.width + _GAP, self.height + _GAP + (14 if labels else 0)
        sheet = Image.new("RGB", (columns * wide - _GAP, math.ceil(len(shown) / columns) * high - _GAP), "white")
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
        for place, index in enumerate(shown):
            x, y = place % columns * wide, place // columns * high
            sheet.paste(Image.fromarray(self.frames[index]), (x, y))
            if labels:
                draw.text((x, y + self.height), f"{index / self.fps:.2f} s", "black", font)
        return sheet

    @property
    def prompt(self) -> str:
        """The metadata's prompt, "" if there is none."""
        return str(self.metadata.get("prompt") or "")

    @property
    def height(self) -> int:
        """Pixels."""
        return int(self.frames.shape[1])

    @property
    def width(self) -> int:
        """Pixels."""
        return int(self.frames.shape[2])

    @property
    def duration(self) -> float:
        """Seconds."""
        return len(self) / self.fps

    def __len__(self) -> int:
        return len(self.frames)

    def __repr__(self) -> str:
        prompt = self.prompt if len(self.prompt) <= 40 else self.prompt[:37] + "..."
        return f"Video({len(self)} frames, {self.width}x{self.height}, {self.fps:g} fps, {prompt!r})"

    def _repr_html_(self) -> str:
        """For notebooks: the clip as an mp4 inside the HTML, at least 320 pixels wide, with the prompt below."""
        with tempfile.TemporaryDirectory() as folder:
            data = base64.b64encode(self.save(Path(folder, "clip.mp4")).read_bytes()).decode("ascii")
        style = f"width:{max(320, self.width)}px;max-width:100%;image-rendering:auto"
        video = f'<video autoplay loop muted controls style="{style}" src="data:video/mp4;base64,{data}"></video>'
        return f'<figure style="margin:0">{video}<figcaption>{html.escape(self.prompt)}</figcaption></figure>'


def to_uint8(pixels: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Decoded pixels, float32 [F, 3, H, W] in [-1, 1], as frames, uint8 [F, H, W, 3].

    x * 0.5 + 0.5, clamped to [0, 1], times 255, truncated (reference: `tensor2vid`), all in float32.
    Raises BackendError for another shape or dtype, and for NaN and infinity, which would pass for black or white.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not np.issubdtype(pixels.dtype, np.floating):
        raise BackendError(f"pixels {pixels.dtype} {list(pixels.shape)}: float32 [F, 3, H, W] is wanted")
    bad = ~np.isfinite(pixels).all(axis=(1, 2, 3))
    if bad.any():
        raise BackendError(f"{bad.sum()} of {len(bad)} frames have NaN or infinite pixels; use a wider precision")
    unit = np.clip(pixels.astype(np.float32) * np.float32(0.5) + np.float32(0.5), 0, 1)
    return np.ascontiguousarray((unit * np.float32(255)).astype(np.uint8).transpose(0, 2, 3, 1))


def check_output(path: str | os.PathLike[str]) -> Path:
    """The path, if `Video.save` can write there; call it before the work of making a clip.

    Raises OutputError for an unknown suffix, a folder as the target, and a missing or read-only folder.
    """
    path = Path(path)
    _format(path)
    if path.is_dir() or (path.suffix.lower() == ".png" and _numbered(path, 0).is_dir()):
        raise OutputError(f"{path}: is a folder; name a file in it")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: no permission to write in the folder {path.parent.absolute()}")
    return path


def contact_sheet(videos: Sequence[Video], frames_per_video: int = 8) -> Image.Image:
    """One row of evenly spaced frames per clip with its prompt above, as a PIL RGB image on white.

    A prompt wider than the sheet is cut; letters beyond ASCII show as boxes. Raises OutputError for no clips.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not videos:
        raise OutputError("videos=[]: at least one clip")
    rows = [video.contact_sheet(frames_per_video, frames_per_video) for video in videos]
    width, line = max(row.width for row in rows), 20
    sheet = Image.new("RGB", (width, sum(line + row.height + 2 * _GAP for row in rows)), "white")
    draw, font, y = ImageDraw.Draw(sheet), ImageFont.load_default(14), 0
    for video, row in zip(videos, rows, strict=True):
        text = shown = " ".join(video.prompt.split())
        while text and draw.textlength(shown, font) > width:
            text = text[:-1]
            shown = text + "..."
        draw.text((0, y), shown, "black", font)
        sheet.paste(row, (0, y + line))
        y += line + row.height + 2 * _GAP
    return sheet


def _tags(video: Video) -> tuple[str, str]:
    """Title and payload: the prompt without what a C string or UTF-8 cannot hold; metadata and record as ASCII."""
    record = {"fps": video.fps, "frames": len(video), "height": video.height, "width": video.width}
    title = video.prompt.replace("\0", " ").encode("utf-8", "replace").decode("utf-8")
    return title, json.dumps({**video.metadata, _RECORD: record})


def _unpack(payload: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and record of a payload; both are empty for the text of another program."""
    try:
        metadata = json.loads(payload)
        record = metadata.pop(_RECORD)
        return (metadata, record) if all(record[k] > 0 for k in ("fps", "frames", "height", "width")) else ({}, {})
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}, {}


def _restore(pictures: Sequence[NDArray[Any]], wanted: int, fps: float, payload: str) -> Video:
    """A clip from decoded frames, checked to be `wanted` or more; `fps`, 0 if unknown, is for a file not of ours."""
    if len(pictures) < wanted:
        raise OutputError(f"{len(pictures)} of {wanted} frames can be read: it is truncated")
    frames = np.stack(pictures)
    metadata, record = _unpack(payload)
    if record:
        fps, height, width = record["fps"], record["height"], record["width"]
        if frames.shape[1:3] == (height + height % 2, width + width % 2):
            frames = frames[:, :height, :width]
    return Video(frames, fps or _DEFAULT_FPS, metadata)


def _write_stream(video: Video, path: Path) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    container, codec, options, muxer = _CODECS[path.suffix.lower()]
    even = np.pad(video.frames, ((0, 0), (0, video.height % 2), (0, video.width % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w", format=container, options=muxer) as output:
        output.metadata["title"], output.metadata["comment"] = _tags(video)
        stream: Any = output.add_stream(codec, Fraction(video.fps).limit_denominator(10_000), options=options)
        stream.height, stream.width = even.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # These tags (1 is BT.709, and the limited range) only declare; the conversion is the reformat below.
        context = stream.codec_context
        context.colorspace = context.color_range = context.color_primaries = context.color_trc = 1
        for frame in even:
            rgb = av.VideoFrame.from_ndarray(frame, format="rgb24")
            yuv = rgb.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            output.mux(stream.encode(yuv))
        output.mux(stream.encode(None))


def _read_stream(path: Path) -> Video:
    import av

    with av.open(str(path.absolute())) as source:
        stream = source.streams.video[0]
        if stream.codec_context is None:  # PyAV before 18.1 crashes when it decodes such a stream
            raise OutputError("its codec is unknown")
        pictures = [frame.to_ndarray(format="rgb24") for frame in source.decode(stream)]
        payload = {key.lower(): text for key, text in source.metadata.items()}.get("comment", "")
        _, record = _unpack(payload)
        # In a file of ours the duration is that of the frames, unless somebody added a sound track.
        seconds = (source.duration or 0) / av.time_base if record and len(source.streams) == 1 else 0.0
        return _restore(pictures, int(seconds * record.get("fps", 0) + 0.1), float(stream.average_rate or 0), payload)


def _quantized(frames: NDArray[np.uint8]) -> list[Image.Image]:
    from PIL import Image

    step = math.ceil(math.sqrt(frames.size / 3 / 32_768))  # enough pixels for a palette, in 0.1 s
    sample = np.ascontiguousarray(frames[:, ::step, ::step])
    palette = Image.fromarray(sample.reshape(-1, sample.shape[2], 3)).quantize(256, Image.Quantize.MAXCOVERAGE)
    return [Image.fromarray(frame).quantize(palette=palette) for frame in frames]


def _write_animation(video: Video, path: Path) -> None:
    from PIL import Image

    _, payload = _tags(video)
    if path.suffix.lower() == ".gif":
        unit, (first, *rest) = 10, _quantized(video.frames)
        options: dict[str, Any] = {"format": "GIF", "comment": payload.encode("ascii")}
    else:
        unit, (first, *rest) = 1, [Image.fromarray(frame) for frame in video.frames]
        options = {"format": "WEBP", "lossless": True, "exif": Image.Exif()}
        options["exif"][0x010E] = payload  # ImageDescription
    # Milliseconds in multiples of the format's unit, rounded so that no error adds up.
    edges = np.rint(np.arange(len(video) + 1) * (1000 / unit / video.fps)).astype(int) * unit
    first.save(path, save_all=True, append_images=rest, duration=np.diff(edges).tolist(), loop=0, **options)


def _read_animation(path: Path) -> Video:
    from PIL import Image, ImageSequence

    with Image.open(path, formats=["GIF", "WEBP"]) as image:
        comment = image.info.get("comment", b"").decode("utf-8", "replace")
        payload = comment or str(image.getexif().get(0x010E, ""))
        pictures, lasting = [], []
        for picture in ImageSequence.Iterator(image):
            pictures.append(np.asarray(picture.convert("RGB")))
            lasting.append(picture.info.get("duration") or 0)
    fps = 1000 * len(pictures) / sum(lasting) if any(lasting) else 0.0
    _, record = _unpack(payload)
    if record:
        # Encoders merge equal frames into one that lasts longer, or into a still: take them apart.
        ends = np.rint(np.cumsum(lasting) * (record["fps"] / 1000)).astype(int)
        repeats = np.maximum(np.diff(ends, prepend=0), 1) if any(lasting) else [record["frames"]]
        pictures = [p for p, times in zip(pictures, repeats, strict=True) for _ in range(times)]
    return _restore(pictures, record.get("frames", 0), fps, payload)


def _numbered(path: Path, index: int) -> Path:
    """out.png -> out_0000.png"""
    return path.with_name(f"{path.stem}_{index:04d}{path.suffix}")


def _sequence(path: Path, start: int = 0) -> Iterator[Path]:
    """The files of the sequence `path` from number `start` to the first gap."""
    return itertools.takewhile(Path.is_file, (_numbered(path, index) for index in itertools.count(start)))


def _write_png(video: Video, path: Path) -> None:
    from PIL import Image, PngImagePlugin

    text, (title, payload) = PngImagePlugin.PngInfo(), _tags(video)
    text.add_itxt("Title", title)
    text.add_text("Comment", payload)
    for index, frame in enumerate(video.frames):
        Image.fromarray(frame).save(_numbered(path, index), "PNG", pnginfo=text)


def _read_png(path: Path) -> Video:
    from PIL import Image

    sequence = list(_sequence(path.with_stem(path.stem.removesuffix("_0000"))))
    pictures, payload = [], ""
    for file in sequence or [path]:
        with Image.open(file, formats=["PNG"]) as image:
            pictures.append(np.asarray(image.convert("RGB")))
            payload = payload or str(image.info.get("Comment", ""))
    _, record = _unpack(payload)
    return _restore(pictures, record.get("frames", 0) if sequence else 1, 0.0, payload)


def _write_npy(video: Video, path: Path) -> None:
    with path.open("wb") as file:  # given a path, numpy appends .npy to .NPY
        np.save(file, video.frames)


# Container, encoder, its options, muxer options. VP9: b=0 is no limit on the bit rate, cpu-used=4 is fast.
_CODECS: dict[str, tuple[str, str, dict[str, str], dict[str, str]]] = {
    ".mp4": ("mp4", "libx264", {"crf": "17"}, {"movflags": "+faststart"}),
    ".webm": ("webm", "libvpx-vp9", {"crf": "24", "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1"}, {}),
}
# Writer, reader, highest rate (browsers play a frame of a .gif of less than 20 ms for 100 ms).
_Format = tuple[Callable[[Video, Path], None], Callable[[Path], Video], float]
_FORMATS: dict[str, _Format] = {
    ".mp4": (_write_stream, _read_stream, 1000),
    ".webm": (_write_stream, _read_stream, 1000),
    ".gif": (_write_animation, _read_animation, 50),
    ".webp": (_write_animation, _read_animation, 1000),
    ".png": (_write_png, _read_png, math.inf),
    ".npy": (_write_npy, lambda path: Video(np.load(path, allow_pickle=False), _DEFAULT_FPS), math.inf),
}


def _format(path: Path) -> _Format:
    if path.suffix.lower() not in _FORMATS:
        raise OutputError(f"{path}: the suffix {path.suffix!r} is unknown; known are {', '.join(_FORMATS)}")
    return _FORMATS[path.suffix.lower()]
