"""Sessions of ONNX Runtime: one set of options everywhere, and 8-bit products that are exact on every processor."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from higen import cpu
from higen.api import default_model
from higen.backends.onnx import OnnxBackend
from higen.backends.options import Options
from higen.backends.sessions import load_cuda, session_options
from higen.bundle import Bundle

ROOT = Path(__file__).resolve().parents[1]
NAME = "session.x64quantprecision"


def test_the_option_is_set() -> None:
    assert session_options().get_session_config_entry(NAME) == "1"
    assert session_options(threads=3).intra_op_num_threads == 3


@pytest.mark.parametrize(("threads", "cores", "sleeps"), [(1, 64, True), (4, 64, True), (5, 2, False), (None, 2, True)])
def test_few_threads_sleep_while_they_wait(
    monkeypatch: pytest.MonkeyPatch, threads: int | None, cores: int, sleeps: bool
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    options = session_options(threads)
    name, value = ("intra_op.allow_spinning", "0") if sleeps else ("force_spinning_stop", "1")
    assert options.get_session_config_entry(f"session.{name}") == value


def test_nothing_else_makes_options_or_a_session_without_them() -> None:
    """Checks higen's own Python sources, including the stand-in for the Triton server's backend."""
    made: list[str] = []
    for folder in ("higen", "export", "engines", "benchmarks"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                if node.func.attr == "SessionOptions" and NAME not in file.read_text(encoding="utf-8"):
                    made.append(str(file))
                if node.func.attr == "InferenceSession":
                    assert len(node.args) > 1, f"{file}: a session without options"
    assert made == []


def test_every_session_of_the_backend_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    session, seen = ort.InferenceSession, []

    def recorded(path: str, options: ort.SessionOptions, **rest: object) -> object:
        seen.append(options.get_session_config_entry(NAME))
        return session(path, options, **rest)

    monkeypatch.setattr(ort, "InferenceSession", recorded)
    backend = OnnxBackend(Bundle.open(default_model()), Options("cpu", threads=1))
    backend.prepare("text_encoder")
    backend.prepare("vae_decoder")
    assert seen == ["1", "1"]


def layer() -> tuple[bytes, NDArray[np.float32], NDArray[np.float64]]:
    """An 8-bit layer as `quantize` writes it, inputs with product pairs that sum past 16 bits, and the exact result."""
    random = np.random.default_rng(0)
    weight, x = random.integers(100, 128, (64, 32)).astype(np.int8), random.random((8, 64), np.float32) * 0.3 + 0.7
    scale_x, scale_w = np.float32(1 / 255), np.float32(0.01)
    constants = {"w": weight, "sx": scale_x, "zx": np.uint8(0), "sw": scale_w, "zw": np.int8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "sx", "zx"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "sx", "zx"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["v"]),
        helper.make_node("MatMul", ["d", "v"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (8, 32))],
        [numpy_helper.from_array(np.array(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    exact = np.rint(x / scale_x).astype(np.float64) @ weight.astype(np.float64) * scale_x * scale_w
    return model.SerializeToString(), x, exact


def error_of_a_layer() -> float:
    """The error of this processor's fused integer kernels for that layer, relative to the largest value."""
    model, x, exact = layer()
    session = ort.InferenceSession(model, session_options(threads=1), providers=["CPUExecutionProvider"])
    return float(np.abs(session.run(None, {"x": x})[0] - exact).max() / np.abs(exact).max())


def test_products_in_8_bits_are_exact() -> None:
    assert error_of_a_layer() < 1e-6


@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-user, which plays an older processor")
def test_products_in_8_bits_are_exact_without_vnni() -> None:
    """Runs on an emulated Haswell. Without the option, the same layer is off by 0.36 there."""
    paths = [str(ROOT / "tests"), str(ROOT), *filter(None, sys.path)]
    code = "import test_sessions; print(test_sessions.error_of_a_layer())"
    ran = subprocess.run(
        ["qemu-x86_64", "-cpu", "Haswell", os.path.realpath(sys.executable), "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert float(ran.stdout) < 1e-6


# Descriptions of a processor's integer products.


@pytest.mark.parametrize(
    ("machine", "listed", "said"),
    [
        ("x86_64", "flags\t\t: fpu avx2 avx512f avx512_vnni", "unsigned by signed (with VNNI)"),
        ("AMD64", "flags : avx2 avx_vnni", "unsigned by signed (with VNNI)"),
        ("x86_64", "flags : fpu avx2 avx512f", "unsigned by unsigned (same results, but slower without VNNI)"),
        ("x86_64", "", "unsigned by signed (with VNNI), otherwise unsigned by unsigned"),
        ("x86_64", None, "unsigned by signed (with VNNI), otherwise unsigned by unsigned"),
        ("aarch64", "Features : fp asimd bf16 i8mm", "signed by signed"),
    ],
)
def test_the_kernels_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, listed: str | None, said: str
) -> None:
    play(monkeypatch, tmp_path, listed)
    monkeypatch.setattr(cpu.platform, "machine", lambda: machine)
    assert cpu.int8_products() == said


@pytest.mark.parametrize(
    ("listed", "has"),
    [
        ("processor : 0\nflags : fpu avx512f avx512_bf16\n\nprocessor : 1\nflags : fpu", True),
        ("flags : amx_bf16", True),
        ("Features : fp asimd bf16", True),
        ("flags : fpu avx2 avx512f avx512_vnni", False),
        (None, None),
    ],
)
def test_support_of_bfloat16_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str | None, has: object
) -> None:
    play(monkeypatch, tmp_path, listed)
    assert cpu.has_bf16() is has


def play(monkeypatch: pytest.MonkeyPatch, folder: Path, listed: str | None) -> None:
    """Replace the system's list of processors by `listed`; None stands for no list."""
    if listed is not None:
        (folder / "cpuinfo").write_text(listed)
    monkeypatch.setattr(cpu, "CPUINFO", folder / "cpuinfo")
    monkeypatch.setattr(cpu, "flags", cpu.flags.__wrapped__)


def test_what_onnx_runtime_says_of_missing_cuda_libraries_is_kept_not_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def preload_dlls() -> None:
        calls.append(1)
        print("Failed to load libcudnn.so.9: no such file")

    monkeypatch.setattr(ort, "preload_dlls", preload_dlls, raising=False)
    load_cuda.cache_clear()
    try:
        assert [load_cuda(), load_cuda()] == ["Failed to load libcudnn.so.9: no such file"] * 2
    finally:
        load_cuda.cache_clear()
    assert (len(calls), capsys.readouterr().out) == (1, "")
