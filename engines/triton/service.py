"""The model `higen` without Triton: takes requests, runs them in shared batches, and answers with events."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from higen.backends.base import Backend
from higen.backends.batching import Batcher
from higen.backends.shared_batches import RequestBackend, SharedBackend
from higen.engines.triton.interface import Delivery, pictures, read_request
from higen.errors import Cancelled, HigenError, RequestError, RetryLater
from higen.events import Frames, Stream
from higen.pipeline import Pipeline
from higen.sampler import Step

__all__ = ["Limits", "Meter", "Reply", "Service"]

Event = dict[str, NDArray[Any]]

CANCELLATION_EVERY = 0.1
"""Seconds between checks for cancelled requests."""


@dataclass(frozen=True)
class Limits:
    """Largest numbers of active requests, of waiting requests, of rows in a batch of each stage, and of batches at the
    same time.
    """

    slots: int
    line: int
    rows: Mapping[str, int]
    batches: int = 1

    def to_json(self) -> str:
        """As text for the model's configuration."""
        return json.dumps(vars(self) | {"rows": dict(self.rows)})

    @classmethod
    def from_json(cls, text: str) -> Limits:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))


class Reply(Protocol):
    """A client's side of a request. `finish` and `fail` end it; nothing is sent after them."""

    def send(self, event: Event) -> None:
        """Send an event: outputs by name."""
        ...

    def finish(self) -> None:
        """End the request: the last event was sent."""
        ...

    def fail(self, error: HigenError) -> None:
        """End the request with an error."""
        ...

    def cancelled(self) -> bool:
        """Whether the client has cancelled the request."""
        ...


class Meter:
    """Receives a service's counts; this base class drops them. Any thread may call its methods."""

    def load(self, active: int, waiting: int) -> None:
        """The numbers of requests that run now and that wait in line."""

    def ended(self, outcome: str) -> None:
        """A request has ended: "done", "refused" (the client's mistake), "full", "cancelled" or "failed"."""

    def frames(self, count: int) -> None:
        """`count` frames were sent."""


def _outcome(error: HigenError | None) -> str:
    kinds = {RequestError: "refused", RetryLater: "full", Cancelled: "cancelled"}
    if error is None:
        return "done"
    return next((name for kind, name in kinds.items() if isinstance(error, kind)), "failed")


class Service:
    """Turns requests into streams of events. Each request has its own thread; their steps run in common batches."""

    def __init__(self, pipeline: Pipeline, backend: Backend, limits: Limits, meter: Meter | None = None) -> None:
        """`pipeline` gives the model and its tokenizer; `backend` runs the stages."""
        self._meter = meter or Meter()
        batcher = Batcher(limits.slots, limits.rows, line=limits.line)
        self.shared = SharedBackend(backend, pipeline.manifest, batcher, workers=limits.batches)
        self._pipeline = pipeline
        self._open: dict[RequestBackend, tuple[Reply, threading.Thread]] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="higen cancellation", daemon=True)
        self._watcher.start()

    def accept(self, tensors: Mapping[str, NDArray[Any]], reply: Reply) -> None:
        """Give a request a slot or a place in line, and start it; returns at once.

        All errors go to `reply.fail`. The request is read in its own thread: a long text or a large picture does not
        delay others.
        """
        mine = self.shared.request()
        try:
            mine.enter()
        except HigenError as error:
            self._meter.ended(_outcome(error))
            reply.fail(error)
            return
        self._measure()
        thread = threading.Thread(target=self._serve, args=(tensors, mine, reply), daemon=True)
        with self._lock:
            self._open[mine] = reply, thread
            thread.start()

    def _measure(self) -> None:
        """Report the load to the meter. One lock covers reading and reporting: the last report is the newest."""
        with self._lock:
            self._meter.load(*self.shared.load)

    def close(self) -> None:
        """Fail the open requests with RetryLater, and wait until each client has its error."""
        self.shared.close()
        with self._lock:
            threads = [thread for _, thread in self._open.values()]
        for thread in threads:
            thread.join()
        self._stopping.set()
        self._watcher.join()

    def _serve(self, tensors: Mapping[str, NDArray[Any]], mine: RequestBackend, reply: Reply) -> None:
        """Run a request. The request leaves its slot before the client gets the last event."""
        error: HigenError | None = None
        try:
            self._run(tensors, mine, reply)
        except HigenError as found:
            error = found
        except Exception as found:  # a bug in this library: tell this client, and do not disturb the others
            error = HigenError(f"{type(found).__name__}: {found}")
        mine.close()
        self._measure()
        self._meter.ended(_outcome(error))
        try:
            if error is None:
                reply.finish()
            else:
                reply.fail(error)
        finally:
            with self._lock:
                del self._open[mine]

    def _run(self, tensors: Mapping[str, NDArray[Any]], mine: RequestBackend, reply: Reply) -> None:
        arguments, delivery = read_request(self._pipeline.manifest, tensors)
        warned: list[str] = []
        stream = self._pipeline.on(mine).stream(**arguments, warn=lambda warning: warned.append(str(warning)))
        with closing(stream):
            latents = None
            for event in stream:
                if isinstance(event, Frames):
                    reply.send(_event("frames", first=event.first) | pictures(event.frames, delivery.encoding))
                    self._meter.frames(len(event.frames))
                else:
                    latents = event.latents
                    self._report(stream, event, delivery, reply)
        reply.send(_done(stream, warned, latents if delivery.return_latents else None))

    @staticmethod
    def _report(stream: Stream, step: Step, delivery: Delivery, reply: Reply) -> None:
        """Send a step's progress, and a preview if one is due."""
        done = step.index + 1
        place: dict[str, str | int] = {"loop": step.loop, "stage": step.stage, "step": done, "total": step.total}
        reply.send(_event("progress", **place))
        if delivery.preview_every and done % delivery.preview_every == 0:
            frames = stream.preview()[0]
            reply.send(_event("preview", first=0, **place) | pictures(frames, delivery.encoding))

    def _watch(self) -> None:
        while not self._stopping.wait(CANCELLATION_EVERY):
            with self._lock:
                watched = [(mine, reply) for mine, (reply, _) in self._open.items()]
            for mine, reply in watched:
                if reply.cancelled():
                    mine.cancel()


def _done(stream: Stream, warned: list[str], latents: Any) -> Event:
    """The last event, with `latents` [1,C,F,H,W] if they were asked for."""
    video = stream.videos[0]
    about = {"frames": len(video), "width": video.width, "height": video.height, "fps": video.fps}
    last = _event("done", metadata=json.dumps({**about, **video.metadata, "warnings": warned}))
    return last if latents is None else {**last, "latents": np.ascontiguousarray(latents[0])}


def _event(name: str, **outputs: str | int) -> Event:
    """An event of texts and whole numbers, each as an array of one."""
    return {
        key: np.array([value.encode()], dtype=np.object_) if isinstance(value, str) else np.array([value], np.int32)
        for key, value in {"event": name, **outputs}.items()
    }
