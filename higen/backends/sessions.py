"""The options of every ONNX Runtime session."""

from __future__ import annotations

import contextlib
import io
import os
from functools import cache

import numpy as np
import onnxruntime as ort

from higen.errors import is_of_a_handler

__all__ = ["exact_int8", "load_cuda", "session_options", "waiting"]

U8_S8_PRODUCT = bytes.fromhex(
    "080a3a5c0a180a01610a0162120179220d4d61744d756c496e74656765721201675a130a0161120e0a0c080212080a0208010a0208045a130a"
    "0162120e0a0c080312080a0208040a02080162130a0179120e0a0c080612080a0208010a02080142040a001015"
)
"""An ONNX graph, opset 21: y = MatMulInteger(a, b) of a uint8 [1, 4] and b int8 [4, 1]."""


FEW_THREADS = 4
"""With more threads than this, they spin during a run: waking many threads for each operator takes longer."""


def waiting(threads: int | None) -> tuple[str, str]:
    """The configuration entry for how a session's threads wait for work.

    By default they spin, even for a while after a run. Each stage has its own session, so the threads of one stage
    slow down the next. With two threads that sleep instead, the built-in model's video takes a third less processor
    time, and no more wall time on an idle machine. More than FEW_THREADS threads spin, but only during a run.
    """
    sleeps = ("session.intra_op.allow_spinning", "0")
    return sleeps if (threads or _cores()) <= FEW_THREADS else ("session.force_spinning_stop", "1")


def _cores() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def exact_int8() -> tuple[str, str]:
    """The configuration entry that keeps int8 graphs exact on this processor and as fast as it can.

    Without VNNI, x86 processors add products of unsigned and signed 8-bit integers in pairs in 16 bits. These saturate:
    an int8 graph is then less accurate than was measured. With "1", ONNX Runtime multiplies unsigned by unsigned
    instead. That takes three times as long on processors with VNNI, whose sums do not saturate. A product that would
    saturate tells which kind this is.
    """
    name = "session.x64quantprecision"
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    largest = {"a": np.full((1, 4), 255, np.uint8), "b": np.full((4, 1), 127, np.int8)}
    try:
        session = ort.InferenceSession(U8_S8_PRODUCT, options, providers=["CPUExecutionProvider"])
        exact = int(session.run(None, largest)[0][0, 0]) == 4 * 255 * 127
    except Exception as error:  # ONNX Runtime's errors have no other common base
        if is_of_a_handler(error):
            raise
        exact = False  # a build without this operator
    return name, "0" if exact else "1"


def session_options(threads: int | None = None, severity: int = 3) -> ort.SessionOptions:
    """New options. With them, an int8 graph gives the same numbers on every processor.

    threads    of one operator; None: ONNX Runtime's choice
    severity   lowest level that is logged to stderr: 3 errors, 4 fatal errors
    """
    options = ort.SessionOptions()
    options.log_severity_level = severity
    options.add_session_config_entry(*exact_int8())
    options.add_session_config_entry(*waiting(threads))
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


@cache
def load_cuda() -> str:
    """Load the CUDA and cuDNN libraries that pip installed with onnxruntime-gpu, once per process.

    The system's loader does not search there. PyTorch loads them too, but need not be installed. Returns ONNX
    Runtime's messages about libraries that it did not find: "" if it found all.
    """
    load = getattr(ort, "preload_dlls", None)  # since ONNX Runtime 1.21
    said = io.StringIO()
    if load is not None:
        with contextlib.redirect_stdout(said):
            load()
    return said.getvalue().strip()
