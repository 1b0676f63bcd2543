"""A file changed while its model is open is never mixed in: an error reports it, or the loaded data stays."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from higen.api import default_model
from higen.backends.onnx import OnnxBackend
from higen.backends.options import Options
from higen.backends.torch import TorchBackend
from higen.bundle import Bundle
from higen.errors import IntegrityError

WEIGHTS, FIRST, SECOND = "unet.safetensors", "conditioner", "spatial_unet_plain"
Backend = OnnxBackend | TorchBackend


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(default_model(), tmp_path / "model"))


@pytest.fixture(params=[OnnxBackend, TorchBackend])
def kind(request: pytest.FixtureRequest) -> type[Backend]:
    found: type[Backend] = request.param
    return found


@pytest.fixture(params=[True, False], ids=["verified", "unverified"])
def backend(model: Path, kind: type[Backend], request: pytest.FixtureRequest) -> Iterator[Backend]:
    """A backend with its first stage loaded."""
    made = kind(Bundle.open(model), Options(device="cpu", verify=request.param))
    made.prepare(FIRST)
    yield made
    made.close()


def altered(content: bytes) -> bytes:
    """Flips one bit of one weight."""
    changed = bytearray(content)
    changed[-1000] ^= 1
    return bytes(changed)


def inputs(backend: Backend) -> dict[str, Any]:
    stage = backend.bundle.manifest.stage(FIRST)
    sizes = {**backend.bundle.manifest.fixed, "B": 1, "F": 2}
    kinds = {"float32": np.float32, "int64": np.int64}
    return {t.name: np.ones([sizes.get(n, n) for n in t.shape], kinds[t.dtype]) for t in stage.inputs}


def result(backend: Backend) -> np.ndarray:
    return np.concatenate([backend.to_numpy(v).ravel() for v in backend.run(FIRST, **inputs(backend)).values()])


def test_a_stage_that_is_loaded_later_does_not_take_replaced_weights(
    backend: Backend, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(backend, TorchBackend):  # its stages share one network, so another, later file is used
        name, later = "vae.safetensors", "vae_decoder"
        backend.bundle.file(name, verify=False)
    else:
        name, later = WEIGHTS, SECOND
    before = result(backend)
    (model / "other").write_bytes(altered((model / name).read_bytes()))
    (model / "other").replace(model / name)
    with pytest.raises(IntegrityError, match=rf"{name}: was replaced while the model was open; load the model again"):
        backend.prepare(later)
    assert np.array_equal(result(backend), before)  # the loaded stage is unchanged


def test_weights_that_are_written_to_are_noticed_before_the_next_run(backend: Backend, model: Path) -> None:
    """The weights may be memory-mapped; a loaded stage would then compute with a mix of old and new weights."""
    result(backend)
    with (model / WEIGHTS).open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(IntegrityError, match=rf"{WEIGHTS}: was replaced while the model was open"):
        result(backend)


def test_the_same_contents_are_not_a_change(backend: Backend, model: Path) -> None:
    before = result(backend)
    os.link(model / WEIGHTS, model / "link")  # as a Triton repository does
    (model / WEIGHTS).chmod(0o600)
    os.utime(model / WEIGHTS)
    assert np.array_equal(result(backend), before)
    shutil.copyfile(model / WEIGHTS, model / "copy")
    (model / "copy").replace(model / WEIGHTS)
    backend.prepare(SECOND)
    assert np.array_equal(result(backend), before)


def test_weights_that_are_replaced_as_they_are_loaded(
    model: Path, kind: type[Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(model)
    real = Bundle.file
    calls = []

    def file(self: Bundle, name: str, verify: bool = True) -> Path:
        path = real(self, name, verify)
        if name == WEIGHTS and not calls:
            calls.append(name)
            (model / "other").write_bytes(altered(path.read_bytes()))
            (model / "other").replace(path)
        return path

    monkeypatch.setattr(Bundle, "file", file)
    with pytest.raises(IntegrityError, match="was replaced while the model was open"):
        kind(bundle, Options(device="cpu")).prepare(FIRST)
    assert calls
