"""Options of a run that all backends take."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from higen.devices import device_named
from higen.errors import RequestError, quoted
from higen.noise_schedule import is_whole
from higen.plain_values import plain
from higen.precision import check_precision

__all__ = ["PLAIN", "Options"]

MAX_THREADS = 1024


@dataclass(frozen=True)
class Options:
    """How stages are run, on any backend. A backend ignores options that do not concern it. None means the default.

    device      "cpu", "cuda", "cuda:1", ..., "openvino", "webgpu" or a torch.device; None or "auto": a GPU if there is
                one that works with CUDA
    precision   of the stages' computations (higen/precision.py). If a backend has no graph of a stage in it, the next
                backend is tried. None: each backend's choice for its device
    threads     CPU threads of one stage; None: the library's choice
    verify      check the sha256 of each file as it is loaded
    low_memory  one TensorRT engine on the GPU at a time

    Raises RequestError for a value that no backend takes.
    """

    device: str | None = None
    precision: str | None = None
    threads: int | None = None
    verify: bool = True
    low_memory: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is None:
                self._set(field.name, field.default)
        self._set("device", device_named(self.device))
        if self.precision is not None:
            check_precision(self.precision)
        self._set("threads", plain(self.threads))
        if self.threads is not None and not is_whole(self.threads, 1, MAX_THREADS):
            raise RequestError(f"threads={quoted(self.threads)}: a whole number from 1 to {MAX_THREADS}")
        for name in ("verify", "low_memory"):
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                raise RequestError(f"{name}={quoted(getattr(self, name))}: True or False")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


PLAIN = Options()
