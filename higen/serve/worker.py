"""Runs the jobs of the queue, each in its own thread. The steps of one model's jobs share batches.

A new job joins the others at their next step (higen/backends/shared_batches.py). A cancelled job frees its slot at
once. If a job's model does not fit into memory with the models in use, the job waits. Newer jobs may overtake it for
some seconds. After that none may, so that its model can be loaded.
"""

from __future__ import annotations

import base64
import io
import logging
import threading
import time
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen.backends.shared_batches import RequestBackend
from higen.errors import Cancelled, HigenError
from higen.events import Frames, Stream
from higen.sampler import Step
from higen.serve.asks import opened
from higen.serve.catalog import Catalog, Running
from higen.serve.live import Live
from higen.serve.metrics import Metrics
from higen.serve.refusals import job_error
from higen.serve.results import Results
from higen.serve.settings import Settings
from higen.serve.store import Job, Store
from higen.video import strip

__all__ = ["Worker"]

LOG = logging.getLogger("higen.serve")

OVERTAKEN = 10.0
"""Seconds for which other jobs may overtake a job while its model does not fit."""

SWEEP = 30.0
"""Seconds between two checks for old results."""

_WINDOW = 256


class _Run:
    """A running job."""

    def __init__(self, mine: RequestBackend | None = None) -> None:
        self.mine = mine
        self.cancelled = threading.Event()
        self.thread: threading.Thread | None = None

    def cancel(self) -> None:
        self.cancelled.set()
        if (mine := self.mine) is not None:
            mine.cancel()


class Worker:
    """The threads that run jobs, and one thread that starts them and removes old results."""

    def __init__(
        self, settings: Settings, store: Store, results: Results, catalog: Catalog, live: Live, metrics: Metrics
    ) -> None:
        self._settings = settings
        self._store = store
        self._results = results
        self._catalog = catalog
        self._live = live
        self._metrics = metrics
        self._runs: dict[str, _Run] = {}
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._stopping = threading.Event()
        self._blocked: tuple[str, float] | None = None
        self._thread = threading.Thread(target=self._work, name="higen jobs", daemon=True)

    def start(self) -> None:
        """Start to run waiting jobs."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether waiting jobs are being started."""
        return self._thread.is_alive() and not self._stopping.is_set()

    @property
    def running(self) -> int:
        """Number of running jobs."""
        return len(self._runs)

    def wake(self) -> None:
        """Tell the worker about a new job or a free slot."""
        self._changed.set()

    def cancel(self, name: str) -> None:
        """Stop a job, at the latest at its next step. Its row must already be cancelled or deleted."""
        with self._lock:
            run = self._runs.get(name)
        if run is not None:
            run.cancel()
        self._live.end(name)

    def stop(self) -> None:
        """Stop all jobs. Running jobs go back to the queue for the next start."""
        self._stopping.set()
        self.wake()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            runs = list(self._runs.values())
        for run in runs:
            run.cancel()
        for run in runs:
            if run.thread is not None:
                run.thread.join(60)

    def _work(self) -> None:
        swept = 0.0
        while not self._stopping.is_set():
            self._changed.wait(1.0)
            self._changed.clear()
            try:
                while not self._stopping.is_set() and len(self._runs) < self._settings.slots:
                    if (job := self._next()) is None:
                        break
                    self._launch(job)
                if time.monotonic() - swept > SWEEP:
                    swept = time.monotonic()
                    self.tidy()
            except Exception:  # for example a full disk: the jobs keep waiting
                LOG.exception("the queue cannot be processed; trying again")
                self._stopping.wait(1.0)

    def _next(self) -> Job | None:
        """Take the next job with a model that fits into memory; None if there is none."""
        waiting = self._store.queued(_WINDOW)
        if self._blocked and self._blocked[0] not in {job.id for job in waiting}:
            self._blocked = None
        for job in waiting:
            if job.model not in self._catalog.models:
                if self._store.start(job.id):
                    self._failed(job, "model_not_found", f"the model {job.model} is not served any more")
                continue
            if self._catalog.admit(job.model):
                try:
                    if self._store.start(job.id):
                        return job
                except BaseException:
                    self._catalog.leave(job.model)
                    raise
                self._catalog.leave(job.model)
            elif self._blocked is None:
                self._blocked = job.id, time.monotonic()
            elif self._blocked[0] == job.id and time.monotonic() - self._blocked[1] > OVERTAKEN:
                return None
        return None

    def _launch(self, job: Job) -> None:
        run = _Run()
        run.thread = threading.Thread(target=self._run, args=(job, run), name=f"higen {job.id}", daemon=True)
        with self._lock:
            self._runs[job.id] = run
        run.thread.start()

    def _run(self, job: Job, run: _Run) -> None:
        began = time.monotonic()
        try:
            with self._catalog.use(job.model) as running:
                self._live.publish(job.id, "status", {"id": job.id, "status": "in_progress"}, 0)
                self._make(job, run, running)
        except Exception as error:
            self._not_done(job, run, error)
        finally:
            with self._lock:
                del self._runs[job.id]
            self._metrics.seconds.observe(time.monotonic() - began)
            self._live.end(job.id)
            self.wake()

    def _not_done(self, job: Job, run: _Run, error: Exception) -> None:
        if run.cancelled.is_set():
            if self._stopping.is_set():
                self._store.requeue(job.id)
            else:
                self._metrics.ended.labels("cancelled").inc()
            return
        if not isinstance(error, HigenError):
            LOG.error("job %s failed", job.id, exc_info=error)
        try:
            self._failed(job, *job_error(error))
        except Exception:  # the disk is full: the job waits for the next start
            LOG.exception("job %s: its failure cannot be recorded", job.id)

    def _failed(self, job: Job, code: str, message: str) -> None:
        if self._store.fail(job.id, code, message, self._settings.age):
            self._metrics.ended.labels("failed").inc()
        self._live.end(job.id)

    def _make(self, job: Job, run: _Run, running: Running) -> None:
        """Make a job's video, save it and complete the job. Raises any error."""
        uploads = self._store.uploads(job.id)
        manifest = running.pipeline.manifest
        warned: list[str] = []
        with running.shared.request() as mine:
            run.mine = mine
            found = self._store.get(job.id)
            if run.cancelled.is_set() or found is None or found.status != "in_progress":
                raise Cancelled("the job was cancelled")
            with opened(manifest, uploads, self._settings.limits, self._results) as files:
                arguments = dict(job.request)
                controls = {**arguments.pop("controls"), **files}
                stream = running.pipeline.on(mine).stream(
                    **arguments, **controls, warn=lambda warning: warned.append(str(warning))
                )
            with closing(stream):
                self._follow(job, run, stream)
            video = stream.videos[0]
        metadata = {**video.metadata, "frames": len(video), "fps": video.fps, "warnings": warned}
        size = self._results.save(job.id, video)
        if self._store.complete(job.id, metadata, size, self._settings.age):
            self._metrics.ended.labels("completed").inc()
            self._metrics.frames.inc(len(video))
            self.tidy(job.id)
        else:  # the job was cancelled or deleted meanwhile
            self._results.remove(job.id)

    def _follow(self, job: Job, run: _Run, stream: Stream) -> None:
        total = max(1, sum(length for _, length in stream.loops))
        done = 0
        for event in stream:
            if run.cancelled.is_set():
                raise Cancelled("the job was cancelled")
            if isinstance(event, Frames):
                place = {"loop": "decode", "step": event.done, "total": event.total}
                done += len(event.frames)
            else:
                place = {"loop": event.loop, "step": event.index + 1, "total": event.total}
                done += 1
            percent = min(99, 100 * done // total)
            self._live.publish(job.id, "progress", {"id": job.id, "progress": percent, **place}, percent)
            if isinstance(event, Step) and self._live.is_watched(job.id):
                preview = _preview(stream.preview()[0])
                self._live.publish(job.id, "preview", {"id": job.id, "progress": percent, **place, **preview})

    def tidy(self, kept: str | None = None) -> None:
        """Remove outdated results, then the oldest ones until the rest fits into the quota. `kept`: a job to keep."""
        for job in self._store.outdated(self._settings.age):
            self._expire(job)
        while self._store.used() > self._settings.quota:
            oldest = [job for job in self._store.finished(2) if job.id != kept]
            if not oldest:
                break
            self._expire(oldest[0])

    def _expire(self, job: Job) -> None:
        self._store.expire(job.id)
        self._results.remove(job.id)


def _preview(frames: NDArray[np.uint8]) -> Mapping[str, Any]:
    """Frames [f,H,W,3] as one PNG: at most 8 evenly spaced frames side by side, each at most 256 pixels per side."""
    picture, count = strip(frames)
    file = io.BytesIO()
    picture.save(file, "PNG")
    image = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    return {"frames": count, "width": picture.width // count, "height": picture.height, "image": image}
