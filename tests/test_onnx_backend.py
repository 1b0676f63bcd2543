"""The ONNX backend against the torch backend, over the built-in model's graphs."""

from __future__ import annotations

import gc
import re
import shutil
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from older_graph import as_version_1

import higen
from higen.api import default_model
from higen.backends.onnx import OnnxBackend
from higen.backends.options import Options
from higen.backends.select import select_backend
from higen.backends.torch import TorchBackend
from higen.bundle import Bundle, file_record, graph_file, rewrite
from higen.errors import BackendError, BackendUnavailable, FallbackWarning, HigenError, IntegrityError, RequestError
from higen.families.higen import spec
from higen.manifest_file import Opened
from higen.pipeline import Pipeline
from higen.sampler import Step


def prompts() -> tuple[str, ...]:
    """Three prompts that the built-in model knows."""
    return Bundle.open(default_model()).manifest.prompts[:3]


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    """The built-in model."""
    return Bundle.open(default_model())


@pytest.fixture(scope="module")
def onnx(bundle: Bundle) -> Pipeline:
    """The built-in model's pipeline on ONNX Runtime."""
    return Pipeline(bundle, OnnxBackend(bundle))


@pytest.fixture(scope="module")
def torch(bundle: Bundle) -> Pipeline:
    """The built-in model's pipeline on PyTorch."""
    return Pipeline(bundle, TorchBackend(bundle, Options("cpu")))


def latents_and_frames(pipe: Pipeline, prompt: object, **options: object) -> tuple[np.ndarray, np.ndarray]:
    """Latents after the last step, and decoded frames."""
    stream = pipe.stream(prompt, **options)  # type: ignore[arg-type]
    last = [event for event in stream if isinstance(event, Step)][-1]
    return pipe.backend.to_numpy(last.latents), np.stack([video.frames for video in stream.videos])


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 10, "solver": "ddim", "frames": 16},
        {"steps": 50, "solver": "ddim", "frames": 8},
        {"steps": 10, "frames": 8},
        # With cues far from the training data, guidance 12 would magnify a rounding error of this model to 2e-3.
        {"steps": 10, "frames": 8, "motion": 150.0, "appearance": 0.7, "guidance": 4.0},
        {"steps": 10, "frames": 32},
    ],
    ids=["10 steps", "50 steps", "8 frames", "cues", "32 frames"],
)
def test_same_video_as_torch(onnx: Pipeline, torch: Pipeline, options: dict[str, object]) -> None:
    options = {"guidance": 12.0, **options}
    ours, frames = latents_and_frames(onnx, prompts()[0], seed=3, **options)
    theirs, expected = latents_and_frames(torch, prompts()[0], seed=3, **options)
    assert np.abs(ours - theirs).max() < 1e-3
    assert np.abs(frames.astype(int) - expected).max() <= 1


def test_three_prompts_in_a_batch(onnx: Pipeline, torch: Pipeline) -> None:
    options = {"seed": [1, 2, 3], "steps": 10, "guidance": 12.0, "frames": 8}
    ours, frames = latents_and_frames(onnx, list(prompts()), **options)
    theirs, expected = latents_and_frames(torch, list(prompts()), **options)
    assert np.abs(ours - theirs).max() < 1e-3
    assert np.abs(frames.astype(int) - expected).max() <= 1


def test_a_batch_is_its_prompts_one_by_one(onnx: Pipeline) -> None:
    """The bytes are equal, although ONNX Runtime gets the whole batch and an odd number of frames to decode."""
    ours, frames = latents_and_frames(onnx, list(prompts()), seed=[1, 2, 3], steps=3, frames=5, guidance=12.0)
    for i, prompt in enumerate(prompts()):
        alone, its_frames = latents_and_frames(onnx, prompt, seed=i + 1, steps=3, frames=5, guidance=12.0)
        np.testing.assert_array_equal(alone[0], ours[i])
        np.testing.assert_array_equal(its_frames[0], frames[i])


def test_two_requests_at_different_steps_share_a_batch(bundle: Bundle, onnx: Pipeline) -> None:
    stage, random = bundle.manifest.stage("temporal_unet"), np.random.default_rng(0)
    sizes = {**bundle.manifest.fixed, "B": 2, "F": 5, "H": 8, "W": 8}
    inputs = {
        t.name: random.standard_normal([sizes[n] if isinstance(n, str) else n for n in t.shape]).astype(np.float32)
        for t in stage.inputs
    }
    inputs |= {"t": random.integers(0, 999, 2).astype(np.float32)}
    inputs |= {"alpha": np.float32([0.3, 0.9]), "sigma": np.sqrt(1 - np.float32([0.3, 0.9]) ** 2)}
    together = onnx.backend.run("temporal_unet", **inputs)
    for i in range(2):
        apart = onnx.backend.run("temporal_unet", **{name: value[i : i + 1] for name, value in inputs.items()})
        for name, value in apart.items():
            whole = onnx.backend.to_numpy(together[name])[i : i + 1]
            np.testing.assert_allclose(onnx.backend.to_numpy(value), whole, atol=1e-5 * np.abs(whole).max())


def test_an_image_comes_to_life_as_in_torch(onnx: Pipeline, torch: Pipeline) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    ours, _ = latents_and_frames(onnx, prompts()[1], image=picture, steps=3)
    theirs, _ = latents_and_frames(torch, prompts()[1], image=picture, steps=3)
    assert np.abs(ours - theirs).max() < 1e-3


def test_generates_without_torch(tmp_path: Path) -> None:
    code = """
import sys
for name in ("torch", "diffusers", "transformers", "safetensors", "onnx"):
    sys.modules[name] = None  # an import of it fails
import higen, higen.api
video = higen.generate(higen.Bundle.open(higen.api.default_model()).manifest.prompts[0], steps=2)
assert video.frames.std() > 1
video.save(sys.argv[1])
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "heart.mp4")], check=True)
    assert (tmp_path / "heart.mp4").stat().st_size > 1000


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the built-in model that a test may break."""
    return Path(shutil.copytree(default_model(), tmp_path / "model"))


def fitted(model: Path) -> None:
    """Write the present files' sizes and hashes into the manifest."""

    def changed(opened: Opened) -> Opened:
        there = {name: file_record(model / name) for name in opened.files if (model / name).exists()}
        graphs = {name: inputs for name, inputs in opened.graphs.items() if name in there}
        return replace(opened, files=there, graphs=graphs)

    rewrite(model, changed)


def test_auto_prefers_graphs(copy: Path) -> None:
    with higen.load(copy) as pipe:
        assert pipe.backend.name == "onnx"
        assert "temporal_unet_plain onnx (cpu, fp32)" in " ".join(pipe.report().split())


def test_a_broken_graph_falls_back_with_one_warning(copy: Path) -> None:
    graph = copy / graph_file("temporal_unet_plain")
    graph.write_bytes(b"\0" * graph.stat().st_size)
    with pytest.warns(FallbackWarning, match="temporal_unet_plain runs on torch") as caught, higen.load(copy) as pipe:
        video = pipe(prompts()[0], steps=3, progress=False)
    assert len(caught) == 1
    with higen.load(copy, "torch") as pipe:
        expected = pipe(prompts()[0], steps=3, progress=False)
    assert np.abs(video.frames.astype(int) - expected.frames).max() <= 1
    with pytest.raises(IntegrityError, match="sha256"):
        higen.load(copy, "onnx")


def test_a_missing_graph_is_passed_over_in_silence(copy: Path) -> None:
    (copy / graph_file("vae_decoder")).unlink()
    fitted(copy)
    with higen.load(copy) as pipe:
        report = " ".join(pipe.report().split())
    assert "vae_decoder torch (cpu, fp32) not tensorrt: no engine of vae_decoder" in report
    assert "not onnx: no vae_decoder.onnx" in report
    with pytest.raises(BackendUnavailable, match=re.escape(f"(make it: higen-export onnx {copy})")):
        higen.load(copy, "onnx")


@pytest.mark.parametrize("backend", ["auto", "onnx", "torch"])
def test_a_precision_that_the_model_was_never_quantised_to_is_refused(backend: str) -> None:
    """Otherwise each stage could fall back to another graph, and the video would silently be computed in float32."""
    model = default_model()
    message = f"no spatial_unet.int8.onnx (make it: higen-export quantize {model} --precision int8)"
    with pytest.raises(BackendUnavailable, match=re.escape(message)):
        higen.load(model, backend, precision="int8")


@pytest.mark.parametrize("cut", [0, 100, -1])
def test_a_truncated_weights_file_is_one_error(copy: Path, cut: int) -> None:
    weights = copy / spec.UNET
    weights.write_bytes(weights.read_bytes()[:cut])
    with pytest.raises(IntegrityError, match=r"unet\.safetensors"):
        higen.load(copy)


def test_weights_of_another_model_are_one_error(copy: Path) -> None:
    weights = copy / spec.UNET
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(IntegrityError, match="sha256"):
        higen.load(copy)


def test_a_truncated_graph_is_one_error_whatever_the_manifest_says(copy: Path) -> None:
    graph = copy / graph_file("temporal_unet_plain")
    graph.write_bytes(graph.read_bytes()[: graph.stat().st_size // 2])
    with pytest.raises(IntegrityError, match=r"temporal_unet_plain\.onnx"):
        higen.load(copy, "onnx")
    fitted(copy)  # as if the file had been created like this
    with pytest.raises(IntegrityError, match=r"temporal_unet_plain\.onnx: ONNX Runtime cannot load it"):
        higen.load(copy, "onnx")


def test_a_graph_of_another_stage_is_one_error(copy: Path) -> None:
    shutil.copy(copy / graph_file("conditioner"), copy / graph_file("text_encoder"))
    fitted(copy)
    with pytest.raises(IntegrityError, match="the graph of text_encoder belongs to another stage or model"):
        higen.load(copy, "onnx")


def test_a_graph_over_weights_of_another_size_is_one_error(copy: Path) -> None:
    shutil.copy(copy / spec.TEXT_ENCODER, copy / spec.UNET)
    fitted(copy)
    with pytest.raises(IntegrityError, match=r"conditioner\.onnx: ONNX Runtime cannot load it"):
        higen.load(copy, "onnx")


def test_external_data_cannot_leave_the_directory(copy: Path) -> None:
    onnx_package = pytest.importorskip("onnx")
    path = copy / graph_file("conditioner")
    graph = onnx_package.load(str(path), load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret.safetensors"
    (copy.parent / "secret.safetensors").write_bytes((copy / spec.UNET).read_bytes())
    path.write_bytes(graph.SerializeToString())
    fitted(copy)
    with pytest.raises(IntegrityError, match=r"conditioner\.onnx"):
        higen.load(copy, "onnx")


def test_wrong_inputs_are_refused(onnx: Pipeline) -> None:
    with pytest.raises(BackendError, match="missing or unknown inputs"):
        onnx.backend.run("vae_decoder", pixels=np.zeros((1, 3, 8, 8), np.float32))
    with pytest.raises(BackendError, match=r"vae_decoder\.latents"):
        onnx.backend.run("vae_decoder", latents=np.zeros((1, 4, 8, 8), np.float32))
    with pytest.raises(HigenError):
        onnx.backend.run("vae_decoder", latents=np.zeros((1, 32, 8, 8), np.int64))


# Graphs that were made before manifest version 2: t is int64, guidance has one value per sample


def test_an_older_graph_gets_inputs_in_its_own_form(copy: Path, bundle: Bundle) -> None:
    as_version_1(copy, "temporal_unet")
    rows = {row.name: (row.dtype, row.shape) for row in Bundle.open(copy).graphs["temporal_unet.onnx"]}
    assert (rows["t"], rows["guidance"]) == (("int64", ("B",)), ("float32", ("B",)))
    random, stage = np.random.default_rng(0), bundle.manifest.stage("temporal_unet")
    sizes = {**bundle.manifest.fixed, "B": 2, "F": 3, "H": 4, "W": 2}
    given = {
        t.name: random.standard_normal([sizes[n] if isinstance(n, str) else n for n in t.shape]).astype(np.float32)
        for t in stage.inputs
    }
    given |= {"t": np.float32([7, 900]), "guidance": np.repeat(np.float32([[1.5], [4.0]]), 3, axis=1)}
    older, newer = OnnxBackend(Bundle.open(copy)), OnnxBackend(bundle)
    for name, value in newer.run("temporal_unet", **given).items():
        np.testing.assert_array_equal(older.run("temporal_unet", **given)[name].numpy(), value.numpy())
    for changed in ({"t": np.float32([7.5, 900])}, {"guidance": np.float32([[1, 2, 3], [1, 1, 1]])}):
        (name,) = changed
        message = rf"temporal_unet: its graph was made before {name} could .*higen-export onnx {re.escape(str(copy))}"
        with pytest.raises(BackendUnavailable, match=message):
            older.run("temporal_unet", **{**given, **changed})


def test_a_device_that_is_not_here(bundle: Bundle) -> None:
    with pytest.raises(BackendUnavailable, match="device='tpu'"):
        OnnxBackend(bundle, Options("tpu"))
    with pytest.raises(BackendUnavailable, match="CPUExecutionProvider"):
        OnnxBackend(bundle, Options("cuda"))
    with pytest.raises(BackendUnavailable, match=r"pip install 'higen\[cuda\]'"):
        higen.load(default_model(), "onnx", device="cuda")


# Many requests


def test_sessions_are_made_once_for_many_threads_and_freed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[object]] = []
    session = ort.InferenceSession

    def counted(*arguments: object, **options: object) -> object:
        time.sleep(0.05)  # long enough for the other requests to arrive
        built = session(*arguments, **options)
        made.append(weakref.ref(built))
        return built

    monkeypatch.setattr(ort, "InferenceSession", counted)
    backend = OnnxBackend(bundle)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(backend.prepare, ["conditioner", "text_encoder"] * 8))
    assert len(made) == 2
    backend.close()
    gc.collect()
    assert [reference() for reference in made] == [None, None]


def test_requests_in_many_threads_do_not_disturb_each_other(onnx: Pipeline) -> None:
    options = {"steps": 2, "frames": 2, "progress": False}
    jobs = [(prompt, seed) for prompt in prompts() for seed in (1, 2)]
    alone = [onnx(prompt, seed=seed, **options).frames for prompt, seed in jobs]
    fresh = Pipeline(onnx.bundle, OnnxBackend(onnx.bundle))
    with fresh, ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda job: fresh(job[0], seed=job[1], **options).frames, jobs))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_reach_the_session(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    given: list[int] = []
    session = ort.InferenceSession

    def seen(path: str, options: ort.SessionOptions, **rest: object) -> object:
        given.append(options.intra_op_num_threads)
        return session(path, options, **rest)

    monkeypatch.setattr(ort, "InferenceSession", seen)
    select_backend(bundle, "onnx", Options(threads=threads)).prepare("conditioner")
    assert given == [threads]


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2", 10_000])
def test_threads_that_no_one_has(threads: Any) -> None:
    with pytest.raises(RequestError, match=f"threads={threads!r}: a whole number from 1 to 1024"):
        higen.load(threads=threads)
