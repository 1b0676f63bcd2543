"""Writes the sound of a video file: cut or padded to the clip, encoded, and muxed in step with the pictures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen.media.sound import Sound

__all__ = ["Track", "fitted"]

_RATE = 48_000
"""Samples a second in the file. Opus always uses this rate, and every player supports it for AAC."""


def fitted(sound: Sound, seconds: float) -> tuple[Sound, str]:
    """The sound cut or padded to a clip's length, and a message about it: "" if it fits to a hundredth of a second."""
    wanted = round(seconds * sound.rate)
    missing = wanted - len(sound.samples)
    samples = np.pad(sound.samples[:wanted], ((0, max(missing, 0)), (0, 0)))
    if sound.more or missing < 0:
        return Sound(samples, sound.rate), f"the sound is longer than the clip and is cut to {seconds:.2f} s"
    if missing > 0.01 * sound.rate:
        return Sound(samples, sound.rate), f"the sound has {sound.seconds:.2f} s: silence follows up to {seconds:.2f} s"
    return Sound(samples, sound.rate), ""


class Track:
    """The sound stream of an opened output container."""

    def __init__(self, output: Any, codec: str, sound: Sound) -> None:
        """Make the track before the first packet is muxed."""
        layout = "mono" if sound.samples.shape[1] == 1 else "stereo"
        self._stream = output.add_stream(codec, _RATE, layout=layout)
        self._stream.bit_rate = 128_000 if layout == "mono" else 192_000
        self._blocks = _blocks(np.clip(sound.samples, -1, 1), sound.rate, layout, self._stream.codec_context)
        self._output = output
        self._reached = 0.0

    def play(self, until: float) -> None:
        """Encode and mux the sound up to the time `until`, in seconds."""
        while self._reached < until and (block := next(self._blocks, None)) is not None:
            self._reached = block.pts / _RATE
            self._output.mux(self._stream.encode(block))

    def close(self) -> None:
        """Encode and mux the rest of the sound."""
        self.play(float("inf"))
        self._output.mux(self._stream.encode(None))


def _blocks(samples: NDArray[np.float32], rate: int, layout: str, context: Any) -> Iterator[Any]:
    """The samples as frames with the encoder's size and format."""
    import av

    context.open()
    resampler = av.AudioResampler(context.format, context.layout, _RATE, context.frame_size or None)
    done = 0
    for first in range(0, len(samples), rate):
        part = np.ascontiguousarray(samples[first : first + rate]).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(part, format="flt", layout=layout)
        frame.sample_rate, frame.pts = rate, first
        for made in (*resampler.resample(frame), *(resampler.resample(None) if first + rate >= len(samples) else ())):
            made.pts = done
            done += made.samples
            yield made
