"""Names of devices: every backend reads the whole name or refuses it, and a GPU's number reaches the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

import higen
from higen.api import default_model
from higen.backends import onnx
from higen.backends.onnx import OnnxBackend
from higen.backends.options import Options
from higen.backends.torch import TorchBackend
from higen.bundle import Bundle
from higen.devices import check_present, device_index, device_named
from higen.errors import BackendUnavailable, RequestError, UnknownDevice

BUNDLE = Bundle.open(default_model())


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (None, None),
        ("auto", None),
        ("cpu", "cpu"),
        ("cpu:0", "cpu"),
        ("cuda", "cuda"),
        ("cuda:0", "cuda:0"),
        ("cuda:15", "cuda:15"),
        (np.str_("cuda:1"), "cuda:1"),
        ("openvino", "openvino"),
        ("webgpu", "webgpu"),
        (torch.device("cpu"), "cpu"),
        (torch.device("cpu", 0), "cpu"),
        (torch.device("cuda"), "cuda"),
        (torch.device("cuda", 1), "cuda:1"),
    ],
    ids=str,
)
def test_names(given: Any, name: str | None) -> None:
    assert device_named(given) == name
    assert Options(device=given).device == name


@pytest.mark.parametrize(
    "device",
    [
        *("", " ", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:+1", "cuda:01", "cuda:1.0", "cuda:banana", "cuda:1 "),
        *(
            "cuda:\u0661",
            "cuda:\u00b2",
            "cuda:1\n",
            "cuda:9999",
            "cuda:1:2",
            "cuda 1",
            "cpu:1",
            "cpu:7",
            "cpu:x",
            "mps",
            "OpenVINO",
            "openvino:1",
            "openvino:gpu",
            "webgpu:0",
        ),
        *(0, 1.0, True, b"cpu", ["cpu"], torch.device("meta"), torch.device("mps"), object(), "x" * 10**6),
    ],
    ids=lambda device: repr(device)[:12],
)
def test_anything_else_is_refused_by_every_backend(device: Any) -> None:
    for backend in ("auto", "onnx", "torch", "tensorrt"):
        with pytest.raises(
            UnknownDevice, match=r"(?s)^device=.*: 'auto', 'cpu', 'cuda', or a GPU by its number"
        ) as caught:
            higen.load(backend=backend, device=device)
        assert isinstance(caught.value, (RequestError, BackendUnavailable))
        assert len(str(caught.value)) < 300


def test_a_gpu_beyond_the_last() -> None:
    assert [device_index(name) for name in ("cuda", "cuda:0", "cuda:7")] == [0, 0, 7]
    check_present("cuda:1", 2)
    with pytest.raises(BackendUnavailable, match=r"^device='cuda:99': there is 1 GPU, 'cuda:0'$"):
        check_present("cuda:99", 1)
    with pytest.raises(BackendUnavailable, match=r"^device='cuda:2': there are 2 GPUs"):
        check_present("cuda:2", 2)
    with pytest.raises(BackendUnavailable, match=r"^device='cuda:1': there is no GPU$"):
        check_present("cuda:1", 0)


class Session:
    """Imitates ONNX Runtime on a machine with GPUs. The arithmetic is done on the CPU."""

    made: list[Any]
    real = ort.InferenceSession

    def __init__(self, path: str, options: Any = None, providers: Any = None, **more: Any) -> None:
        type(self).made.append(providers)
        self._session = self.real(path, options, providers=["CPUExecutionProvider"])
        self._names = [provider if isinstance(provider, str) else provider[0] for provider in providers]

    def get_providers(self) -> list[str]:
        return self._names

    def io_binding(self) -> Any:
        return Binding(self._session.io_binding())

    def run_with_iobinding(self, binding: Any) -> None:
        self._session.run_with_iobinding(binding.real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


class Binding:
    """Records the devices of the outputs, and places the outputs on the CPU."""

    places: list[tuple[str, int]]

    def __init__(self, real: Any) -> None:
        self.real = real

    def bind_output(self, name: str, kind: str, index: int = 0) -> None:
        type(self).places.append((kind, index))
        self.real.bind_output(name, "cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ONNX Runtime with CUDA, on a machine with two GPUs."""
    Session.made, Binding.places = [], []
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", Session)
    monkeypatch.setattr(onnx, "gpu_count", lambda: 2)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(("device", "index"), [("cuda", 0), ("cuda:1", 1), (torch.device("cuda", 1), 1), (None, 0)])
def test_a_gpus_number_reaches_the_provider_and_the_bindings(device: Any, index: int) -> None:
    with higen.load(backend="onnx", device=device, threads=1, precision="fp32") as pipe:
        pipe("a red heart", steps=1, frames=2, width=32, height=32)
        details = {choice.details for choice in pipe.backend.choices.values()}
    assert Session.made
    for providers in Session.made:
        assert providers == [("CUDAExecutionProvider", {"device_id": 1} if index else {}), "CPUExecutionProvider"]
    assert set(Binding.places) == {("cuda", index)}
    assert details == {"cuda:1, fp32" if index else "cuda, fp32"}


@pytest.mark.usefixtures("gpus")
def test_a_gpu_that_is_not_there_is_refused_with_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendUnavailable, match="device='cuda:2': there are 2 GPUs"):
        higen.load(backend="onnx", device="cuda:2")
    monkeypatch.setattr(onnx, "gpu_count", lambda: None)  # without NVIDIA's driver the number is unknown
    assert OnnxBackend(BUNDLE, Options("cuda:2"))


def test_pytorch_says_how_many_there_are(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BackendUnavailable, match=r"^device='cuda:99': there is 1 GPU,"):
        TorchBackend(Bundle.open(tiny_model), Options("cuda:99"))
