"""Which backend runs each stage of a model here, and why the better ones do not (design, section 5)."""

from __future__ import annotations

import importlib.util
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen.backends.base import Backend
from higen.bundle import Bundle, check_precision
from higen.errors import BackendError, BackendUnavailable, FallbackWarning, IntegrityError, MissingExtra, RequestError

__all__ = ["BACKENDS", "Availability", "Choice", "StageRouter", "availability", "check_backend", "select_backend"]

BACKENDS = ("onnx", "torch")
"""Known backends, the preferred one first: a compiled way before the modules themselves."""

MAX_THREADS = 1024

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""What PyTorch calls the precisions."""

_PACKAGES = {"onnx": ("onnxruntime",), "torch": ("torch", "diffusers", "transformers", "safetensors")}


@dataclass(frozen=True)
class Availability:
    """Whether a backend can work in this environment; `reason` says what is missing where it cannot."""

    backend: str
    works: bool
    reason: str = ""


def availability() -> list[Availability]:
    """Every known backend, in order of preference, with the reason why it cannot work here."""
    found = []
    for backend in BACKENDS:
        missing = [package for package in _PACKAGES[backend] if importlib.util.find_spec(package) is None]
        reason = f"not installed: {', '.join(missing)} (pip install 'higen[{backend}]')" if missing else ""
        found.append(Availability(backend, not missing, reason))
    return found


def check_backend(name: str) -> str:
    """A backend's name or "auto". Raises RequestError for any other."""
    if name != "auto" and name not in BACKENDS:
        raise RequestError(f"backend={name!r}: one of 'auto', {', '.join(map(repr, BACKENDS))}")
    return name


@dataclass
class Choice:
    """What runs a stage, and the reason why each better backend was passed over. `details`: device and precision."""

    stage: str
    backend: str
    passed_over: dict[str, str] = field(default_factory=dict)
    details: str = ""

    def as_lines(self) -> list[str]:
        """For a person: what runs the stage, then a line for each way passed over."""
        runs = f"{self.backend} ({self.details})" if self.details else self.backend or "nothing"
        return [
            f"{self.stage:<14}{runs}",
            *(f"{'':<14}not {name}: {reason}" for name, reason in self.passed_over.items()),
        ]


class StageRouter:
    """Sends each stage to the best backend that can run it. A stage's backend is chosen when it is first used."""

    def __init__(self, bundle: Bundle, makers: Mapping[str, Callable[[], Backend]], absent: Mapping[str, str]) -> None:
        """`makers` make a backend by name, the preferred first; `absent` says why others cannot be made at all."""
        self.bundle = bundle
        self.choices: dict[str, Choice] = {}
        self._makers = dict(makers)
        self._absent = dict(absent)
        self._made: dict[str, Backend] = {}
        self._choosing = threading.Lock()

    @property
    def name(self) -> str:
        """The backends in use."""
        return "+".join(sorted({choice.backend for choice in self.choices.values()})) or "auto"

    def prepare(self, stage: str) -> None:
        """Choose a stage's backend. Raises BackendUnavailable or the last way's own error where none works."""
        if stage not in self.choices:
            with self._choosing:
                if stage not in self.choices:
                    self.choices[stage] = self._choose(stage)

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        """Run a stage on its backend; tensors of another backend are brought to the host first."""
        self.prepare(stage)
        backend = self._made[self.choices[stage].backend]
        if len(self._made) > 1:
            tensors = {name: self.to_numpy(value) for name, value in tensors.items()}
        return backend.run(stage, **tensors)

    def to_numpy(self, tensor: Any) -> NDArray[Any]:
        """A tensor of any of the backends as a numpy array on the host."""
        for backend in self._made.values():
            tensor = backend.to_numpy(tensor) if not isinstance(tensor, np.ndarray) else tensor
        return np.asarray(tensor)

    def close(self) -> None:
        """Free every backend."""
        for backend in self._made.values():
            backend.close()
        self._made.clear()
        self.choices.clear()

    def _choose(self, stage: str) -> Choice:
        passed_over = dict(self._absent)
        broken: Exception | None = None
        for name, make in self._makers.items():
            try:
                if name not in self._made:
                    self._made[name] = make()
                self._made[name].prepare(stage)
            except BackendUnavailable as error:
                passed_over[name] = str(error)
            except (IntegrityError, BackendError, MissingExtra) as error:
                passed_over[name], broken = str(error), error
            else:
                if broken is not None:
                    warnings.warn(f"{stage} runs on {name}: {broken}", FallbackWarning, stacklevel=2)
                describe: Callable[[str], str] = getattr(self._made[name], "describe", lambda _: "")
                return Choice(stage, name, passed_over, describe(stage))
        if broken is not None:
            raise broken
        reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
        raise BackendUnavailable(f"no backend can run {stage} here: {reasons}")


def select_backend(
    bundle: Bundle,
    name: str = "auto",
    *,
    device: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    verify: bool = True,
) -> StageRouter:
    """A router over the named backend, or with "auto" over all that are installed.

    `precision` (bundle.PRECISIONS) is what the stages compute in; a stage without a graph in it is passed on to the
    next backend. None: each backend's choice for its device. `threads` that a stage may use on a CPU.

    Raises RequestError for an option that no backend takes, BackendUnavailable, saying why each is not here, and
    IntegrityError where a file the chosen way needs is broken and no other way exists.
    """
    check_backend(name)
    if precision is not None:
        check_precision(precision)
    if threads is not None and (type(threads) is not int or not 1 <= threads <= MAX_THREADS):
        raise RequestError(f"threads={threads!r}: a whole number from 1 to {MAX_THREADS}")
    wanted = [a for a in availability() if name in ("auto", a.backend)]
    absent = {a.backend: a.reason for a in wanted if not a.works}
    makers: dict[str, Callable[[], Backend]] = {}
    for candidate in wanted:
        if candidate.works:
            makers[candidate.backend] = _maker(candidate.backend, bundle, device, precision, threads, verify)
    if not makers:
        raise BackendUnavailable("; ".join(f"{backend}: {reason}" for backend, reason in absent.items()))
    return StageRouter(bundle, makers, absent)


def _maker(
    backend: str, bundle: Bundle, device: str | None, precision: str | None, threads: int | None, verify: bool
) -> Callable[[], Backend]:
    def onnx() -> Backend:
        from higen.backends.onnx import OnnxBackend

        return OnnxBackend(bundle, device, precision, threads, verify)

    def torch() -> Backend:
        from higen.backends.torch import TorchBackend

        return TorchBackend(bundle, device, DTYPES[precision] if precision else None, verify, threads)

    return {"onnx": onnx, "torch": torch}[backend]
