"""The rows of a manifest's tables (docs/manifest.md): sizes, text rules, controls and loops. Rows check themselves."""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass, field
from typing import Any, Literal

from higen import noise_schedule as solvers
from higen.errors import ManifestError
from higen.noise_schedule import PREDICTIONS, NoiseSchedule, Solver
from higen.presets import Stretch
from higen.preview_decoder import Preview
from higen.stages import FREE, NEGATIVE
from higen.typed_json import LATER

__all__ = ["COMMON", "MAX_NUMBER", "NUMERIC", "SETTINGS", "VISUAL", "WINDOW_NOISE", "Control", "Known", "Loop", "Mix"]
__all__ += ["NoiseRule", "Offset", "Replaced", "Sizes", "Start", "TextRules", "Tiles", "Variant", "Windows"]
__all__ += ["check", "is_number"]

RESERVED = ("progress", "warn", NEGATIVE)
_LOOPS = ("guidance_interval", "windows", "window_noise", "free_init", "free_init_filter", "reuse")
SETTINGS = (*_LOOPS, "preset", "inversion")
"""The common options for running the loops (higen/loop_settings.py)."""

_BASIC = ("prompt", "negative_prompt", "seed", "steps", "guidance", "solver")
COMMON = (*_BASIC, *SETTINGS, "frames", "width", "height", "fps")
"""The options that every request has, for every model. No control may have one of these names."""

CURVES = ("sinusoid", "similarity", "curve")
"""Encodings that turn a control into rows, one per frame."""

ENCODINGS: dict[str, tuple[str | None, ...]] = {
    "curve": CURVES,
    "number": ("number", "curve"),
    "whole": ("number", "curve"),
    "choice": ("number",),
    "map": (None, "edges"),
}
"""The allowed encodings of each kind of control; other kinds have none."""

NUMERIC = ("number", "whole", "curve")
WINDOW_NOISE = ("fresh", "shuffled", "repeated")
VISUAL = ("picture", "clip", "frames", "mask", "map")
"""Kinds of control with pixels as values; they have no default."""

MAX_SIDE = 4096
MOST_CHUNKS = 64  # of a text
MAX_SIZE = 2**31  # of an axis
MAX_NUMBER = 3.4028234663852886e38  # float32's


def check(good: bool, message: str) -> None:
    """Raise ManifestError with `message` unless `good`."""
    if not good:
        raise ManifestError(message)


def is_number(value: object) -> bool:
    """Whether a value is a number, finite in float32. Booleans are not numbers."""
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= MAX_NUMBER  # type: ignore[arg-type]


@dataclass(frozen=True)
class Sizes:
    """Sizes that the model fixes, and limits and defaults of the sizes that a request chooses.

    factor    pixels per latent cell
    multiple  width and height in pixels are multiples of this
    frames    fewest, default, most
    decoder   the stage that turns latents into pixels. It decodes `chunk` frames at a time, with `overlap` frames of
              context on each side, which are dropped
    preview   a cheaper decoder for previews, which decodes the same chunks; None: there is none
    """

    symbols: dict[str, int]
    factor: int
    multiple: int
    width: int
    height: int
    fps: int
    frames: tuple[int, int, int]
    decoder: str
    chunk: int = 2
    overlap: int = 0
    preview: Preview | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        for name, size in self.symbols.items():
            check(name.isidentifier() and name not in FREE, f"symbols.{name}: a name other than {', '.join(FREE)}")
            check(1 <= size <= MAX_SIZE, f"symbols.{name}={size}: a whole number from 1")
        check(1 <= self.factor <= 1024, f"factor={self.factor}: from 1 to 1024 pixels per latent cell")
        check(
            1 <= self.multiple <= MAX_SIDE and self.multiple % self.factor == 0,
            f"multiple={self.multiple}: a multiple of factor={self.factor} of at most {MAX_SIDE}",
        )
        for name in ("width", "height"):
            size = getattr(self, name)
            good = 1 <= size <= MAX_SIDE and size % self.multiple == 0
            check(good, f"{name}={size}: a multiple of {self.multiple} of at most {MAX_SIDE}")
        check(1 <= self.fps <= 240, f"fps={self.fps}: from 1 to 240")
        low, default, high = self.frames
        check(1 <= low <= default <= high <= 2**16, f"frames={list(self.frames)}: 1 <= fewest <= default <= most")
        check(1 <= self.chunk <= 2**16, f"chunk={self.chunk}: a number of frames from 1")
        check(0 <= self.overlap <= 2**16, f"overlap={self.overlap}: a number of frames from 0")


@dataclass(frozen=True)
class TextRules:
    """How a text becomes token ids [1, length]: start, text, end, then `pad_id`.

    clean    repair the text as CLIP does
    weights  "parentheses": words have weights, `(word:1.3)`, and BREAK begins a new chunk; None: a prompt is plain text
    chunks   the most rows of ids; a longer text is cut
    """

    tokenizer: str
    length: int = 77
    pad_id: int = 0
    clean: bool = True
    weights: Literal["parentheses"] | None = field(default=None, metadata=LATER)
    chunks: int = field(default=1, metadata=LATER)

    @property
    def plain(self) -> bool:
        """Whether every text is one row of ids, without weights."""
        return self.weights is None and self.chunks == 1

    def __post_init__(self) -> None:
        check(self.weights in (None, "parentheses"), f"weights={self.weights!r}: null or 'parentheses'")
        check(1 <= self.chunks <= MOST_CHUNKS, f"chunks={self.chunks}: from 1 to {MOST_CHUNKS}")
        good = 3 <= self.length <= 2**20 and 0 <= self.pad_id < 2**31
        check(
            good, f"length={self.length}, pad_id={self.pad_id}: length with room for start, text and end; pad_id from 0"
        )


@dataclass(frozen=True)
class Control:
    """An option of this model. A `default` of None means "unspecified", or no picture.

    `usual`: the lowest and highest values of a curve in ordinary clips, if they differ from `low` and `high`. Sounds,
    and words such as "fast", are mapped into this range.
    """

    name: str
    kind: Literal["number", "whole", "curve", "text", "picture", "clip", "choice", "frames", "mask", "map"]
    meaning: str
    encoding: Literal["number", "curve", "sinusoid", "similarity", "edges"] | None = None
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    default: Any = None
    optional: bool = False
    usual: tuple[float, float] | None = field(default=None, metadata=LATER)
    measured: Literal["distance", "similarity"] | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        check(
            self.name.isidentifier() and self.name not in COMMON + RESERVED,
            f"name={self.name!r}: a name that is not reserved",
        )
        allowed = ENCODINGS.get(self.kind, (None,))
        check(self.encoding in allowed, f"encoding={self.encoding!r}: for kind {self.kind} one of {allowed}")
        if self.low is not None and self.high is not None:
            check(self.low <= self.high, f"low={self.low}, high={self.high}: low must be at most high")
        check(
            bool(self.choices) == (self.kind == "choice"),
            f"choices={list(self.choices)}: for a choice, and only for a choice",
        )
        check(
            not self.optional or self.encoding in ("sinusoid", "similarity"),
            "optional: only with the encoding sinusoid or similarity",
        )
        if self.usual is not None:
            low, high = self.usual
            good = (
                self.kind == "curve" and all(is_number(end) and self.allows(end) for end in self.usual) and low < high
            )
            check(good, f"usual={list(self.usual)}: only for a curve: two numbers in its range, the lower one first")
        good = self.measured is None or self.kind == "curve"
        check(good, f"measured={self.measured!r}: null, or for a curve 'distance' or 'similarity'")
        self._check_default()

    def _check_default(self) -> None:
        value = self.default
        if value is None:
            good = self.optional or self.kind in VISUAL
            check(good, f"default=None: a {self.kind} needs a default unless it is optional")
        elif self.kind in NUMERIC:
            whole = self.kind != "whole" or type(value) is int
            good = is_number(value) and whole and self.allows(value)
            check(good, f"default={reprlib.repr(value)}: {self.range}")
        elif self.kind == "choice":
            check(value in self.choices, f"default={reprlib.repr(value)}: one of {', '.join(map(repr, self.choices))}")
        else:
            check(self.kind == "text" and isinstance(value, str), f"default={reprlib.repr(value)}: none, or a text")

    def allows(self, value: float) -> bool:
        """Whether a number is in the range."""
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    @property
    def span(self) -> tuple[float, float] | None:
        """The range for sounds and words: `usual`, else `low` to `high`, else up to twice the default; or None.

        For `similarity`, the default is 0 to 1: by how much the likeness falls over the clip.
        """
        if self.usual is not None or self.encoding == "similarity":
            return self.usual or (0.0, 1.0)
        low = 0.0 if self.low is None else self.low
        high = 2 * self.default if self.high is None and is_number(self.default) else self.high
        return (low, high) if high is not None and low < high else None

    @property
    def range(self) -> str:
        """The range in words: "a number from 0", "a whole number from 1 to 255"."""
        words = "a whole number" if self.kind == "whole" else "a number"
        low = "" if self.low is None else f" from {self.low:g}"
        return words + low + ("" if self.high is None else f" to {self.high:g}")


@dataclass(frozen=True)
class Offset:
    """Noise that is constant within each frame, times `scale` (a number or "control:NAME")."""

    purpose: int
    scale: float | str


@dataclass(frozen=True)
class Mix:
    """The last latents of an earlier loop, added to the noise, times `scale` (a number or "control:NAME")."""

    loop: str
    scale: float | str


@dataclass(frozen=True)
class NoiseRule:
    """The initial noise of a loop: from the stream `purpose`, plus `offset` and `mix`."""

    purpose: int
    offset: Offset | None = None
    mix: Mix | None = None

    def __post_init__(self) -> None:
        purposes = [self.purpose, *([self.offset.purpose] if self.offset else [])]
        check(all(0 <= p < 2**31 for p in purposes), f"purpose={purposes}: whole numbers from 0")


@dataclass(frozen=True)
class Replaced:
    """If the picture or clip `control` is given, the loop is not run: the source `latents` is its result."""

    control: str
    latents: str


@dataclass(frozen=True)
class Start:
    """If the picture or clip `control` is given, the loop begins from the source `latents` and runs only the last rows.

    strength  the fraction of the rows that run, 0 to 1 (a number or "control:NAME")
    needed    the loop cannot begin in another way: a request without `control` is refused
    """

    control: str
    latents: str
    strength: float | str
    needed: bool = field(default=False, metadata=LATER)


@dataclass(frozen=True)
class Known:
    """If `control`, of kind frames, is given: after each row, the source `latents` replaces the loop's estimate of the
    clean latents at these frames. `mask`: a control of kind mask; its white parts are redrawn.
    """

    control: str
    latents: str
    mask: str | None = None


@dataclass(frozen=True)
class Variant:
    """If `control`, of kind map, is given, these stages do the steps. They are None where the loop's are None."""

    control: str
    guided: str | None
    plain: str | None


@dataclass(frozen=True)
class Windows:
    """A clip of more than `length` frames is denoised in windows that begin `stride` frames apart.

    most   the longest window that a request may ask for, limited by the stages; None: `length`
    noise  the initial noise of a clip with windows (`higen.noise.frame_order`)
    """

    length: int
    stride: int
    most: int | None = field(default=None, metadata=LATER)
    noise: Literal["fresh", "shuffled", "repeated"] = field(default="fresh", metadata=LATER)

    def __post_init__(self) -> None:
        good = 1 <= self.stride <= self.length
        check(good, f"length={self.length}, stride={self.stride}: a stride from 1 to the length")
        check(
            self.most is None or self.length <= self.most <= 2**16, f"most={self.most}: at least length={self.length}"
        )
        check(self.noise in WINDOW_NOISE, f"noise={self.noise!r}: one of {', '.join(map(repr, WINDOW_NOISE))}")


@dataclass(frozen=True)
class Tiles:
    """Frames of more than `height` or `width` latent cells are denoised in tiles that begin `stride` cells apart."""

    height: int
    width: int
    stride: int

    def __post_init__(self) -> None:
        good = 1 <= self.stride <= min(self.height, self.width) and max(self.height, self.width) <= MAX_SIDE
        message = f"height={self.height}, width={self.width}, stride={self.stride}: sides of at most {MAX_SIDE}, "
        check(good, message + "and a stride from 1 to the smaller one")


@dataclass(frozen=True)
class Loop:
    """A denoising loop: its stages, number of frames, solvers (the default one first) and initial noise."""

    name: str
    guided: str | None
    plain: str | None
    frames: int | str
    schedule: NoiseSchedule
    prediction: str
    solvers: tuple[Solver, ...]
    steps: int
    guidance: float | tuple[float, ...]
    noise: NoiseRule
    least_frames: int = 1
    controls: dict[str, Any] = field(default_factory=dict)
    replaced: Replaced | None = None
    start: Start | None = None
    windows: Windows | None = None
    tiles: Tiles | None = field(default=None, metadata=LATER)
    known: Known | None = field(default=None, metadata=LATER)
    variant: Variant | None = field(default=None, metadata=LATER)
    stretch: Stretch | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        check(bool(self.guided or self.plain), "guided, plain: at least one stage")
        check(self.frames in (1, "F") and not isinstance(self.frames, bool), f"frames={self.frames!r}: 1 or 'F'")
        check(self.prediction in PREDICTIONS, f"prediction={self.prediction!r}: one of {', '.join(PREDICTIONS)}")
        names = [solver.name for solver in self.solvers]
        check(bool(names) and len(set(names)) == len(names), f"solvers={names}: at least one, each once")
        for solver in self.solvers:
            solvers.check(self.schedule, self.prediction, solver)
        most = solvers.max_steps(self.schedule, self.solvers[0])
        check(1 <= self.steps <= most, f"steps={self.steps}: from 1 to {most}")
        scales = self.guidance if isinstance(self.guidance, tuple) else (self.guidance,)
        good = bool(scales) and all(0 <= scale <= MAX_NUMBER for scale in scales)
        check(good, f"guidance={self.guidance}: a number from 0, or a list of them")
        check(1 <= self.least_frames <= 2**16, f"least_frames={self.least_frames}: from 1")

    @property
    def pairs(self) -> tuple[tuple[str | None, str | None], ...]:
        """The guided and the plain stage for its steps, then those of its variant."""
        variant = [] if self.variant is None else [(self.variant.guided, self.variant.plain)]
        return ((self.guided, self.plain), *variant)

    @property
    def stages(self) -> tuple[str, ...]:
        """All stages for its steps: the guided one, the plain one, then those of its variant."""
        return tuple(name for pair in self.pairs for name in pair if name is not None)

    def solver(self, name: str) -> Solver:
        """The solver of that name. Raises KeyError."""
        return {solver.name: solver for solver in self.solvers}[name]
