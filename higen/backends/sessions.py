"""The options of every ONNX Runtime session."""

from __future__ import annotations

import contextlib
import io
import os
from functools import cache

import onnxruntime as ort

__all__ = ["load_cuda", "session_options", "waiting"]

EXACT_INT8 = ("session.x64quantprecision", "1")
"""Keeps int8 graphs exact on x86 processors without VNNI. There, products of unsigned and signed 8-bit integers are
added in pairs in 16 bits, which saturate: an int8 graph is then less accurate than was measured. With this entry ONNX
Runtime multiplies unsigned by unsigned there. It has no effect on other processors."""


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


def session_options(threads: int | None = None, severity: int = 3) -> ort.SessionOptions:
    """New options. With them, an int8 graph gives the same numbers on every processor.

    threads    of one operator; None: ONNX Runtime's choice
    severity   lowest level that is logged to stderr: 3 errors, 4 fatal errors
    """
    options = ort.SessionOptions()
    options.log_severity_level = severity
    options.add_session_config_entry(*EXACT_INT8)
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
