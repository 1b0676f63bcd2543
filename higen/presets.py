"""Rows of a manifest for requests with few steps: presets, and the stretch of a loop's result (docs/manifest.md).

`preset_name` decides which preset a request uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from higen.errors import ManifestError, RequestError, quoted
from higen.typed_json import LATER

__all__ = ["MAX_STRETCH", "Preset", "Stretch", "chosen_preset", "preset_name", "unusual", "usual_preset"]

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
    """Values for what a request leaves out, one per loop; None: the loop's own value.

    usual  used by a request that does not choose how to draw (`preset_name`)
    """

    name: str
    steps: tuple[int | None, ...]
    guidance: tuple[float | None, ...]
    stretch: tuple[float | None, ...]
    usual: bool = field(default=False, metadata=LATER)

    def described(self, loops: Sequence[str]) -> str:
        """Steps and guidance of each loop, such as "spatial 2 steps, guidance 1; temporal 1 step, guidance default"."""
        parts = [
            f"{loop} {'default steps' if steps is None else '1 step' if steps == 1 else f'{steps} steps'}, "
            f"guidance {'default' if guidance is None else f'{guidance:g}'}"
            for loop, steps, guidance in zip(loops, self.steps, self.guidance, strict=True)
        ]
        return "; ".join(parts)

    def __post_init__(self) -> None:
        if not (self.name.isidentifier() and self.name.isascii()):
            raise ManifestError(f"name={quoted(self.name)}: letters, digits and _")
        for by in self.stretch:
            if by is not None:
                _check_factor("stretch", by)


def preset_name(presets: tuple[Preset, ...], name: object, given: Iterable[object]) -> object:
    """The name of a request's preset: `name` if it is given, else the usual preset if nothing else is given, or None.

    `given`: all that chooses how to draw: the negative prompt, steps, guidance, solver, controls, and settings of the
    loops. A prompt, seed, frames, sizes and rate choose only what is drawn. None: not given.
    """
    if name is not None or any(value is not None for value in given):
        return name
    return usual_preset(presets)


def usual_preset(presets: tuple[Preset, ...]) -> str | None:
    """The name of the usual preset; None if there is none."""
    return next((preset.name for preset in presets if preset.usual), None)


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


def unusual(presets: tuple[Preset, ...]) -> tuple[Preset, ...]:
    """The same presets, none of them usual. They were measured with other weights."""
    return tuple(replace(preset, usual=False) for preset in presets)
