"""Makes the videos of rows with a loaded model, in this process or in an actor of a cluster.

With several slots, several rows are made at once. Their steps share batches, as in the server
(higen/backends/shared_batches.py).
"""

from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from higen.api import load
from higen.axes import most_rows
from higen.backends.batching import Batcher
from higen.backends.shared_batches import SharedBackend
from higen.bulk.index import Journal, Record, video_path
from higen.bulk.places import RUN, open_place
from higen.bulk.rows import key_of, model_digest
from higen.errors import BackendError, Cancelled, IntegrityError, OutputError, RequestError, quoted
from higen.video import Video

__all__ = ["Maker", "Making", "Order"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True, kw_only=True)
class Making:
    """How rows are made, in any process.

    backend, device, precision, threads    as for `higen.load`
    retries    how often a failed row is tried again
    slots      number of rows made at once
    """

    backend: str | None = None
    device: str | None = None
    precision: str | None = None
    threads: int | None = None
    retries: int = 2
    slots: int = 1


@dataclass(frozen=True)
class Order(Making):
    """Everything that a process needs to make rows.

    output     a path or URL; its file RUN must contain `token`
    model      path of the model, or None for the built-in one; it must have the digest `digest`
    suffix     of the videos' file names
    """

    output: str
    token: bytes
    digest: str
    model: str | None
    suffix: str


class Maker:
    """A loaded model and the place for its videos."""

    def __init__(self, order: Order) -> None:
        """Raises what `higen.load` raises. Raises OutputError for another output than the run's, IntegrityError for
        another model.
        """
        self._order = order
        self._place = open_place(order.output)
        if self._place.read(RUN) != order.token:
            raise OutputError(
                f"output={quoted(order.output)}: names a different place for this worker than for the run that "
                "started it; "
                "workers of other machines need a shared folder or a URL"
            )
        self._journal = Journal(self._place)
        self._stopped = threading.Event()
        self._pipeline = load(
            order.model, order.backend, device=order.device, precision=order.precision, threads=order.threads
        )
        self._shared: SharedBackend | None = None
        try:
            if model_digest(self._pipeline.bundle) != order.digest:
                raise IntegrityError(f"{self._pipeline.bundle.path}: is not the model that the run started with")
            if order.slots > 1:
                manifest = self._pipeline.manifest
                rows = {s.name: most_rows(manifest, s, order.slots) for s in manifest.all_stages if s.batch}
                self._shared = SharedBackend(self._pipeline.backend, manifest, Batcher(order.slots, rows))
        except BaseException:
            self._pipeline.close()
            raise

    def make(self, rows: Iterable[tuple[str, str]]) -> Iterator[Record]:
        """Make rows, given as (key, request as JSON). Yields each row's record when it is done.

        With several slots, a row that was begun earlier and not ended is made last, alone. If it kills the process
        again, no other row is blamed. Raises OutputError if the output is full or read-only, OSError if it cannot be
        written.
        """
        if self._shared is None:
            yield from (self._record(*row) for row in rows)
            return
        suspects = self._journal.begun()
        alone = []
        with ThreadPoolExecutor(self._order.slots, "higen row") as pool:
            working: set[Future[Record]] = set()
            try:
                for row in rows:
                    if row[0] in suspects:
                        alone.append(row)
                        continue
                    working.add(pool.submit(self._record, *row))
                    if len(working) >= self._order.slots:
                        done, working = wait(working, return_when=FIRST_COMPLETED)
                        yield from (future.result() for future in done)
                while working:
                    done, working = wait(working, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            except BaseException:
                self._stop()
                raise
        yield from (self._record(*row) for row in alone)

    def close(self) -> None:
        """Free the model."""
        self._stop()
        self._pipeline.close()

    def _stop(self) -> None:
        self._stopped.set()
        if self._shared is not None:
            self._shared.close()

    def _record(self, key: str, text: str) -> Record:
        if (found := self._journal.get(key)) is not None:  # its worker was killed before it reported the row
            return found
        before = self._journal.begin(key)
        try:
            record = self._tried(key, text, before)
        except BaseException:
            self._journal.leave(key)
            raise
        self._journal.end(record)
        return record

    def _tried(self, key: str, text: str, before: int) -> Record:
        error: BaseException = BackendError(f"the process ended {before} times while it made this row")
        began = time.monotonic()
        attempts = before
        while attempts <= self._order.retries:
            attempts += 1
            began = time.monotonic()
            try:
                return self._attempt(key, text, attempts, began)
            except Exception as failure:  # no error may keep the other rows from being made
                if self._stopped.is_set():
                    raise Cancelled("the run was stopped") from failure
                if _is_full(failure):
                    raise OutputError(f"output={quoted(self._order.output)}: cannot be written: {failure}") from failure
                error = failure
                if isinstance(failure, RequestError):  # it would fail again
                    break
        said = f"{type(error).__name__}: {error}"
        return Record(key, text, seconds=_since(began), attempts=attempts, error=said)

    def _attempt(self, key: str, text: str, attempts: int, began: float) -> Record:
        options: dict[str, Any] = json.loads(text)
        warned: list[str] = []
        with nullcontext() if self._shared is None else self._shared.request() as mine:
            pipeline = self._pipeline if mine is None else self._pipeline.on(mine)
            request = pipeline.request(**options, warn=lambda warning: warned.append(str(warning)))
            if key_of(request, self._order.digest, self._order.suffix) != key:
                raise RequestError("a picture or clip of this row has changed since the rows were checked")
            video = pipeline.make(request, progress=False)[0]
        path = video_path(key, self._order.suffix)
        size = self._place.put(path, video.save)
        metadata = {**video.metadata, **_shape(video), **({"warnings": warned} if warned else {})}
        return Record(key, text, path, video.metadata["seed"], metadata, _since(began), size, attempts)


def _shape(video: Video) -> dict[str, Any]:
    return {"frames": len(video), "width": video.width, "height": video.height, "fps": video.fps}


def _since(began: float) -> float:
    return round(time.monotonic() - began, 4)


def _is_full(error: BaseException | None) -> bool:
    """Whether an error was caused by a full or read-only disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        error = error.__cause__ or error.__context__
    return False
