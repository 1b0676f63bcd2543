"""Devices behind a plugin of ONNX Runtime. The CPU's own provider stands in for a plugin's: it is chosen likewise.

The last test runs with the plugins, where they are installed and find a device.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import higen
from higen import doctor
from higen.api import default_model
from higen.backends import plugins
from higen.backends.onnx import OnnxBackend
from higen.backends.options import Options
from higen.backends.plugins import PLUGINS, Placement, Plugin
from higen.backends.tensorrt import TensorrtBackend
from higen.backends.torch import TorchBackend
from higen.bundle import Bundle
from higen.errors import BackendUnavailable, HigenError, IntegrityError, MissingExtra, RequestError

BUNDLE = Bundle.open(default_model())
STAGE = "text_encoder"
TOKENS = {"tokens": np.arange(24, dtype=np.int64)[None] % 7}
STAND_IN = Plugin("webgpu", "no-such-package", "CPUExecutionProvider", {}, "It needs a GPU")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """`device="webgpu"` is the CPU's own provider. Returns the options that each session's provider was given."""
    given: list[dict[str, str]] = []

    class Recorded(Plugin):
        def _options(self, threads: int | None) -> dict[str, str]:
            given.append(PLUGINS["openvino"]._options(threads))
            return {}

    values = {name: getattr(STAND_IN, name) for name in ("device", "package", "provider", "metadata", "wanted")}
    monkeypatch.setitem(PLUGINS, "webgpu", Recorded(**values))
    return given


def test_a_stage_runs_on_the_device_and_the_report_says_so(stand_in: list[dict[str, str]]) -> None:
    expected = OnnxBackend(BUNDLE, Options("cpu")).run(STAGE, **TOKENS)["hidden"].numpy()
    backend = OnnxBackend(BUNDLE, Options("webgpu", threads=1))
    result = backend.run(STAGE, **TOKENS)["hidden"]
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-6)
    assert backend.describe(STAGE) == backend.choices[STAGE].details == "webgpu, fp32"
    (options,) = stand_in
    assert json.loads(options["load_config"]) == {
        "CPU": {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    }


@pytest.mark.usefixtures("stand_in")
def test_auto_is_onnx_runtime_and_other_backends_refuse() -> None:
    with higen.load(device="webgpu", prepare=False) as pipe:
        pipe.backend.prepare(STAGE)
        assert pipe.report().splitlines() == [f"{STAGE:<19} onnx (webgpu, fp32)"]
    for make in (TorchBackend, TensorrtBackend):
        for device in ("webgpu", "openvino"):
            with pytest.raises(BackendUnavailable, match=rf"^device='{device}': .* does not run there; ONNX Runtime"):
                make(BUNDLE, Options(device))
    with pytest.raises(BackendUnavailable, match=r"device='webgpu': PyTorch does not run there"):
        higen.load(device="webgpu", backend="torch")


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_other_precisions_are_refused(precision: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"^precision='{precision}' with device='webgpu': only fp32 runs"):
        OnnxBackend(BUNDLE, Options("webgpu", precision))
    assert OnnxBackend(BUNDLE, Options("webgpu", "fp32"))


class Part:
    """A part of a graph that ONNX Runtime gave to one provider."""

    def __init__(self, provider: str, *operators: str) -> None:
        self.ep_name = provider
        self.operators = operators

    def get_nodes(self) -> list[Any]:
        return [SimpleNamespace(op_type=name) for name in self.operators]


def test_nodes_on_the_cpu_are_counted_and_named() -> None:
    def placement(*parts: Part) -> Placement:
        return Placement.of(SimpleNamespace(get_provider_graph_assignment_info=lambda: list(parts)), "P")

    all_there = placement(Part("P", "Conv", "Add"), Part("P", "Mul"))
    assert (all_there.placed, str(all_there)) == (3, "")
    some = placement(Part("P", "Conv"), Part("CPU", "Gather", "Add"), Part("CPU", "Gather"))
    assert str(some) == "3 of 4 nodes on the CPU: 2 Gather, 1 Add"
    many = placement(Part("CPU", *"aaabbccde"))
    assert (many.placed, str(many)) == (0, "9 of 9 nodes on the CPU: 3 a, 2 b, 2 c, ...")


@pytest.mark.usefixtures("stand_in")
def test_a_graph_that_runs_wholly_on_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Placement, "of", lambda session, provider: Placement(0, plugins.Counter("ab")))
    with pytest.raises(
        BackendUnavailable, match=r"^device='webgpu': text_encoder.onnx has no node that can run there$"
    ):
        OnnxBackend(BUNDLE, Options("webgpu")).prepare(STAGE)


@pytest.mark.usefixtures("stand_in")
def test_a_provider_that_fails_is_told_from_a_broken_graph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("[ONNXRuntimeError] : 11 : EP_FAIL : No supported adapters")

    broken = tmp_path / "text_encoder.onnx"
    broken.write_bytes(b"not a graph")
    with pytest.raises(Exception, match="INVALID_PROTOBUF"):
        PLUGINS["webgpu"].session(str(broken), ort.SessionOptions(), None)
    copy = tmp_path / "model"
    copy.mkdir()
    for file in default_model().iterdir():
        (copy / file.name).symlink_to(file)
    (copy / "text_encoder.onnx").unlink()
    (copy / "text_encoder.onnx").write_bytes(b"\x00" * 40)
    with pytest.raises(IntegrityError):
        OnnxBackend(Bundle.open(copy), Options("webgpu", verify=False)).prepare(STAGE)
    backend = OnnxBackend(BUNDLE, Options("webgpu"))
    monkeypatch.setattr(plugins.ort, "InferenceSession", fail)
    fail.get_provider_graph_assignment_info = None  # type: ignore[attr-defined] # a class has it
    with pytest.raises(BackendUnavailable, match=r"^device='webgpu': text_encoder.onnx cannot run there: .*adapters"):
        backend.prepare(STAGE)


def test_a_plugin_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins.ort, "get_ep_devices", list)
    for device, package in (("openvino", "onnxruntime-ep-openvino"), ("webgpu", "onnxruntime-ep-webgpu")):
        monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
        for backend in ("auto", "onnx"):
            with pytest.raises(MissingExtra) as caught:
                higen.load(device=device, backend=backend)
            assert str(caught.value) == (
                f"device={device!r} needs the package {package!r}: pip install 'higen[{device}]'"
            )
    found = doctor._devices()
    assert [(d.backend, d.works, "higen[" in d.reason) for d in found] == [
        ("openvino", False, True),
        ("webgpu", False, True),
    ]


def test_another_library_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plugin = Plugin("openvino", "no-such-package", "NoProvider", {}, "It needs another computer.")
    for given in ("plugin.so", str(tmp_path / "none.so"), str(tmp_path)):
        monkeypatch.setenv("HIGEN_OPENVINO_LIBRARY", given)
        with pytest.raises(RequestError, match=r"^HIGEN_OPENVINO_LIBRARY='.*': the absolute path of the plugin's lib"):
            plugin.ep_device()
    other = tmp_path / "other.so"
    other.write_bytes(b"no library")
    monkeypatch.setenv("HIGEN_OPENVINO_LIBRARY", str(other))
    with pytest.raises(BackendUnavailable, match=r"^device='openvino': .*other.so does not load: "):
        plugin.ep_device()


def test_a_plugin_without_a_device_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    registered: list[tuple[str, str]] = []

    def register(name: str, library: str) -> None:
        if registered:
            raise RuntimeError(f"EP library is already registered under {name}")
        registered.append((name, library))

    library = tmp_path / "plugin.so"
    library.touch()
    monkeypatch.setenv("HIGEN_OPENVINO_LIBRARY", str(library))
    monkeypatch.setattr(plugins.ort, "register_execution_provider_library", register)
    for _ in range(2):  # a second model in the same process
        with pytest.raises(BackendUnavailable, match=r"offers no device here. It runs on Intel processors only$"):
            OnnxBackend(BUNDLE, Options("openvino"))
    assert registered == [("higen.openvino", str(library))]
    npu = SimpleNamespace(ep_name="OpenVINOExecutionProvider", ep_metadata={"ov_device": "NPU"})
    monkeypatch.setattr(plugins.ort, "get_ep_devices", lambda: [npu])
    with pytest.raises(BackendUnavailable, match="offers no device here"):
        PLUGINS["openvino"].ep_device()


def test_an_old_onnx_runtime_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins.ort, "InferenceSession", object)
    with pytest.raises(BackendUnavailable, match=r"^device='webgpu': ONNX Runtime .* is too old for it: pip install"):
        OnnxBackend(BUNDLE, Options("webgpu"))


@pytest.mark.parametrize("device", list(PLUGINS))
def test_a_real_plugin_gives_the_cpus_numbers(device: str) -> None:
    try:
        PLUGINS[device].ep_device()
    except HigenError as error:
        pytest.skip(str(error))
    expected = OnnxBackend(BUNDLE, Options("cpu")).run(STAGE, **TOKENS)["hidden"].numpy()
    backend = OnnxBackend(BUNDLE, Options(device))
    np.testing.assert_allclose(backend.run(STAGE, **TOKENS)["hidden"].numpy(), expected, atol=2e-5)
    assert backend.describe(STAGE).startswith(f"{device}, fp32")
