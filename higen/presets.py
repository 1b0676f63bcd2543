"""Rows of a manifest for requests with few steps: presets, and the stretch of a loop's result (docs/manifest.md)."""

from __future__ import annotations

from dataclasses import dataclass

from higen.errors import ManifestError, RequestError, quoted

__all__ = ["MAX_STRETCH", "Preset", "Stretch", "chosen_preset"]

MAX_STRETCH = 100.0
"""The largest factor of a stretch."""


def _check_factor(name: str, value: float) -> None:
    if not 0 <= value <= MAX_STRETCH:
        raise ManifestError(f"{name}={value}: a number from 0 to {MAX_STRETCH:g}")


@dataclass(frozen=True)
class Stretch:
    """After a loop's last row, its latents x become z + by (x - z). z are the latents of the earlier loop `loop`.

    One step gives the mean of all clips that fit, which moves too little; a factor above 1 restores the motion.
    """

    loop: str
    by: float = 1.0

    def __post_init__(self) -> None:
        _check_factor("by", self.by)


@dataclass(frozen=True)
class Preset:
    """Values for what a request leaves out, one per loop; None: the loop's own value."""

    name: str
    steps: tuple[int | None, ...]
    guidance: tuple[float | None, ...]
    stretch: tuple[float | None, ...]

    def __post_init__(self) -> None:
        if not (self.name.isidentifier() and self.name.isascii()):
            raise ManifestError(f"name={quoted(self.name)}: letters, digits and _")
        for by in self.stretch:
            if by is not None:
                _check_factor("stretch", by)


def chosen_preset(presets: tuple[Preset, ...], name: object, model: str) -> Preset | None:
    """The preset of a request; None if it names none. Raises RequestError for an unknown one."""
    if name is None:
        return None
    for preset in presets:
        if isinstance(name, str) and preset.name == name:
            return preset
    if not presets:
        raise RequestError(f"preset={quoted(name)}: {model} has no presets")
    names = ", ".join(repr(preset.name) for preset in presets)
    raise RequestError(f"preset={quoted(name)}: the presets of {model} are {names}")
