"""Builds the C++ runtime (engines/cpp) once for all tests, with the address and the undefined-behaviour sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from higen.api import default_model
from higen.locks import locked

SOURCE = Path(__file__).resolve().parents[1] / "engines" / "cpp"


def unavailable(reason: str) -> None:
    """Skip the test, or fail it where the C++ runtime must be tested (continuous integration)."""
    if os.environ.get("HIGEN_REQUIRE_CPP"):
        pytest.fail(reason)
    pytest.skip(reason)


def done(*command: object, timeout: float = 600, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program that must succeed."""
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=timeout, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result


def run_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this test run share."""
    base = factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


@pytest.fixture(scope="session")
def onnxruntime_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Headers and library of ONNX Runtime, or a skip that says what is missing."""
    for program in ("cmake", "c++"):
        if shutil.which(program) is None:
            unavailable(f"{program} is not installed: apt-get install cmake g++ nlohmann-json3-dev")
    probe = subprocess.run(
        ["c++", "-E", "-x", "c++", "-"], input="#include <nlohmann/json.hpp>", capture_output=True, text=True
    )
    if probe.returncode:
        unavailable("no nlohmann/json.hpp: apt-get install nlohmann-json3-dev")
    if given := os.environ.get("ONNXRUNTIME_ROOT"):
        return given
    folder = run_folder(tmp_path_factory) / "onnxruntime"
    with locked(folder.with_suffix(".lock")):
        if not folder.is_dir():
            command = [SOURCE / "get_onnxruntime.sh", folder, sys.executable]
            made = subprocess.run(command, capture_output=True, text=True)
            if made.returncode:
                unavailable(f"no headers of ONNX Runtime (set ONNXRUNTIME_ROOT): {made.stderr.strip()[-300:]}")
    return str(folder)


@pytest.fixture(scope="session")
def built(onnxruntime_root: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build folder; HIGEN_CPP_BUILD names one to reuse. The first worker builds, the others wait for it."""
    folder = Path(os.environ.get("HIGEN_CPP_BUILD") or run_folder(tmp_path_factory) / "cpp")
    with locked(run_folder(tmp_path_factory) / "cpp.lock"):
        done(
            "cmake", "-S", SOURCE, "-B", folder, "-DCMAKE_BUILD_TYPE=Debug", "-DHIGEN_SANITIZE=ON",
            "-DCMAKE_CXX_FLAGS_DEBUG=-Og", "-DCMAKE_C_FLAGS_DEBUG=-Og", f"-DONNXRUNTIME_ROOT={onnxruntime_root}",
            f"-DHIGEN_TEST_MODEL={default_model()}",
        )  # fmt: skip
        done("cmake", "--build", folder, "--parallel", len(os.sched_getaffinity(0)), timeout=1200)
    return folder
