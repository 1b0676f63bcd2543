"""The TensorRT backend: runs engines built by `higen-export build-engines`. Needs no torch.

plans.py chooses plans and profiles and gives the reasons, cuda.py manages device memory, and tensorrt_engine.py runs
one engine. This module decides which engines are on the GPU and manages the memory that they share.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen.backends.base import CLOSED, Choice
from higen.backends.cuda import Cuda, DeviceArray, gpu_index
from higen.backends.options import PLAIN, Options
from higen.backends.plans import (
    Plan,
    best_profile,
    fitting_plans,
    read_plans,
)
from higen.backends.tensorrt_api import versions
from higen.backends.tensorrt_engine import Engine
from higen.bundle import Bundle
from higen.errors import BackendError, BackendUnavailable, EngineError, FallbackWarning, HigenError
from higen.forks import Home, outlives_forks
from higen.precision import precision_named
from higen.stages import check_inputs

__all__ = ["TensorrtBackend"]


class TensorrtBackend:
    """Runs stages on their engines. An engine is loaded when its stage is first used, and freed by `close`."""

    name = "tensorrt"

    def __init__(self, bundle: Bundle, options: Options = PLAIN) -> None:
        """`device`: "cuda", "cuda:1", ... `precision`: of the engines; None: any that was built. `verify`: check each
        plan's sha256. `low_memory`: one engine on the GPU at a time, for GPUs too small for all.

        Raises BackendUnavailable for a device that is not a GPU.
        """
        self.bundle = bundle
        self.options = options
        self._index = gpu_index(options.device)
        self._cuda: Cuda | None = None
        self._plans: dict[str, list[Plan]] = {}
        self._engines: dict[str, Engine] = {}
        self._scratch = (0, 0)
        self._closed = False
        self._home = Home()
        self._lock = threading.RLock()
        """Held while engines are loaded, run or freed. Take it before the lock of `Cuda`."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as the constructor's arguments: another process creates it again."""
        return type(self), (self.bundle, self.options)

    def prepare(self, stage: str) -> None:
        """Load a stage's engine. Raises BackendUnavailable (there is none), MissingExtra or an EngineError."""
        self._home.check()
        with self._lock:
            if stage in self._engines:
                return
            try:
                cuda = self._open(stage)
                with cuda.lock:
                    self._resident(cuda, stage)
            except HigenError:
                if not self._engines:
                    self._release()  # an unused GPU context would take hundreds of megabytes
                raise

    def choose(self, *stages: str) -> str:
        """See `Backend.choose`. A stage without an engine is skipped silently, one with a bad engine with a warning."""
        broken: EngineError | None = None
        for stage in stages[:-1]:
            try:
                self.prepare(stage)
            except BackendUnavailable:
                continue
            except EngineError as error:
                broken = error
                continue
            return stage
        self.prepare(stages[-1])
        if broken is not None:
            reason = f"{type(broken).__name__}: {broken}"
            warnings.warn(f"{stages[-1]} stands in for {stages[0]}: {reason}", FallbackWarning, stacklevel=2)
        return stages[-1]

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        """Run a stage; see `Backend.run`. Tensors are arrays or DeviceArrays; results are DeviceArrays.

        Raises OutsideProfile for shapes that the engine was not built for. Raises Stale if the engine is of manifest
        version 1 and cannot take a value. Raises BackendError after `close` and in a forked process.
        """
        self._home.check()
        spec = self.bundle.manifest.stage(stage)
        check_inputs(spec, tensors, self.bundle.manifest.fixed)
        with self._lock, (cuda := self._open(stage)).lock:
            cuda.enter()
            engine = self._resident(cuda, stage)
            tensors = engine.as_declared(tensors)
            shapes = {name: tuple(value.shape) for name, value in tensors.items()}
            profile = best_profile(engine.plan, shapes)
            inputs = {name: self._on_device(cuda, engine, name, value) for name, value in tensors.items()}
            outputs = engine.run(profile, inputs, self._scratch)
        return dict(zip((t.name for t in spec.outputs), outputs, strict=True))

    def describe(self, stage: str) -> str:
        """Device, precision and target of a prepared stage: "cuda, fp16, rtx-sm89"."""
        record = self._plans[stage][0].record
        device = f"cuda:{self._index}" if self._index else "cuda"
        return f"{device}, {record.precision}, {record.target}"

    @property
    def choices(self) -> Mapping[str, Choice]:
        """See `Backend.choices`."""
        return {stage: Choice(stage, self.name, details=self.describe(stage)) for stage in tuple(self._engines)}

    def to_numpy(self, tensor: Any) -> NDArray[Any]:
        """A DeviceArray as a numpy array on the host. A tensor of another backend is returned unchanged."""
        return tensor.numpy() if isinstance(tensor, DeviceArray) else tensor

    def close(self) -> None:
        """Free engines and device memory. Waits for a run in progress."""
        if self._home.here:  # the GPU belongs to the parent of a forked process
            with self._lock:
                self._closed = True
                self._release()

    def _release(self) -> None:
        cuda = self._cuda
        if cuda is None:
            return
        with cuda.lock:
            cuda.enter()
            cuda.synchronize()
            for stage in list(self._engines):
                self._engines.pop(stage).close()
            if self._scratch[0]:
                cuda.release(self._scratch[0])
            self._scratch = (0, 0)
            cuda.close()
            self._cuda = None

    def _open(self, stage: str) -> Cuda:
        """Open the GPU, and find the plans of the stage that fit it."""
        if self._closed:
            raise BackendError(CLOSED)
        if self._cuda is not None and stage in self._plans:
            return self._cuda
        plans, errors = read_plans(self.bundle.path, stage)
        asked = self.options.precision
        if asked is not None:
            there = {plan.record.precision for plan in plans}
            wanted = next((p for p in precision_named(asked).stand_ins if p in there), asked)
            plans = [plan for plan in plans if plan.record.precision == wanted]
        if not plans and not errors:
            what = f" in {asked}" if asked else ""
            option = f" --precision {asked}" if asked else ""
            raise BackendUnavailable(
                f"no engine of {stage}{what} (make one: higen-export build-engines {self.bundle.path} --target TARGET"
                f"{option})"
            )
        if self._cuda is None:
            self._cuda = Cuda.open(self._index)
        files = {name: record.sha256 for name, record in self.bundle.files.items()}
        found = versions({plan.record.flavour: f"the engine {plan.name}" for plan in plans})
        self._plans[stage] = fitting_plans(stage, plans, errors, files, self._cuda.architecture, found)
        return self._cuda

    def _resident(self, cuda: Cuda, stage: str) -> Engine:
        """The stage's engine, loaded on the GPU, with enough scratch memory for it."""
        if stage not in self._engines:
            cuda.enter()
            if self.options.low_memory:
                cuda.synchronize()
                for other in list(self._engines):
                    self._engines.pop(other).close()
                cuda.trim()
            engine = self._load(cuda, stage)
            try:
                self._reserve(cuda, engine.scratch_size)
            except HigenError:
                engine.close()
                raise
            outlives_forks(engine)
            self._engines[stage] = engine
        engine = self._engines[stage]
        self._reserve(cuda, engine.scratch_size)
        return engine

    def _load(self, cuda: Cuda, stage: str) -> Engine:
        """Load the best plan that can be loaded; warn for each that cannot. If none can, raise the last error."""
        plan, *others = self._plans[stage]
        try:
            return Engine(cuda, plan, self.bundle.manifest.stage(stage), self.options.verify)
        except EngineError as error:
            if not others:
                raise
            reason = f"{type(error).__name__}: {error}"
        self._plans[stage] = others
        warnings.warn(f"{stage} runs on the engine {others[0].name}: {reason}", FallbackWarning, stacklevel=2)
        return self._load(cuda, stage)

    def _reserve(self, cuda: Cuda, size: int) -> None:
        """Make the scratch memory, one block that all engines share, at least this large.

        If a larger block cannot be allocated, one of the old size is kept, so that the other engines still work.
        """
        address, present = self._scratch
        if size <= present:
            return
        if address:
            cuda.synchronize()
            for engine in self._engines.values():
                engine.forget_graphs()
            cuda.release(address)
            self._scratch = (0, 0)
        try:
            self._scratch = (cuda.allocate(size), size)
        except HigenError:
            if present:
                self._scratch = (cuda.allocate(present), present)
            raise

    def _on_device(self, cuda: Cuda, engine: Engine, name: str, value: Any) -> DeviceArray:
        dtype = engine.dtypes[name]
        if isinstance(value, DeviceArray):
            if value.dtype != dtype:
                raise BackendError(f"{engine.plan.name}.{name}: {value.dtype} given, the engine takes {dtype}")
            return value
        return cuda.to_device(np.asarray(value).astype(dtype, copy=False))
