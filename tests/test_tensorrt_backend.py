"""The TensorRT backend on a fake TensorRT and a fake CUDA driver that enforce the real ones' rules.

The fake computes with ONNX Runtime, so a whole video must equal that of ONNX Runtime.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.machinery
import os
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeDriver
from fake_tensorrt import SURFACES, FakeTensorrt
from older_graph import as_version_1

import higen
from higen.api import default_model
from higen.backends import cuda
from higen.backends.onnx import OnnxBackend
from higen.backends.options import Options as RunOptions
from higen.backends.plans import PlanRecord, read_plans, validity_error
from higen.backends.select import availability
from higen.backends.tensorrt import TensorrtBackend
from higen.bundle import Bundle, drop_file
from higen.engines.build import PLAIN, Options
from higen.engines.model_engines import build_engines
from higen.engines.shapes import Profile, Range
from higen.engines.targets import parse_targets
from higen.errors import (
    BackendError,
    BackendUnavailable,
    EngineError,
    FallbackWarning,
    HigenError,
    Malformed,
    MissingExtra,
    ModelError,
    NoDevice,
    NoDriver,
    OutsideProfile,
    Stale,
    WrongArchitecture,
)
from higen.manifest import Manifest
from higen.sampler import Step

PROMPT = "a red heart"
LIBRARIES = sorted(SURFACES)
RTX = next(name for name in LIBRARIES if "rtx" in name)


STAGES = Bundle.open(default_model()).manifest.stage_names


def small(manifest: Manifest) -> dict[str, int]:
    """Sizes of a small clip that the model accepts."""
    step = manifest.sizes.multiple
    return {"frames": 3, "width": 2 * step, "height": step}


def profile(manifest: Manifest, frames: int = 3) -> Profile:
    """A profile for clips with the sizes of `small` and up to this many frames."""
    sizes = small(manifest)
    height, width = sizes["height"], sizes["width"]
    return Profile(
        "small",
        Range(1, 1, 2),
        Range(2, frames, frames),
        Range(height, height, height),
        Range(width, width, width),
        Range(1, 2, 2),
    )


class Machine:
    """A machine with a fake GPU and one of the fake libraries; `model` has engines for it."""

    def __init__(self, library: str, model: Path, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.driver = FakeDriver()
        self.trt = FakeTensorrt(library, self.driver, Bundle.open(model).manifest.sizes.factor)
        self.package = "tensorrt_rtx" if "rtx" in library else "tensorrt"
        self.target = "rtx-sm89" if "rtx" in library else "tensorrt"
        self.trt.__spec__ = importlib.machinery.ModuleSpec(self.package, None)
        for package in ("tensorrt", "tensorrt_rtx"):
            patch.setitem(sys.modules, package, self.trt if package == self.package else None)
        patch.setattr(cuda, "_driver", lambda: self.driver)
        self.model = model

    def build(self, *stages: str, options: Options = PLAIN, frames: int = 3) -> list[PlanRecord]:
        bundle = Bundle.open(self.model)
        profiles = [profile(bundle.manifest, frames)]
        return build_engines(bundle, parse_targets(self.target), profiles, stages or None, options=options)

    def backend(self, **options: Any) -> TensorrtBackend:
        return TensorrtBackend(Bundle.open(self.model), RunOptions(**options))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model without engines."""
    return Path(shutil.copytree(default_model(), tmp_path_factory.mktemp("engines") / "model"))


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A model that a test may change. Big files are links."""
    folder = tmp_path / "model"
    shutil.copytree(original, folder, copy_function=lambda a, b: Path(b).symlink_to(a))
    manifest = folder / "higen.json"
    text = manifest.read_text(encoding="utf-8")
    manifest.unlink()
    manifest.write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(params=LIBRARIES)
def machine(request: pytest.FixtureRequest, model: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with each of the four libraries in turn."""
    return Machine(request.param, model, monkeypatch)


@pytest.fixture
def rtx(model: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with TensorRT for RTX."""
    return Machine(RTX, model, monkeypatch)


@pytest.fixture
def classic(model: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with the newest classic TensorRT."""
    return Machine(LIBRARIES[-2], model, monkeypatch)


@pytest.fixture(scope="module")
def expected(original: Path) -> np.ndarray[Any, Any]:
    """The small clip on ONNX Runtime."""
    with higen.load(original, "onnx") as pipe:
        return clip(pipe)


def clip(pipe: Any, **options: Any) -> np.ndarray[Any, Any]:
    sizes = {**small(pipe.manifest), "seed": 3, "progress": False, **options}
    frames: np.ndarray[Any, Any] = pipe(PROMPT, **sizes).frames
    return frames


def inputs(bundle: Bundle, stage: str, seed: int = 0, **sizes: int) -> dict[str, np.ndarray[Any, Any]]:
    """Random inputs for a stage."""
    random, factor = np.random.default_rng(seed), bundle.manifest.sizes.factor
    multiple = bundle.manifest.sizes.multiple // factor
    known = {"B": 1, "F": 3, "N": 2, "H": multiple, "W": 2 * multiple, **sizes}
    known |= {"Y": known["H"] * factor, "X": known["W"] * factor, **bundle.manifest.fixed}
    made = {}
    for tensor in bundle.manifest.stage(stage).inputs:
        shape = [known[n] if isinstance(n, str) else n for n in tensor.shape]
        if tensor.dtype == "int64":
            made[tensor.name] = random.integers(0, 5, shape)
        else:
            made[tensor.name] = random.standard_normal(shape).astype(np.float32)
    return made


def steps(stream: Any) -> list[Step]:
    """The denoising steps among a stream's events."""
    return [event for event in stream if isinstance(event, Step)]


def by_graph(bundle: Bundle, stage: str, given: dict[str, Any]) -> dict[str, Any]:
    backend = OnnxBackend(bundle, RunOptions("cpu"))
    return {name: backend.to_numpy(value) for name, value in backend.run(stage, **given).items()}


def test_every_library_gives_the_video_of_onnx_runtime(machine: Machine, expected: np.ndarray[Any, Any]) -> None:
    machine.build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = higen.load(machine.model)
    assert {choice.backend for choice in pipe.backend.choices.values()} == {"tensorrt"}  # type: ignore[attr-defined]
    for _ in range(3):  # the second call finds all memory allocated, the third has the second's addresses
        np.testing.assert_array_equal(clip(pipe), expected)
    launched = machine.driver.calls.get("cuGraphLaunch", 0)
    # TensorRT for RTX captures graphs itself; for the others the backend does it.
    assert launched == 0 if machine.package == "tensorrt_rtx" else launched > 0
    report = pipe.report()
    assert f"tensorrt (cuda, fp32, {machine.target}" in report
    assert "not tensorrt" not in report
    pipe.close()
    assert machine.driver.clean
    assert not machine.trt.engines


def test_a_builder_asks_each_library_for_what_it_has(machine: Machine) -> None:
    (record,) = machine.build("vae_decoder", options=Options(workspace=2**20, weight_streaming=True))
    assert machine.trt.capabilities == ([89] if machine.package == "tensorrt_rtx" else [])
    assert record.architectures == (89,)
    assert record.library == machine.trt.__version__
    assert record.target == ("rtx-sm89" if machine.package == "tensorrt_rtx" else "tensorrt-sm89")
    assert [t.name for t in record.tensors] == ["latents", "pixels"]
    log = (machine.model / "engines" / record.target / "vae_decoder.log").read_text(encoding="utf-8")
    assert "_gemm_mha_v2" in log
    assert "Searching for input" not in log


def test_a_plan_that_fits_is_kept_and_a_changed_option_builds_again(rtx: Machine) -> None:
    first = rtx.build("vae_decoder", "vae_encoder")
    assert rtx.build("vae_decoder", "vae_encoder") == first
    again = rtx.build("vae_decoder", frames=2, options=Options(workspace=1))
    assert again[0].options != first[0].options
    assert rtx.build("vae_encoder") == first[1:]


def test_an_altered_plan_is_repaired_by_the_same_command(rtx: Machine) -> None:
    (first,) = rtx.build("vae_decoder")
    plan = rtx.model / "engines" / "rtx-sm89" / "vae_decoder.engine"
    good = plan.read_bytes()
    plan.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(Malformed):
        rtx.backend().prepare("vae_decoder")
    (second,) = rtx.build("vae_decoder")
    assert second.sha256 == first.sha256
    assert plan.read_bytes() == good


def test_an_error_line_fails_the_build_whatever_it_returns(rtx: Machine) -> None:
    rtx.trt.build_errors = ["the setting is wrong", "the setting is wrong"]
    with pytest.raises(EngineError, match=r"vae_decoder\.onnx: TensorRT could not build it: the setting is wrong$"):
        rtx.build("vae_decoder")
    assert [p.name for p in (rtx.model / "engines" / "rtx-sm89").iterdir()] == [".lock"]


def test_a_loop_keeps_its_memory_and_replays(classic: Machine) -> None:
    classic.build("temporal_unet")
    backend = classic.backend()
    given = inputs(backend.bundle, "temporal_unet")
    state = {"latents": given.pop("latents"), "previous": given.pop("previous")}
    used, allocations = [], []
    for _ in range(12):
        state = dict(backend.run("temporal_unet", **state, **given))
        used.append(classic.driver.used)
        allocations.append(classic.driver.calls["cuMemAlloc_v2"])
    assert used[3:] == [used[3]] * 9
    assert allocations[3:] == [allocations[3]] * 9
    assert classic.driver.calls["cuStreamBeginCapture_v2"] <= 3
    assert classic.driver.calls["cuGraphLaunch"] >= 6
    backend.close()


def test_steps_that_a_caller_keeps_are_not_overwritten(classic: Machine) -> None:
    classic.build()
    sizes = small(Bundle.open(classic.model).manifest)
    with higen.load(classic.model) as pipe, higen.load(classic.model, "onnx") as graphs:
        kept = steps(pipe.stream(PROMPT, steps=4, seed=1, **sizes))
        for step, wanted in zip(kept, steps(graphs.stream(PROMPT, steps=4, seed=1, **sizes)), strict=True):
            ours, theirs = pipe.backend.to_numpy(step.latents), graphs.backend.to_numpy(wanted.latents)
            np.testing.assert_array_equal(ours, theirs)


def test_shapes_that_alternate_are_captured_by_the_rules(classic: Machine) -> None:
    classic.build("vae_decoder")
    backend = classic.backend()
    for i in range(8):
        given = inputs(backend.bundle, "vae_decoder", seed=i, N=1 + i % 2)
        pixels = backend.run("vae_decoder", **given)["pixels"].numpy()
        np.testing.assert_array_equal(pixels, by_graph(backend.bundle, "vae_decoder", given)["pixels"])
    backend.close()


def test_two_threads_share_an_engine(classic: Machine) -> None:
    classic.build("vae_decoder")
    backend = classic.backend()
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in range(5):
            given = inputs(backend.bundle, "vae_decoder", seed=10 * seed + i)
            pixels = backend.to_numpy(backend.run("vae_decoder", **given)["pixels"])
            if not np.array_equal(pixels, by_graph(backend.bundle, "vae_decoder", given)["pixels"]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    backend.close()


def test_low_memory_keeps_one_engine_at_a_time(rtx: Machine, expected: np.ndarray[Any, Any]) -> None:
    rtx.build()
    alive: list[int] = []
    run = TensorrtBackend.run

    def counting(self: TensorrtBackend, stage: str, /, **tensors: Any) -> Any:
        result = run(self, stage, **tensors)
        alive.append(len(rtx.trt.engines))
        return result

    rtx.patch.setattr(TensorrtBackend, "run", counting)
    with higen.load(rtx.model, low_memory=True) as pipe:
        np.testing.assert_array_equal(clip(pipe), expected)
    assert set(alive) == {1}
    with higen.load(rtx.model) as pipe:
        clip(pipe)
    assert max(alive) == 5


def test_engines_share_one_block_of_scratch_memory(rtx: Machine) -> None:
    rtx.build("vae_decoder", "vae_encoder")
    backend = rtx.backend()
    backend.prepare("vae_decoder")
    alone = rtx.driver.used
    backend.prepare("vae_encoder")
    assert rtx.driver.used == alone > 0
    backend.close()


def test_an_engine_without_memory_takes_none_from_working_engines(rtx: Machine) -> None:
    rtx.build("vae_decoder", "vae_encoder")
    bundle, backend = Bundle.open(rtx.model), rtx.backend()
    small, large = ((stage, inputs(bundle, stage)) for stage in ("vae_decoder", "vae_encoder"))
    wanted = backend.to_numpy(backend.run(small[0], **small[1])["pixels"])
    rtx.driver.memory = rtx.driver.used
    rtx.trt.scratch = 2**20
    with pytest.raises(BackendError, match="memory is full"):
        backend.run(large[0], **large[1])
    np.testing.assert_array_equal(backend.to_numpy(backend.run(small[0], **small[1])["pixels"]), wanted)
    backend.close()
    assert rtx.driver.clean


def test_compiled_kernels_are_kept_beside_the_plan(rtx: Machine) -> None:
    rtx.build("vae_decoder")
    cache = rtx.model / "engines" / "rtx-sm89" / ".vae_decoder-sm89.cache"
    given = inputs(Bundle.open(rtx.model), "vae_decoder")
    for _ in range(2):
        backend = rtx.backend()
        backend.run("vae_decoder", **given)
        backend.close()
        assert cache.read_bytes().startswith(b"kernels:")
    cache.write_bytes(b"of another driver")
    backend = rtx.backend()
    backend.run("vae_decoder", **given)
    backend.close()
    assert cache.read_bytes().startswith(b"kernels:")
    assert [p.name for p in cache.parent.glob(".*.part")] == []


def test_a_read_only_folder_loses_only_the_saved_kernels(rtx: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only file system refuses even to remove a file that does not exist."""

    def refuse(*given: Any, **options: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    rtx.build("vae_decoder")
    given = inputs(Bundle.open(rtx.model), "vae_decoder")
    cache = rtx.model / "engines" / "rtx-sm89" / ".vae_decoder-sm89.cache"
    cache.mkdir()  # the cache's path is a folder, which cannot be read as a file
    backend = rtx.backend()
    backend.run("vae_decoder", **given)
    for name in ("write_bytes", "unlink", "replace"):
        monkeypatch.setattr(Path, name, refuse)
    backend.close()
    assert rtx.driver.clean


@pytest.mark.parametrize(("memory", "budget"), [(2**32, 1000), (5500, 400)])
def test_weights_stream_where_they_do_not_fit(rtx: Machine, memory: int, budget: int) -> None:
    rtx.build("vae_decoder", options=Options(weight_streaming=True))
    rtx.driver.memory = memory
    backend = rtx.backend()
    try:
        backend.prepare("vae_decoder")
    finally:
        (engine,) = rtx.trt.engines
        assert engine.weight_streaming_budget_v2 == budget
        backend.close()


def test_a_full_gpu_is_one_error(rtx: Machine) -> None:
    rtx.build("vae_decoder")
    backend = rtx.backend()
    rtx.driver.memory = 100
    with pytest.raises(BackendError, match=r"cuMemAlloc_v2: .*memory is full \(low_memory=True\?\)"):
        backend.prepare("vae_decoder")
    backend.close()
    assert rtx.driver.clean


def test_a_closed_backend_says_so(rtx: Machine) -> None:
    rtx.build("vae_decoder")
    backend, given = rtx.backend(), inputs(Bundle.open(rtx.model), "vae_decoder")
    backend.run("vae_decoder", **given)
    backend.close()
    with pytest.raises(BackendError, match="the pipeline was closed"):
        backend.run("vae_decoder", **given)
    assert rtx.driver.clean


def test_wrong_inputs_are_refused(rtx: Machine) -> None:
    rtx.build("vae_decoder")
    backend = rtx.backend()
    with pytest.raises(BackendError, match="missing or unknown inputs"):
        backend.run("vae_decoder", pixels=np.zeros((1, 3, 8, 8), np.float32))
    with pytest.raises(BackendError, match=r"vae_decoder\.latents"):
        backend.run("vae_decoder", latents=np.zeros((1, 1, 8, 8), np.float32))
    backend.close()


def test_a_stage_without_an_engine_is_skipped_silently(rtx: Machine, expected: np.ndarray[Any, Any]) -> None:
    rtx.build("temporal_unet_plain", "vae_decoder")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = higen.load(rtx.model)
        np.testing.assert_array_equal(clip(pipe), expected)
    report = " ".join(pipe.report().split())
    assert "conditioner onnx (cpu, fp32) not tensorrt: no engine of conditioner" in report
    assert "temporal_unet_plain tensorrt" in report
    pipe.close()


def test_another_precision_is_another_engine(rtx: Machine) -> None:
    rtx.build("vae_decoder")
    command = re.escape(f"higen-export build-engines {rtx.model} --target TARGET --precision fp16")
    with pytest.raises(BackendUnavailable, match=f"no engine of vae_decoder in fp16 .make one: {command}"):
        rtx.backend(precision="fp16").prepare("vae_decoder")


def test_shapes_outside_the_profile_run_on_the_next_backend(rtx: Machine, expected: np.ndarray[Any, Any]) -> None:
    rtx.build(frames=2)
    with higen.load(rtx.model) as pipe:
        with pytest.warns(FallbackWarning) as caught:
            np.testing.assert_array_equal(clip(pipe), expected)
        messages = [str(w.message).partition(": rtx-sm89/")[0] for w in caught]
        assert messages == ["conditioner runs on onnx: OutsideProfile"]
        report = " ".join(pipe.report().split())
        for stage in ("conditioner", "temporal_unet_plain"):
            assert (
                f"{stage} tensorrt (cuda, fp32, rtx-sm89) onnx (cpu, fp32) for other shapes: "
                f"OutsideProfile: rtx-sm89/{stage}: small takes"
            ) in report
        assert report.count("for other shapes") == 2
        assert pipe.backend.name == "onnx+tensorrt"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            clip(pipe, frames=2)
            video = pipe(PROMPT, **small(pipe.manifest), steps=2, progress=False)
            assert video.metadata["versions"]["backend"] == "onnx+tensorrt"
            np.testing.assert_array_equal(clip(pipe), expected)
    with higen.load(rtx.model, "tensorrt") as pipe, pytest.raises(OutsideProfile, match="conditioner"):
        clip(pipe)


# Two stages for one loop


def guided_inputs(bundle: Bundle, **changed: Any) -> dict[str, Any]:
    """Inputs of a step with an integer timestep and the same guidance for all frames."""
    given = inputs(bundle, "temporal_unet")
    return {**given, "t": np.float32([7]), "guidance": np.full_like(given["guidance"], 3.0), **changed}


def test_a_loops_other_stage_replaces_one_without_an_engine(rtx: Machine, expected: np.ndarray[Any, Any]) -> None:
    """Running both branches of guidance on the GPU is better than running a single branch on the CPU."""
    rtx.build("temporal_unet", "vae_decoder")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = higen.load(rtx.model)
        frames = clip(pipe)
    assert np.abs(frames.astype(int) - expected).max() <= 1
    assert {name for name, choice in pipe.backend.choices.items() if choice.backend == "tensorrt"} == {
        "temporal_unet",
        "vae_decoder",
    }
    assert "temporal_unet_plain" not in pipe.backend.choices
    pipe.close()


def test_a_stage_that_only_saves_work_needs_no_graph_to_build_the_rest(rtx: Machine) -> None:
    bundle, dropped = Bundle.open(rtx.model), ("spatial_unet_plain", "temporal_unet_plain")
    names = (*bundle.manifest.stage_names, *bundle.manifest.variants)
    for stage in dropped:
        bundle = drop_file(bundle, f"{stage}.onnx")
    assert [record.stage for record in rtx.build()] == [name for name in names if name not in dropped]
    with pytest.raises(ModelError, match=r"no temporal_unet_plain\.onnx \(make it: higen-export onnx"):
        rtx.build("temporal_unet_plain")


def test_only_the_engine_that_is_needed_is_loaded(rtx: Machine) -> None:
    rtx.build("temporal_unet", "temporal_unet_plain")
    backend = rtx.backend()
    assert backend.choose("temporal_unet_plain", "temporal_unet") == "temporal_unet_plain"
    assert list(backend.choices) == ["temporal_unet_plain"]
    assert backend.choices["temporal_unet_plain"].details == "cuda, fp32, rtx-sm89"
    assert len(rtx.trt.engines) == 1
    backend.close()


def test_a_broken_engine_is_replaced_with_a_warning(rtx: Machine) -> None:
    rtx.build("temporal_unet", "temporal_unet_plain")
    plan = rtx.model / "engines" / "rtx-sm89" / "temporal_unet_plain.engine"
    plan.write_bytes(plan.read_bytes()[:-1])
    backend = rtx.backend()
    with pytest.warns(FallbackWarning, match="temporal_unet stands in for temporal_unet_plain: Malformed: ") as caught:
        assert backend.choose("temporal_unet_plain", "temporal_unet") == "temporal_unet"
    assert len(caught) == 1
    backend.close()


# Engines of graphs that were made before manifest version 2


@pytest.fixture
def older(rtx: Machine) -> Machine:
    """A machine with an engine of such a graph."""
    as_version_1(rtx.model, "temporal_unet")
    (record,) = rtx.build("temporal_unet")
    tensors = {t.name: (t.dtype, t.shape) for t in record.tensors}
    assert (tensors["t"], tensors["guidance"]) == (("int64", (-1,)), ("float32", (-1,)))
    spans = {span.name: span.largest for span in record.profiles[0].spans}
    assert (spans["t"], spans["guidance"], spans["frame_embedding"][:2]) == ((2,), (2,), (2, 3))
    return rtx


def test_an_older_engine_gets_inputs_in_its_own_form(older: Machine, original: Path) -> None:
    backend, given = older.backend(), guided_inputs(Bundle.open(original))
    found = {name: value.numpy() for name, value in backend.run("temporal_unet", **given).items()}
    for name, value in by_graph(Bundle.open(original), "temporal_unet", given).items():
        np.testing.assert_allclose(found[name], value, atol=1e-5 * np.abs(value).max())
    # The sampler's own tensors may be on the device by then.
    cuda_ = backend._cuda
    assert cuda_ is not None
    there = {name: cuda_.to_device(value) for name, value in given.items()}
    np.testing.assert_array_equal(backend.run("temporal_unet", **there)["latents"].numpy(), found["latents"])
    backend.close()


@pytest.mark.parametrize(
    ("changed", "name"),
    [({"t": np.float32([7.5])}, "t"), ({"guidance": np.float32([[1.0, 2.0, 3.0]])}, "guidance")],
    ids=["t", "guidance"],
)
def test_an_input_that_an_older_engine_cannot_take_names_the_commands(
    older: Machine, changed: dict[str, Any], name: str
) -> None:
    backend = older.backend()
    commands = (
        f"higen-export onnx {older.model} --stage temporal_unet --precision fp32, then higen-export build-engines "
        f"{older.model} --target rtx-sm89 --stage temporal_unet --precision fp32"
    )
    message = f"rtx-sm89/temporal_unet: it was built before {name} could be .*{re.escape(commands)}"
    with pytest.raises(Stale, match=message):
        backend.run("temporal_unet", **guided_inputs(backend.bundle, **changed))
    backend.close()


def test_an_older_engine_is_kept_and_is_not_stale(older: Machine) -> None:
    """An engine is current if the model has the graph and weights it was built from, at any manifest version."""
    (plan,), _ = read_plans(older.model, "temporal_unet")
    assert older.build("temporal_unet") == [plan.record]
    backend = older.backend()
    backend.prepare("temporal_unet")
    backend.close()


# The chain: engine, graph, weights


def cut(machine: Machine) -> None:
    for stage in STAGES:
        path = machine.model / "engines" / "rtx-sm89" / f"{stage}.engine"
        path.write_bytes(path.read_bytes()[:-1])


def no_plan(machine: Machine) -> None:
    """A plan file that matches its record, but that TensorRT cannot read."""
    for stage in STAGES:
        (plan,), _ = read_plans(machine.model, stage)
        plan.path.write_bytes(b"garbage")
        record = replace(plan.record, size=7, sha256=hashlib.sha256(b"garbage").hexdigest())
        plan.path.with_suffix(".json").write_text(record.to_text(), encoding="utf-8")


def no_record(machine: Machine) -> None:
    for stage in STAGES:
        (machine.model / "engines" / "rtx-sm89" / f"{stage}.json").write_text("{", encoding="utf-8")


def other_gpu(machine: Machine) -> None:
    machine.driver.architecture = 120


def other_weights(machine: Machine) -> None:
    """As if the model had been trained further after the engines were built."""
    for stage in STAGES:
        (plan,), _ = read_plans(machine.model, stage)
        record = replace(plan.record, weights_sha256="0" * 64)
        plan.path.with_suffix(".json").write_text(record.to_text(), encoding="utf-8")


def no_library(machine: Machine) -> None:
    machine.patch.setitem(sys.modules, machine.package, None)


def other_version(machine: Machine) -> None:
    machine.trt.__version__ = "9.9.9"


def broken_library(machine: Machine) -> None:
    """The module is installed, but a library that it links to is missing."""
    folder = machine.model.parent / "broken"
    folder.mkdir()
    (folder / f"{machine.package}.py").write_text('raise ImportError("libnvinfer.so.11: cannot open")')
    machine.patch.delitem(sys.modules, machine.package)
    machine.patch.syspath_prepend(str(folder))


def no_gpu(machine: Machine) -> None:
    machine.driver.devices = 0


def invalid(machine: Machine) -> None:
    machine.trt.validity = ("INVALID", 32)


CAUSES = [
    (cut, Malformed, "is not the plan that its record describes"),
    (no_plan, Malformed, "TensorRT cannot load it: magic tag"),
    (no_record, Malformed, "not the record of an engine"),
    (other_gpu, WrongArchitecture, "built for SM89, this GPU is SM120"),
    (other_weights, Stale, "has changed since it was built"),
    (other_version, Stale, r"the installed 9\.9\.9 reads"),
    (no_library, MissingExtra, r"needs the package 'tensorrt_rtx': pip install 'higen\[rtx\]'"),
    (broken_library, EngineError, r"'tensorrt_rtx', which is installed but does not load: ImportError: libnvinfer\.so"),
    (no_gpu, NoDevice, "finds no GPU"),
    (invalid, Malformed, "its file is not a plan"),
]


@pytest.mark.parametrize(("breakage", "error", "message"), CAUSES, ids=[c[0].__name__ for c in CAUSES])
def test_every_breakage_falls_back_to_the_same_video(
    rtx: Machine,
    expected: np.ndarray[Any, Any],
    breakage: Callable[[Machine], None],
    error: type[HigenError],
    message: str,
) -> None:
    rtx.build()
    breakage(rtx)
    with pytest.raises(error, match=message):
        rtx.backend().prepare("vae_decoder")
    assert rtx.driver.clean
    with pytest.warns(FallbackWarning, match=f"runs on onnx: {error.__name__}: ") as caught:
        pipe = higen.load(rtx.model)
    with pipe:
        np.testing.assert_array_equal(clip(pipe), expected)
        report = pipe.report()
        assert rtx.driver.clean, "a GPU that is not used is not held"
    assert report.count(f"not tensorrt: {error.__name__}: ") == 5
    assert report.count("onnx (cpu, fp32)") == 5
    messages = [str(w.message).partition(": ")[2] for w in caught]
    assert len(set(messages)) == len(messages), "a cause is told once"
    with pytest.raises(error):
        higen.load(rtx.model, "tensorrt")
    assert rtx.driver.clean


def test_a_plan_that_does_not_load_does_not_hide_a_good_one(rtx: Machine) -> None:
    """The engine built only for this GPU is tried first, then the portable engine."""
    rtx.build("vae_decoder")
    bundle = Bundle.open(rtx.model)
    build_engines(bundle, parse_targets("rtx"), [profile(bundle.manifest)], ["vae_decoder"])
    own = rtx.model / "engines" / "rtx-sm89" / "vae_decoder.engine"
    own.write_bytes(own.read_bytes()[:-1])
    backend, given = rtx.backend(low_memory=True), inputs(bundle, "vae_decoder")
    with pytest.warns(FallbackWarning, match="vae_decoder runs on the engine rtx/vae_decoder: Malformed: ") as caught:
        pixels = backend.to_numpy(backend.run("vae_decoder", **given)["pixels"])
    assert len(caught) == 1
    np.testing.assert_array_equal(pixels, by_graph(bundle, "vae_decoder", given)["pixels"])
    assert backend.describe("vae_decoder") == "cuda, fp32, rtx"
    backend.close()
    assert rtx.driver.clean


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
def test_without_a_driver_each_engine_says_so(rtx: Machine, expected: np.ndarray[Any, Any]) -> None:
    """Only the engines are fakes here. The backend looks for this machine's own driver."""
    rtx.build()
    rtx.patch.undo()
    with pytest.warns(FallbackWarning, match="text_encoder runs on onnx: NoDriver: no NVIDIA driver") as caught:
        pipe = higen.load(rtx.model)
    assert len(caught) == 1
    with pipe:
        assert pipe.report().count("not tensorrt: NoDriver: no NVIDIA driver") == 5
        np.testing.assert_array_equal(clip(pipe), expected)


def test_the_runtime_is_never_touched_without_a_driver(rtx: Machine) -> None:
    rtx.build("vae_decoder")

    def missing() -> Any:
        raise NoDriver("no NVIDIA driver")

    rtx.patch.setattr(cuda, "_driver", missing)
    rtx.driver.current = False  # making a Runtime now would end the process
    with pytest.raises(NoDriver):
        rtx.backend().prepare("vae_decoder")


def test_classic_engines_need_the_gpu_they_are_for(classic: Machine) -> None:
    classic.driver.devices = 0
    with pytest.raises(NoDevice):
        classic.build("vae_decoder")


def test_availability_says_what_is_missing(rtx: Machine) -> None:
    def tensorrt() -> tuple[bool, str]:
        (found,) = [a for a in availability() if a.backend == "tensorrt"]
        return found.works, found.reason

    assert tensorrt() == (True, "")
    rtx.driver.devices = 0
    assert tensorrt() == (False, "NoDevice: the NVIDIA driver finds no GPU")
    rtx.patch.setattr("importlib.util.find_spec", lambda name: None)
    assert tensorrt() == (False, "not installed: tensorrt or tensorrt_rtx (pip install 'higen[rtx]')")


@pytest.mark.parametrize("device", ["cpu", "cuda:x", "cuda:-1", "tpu"])
def test_a_device_that_is_not_a_gpu(rtx: Machine, device: str) -> None:
    allowed = "TensorRT runs on 'cuda'" if device == "cpu" else "'cuda', or a GPU by its number"
    with pytest.raises(BackendUnavailable, match=f"^device={device!r}: .*{allowed}"):
        rtx.backend(device=device)


def test_a_gpu_that_is_not_there(rtx: Machine) -> None:
    rtx.build("vae_decoder")
    with pytest.raises(NoDevice, match="device='cuda:1': there are 1 GPUs here"):
        rtx.backend(device="cuda:1").prepare("vae_decoder")


@pytest.mark.parametrize(
    ("device", "index", "named"), [("cuda:1", 1, "cuda:1"), ("cuda", 0, "cuda"), (None, 0, "cuda")]
)
def test_a_gpus_number_reaches_the_driver(rtx: Machine, device: str | None, index: int, named: str) -> None:
    rtx.build("vae_decoder")
    rtx.driver.devices, chosen = 2, list[int]()
    get = rtx.driver.cuDeviceGet
    rtx.driver.cuDeviceGet = lambda device, number: (chosen.append(number.value), get(device, number))[1]  # type: ignore[method-assign]
    backend = rtx.backend(device=device)
    backend.prepare("vae_decoder")
    assert chosen == [index]
    assert backend.describe("vae_decoder").startswith(f"{named}, ")
    backend.close()


def test_nothing_is_loaded_again_after_close(rtx: Machine) -> None:
    rtx.build("vae_decoder")
    backend = rtx.backend()
    backend.prepare("vae_decoder")
    cuda_ = backend._cuda
    assert cuda_ is not None
    array = cuda_.to_device(np.ones(3, np.float32))
    backend.close()
    backend.close()
    for call in (
        lambda: backend.prepare("vae_decoder"),
        lambda: backend.choose("vae_decoder"),
        lambda: backend.run("vae_decoder", latents=np.zeros((1, 32, 4, 6), np.float32)),
        lambda: array.numpy(),
    ):
        with pytest.raises(BackendError, match="the pipeline was closed: load the model again"):
            call()
    assert backend.choices == {}
    assert rtx.driver.current is False


@pytest.mark.parametrize(
    ("reasons", "error"),
    [
        (1, Stale),
        (2, WrongArchitecture),
        (3, WrongArchitecture),
        (4, NoDriver),
        (8, NoDriver),
        (16, EngineError),
        (32, Malformed),
        (64, NoDevice),
        (0, EngineError),
        (1024, EngineError),
    ],
)
def test_what_tensorrt_says_of_an_invalid_plan(rtx: Machine, reasons: int, error: type[EngineError]) -> None:
    rtx.build("vae_decoder")
    (plan,), _ = read_plans(rtx.model, "vae_decoder")
    members = {name: int(value) for name, value in rtx.trt.EngineInvalidityDiagnostics.__members__.items()}
    assert type(validity_error(plan, reasons, members)) is error


def test_the_fake_lacks_what_the_real_library_lacks() -> None:
    """The fake must refuse what the real library lacks: a missing name is an AttributeError."""
    old = FakeTensorrt(LIBRARIES[0])
    assert not hasattr(old.LayerType, "ATTENTION_INPUT")
    assert not hasattr(old, "EngineValidity")
    with pytest.raises(AttributeError, match="no attribute 'num_compute_capabilities'"):
        _ = old.IBuilderConfig().num_compute_capabilities
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        old.IBuilderConfig().nonsense = 1
    with pytest.raises(AssertionError, match="strongly typed"):
        old.Builder(None).create_network(0)
