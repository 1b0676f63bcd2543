"""A generation request: every argument checked in one place, before any work starts."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen.conditioning import check_numbers, curve_values, similarity_rows
from higen.errors import PictureWarning, RequestError, quoted
from higen.manifest import Manifest
from higen.noise_schedule import is_whole
from higen.plain_values import plain
from higen.prompt_weights import pieces
from higen.schedule import max_steps
from higen.stages import Source, source
from higen.tables import COMMON, MAX_NUMBER, MAX_SIDE, VISUAL, Control, Loop

__all__ = ["MAX_PROMPT", "MAX_SEED", "UNSPECIFIED", "Guidance", "Picture", "Request", "Warn", "make_request"]

MAX_SEED = 2**64 - 1

MAX_PROMPT = 100_000
"""Characters of a prompt: no model reads more than a few hundred, and cleaning a text takes time."""

UNSPECIFIED = "unspecified"
"""The value of a control that is left to the model, where the model was trained for it."""

Guidance = float | tuple[float, ...]
"""One number, or one per frame."""

Warn = Callable[[Warning], None]
"""Called with each warning of a request."""


def _warn(warning: Warning) -> None:
    warnings.warn(warning, stacklevel=2)


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture control's value: float32 pixels [3, Y, X] (a clip: [3, F, Y, X]) in -1 to 1, and a digest of them.

    Known frames are [n, 3, Y, X], at these `places` of the clip; a mask is [1 or F, Y, X], brightness from 0 to 1.
    `notes`: what was done with it, for a warning.
    """

    pixels: NDArray[np.float32]
    digest: bytes
    places: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Request:
    """A checked request.

    steps, guidance, solvers  one per loop of the model
    controls   by name: a number, a text, numbers as an array, None where it is unspecified; a picture or clip control
               has one Picture per prompt, or None
    warn       is called with each warning: words that the model does not know, a prompt that is cut
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

    def texts(self) -> dict[str, str]:
        """Every text that is read, with its name in messages."""
        count = len(self.prompts)
        names: dict[str, str] = {}
        for i, text in enumerate(self.prompts):
            names.setdefault(text, f"prompt {i + 1} of {count}" if count > 1 else "prompt")
        names.setdefault(self.negative_prompt, "negative_prompt")
        return names

    def frames_of(self, loop: Loop) -> int:
        """Frames that a loop denoises."""
        return 1 if loop.frames == 1 else self.frames

    def runs(self, loop: Loop) -> bool:
        """Whether a loop is run: the clip is long enough for it, and no picture replaces it."""
        return not self.replaces(loop) and self.frames >= loop.least_frames

    def replaces(self, loop: Loop) -> bool:
        """Whether a picture or clip of the request stands for a loop's result."""
        return loop.replaced is not None and self.controls[loop.replaced.control] is not None

    def begins(self, loop: Loop) -> bool:
        """Whether a loop begins in the table's tail, from a picture or clip of the request."""
        return loop.start is not None and self.controls[loop.start.control] is not None

    def passes(self, loop: Loop) -> bool:
        """Whether a loop's result passes through known frames of the request."""
        return loop.known is not None and self.controls[loop.known.control] is not None

    def stand_ins(self, loop: Loop) -> tuple[str, ...]:
        """The stages and loops whose latents a loop is replaced by, begins from, or passes through."""
        return tuple(origin.name for origin in self.standing(loop))

    def standing(self, loop: Loop) -> tuple[Source, ...]:
        """The sources of these latents."""
        runs = self.runs(loop)
        rows = (
            (loop.replaced, self.replaces(loop)),
            (loop.start, runs and self.begins(loop)),
            (loop.known, runs and self.passes(loop)),
        )
        return tuple(source(row.latents) for row, given in rows if row is not None and given)

    def cut(self, frames: int) -> Request:
        """The same request for its first frames alone."""
        guidance = tuple(scale[:frames] if isinstance(scale, tuple) else scale for scale in self.guidance)
        return replace(self, frames=frames, guidance=guidance)

    def number(self, value: float | str) -> float:
        """A number of the manifest's: itself, or the control that "control:NAME" names."""
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
) -> Request:
    """Check every argument against the model; None is the model's default.

    `only`: make so many frames, though the values per frame are for all of them.

    `load(control, value, frames, width, height)` reads a picture or clip. Raises RequestError.
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
    count = _whole("frames", sizes.frames[1] if frames is None else frames, sizes.frames[0], sizes.frames[2])
    tall = _side("height", sizes.height if height is None else height, sizes.multiple)
    wide = _side("width", sizes.width if width is None else width, sizes.multiple)

    def checked(control: Control) -> Any:
        value = controls.get(control.name)
        if control.kind in VISUAL:
            return _pictures(control, value, len(prompts), lambda one: load(control, one, count, wide, tall))
        curve = control.kind == "curve" and isinstance(value, np.ndarray)
        return _control(manifest, control, value if curve else plain(value), count)

    solvers = tuple(
        _solver(loop, given) for loop, given in _each("solver", solver, loops, lambda loop: loop.solvers[0].name)
    )
    most = {loop.name: max_steps(loop.schedule, loop.solver(name)) for loop, name in zip(loops, solvers, strict=True)}
    request = Request(
        prompts=prompts,
        negative_prompt=_text("negative_prompt", "" if negative_prompt is None else negative_prompt),
        seeds=_seeds(seed, len(prompts)),
        steps=tuple(
            _whole("steps", given, 1, most[loop.name])
            for loop, given in _each("steps", steps, loops, lambda loop: loop.steps)
        ),
        guidance=tuple(
            _guidance(loop, given, 1 if loop.frames == 1 else count)
            for loop, given in _each("guidance", guidance, loops, lambda loop: loop.guidance)
        ),
        solvers=solvers,
        frames=count,
        height=tall,
        width=wide,
        fps=_whole("fps", sizes.fps if fps is None else fps, 1, 240),
        controls={name: checked(control) for name, control in known.items()},
        warn=warn or _warn,
    )
    if manifest.text is not None and manifest.text.weights is not None:
        for text, name in request.texts().items():
            pieces(text, name)
    request = request if only is None else request.cut(only)
    _check_needed(manifest, request)
    _check_known(manifest, request)
    for note in dict.fromkeys(note for control in known.values() for note in _notes(control, request)):
        request.warn(PictureWarning(note))
    return request


def _each(name: str, value: Any, loops: Sequence[Loop], default: Callable[[Loop], Any]) -> list[tuple[Loop, Any]]:
    """A value for each loop: the loop's default, one value for all, or one per loop (None among them: its default)."""
    # With one loop, several numbers can only be its own, one per frame.
    if not isinstance(value, (list, tuple)) or (len(loops) == 1 and name == "guidance" and len(value) > 1):
        value = [value] * len(loops)
    if len(value) != len(loops):
        names = ", ".join(loop.name for loop in loops)
        raise RequestError(f"{name}={quoted(value)}: one value, or {len(loops)} (one per loop: {names})")
    return [(loop, default(loop) if one is None else one) for loop, one in zip(loops, value, strict=True)]


def _guidance(loop: Loop, value: Any, frames: int) -> Guidance:
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


def _solver(loop: Loop, name: object) -> str:
    names = [solver.name for solver in loop.solvers]
    if not isinstance(name, str) or name not in names:
        raise RequestError(f"solver={quoted(name)}: the loop {loop.name} takes {', '.join(map(repr, names))}")
    return name


def _control(manifest: Manifest, control: Control, value: Any, frames: int) -> Any:
    """A control that is no picture; a value that is not given is the default."""
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
        return _text(control.name, value)
    if control.kind == "choice":
        if not isinstance(value, str) or value not in control.choices:
            raise RequestError(f"{control.name}={quoted(value)}: one of {', '.join(map(repr, control.choices))}")
        return value
    number = _number(control, value)
    return int(number) if control.kind == "whole" else number


def _curve(manifest: Manifest, control: Control, value: Any, frames: int) -> Any:
    """The curve as it was given; building it checks it, for the whole clip. A loop of one frame resamples it."""
    if control.encoding == "similarity":
        source = f"control:{control.name}"
        widths = {t.shape[-1] for stage in manifest.stages for t in stage.inputs if t.source == source}
        for n in widths or {frames}:  # no stage takes it
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


def _pictures(control: Control, value: Any, count: int, load: Callable[[Any], Picture]) -> tuple[Picture, ...] | None:
    """One picture for every prompt, or one per prompt: a list, or an array [n,H,W,3]."""
    if value is None:
        return None
    several = isinstance(value, (list, tuple)) or getattr(value, "ndim", None) == 4
    if several and control.kind in ("picture", "frames"):
        if len(value) != count:
            raise RequestError(f"{control.name} has {len(value)} entries: one picture, or one per prompt ({count})")
        return tuple(load(one) for one in value)
    return (load(value),) * count


def _check_needed(manifest: Manifest, request: Request) -> None:
    """Raise RequestError where what runs needs a picture that was not given."""
    given = {name for name, value in request.controls.items() if value is not None}
    loops = manifest.wanted(request.frames)
    # A stand-in that is made of a control's own frames needs no other picture.
    made = {loop.name: [origin.name for origin in request.standing(loop) if not origin.given] for loop in loops}
    users = {f"the loop {loop.name}": (*_stages(request, loop), *made[loop.name]) for loop in loops}
    for user, stages in {**users, "the decoder": (manifest.sizes.decoder,)}.items():
        missing = [name for name in manifest.pictures_of(*stages) if name not in given]
        if missing:
            raise RequestError(f"{missing[0]}: {user} needs one")


def _check_known(manifest: Manifest, request: Request) -> None:
    """Raise RequestError for known frames that no loop of the request takes, and for a mask without any."""
    running = [loop for loop in manifest.wanted(request.frames) if request.runs(loop) and request.passes(loop)]
    taken = {name for loop in running if loop.known for name in (loop.known.control, loop.known.mask)}
    for control in manifest.controls:
        if request.controls[control.name] is None or control.name in taken:
            continue
        if control.kind == "frames":
            raise RequestError(f"{control.name}: a request for {request.frames} frames has no use for known frames")
        if control.kind == "mask":
            rows = [loop.known.control for loop in manifest.loops if loop.known and loop.known.mask == control.name]
            raise RequestError(f"{control.name}: no frames are known: give {' or '.join(dict.fromkeys(rows))} as well")


def _notes(control: Control, request: Request) -> Iterator[str]:
    """What was done with the pictures of a control."""
    for picture in (request.controls[control.name] or ()) if control.kind in VISUAL else ():
        yield from getattr(picture, "notes", ())


def _stages(request: Request, loop: Loop) -> tuple[str, ...]:
    return loop.stages if request.runs(loop) else ()


def _prompts(prompt: object, wanted: bool) -> tuple[str, ...]:
    prompts = (prompt,) if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts:
        raise RequestError(f"prompt={quoted(prompt)}: a string or a list of strings that is not empty")
    for text in prompts:
        if not isinstance(text, str):
            raise RequestError(f"prompt={quoted(text)}: a string")
        if wanted and not text.strip():
            raise RequestError(f"prompt={quoted(text)}: a prompt with at least one word")
        _text("prompt", text)
    return tuple(prompts)


def _text(name: str, text: object) -> str:
    if not isinstance(text, str):
        raise RequestError(f"{name}={quoted(text)}: a string")
    if len(text) > MAX_PROMPT:
        raise RequestError(f"{name} has {len(text)} characters: at most {MAX_PROMPT}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"{name}={quoted(text)}: not valid Unicode: {error.reason}") from error
    return text


def _seeds(seed: object, count: int) -> tuple[int, ...]:
    if isinstance(seed, (list, tuple)):
        if len(seed) != count:
            raise RequestError(f"seed has {len(seed)} entries: one number, or one per prompt ({count})")
        return tuple(_seed(one) for one in seed)
    return (_seed(seed),) * count


def _seed(seed: object) -> int:
    """A seed; "random" and -1 draw one, which the video's metadata record."""
    if (isinstance(seed, str) and seed == "random") or (type(seed) is int and seed == -1):
        return secrets.randbits(32)
    return _whole("seed", 0 if seed is None else seed, 0, MAX_SEED)


def _whole(name: str, value: object, low: int, high: int) -> int:
    if not is_whole(value, low, high):
        raise RequestError(f"{name}={quoted(value)}: a whole number from {low} to {high}")
    return int(value)


def _side(name: str, value: object, multiple: int) -> int:
    size = _whole(name, value, multiple, MAX_SIDE)
    if size % multiple:
        below = size // multiple * multiple
        raise RequestError(f"{name}={size}: a multiple of {multiple}; the nearest are {below} and {below + multiple}")
    return size
