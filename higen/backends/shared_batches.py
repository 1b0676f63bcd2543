"""One backend for many concurrent requests: their stage calls share batches (higen/backends/batching.py).

    shared = SharedBackend(backend, manifest, Batcher(slots=16, rows=...))
    with shared.request() as mine:                        # one thread per request
        video = pipeline.on(mine)(prompt, seed=7)         # same use as without batching

The calling threads wait. One thread runs the batches; with `workers`, several threads run one batch each, if the
backend allows it. If some active requests are between two steps, a batch waits for them for at most `patience` seconds,
so that requests stay in step. If the manifest says that a stage cannot hold several samples, each of its calls runs
alone, with any number of rows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen.backends.base import Backend, Choice
from higen.backends.batching import Batch, Batcher, Call
from higen.errors import BackendError, Cancelled, HigenError, NotPicklable, RetryLater
from higen.forks import Home
from higen.manifest import Manifest
from higen.stages import check_inputs

__all__ = ["RequestBackend", "SharedBackend"]

Results = Future[dict[str, NDArray[Any]]]


class SharedBackend:
    """Runs the calls of many requests in common batches."""

    def __init__(
        self, backend: Backend, manifest: Manifest, batcher: Batcher, patience: float = 0.01, workers: int = 1
    ) -> None:
        """`patience`: seconds that a batch may wait for requests between two steps. `workers`: batches run at once."""
        self.backend = backend
        self.patience = patience
        self.batches = 0
        self.rows = 0
        self._stages = {stage.name: stage for stage in manifest.all_stages}
        self._fixed = manifest.fixed
        self._batcher = batcher
        self._changed = threading.Condition()
        self._results: dict[Call, Results] = {}
        self._closed = False
        self._home = Home()
        self._free_since = time.monotonic()
        self._workers = [threading.Thread(target=self._work, name="higen batches", daemon=True) for _ in range(workers)]
        for worker in self._workers:
            worker.start()

    def __reduce__(self) -> tuple[object, ...]:
        raise NotPicklable("requests share a batch within one process: call higen.load in the other one")

    @property
    def load(self) -> tuple[int, int]:
        """How many requests are active, and how many wait in line."""
        with self._changed:
            return self._batcher.load

    def request(self) -> RequestBackend:
        """A backend for one request. It has no slot before `enter` or `with`."""
        return RequestBackend(self)

    def close(self) -> None:
        """Stop: waiting calls raise RetryLater, running batches are finished. The underlying backend stays open."""
        if not self._home.here:
            return
        with self._changed:
            self._closed = True
            for result in self._results.values():
                _fail(result, RetryLater("the server is stopping: try again later"))
            self._results.clear()
            self._changed.notify_all()
        for worker in self._workers:
            worker.join()

    # For RequestBackend.

    def enter(self, request: RequestBackend) -> None:
        """Take a slot or a place in line. Raises RetryLater if all slots and the line are full."""
        self._home.check()
        with self._changed:
            self._check_open()
            self._batcher.enter(request)

    def wait_for_slot(self, request: RequestBackend) -> None:
        """Block until the request has a slot. Raises Cancelled if it is cancelled while it waits."""
        with self._changed:
            while not self._batcher.active(request):
                self._check_open()
                if request.cancelled:
                    raise Cancelled("the request was cancelled")
                self._changed.wait()

    def call(self, request: RequestBackend, stage: str, tensors: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Run a stage in a shared batch and return its results; the calling thread waits."""
        self._home.check()
        arrays = {name: np.asarray(value) for name, value in tensors.items()}
        row = self._stages[stage]
        check_inputs(row, arrays, self._fixed)
        self.wait_for_slot(request)
        result: Results = Future()
        with self._changed:
            self._check_open()
            if request.cancelled:
                raise Cancelled("the request was cancelled")
            self._results[self._batcher.submit(request, stage, arrays, row.batch)] = result
            self._changed.notify_all()
        return result.result()

    def leave(self, request: RequestBackend) -> None:
        """Free the request's slot. A waiting or running call of this request raises Cancelled."""
        if not self._home.here:
            return
        with self._changed:
            self._batcher.leave(request)
            for call in [call for call in self._results if call.request is request]:
                _fail(self._results.pop(call), Cancelled("the request was cancelled"))
            self._changed.notify_all()

    # The threads that run the batches.

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            self._run(batch)

    def _next_batch(self) -> Batch | None:
        with self._changed:
            while not self._closed:
                if self._batcher.waiting:
                    patience = self._free_since + self.patience - time.monotonic() if self._batcher.thinking else 0
                    if patience <= 0:
                        return self._batcher.next_batch()
                    self._changed.wait(patience)
                else:
                    self._changed.wait()
                    self._free_since = time.monotonic()
        return None

    def _run(self, batch: Batch) -> None:
        """Run a batch. If it fails, run each of its calls alone, so that a failure stays with its request."""
        try:
            outputs = self.backend.run(batch.stage, **batch.tensors())
            parts = batch.split({name: self.backend.to_numpy(value) for name, value in outputs.items()})
        except Exception as error:  # any error of a backend goes to the requests and must not end this thread
            if len(batch.calls) > 1:
                for call in batch.calls:
                    self._run(Batch((call,)))
            else:
                self._deliver(batch.calls[0], _as_ours(batch.stage, error))
            return
        with self._changed:
            self.batches += 1
            self.rows += sum(call.rows for call in batch.calls)
        for call, part in zip(batch.calls, parts, strict=True):
            self._deliver(call, part)

    def _deliver(self, call: Call, found: dict[str, NDArray[Any]] | HigenError) -> None:
        with self._changed:
            self._free_since = time.monotonic()
            self._batcher.done(call)
            result = self._results.pop(call, None)
        if result is None:  # the request has left
            return
        if isinstance(found, HigenError):
            result.set_exception(found)
        else:
            result.set_result(found)

    def _check_open(self) -> None:
        if self._closed:
            raise RetryLater("the server is stopping: try again later")


class RequestBackend:
    """The Backend of one request on a SharedBackend. Free it with `close` or the end of `with`."""

    def __init__(self, shared: SharedBackend) -> None:
        self.cancelled = False
        self._shared = shared

    @property
    def name(self) -> str:
        """The name of the backend that runs the batches."""
        return self._shared.backend.name

    def prepare(self, stage: str) -> None:
        """Load a stage; all requests share it."""
        self._shared.backend.prepare(stage)

    def describe(self, stage: str) -> str:
        """See `Backend.describe`."""
        return self._shared.backend.describe(stage)

    @property
    def choices(self) -> Mapping[str, Choice]:
        """See `Backend.choices`."""
        return self._shared.backend.choices

    def choose(self, *stages: str) -> str:
        """See `Backend.choose`."""
        return self._shared.backend.choose(*stages)

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        """Wait for a slot, then run a stage; see `Backend.run`. Raises Cancelled after `cancel`."""
        return self._shared.call(self, stage, tensors)

    def to_numpy(self, tensor: Any) -> NDArray[Any]:
        """The array itself: results are already on the host."""
        return np.asarray(tensor)

    def enter(self) -> None:
        """Take a slot or a place in line. Raises RetryLater if all slots and the line are full."""
        self._shared.enter(self)

    def cancel(self) -> None:
        """Cancel the request, from any thread. Its waiting call raises Cancelled, and its slot is free at once."""
        self.cancelled = True
        self._shared.leave(self)

    def close(self) -> None:
        """Free the slot."""
        self.cancel()

    def __enter__(self) -> RequestBackend:
        self.enter()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def _fail(result: Results, error: HigenError) -> None:
    if not result.done():
        result.set_exception(error)


def _as_ours(stage: str, error: Exception) -> HigenError:
    if isinstance(error, HigenError):
        return error
    ours = BackendError(f"{stage}: {error}")
    ours.__cause__ = error
    return ours
