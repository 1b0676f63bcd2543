"""Writes clips to files; the suffix decides the format (see higen/video.py)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from higen.errors import HigenError, OutputError, is_of_a_handler, quoted
from higen.media.sound import Sound, read_sound
from higen.media.soundtrack import Track, fitted
from higen.output_file import check_file, check_folder, check_names, keep_mode, lies, output_file
from higen.paths import given_path
from higen.staging import exclusive, staging
from higen.video_frames import FRAME, clip_id, frame_text, replaced
from higen.video_record import Clip, numbered, pack

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["check_output", "import_codecs", "read_track", "write"]

_Encode = Callable[[Clip, Path], None]


def write(clip: Clip, path: str | os.PathLike[str]) -> Path:
    """Write the clip; see `Video.save`. Returns the written file (for .png, the first one)."""
    path = check_output(path, len(clip.frames), clip.fps)
    encode, _ = _WRITERS[path.suffix.lower()]
    try:
        if path.suffix.lower() == ".png":
            return _place_sequence(clip, path, encode)
        with output_file(path) as temporary:
            encode(clip, temporary)
        return path
    except HigenError:
        raise
    except Exception as error:  # encoders also raise other errors than OSError
        if is_of_a_handler(error):
            raise
        raise OutputError(f"{path}: cannot be written ({error})") from error


def _place_sequence(clip: Clip, path: Path, encode: _Encode) -> Path:
    """Replace the existing sequence by all frames, or by none."""
    folder, count = path.parent.absolute(), len(clip.frames)
    with staging(folder) as stage:
        made = stage.folder / f"new{path.suffix}"
        encode(clip, made)
        with exclusive(folder):
            beyond = replaced(folder / path.name, count)  # checked again, because another process may have written
            pairs = [(numbered(made, index), numbered(folder / path.name, index)) for index in range(count)]
            for new, old in pairs:
                keep_mode(new, old)
            stage.commit(pairs, beyond)
    return numbered(path, 0)


def check_output(path: str | os.PathLike[str], frames: int = 1, fps: float | None = None) -> Path:
    """The path, if `Video.save` can write a clip of this many frames there. Call this before making the clip.

    An existing file is replaced, also through a link. Raises OutputError for an unknown suffix, a name that the file
    system does not accept, a read-only file, anything but a regular file, a missing or read-only folder, a rate that
    the format cannot have, and for .png, if a file has a frame's name but higen did not write it as that frame.
    """
    path = given_path(path, "output")
    suffix = path.suffix.lower()
    with check_names(path):
        if suffix not in _WRITERS:
            text = quoted(os.fspath(path))
            raise OutputError(f"{text}: the suffix {quoted(path.suffix)} is unknown; known are {', '.join(_WRITERS)}")
        fastest = _WRITERS[suffix][1]
        if fps is not None and not 0.01 <= fps <= fastest:
            raise OutputError(f"fps={fps:g}: a {path.suffix} file plays 0.01 to {fastest:g} frames a second")
        if suffix != ".png":
            check_file(path)
            return path
        if path.is_dir() or numbered(path, 0).is_dir():
            raise OutputError(f"{path}: is a folder; name a file in it")
        lies(numbered(path, max(frames, 1) - 1))
        check_folder(path, path.parent, writing=True)
        replaced(path, frames)
    return path


def read_track(path: Path, audio: str | os.PathLike[str], seconds: float) -> tuple[Sound, str]:
    """The sound to write with the frames at `path`, cut or padded to `seconds`, and a description of that change.

    Raises OutputError for a format without sound, and for a file that is not a sound or is silent for `seconds`.
    """
    if path.suffix.lower() not in _CODECS:
        raise OutputError(f"{path}: a {path.suffix} file has no sound; {', '.join(_CODECS)} have")
    return fitted(read_sound(given_path(audio, "audio"), 0.0, seconds), seconds)


def import_codecs(path: Path) -> None:
    """Import now what `write` needs for a film; this takes a tenth of a second. Raises OutputError if it fails."""
    if path.suffix.lower() in _CODECS:
        try:
            import av.video.reformatter  # noqa: F401
        except ImportError as error:
            raise OutputError(f"{path}: cannot be written ({error})") from error


def _write_stream(clip: Clip, path: Path) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    container, codec, options, muxer, voice = _CODECS[path.suffix.lower()]
    even = np.pad(
        clip.frames, ((0, 0), (0, clip.frames.shape[1] % 2), (0, clip.frames.shape[2] % 2), (0, 0)), mode="edge"
    )
    with av.open(str(path), "w", format=container, options=muxer) as output:
        output.metadata["title"], output.metadata["comment"] = pack(clip)
        stream: Any = output.add_stream(codec, Fraction(clip.fps).limit_denominator(10_000), options=options)
        stream.height, stream.width = even.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # These tags only declare BT.709 and the limited range (both are 1). The conversion is `reformat` below.
        context = stream.codec_context
        context.colorspace = context.color_range = context.color_primaries = context.color_trc = 1
        track = None if clip.sound is None else Track(output, voice, clip.sound)
        for index, frame in enumerate(even):
            rgb = av.VideoFrame.from_ndarray(frame, format="rgb24")
            yuv = rgb.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            output.mux(stream.encode(yuv))
            if track is not None:
                track.play((index + 1) / clip.fps)
        output.mux(stream.encode(None))
        if track is not None:
            track.close()


def _quantized(frames: NDArray[np.uint8]) -> list[Image.Image]:
    from PIL import Image

    step = math.ceil(math.sqrt(frames.size / 3 / 32_768))  # enough pixels for a palette; takes 0.1 s
    sample = np.ascontiguousarray(frames[:, ::step, ::step])
    palette = Image.fromarray(sample.reshape(-1, sample.shape[2], 3)).quantize(256, Image.Quantize.MAXCOVERAGE)
    return [Image.fromarray(frame).quantize(palette=palette) for frame in frames]


def _write_animation(clip: Clip, path: Path) -> None:
    from PIL import Image

    _, payload = pack(clip)
    if path.suffix.lower() == ".gif":
        unit, (first, *rest) = 10, _quantized(clip.frames)
        options: dict[str, Any] = {"format": "GIF", "comment": payload.encode("ascii")}
    else:
        unit, (first, *rest) = 1, [Image.fromarray(frame) for frame in clip.frames]
        options = {"format": "WEBP", "lossless": True, "exif": Image.Exif()}
        options["exif"][0x010E] = payload  # ImageDescription
    # Milliseconds in multiples of the format's unit. Rounding the times of the edges avoids accumulated errors.
    edges = np.rint(np.arange(len(clip.frames) + 1) * (1000 / unit / clip.fps)).astype(int) * unit
    first.save(path, save_all=True, append_images=rest, duration=np.diff(edges).tolist(), loop=0, **options)


def _write_png(clip: Clip, path: Path) -> None:
    from PIL import Image, PngImagePlugin

    (title, payload), mark = pack(clip), clip_id(clip)
    for index, frame in enumerate(clip.frames):
        text = PngImagePlugin.PngInfo()
        text.add_itxt("Title", title)
        text.add_text("Comment", payload)
        text.add_text(FRAME, frame_text(mark, index))
        Image.fromarray(frame).save(numbered(path, index), "PNG", pnginfo=text)


def _write_npy(clip: Clip, path: Path) -> None:
    with path.open("wb") as file:  # if given a path, numpy would append .npy to .NPY
        np.save(file, clip.frames)


# Container, video encoder, its options, muxer options, sound encoder.
# VP9: b=0 means no limit on the bit rate, cpu-used=4 is fast.
_VP9 = {"crf": "24", "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1"}
_CODECS: dict[str, tuple[str, str, dict[str, str], dict[str, str], str]] = {
    ".mp4": ("mp4", "libx264", {"crf": "17"}, {"movflags": "+faststart"}, "aac"),
    ".webm": (
        "webm",
        "libvpx-vp9",
        {"crf": "24", "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1"},
        {},
        "libopus",
    ),
}
# Writer, highest rate (browsers show a .gif frame of less than 20 ms for 100 ms).
_WRITERS: dict[str, tuple[_Encode, float]] = {
    ".mp4": (_write_stream, 1000),
    ".webm": (_write_stream, 1000),
    ".gif": (_write_animation, 50),
    ".webp": (_write_animation, 1000),
    ".png": (_write_png, math.inf),
    ".npy": (_write_npy, math.inf),
}
