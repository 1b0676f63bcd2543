"""A generation request: every argument checked in one place, before any work starts."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen.curve_source import CurveAsked, CurveFrom, curve_from
from higen.errors import PictureWarning, RequestError, quoted
from higen.loop_settings import LoopSettings, loop_settings
from higen.manifest import Manifest
from higen.plain_values import plain
from higen.presets import chosen_preset, preset_name
from higen.prompt_weights import pieces
from higen.request_values import (
    MAX_PROMPT,
    UNSPECIFIED,
    Guidance,
    checked_sizes,
    checked_text,
    control_value,
    each_loop,
    guidance_numbers,
    loop_guidance,
    loop_solver,
    of_loops_over_frames,
    whole_number,
)
from higen.schedule import SolverTable, inversion_table, max_steps, solver_table, tail
from higen.stages import Source, source
from higen.tables import COMMON, VISUAL, Control, Loop

__all__ = ["MAX_PROMPT", "MAX_SEED", "UNSPECIFIED", "Guidance", "Measure", "Picture", "Request", "Warn", "make_request"]

MAX_SEED = 2**64 - 1

Warn = Callable[[Warning], None]
"""Called with each warning of a request."""


Measure = Callable[[CurveAsked, CurveFrom, Warn], Any]
"""Measures the numbers of a curve from a file. It may warn that the file was cut or padded."""


def _warn(warning: Warning) -> None:
    warnings.warn(warning, stacklevel=2)


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture control's value: float32 pixels [3, Y, X] (a clip: [3, F, Y, X]) in -1 to 1, and a digest of them.

    Known frames are [n, 3, Y, X], with their indices in the clip in `places`; a mask is [1 or F, Y, X], with brightness
    from 0 to 1. `notes`: how the picture was changed, for warnings.
    """

    pixels: NDArray[np.float32]
    digest: bytes
    places: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Request:
    """A checked request.

    steps, guidance, solvers  one per loop of the model
    controls   by name: a number, a text, an array of numbers, or None if unspecified; a picture or clip control has one
               Picture per prompt, or None
    settings   how the loops are run: windows, intervals of guidance, FreeInit, feature reuse, inversion
    warn       called with each warning: words that the model does not know, a prompt that is cut
    """

    prompts: tuple[str, ...]
    negative_prompt: str
    seeds: tuple[int, ...]
    steps: tuple[int, ...]
    guidance: tuple[Guidance, ...]
    solvers: tuple[str, ...]
    frames: int
    height: int
    width: int
    fps: int
    controls: Mapping[str, Any]
    warn: Warn = _warn
    settings: LoopSettings = field(default_factory=LoopSettings)

    def texts(self) -> dict[str, str]:
        """Every text of the request, with its name for messages."""
        count = len(self.prompts)
        names: dict[str, str] = {}
        for i, text in enumerate(self.prompts):
            names.setdefault(text, f"prompt {i + 1} of {count}" if count > 1 else "prompt")
        names.setdefault(self.negative_prompt, "negative_prompt")
        if self.settings.inversion is not None:
            names.setdefault(self.settings.inversion, "inversion")
        return names

    def frames_of(self, loop: Loop) -> int:
        """Frames that a loop denoises."""
        return 1 if loop.frames == 1 else self.frames

    def runs(self, loop: Loop) -> bool:
        """Whether a loop is run: the clip is long enough for it, and no picture replaces it."""
        return not self.replaces(loop) and self.frames >= loop.least_frames

    def replaces(self, loop: Loop) -> bool:
        """Whether a picture or clip of the request replaces a loop's result."""
        return loop.replaced is not None and self.controls[loop.replaced.control] is not None

    def begins(self, loop: Loop) -> bool:
        """Whether a loop begins from a picture or clip of the request and runs only the last rows of its table."""
        return loop.start is not None and self.controls[loop.start.control] is not None

    def inverts(self, loop: Loop) -> bool:
        """Whether the picture or clip from which a loop begins is inverted into noise."""
        return self.settings.inversion is not None and self.begins(loop)

    def passes(self, loop: Loop) -> bool:
        """Whether a loop's result passes through known frames of the request."""
        return loop.known is not None and self.controls[loop.known.control] is not None

    def pair(self, loop: Loop) -> tuple[str | None, str | None]:
        """The guided and the plain stage for a loop's steps; those of its variant if the variant's control is given. A
        variant for known frames is for whole frames, so it is not used with a mask.
        """
        variant, known = loop.variant, loop.known
        if variant is None or self.controls[variant.control] is None:
            return loop.pairs[0]
        mask = known.mask if known is not None and known.control == variant.control else None
        return loop.pairs[1 if mask is None or self.controls[mask] is None else 0]

    def stand_ins(self, loop: Loop) -> tuple[str, ...]:
        """The stages and loops that make the latents which replace, start or constrain a loop."""
        return tuple(origin.name for origin in self.standing(loop))

    def standing(self, loop: Loop) -> tuple[Source, ...]:
        """The sources of the latents in `stand_ins`."""
        runs = self.runs(loop)
        rows = (
            (loop.replaced, self.replaces(loop)),
            (loop.start, runs and self.begins(loop)),
            (loop.known, runs and self.passes(loop)),
        )
        return tuple(source(row.latents) for row, given in rows if row is not None and given)

    def cut(self, frames: int) -> Request:
        """The same request, for only its first `frames` frames."""
        guidance = tuple(scale[:frames] if isinstance(scale, tuple) else scale for scale in self.guidance)
        return replace(self, frames=frames, guidance=guidance)

    def number(self, value: float | str) -> float:
        """The value of a number in the manifest: the number itself, or for "control:NAME" the control's value."""
        return float(self.controls[value.partition(":")[2]] if isinstance(value, str) else value)


def make_request(
    manifest: Manifest,
    prompt: str | Sequence[str],
    *,
    negative_prompt: str | None = None,
    seed: int | str | Sequence[int] | None = None,
    steps: int | Sequence[int] | None = None,
    guidance: Any = None,
    solver: str | Sequence[str] | None = None,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: int | None = None,
    controls: Mapping[str, Any],
    load: Callable[[Control, Any, int, int, int], Picture],
    warn: Warn | None = None,
    only: int | None = None,
    measure: Measure | None = None,
    **settings: Any,
) -> Request:
    """Check every argument against the model; None is the model's default.

    `settings`: options of `loop_settings`.
    `only`: make only this many frames; values per frame are still given for all `frames`.

    `load(control, value, frames, width, height)` reads a picture or clip. `measure` gives the numbers of a curve for
    which a file is named (None: files are not allowed). Raises RequestError.
    """
    sizes, loops = manifest.sizes, manifest.loops
    negative_prompt, seed, steps, guidance, solver = map(plain, (negative_prompt, seed, steps, guidance, solver))
    frames, height, width, fps = map(plain, (frames, height, width, fps))
    known = {control.name: control for control in manifest.controls}
    if unknown := sorted(set(controls) - set(known)):
        names = quoted(", ".join(unknown))[1:-1]
        raise RequestError(f"{names}: unknown; a request takes {', '.join((*COMMON, *known))}")
    if warn is not None and not callable(warn):
        raise RequestError(f"warn={quoted(warn)}: a function that is called with each warning")
    prompts = _prompts(plain(prompt), manifest.text is not None)
    count, tall, wide = checked_sizes(manifest, frames, height, width)

    decoding = None if sizes.preview is None else sizes.preview.control
    drawing = [value for name, value in controls.items() if name != decoding]
    ways = (negative_prompt or None, steps, guidance, solver, *drawing, *settings.values())
    settings["preset"] = preset_name(manifest.presets, plain(settings.get("preset")), ways)
    preset = chosen_preset(manifest.presets, settings["preset"], manifest.name)

    def of_preset(name: str, own: Callable[[Loop], Any]) -> Callable[[Loop], Any]:
        """The default of a loop: the preset's value, or the loop's own."""
        values = dict(zip([loop.name for loop in loops], getattr(preset, name, ()), strict=False))
        return lambda loop: own(loop) if values.get(loop.name) is None else values[loop.name]

    rate = whole_number("fps", sizes.fps if fps is None else fps, 1, 240)

    guidance = guidance if measure is None else of_loops_over_frames(loops, guidance)

    def from_file(name: str, encoding: str | None, span: tuple[float, float] | None, value: Any) -> Any:
        given = None if measure is None or value == UNSPECIFIED else curve_from(name, value)
        if measure is None or given is None:
            return value
        return measure(CurveAsked(name, encoding, span, count, rate), given, warn or _warn)

    def checked(control: Control) -> Any:
        value = controls.get(control.name)
        if control.kind == "curve" and not isinstance(value, np.ndarray):
            value = from_file(control.name, control.encoding, control.span, value)
        if control.kind in VISUAL:
            return _pictures(control, value, len(prompts), lambda one: load(control, one, count, wide, tall))
        curve = control.kind == "curve" and isinstance(value, np.ndarray)
        return control_value(manifest, control, value if curve else plain(value), count)

    solvers = tuple(
        loop_solver(loop, given)
        for loop, given in each_loop("solver", solver, loops, lambda loop: loop.solvers[0].name)
    )
    most = {loop.name: max_steps(loop.schedule, loop.solver(name)) for loop, name in zip(loops, solvers, strict=True)}
    request = Request(
        prompts=prompts,
        negative_prompt=checked_text("negative_prompt", "" if negative_prompt is None else negative_prompt),
        seeds=_seeds(seed, len(prompts)),
        steps=tuple(
            whole_number("steps", given, 1, most[loop.name])
            for loop, given in each_loop("steps", steps, loops, of_preset("steps", lambda loop: loop.steps))
        ),
        guidance=tuple(
            loop_guidance(loop, guidance_numbers(loop, given, from_file), 1 if loop.frames == 1 else count)
            for loop, given in each_loop("guidance", guidance, loops, of_preset("guidance", lambda loop: loop.guidance))
        ),
        solvers=solvers,
        frames=count,
        height=tall,
        width=wide,
        fps=rate,
        controls={name: checked(control) for name, control in known.items()},
        warn=warn or _warn,
    )
    own = {name: plain(value) for name, value in settings.items()}
    request = replace(request, settings=loop_settings(manifest, count, request.begins, **own))
    if manifest.text is not None and manifest.text.weights is not None:
        for text, name in request.texts().items():
            pieces(text, name)
    request = request if only is None else request.cut(only)
    _check_needed(manifest, request)
    _check_known(manifest, request)
    _check_reuse(manifest, request)
    _check_inversion(manifest, request)
    for note in dict.fromkeys(note for control in known.values() for note in _notes(control, request)):
        request.warn(PictureWarning(note))
    return request


def _pictures(control: Control, value: Any, count: int, load: Callable[[Any], Picture]) -> tuple[Picture, ...] | None:
    """One picture for all prompts, or one per prompt as a list or an array [n,H,W,3]."""
    if value is None:
        return None
    # An array of pictures of the kind frames is a clip.
    several = isinstance(value, (list, tuple)) or (control.kind == "picture" and getattr(value, "ndim", None) == 4)
    if several and control.kind in ("picture", "frames"):
        if len(value) != count:
            raise RequestError(f"{control.name} has {len(value)} entries: one picture, or one per prompt ({count})")
        return tuple(load(one) for one in value)
    return (load(value),) * count


def _check_needed(manifest: Manifest, request: Request) -> None:
    """Raise RequestError if a loop that runs, or the decoder, needs a picture that was not given."""
    given = {name for name, value in request.controls.items() if value is not None}
    needed = {"the decoder": manifest.pictures_of(manifest.sizes.decoder)}
    for loop in manifest.wanted(request.frames):
        # Latents that are made from a control's own frames need no other picture.
        made = [origin.name for origin in request.standing(loop) if not origin.given]
        running = manifest.needed_by(loop, request.pair(loop)) if request.runs(loop) else ()
        needed[f"the loop {loop.name}"] = (*running, *manifest.pictures_of(*made))
    for user, names in needed.items():
        if missing := [name for name in names if name not in given]:
            raise RequestError(f"{missing[0]}: {user} needs one")


def _check_known(manifest: Manifest, request: Request) -> None:
    """Raise RequestError for known frames and maps that no loop takes, and for a mask without known frames."""
    running = [loop for loop in manifest.wanted(request.frames) if request.runs(loop) and request.passes(loop)]
    taken = {name for loop in running if loop.known for name in (loop.known.control, loop.known.mask)}
    taken |= {loop.variant.control for loop in manifest.wanted(request.frames) if loop.variant and request.runs(loop)}
    for control in manifest.controls:
        if request.controls[control.name] is None or control.name in taken:
            continue
        if control.kind == "frames":
            raise RequestError(f"{control.name}: a request for {request.frames} frames takes no pictures by index")
        if control.kind == "map":
            raise RequestError(f"{control.name}: no loop of this request takes it")
        if control.kind == "mask":
            rows = [loop.known.control for loop in manifest.loops if loop.known and loop.known.mask == control.name]
            raise RequestError(f"{control.name}: no frames are known: give {' or '.join(dict.fromkeys(rows))} as well")


def _check_reuse(manifest: Manifest, request: Request) -> None:
    """Raise RequestError if features are to be reused, but the stages of a loop's variant have no shallow steps."""
    for loop in manifest.loops:
        names = [name for name in request.pair(loop) if name is not None]
        every = request.settings.reuse.get(loop.name, 1)
        if loop.variant is not None and every > 1 and not all(manifest.stage(name).variants for name in names):
            given = f"reuse={every}: the loop {loop.name} of {manifest.name} has no shallow steps with "
            raise RequestError(f"{given}{loop.variant.control}; leave out one of the two")


def _check_inversion(manifest: Manifest, request: Request) -> None:
    """Raise RequestError if no loop begins from a picture or clip, or if its solver cannot be run backwards."""
    if request.settings.inversion is None:
        return
    checked_text("inversion", request.settings.inversion)
    wanted = [loop for loop in manifest.wanted(request.frames) if request.runs(loop)]
    if not any(request.begins(loop) for loop in wanted):
        names = list(dict.fromkeys(loop.start.control for loop in wanted if loop.start is not None))
        what = f"give {' or '.join(names)} as well" if names else f"no loop of {manifest.name} can do so"
        raise RequestError(f"inversion: no loop of this request begins from a picture or clip; {what}")
    known = {name for loop in manifest.loops if loop.known for name in (loop.known.control, loop.known.mask)}
    for loop in filter(request.begins, wanted):
        if taken := [name for name in manifest.needed_by(loop, request.pair(loop)) if name in known]:
            why = "and while a clip is inverted, no frames are known; leave out one of the two"
            raise RequestError(f"inversion: the loop {loop.name} needs {taken[0]}, {why}")
        inverse_rows(manifest, request, loop)


def inverse_rows(manifest: Manifest, request: Request, loop: Loop) -> SolverTable:
    """The rows that carry the picture or clip of a loop up to the noise level from which it is denoised."""
    assert loop.start is not None
    i = manifest.loops.index(loop)
    solver, steps = loop.solver(request.solvers[i]), request.steps[i]
    rows = len(solver_table(loop.schedule, loop.prediction, solver, steps))
    first = tail(rows, request.number(loop.start.strength))
    return inversion_table(loop.schedule, loop.prediction, solver, steps, first)


def _notes(control: Control, request: Request) -> Iterator[str]:
    """How the pictures of a control were changed, for warnings."""
    for picture in (request.controls[control.name] or ()) if control.kind in VISUAL else ():
        yield from getattr(picture, "notes", ())


def _prompts(prompt: object, wanted: bool) -> tuple[str, ...]:
    prompts = (prompt,) if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts:
        raise RequestError(f"prompt={quoted(prompt)}: a string or a list of strings that is not empty")
    for text in prompts:
        if not isinstance(text, str):
            raise RequestError(f"prompt={quoted(text)}: a string")
        if wanted and not text.strip():
            raise RequestError(f"prompt={quoted(text)}: a prompt with at least one word")
        checked_text("prompt", text)
    return tuple(prompts)


def _seeds(seed: object, count: int) -> tuple[int, ...]:
    if isinstance(seed, (list, tuple)):
        if len(seed) != count:
            raise RequestError(f"seed has {len(seed)} entries: one number, or one per prompt ({count})")
        return tuple(_seed(one) for one in seed)
    return (_seed(seed),) * count


def _seed(seed: object) -> int:
    """A seed; "random" and -1 draw one. The video's metadata record it."""
    if (isinstance(seed, str) and seed == "random") or (type(seed) is int and seed == -1):
        return secrets.randbits(32)
    return whole_number("seed", 0 if seed is None else seed, 0, MAX_SEED)
