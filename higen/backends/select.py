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
from higen.backends.cuda import probe
from higen.bundle import Bundle, check_precision, stand_ins
from higen.errors import (
    BackendError,
    BackendUnavailable,
    EngineError,
    FallbackWarning,
    IntegrityError,
    MissingExtra,
    OutsideProfile,
    RequestError,
)

__all__ = [
    "BACKENDS",
    "Availability",
    "Choice",
    "Options",
    "StageRouter",
    "availability",
    "check_backend",
    "select_backend",
]

BACKENDS = ("tensorrt", "onnx", "torch")
"""Known backends, the preferred one first: a compiled way before the modules themselves."""

MAX_THREADS = 1024

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""What PyTorch calls the precisions."""

_PACKAGES = {
    "tensorrt": ("tensorrt", "tensorrt_rtx"),
    "onnx": ("onnxruntime",),
    "torch": ("torch", "diffusers", "transformers", "safetensors"),
}


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
        if backend == "tensorrt":
            reason = _without_tensorrt(missing)
        found.append(Availability(backend, not reason, reason))
    return found


def _without_tensorrt(missing: list[str]) -> str:
    """Why engines cannot run here: neither of the two libraries, or no GPU."""
    if len(missing) == len(_PACKAGES["tensorrt"]):
        return f"not installed: {' or '.join(missing)} (pip install 'higen[rtx]')"
    try:
        probe()
    except EngineError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def check_backend(name: str) -> str:
    """A backend's name or "auto". Raises RequestError for any other."""
    if name != "auto" and name not in BACKENDS:
        raise RequestError(f"backend={name!r}: one of 'auto', {', '.join(map(repr, BACKENDS))}")
    return name


@dataclass
class Choice:
    """What runs a stage, and the reason why each better backend was passed over. `details`: device and precision.

    `outside`: what ran it for shapes that its engine was not built for, once there were any.
    """

    stage: str
    backend: str
    passed_over: dict[str, str] = field(default_factory=dict)
    details: str = ""
    outside: Choice | None = None

    def as_lines(self) -> list[str]:
        """For a person: what runs the stage, then a line for each way passed over; the same for shapes outside."""
        lines = [
            f"{self.stage:<14}{self._runs()}",
            *(f"{'':<14}not {name}: {reason}" for name, reason in self.passed_over.items()),
        ]
        if self.outside is not None:
            reason = self.outside.passed_over.get(self.backend, "")
            lines.append(f"{'':<14}{self.outside._runs()} for other shapes: {reason}")
        return lines

    def _runs(self) -> str:
        return f"{self.backend} ({self.details})" if self.details else self.backend or "nothing"


class StageRouter:
    """Sends each stage to the best backend that can run it. A stage's backend is chosen when it is first used."""

    def __init__(self, bundle: Bundle, makers: Mapping[str, Callable[[], Backend]], absent: Mapping[str, str]) -> None:
        """`makers` make a backend by name, the preferred first; `absent` says why others cannot be made at all."""
        self.bundle = bundle
        self.choices: dict[str, Choice] = {}
        self._makers = dict(makers)
        self._absent = dict(absent)
        self._made: dict[str, Backend] = {}
        self._used: set[str] = set()
        self._warned: set[str] = set()
        self._choosing = threading.Lock()

    @property
    def name(self) -> str:
        """The backends in use, those for shapes outside of an engine's profiles included."""
        choices = list(self.choices.values())
        used = [*choices, *(choice.outside for choice in choices if choice.outside is not None)]
        return "+".join(sorted({choice.backend for choice in used})) or "auto"

    def prepare(self, stage: str) -> None:
        """Choose a stage's backend. Raises BackendUnavailable or the last way's own error where none works."""
        if stage not in self.choices:
            with self._choosing:
                if stage not in self.choices:
                    self.choices[stage] = self._choose(stage)

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        """Run a stage on its backend; tensors of another backend are brought to the host first.

        Shapes that an engine was not built for go to the next backend that can run the stage.
        """
        self.prepare(stage)
        choice = self.choices[stage]
        try:
            return self._run_on(choice, tensors)
        except OutsideProfile as error:
            with self._choosing:
                outside = choice.outside = choice.outside or self._choose(stage, choice.backend, error)
        return self._run_on(outside, tensors)

    def _run_on(self, choice: Choice, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        self._used.add(choice.backend)
        if len(self._used) > 1:
            tensors = {name: self.to_numpy(value) for name, value in tensors.items()}
        return self._made[choice.backend].run(choice.stage, **tensors)

    def to_numpy(self, tensor: Any) -> NDArray[Any]:
        """A tensor of any of the backends as a numpy array on the host."""
        for name in self._used:
            tensor = self._made[name].to_numpy(tensor) if not isinstance(tensor, np.ndarray) else tensor
        return np.asarray(tensor)

    def close(self) -> None:
        """Free every backend."""
        for backend in self._made.values():
            backend.close()
        self._made.clear()
        self.choices.clear()

    def _choose(self, stage: str, after: str | None = None, why: Exception | None = None) -> Choice:
        """The best backend for a stage, of those after the one named `after`, which `why` passes over."""
        passed_over = dict(self._absent)
        if after is not None:
            passed_over[after] = f"{type(why).__name__}: {why}"
        broken = why
        names = list(self._makers)
        for name in names if after is None else names[names.index(after) + 1 :]:
            make = self._makers[name]
            try:
                if name not in self._made:
                    self._made[name] = make()
                self._made[name].prepare(stage)
            except BackendUnavailable as error:
                passed_over[name] = str(error)
            except (IntegrityError, BackendError, MissingExtra) as error:
                passed_over[name], broken = f"{type(error).__name__}: {error}", error
            else:
                self._warn(stage, name, broken)
                describe: Callable[[str], str] = getattr(self._made[name], "describe", lambda _: "")
                # A way that is worse than the chosen one was not passed over, though it may be absent.
                better = BACKENDS[: BACKENDS.index(name)] if name in BACKENDS else tuple(passed_over)
                reasons = {other: passed_over[other] for other in better if other in passed_over}
                return Choice(stage, name, reasons, describe(stage))
        if broken is not None:
            raise broken
        listed = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
        raise BackendUnavailable(f"no backend can run {stage} here: {listed}")

    def _warn(self, stage: str, name: str, broken: Exception | None) -> None:
        """One warning for each cause: a machine without a GPU is no news for the second stage, nor is a clip whose
        shapes are outside of the profiles.
        """
        if broken is None:
            return
        outside = isinstance(broken, OutsideProfile)
        cause = OutsideProfile.__name__ if outside else str(broken)
        if cause not in self._warned:
            self._warned.add(cause)
            reason = f"{type(broken).__name__}: {broken}"
            hint = " (pipe.report() lists the stages)" if outside else ""
            warnings.warn(f"{stage} runs on {name}: {reason}{hint}", FallbackWarning, stacklevel=3)


@dataclass(frozen=True)
class Options:
    """How stages are run, whatever runs them; a backend takes what concerns it.

    device      "cpu", "cuda", and for torch "cuda:1", ...; None: a GPU if there is one that works
    precision   what the stages compute in (bundle.PRECISIONS and QUANTIZED); a stage without a graph in it is passed on
                to the next backend. None: each backend's choice for its device
    threads     CPU threads of one stage; None: the library's choice
    verify      check the sha256 of each file as it is loaded
    low_memory  one TensorRT engine on the GPU at a time

    Raises RequestError for a precision or a number of threads that no backend takes.
    """

    device: str | None = None
    precision: str | None = None
    threads: int | None = None
    verify: bool = True
    low_memory: bool = False

    def __post_init__(self) -> None:
        if self.precision is not None:
            check_precision(self.precision)
        if self.threads is not None and (type(self.threads) is not int or not 1 <= self.threads <= MAX_THREADS):
            raise RequestError(f"threads={self.threads!r}: a whole number from 1 to {MAX_THREADS}")


PLAIN = Options()


def select_backend(bundle: Bundle, name: str = "auto", options: Options = PLAIN) -> StageRouter:
    """A router over the named backend, or with "auto" over all that are installed.

    Raises RequestError for a name that is none, BackendUnavailable, saying why each is not here or that the model was
    never quantised to the precision, and IntegrityError where a file the chosen way needs is broken and no other way
    exists.
    """
    check_backend(name)
    if missing := bundle.not_quantized(options.precision):  # else every stage would stand in for itself
        raise BackendUnavailable(missing)
    wanted = [a for a in availability() if name in ("auto", a.backend)]
    absent = {a.backend: a.reason for a in wanted if not a.works}
    makers: dict[str, Callable[[], Backend]] = {}
    for candidate in wanted:
        # TensorRT says for each stage why its engine is not used; there may be none to ask for.
        if candidate.works or candidate.backend == "tensorrt":
            absent.pop(candidate.backend, None)
            makers[candidate.backend] = _maker(candidate.backend, bundle, options)
    if not makers:
        raise BackendUnavailable("; ".join(f"{backend}: {reason}" for backend, reason in absent.items()))
    return StageRouter(bundle, makers, absent)


def _maker(backend: str, bundle: Bundle, options: Options) -> Callable[[], Backend]:
    def tensorrt() -> Backend:
        from higen.backends.tensorrt import TensorrtBackend

        return TensorrtBackend(bundle, options.device, options.precision, options.verify, options.low_memory)

    def onnx() -> Backend:
        from higen.backends.onnx import OnnxBackend

        return OnnxBackend(bundle, options.device, options.precision, options.threads, options.verify)

    def torch() -> Backend:
        from higen.backends.torch import TorchBackend

        # A quantised model's other stages: PyTorch has nothing in fewer than 16 bits.
        plain = None if options.precision is None else stand_ins(options.precision)[-1]
        dtype = DTYPES[plain] if plain else None
        return TorchBackend(bundle, options.device, dtype, options.verify, options.threads)

    return {"tensorrt": tensorrt, "onnx": onnx, "torch": torch}[backend]
