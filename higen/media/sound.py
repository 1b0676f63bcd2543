"""Reads sound files, and computes two curves of a sound at a clip's frame rate: its energy and its onsets.

WAV files with integer samples are read by the standard library, other formats by FFmpeg (PyAV).
"""

from __future__ import annotations

import wave
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen.errors import OutputError, is_of_a_handler
from higen.media.files import head, reason

__all__ = ["FEATURES", "SOUNDS", "Sound", "energy", "onsets", "read_sound"]

SOUNDS = (
    *(".wav", ".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".aif", ".aiff", ".aifc"),
    *(".caf", ".wma", ".au", ".w64", ".mka", ".ac3", ".amr"),
)
"""Suffixes of sound files. The sound of video files can be read too."""

_DEMUXERS = "wav,w64,mp3,flac,ogg,mov,matroska,webm,aac,aiff,caf,asf,au,ac3,amr,avi,mpegts,mpeg,flv"
_MAX_SAMPLES = 2**28
_MAX_RATE = 384_000
_SILENT = 1e-5
"""A sound counts as silent if all amplitudes are below this, which is less than the last bit of 16-bit samples."""

_HOP = 0.01  # seconds between spectra
_WINDOW = 0.023  # shortest length of one spectrum's window, in seconds
_COMPRESSION = 100.0  # of magnitudes m: log(1 + 100 m)


@dataclass(frozen=True, eq=False)
class Sound:
    """A part of a sound.

    samples  float32 [n, channels], about -1 to 1; one or two channels
    rate     samples per second
    more     whether the file continues after the part
    """

    samples: NDArray[np.float32]
    rate: int
    more: bool = False

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return len(self.samples) / self.rate

    @property
    def mono(self) -> NDArray[np.float64]:
        """The mean of the channels, float64 [n]."""
        return np.asarray(self.samples.mean(axis=1, dtype=np.float64))


def read_sound(path: Path, start: float = 0.0, seconds: float | None = None) -> Sound:
    """The sound in a file from the time `start` on, in seconds. `seconds`: length of the part; None: to the end.

    Raises OutputError, with the file's name, if the file cannot be read, has no sound, ends before `start`, or is
    silent in the whole part.
    """
    try:
        sound = _read(path, start, seconds)
        if not len(sound.samples):
            raise OutputError("there is no sound in it" if not start else f"it ends before {start:g} s")
        if not np.isfinite(sound.samples).all():
            raise OutputError("it has samples that are not numbers")
        if float(np.abs(sound.samples).max()) < _SILENT:
            raise OutputError(
                "it is silent" if seconds is None else f"its {seconds:g} s from {start:g} s on are silent"
            )
    except Exception as error:  # a decoder may raise anything on corrupt data
        if is_of_a_handler(error):
            raise
        raise OutputError(f"{path}: cannot be used as a sound: {reason(error)}") from error
    return sound


def _read(path: Path, start: float, seconds: float | None) -> Sound:
    begin = head(path)
    if begin[:4] == b"RIFF" and begin[8:12] == b"WAVE":
        try:
            return _read_wave(path, start, seconds)
        except (wave.Error, EOFError):  # floats or compressed: FFmpeg reads it or says what is wrong
            pass
    return _read_stream(path, start, seconds)


def _part(rate: int, start: float, seconds: float | None) -> tuple[int, int]:
    """The first sample of a part, and the most samples it may have. Raises OutputError."""
    if not 1 <= rate <= _MAX_RATE:
        raise OutputError(f"it has {rate} samples a second: 1 to {_MAX_RATE}")
    count = _MAX_SAMPLES if seconds is None else round(seconds * rate)
    if count > _MAX_SAMPLES:
        raise OutputError(f"{seconds:g} s of it are {count} samples: at most {_MAX_SAMPLES}")
    return round(start * rate), count


def _read_wave(path: Path, start: float, seconds: float | None) -> Sound:
    with wave.open(str(path), "rb") as file:
        rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
        first, count = _part(rate, start, seconds)
        if first >= file.getnframes():
            return Sound(np.zeros((0, 1), np.float32), rate)
        file.setpos(first)
        data = file.readframes(min(count, file.getnframes() - first))
        more = first + count < file.getnframes()
    data = data[: len(data) // (width * channels) * width * channels]
    if width == 3:  # widened to 32 bits, with a low byte of 0
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        samples = wide.view("<i4")[:, 0] / np.float32(2**31)
    elif width == 1:
        samples = (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
    else:
        samples = np.frombuffer(data, f"<i{width}") / np.float32(2 ** (8 * width - 1))
    return Sound(_one_or_two(samples.astype(np.float32).reshape(-1, channels)), rate, more)


def _one_or_two(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Keep at most two channels: in every layout the first two are left and right."""
    return np.ascontiguousarray(samples[:, :2])


def _read_stream(path: Path, start: float, seconds: float | None) -> Sound:
    import av

    options = {"format_whitelist": _DEMUXERS, "protocol_whitelist": "file"}
    try:
        container = av.open(f"file:{path.absolute()}", options=options)
    except (av.ArgumentError, av.InvalidDataError) as error:
        raise OutputError("it is corrupt, or not in a supported sound format") from error
    with container:
        if not container.streams.audio:
            raise OutputError("there is no sound in it")
        stream: Any = container.streams.audio[0]
        rate = int(stream.rate or 0)
        first, count = _part(rate, start, seconds)
        layout = "mono" if stream.channels == 1 else "stereo"
        resampler = av.AudioResampler(format="flt", layout=layout, rate=rate)
        parts: list[NDArray[np.float32]] = []
        skipped = held = 0
        for frame in _decoded(container, stream):
            for made in resampler.resample(frame):
                block = made.to_ndarray().astype(np.float32).reshape(-1, 1 if layout == "mono" else 2)
                if skipped + held + len(block) <= first:
                    skipped += len(block)
                    continue
                parts.append(block)
                held += len(block)
            if skipped + held > first + count:
                break
    samples = np.concatenate(parts)[first - skipped :] if parts else np.zeros((0, 1), np.float32)
    return Sound(samples[:count], rate, len(samples) > count)


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """The frames of a sound without time stamps, then None, which flushes the resampler."""
    for frame in container.decode(stream):
        frame.pts = None
        yield frame
    yield None


# Curves.


def energy(sound: Sound, frames: int, fps: float) -> NDArray[np.float64]:
    """Loudness during each frame, float64 [frames]: the root mean square, scaled so that the loudest frame is 1."""
    edges = np.rint(np.arange(frames + 1) * (sound.rate / fps)).astype(np.int64)
    power = np.concatenate([[0.0], np.cumsum(sound.mono**2)])
    inside = np.minimum(edges, len(power) - 1)
    mean = np.diff(power[inside]) / np.maximum(np.diff(edges), 1)
    return _of_largest(np.sqrt(np.maximum(mean, 0.0)))


def onsets(sound: Sound, frames: int, fps: float) -> NDArray[np.float64]:
    """Strength of the onsets during each frame, float64 [frames]; the strongest is 1. All 0 if there is no onset.

    The measure is spectral flux (Dixon, "Onset detection revisited", DAFx 2006): the increase of
    log(1 + 100 |spectrum|) from one hundredth of a second to the next, summed over the frequencies, minus its median.
    Each frame gets its largest value.
    """
    hop = max(round(_HOP * sound.rate), 1)
    size = 1 << max(round(_WINDOW * sound.rate) - 1, 1).bit_length()
    padded = np.pad(sound.mono, (size - hop, size))  # so a sound at the start of the file is an onset
    blocks = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop]
    window = np.hanning(size) * (2 / size)
    before = np.zeros(size // 2 + 1)
    flux = np.zeros(len(blocks))
    for place, block in enumerate(blocks):
        heard = np.log1p(_COMPRESSION * np.abs(np.fft.rfft(block * window)))
        flux[place] = np.maximum(heard - before, 0.0).sum()
        before = heard
    flux = np.maximum(flux - np.median(flux), 0.0)
    # Block i ends at sample (i + 1) * hop, so its newest samples begin at i * hop.
    at = np.minimum((np.arange(len(flux)) * hop / sound.rate * fps).astype(np.int64), frames)
    found = np.zeros(frames + 1)
    np.maximum.at(found, at, flux)
    return _of_largest(found[:frames])


def _of_largest(values: NDArray[np.float64]) -> NDArray[np.float64]:
    most = float(values.max(initial=0.0))
    return values / most if most > 0 else values


FEATURES: Mapping[str, Callable[[Sound, int, float], NDArray[np.float64]]] = {"energy": energy, "onsets": onsets}
"""The functions for a sound's curves, by name."""
