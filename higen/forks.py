"""Handles processes that were forked from one with a model: they have a copy of its memory, but not its threads."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any
from weakref import WeakSet

from higen.errors import BackendError

__all__ = ["Home", "inherited", "outlives_forks"]

_THREADED: WeakSet[Any] = WeakSet()
_INHERITED: set[str] = set()


class Home:
    """The process that made an object. In a forked process, the object would wait for threads that do not exist."""

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def here(self) -> bool:
        """Whether this is that process."""
        return os.getpid() == self._process

    def check(self) -> None:
        """Raise BackendError in any other process. Call this before taking a lock: its holder may not exist here."""
        if not self.here:
            raise BackendError(
                f"the model was loaded in process {self._process}, from which this one ({os.getpid()}) was forked: "
                "call higen.load here, or start processes by 'spawn'"
            )


def outlives_forks(thing: object) -> None:
    """Ensure that forked processes never free an object: that would wait for threads that do not exist there."""
    _THREADED.add(thing)


def inherited(module: str) -> bool:
    """Whether this process was forked from one that had imported `module`, "torch" or "onnxruntime"."""
    return module in _INHERITED


def _after_fork() -> None:
    for thing in list(_THREADED):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
    _INHERITED.update({"torch", "onnxruntime"} & sys.modules.keys())
    if "onnxruntime" in sys.modules:
        _leave_without_libraries()


def _leave_without_libraries() -> None:
    """Once Python itself has ended, end this process as `os._exit` does, with the same status.

    ONNX Runtime (at least 1.32) starts a thread when it is imported and waits for it when the process ends, so a forked
    process would never end. Exit handlers run in reverse order, so this one runs before the library's.
    """
    c = ctypes.CDLL(None)
    if hasattr(c, "on_exit"):  # only glibc has it
        c.on_exit(c._exit, None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
