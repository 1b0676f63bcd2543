"""Chooses the backend of each stage and records why better ones cannot run it here (design, section 6)."""

from __future__ import annotations

import importlib.util
import threading
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen.backends.base import CLOSED, Backend, Choice, LoadsAhead
from higen.backends.cuda import probe
from higen.backends.options import PLAIN, Options
from higen.bundle import Bundle
from higen.devices import PLUGIN_DEVICES
from higen.errors import (
    BackendError,
    BackendUnavailable,
    EngineError,
    FallbackWarning,
    HigenError,
    IntegrityError,
    MissingExtra,
    NotPicklable,
    OutOfMemory,
    OutsideProfile,
    RequestError,
    quoted,
)
from higen.forks import Home
from higen.memory import enough_memory

__all__ = [
    "BACKENDS",
    "Availability",
    "StageRouter",
    "availability",
    "check_backend",
    "select_backend",
]

BACKENDS = ("tensorrt", "onnx", "torch")
"""Known backends, the preferred one first: compiled ones before the PyTorch modules."""

_PACKAGES = {
    "tensorrt": ("tensorrt", "tensorrt_rtx"),
    "onnx": ("onnxruntime",),
    "torch": ("torch", "diffusers", "transformers", "safetensors"),
}


@dataclass(frozen=True)
class Availability:
    """Whether a backend, or a plugin's device, can work in this environment. If it cannot, `reason` says why."""

    backend: str
    works: bool
    reason: str = ""


def availability() -> list[Availability]:
    """Every known backend in order of preference: whether it can work here, and if not, why."""
    found = []
    for backend in BACKENDS:
        missing = [package for package in _PACKAGES[backend] if importlib.util.find_spec(package) is None]
        reason = f"not installed: {', '.join(missing)} (pip install 'higen[{backend}]')" if missing else ""
        if backend == "tensorrt":
            reason = _without_tensorrt(missing)
        found.append(Availability(backend, not reason, reason))
    return found


def _without_tensorrt(missing: list[str]) -> str:
    """Why engines cannot run here: neither library is installed, or there is no GPU. Empty if they can."""
    if len(missing) == len(_PACKAGES["tensorrt"]):
        return f"not installed: {' or '.join(missing)} (pip install 'higen[rtx]')"
    try:
        probe()
    except EngineError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def check_backend(name: str | None) -> str:
    """A backend's name or "auto" (the default for None). Raises RequestError for any other value."""
    name = "auto" if name is None else name
    if not isinstance(name, str) or name not in ("auto", *BACKENDS):
        raise RequestError(f"backend={quoted(name)}: one of 'auto', {', '.join(map(repr, BACKENDS))}")
    return name


class StageRouter:
    """Runs each stage on the best backend that can. A stage's backend is chosen when the stage is first used."""

    def __init__(
        self,
        bundle: Bundle,
        makers: Mapping[str, Callable[[], Backend]],
        absent: Mapping[str, str],
        asked: tuple[str, Options] | None = None,
        idle: Collection[str] = (),
    ) -> None:
        """`makers`: functions that make the backends, by name, the preferred one first. `absent`: why each other one
        cannot be made. `asked`: the arguments of `select_backend`, to call it again in another process. `idle`: those
        of the makers' backends that cannot run any stage here.
        """
        self.bundle = bundle
        self._asked = asked
        self._idle = frozenset(idle)
        self._choices: dict[str, Choice] = {}
        self._served: dict[tuple[str, ...], str] = {}
        self._makers = dict(makers)
        self._absent = dict(absent)
        self._made: dict[str, Backend] = {}
        self._used: set[str] = set()
        self._warned: set[str] = set()
        self._choosing = threading.Lock()
        self._closed = False
        self._home = Home()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as the arguments of `select_backend`: another process calls it again."""
        if self._closed:
            raise BackendError(CLOSED)
        if self._asked is None:
            raise NotPicklable("these backends cannot be sent to another process: call higen.load there")
        return select_backend, (self.bundle, *self._asked)

    @property
    def name(self) -> str:
        """The backends in use, including those for shapes outside an engine's profiles."""
        choices = list(self.choices.values())
        used = [*choices, *(choice.outside for choice in choices if choice.outside is not None)]
        return "+".join(sorted({choice.backend for choice in used})) or "auto"

    @property
    def choices(self) -> Mapping[str, Choice]:
        """See `Backend.choices`."""
        return dict(self._choices)

    def prepare(self, stage: str) -> None:
        """Choose a stage's backend. If none works, raises the error of the last that failed or BackendUnavailable."""
        self.choose(stage)

    def choose(self, *stages: str) -> str:
        """See `Backend.choose`. A better backend matters more than a better stage."""
        self._check_open()
        served = self._served.get(stages)
        if served is None:
            with self._choosing:
                self._check_open()  # another thread may have closed the router meanwhile
                served = self._served.get(stages) or self._choose(stages).stage
                self._served[stages] = served
        return served

    def load_ahead(self, ways: Sequence[tuple[str, ...]]) -> None:
        """See `LoadsAhead`. Only the most preferred backend that works here does it: it may run none of the stages."""
        name = next((name for name in self._makers if name not in self._idle), None)
        if name is None:
            return
        with self._choosing:
            self._check_open()
            try:
                backend = self._made[name] = self._made.get(name) or self._make(name)
            except HigenError:  # `choose` meets the same error and decides what it means
                return
        if isinstance(backend, LoadsAhead):
            backend.load_ahead([names for names in ways if names not in self._served])

    def describe(self, stage: str) -> str:
        """See `Backend.describe`."""
        self.prepare(stage)
        return self._choices[stage].details

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        """Run a stage on its backend. Tensors of another backend are copied to the host first.

        If an engine was not built for the shapes, the next backend that can run the stage runs it. Raises BackendError
        after `close`.
        """
        self._check_open()
        if stage not in self._choices:
            self.prepare(stage)
        choice = self._choices[stage]
        try:
            return self._run_on(choice, tensors)
        except OutsideProfile as error:
            with self._choosing:
                self._check_open()
                outside = choice.outside = choice.outside or self._choose((stage,), choice.backend, error)
        return self._run_on(outside, tensors)

    def _run_on(self, choice: Choice, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        self._used.add(choice.backend)
        if len(self._used) > 1:
            tensors = {name: self.to_numpy(value) for name, value in tensors.items()}
        return self._made[choice.backend].run(choice.stage, **tensors)

    def to_numpy(self, tensor: Any) -> NDArray[Any]:
        """A tensor of any of the backends as a numpy array on the host."""
        for name in tuple(self._used):
            tensor = self._made[name].to_numpy(tensor) if not isinstance(tensor, np.ndarray) else tensor
        return np.asarray(tensor)

    def close(self) -> None:
        """Free every backend. Waits for a stage that is being loaded."""
        if not self._home.here:  # the backends belong to the parent process
            return
        with self._choosing:
            self._closed = True
        for backend in self._made.values():
            backend.close()

    def _check_open(self) -> None:
        self._home.check()
        if self._closed:
            raise BackendError(CLOSED)

    def _choose(self, stages: tuple[str, ...], after: str | None = None, why: Exception | None = None) -> Choice:
        """Choose the best backend that can run one of the stages.

        `after`: try only the backends after this one; `why`: the error for which it is passed over.
        """
        passed_over = dict(self._absent)
        if after is not None:
            passed_over[after] = f"{type(why).__name__}: {why}"
        broken = why
        names = list(self._makers)
        for name in names if after is None else names[names.index(after) + 1 :]:
            try:
                if name not in self._made:
                    self._made[name] = self._make(name)
                stage = self._made[name].choose(*stages)
            except OutOfMemory as error:
                if name != "tensorrt":  # other backends share the host's memory; engines use the GPU's
                    raise
                passed_over[name], broken = f"{type(error).__name__}: {error}", error
            except BackendUnavailable as error:
                passed_over[name] = str(error)
            except (IntegrityError, BackendError, MissingExtra) as error:
                passed_over[name], broken = f"{type(error).__name__}: {error}", error
            else:
                self._warn(stage, name, broken)
                # Backends worse than the chosen one were not passed over, even if they are absent.
                better = BACKENDS[: BACKENDS.index(name)] if name in BACKENDS else tuple(passed_over)
                reasons = {other: passed_over[other] for other in better if other in passed_over}
                choice = Choice(stage, name, reasons, self._made[name].describe(stage))
                if after is None:
                    choice = self._choices.setdefault(stage, choice)
                return choice
        if broken is not None:
            raise broken
        listed = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
        raise BackendUnavailable(f"no backend can run {' or '.join(stages)} here: {listed}")

    def _make(self, name: str) -> Backend:
        """Make a backend. Raises its errors, and BackendUnavailable if its library is installed but does not load."""
        try:
            with enough_memory(name):
                return self._makers[name]()
        except MissingExtra:
            raise
        except ImportError as error:
            raise BackendUnavailable(f"{name} is installed but does not load: {error}") from error

    def _warn(self, stage: str, name: str, broken: Exception | None) -> None:
        """Warn once for each cause, such as no GPU, and not again for each stage. All shapes outside the profiles count
        as one cause.
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


def select_backend(bundle: Bundle, name: str = "auto", options: Options = PLAIN) -> StageRouter:
    """A router over the named backend, or over all installed backends if the name is "auto". On a plugin's device
    "auto" is "onnx".

    Raises RequestError for an unknown name. Raises BackendUnavailable, with the reasons, if no backend is here or if
    the model was never quantised to the precision. Raises IntegrityError if a file that the chosen backend needs is
    damaged and no other backend can be used.
    """
    check_backend(name)
    if missing := bundle.not_quantized(options.precision):  # else each stage would silently use the base precision
        raise BackendUnavailable(missing)
    if name == "auto" and options.device in PLUGIN_DEVICES:
        name = "onnx"
    wanted = [a for a in availability() if name in ("auto", a.backend)]
    absent = {a.backend: a.reason for a in wanted if not a.works}
    makers: dict[str, Callable[[], Backend]] = {}
    for candidate in wanted:
        # Keep TensorRT even if it does not work here: it tells for each stage why no engine is used.
        if candidate.works or candidate.backend == "tensorrt":
            absent.pop(candidate.backend, None)
            makers[candidate.backend] = _maker(candidate.backend, bundle, options)
    if not makers:
        raise BackendUnavailable("; ".join(f"{backend}: {reason}" for backend, reason in absent.items()))
    idle = [candidate.backend for candidate in wanted if not candidate.works]
    return StageRouter(bundle, makers, absent, (name, options), idle)


def _maker(backend: str, bundle: Bundle, options: Options) -> Callable[[], Backend]:
    def tensorrt() -> Backend:
        from higen.backends.tensorrt import TensorrtBackend

        return TensorrtBackend(bundle, options)

    def onnx() -> Backend:
        from higen.backends.onnx import OnnxBackend

        return OnnxBackend(bundle, options)

    def torch() -> Backend:
        from higen.backends.torch import TorchBackend

        return TorchBackend(bundle, options)

    return {"tensorrt": tensorrt, "onnx": onnx, "torch": torch}[backend]
