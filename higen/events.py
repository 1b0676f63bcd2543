"""The events of a generation, and the stream that a caller reads them from."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from higen.errors import NotPicklable, RequestError
from higen.forks import Home
from higen.memory import enough_memory
from higen.request import Request
from higen.sampler import Step
from higen.video import Video, Videos

__all__ = ["Event", "Frames", "Stream", "timed", "timed_events", "timed_steps"]


@dataclass(frozen=True)
class Frames:
    """Decoded frames of one video: uint8 `frames` [n, Y, X, 3], beginning with frame number `first`.

    So far, `done` of the `total` frames of all videos are decoded.
    """

    video: int
    first: int
    frames: NDArray[np.uint8]
    done: int
    total: int


Event: TypeAlias = Step | Frames


class Stream:
    """The events of one request, one at a time: `for event in stream: ...`, then `stream.videos`.

    `preview()` decodes the current estimate of the clean latents. Stopping early (break, close, Ctrl-C) stops the
    work; the pipeline can be used again at once. Threads may share a stream: each event goes to one of them.
    """

    def __init__(
        self,
        request: Request,
        events: Generator[Event, None, list[Video]],
        loops: Sequence[tuple[str, int]],
        decode: Callable[[Step], NDArray[np.uint8]],
    ) -> None:
        """`loops`: name and length of each part; `decode`: turns a step's estimate into frames, for previews."""
        self.request = request
        self.loops = list(loops)
        """Name and length of each part, in order: each loop with its steps, then decoding with its frames."""
        self._events = events
        self._decode = decode
        self._videos: Videos | None = None
        self._latest: Step | None = None
        self._closed = threading.Event()
        self._working = threading.RLock()
        self._home = Home()

    def __reduce__(self) -> tuple[Any, ...]:
        raise NotPicklable("a stream cannot be sent to another process: call higen.load and pipe.stream there")

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        self._home.check()
        with self._working:
            if self._closed.is_set():
                self._events.close()
                raise StopIteration
            try:
                with enough_memory("this request"):
                    event = next(self._events)
            except StopIteration as end:
                self._videos = self._videos if end.value is None else Videos(end.value)
                raise StopIteration from None
            if isinstance(event, Step):
                self._latest = event
            return event

    def close(self) -> None:
        """Stop the work. If called from another thread, the present step is finished first."""
        self._closed.set()
        # Another thread that is making a step sees the closed stream. ValueError: this thread is making the step.
        if self._home.here and self._working.acquire(blocking=False):
            try:
                with suppress(ValueError):
                    self._events.close()
            finally:
                self._working.release()

    def preview(self) -> NDArray[np.uint8]:
        """The current estimate of the result, uint8 [B,f,H,W,3] (f = 1 in a loop over one frame).

        Raises RequestError before the first step.
        """
        if self._latest is None:
            raise RequestError("preview: no step has been made yet")
        with enough_memory("preview"):
            return self._decode(self._latest)

    @property
    def videos(self) -> Videos:
        """One video per prompt. Raises RequestError before the last event."""
        if self._videos is None:
            why = ": it was closed" if self._closed.is_set() else ""
            raise RequestError(f"videos: the stream has not been read to its end{why}")
        return self._videos


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the seconds that the block takes to `seconds[part]`."""
    start = time.perf_counter()
    yield
    seconds[part] = round(seconds.get(part, 0.0) + time.perf_counter() - start, 4)


def timed_events(seconds: dict[str, float], part: str, events: Iterator[Frames]) -> Iterator[Frames]:
    """Pass events on; count the time of making them, but not the time of their consumer."""
    while True:
        with timed(seconds, part):
            event = next(events, None)
        if event is None:
            return
        yield event


def timed_steps(seconds: dict[str, float], part: str, steps: Iterator[Step]) -> Generator[Step, None, Any]:
    """As `timed_events`; returns the last latents."""
    latents = None
    while True:
        with timed(seconds, part):
            step = next(steps, None)
        if step is None:
            return latents
        latents = step.latents
        yield step
