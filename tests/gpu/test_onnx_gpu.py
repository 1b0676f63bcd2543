"""ONNX Runtime's CUDA provider: whole videos compared with the CPU's, half precision, the C++ runtime."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from gpu_video import PROMPT, Frames, largest, on_the_cpu, psnr, video

import higen
from higen.api import default_model
from higen.backends.cuda import gpu_count
from higen.bundle import Bundle
from higen.errors import BackendUnavailable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu_count(), reason="no NVIDIA GPU"),
    pytest.mark.skipif(
        "CUDAExecutionProvider" not in ort.get_available_providers(), reason="this is not onnxruntime-gpu"
    ),
]


@pytest.fixture(scope="module")
def expected() -> Frames:
    return on_the_cpu()


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model with additional float16 graphs."""
    pytest.importorskip("onnxscript")
    from higen.export.model_graphs import export_model

    model = Path(shutil.copytree(default_model(), tmp_path_factory.mktemp("half") / "model"))
    return export_model(Bundle.open(model), precision="fp16").path


def test_float32_gives_the_video_of_the_cpu(expected: Frames) -> None:
    with higen.load(backend="onnx", device="cuda") as pipe:
        frames = video(pipe)
        assert {choice.details for choice in pipe.backend.choices.values()} == {"cuda, fp32"}
    print(f"fp32: {psnr(frames, expected):.1f} dB, at most {largest(frames, expected)}/255")
    assert largest(frames, expected) <= 2  # only the order of summation differs


def test_cuda_is_taken_where_it_works(expected: Frames) -> None:
    with higen.load(backend="onnx") as pipe:
        frames = video(pipe)
        assert all(choice.details.startswith("cuda") for choice in pipe.backend.choices.values())
    assert largest(frames, expected) <= 2


def test_half_precision_keeps_the_video(expected: Frames, half: Path) -> None:
    with higen.load(half, "onnx", device="cuda") as pipe:
        frames = video(pipe)
        details = {stage: choice.details for stage, choice in pipe.backend.choices.items()}
    print(details, f"fp16: {psnr(frames, expected):.1f} dB, at most {largest(frames, expected)}/255")
    assert "cuda, fp16" in details.values()
    assert psnr(frames, expected) >= 35


def test_a_gpu_that_is_not_there_is_refused() -> None:
    count = gpu_count()
    with pytest.raises(BackendUnavailable, match=rf"device='cuda:{count}': there (is|are) {count} GPU"):
        higen.load(backend="onnx", device=f"cuda:{count}")


@pytest.mark.parametrize("provider", ["cuda", "auto"])
def test_the_c_plus_plus_runtime(expected: Frames, tmp_path: Path, provider: str) -> None:
    """HIGEN_RUN is the path of a built `higen-run`."""
    program = os.environ.get("HIGEN_RUN")
    if program is None:
        pytest.skip("HIGEN_RUN is not set")
    file = tmp_path / "video.npy"
    command = [program, default_model(), PROMPT, "-o", file, "--steps=10", "--seed=3", f"--provider={provider}"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    print(done.stdout, done.stderr)
    assert largest(np.load(file), expected) <= 2
