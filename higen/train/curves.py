"""The cues of a video as curves over time (`higen cues`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from higen.bundle import Bundle
from higen.errors import HigenError, OutputError, RequestError
from higen.families.higen import spec
from higen.media.cuts import find_cuts
from higen.models.companion_stages import EncoderStage
from higen.models.companions import load_autoencoder
from higen.output_file import output_file
from higen.train.cues import appearance_factor, appearance_similarity, motion_of
from higen.train.latents import OpenClip, encode
from higen.train.media import Placement, Unusable, read_part, sampled_rate, video_length

__all__ = ["Curves", "as_text", "measure", "save_plot"]

_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Curves:
    """motion: one number per pair of frames. appearance: each frame's similarity to the first one, 1 the same.

    `motion_factor` and `appearance_factor` are the single numbers closest to them: what `higen generate` takes.
    fps: what the video was sampled at. notes: what a person should know of the measurement, a line each.
    """

    fps: float
    motion: tuple[float, ...]
    appearance: tuple[float, ...]
    motion_factor: float
    appearance_factor: float
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            **vars(self),
            "motion": list(self.motion),
            "appearance": list(self.appearance),
            "notes": list(self.notes),
        }


def measure(
    bundle: Bundle, video: Path, *, fps: int | None = None, frames: int | None = None, openclip: str | None = None
) -> Curves:
    """The cues of a video as a model's training measures them, at the model's size.

    fps       frames a second; None: the model's. Whole strides of the video's own are taken, where that is near
    frames    length of the part in the middle that is looked at, from 2; None: all, up to the model's max_frames
    openclip  folder of a CLIP picture tower for the appearance; None: the latents

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
    autoencoder = load_autoencoder(
        bundle.file(spec.AUTOENCODER), config.autoencoder.kind, config.autoencoder.arguments, torch.float32
    )
    tower = None if openclip is None else OpenClip(openclip, torch.device("cpu"))
    encoded = encode(
        EncoderStage(autoencoder, config.autoencoder.shift, config.autoencoder.scale).eval(), pixels, tower
    )
    latents = encoded.mean  # without the posterior's noise: the same video gives the same curves
    features = latents.transpose(0, 1).flatten(1) if encoded.features is None else encoded.features
    motion, similarity = motion_of(latents[None])[0].double(), appearance_similarity(features[None])
    return Curves(
        fps=float(f"{sampled:.6g}"),
        motion=tuple(motion.tolist()),
        appearance=tuple(round(value, 4) for value in similarity[0, 0].tolist()),
        motion_factor=round(float(motion.mean()), 1),
        appearance_factor=round(float(appearance_factor(similarity)), 3),
        notes=tuple(_notes(rate, sampled, find_cuts(pixels))),
    )


def _notes(rate: float, sampled: float, cuts: Sequence[int]) -> Iterator[str]:
    if sampled != rate:
        yield f"the video is sampled at {sampled:.4g} frames a second, in whole strides of its own, not at {rate:g}"
    if cuts:
        seconds = ", ".join(f"{cut / sampled:.2f} s" for cut in cuts)
        yield f"the picture changes at once at {seconds}: a cut is measured as motion"


def as_text(curves: Curves) -> str:
    """Both curves as bars and as a table."""
    lines = [
        f"motion      {_bars(curves.motion)}  mean {curves.motion_factor:g}",
        f"appearance  {_bars(curves.appearance)}  factor {curves.appearance_factor:g}",
        "",
        "  time s    motion  appearance",
    ]
    for i, similarity in enumerate(curves.appearance):
        motion = f"{curves.motion[i - 1]:10.0f}" if i else " " * 10
        lines.append(f"{i / curves.fps:8.2f}{motion}{similarity:12.3f}")
    return "\n".join(lines)


def _bars(values: Sequence[float]) -> str:
    low, high = min(0.0, *values), max(values)
    unit = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * unit)] for value in values)


def save_plot(curves: Curves, path: Path) -> None:
    """Both curves over time as a picture. Raises OutputError where it cannot be written."""
    from PIL import Image, ImageDraw, ImageFont

    width, height, margin = 640, 180, 46
    picture = Image.new("RGB", (width, 2 * height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    panels = (("motion", np.array(curves.motion), 1), ("appearance", np.array(curves.appearance), 0))
    seconds = (len(curves.appearance) - 1) / curves.fps
    for row, (name, values, first) in enumerate(panels):
        top, bottom = row * height + 24, (row + 1) * height - 24
        low, high = min(0.0, float(values.min())), float(values.max())
        high = high if high > low else low + 1.0
        x = margin + (np.arange(len(values)) + first) / curves.fps / seconds * (width - 2 * margin)
        y = bottom - (values - low) / (high - low) * (bottom - top)
        draw.text((margin, top - 18), f"{name}, {curves.fps:g} frames a second", "black", font)
        draw.line([(margin, top), (margin, bottom), (width - margin, bottom)], "gray")
        for value, place in ((high, top), (low, bottom)):
            draw.text((4, place - 6), f"{value:.4g}", "gray", font)
        draw.text((width - margin - 24, bottom + 4), f"{seconds:.2f} s", "gray", font)
        points = list(zip(x.tolist(), y.tolist(), strict=True))
        draw.line(points, "#1f77b4", 2)
        for px, py in points:
            draw.ellipse((px - 2, py - 2, px + 2, py + 2), "#1f77b4")
    try:
        with output_file(path) as temporary:
            picture.save(temporary)
    except HigenError:
        raise
    except (OSError, ValueError) as error:  # ValueError: an unknown suffix
        raise OutputError(f"{path}: cannot be written: {error}") from error
