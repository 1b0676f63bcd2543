"""TensorRT on a real GPU. A plain test run leaves these tests out, and their authors have not run them so far.

python -m pytest -m gpu tests/gpu
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import higen
from higen.api import default_model
from higen.backends.cuda import Cuda, DeviceArray
from higen.backends.tensorrt_api import installed
from higen.bundle import Bundle
from higen.engines.model_engines import build_engines
from higen.engines.shapes import read_profile
from higen.engines.targets import RTX, parse_targets
from higen.errors import NoDevice, NoDriver

pytestmark = pytest.mark.gpu

PROMPT = "a red heart beating at night"


@pytest.fixture(scope="module")
def cuda() -> Any:
    """The first GPU."""
    try:
        opened = Cuda.open()
    except (NoDriver, NoDevice) as error:
        pytest.skip(str(error))
    yield opened
    opened.close()


def flavours(architecture: int) -> list[str]:
    """Targets that this machine can build for and run."""
    rtx = [f"rtx-sm{architecture}"] if installed("rtx") and architecture in RTX else []
    return rtx + (["tensorrt"] if installed("tensorrt") else [])


def test_memory_goes_there_and_back(cuda: Cuda) -> None:
    values = np.random.default_rng(0).standard_normal((3, 5, 7)).astype(np.float32)
    array = cuda.to_device(values)
    assert isinstance(array, DeviceArray)
    np.testing.assert_array_equal(array.numpy(), values)


@pytest.mark.parametrize("flavour", ["rtx", "tensorrt"])
def test_the_video_of_onnx_runtime(cuda: Cuda, tmp_path: Path, flavour: str) -> None:
    targets = [t for t in flavours(cuda.architecture) if t.startswith(flavour)]
    if not targets:
        pytest.skip(f"no {flavour} for SM{cuda.architecture} here")
    model = Path(shutil.copytree(default_model(), tmp_path / "model"))
    bundle = Bundle.open(model)
    build_engines(bundle, parse_targets(targets[0]), [read_profile("default", bundle.manifest)])
    with higen.load(model, "onnx", device="cpu") as pipe:
        expected = pipe(PROMPT, steps=10, seed=3, progress=False).frames
    with higen.load(model, "tensorrt") as pipe:
        for _ in range(3):  # plain execution, graph capture, graph replay
            frames = pipe(PROMPT, steps=10, seed=3, progress=False).frames
            # float32 on both: only the order of summation differs.
            assert np.abs(frames.astype(int) - expected).max() <= 2


def test_low_memory_gives_the_same_video(cuda: Cuda, tmp_path: Path) -> None:
    targets = flavours(cuda.architecture)
    if not targets:
        pytest.skip(f"no TensorRT for SM{cuda.architecture} here")
    model = Path(shutil.copytree(default_model(), tmp_path / "model"))
    bundle = Bundle.open(model)
    build_engines(bundle, parse_targets(targets[0]), [read_profile("default", bundle.manifest)])
    frames = []
    for low_memory in (False, True):
        with higen.load(model, "tensorrt", low_memory=low_memory) as pipe:
            frames.append(pipe(PROMPT, steps=4, seed=1, progress=False).frames)
    np.testing.assert_array_equal(*frames)
