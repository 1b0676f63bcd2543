"""Pickling to another process: a pipeline becomes its path and options, a clip stays as it is, a stream is refused."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import higen
from higen.backends.base import RecordingBackend
from higen.backends.batching import Batcher
from higen.backends.onnx import OnnxBackend
from higen.backends.options import Options
from higen.backends.select import StageRouter, select_backend
from higen.backends.shared_batches import SharedBackend
from higen.backends.tensorrt import TensorrtBackend
from higen.backends.torch import TorchBackend
from higen.bundle import Bundle
from higen.errors import BackendError, NotPicklable
from higen.pipeline import Pipeline
from higen.video import Video

SMALL: Mapping[str, Any] = {"steps": 1, "frames": 2, "width": 32, "height": 32, "progress": False}


def there(pipe: Pipeline, results: Any) -> None:
    results.put((pipe.bundle.path, pipe("a red heart", **SMALL)))


def test_a_pipeline_works_in_a_spawned_process() -> None:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with higen.load(threads=1) as pipe:
        worker = context.Process(target=there, args=(pipe, results))
        worker.start()
        path, video = results.get()
        worker.join(60)
        assert worker.exitcode == 0
        assert path == pipe.bundle.path
        mine = pipe("a red heart", **SMALL)
    np.testing.assert_array_equal(video.frames, mine.frames)
    assert (video.fps, video.metadata["seed"]) == (mine.fps, 0)


@pytest.mark.parametrize("backend", ["auto", "onnx", "torch"])
def test_path_and_options_arrive(
    backend: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, Options]] = []
    monkeypatch.chdir(tiny_model.parent)
    pipe = higen.load(tiny_model.name, backend, device="cpu", precision="fp32", threads=1, verify=False, prepare=False)
    sent = pickle.dumps(pipe)
    monkeypatch.chdir(tmp_path)
    real = select_backend
    monkeypatch.setattr(
        "higen.backends.select.select_backend",
        lambda bundle, name, options: (asked.append((name, options)), real(bundle, name, options))[1],
    )
    found = pickle.loads(sent)
    assert asked == [(backend, Options("cpu", "fp32", 1, False, False))]
    assert found.bundle.path == tiny_model.absolute()
    assert found.backend is not pipe.backend
    assert found.backend.bundle is found.bundle
    assert len(sent) < 2000  # no weights, no tables


def test_another_process_uses_its_own_built_in_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = pickle.dumps(higen.load(prepare=False))
    elsewhere = Path(higen.api.default_model())
    monkeypatch.setattr("higen.bundle.default_model", lambda: elsewhere / "." / ".." / elsewhere.name)
    assert str(elsewhere.parent) not in sent.decode("latin-1")
    assert pickle.loads(sent).bundle.path.samefile(elsewhere)


@pytest.mark.parametrize("kind", [OnnxBackend, TorchBackend, TensorrtBackend])
def test_every_backend_is_made_again_from_its_arguments(kind: Any, tiny_model: Path) -> None:
    backend = kind(Bundle.open(tiny_model), Options(threads=1))
    found = pickle.loads(pickle.dumps(backend))
    assert type(found) is kind
    assert (found.bundle.path, found.options) == (backend.bundle.path, backend.options)


def test_a_closed_pipeline_is_refused(tiny_model: Path) -> None:
    pipe = higen.load(tiny_model, "torch", prepare=False)
    pipe.close()
    with pytest.raises(BackendError, match="the pipeline was closed: load the model again"):
        pickle.dumps(pipe)


class Local(RecordingBackend):
    """A third-party backend with an attribute that cannot leave its process."""

    def __init__(self, manifest: Any) -> None:
        super().__init__(manifest)
        self.call = lambda: None


def test_what_cannot_be_sent_says_what_to_do_there(tiny_model: Path) -> None:
    bundle = Bundle.open(tiny_model)
    pipe = Pipeline(bundle, Local(bundle.manifest))
    shared = SharedBackend(RecordingBackend(bundle.manifest), bundle.manifest, Batcher(1, {}))
    made_by_hand = StageRouter(bundle, {"recording": lambda: RecordingBackend(bundle.manifest)}, {})
    for thing in (pipe, pipe.stream("a whale"), Pipeline(bundle, made_by_hand), pipe.on(shared.request())):
        with pytest.raises(NotPicklable, match=r"higen\.load"):
            pickle.dumps(thing)
    shared.close()
    assert issubclass(NotPicklable, (higen.HigenError, pickle.PicklingError))


def test_a_copy_shares_the_backend_and_a_deep_one_loads_again(tiny_model: Path) -> None:
    pipe = higen.load(tiny_model, "torch", prepare=False)
    assert copy.copy(pipe).backend is pipe.backend
    assert copy.deepcopy(pipe).backend is not pipe.backend


@pytest.mark.parametrize("again", [lambda video: pickle.loads(pickle.dumps(video)), copy.deepcopy, copy.copy])
def test_a_clip_is_the_same_in_the_other_process(again: Any) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), np.uint8)
    video = Video(frames, 7.5, {"prompt": "a whale", "seed": 3})
    found = again(video)
    np.testing.assert_array_equal(found.frames, video.frames)
    assert (found.fps, found.metadata) == (video.fps, video.metadata)
    assert not found.frames.flags.writeable


def test_a_request_is_the_same_in_the_other_process(tiny_model: Path) -> None:
    request = higen.load(tiny_model, "torch", prepare=False).request("a whale", seed=3, motion=[1.0, 2.0, 3.0])
    found = pickle.loads(pickle.dumps(request))
    assert (found.prompts, found.seeds, found.steps) == (request.prompts, request.seeds, request.steps)
    assert found.controls["motion"].tolist() == [1.0, 2.0, 3.0]
