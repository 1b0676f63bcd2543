"""From a prompt to a video: text, spatial loop, temporal loop, frames (reference: inference_higen_entrance.py).

tokens -> text_encoder -> conditioner -> spatial_unet x steps -> key-frame latents z
conditioner (motion, appearance) -> temporal_unet x steps, prior z -> vae_decoder -> Video
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from higen import bundle as files
from higen import noise
from higen.backends.base import Backend
from higen.bundle import Bundle
from higen.conditioning import appearance_rows, motion_cue
from higen.errors import RequestError
from higen.images import Image, load_image
from higen.recent import Recent
from higen.request import OPTIONS, Request, RequestOptions, make_request
from higen.sampler import Step, denoise
from higen.schedule import solver_table
from higen.tokenizer import PromptTokenizer
from higen.version import __version__
from higen.video import Video, to_uint8

__all__ = ["Pipeline", "Prompts", "Stream"]

Prompts: TypeAlias = list[str] | tuple[str, ...]
"""Several prompts: one batch, a list of results."""

DECODE_CHUNK = 2
"""Frames decoded at a time, as the reference does: memory does not grow with the length of the clip."""

KEPT = 128
"""Encoded texts, and conditions made of them, that a pipeline keeps: some 70 MB of the released model's at most."""


@dataclass(frozen=True)
class _Text:
    """A prompt's tokens [L] and what the text encoder made of them, hidden [1,L,Dt]."""

    tokens: bytes
    hidden: NDArray[np.float32]


class Pipeline:
    """A loaded model. Call it to make videos; `image` draws key frames alone; `stream` yields every step."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle = bundle
        self.config = bundle.config
        self.backend = backend
        self._tokenizer = PromptTokenizer.from_file(bundle.file(files.TOKENIZER), bundle.config.text)
        # By prompt: a server sees the same ones again, and the empty one with every request.
        self._texts: Recent[_Text] = Recent(KEPT)
        self._conditioned: Recent[dict[str, NDArray[np.float32]]] = Recent(KEPT)

    @overload
    def __call__(
        self,
        prompt: str,
        *,
        image: Image | None = None,
        progress: bool | None = None,
        **options: Unpack[RequestOptions],
    ) -> Video: ...

    @overload
    def __call__(
        self,
        prompt: Prompts,
        *,
        image: Image | None = None,
        progress: bool | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[Video]: ...

    def __call__(
        self,
        prompt: str | Prompts,
        *,
        image: Image | None = None,
        progress: bool | None = None,
        **options: Unpack[RequestOptions],
    ) -> Video | list[Video]:
        """Make a video of `prompt`; a list of prompts gives a list of videos.

        image     a path, PIL image or uint8 array [H,W,3] that replaces the key frame drawn from the text
        progress  show progress bars; None: when a person is watching
        options   seed (one, or one per prompt; 0), steps and guidance (one number, or two: spatial and temporal
                  stage), solver ("ddim" or "dpm++2m"), frames, width, height, fps, negative_prompt,
                  motion (one number, one per pair of frames or one per frame), appearance (one number, one per
                  frame, or a matrix), offset_noise. What is not given is the model's default.

        Raises RequestError for any argument that is wrong, before work starts. Same seed, same video; a prompt's
        video does not depend on the other prompts of its batch.
        """
        stream = self.stream(prompt, image=image, **options)
        _consume(stream, progress)
        return stream.videos if isinstance(prompt, (list, tuple)) else stream.videos[0]

    @overload
    def image(
        self,
        prompt: str,
        *,
        progress: bool | None = None,
        **options: Unpack[RequestOptions],
    ) -> NDArray[np.uint8]: ...

    @overload
    def image(
        self,
        prompt: Prompts,
        *,
        progress: bool | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[NDArray[np.uint8]]: ...

    def image(
        self,
        prompt: str | Prompts,
        *,
        progress: bool | None = None,
        **options: Unpack[RequestOptions],
    ) -> NDArray[np.uint8] | list[NDArray[np.uint8]]:
        """Stage one alone: the key frame as uint8 [H,W,3]; a list of prompts gives a list. Options as for a video."""
        stream = Stream(self, replace(self._request(prompt, options), frames=1), None)
        _consume(stream, progress)
        images = [video.frames[0] for video in stream.videos]
        return images if isinstance(prompt, (list, tuple)) else images[0]

    def stream(self, prompt: str | Prompts, *, image: Image | None = None, **options: Unpack[RequestOptions]) -> Stream:
        """Every denoising step as it is made; arguments as for a call. The request is checked here, not at the first
        step; the work stops when the caller stops iterating.
        """
        request = self._request(prompt, options)
        key_frame = None if image is None else load_image(image, request.width, request.height)
        return Stream(self, request, key_frame)

    def _request(self, prompt: str | Prompts, options: RequestOptions) -> Request:
        if unknown := sorted(set(options) - set(OPTIONS)):
            raise RequestError(f"{', '.join(unknown)}: unknown; a request takes {', '.join(OPTIONS)}")
        return make_request(self.config, prompt, **options)

    def prepare(self) -> None:
        """Load all that a video from text needs, so that a broken model is found out before any work starts."""
        for stage in ("text_encoder", "conditioner", "spatial_unet", "temporal_unet", "vae_decoder"):
            self.backend.prepare(stage)

    def report(self) -> str:
        """What runs each stage here, and why the better ways do not; stages that were not needed yet are left out."""
        choices = getattr(self.backend, "choices", {}).values()
        lines = [line for choice in choices for line in choice.as_lines()]
        return "\n".join(lines) or f"every stage: {self.backend.name}"

    def on(self, backend: Backend) -> Pipeline:
        """The same model with its stages run by another backend; nothing is loaded again."""
        twin = copy.copy(self)
        twin.backend = backend
        return twin

    def close(self) -> None:
        """Free the model."""
        self._texts.clear()
        self._conditioned.clear()
        self.backend.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The parts of a generation, in order.

    def _encode_text(self, request: Request) -> tuple[list[_Text], _Text]:
        """The prompts, and the negative prompt. Each is encoded alone, so that its result is its own, and once."""
        prompts, (empty,) = (self._tokenizer.encode(t) for t in (request.prompts, (request.negative_prompt,)))
        return [self._text(tokens) for tokens in prompts], self._text(empty)

    def _text(self, tokens: NDArray[np.int64]) -> _Text:
        def encode() -> _Text:
            hidden = self.backend.run("text_encoder", tokens=tokens[None])["hidden"]
            return _Text(tokens.tobytes(), self.backend.to_numpy(hidden))

        return self._texts.get(tokens.tobytes(), encode)

    def _conditions(
        self, texts: tuple[list[_Text], _Text], motion: NDArray[np.float32], appearance: NDArray[np.float32]
    ) -> dict[str, Any]:
        """The denoising stages' inputs that do not change over the steps; the cues are [B,F,D] and [B,F,R]."""
        prompts, empty = texts
        given = [self._condition(*row) for row in zip(prompts, motion, appearance, strict=True)]
        without = self._condition(empty, motion[0], appearance[0])["context"]
        return {
            **{name: np.concatenate([row[name] for row in given]) for name in given[0]},
            "empty_context": without.repeat(len(given), axis=0),
        }

    def _condition(
        self, text: _Text, motion: NDArray[np.float32], appearance: NDArray[np.float32]
    ) -> dict[str, NDArray[np.float32]]:
        def run() -> dict[str, NDArray[np.float32]]:
            cues = {"motion": motion[None], "appearance": appearance[None]}
            made = self.backend.run("conditioner", hidden=text.hidden, **cues)
            return {name: self.backend.to_numpy(value) for name, value in made.items()}

        return self._conditioned.get((text.tokens, motion.tobytes(), appearance.tobytes()), run)

    def _spatial_steps(self, request: Request, texts: tuple[list[_Text], _Text]) -> Iterator[Step]:
        """Stage one: no prior, motion 0 and appearance 1 for its single frame."""
        unet, batch = self.config.unet, len(request.prompts)
        motion = motion_cue(0.0, 1, unet.base_channels)[None].repeat(batch, axis=0)
        appearance = appearance_rows(0.0, 1, unet.appearance_columns)[None].repeat(batch, axis=0)
        latents = self._noise(request, noise.SPATIAL, 1)
        table = solver_table(request.solver, request.steps[0], self.config.schedule)
        conditions = self._conditions(texts, motion, appearance)
        yield from denoise(self.backend, "spatial_unet", latents, table, request.guidance[0], **conditions)

    def _temporal_steps(self, request: Request, texts: tuple[list[_Text], _Text], prior: Any) -> Iterator[Step]:
        """Stage two: the key frame's latents [B,C,H,W] are the prior of every frame."""
        unet = self.config.unet
        offset = np.stack([noise.offset_noise(seed, unet.in_channels, request.frames) for seed in request.seeds])
        latents = self._noise(request, noise.TEMPORAL, request.frames) + np.float32(request.offset_noise) * offset
        table = solver_table(request.solver, request.steps[1], self.config.schedule)
        conditions = self._conditions(
            texts, request.motion_input(unet.base_channels), request.appearance_input(unet.appearance_columns)
        )
        yield from denoise(
            self.backend, "temporal_unet", latents, table, request.guidance[1], **conditions, prior=prior
        )

    def _noise(self, request: Request, purpose: int, frames: int) -> NDArray[np.float32]:
        factor, channels = self.config.autoencoder.factor, self.config.unet.in_channels
        height, width = request.height // factor, request.width // factor
        return np.stack([noise.initial_noise(seed, purpose, channels, frames, height, width) for seed in request.seeds])

    def _encode_image(self, pixels: NDArray[np.float32], batch: int) -> NDArray[np.float32]:
        encoded = self.backend.to_numpy(self.backend.run("vae_encoder", pixels=pixels[None])["latents"])
        return np.repeat(encoded, batch, axis=0)

    def decode(
        self,
        latents: Any,
        on_frame: Callable[[int, int], None] | None = None,
        on_chunk: Callable[[int, NDArray[np.uint8]], None] | None = None,
    ) -> NDArray[np.uint8]:
        """Latents [B,C,F,H,W] to uint8 frames [B,F,Y,X,3], a few at a time. After each few: `on_frame(done, total)`
        and `on_chunk(first, frames)`, frames uint8 [n,Y,X,3] and the place of the first one of them among all B F.

        No few are of two samples, for a graph's rounding may depend on how many it is given: so a sample's is its own.
        """
        z = np.asarray(self.backend.to_numpy(latents), dtype=np.float32)
        batch, _, frames, height, width = z.shape
        factor = self.config.autoencoder.factor
        decoded = np.empty((batch, frames, height * factor, width * factor, 3), np.uint8)
        done = 0
        for sample, target in zip(z.swapaxes(1, 2), decoded, strict=True):
            for start in range(0, frames, DECODE_CHUNK):
                chunk = sample[start : start + DECODE_CHUNK]
                pixels = self.backend.to_numpy(self.backend.run("vae_decoder", latents=chunk)["pixels"])
                target[start : start + len(chunk)] = to_uint8(pixels)
                if on_chunk is not None:
                    on_chunk(done, target[start : start + len(chunk)])
                done += len(chunk)
                if on_frame is not None:
                    on_frame(done, batch * frames)
        return decoded

    def _metadata(self, request: Request, index: int, seconds: dict[str, float]) -> dict[str, Any]:
        def plain(cue: Any) -> Any:
            return None if cue is None else np.asarray(cue, dtype=np.float64).tolist()

        return {
            "prompt": request.prompts[index],
            "negative_prompt": request.negative_prompt,
            "seed": request.seeds[index],
            "steps": list(request.steps),
            "guidance": list(request.guidance),
            "solver": request.solver,
            "motion": plain(request.motion),
            "appearance": plain(request.appearance),
            "offset_noise": request.offset_noise,
            "model": self.config.name,
            "licence": self.config.licence,
            "versions": {"higen": __version__, "backend": self.backend.name},
            "seconds": dict(seconds),
        }


class Stream:
    """The steps of one request, one at a time: `for step in stream: ...`, then `stream.videos`.

    `preview()` decodes the current estimate of the clean latents. Stopping early (break, close, Ctrl-C) stops the
    work; the pipeline can be used again at once.
    """

    def __init__(self, pipeline: Pipeline, request: Request, key_frame: NDArray[np.float32] | None) -> None:
        self.request = request
        self._pipeline = pipeline
        self._key_frame = key_frame
        self._videos: list[Video] | None = None
        self._latest: Step | None = None
        self._steps = self._run()
        self.on_frame: Callable[[int, int], None] | None = None
        """Called with (decoded frames, all frames) while the result is decoded."""
        self.on_chunk: Callable[[int, NDArray[np.uint8]], None] | None = None
        """Called with the frames themselves while the result is decoded: see `Pipeline.decode`."""

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        self._latest = next(self._steps)
        return self._latest

    @property
    def loops(self) -> list[tuple[str, int]]:
        """Name and length of each loop, in order: steps of the two stages, then frames decoded."""
        request, (spatial, temporal) = self.request, self.request.steps
        first = [("spatial", spatial)] if self._key_frame is None else []
        second = [("temporal", temporal)] if request.frames > 1 else []
        return [*first, *second, ("decode", len(request.prompts) * request.frames)]

    def close(self) -> None:
        """Stop the work."""
        self._steps.close()

    def preview(self) -> NDArray[np.uint8]:
        """The current estimate of the result, uint8 [B,F,H,W,3] (F = 1 in the spatial stage).

        Raises RequestError before the first step.
        """
        if self._latest is None:
            raise RequestError("preview: no step has been made yet")
        return self._pipeline.decode(self._latest.previous)

    @property
    def videos(self) -> list[Video]:
        """One video per prompt. Raises RequestError before the last step."""
        if self._videos is None:
            raise RequestError("videos: the stream has not been read to its end")
        return self._videos

    def _run(self) -> Generator[Step, None, None]:
        pipeline, request, seconds = self._pipeline, self.request, dict[str, float]()
        with _timed(seconds, "text"):
            texts = pipeline._encode_text(request)
        if self._key_frame is None:
            latents = yield from _timed_steps(seconds, "spatial", pipeline._spatial_steps(request, texts))
            prior = pipeline.backend.to_numpy(latents)[:, :, 0]
        else:
            with _timed(seconds, "image"):
                prior = pipeline._encode_image(self._key_frame, len(request.prompts))
                latents = prior[:, :, None]
        if request.frames > 1:
            latents = yield from _timed_steps(seconds, "temporal", pipeline._temporal_steps(request, texts, prior))
        with _timed(seconds, "decode"):
            frames = pipeline.decode(latents, self.on_frame, self.on_chunk)
        self._videos = [
            Video(frames[i], request.fps, pipeline._metadata(request, i, seconds)) for i in range(len(frames))
        ]


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[part] = round(seconds.get(part, 0.0) + time.perf_counter() - start, 4)


def _timed_steps(seconds: dict[str, float], part: str, steps: Iterator[Step]) -> Generator[Step, None, Any]:
    """Pass steps on, counting the time spent making them and not that of their consumer; returns the last latents."""
    latents = None
    while True:
        with _timed(seconds, part):
            step = next(steps, None)
        if step is None:
            return latents
        latents = step.latents
        yield step


class _Progress:
    """A bar for each loop, one at a time: it stands before the loop's first step and is closed after its last."""

    def __init__(self, loops: Sequence[tuple[str, int]], shown: bool) -> None:
        self._loops = iter(loops)
        self._shown = shown
        self._done = 0
        self._bar: Any = None
        self._next()

    def reached(self, done: int) -> None:
        """`done` steps of the present loop are made."""
        self._bar.update(done - self._done)
        self._done = done
        if done == self._bar.total:
            self.close()
            self._next()

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()

    def _next(self) -> None:
        from tqdm import tqdm

        name, total = next(self._loops, ("", 0))
        self._done = 0
        self._bar = tqdm(desc=f"{name:<8}", total=total, disable=not (self._shown and name))


def _consume(stream: Stream, progress: bool | None) -> None:
    """Run a stream to its end with a bar for each loop."""
    bars = _Progress(stream.loops, sys.stderr.isatty() if progress is None else progress)
    stream.on_frame = lambda done, _: bars.reached(done)
    try:
        for step in stream:
            bars.reached(step.index + 1)
    finally:
        stream.close()
        bars.close()
