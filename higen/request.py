"""A generation request: every argument checked in one place, before any work starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from higen.conditioning import Appearance, Motion, appearance_cue, motion_cue
from higen.config import ModelConfig
from higen.errors import RequestError
from higen.schedule import SOLVERS

__all__ = ["MAX_SEED", "MAX_SIDE", "OPTIONS", "Request", "RequestOptions", "make_request"]

MAX_SEED = 2**64 - 1
MAX_SIDE = 4096
MAX_NUMBER = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Request:
    """A checked request. Two numbers in `steps` and `guidance`: spatial stage, temporal stage."""

    prompts: tuple[str, ...]
    negative_prompt: str
    seeds: tuple[int, ...]
    steps: tuple[int, int]
    guidance: tuple[float, float]
    solver: str
    frames: int
    height: int
    width: int
    fps: int
    motion: Motion
    appearance: Appearance
    offset_noise: float

    def motion_input(self, dim: int) -> NDArray[np.float32]:
        """The conditioner's motion input of every sample, [B, F, dim]."""
        return self._each(motion_cue(self.motion, self.frames, dim))

    def appearance_input(self, columns: int) -> NDArray[np.float32]:
        """The conditioner's appearance input of every sample, [B, F, columns]."""
        return self._each(appearance_cue(self.appearance, self.frames, columns))

    def _each(self, cue: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.broadcast_to(cue, (len(self.prompts), *cue.shape)).copy()


class RequestOptions(TypedDict, total=False):
    """What a request takes beside its prompt, all of it optional; what is not given, or None, is the model's default.

    seed         one for every prompt, or one per prompt, from 0 to MAX_SEED; 0
    steps        of denoising: one number, or two for the spatial and the temporal stage
    guidance     the same
    solver       "ddim" or "dpm++2m"
    motion       one number, one per pair of frames or one per frame; None means "unspecified" to a model that knows it
    appearance   one number, one per frame, or a matrix; None as for motion
    """

    negative_prompt: str
    seed: int | Sequence[int]
    steps: int | Sequence[int] | None
    guidance: float | Sequence[float] | None
    solver: str | None
    frames: int | None
    height: int | None
    width: int | None
    fps: int | None
    motion: Motion
    appearance: Appearance
    offset_noise: float | None


OPTIONS = tuple(RequestOptions.__annotations__)
"""The names of a request's options."""

UNSET: Any = object()
"""A cue that is not given gets the model's default; None means "unspecified" to a model that was trained for it."""


def make_request(
    config: ModelConfig,
    prompt: str | Sequence[str],
    *,
    negative_prompt: str = "",
    seed: int | Sequence[int] = 0,
    steps: int | Sequence[int] | None = None,
    guidance: float | Sequence[float] | None = None,
    solver: str | None = None,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: int | None = None,
    motion: Motion = UNSET,
    appearance: Appearance = UNSET,
    offset_noise: float | None = None,
) -> Request:
    """Check every argument against the model; None is the model's default. Raises RequestError."""
    defaults = config.defaults
    prompts = _prompts(prompt)
    if not isinstance(negative_prompt, str):
        raise RequestError(f"negative_prompt={negative_prompt!r}: a string")
    _unicode("negative_prompt", negative_prompt)
    frames = _integer("frames", defaults.frames if frames is None else frames, 1, config.max_frames)
    solver = defaults.solver if solver is None else solver
    if not isinstance(solver, str) or solver not in SOLVERS:
        raise RequestError(f"solver={solver!r}: one of {', '.join(map(repr, SOLVERS))}")
    multiple = config.autoencoder.factor * config.unet.size_multiple
    noise = _number("offset_noise", defaults.offset_noise if offset_noise is None else offset_noise)
    request = Request(
        prompts=prompts,
        negative_prompt=negative_prompt,
        seeds=_seeds(seed, len(prompts)),
        steps=_pair("steps", defaults.steps if steps is None else steps, _steps(config.schedule.timesteps)),
        guidance=_pair("guidance", defaults.guidance if guidance is None else guidance, _number),
        solver=solver,
        frames=frames,
        height=_side("height", defaults.height if height is None else height, multiple),
        width=_side("width", defaults.width if width is None else width, multiple),
        fps=_integer("fps", defaults.fps if fps is None else fps, 1, 240),
        motion=_cue("motion", motion, defaults.motion, config),
        appearance=_cue("appearance", appearance, defaults.appearance, config),
        offset_noise=noise,
    )
    # Building the cues checks them.
    motion_cue(request.motion, frames, 2)
    appearance_cue(request.appearance, frames, config.unet.appearance_columns)
    return request


def _prompts(prompt: object) -> tuple[str, ...]:
    prompts = (prompt,) if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts:
        raise RequestError(f"prompt={prompt!r}: a string or a list of strings that is not empty")
    for text in prompts:
        if not isinstance(text, str):
            raise RequestError(f"prompt={text!r}: a string")
        if not text.strip():
            raise RequestError(f"prompt={text!r}: a prompt with at least one word")
        _unicode("prompt", text)
    return tuple(prompts)


def _unicode(name: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"{name}={text!r}: not valid Unicode: {error.reason}") from error


def _seeds(seed: object, count: int) -> tuple[int, ...]:
    if isinstance(seed, (list, tuple)):
        if len(seed) != count:
            raise RequestError(f"seed has {len(seed)} entries: one number, or one per prompt ({count})")
        return tuple(_integer("seed", s, 0, MAX_SEED) for s in seed)
    return (_integer("seed", seed, 0, MAX_SEED),) * count


def _integer(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise RequestError(f"{name}={value!r}: a whole number from {low} to {high}")
    return int(value)


def _number(name: str, value: object) -> float:
    good = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not good or not 0 <= value <= MAX_NUMBER:  # type: ignore[operator]
        raise RequestError(f"{name}={value!r}: a finite number, 0 or more")
    return float(value)  # type: ignore[arg-type]


def _steps(most: int) -> Any:
    return lambda name, value: _integer(name, value, 1, most)


def _pair(name: str, value: object, check: Any) -> Any:
    if isinstance(value, (list, tuple)):
        if len(value) != 2:
            raise RequestError(f"{name}={value!r}: one value, or two (spatial stage, temporal stage)")
        return check(name, value[0]), check(name, value[1])
    return check(name, value), check(name, value)


def _side(name: str, value: object, multiple: int) -> int:
    size = _integer(name, value, multiple, MAX_SIDE)
    if size % multiple:
        below = size // multiple * multiple
        raise RequestError(f"{name}={size}: a multiple of {multiple}; the nearest are {below} and {below + multiple}")
    return size


def _cue(name: str, value: Any, default: float | None, config: ModelConfig) -> Any:
    if value is UNSET:
        return default
    if value is None and not config.optional_cues:
        raise RequestError(f"{name}=None: {config.name} was not trained without this cue; its default is {default}")
    return value
