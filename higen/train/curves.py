"""The cues of a video as curves over time (`higen cues`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen import cue_plot
from higen.backends.options import Options
from higen.backends.select import select_backend
from higen.bundle import Bundle
from higen.errors import HigenError, RequestError
from higen.families.higen import spec
from higen.measured_curves import distances, latents_of, likeness, requested_curves
from higen.media.cuts import find_cuts
from higen.media.sampling import SAME, Placement, Unusable, read_part, sampled_rate, video_length
from higen.terminal import needs
from higen.video_reader import read

__all__ = ["Curves", "as_text", "bars", "measure", "other_likeness", "save_plot"]

NONE = np.zeros(0)
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Curves:
    """motion: one number per pair of consecutive frames. appearance: each frame's similarity to the first (1: equal).

    `motion_factor` and `appearance_factor` are the single numbers closest to the curves; `higen generate` takes them.
    fps: the rate at which the video was sampled. notes: remarks on the measurement for the user, one line each.
    requested: the requested curves from the file's metadata, if the file is a complete clip made by higen.
    """

    fps: float
    motion: tuple[float, ...]
    appearance: tuple[float, ...]
    motion_factor: float
    appearance_factor: float
    notes: tuple[str, ...] = ()
    requested: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The curves as JSON values."""
        return {
            "fps": self.fps,
            "motion": list(self.motion),
            "appearance": list(self.appearance),
            "motion_factor": self.motion_factor,
            "appearance_factor": self.appearance_factor,
            "notes": list(self.notes),
        }


def measure(
    bundle: Bundle, video: Path, *, fps: int | None = None, frames: int | None = None, openclip: str | None = None
) -> Curves:
    """The cues of a video as a model's training measures them, at the model's size.

    fps       frames per second; None: the model's. If every n-th frame of the video gives nearly this rate, those
              frames are taken
    frames    number of frames to measure from the middle of the video, at least 2; None: all, up to the model's
              max_frames
    openclip  folder of a CLIP picture tower for the appearance; None: the latents are used

    Raises RequestError for a video that cannot be read or is too short.
    """
    config = spec.config(bundle.manifest)
    rate, size = config.defaults.fps if fps is None else fps, config.defaults
    if rate < 1:
        raise RequestError(f"fps={rate}: 1 or more frames a second")
    try:
        length = min(video_length(video, rate), config.max_frames) if frames is None else frames
        if length < 2:
            raise RequestError(f"{video}: {length} frames at {rate} a second: at least 2 frames")
        sampled = sampled_rate(video, rate, length)
        pixels = read_part(video, size.width, size.height, rate, length, Placement())
    except Unusable as error:
        raise RequestError(f"{video}: {error}") from error
    backend = select_backend(bundle, options=Options(device="cpu"))
    try:
        latents = latents_of(bundle.manifest, backend, pixels)
    finally:
        backend.close()
    motion = distances(latents)
    similarity = likeness(latents if openclip is None else _features(openclip, pixels))
    return Curves(
        fps=float(f"{sampled:.6g}"),
        motion=tuple(motion),
        appearance=tuple(round(value, 4) for value in similarity[0].tolist()),
        motion_factor=round(float(np.mean(motion)), 1),
        appearance_factor=round(_factor(similarity), 3),
        notes=tuple(_notes(rate, sampled, find_cuts(pixels))),
        requested=_requested(bundle, video, length, sampled),
    )


def _requested(bundle: Bundle, video: Path, frames: int, fps: float) -> dict[str, NDArray[np.float64]]:
    """The requested curves from the metadata of a clip made by higen, if the whole clip was measured."""
    try:
        clip = read(video)
    except HigenError:
        return {}
    whole = len(clip.frames) == frames and abs(clip.fps / fps - 1) < SAME
    return requested_curves(bundle.manifest, clip.metadata, frames) if whole else {}


def _features(openclip: str, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A CLIP picture tower's features [F,D] of frames [F,Y,X,3]."""
    with needs("train", "the OpenCLIP appearance cue"):
        import torch

        from higen.train.latents import CHUNK, OpenClip, to_pixels
    tower = OpenClip(openclip, torch.device("cpu"))
    return torch.cat([tower(chunk) for chunk in to_pixels(pixels).split(CHUNK)]).numpy()


def _factor(similarity: NDArray[np.float64]) -> float:
    """The factor a for which the matrix 1 - a |i-j|/(F-1) is closest to a similarity [F,F] in least squares."""
    place = np.linspace(0, 1, len(similarity))
    distance = np.abs(place[:, None] - place[None, :])
    return float(((1 - similarity) * distance).sum() / (distance**2).sum())


def other_likeness(config: spec.ModelConfig, openclip: str | None) -> str | None:
    """A notice that the appearance is measured on the latents, for a model with an appearance factor; else None."""
    if openclip is not None or config.defaults.appearance is None:
        return None
    return (
        f"appearance is measured on the latents: if {config.name} learnt it with OpenCLIP, as the released model did, "
        "its factor means something else; give the tower's folder as openclip"
    )


def _notes(rate: float, sampled: float, cuts: Sequence[int]) -> Iterator[str]:
    if sampled != rate:
        yield f"the video is sampled at {sampled:.4g} frames a second, not at {rate:g}: every n-th frame is used"
    if cuts:
        seconds = ", ".join(f"{cut / sampled:.2f} s" for cut in cuts)
        yield f"the picture changes at once at {seconds}: a cut is measured as motion"


def as_text(curves: Curves) -> str:
    """Both curves as bars and as a table."""
    lines = [
        f"motion      {bars(curves.motion)}  mean {curves.motion_factor:g}",
        f"appearance  {bars(curves.appearance)}  factor {curves.appearance_factor:g}",
        "",
        "  time s    motion  appearance",
    ]
    for i, similarity in enumerate(curves.appearance):
        motion = f"{curves.motion[i - 1]:10.0f}" if i else " " * 10
        lines.append(f"{i / curves.fps:8.2f}{motion}{similarity:12.3f}")
    return "\n".join(lines)


def bars(values: Sequence[float]) -> str:
    """Numbers as bars in a line of text."""
    low, high = min(0.0, *values), max(values)
    unit = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * unit)] for value in values)


def save_plot(curves: Curves, path: Path) -> None:
    """Save a picture of both curves over time, and of the requested curves if the file has them.

    Raises OutputError if the picture cannot be written.
    """
    found = {"motion": np.array(curves.motion), "appearance": np.array(curves.appearance)}
    panels = [cue_plot.Panel(name, values, curves.requested.get(name, NONE)) for name, values in found.items()]
    cue_plot.save(cue_plot.draw(panels, len(curves.appearance), curves.fps), path)
