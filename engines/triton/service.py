"""The model `higen` without Triton: takes requests, runs them on shared batches, answers with events."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from higen.backends.base import Backend
from higen.backends.shared import RequestBackend, SharedBackend
from higen.batching import Batcher
from higen.engines.triton.interface import Delivery, pictures, read_request
from higen.errors import HigenError, PromptWarning
from higen.pipeline import Pipeline, Stream

__all__ = ["Limits", "Reply", "Service"]

Event = dict[str, NDArray[Any]]

CANCELLATION_EVERY = 0.1
"""Seconds between two looks at whether clients are still there."""


@dataclass(frozen=True)
class Limits:
    """How much runs at once: active requests, requests in line, rows of a batch of each stage, and batches."""

    slots: int
    line: int
    rows: Mapping[str, int]
    batches: int = 1

    def to_json(self) -> str:
        """For the model's configuration."""
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
        """Say that the last event was sent."""
        ...

    def fail(self, error: HigenError) -> None:
        """Say what went wrong."""
        ...

    def cancelled(self) -> bool:
        """Whether the client wants no more of it."""
        ...


class Service:
    """Requests to streams of events, each request in a thread of its own, their steps in common batches."""

    def __init__(self, pipeline: Pipeline, backend: Backend, limits: Limits) -> None:
        """`pipeline` gives the model and its tokenizer; its stages are run by `backend`."""
        batcher = Batcher(limits.slots, limits.rows, line=limits.line)
        self.shared = SharedBackend(backend, pipeline.config, batcher, workers=limits.batches)
        self._pipeline = pipeline
        self._open: dict[RequestBackend, tuple[Reply, threading.Thread]] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._warnings = _ThreadWarnings()
        self._watcher = threading.Thread(target=self._watch, name="higen cancellation", daemon=True)
        self._watcher.start()

    def accept(self, tensors: Mapping[str, NDArray[Any]], reply: Reply) -> None:
        """Check a request and start it; returns at once. Whatever is wrong with it goes to `reply.fail`."""
        try:
            arguments, delivery = read_request(tensors)
            mine = self.shared.request()
            stream = self._pipeline.on(mine).stream(**arguments)
            mine.enter()
        except HigenError as error:
            reply.fail(error)
            return
        thread = threading.Thread(target=self._serve, args=(stream, mine, delivery, reply), daemon=True)
        with self._lock:
            self._open[mine] = reply, thread
        thread.start()

    def close(self) -> None:
        """Fail the open requests with RetryLater, and wait until each has been told."""
        self.shared.close()
        with self._lock:
            threads = [thread for _, thread in self._open.values()]
        for thread in threads:
            thread.join()
        self._stopping.set()
        self._watcher.join()
        self._warnings.restore()

    def _serve(self, stream: Stream, mine: RequestBackend, delivery: Delivery, reply: Reply) -> None:
        try:
            with self._warnings.collected() as warned:
                self._run(stream, delivery, reply, warned)
            reply.finish()
        except HigenError as error:
            reply.fail(error)
        except Exception as error:  # a mistake of ours: the client hears of it, the others are not disturbed
            reply.fail(HigenError(f"{type(error).__name__}: {error}"))
        finally:
            stream.close()
            mine.close()
            with self._lock:
                del self._open[mine]

    def _run(self, stream: Stream, delivery: Delivery, reply: Reply, warned: list[str]) -> None:
        def send_frames(first: int, frames: NDArray[np.uint8]) -> None:
            reply.send(_event("frames", first=first) | pictures(frames, delivery.encoding))

        stream.on_chunk = send_frames
        latents = None
        for step in stream:
            latents = step.latents
            name, done = step.stage.removesuffix("_unet"), step.index + 1
            place: dict[str, str | int] = {"stage": name, "step": done, "total": step.total}
            reply.send(_event("progress", **place))
            if delivery.preview_every and done % delivery.preview_every == 0:
                frames = stream.preview()[0]
                reply.send(_event("preview", first=0, **place) | pictures(frames, delivery.encoding))
        video = stream.videos[0]
        about = {"frames": len(video), "width": video.width, "height": video.height, "fps": video.fps}
        last = _event("done", metadata=json.dumps({**about, **video.metadata, "warnings": warned}))
        if delivery.return_latents and latents is not None:
            last["latents"] = np.ascontiguousarray(latents[0])
        reply.send(last)

    def _watch(self) -> None:
        while not self._stopping.wait(CANCELLATION_EVERY):
            with self._lock:
                watched = [(mine, reply) for mine, (reply, _) in self._open.items()]
            for mine, reply in watched:
                if reply.cancelled():
                    mine.cancel()


class _ThreadWarnings:
    """Prompt warnings of each request, which Python would print once for the whole process."""

    def __init__(self) -> None:
        self._here = threading.local()
        self._show = warnings.showwarning
        warnings.showwarning = self._collect  # type: ignore[assignment]
        warnings.simplefilter("always", PromptWarning)

    def collected(self) -> _ThreadWarnings:
        """`with ...collected() as texts`: what is warned of in this thread."""
        return self

    def __enter__(self) -> list[str]:
        self._here.texts = texts = list[str]()
        return texts

    def __exit__(self, *_: object) -> None:
        del self._here.texts

    def restore(self) -> None:
        """Print warnings as before."""
        warnings.showwarning = self._show

    def _collect(self, message: Warning | str, category: type[Warning], *place: Any) -> None:
        texts = getattr(self._here, "texts", None)
        if texts is None:
            self._show(message, category, *place)
        else:
            texts.append(str(message))


def _event(name: str, **outputs: str | int) -> Event:
    """An event of texts and whole numbers, each as an array of one."""
    return {
        key: np.array([value.encode()], dtype=np.object_) if isinstance(value, str) else np.array([value], np.int32)
        for key, value in {"event": name, **outputs}.items()
    }
