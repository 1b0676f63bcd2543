"""Settings of the loops in a request: the interval with guidance, windows of a long clip, FreeInit, feature reuse,
presets.

Each option consists of numbers or is a word, so that every runtime can take it: command line, server, Triton and C++.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen.conditioning import check_numbers
from higen.errors import RequestError, quoted
from higen.free_init import FILTERS, FreeInit
from higen.manifest import Manifest
from higen.noise_schedule import is_whole
from higen.presets import chosen_preset
from higen.schedule import last_level
from higen.tables import WINDOW_NOISE, Loop, Windows

__all__ = ["MAX_REUSE", "Interval", "LoopSettings", "guidance_rows", "loop_settings"]

MAX_ITERATIONS, MAX_ORDER = 100, 20

MAX_REUSE = 1000
"""The largest value of `reuse`."""

Interval = tuple[float, float]
"""The part of a table's rows in which guidance is used: from and to, as fractions from 0 to 1."""


@dataclass(frozen=True)
class LoopSettings:
    """Checked settings, by the name of the loop; a loop without an entry has no setting.

    `free_init`: for the loops over frames. `reuse`: one row in this many (more than 1) is a full step. `stretch`: the
    factor of a loop's stretch, if it is not 1. `preset`: the name of the request's preset. `inversion`: the text with
    which a loop's picture or clip is inverted into noise; None: it gets noise added.
    """

    intervals: Mapping[str, Interval] = field(default_factory=dict)
    windows: Mapping[str, Windows] = field(default_factory=dict)
    free_init: FreeInit | None = None
    reuse: Mapping[str, int] = field(default_factory=dict)
    stretch: Mapping[str, float] = field(default_factory=dict)
    preset: str | None = None
    inversion: str | None = None

    def stretching(self, loop: Loop, latents: Callable[[str], Any]) -> tuple[Any, float] | None:
        """The latents that a loop's result is stretched from, and the factor; None if it is not stretched.

        `latents`: gives the last latents of an earlier loop, by name.
        """
        if loop.stretch is None or loop.name not in self.stretch:
            return None
        return latents(loop.stretch.loop), self.stretch[loop.name]

    def repeats(self, loop: Loop) -> FreeInit | None:
        """The settings for running a loop repeatedly (FreeInit), or None."""
        return self.free_init if loop.frames != 1 else None

    def as_metadata(self) -> dict[str, Any]:
        """The settings that are not the default, for a video's metadata."""
        windows = {name: [own.length, own.stride, own.noise] for name, own in self.windows.items()}
        init = self.free_init
        return {
            **({"guidance_interval": {n: list(own) for n, own in self.intervals.items()}} if self.intervals else {}),
            **({"windows": windows} if windows else {}),
            **({"free_init": dict(vars(init))} if init is not None else {}),
            **({"reuse": dict(self.reuse)} if self.reuse else {}),
            **({"preset": self.preset} if self.preset is not None else {}),
            **({"inversion": self.inversion} if self.inversion is not None else {}),
        }


def loop_settings(
    manifest: Manifest,
    frames: int,
    begins: Callable[[Loop], bool],
    *,
    guidance_interval: Any = None,
    windows: Any = None,
    window_noise: Any = None,
    free_init: Any = None,
    free_init_filter: Any = None,
    reuse: Any = None,
    preset: Any = None,
    inversion: Any = None,
) -> LoopSettings:
    """Check a request's settings for a clip of this many frames. None: the model's own setting, if it has one.

    guidance_interval  two fractions of a loop's rows, 0 to 1: guidance is used from the first to the second and is 1
                       elsewhere. Or one pair per loop, nested or as a flat list
    windows            the length of windows and the stride between them, in frames; with only a length, the stride is
                       half of it; 0: the whole clip at once
    window_noise       one of WINDOW_NOISE
    free_init          iterations, then the stop frequencies in space and time, and the order of the filter
    free_init_filter   one of FILTERS
    reuse              the whole network runs once in this many rows, and the rows between reuse its deep features
                       (higen/feature_reuse.py): one number, or one per loop; 1: it runs in every row
    preset             name of a preset of the model; here it gives the stretch of the loops
    inversion          a text that describes the picture or clip from which a loop begins, or True for the empty text

    `begins`: whether a loop begins from a picture or clip. Raises RequestError.
    """
    running = [loop for loop in manifest.loops if loop.frames != 1]
    for name, value in (("windows", windows), ("window_noise", window_noise), ("free_init", free_init)):
        if value is not None and not running:
            raise RequestError(f"{name}={quoted(value)}: {manifest.name} has no loop over frames")
    noise = _word("window_noise", window_noise, WINDOW_NOISE)
    chosen = {loop.name: _windows(manifest, loop, frames, windows, noise) for loop in running}
    return LoopSettings(
        _intervals(manifest, guidance_interval),
        {name: own for name, own in chosen.items() if own is not None and own.length < frames},
        _free_init(free_init, _word("free_init_filter", free_init_filter, FILTERS), running, begins),
        _reuse(manifest, reuse),
        _stretch(manifest, preset, frames, begins),
        preset,
        _inversion(manifest, inversion),
    )


def guidance_rows(
    scale: NDArray[np.float32], shape: tuple[int, int, int], interval: Interval | None
) -> NDArray[np.float32]:
    """Guidance of each row of a table, float32 [rows, B, f]: 1 outside the interval, whose ends are rounded down to
    rows (Kynkaanniemi et al. 2024). `scale`: a number, or one per frame.
    """
    guidance, rows = np.broadcast_to(scale, shape).copy(), shape[0]
    if interval is not None:
        guidance[: int(rows * interval[0])] = 1.0
        guidance[int(rows * interval[1]) :] = 1.0
    return guidance


def _word(name: str, value: Any, words: tuple[str, ...]) -> str | None:
    if value is None or (isinstance(value, str) and value in words):
        return value
    raise RequestError(f"{name}={quoted(value)}: one of {', '.join(map(repr, words))}")


def _intervals(manifest: Manifest, value: Any) -> dict[str, Interval]:
    if value is None:
        return {}
    loops = [loop.name for loop in manifest.loops]
    allowed = "two numbers, 0 <= from <= to <= 1"
    if isinstance(value, (list, tuple)) and len(loops) > 1 and len(value) == 2 * len(loops):
        value = [value[i : i + 2] for i in range(0, len(value), 2)]  # a flat list, for runtimes without nested lists
    several = isinstance(value, (list, tuple)) and any(isinstance(one, (list, tuple)) or one is None for one in value)
    if several and len(value) != len(loops):
        names = ", ".join(loops)
        raise RequestError(
            f"guidance_interval={quoted(value)}: {allowed}; or {len(loops)} pairs (one per loop: {names})"
        )
    found = {}
    for name, one in zip(loops, value if several else [value] * len(loops), strict=True):
        if one is None:
            continue
        pair = check_numbers("guidance_interval", one, allowed)
        if pair.shape != (2,) or not 0 <= pair[0] <= pair[1] <= 1:
            raise RequestError(f"guidance_interval={quoted(one)}: {allowed}")
        found[name] = (float(pair[0]), float(pair[1]))
    return found


def _reuse(manifest: Manifest, value: Any) -> dict[str, int]:
    """The loops that reuse features: the whole network runs once in this many rows."""
    loops = manifest.loops
    given = list(value) if isinstance(value, (list, tuple)) else [value] * len(loops)
    allowed = f"a whole number from 1 to {MAX_REUSE}"
    if len(given) != len(loops):
        names = ", ".join(loop.name for loop in loops)
        raise RequestError(f"reuse={quoted(value)}: {allowed}, or {len(loops)} of them (one per loop: {names})")
    found = {}
    for loop, every in zip(loops, given, strict=True):
        if every is not None and not is_whole(every, 1, MAX_REUSE):
            raise RequestError(f"reuse={quoted(every)}: {allowed}")
        if every is None or every == 1:
            continue
        if not all(manifest.stage(name).variants for name in loop.pairs[0] if name is not None):
            raise RequestError(
                f"reuse={every}: the loop {loop.name} of {manifest.name} has no shallow steps; "
                "`higen-export onnx MODEL --reuse` adds them to a model"
            )
        found[loop.name] = int(every)
    return found


def _inversion(manifest: Manifest, value: Any) -> str | None:
    if value is None or value is False:
        return None
    if value is not True and not isinstance(value, str):
        raise RequestError(f"inversion={quoted(value)}: a text that describes the clip, or True for the empty text")
    if manifest.text is None and value not in (True, ""):
        raise RequestError(f"inversion={quoted(value)}: {manifest.name} reads no texts; True is allowed")
    return "" if value is True else str(value)


def _stretch(manifest: Manifest, preset: Any, frames: int, begins: Callable[[Loop], bool]) -> dict[str, float]:
    """The factors of the loops whose results are stretched."""
    chosen = chosen_preset(manifest.presets, preset, manifest.name)
    factors = [None] * len(manifest.loops) if chosen is None else chosen.stretch
    found = {}
    for loop, factor in zip(manifest.loops, factors, strict=True):
        if loop.stretch is None or loop.least_frames > frames:
            continue
        by = loop.stretch.by if factor is None else factor
        if by != 1 and loop.start is not None and begins(loop):
            given = f"preset={quoted(preset)}" if factor is not None else f"loops.{loop.name}.stretch"
            raise RequestError(
                f"{given}: the loop {loop.name} begins from {loop.start.control}, and its result is stretched only if "
                f"it begins from noise; leave out {'one of the two' if factor is not None else loop.start.control}"
            )
        if by != 1:
            found[loop.name] = by
    return found


def _windows(manifest: Manifest, loop: Loop, frames: int, value: Any, noise: str | None) -> Windows | None:
    """The windows of a loop, or None if its stages take the whole clip at once."""
    own = loop.windows
    least = max(manifest.sizes.frames[0], loop.least_frames)
    most = manifest.sizes.frames[2] if own is None else own.most or own.length
    if value is None:
        if own is None and noise is not None:
            raise RequestError(f"window_noise={quoted(noise)}: the loop {loop.name} has no windows; set windows too")
        if own is None or noise is None:
            return own
        return replace(own, noise=noise)  # type: ignore[arg-type]
    given = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(given) == 1 and type(given[0]) is int and given[0] == 0:
        if frames > most:
            raise RequestError(f"windows=0: the loop {loop.name} takes at most {most} frames at once, not {frames}")
        return None
    length = given[0] if given else None
    if is_whole(length, least, most):
        stride = given[1] if len(given) > 1 else max(1, length // 2)
        if len(given) <= 2 and is_whole(stride, 1, length):
            kind: Any = noise or ("shuffled" if own is None else own.noise)
            return Windows(int(length), int(stride), most, kind)
    raise RequestError(
        f"windows={quoted(value)}: a length from {least} to {most} frames and a stride from 1 to the length, or 0 for "
        "the whole clip at once"
    )


def _free_init(value: Any, kind: str | None, loops: list[Loop], begins: Callable[[Loop], bool]) -> FreeInit | None:
    if value is None:
        if kind is not None:
            raise RequestError(f"free_init_filter={quoted(kind)}: free_init is not given")
        return None
    allowed = (
        f"iterations from 1 to {MAX_ITERATIONS}, and if wanted the stop frequencies in space and time (0 to 1) and the "
        f"order of the filter (1 to {MAX_ORDER})"
    )
    given = np.atleast_1d(check_numbers("free_init", value, allowed))
    good = given.ndim == 1 and 1 <= len(given) <= 4
    numbers = [*given.tolist(), *(0.25, 0.25, 4.0)[len(given) - 1 :]] if good else []
    good = good and numbers[0] in range(1, MAX_ITERATIONS + 1) and numbers[3] in range(1, MAX_ORDER + 1)
    if not good or not (0 <= numbers[1] <= 1 and 0 <= numbers[2] <= 1):
        raise RequestError(f"free_init={quoted(value)}: {allowed}")
    settings = FreeInit(int(numbers[0]), numbers[1], numbers[2], int(numbers[3]), kind or FILTERS[0])
    if settings.iterations == 1:
        return None
    for loop in loops:
        if begins(loop):
            raise RequestError(f"free_init={quoted(value)}: the loop {loop.name} begins from a picture or clip")
        if last_level(loop.schedule)[0] == 0.0:
            raise RequestError(
                f"free_init={quoted(value)}: the loop {loop.name} begins without any signal (its schedule ends at zero "
                "SNR), so nothing of a first pass would be left"
            )
    return settings
