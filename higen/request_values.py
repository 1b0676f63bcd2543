"""Checks single values of a request: values per loop, guidance, solvers, controls that are not pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from higen.conditioning import check_numbers, curve_values, similarity_rows
from higen.curve_source import curve_from
from higen.errors import RequestError, quoted
from higen.manifest import Manifest
from higen.noise_schedule import is_whole
from higen.tables import MAX_NUMBER, MAX_SIDE, Control, Loop

MAX_PROMPT = 100_000
"""The most characters of a prompt. No model reads more than a few hundred, and cleaning a text takes time."""

UNSPECIFIED = "unspecified"
"""The value that leaves a control to the model, if the model was trained for that."""

Guidance = float | tuple[float, ...]
"""One number, or one per frame."""


def each_loop(name: str, value: Any, loops: Sequence[Loop], default: Callable[[Loop], Any]) -> list[tuple[Loop, Any]]:
    """A value for each loop: the loop's default, one value for all, or one per loop (None: that loop's default)."""
    # With one loop, several numbers can only be one per frame.
    if not isinstance(value, (list, tuple)) or (len(loops) == 1 and name == "guidance" and len(value) > 1):
        value = [value] * len(loops)
    if len(value) != len(loops):
        names = ", ".join(loop.name for loop in loops)
        raise RequestError(f"{name}={quoted(value)}: one value, or {len(loops)} (one per loop: {names})")
    return [(loop, default(loop) if one is None else one) for loop, one in zip(loops, value, strict=True)]


def guidance_numbers(loop: Loop, value: Any, from_file: Callable[..., Any]) -> Any:
    """A loop's guidance as numbers. A curve from a file is mapped into the range from 1 to the loop's default."""
    most = max(loop.guidance) if isinstance(loop.guidance, tuple) else loop.guidance
    numbers = isinstance(value, (int, float, list, tuple))
    return value if numbers else from_file("guidance", None, (1.0, most) if most > 1 else None, value)


def of_loops_over_frames(loops: Sequence[Loop], guidance: Any) -> Any:
    """Guidance per loop. A file given for all loops is used only for loops over frames, as one frame has no curve."""
    over_frames = [loop.frames != 1 for loop in loops]
    numbers = guidance is None or isinstance(guidance, (int, float, list, tuple))
    if numbers or not any(over_frames) or curve_from("guidance", guidance) is None:
        return guidance
    return [guidance if several else None for several in over_frames]


def checked_sizes(manifest: Manifest, frames: object, height: object, width: object) -> tuple[int, int, int]:
    """Frames, height and width of a request; None: the model's. Raises RequestError for a size that it cannot make."""
    sizes = manifest.sizes
    return (
        whole_number("frames", sizes.frames[1] if frames is None else frames, sizes.frames[0], sizes.frames[2]),
        _side("height", sizes.height if height is None else height, sizes.multiple),
        _side("width", sizes.width if width is None else width, sizes.multiple),
    )


def _side(name: str, value: object, multiple: int) -> int:
    size = whole_number(name, value, multiple, MAX_SIDE)
    if size % multiple:
        below = size // multiple * multiple
        raise RequestError(f"{name}={size}: a multiple of {multiple}; the nearest are {below} and {below + multiple}")
    return size


def loop_guidance(loop: Loop, value: Any, frames: int) -> Guidance:
    """A loop's guidance: one number, or numbers spread evenly from the first frame to the last."""
    allowed = f"a finite number, 0 or more, or one per frame ({frames})"
    scales = check_numbers("guidance", value, allowed)
    if scales.ndim > 1 or np.any(scales < 0):
        raise RequestError(f"guidance={quoted(value)}: {allowed}")
    if loop.guided is None and np.any(scales != 1):
        raise RequestError(f"guidance={quoted(value)}: the loop {loop.name} has no guidance; 1 is allowed")
    if scales.ndim == 0:
        return float(scales)
    if value is not loop.guidance and len(scales) != frames:
        raise RequestError(f"guidance has {len(scales)} numbers: {allowed}")
    spread = np.interp(np.linspace(0, 1, frames), np.linspace(0, 1, len(scales)), scales)
    return tuple(spread.tolist())


def loop_solver(loop: Loop, name: object) -> str:
    names = [solver.name for solver in loop.solvers]
    if not isinstance(name, str) or name not in names:
        raise RequestError(f"solver={quoted(name)}: the loop {loop.name} takes {', '.join(map(repr, names))}")
    return name


def control_value(manifest: Manifest, control: Control, value: Any, frames: int) -> Any:
    """The checked value of a control that is not a picture; a missing value becomes the default."""
    if isinstance(value, str) and value == UNSPECIFIED and control.kind not in ("text", "choice"):
        if not control.optional:
            raise RequestError(
                f"{control.name}={quoted(value)}: {manifest.name} was not trained without it; "
                f"its default is {control.default}"
            )
        return None
    value = control.default if value is None else value
    if value is None:
        return None
    if control.kind == "curve":
        return _curve(manifest, control, value, frames)
    if control.kind == "text":
        return checked_text(control.name, value)
    if control.kind == "choice":
        if not isinstance(value, str) or value not in control.choices:
            raise RequestError(f"{control.name}={quoted(value)}: one of {', '.join(map(repr, control.choices))}")
        return value
    number = _number(control, value)
    return int(number) if control.kind == "whole" else number


def _curve(manifest: Manifest, control: Control, value: Any, frames: int) -> Any:
    """The given curve, checked by building its rows for the whole clip. A loop of one frame resamples it."""
    if control.encoding == "similarity":
        source = f"control:{control.name}"
        widths = {t.shape[-1] for stage in manifest.stages for t in stage.inputs if t.source == source}
        for n in widths or {frames}:  # {frames}: no stage takes the control
            similarity_rows(control.name, value, frames, manifest.fixed[n] if isinstance(n, str) else n)
        given = np.asarray(value, dtype=np.float64)
        if given.size and not (control.allows(float(given.min())) and control.allows(float(given.max()))):
            raise RequestError(f"{control.name}={quoted(value)}: each {control.range}")
    else:
        curve_values(control.name, value, frames, control.low, control.high)
    return np.asarray(value, dtype=np.float64)


def _number(control: Control, value: Any) -> float:
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    whole = control.kind != "whole" or (numeric and value == int(value) if numeric and abs(value) < 1e18 else False)
    if not numeric or not abs(value) <= MAX_NUMBER or not whole or not control.allows(float(value)):
        raise RequestError(f"{control.name}={quoted(value)}: {control.range}")
    return float(value)


def checked_text(name: str, text: object) -> str:
    if not isinstance(text, str):
        raise RequestError(f"{name}={quoted(text)}: a string")
    if len(text) > MAX_PROMPT:
        raise RequestError(f"{name} has {len(text)} characters: at most {MAX_PROMPT}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"{name}={quoted(text)}: not valid Unicode: {error.reason}") from error
    return text


def whole_number(name: str, value: object, low: int, high: int) -> int:
    if not is_whole(value, low, high):
        raise RequestError(f"{name}={quoted(value)}: a whole number from {low} to {high}")
    return int(value)
