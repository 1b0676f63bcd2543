"""From a prompt to a video: interprets the tables of a model directory (docs/manifest.md).

texts, controls -> sources -> all loops in order (sampler.py) -> decoder -> Video. A generation is one flat sequence of
events: a `Step` after each denoising step, then `Frames` as they are decoded.
"""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from higen import clip_tools
from higen.backends.base import CLOSED, Backend, load_ahead, stage_width
from higen.bounded_cache import BoundedCache
from higen.bundle import Bundle
from higen.decoding import decoded, previewing
from higen.errors import BackendError, HigenError, NotPicklable, RequestError
from higen.events import Event, Stream, timed, timed_events, timed_steps
from higen.forks import Home
from higen.generation_record import generation_record
from higen.images import load_picture
from higen.known_frames import spread
from higen.loop_run import conditions_of, first_row, rows_of, run_inverted, run_loop
from higen.loop_settings import guidance_rows
from higen.measured_curves import measured_cues, measured_curve, requested_curves
from higen.memory import enough_memory
from higen.notebook import Studio, watched
from higen.plain_values import plain
from higen.progress import Shown
from higen.request import Request, Warn, make_request
from higen.sampler import Plan, Step
from higen.schedule import solver_table
from higen.sources import Kept, Sources
from higen.stages import Stage
from higen.tables import COMMON, Control, Loop
from higen.tokenizer import PromptTokenizer
from higen.video import Video

__all__ = ["Pipeline", "Prompts"]

Prompts: TypeAlias = list[str] | tuple[str, ...]
"""Several prompts: they are one batch, and the result is a list."""

KEPT = 128
"""The most encoded texts, and conditions made from texts, that a pipeline keeps: about 70 MB in the released model."""


class Pipeline:
    """A loaded model. Call it to make videos; `image` makes single frames; `stream` yields every event."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.backend = backend
        text = self.manifest.text
        self._tokenizer = None if text is None else PromptTokenizer.from_file(bundle.file(text.tokenizer), text)
        # A server sees the same prompts repeatedly, and the empty prompt with every request.
        self._kept: Kept = BoundedCache(KEPT)
        self._home = Home()
        self._closed = False

    def __reduce__(self) -> tuple[Any, ...]:
        """A pipeline is sent to another process as the model's path and the loading options. Raises NotPicklable."""
        try:
            pickle.dumps(self.backend)
        except HigenError:
            raise
        except Exception as error:  # a third-party backend may raise anything
            reason = f"its backend {self.backend.name} cannot be sent to another process: call higen.load there"
            raise NotPicklable(f"{reason} ({error})") from error
        return type(self), (self.bundle, self.backend)

    def __copy__(self) -> Pipeline:
        """A copy that shares everything with this pipeline."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    @property
    def controls(self) -> tuple[Control, ...]:
        """The options of this model in addition to the common ones: name, kind, range, default, meaning."""
        return self.manifest.controls

    @overload
    def __call__(self, prompt: str = ..., *, progress: Shown = None, **options: Any) -> Video: ...

    @overload
    def __call__(self, prompt: Prompts, *, progress: Shown = None, **options: Any) -> list[Video]: ...

    def __call__(self, prompt: str | Prompts = "", *, progress: Shown = None, **options: Any) -> Video | list[Video]:
        """Make a video of `prompt`; a list of prompts gives a list of videos.

        progress  show progress bars; None: in a terminal or notebook; "previews": in a notebook, show each step, too
        options   as for `request`: negative_prompt, seed, steps, guidance, solver, frames, width, height, fps, warn,
                  and the model's controls (`pipe.controls`) by name. A missing option, or None, means the model's
                  default.

        Raises RequestError for any wrong argument, before work starts. The same seed gives the same video. A prompt's
        video does not depend on the other prompts of its batch.
        """
        videos = self.make(self.request(prompt, **options), progress)
        return videos[0] if isinstance(plain(prompt), str) else videos

    @overload
    def image(self, prompt: str = ..., *, progress: Shown = None, **options: Any) -> NDArray[np.uint8]: ...

    @overload
    def image(self, prompt: Prompts, *, progress: Shown = None, **options: Any) -> list[NDArray[np.uint8]]: ...

    def image(
        self, prompt: str | Prompts = "", *, progress: Shown = None, **options: Any
    ) -> NDArray[np.uint8] | list[NDArray[np.uint8]]:
        """A single frame, uint8 [H,W,3]; a list of prompts gives a list. Options as for a video, without `frames`.

        A control with a value per frame must have values for the model's default number of frames. Raises
        RequestError.
        """
        if self.manifest.sizes.frames[0] > 1:
            least = f"{self.manifest.sizes.frames[0]} frames or more"
            raise RequestError(f"{self.manifest.name} makes {least}, so it cannot make a single picture")
        request = self._request(prompt, options, only=1)
        images = [video.frames[0] for video in self.make(request, progress)]
        return images[0] if isinstance(plain(prompt), str) else images

    extend = clip_tools.extend
    interpolate = clip_tools.interpolate
    loop = clip_tools.loop
    edit = clip_tools.edit

    def stream(self, prompt: str | Prompts = "", **options: Any) -> Stream:
        """Every event as it happens; arguments as for a call. The request is checked now, not at the first step. The
        work stops when the caller stops iterating.
        """
        return self._stream(self.request(prompt, **options))

    def _stream(self, request: Request) -> Stream:
        self._home.check()
        finished: dict[str, Any] = {}
        parts = [
            *((loop.name, rows) for loop, rows in self._rows(request)),
            ("decode", len(request.prompts) * request.frames),
        ]
        # A preview shows an estimate of one loop; the decoder may also need the latents of other loops.
        shown = partial(previewing, self.manifest, self.backend, request)
        preview = lambda step: self.decode(step.previous, shown(), {**finished, step.loop: step.previous})  # noqa: E731
        return Stream(request, self.events(request, finished), parts, preview)

    def _rows(self, request: Request) -> Iterator[tuple[Loop, int]]:
        """The loops that are run, and the number of rows of each."""
        for loop in self.manifest.wanted(request.frames):
            if request.runs(loop):
                yield loop, rows_of(self.manifest, request, loop)

    def make(self, request: Request, progress: Shown = None) -> list[Video]:
        """The videos of a checked request, one per prompt; `progress` as for a call."""
        return watched(self._stream(request), progress)

    def widget(self) -> Studio:
        """A form for a notebook, with the model's controls. Raises MissingExtra without ipywidgets."""
        return Studio(self)

    def request(self, prompt: str | Prompts = "", *, warn: Warn | None = None, **options: Any) -> Request:
        """A checked request; pictures and clips are read here.

        negative_prompt  the prompt of the other branch of guidance; default ""
        seed             one for all prompts, or one per prompt, from 0 to 2^64 - 1; "random" or -1 draws one; default 0
        steps            denoising steps: one number, or one per loop
        guidance         one number, or one per loop; a loop over frames also takes a list with one number per frame
                         (if there are several loops, as its entry: [7, [9, ...]])
        solver           one name, or one per loop
        frames, width, height, fps
        guidance_interval, windows, window_noise, free_init, free_init_filter, reuse, preset, inversion
                         how the loops are run (higen/loop_settings.py). A request that gives nothing that chooses how
                         to draw has the model's usual preset (higen/presets.py)
        warn             called with each warning of this request; default warnings.warn

        All other options are controls of the model. A picture or clip is used for all prompts; a list has one per
        prompt. Arrays and tensors are accepted for numbers and lists. Raises RequestError for wrong or unknown options.
        """
        return self._request(prompt, {**options, "warn": warn})

    def _request(self, prompt: str | Prompts, options: Mapping[str, Any], only: int | None = None) -> Request:
        common = {name: value for name, value in options.items() if name in (*_COMMON, "warn")}
        controls = {name: value for name, value in options.items() if name not in common}
        with enough_memory("request"):
            measure = partial(measured_curve, self.manifest, self.backend)
            given: dict[str, Any] = {"controls": controls, "load": load_picture, "only": only, "measure": measure}
            return make_request(self.manifest, prompt, **common, **given)

    def stages(self, request: Request) -> list[tuple[str, ...]]:
        """The stages that a request needs, in order. Each entry lists alternatives, of which the first is preferred."""
        needed: dict[tuple[str, ...], None] = {}
        for loop in self.manifest.wanted(request.frames):
            scale = request.guidance[self.manifest.loops.index(loop)]
            needed |= {(name,): None for name in self.manifest.feeding(*request.stand_ins(loop))}
            if request.runs(loop):
                unguided = bool(np.all(np.asarray(scale) == 1.0))
                mixed = loop.name in request.settings.intervals or request.inverts(loop)
                both = (False, True) if mixed and not unguided else (unguided,)
                for ways in (ways for one in both for ways in self._steps_by(request, loop, one)):
                    needed |= {(name,): None for name in self.manifest.feeding(ways[0])[:-1]}
                    needed[ways] = None
        needed |= {(name,): None for name in self.manifest.feeding(self.manifest.chosen_decoder(request.controls))}
        return list(needed)

    @staticmethod
    def _ways(request: Request, loop: Loop, unguided: bool) -> tuple[str, ...]:
        """The stages that can do a row, the preferred one first: the plain stage if guidance is 1 everywhere."""
        guided, plain = request.pair(loop)
        names = (plain, guided) if unguided else (guided,)
        return tuple(name for name in names if name is not None)

    def _steps_by(self, request: Request, loop: Loop, unguided: bool) -> list[tuple[str, ...]]:
        """The stages that do a loop's rows: `_ways`, or their full and shallow variants if features are reused."""
        ways = self._ways(request, loop, unguided)
        if loop.name not in request.settings.reuse:
            return [ways]
        kinds = zip(*(self.manifest.stage(name).variants for name in ways), strict=True)
        return [tuple(stage.name for stage in kind) for kind in kinds]

    def prepare(self, request: Request | None = None) -> None:
        """Load all that a request needs (None: default options). Raises BackendUnavailable or IntegrityError."""
        for ways in self.load_ahead(request):
            self.backend.choose(*ways)

    def load_ahead(self, request: Request | None = None) -> list[tuple[str, ...]]:
        """Begin in the background what `prepare` does, if the backend can. Returns what `stages` returns."""
        self._check_usable()
        return load_ahead(self.backend, self._default_stages() if request is None else self.stages(request))

    def _default_stages(self) -> list[tuple[str, ...]]:
        """The stages that a minimal request needs: a video from text, with only the pictures that the loops require."""
        needed = list(self.manifest.pictures_of(self.manifest.sizes.decoder))
        for loop in sorted(self.manifest.loops, key=lambda loop: loop.replaced is not None):
            if loop.replaced is None or loop.replaced.control not in needed:
                needed += self.manifest.needed_by(loop)
        return self.stages(make_request(self.manifest, "a", controls=dict.fromkeys(needed, ""), load=_any_picture))

    def cues(self, video: Video) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.float64]]]:
        """A clip's measured and requested curves, by control: [F - 1], one number per pair of frames, or [F], the
        likeness of each frame to the first one. Unspecified curves are not among the requested. Raises RequestError.
        """
        measured = measured_cues(self.manifest, self.backend, video)
        return measured, requested_curves(self.manifest, video.metadata, len(video))

    def report(self) -> str:
        """The backend of each stage, and why no better one runs it. Stages that were not needed yet are left out."""
        choices = self.backend.choices.values()
        width = stage_width(choices)
        lines = [line for choice in choices for line in choice.as_lines(width)]
        return "\n".join(lines) or f"every stage: {self.backend.name}"

    def on(self, backend: Backend) -> Pipeline:
        """The same model, with its stages run by another backend. Nothing is loaded again."""
        twin = self.__copy__()
        twin.backend = backend
        return twin

    def close(self) -> None:
        """Free the model; a running call ends with a BackendError. In a forked process, nothing is freed."""
        if self._home.here:
            self._closed = True
            self._kept.clear()
        self.backend.close()

    def _check_usable(self) -> None:
        """Raise BackendError in a forked process and after `close`, for every backend."""
        self._home.check()
        if self._closed:
            raise BackendError(CLOSED)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The parts of a generation, in order.

    def events(self, request: Request, finished: dict[str, Any] | None = None) -> Generator[Event, None, list[Video]]:
        """Every step of every loop, then the frames; returns the videos. `finished` gets the loops' last latents, by
        name.
        """
        self._check_usable()
        if request.settings.reuse:  # a model may lack some of these graphs: fail now, not after half of the work
            self.prepare(request)
        finished = {} if finished is None else finished
        seconds: dict[str, float] = {}
        with timed(seconds, "text"):
            sources = self._sources(request)
        latents: Any = None
        for loop in self.manifest.wanted(request.frames):
            steps = request.steps[self.manifest.loops.index(loop)]
            if request.replaces(loop):
                assert loop.replaced is not None
                with timed(seconds, loop.replaced.control):
                    latents = spread(sources.made(loop.replaced.latents, loop), request.frames_of(loop))
            elif request.runs(loop):
                latents = yield from timed_steps(seconds, loop.name, self._steps(request, sources, loop, steps))
            else:
                continue
            finished[loop.name] = self.backend.to_numpy(latents)
            sources.finish(loop, finished[loop.name])
        frames = np.empty((len(request.prompts), request.frames, request.height, request.width, 3), np.uint8)
        for event in timed_events(seconds, "decode", decoded(latents, self.manifest, self.backend, sources)):
            frames[event.video, event.first : event.first + len(event.frames)] = event.frames
            yield event
        made = [generation_record(self.manifest, request, i, seconds, self.backend.name) for i in range(len(frames))]
        return [Video(shown, request.fps, row, weakref.ref(self)) for shown, row in zip(frames, made, strict=True)]

    def _sources(self, request: Request) -> Sources:
        """The sources of a request, with its texts tokenized."""
        names, tokenizer = request.texts(), self._tokenizer
        if tokenizer is None or tokenizer.rules.plain:
            tokens = {text: tokenizer.encode([text], request.warn, [name]) for text, name in names.items() if tokenizer}
            return Sources(self.manifest, self.backend, request, tokens, self._kept)
        readings = {text: tokenizer.read(text, request.warn, name) for text, name in names.items()}
        return Sources(self.manifest, self.backend, request, {}, self._kept, readings)

    def _steps(self, request: Request, sources: Sources, loop: Loop, steps: int) -> Iterator[Step]:
        index = self.manifest.loops.index(loop)
        table = solver_table(loop.schedule, loop.prediction, loop.solver(request.solvers[index]), steps)
        scale = np.asarray(request.guidance[index], np.float32)
        plan = Plan(
            loop=loop.name,
            stage=lambda guidance: self._stage(request, loop, bool(np.all(guidance == 1.0))),
            conditions=conditions_of(sources, loop),
            table=table,
            guidance=guidance_rows(
                scale,
                (len(table), len(request.prompts), request.frames_of(loop)),
                request.settings.intervals.get(loop.name),
            ),
            seeds=request.seeds,
            purpose=loop.noise.purpose,
            first=first_row(request, loop, len(table)),
            windows=request.settings.windows.get(loop.name),
            tiles=loop.tiles,
            edit=sources.known(loop),
            reuse=request.settings.reuse.get(loop.name, 1),
            stretch=request.settings.stretching(loop, sources.latents),
        )
        if request.inverts(loop):
            yield from run_inverted(self.manifest, self.backend, request, sources, loop, plan, self._sources)
        else:
            yield from run_loop(self.manifest, self.backend, request, sources, loop, plan)

    def start_latents(self, request: Request, loop: Loop) -> NDArray[np.float32]:
        """The latents [B, C, F, H, W] that a loop begins from. Raises RequestError if it begins from noise."""
        if loop.start is None or not request.begins(loop):
            raise RequestError(f"{loop.name} begins from noise")
        self._check_usable()
        return np.asarray(self._sources(request).made(loop.start.latents, loop), np.float32)

    def _stage(self, request: Request, loop: Loop, unguided: bool) -> Stage:
        """The stage that does a row; `unguided`: the row's guidance is 1 everywhere."""
        full, ways = self._steps_by(request, loop, unguided)[0], self._ways(request, loop, unguided)
        return self.manifest.stage(ways[full.index(self.backend.choose(*full))])

    def decode(self, latents: Any, request: Request, others: Mapping[str, Any] | None = None) -> NDArray[np.uint8]:
        """Latents [B,C,f,H,W] as uint8 frames [B,f,Y,X,3]. `others`: latents of loops, by name, that the decoder may
        take. Raises RequestError if the decoder takes latents that are missing.
        """
        quiet = replace(request, warn=lambda _: None)
        sources = self._sources(quiet)
        for name, value in (others or {}).items():
            sources.finish(self.manifest.loop(name), np.asarray(self.backend.to_numpy(value)))
        events = list(decoded(latents, self.manifest, self.backend, sources))
        videos = [[e.frames for e in events if e.video == i] for i in range(len(request.prompts))]
        return np.stack([np.concatenate(parts) for parts in videos])


_COMMON = tuple(name for name in COMMON if name != "prompt")


def _any_picture(control: Control, value: Any, frames: int, width: int, height: int) -> Any:
    """Replaces the reading of a picture if only the plan of a request is needed."""
    return value
