"""Curves measured from clips and sounds, in the units of a control (docs/controls.md describes the methods).

For the encoding `sinusoid`, the curve is 10 times the distance of neighbouring frames' latents; for `similarity`, it is
the likeness of frames (reference: the training recipe, spec section 8). Any other curve is the amount of change in the
picture, mapped into the control's range. The model's own encoder makes the latents, on the model's backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from higen.backends.base import Backend
from higen.conditioning import curve_values, resample_in_time, similarity_rows
from higen.curve_source import CurveAsked, CurveFrom
from higen.errors import MediaWarning, OutputError, RequestError, quoted
from higen.manifest import Manifest
from higen.media.files import STREAMS, moves
from higen.media.sampling import SAME, Held, Source, Unusable, clip_from, opened, rate_of
from higen.media.sound import FEATURES, SOUNDS, read_sound
from higen.stages import Stage, source
from higen.video_reader import READABLE, read

__all__ = [
    "MEASURED",
    "distances",
    "encoder_of",
    "latents_of",
    "likeness",
    "measured_cues",
    "measured_curve",
    "requested_curves",
    "sound_curve",
]

MEASURED = ("sinusoid", "similarity")
"""Encodings with curves in their own units; such a curve can be measured from a clip."""


class _Clip(Protocol):
    """The parts of a `Video` that are used here."""

    @property
    def frames(self) -> NDArray[np.uint8]: ...

    @property
    def fps(self) -> float: ...

    def __len__(self) -> int: ...


def distances(latents: NDArray[np.floating[Any]]) -> list[float]:
    """10 times the L2 distance of neighbouring frames' latents [F,C,H,W], rounded down as in training; [F - 1]."""
    step = np.diff(latents.astype(np.float64), axis=0)
    return np.floor(10 * np.sqrt((step**2).sum(axis=(1, 2, 3)))).tolist()  # type: ignore[no-any-return]


def likeness(features: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """How similar frames look, from features [F, ...]: 5 cos - 4 as [F,F] (1: equal, 0: the cosine is 0.8)."""
    rows = features.reshape(len(features), -1).astype(np.float64)
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    found: NDArray[np.float64] = 5 * (unit @ unit.T) - 4
    return found


def encoder_of(manifest: Manifest) -> Stage | None:
    """The stage that encodes a loop's latents and has pixels as its only input; None: there is no such stage."""
    for loop in manifest.loops:
        for row in (loop.replaced, loop.start):
            stage = manifest.stage(source(row.latents).name) if row and source(row.latents).kind == "made" else None
            if stage is None or len(stage.inputs) != 1:
                continue
            origin = source(stage.inputs[0].source)
            if origin.kind in ("picture", "clip") and not origin.resampled:
                return stage
    return None


def latents_of(manifest: Manifest, backend: Backend, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 frames [F,Y,X,3] as latents [F,C,H,W], a chunk at a time. Raises RequestError without an encoder."""
    stage = encoder_of(manifest)
    if stage is None:
        raise RequestError(
            f"{manifest.name} has no stage that encodes frames, so no clip can be measured; give numbers"
        )
    (given,), size = stage.inputs, manifest.sizes.chunk
    whole = len(given.shape) == 5
    made = []
    for first in range(0, len(frames), len(frames) if whole else size):
        chunk = frames[first:] if whole else frames[first : first + size]
        pixels = np.ascontiguousarray(chunk.transpose(0, 3, 1, 2)).astype(np.float32) / 127.5 - 1.0
        pixels = np.ascontiguousarray(pixels.swapaxes(0, 1))[None] if whole else pixels
        output = backend.to_numpy(backend.run(stage.name, **{given.name: pixels})[stage.outputs[0].name])
        made.append(output[0].swapaxes(0, 1) if output.ndim == 5 else output)
    return np.concatenate(made)


def measured_curve(
    manifest: Manifest, backend: Backend, asked: CurveAsked, given: CurveFrom, warn: Callable[[Warning], None]
) -> Any:
    """The curve of a clip or sound as the numbers, or the matrix of likenesses, that the control takes.

    Raises RequestError, beginning with the control's name, for a file that cannot be read, is too short or is silent,
    and for a sound if neither the control nor the request gives a range.
    """
    what = asked.name if given.path is None else f"{asked.name}={quoted(str(given.path))}"
    try:
        if _is_sound(given):
            return sound_curve(asked, given, lambda line: warn(MediaWarning(f"{what}: {line}")))
        return _of_clip(manifest, backend, asked, given, lambda line: warn(MediaWarning(f"{what}: {line}")))
    except RequestError as error:
        raise RequestError(f"{what}: {error}") from error
    except (OutputError, Unusable) as error:
        reason = str(error).removeprefix(f"{given.path}: ")
        raise RequestError(f"{what}: {reason}") from error


def _is_sound(given: CurveFrom) -> bool:
    path = given.path
    if path is None:
        return False
    suffix = path.suffix.lower()
    if suffix not in (*SOUNDS, *READABLE) and not path.is_file():
        raise RequestError("a number, numbers, or a clip or sound file; no such file exists")
    return suffix in SOUNDS or (given.feature is not None and suffix in STREAMS)


# Sounds.


def _span(asked: CurveAsked, given: CurveFrom) -> tuple[float, float]:
    """The range that the curve is mapped into. Raises RequestError."""
    low, high = asked.span if asked.span is not None else (0.0, None)
    low, high = given.low if given.low is not None else low, given.high if given.high is not None else high
    if high is None:
        raise RequestError("the model names no range for it: add :low=NUMBER:high=NUMBER")
    return low, high


def sound_curve(asked: CurveAsked, given: CurveFrom, note: Callable[[str], None]) -> list[float]:
    """The numbers of a sound file. `note` gets a line if the sound ends before the clip. Raises as `measured_curve`."""
    low, high = _span(asked, given)
    assert given.path is not None
    seconds = asked.frames / asked.fps
    sound = read_sound(given.path, given.start, seconds)
    if sound.seconds < seconds - 0.5 / asked.fps:
        note(f"{sound.seconds:.2f} s from {given.start:g} s on, for a clip of {seconds:.2f} s: the rest is silence")
    feature = given.feature or "energy"
    # A value for two neighbouring frames is measured over the time of the first one.
    count = max(asked.frames - 1, 1) if asked.encoding == "sinusoid" else asked.frames
    values = FEATURES[feature](sound, count, asked.fps)
    if not values.any():
        raise RequestError(f"no {feature} in it while the clip lasts")
    return (low + (high - low) * values).tolist()  # type: ignore[no-any-return]


# Clips.


def _of_clip(
    manifest: Manifest, backend: Backend, asked: CurveAsked, given: CurveFrom, note: Callable[[str], None]
) -> Any:
    if given.feature is not None:
        raise RequestError(f"feature={given.feature!r}: only for a sound, but this is a clip")
    if asked.encoding in MEASURED and (given.low, given.high) != (None, None):
        raise RequestError("low, high: a clip is measured in the control's own units; leave them out")
    frames = _frames(manifest, asked, given, note)
    if asked.encoding == "similarity":
        return likeness(latents_of(manifest, backend, frames))
    if asked.encoding == "sinusoid":
        return distances(latents_of(manifest, backend, frames)) or [0.0]
    low, high = _span(asked, given)
    change = np.abs(np.diff(frames.astype(np.float32), axis=0)).mean(axis=(1, 2, 3), dtype=np.float64)
    change = change if len(change) else np.zeros(1)
    values = (low + (high - low) * change / max(float(change.max()), 1e-12)).astype(np.float32)
    return resample_in_time(values[:, None], asked.frames)[:, 0].astype(np.float64).tolist()


def _frames(manifest: Manifest, asked: CurveAsked, given: CurveFrom, note: Callable[[str], None]) -> NDArray[np.uint8]:
    """The frames at the times of the requested frames. A control's units are valid only at the model's default size."""
    found = _source(given)
    rate = rate_of(found.times, found.end, asked.fps, asked.frames)
    if abs(rate / asked.fps - 1) >= SAME:
        note(f"every n-th frame is used: {rate:.4g} frames a second instead of {asked.fps:g}")
    first = round(given.start * rate)
    return clip_from(found, asked.fps, asked.frames, first, manifest.sizes.width, manifest.sizes.height)


def _source(given: CurveFrom) -> Source:
    path = given.path
    if path is None:
        clip: _Clip = given.source
        return Held(np.asarray(clip.frames), float(clip.fps))
    suffix = path.suffix.lower()
    if suffix in STREAMS or moves(path) or suffix == ".gif":
        return opened(path)
    kept = read(path)
    if not len(kept.frames):
        raise RequestError("no frame in it")
    return Held(kept.frames, kept.fps)


# The curves of a clip, measured and requested.


def measured_cues(manifest: Manifest, backend: Backend, clip: _Clip) -> dict[str, NDArray[np.float64]]:
    """The measured curves of a clip, by control (encodings in MEASURED): one number per pair of frames, or each frame's
    likeness to the first one. Raises RequestError for a model without such a control, and for a clip of one frame.
    """
    controls = [control for control in manifest.controls if control.encoding in MEASURED]
    if not controls:
        raise RequestError(f"{manifest.name} has no control that a clip is measured in")
    if len(clip) < 2:
        raise RequestError("1 frame: at least 2 are measured")
    held, sizes = Held(np.asarray(clip.frames), float(clip.fps)), manifest.sizes
    frames = clip_from(held, float(clip.fps), len(clip), 0, sizes.width, sizes.height)
    latents = latents_of(manifest, backend, frames)
    moved, alike = np.array(distances(latents)), likeness(latents)[0]
    return {control.name: moved if control.encoding == "sinusoid" else alike for control in controls}


def requested_curves(manifest: Manifest, metadata: Mapping[str, Any], frames: int) -> dict[str, NDArray[np.float64]]:
    """The requested curves in a clip's metadata, in the form of `measured_cues`; unspecified ones are left out."""
    found = {}
    for control in manifest.controls:
        value = metadata.get(control.name)
        if control.encoding not in MEASURED or value is None:
            continue
        try:
            if control.encoding == "sinusoid":
                found[control.name] = curve_values(control.name, value, frames).astype(np.float64)
            else:
                found[control.name] = similarity_rows(control.name, value, frames, frames)[:, 0].astype(np.float64)
        except RequestError:  # another model made the clip, or the clip was cut
            continue
    return found
