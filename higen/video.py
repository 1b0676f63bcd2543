"""A generated clip: 8-bit frames, their rate and metadata, and the files it is saved to and opened from, by suffix.

.mp4    H.264, yuv420p, BT.709, index first; metadata in the tags `title` (the prompt) and `comment` (JSON)
.webm   VP9, yuv420p, BT.709; the same tags
.gif    one 256-colour palette for the clip, dithered; JSON in the comment; at most 50 frames a second
.webp   animated and lossless; JSON in EXIF ImageDescription
.png    lossless, one file per frame: out.png means out_0000.png, out_0001.png, ...; JSON in the text `Comment`, and
        the clip's id and the frame's index in the text `higen.frame`
.npy    only the array of frames: no rate, no metadata

Can be opened, but not saved: .m4v .mov .mkv .avi .ts .mts .m2ts .mpg .mpeg .ogv .wmv .flv .3gp .apng

The JSON is the clip's metadata and, under the key `higen.video`, the rate, length and size that were saved. With these,
`Video.open` restores a rate that the format rounded, crops padding and detects a truncated file. Suffixes may be in
capitals.
"""

from __future__ import annotations

import base64
import html
import json
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from higen.cue_plot import Panel, draw
from higen.errors import BackendError, MediaWarning, OutputError, RequestError, quoted
from higen.memory import enough_memory
from higen.noise_schedule import is_whole
from higen.paths import given_path
from higen.plain_values import plain
from higen.video_reader import read
from higen.video_record import Clip
from higen.video_writer import check_output, read_track, write

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Video", "Videos", "check_output", "contact_sheet", "strip", "to_uint8"]

_GAP = 2  # pixels between the frames of a contact sheet
_SHOWN = 24  # clips of a list that a notebook shows


@dataclass(frozen=True, eq=False, repr=False)
class Video:
    """A clip. `frames` is kept as a read-only view, `metadata` as a copy in JSON's types (a tuple becomes a list).

    frames    uint8 [F, H, W, 3], RGB; F, H, W >= 1
    fps       frames per second, finite and > 0
    metadata  values that JSON can hold: prompt, seed, cues, model, versions, timings
    maker     returns the pipeline that made the clip, while that exists; not kept in files or copies

    Raises OutputError naming the value and what is allowed.
    """

    frames: NDArray[np.uint8]
    fps: float
    metadata: Mapping[str, Any] = field(default_factory=dict)
    maker: Callable[[], Any] | None = None

    def __post_init__(self) -> None:
        frames = np.asarray(self.frames).view()
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
            raise OutputError(f"frames {frames.dtype} {list(frames.shape)}: uint8 [F, H, W, 3] with F, H, W >= 1")
        fps = plain(self.fps)
        if type(fps) not in (int, float) or not 0 < fps <= sys.float_info.max:
            raise OutputError(f"fps={quoted(self.fps)}: a finite number > 0")
        try:
            given = {} if self.metadata is None else dict(self.metadata)
            metadata = json.loads(json.dumps(given, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise OutputError(f"metadata={quoted(self.metadata)}: a mapping of what JSON can hold ({error})") from error
        frames.flags.writeable = False
        object.__setattr__(self, "frames", frames)
        object.__setattr__(self, "fps", float(fps))
        object.__setattr__(self, "metadata", metadata)

    def __reduce__(self) -> tuple[Any, ...]:
        """A clip is pickled as its constructor's arguments, so its frames are read-only in the other process, too."""
        return type(self), (self.frames, self.fps, self.metadata)

    @classmethod
    def from_pixels(cls, pixels: NDArray[np.floating], fps: float, metadata: Mapping[str, Any] | None = None) -> Video:
        """A clip from decoded pixels, float32 [F, 3, H, W] in [-1, 1]; see `to_uint8` for rounding and errors."""
        return cls(to_uint8(pixels), fps, metadata or {})

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Video:
        """Read a file that `save` wrote, or any other file in one of the formats at the top of this module.

        Frames look as in a player: rotated, mirrored, with the right aspect of pixels, deinterlaced, transparent parts
        on white. If frames have different durations, they are repeated at a steady rate, so that the clip's duration is
        kept. Values in our own record are used if the file agrees with them. A .png sequence is named as for `save`
        (out.png) or by any of its files (out_0000.png), and may begin with any number. A file without a rate (.npy,
        another program's .png) gets 8 fps. Raises OutputError for a missing, corrupt, truncated or too large file, and
        for a sequence with a gap, with different sizes or of two clips.
        """
        path = given_path(path)
        with enough_memory(str(path)):
            clip = read(path)
        try:
            return cls(clip.frames, clip.fps, clip.metadata)
        except OutputError as error:
            raise OutputError(f"{path}: not a readable {path.suffix} file ({error})") from error

    def save(self, path: str | os.PathLike[str], *, audio: str | os.PathLike[str] | None = None) -> Path:
        """Write the clip in the format of the path's suffix. Returns the written file (for .png, the first one).

        `audio`: a sound file, or a video with sound. It is added to .mp4 (as AAC) and .webm (as Opus). It is cut, or
        padded with silence, to the length of the clip, with a MediaWarning.

        For .mp4 and .webm, an odd height or width is made even by repeating the last row or column. Everything is
        written to a temporary folder next to the target, then renamed. So a failure or a kill never damages existing
        files, and the next save removes the remains of a kill. A .png sequence replaces the old sequence of that name
        completely. Old frames past the end of this clip are removed, but only those that higen wrote.
        Raises OutputError as `check_output` does, for a full disk or a failing encoder, for a sound that cannot be read
        or is silent, and for a sound if the format has none.
        """
        if audio is None:
            return write(Clip(self.frames, self.fps, self.metadata), path)
        sound, said = read_track(check_output(path, len(self), self.fps), audio, self.duration)
        if said:
            warnings.warn(MediaWarning(f"{os.fspath(audio)}: {said}"), stacklevel=2)
        return write(Clip(self.frames, self.fps, self.metadata, sound), path)

    def contact_sheet(
        self, columns: int | None = None, frames: int | None = None, *, labels: bool | None = None
    ) -> Image.Image:
        """A grid of `frames` evenly spaced frames (None: all), row by row on white, as a PIL RGB image.

        `columns`: None means 8; `labels`: write each frame's time below it. Raises OutputError for columns or frames
        below 1.
        """
        from PIL import Image, ImageDraw, ImageFont

        columns = _count("columns", 8 if columns is None else columns)
        frames = len(self) if frames is None else _count("frames", frames)
        shown = np.linspace(0, len(self) - 1, min(frames, len(self))).round().astype(int)
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

    def plot_cues(self, pipe: Any = None) -> Image.Image:
        """A plot of the requested curves and the curves measured from the clip, as a PIL RGB image 640 pixels wide.

        `pipe`: the pipeline with the model that measures them; None: the pipeline that made the clip. Raises
        RequestError if that no longer exists, and for a model without curves in their own units.
        """
        pipe = pipe if pipe is not None else self.maker() if self.maker is not None else None
        if pipe is None:
            raise RequestError("plot_cues: the pipeline that made the clip is not here; give one: plot_cues(pipe)")
        measured, requested = pipe.cues(self)
        panels = [Panel(name, values, requested.get(name, np.zeros(0))) for name, values in measured.items()]
        return draw(panels, len(self), self.fps)

    @property
    def prompt(self) -> str:
        """The metadata's prompt, "" if there is none."""
        return str(self.metadata.get("prompt") or "")

    @property
    def height(self) -> int:
        """The height in pixels."""
        return int(self.frames.shape[1])

    @property
    def width(self) -> int:
        """The width in pixels."""
        return int(self.frames.shape[2])

    @property
    def duration(self) -> float:
        """The duration in seconds."""
        return len(self) / self.fps

    def __len__(self) -> int:
        return len(self.frames)

    def __repr__(self) -> str:
        prompt = self.prompt if len(self.prompt) <= 40 else self.prompt[:37] + "..."
        return f"Video({len(self)} frames, {self.width}x{self.height}, {self.fps:g} fps, {prompt!r})"

    def _repr_html_(self) -> str:
        """For notebooks: the clip as an mp4 inside the HTML, at least 320 pixels wide, with the prompt below it."""
        with tempfile.TemporaryDirectory() as folder:
            data = base64.b64encode(self.save(Path(folder, "clip.mp4")).read_bytes()).decode("ascii")
        style = f"width:{max(320, self.width)}px;max-width:100%;image-rendering:auto"
        video = f'<video autoplay loop muted controls style="{style}" src="data:video/mp4;base64,{data}"></video>'
        return f'<figure style="margin:0">{video}<figcaption>{html.escape(self.prompt)}</figcaption></figure>'


class Videos(list[Video]):
    """A list of clips, which a notebook shows as a grid."""

    def _repr_html_(self) -> str:
        """For notebooks: the first 24 clips side by side."""
        clips = "".join(video._repr_html_() for video in self[:_SHOWN])
        more = f"<p>and {len(self) - _SHOWN} more</p>" if len(self) > _SHOWN else ""
        style = "display:grid;grid-template-columns:repeat(auto-fill,minmax(160px,1fr));gap:12px;align-items:start"
        return f'<div style="{style}">{clips}</div>{more}'


def to_uint8(pixels: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Decoded pixels, float32 [F, 3, H, W] in [-1, 1], as frames, uint8 [F, H, W, 3].

    x * 0.5 + 0.5, clamped to [0, 1], times 255, truncated (reference: `tensor2vid`), all in float32.
    Raises BackendError for another shape or dtype, and for NaN and infinity, which would look like black or white.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not np.issubdtype(pixels.dtype, np.floating):
        raise BackendError(f"pixels {pixels.dtype} {list(pixels.shape)}: float32 [F, 3, H, W] is wanted")
    bad = ~np.isfinite(pixels).all(axis=(1, 2, 3))
    if bad.any():
        raise BackendError(f"{bad.sum()} of {len(bad)} frames have NaN or infinite pixels; use a wider precision")
    unit = np.clip(pixels.astype(np.float32) * np.float32(0.5) + np.float32(0.5), 0, 1)
    return np.ascontiguousarray((unit * np.float32(255)).astype(np.uint8).transpose(0, 2, 3, 1))


def _count(name: str, value: object) -> int:
    number = plain(value)
    if not is_whole(number, 1, 2**31):
        raise OutputError(f"{name}={quoted(value)}: whole numbers >= 1")
    return int(number)


def strip(frames: NDArray[np.uint8], most: int = 8, side: int = 256) -> tuple[Image.Image, int]:
    """Evenly spaced frames of [f,H,W,3] side by side, as a PIL RGB image, and the number of frames in it: at most
    `most`, each at most `side` pixels high and wide.
    """
    from PIL import Image

    shown = frames[np.linspace(0, len(frames) - 1, min(len(frames), most)).round().astype(int)]
    height, width = shown.shape[1:3]
    scale = min(1.0, side / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    made = Image.new("RGB", (size[0] * len(shown), size[1]))
    for place, frame in enumerate(shown):
        picture = Image.fromarray(frame)
        made.paste(picture if scale == 1.0 else picture.resize(size), (place * size[0], 0))
    return made, len(shown)


def contact_sheet(videos: Sequence[Video], frames_per_video: int | None = None) -> Image.Image:
    """One row of evenly spaced frames per clip, with its prompt above, as a PIL RGB image on white; None: 8 frames.

    A prompt wider than the sheet is cut. Characters beyond ASCII appear as boxes. Raises OutputError for no clips.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not isinstance(videos, Sequence) or not videos or not all(isinstance(video, Video) for video in videos):
        raise OutputError(f"videos={quoted(videos)}: a list of at least one clip")
    count = 8 if frames_per_video is None else frames_per_video
    rows = [video.contact_sheet(count, count) for video in videos]
    width, line = max(row.width for row in rows), 20
    sheet = Image.new("RGB", (width, sum(line + row.height + 2 * _GAP for row in rows)), "white")
    draw, font, y = ImageDraw.Draw(sheet), ImageFont.load_default(14), 0
    for video, row in zip(videos, rows, strict=True):
        text = shown = " ".join(video.prompt[:1000].split())
        while text and draw.textlength(shown, font) > width:
            text = text[:-1]
            shown = text + "..."
        draw.text((0, y), shown, "black", font)
        sheet.paste(row, (0, y + line))
        y += line + row.height + 2 * _GAP
    return sheet
