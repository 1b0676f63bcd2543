"""Many concurrent requests on one backend: each has the same result as when it runs alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_model import write_made_up_model
from row_backend import RowBackend

from higen.api import default_model
from higen.backends.base import Backend
from higen.backends.batching import Batcher
from higen.backends.onnx import OnnxBackend
from higen.backends.options import Options
from higen.backends.shared_batches import SharedBackend
from higen.bundle import Bundle
from higen.errors import BackendError, Cancelled, HigenError, RetryLater
from higen.manifest import Manifest
from higen.pipeline import Pipeline
from higen.sampler import Step

REQUESTS: list[dict[str, Any]] = [
    {"prompt": "a blue whale", "seed": 1, "steps": (2, 3)},
    {"prompt": "a red heart", "seed": 2, "steps": (5, 1), "guidance": (7.0, 2.0)},
    {"prompt": "a green star", "seed": 3, "steps": (1, 6), "solver": "dpm++2m"},
    {"prompt": "a whale swimming", "seed": 4, "steps": (3, 3), "frames": 5, "motion": 90.0},
    {"prompt": "a heart beating", "seed": 5, "steps": (4, 2), "frames": 1},
    {"prompt": "a star", "seed": 6, "steps": (2, 2), "width": 32, "height": 32},
    {"prompt": "a blue star", "seed": 7, "steps": (6, 6), "negative_prompt": "a heart", "offset_noise": 0.3},
    {"prompt": "a red whale", "seed": 8, "steps": (3, 2)},
]


def rows(pipeline: Pipeline, most: int = 4) -> dict[str, int]:
    """A row limit for every stage."""
    return dict.fromkeys((stage.name for stage in pipeline.manifest.all_stages), most)


@contextmanager
def shared(pipeline: Pipeline, slots: int = 16, line: int = 16, patience: float = 0.05) -> Iterator[SharedBackend]:
    made = SharedBackend(pipeline.backend, pipeline.manifest, Batcher(slots, rows(pipeline), line), patience)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def pipeline(tiny_model: Path) -> Pipeline:
    bundle = Bundle.open(tiny_model)
    return Pipeline(bundle, RowBackend(bundle.manifest))


def generate(pipeline: Pipeline, arguments: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """A request's last latents and its frames."""
    stream = pipeline.stream(**arguments)
    steps = [event for event in stream if isinstance(event, Step)]
    latents = np.concatenate([pipeline.backend.to_numpy(step.latents).reshape(-1) for step in steps])
    return latents, stream.videos[0].frames


def together(
    pipeline: Pipeline, backend: SharedBackend, requests: list[dict[str, Any]]
) -> list[tuple[np.ndarray, np.ndarray] | HigenError]:
    """Run all requests at the same time, each in its own thread. An error takes the place of a result."""

    def one(arguments: dict[str, Any]) -> tuple[np.ndarray, np.ndarray] | HigenError:
        try:
            with backend.request() as mine:
                return generate(pipeline.on(mine), arguments)
        except HigenError as error:
            return error

    with ThreadPoolExecutor(len(requests)) as threads:
        return list(threads.map(one, requests))


def denoising(pipeline: Pipeline) -> list[int]:
    """The rows of every denoising batch that the backend has run."""
    return [shapes["t"][0] for stage, shapes in pipeline.backend.calls if "t" in shapes]


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_each_request_gets_the_same_as_alone(pipeline: Pipeline, slots: int) -> None:
    alone = [generate(pipeline, arguments) for arguments in REQUESTS]
    calls = len(denoising(pipeline))
    pipeline.backend.calls.clear()
    with shared(pipeline, slots) as backend:
        found = together(pipeline, backend, REQUESTS)
        assert backend.load == (0, 0)
    for (latents, frames), (latents_alone, frames_alone) in zip(found, alone, strict=True):
        np.testing.assert_array_equal(latents, latents_alone)
        np.testing.assert_array_equal(frames, frames_alone)
    batches = denoising(pipeline)
    assert max(batches) <= 4
    assert sum(batches) == calls
    assert len(batches) < calls or slots == 1


def test_the_built_in_model_at_different_steps_gives_the_single_results() -> None:
    bundle = Bundle.open(default_model())
    pipeline = Pipeline(bundle, OnnxBackend(bundle, Options("cpu", threads=1)))
    prompts = bundle.manifest.prompts
    requests = [
        {"prompt": prompts[i % len(prompts)], "seed": i, "steps": (2 + i, 4 - i), "frames": 4} for i in range(4)
    ]
    alone = [generate(pipeline, arguments) for arguments in requests]
    with shared(pipeline) as backend:
        found = together(pipeline, backend, requests)
        assert backend.rows > backend.batches
    for (latents, frames), (latents_alone, frames_alone) in zip(found, alone, strict=True):
        assert np.abs(latents - latents_alone).max() < 1e-4
        assert np.abs(frames.astype(int) - frames_alone).max() <= 1


def test_the_failure_of_one_is_its_own(pipeline: Pipeline) -> None:
    requests = [*REQUESTS, {"prompt": "a whale", "guidance": (1.0, RowBackend.POISON), "steps": (2, 3)}]
    alone = [generate(pipeline, arguments) for arguments in REQUESTS]
    with shared(pipeline) as backend:
        *good, bad = together(pipeline, backend, requests)
        assert backend.load == (0, 0)
    assert isinstance(bad, BackendError)
    assert str(bad) == "temporal_unet: poisoned"
    for found, expected in zip(good, alone, strict=True):
        np.testing.assert_array_equal(found[0], expected[0])


def test_wrong_tensors_are_refused_before_they_reach_a_batch(pipeline: Pipeline) -> None:
    with shared(pipeline) as backend, backend.request() as mine:
        with pytest.raises(BackendError, match="missing or unknown inputs"):
            mine.run("text_encoder", words=np.zeros((1, 12), np.int64))
        assert mine.run("text_encoder", tokens=np.zeros((1, 12), np.int64))["hidden"].shape == (1, 12, 32)
        assert mine.name == "recording"


class Gate(RowBackend):
    """Holds every batch until the gate is opened."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest)
        self.reached = threading.Event()
        self.opened = threading.Event()

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        self.reached.set()
        assert self.opened.wait(30)
        return super().run(stage, **tensors)


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Start `work` in a thread. The list receives its result or error."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except HigenError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def wait_for(condition: Callable[[], bool]) -> None:
    """Return when the condition holds; fails after 30 seconds."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def tokens() -> dict[str, np.ndarray]:
    return {"tokens": np.zeros((1, 12), np.int64)}


def test_cancelling_frees_the_slot_at_once(pipeline: Pipeline) -> None:
    gate = Gate(pipeline.manifest)
    with shared(pipeline.on(gate), slots=1) as backend:
        first, second = backend.request(), backend.request()
        first.enter()
        second.enter()
        running, of_first = in_thread(lambda: first.run("text_encoder", **tokens()))
        assert gate.reached.wait(30)
        waiting, of_second = in_thread(lambda: second.run("text_encoder", **tokens()))
        assert backend.load == (1, 1)
        first.cancel()  # while its batch is running
        running.join(30)
        assert isinstance(of_first[0], Cancelled)
        assert backend.load == (1, 0)
        gate.opened.set()
        waiting.join(30)
        assert of_second[0]["hidden"].shape == (1, 12, 32)
        with pytest.raises(Cancelled):
            first.run("text_encoder", **tokens())
        second.close()
        assert backend.load == (0, 0)


def test_a_waiting_request_can_be_cancelled(pipeline: Pipeline) -> None:
    with shared(pipeline, slots=1) as backend, backend.request():
        second = backend.request()
        second.enter()
        waiting, results = in_thread(lambda: second.run("text_encoder", **tokens()))
        second.cancel()
        waiting.join(30)
        assert isinstance(results[0], Cancelled)
        assert backend.load == (1, 0)


def test_a_full_queue_says_to_try_again(pipeline: Pipeline) -> None:
    with shared(pipeline, slots=1, line=0) as backend:
        with backend.request(), pytest.raises(RetryLater, match="try again later"):
            backend.request().enter()
        with backend.request():
            pass


def test_closing_fails_the_waiting_requests(pipeline: Pipeline) -> None:
    gate = Gate(pipeline.manifest)
    backend = SharedBackend(gate, pipeline.manifest, Batcher(2, rows(pipeline), 1))
    requests = [backend.request() for _ in range(3)]  # in a running batch, behind it, in the queue
    threads = []
    for i, request in enumerate(requests):
        request.enter()
        threads.append(in_thread(lambda request=request: request.run("text_encoder", **tokens())))
        assert gate.reached.wait(30)
        wait_for(lambda i=i: len(backend._results) == min(i + 1, 2))
    closing, _ = in_thread(backend.close)
    for thread, results in threads:
        thread.join(30)
        assert isinstance(results[0], RetryLater)
    gate.opened.set()
    closing.join(30)
    with pytest.raises(RetryLater, match="stopping"):
        backend.request().enter()


def test_as_many_batches_run_at_once_as_there_are_workers(pipeline: Pipeline) -> None:
    class Meeting(RowBackend):
        """Every batch waits until another batch runs at the same time."""

        both = threading.Barrier(2)

        def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
            self.both.wait(30)
            return super().run(stage, **tensors)

    lonely = SharedBackend(Meeting(pipeline.manifest), pipeline.manifest, Batcher(2, rows(pipeline), 0), workers=2)
    with lonely.request() as first, lonely.request() as second:
        one, found = in_thread(lambda: first.run("text_encoder", **tokens()))
        longer = {"latents": np.zeros((1, 4, 8, 8), np.float32)}
        assert second.run("vae_decoder", **longer)["pixels"].shape[0] == 1
        one.join(30)
        assert found[0]["hidden"].shape[0] == 1
    lonely.close()
    alone = [generate(pipeline, arguments) for arguments in REQUESTS]
    several = SharedBackend(pipeline.backend, pipeline.manifest, Batcher(16, rows(pipeline), 16), workers=3)
    for (latents, _), (expected, _) in zip(together(pipeline, several, REQUESTS), alone, strict=True):
        np.testing.assert_array_equal(latents, expected)
    several.close()


def test_requests_keep_step_with_each_other(pipeline: Pipeline) -> None:
    """With a long enough wait, equal requests that start together run all their steps together."""
    with shared(pipeline, patience=5.0) as backend:
        start = threading.Barrier(4)

        def one(seed: int) -> None:
            with backend.request() as mine:
                start.wait()
                generate(pipeline.on(mine), {"prompt": "a star", "seed": seed, "steps": (4, 4)})

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(one, range(4)))
    assert denoising(pipeline) == [4] * 8


def test_a_stage_that_holds_one_sample_is_never_joined(tmp_path: Path) -> None:
    """The first axis does not count samples, so the row limit does not apply and each batch has one call."""
    bundle = write_made_up_model(tmp_path / "model")
    pipeline = Pipeline(bundle, RowBackend(bundle.manifest))
    limits = dict.fromkeys((s.name for s in bundle.manifest.stages if s.batch), 1)
    backend = SharedBackend(pipeline.backend, bundle.manifest, Batcher(4, limits), patience=5.0)
    start = threading.Barrier(3)

    def one(length: int) -> tuple[int, ...]:
        latents = np.zeros((length, 3, 2, 4, 4), np.float32)
        with backend.request() as mine:
            start.wait()
            return np.asarray(mine.run("unpack", latents=latents)["pixels"]).shape

    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(one, (2, 2, 3)))
    assert found == [(n, 3, 2, 8, 8) for n in (2, 2, 3)]
    assert sorted(shapes["latents"][0] for _, shapes in pipeline.backend.calls) == [2, 2, 3]
    assert (backend.batches, backend.rows) == (3, 3)
    backend.close()


def test_a_video_decoder_gives_each_request_its_own_frames(tmp_path: Path) -> None:
    """The frames of a model whose decoder uses neighbouring frames, from concurrent requests and from single ones."""
    bundle = write_made_up_model(tmp_path / "model")
    pipeline = Pipeline(bundle, OnnxBackend(bundle, Options("cpu", threads=1)))
    requests = [{"prompt": "a red kite", "seed": i, "steps": 2, "wobble": i / 4} for i in range(4)]
    alone = [generate(pipeline, arguments) for arguments in requests]
    with shared(pipeline) as backend:
        found = together(pipeline, backend, requests)
    for (latents, frames), (latents_alone, frames_alone) in zip(found, alone, strict=True):
        assert np.abs(latents - latents_alone).max() < 1e-4
        assert np.abs(frames.astype(int) - frames_alone).max() <= 1


def test_requests_that_reuse_features_share_batches(tmp_path: Path) -> None:
    """Two such requests and one without reuse. Results do not change; full and shallow steps share batches."""
    bundle = write_made_up_model(tmp_path / "model", reuse=True)
    pipeline = Pipeline(bundle, OnnxBackend(bundle, Options("cpu", threads=1)))
    requests = [
        {"prompt": "a kite", "seed": i, "steps": (1, 4), "reuse": [1, every]} for i, every in enumerate((2, 2, 1))
    ]
    alone = [generate(pipeline, arguments) for arguments in requests]
    with shared(pipeline) as backend:
        found = together(pipeline, backend, requests)
        calls, rows = backend.batches, backend.rows
    for (latents, frames), (latents_alone, frames_alone) in zip(found, alone, strict=True):
        assert np.abs(latents - latents_alone).max() < 1e-4
        assert np.abs(frames.astype(int) - frames_alone).max() <= 1
    assert calls < rows


def test_a_request_s_backend_is_a_backend(pipeline: Pipeline) -> None:
    with shared(pipeline) as backend, backend.request() as mine:
        assert isinstance(mine, Backend)
        assert mine.choose("temporal_unet_plain", "temporal_unet") == "temporal_unet_plain"
        assert mine.describe("temporal_unet") == pipeline.backend.describe("temporal_unet")
        mine.run("text_encoder", **tokens())
        assert list(mine.choices) == ["text_encoder"]
