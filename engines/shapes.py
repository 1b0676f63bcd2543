"""Profiles: the shapes for which engines are built. The stage table turns a profile into ranges of each input's axes.

A profile is a TOML file. Each size is one number, [smallest, best, largest], or "default": the model's own size.

about = "one clip at a time"
batch = 1                    # samples; has no default
frames = "default"
height = [256, 256, 512]     # pixels
width = 448
images = "default"           # pictures per call of the autoencoder
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from higen.axes import MOST, chunk_of, frames_of, limits, tile_of
from higen.backends.plans import PlanProfile, Span
from higen.errors import RequestError, quoted
from higen.manifest import Manifest
from higen.paths import given_path
from higen.stages import TOKENS, Stage
from higen.text_files import TextError, read_toml

__all__ = ["Profile", "Range", "profile_names", "read_profile", "stage_profiles"]

LARGEST_VOLUME = 2**31 - 1
"""The largest number of elements that TensorRT allows in one tensor."""

WORDS = ("batch", "frames", "height", "width", "images")


@dataclass(frozen=True)
class Range:
    """Sizes of an axis: the smallest, the one that an engine is tuned for, and the largest."""

    smallest: int
    best: int
    largest: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The three sizes in this order."""
        return self.smallest, self.best, self.largest


@dataclass(frozen=True)
class Profile:
    """How a model is used: ranges of samples, frames, height and width in pixels, and images per call of the
    autoencoder.
    """

    name: str
    batch: Range
    frames: Range
    height: Range
    width: Range
    images: Range


def profile_names() -> list[str]:
    """The profiles that come with higen."""
    folder = files("higen.engines") / "profiles"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".toml"))


def read_profile(name: str, manifest: Manifest) -> Profile:
    """Read a profile for a model, given its name or the path of a TOML file.

    Raises RequestError for an unknown name, a file that is not a profile, a minimum above the maximum, or a size that
    the model cannot have.
    """
    entries, where = _entries(name)
    if unknown := sorted(set(entries) - {*WORDS, "about"}):
        raise RequestError(f"{where}: {', '.join(unknown)}: unknown; a profile has about, {', '.join(WORDS)}")
    if missing := [word for word in WORDS if word not in entries]:
        raise RequestError(f"{where}: {', '.join(missing)}: missing")
    profile = Profile(Path(name).stem, **{word: _range(word, entries[word], manifest, where) for word in WORDS})
    _check_sizes(profile, manifest, where)
    return profile


def _entries(name: str) -> tuple[dict[str, Any], str]:
    """A profile's table, and its name."""
    if name in (known := profile_names()):
        path = files("higen.engines") / "profiles" / f"{name}.toml"
        return tomllib.loads(path.read_text(encoding="utf-8")), f"profile {name}"
    if not name.endswith(".toml"):
        raise RequestError(f"profile={quoted(name)}: one of {', '.join(known)}, or the path of a .toml file")
    try:
        return read_toml(given_path(name)), name
    except (OSError, TextError) as error:
        raise RequestError(f"profile={quoted(name)}: cannot be read: {error}") from error


def _range(word: str, value: Any, manifest: Manifest, where: str) -> Range:
    sizes = manifest.sizes
    chunk = chunk_of(manifest, sizes.decoder)
    defaults = {
        "frames": [sizes.frames[1]] * 3,
        "height": [sizes.height] * 3,
        "width": [sizes.width] * 3,
        "images": [1, chunk, chunk],
    }
    if value == "default" and word in defaults:
        value = defaults[word]
    given = value if isinstance(value, list) else [value] * 3
    if len(given) != 3 or any(type(n) is not int or n < 1 for n in given):
        allowed = "a whole number from 1, or [smallest, best, largest]" + (', or "default"' if word in defaults else "")
        raise RequestError(f"{where}: {word}={value!r}: {allowed}")
    if not given[0] <= given[1] <= given[2]:
        raise RequestError(f"{where}: {word}={value}: smallest <= best <= largest")
    return Range(*given)


def _check_sizes(profile: Profile, manifest: Manifest, where: str) -> None:
    step, (fewest, _, most) = manifest.sizes.multiple, manifest.sizes.frames
    for frames in (profile.frames.smallest, profile.frames.largest):
        if not fewest <= frames <= most:
            raise RequestError(f"{where}: frames={frames}: this model makes {fewest} to {most}")
    for word, sizes in (("height", profile.height.sizes), ("width", profile.width.sizes)):
        if any(n % step for n in sizes):
            raise RequestError(f"{where}: {word}={list(sizes)}: multiples of {step} pixels for this model")


def stage_profiles(
    name: str, profiles: Iterable[Profile], manifest: Manifest, inputs: Mapping[str, Sequence[object]] | None = None
) -> tuple[PlanProfile, ...]:
    """Profiles as ranges of each input of a stage. Profiles that give this stage the same ranges are kept once.

    `inputs`: the graph's own shapes by name; None: the stage's shapes. In graphs of manifest version 1 guidance has one
    axis less. Raises RequestError for tensors larger than TensorRT allows.
    """
    stage = manifest.stage(name)
    axes = {input_name: len(shape) for input_name, shape in (inputs or {}).items()}
    made: dict[tuple[Span, ...], PlanProfile] = {}
    for profile in profiles:
        symbols = _symbols(stage, profile, manifest)
        spans = tuple(
            _span(stage, t.name, t.shape[: axes.get(t.name, len(t.shape))], symbols, profile.name) for t in stage.inputs
        )
        made.setdefault(spans, PlanProfile(profile.name, spans))
    return tuple(made.values())


def _symbols(stage: Stage, profile: Profile, manifest: Manifest) -> dict[str, Range]:
    """The range of each symbol. A denoising stage is run on a batch, in windows and tiles if its loop has any.

    All other stages are run for one sample, with the frames that a loop needs, or in chunks as the manifest says. Their
    ranges always include these sizes, whatever the profile is.
    """
    factor, chunk = manifest.sizes.factor, chunk_of(manifest, stage.name)
    fewest, most = frames_of(manifest, stage.name)

    tall, wide = tile_of(manifest, stage.name) or (MOST, MOST)

    def latent(pixels: Range, most_cells: int) -> Range:
        return Range(*(min(n // factor, most_cells) for n in pixels.sizes))

    batch, frames = profile.batch, Range(*(min(max(n, fewest), most) for n in profile.frames.sizes))
    images = Range(1, profile.images.best, max(profile.images.largest, chunk))
    if stage.name in manifest.decoders:
        frames = Range(1, min(images.best, most), most)
    if not stage.denoises:
        batch, frames = Range(1, batch.best, batch.largest), Range(fewest, frames.best, frames.largest)
    if not stage.batch:
        batch = Range(1, 1, 1)
    free = {
        "B": batch,
        "F": frames,
        "N": images,
        "H": latent(profile.height, tall),
        "W": latent(profile.width, wide),
        "Y": profile.height,
        "X": profile.width,
    }
    if TOKENS in manifest.free:
        least, largest = limits(manifest, stage.name)[TOKENS]
        free[TOKENS] = Range(least, least, largest)
    return {**{symbol: Range(n, n, n) for symbol, n in manifest.fixed.items()}, **free}


def _span(stage: Stage, name: str, shape: tuple[str | int, ...], symbols: Mapping[str, Range], profile: str) -> Span:
    ranges = [Range(n, n, n) if isinstance(n, int) else symbols[n] for n in shape]
    span = Span(
        name,
        tuple(r.smallest for r in ranges),
        tuple(r.best for r in ranges),
        tuple(r.largest for r in ranges),
    )
    if (volume := math.prod(span.largest)) > LARGEST_VOLUME:
        raise RequestError(
            f"profile {profile}: {stage.name}.{name} would have {volume} elements {list(span.largest)}; "
            f"TensorRT takes {LARGEST_VOLUME}"
        )
    return span
