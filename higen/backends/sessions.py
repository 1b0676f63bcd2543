"""The options of every ONNX Runtime session."""

from __future__ import annotations

import contextlib
import io
import os
from functools import cache

import onnxruntime as ort

__all__ = ["load_cuda", "session_options", "waiting"]

EXACT_INT8 = ("session.x64quantprecision", "1")
"""On an x86 processor without VNNI the product of unsigned by signed 8-bit integers adds pairs in 16 bits, which
saturate: an int8 graph is then worse than was measured. With this entry ONNX Runtime multiplies unsigned by unsigned
there. It has no effect on other processors."""


FEW_THREADS = 4
"""A session with more threads lets them spin while it runs: to wake many for each operator takes longer."""


def waiting(threads: int | None) -> tuple[str, str]:
    """The entry that says how a session's threads wait for work.

    ONNX Runtime lets them spin, and for a while after a run, too: each stage has a session, so the threads of one
    take the processor from the next. Two threads that sleep instead need a third less processor time for the built-in
    model's video, and no more wall time on an idle machine. More than FEW_THREADS spin, but only during a run.
    """
    sleeps = ("session.intra_op.allow_spinning", "0")
    return sleeps if (threads or _cores()) <= FEW_THREADS else ("session.force_spinning_stop", "1")


def _cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def session_options(threads: int | None = None, severity: int = 3) -> ort.SessionOptions:
    """New options: the same numbers on every processor.

    threads    of one operator; None: ONNX Runtime's choice
    severity   of what it logs to stderr: 3 errors, 4 what ends the process
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
    """Load the libraries of CUDA and cuDNN that pip installed beside onnxruntime-gpu, once a process.

    The loader of the system does not look there, and PyTorch, which loads them too, need not be installed. Returns what
    ONNX Runtime says of those that it did not find: "" if it has all.
    """
    load = getattr(ort, "preload_dlls", None)  # since 1.21
    said = io.StringIO()
    if load is not None:
        with contextlib.redirect_stdout(said):
            load()
    return said.getvalue().strip()
