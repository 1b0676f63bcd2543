"""The TensorRT backend: engines that `higen-export build-engines` made. Needs no torch.

Which plan, which profile and why not are decided in plans.py; device memory is cuda.py's; what is left here is the
order in which TensorRT wants to be called:

    probe the driver -> record -> file -> library -> validity -> deserialize -> context
    profile -> input shapes -> addresses -> scratch memory -> execute (or replay a captured graph)
"""

from __future__ import annotations

import hashlib
import mmap
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen.backends.cuda import Cuda, DeviceArray, Graph, device_index
from higen.backends.plans import (
    Plan,
    best_profile,
    check_interface,
    fitting_plans,
    read_plans,
    streaming_budget,
    validity_error,
)
from higen.backends.tensorrt_api import SEVERE, engine_tensors, library, make_logger, versions
from higen.bundle import Bundle, check_precision, stand_ins
from higen.errors import BackendError, BackendUnavailable, EngineError, FallbackWarning, HigenError, Malformed
from higen.locks import locked
from higen.stages import STAGES, check_inputs, dimensions

__all__ = ["TensorrtBackend"]

MAX_GRAPHS = 16
"""Captured graphs kept for a stage: a denoising loop alternates between two or three sets of addresses."""


class TensorrtBackend:
    """Runs stages by their engines. An engine is loaded when its stage is first used, and freed by `close`."""

    name = "tensorrt"

    def __init__(
        self,
        bundle: Bundle,
        device: str | None = None,
        precision: str | None = None,
        verify: bool = True,
        low_memory: bool = False,
    ) -> None:
        """`device`: "cuda", "cuda:1", ... `precision` of the engines; None: whatever was built. `verify`: check each
        plan's sha256. `low_memory`: one engine on the GPU at a time, for cards that do not hold all.

        Raises BackendUnavailable for a device that is no GPU.
        """
        self.bundle = bundle
        self._index = device_index(device)
        self._precision = None if precision is None else check_precision(precision)
        self._verify = verify
        self._low_memory = low_memory
        self._fixed = dimensions(bundle.config)
        self._cuda: Cuda | None = None
        self._plans: dict[str, list[Plan]] = {}
        self._engines: dict[str, _Engine] = {}
        self._scratch = (0, 0)

    def prepare(self, stage: str) -> None:
        """Load a stage's engine. Raises BackendUnavailable (there is none), MissingExtra or an EngineError."""
        if stage in self._engines:
            return
        try:
            cuda = self._open(stage)
            with cuda.lock:
                self._resident(cuda, stage)
        except HigenError:
            if not self._engines:
                self.close()  # a GPU that is not used is not held: its context alone takes hundreds of megabytes
            raise

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        """Run a stage; see `Backend.run`. Tensors are arrays or DeviceArrays; results are DeviceArrays.

        Raises OutsideProfile for shapes that the engine was not built for.
        """
        spec, cuda = STAGES[stage], self._open(stage)
        check_inputs(spec, tensors, self._fixed)
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        with cuda.lock:
            cuda.enter()
            engine = self._resident(cuda, stage)
            profile = best_profile(engine.plan, shapes)
            inputs = {name: self._on_device(cuda, engine, name, value) for name, value in tensors.items()}
            outputs = engine.run(profile, inputs, self._scratch)
        return dict(zip((t.name for t in spec.outputs), outputs, strict=True))

    def describe(self, stage: str) -> str:
        """Where and in what precision a prepared stage runs: "cuda, fp16, rtx-sm89"."""
        record = self._plans[stage][0].record
        return f"cuda, {record.precision}, {record.target}"

    def to_numpy(self, tensor: Any) -> NDArray[Any]:
        """A DeviceArray as a numpy array on the host; what is of another backend is left to that."""
        return tensor.numpy() if isinstance(tensor, DeviceArray) else tensor

    def close(self) -> None:
        """Free engines and device memory."""
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
        """The GPU, after it is known which plans of the stage fit it."""
        if self._cuda is not None and stage in self._plans:
            return self._cuda
        plans, errors = read_plans(self.bundle.path, stage)
        if self._precision is not None:
            there = {plan.record.precision for plan in plans}
            wanted = next((p for p in stand_ins(self._precision) if p in there), self._precision)
            plans = [plan for plan in plans if plan.record.precision == wanted]
        if not plans and not errors:
            what = f" in {self._precision}" if self._precision else ""
            option = f" --precision {self._precision}" if self._precision else ""
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

    def _resident(self, cuda: Cuda, stage: str) -> _Engine:
        """The stage's engine on the GPU, with scratch memory for the largest of all."""
        if stage not in self._engines:
            cuda.enter()
            if self._low_memory:
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
            self._engines[stage] = engine
        engine = self._engines[stage]
        self._reserve(cuda, engine.scratch_size)
        return engine

    def _load(self, cuda: Cuda, stage: str) -> _Engine:
        """An engine of the best plan that loads, with a warning for each that does not; raises the last one's error."""
        plan, *others = self._plans[stage]
        try:
            return _Engine(cuda, plan, self._verify)
        except EngineError as error:
            if not others:
                raise
            reason = f"{type(error).__name__}: {error}"
        self._plans[stage] = others
        warnings.warn(f"{stage} runs on the engine {others[0].name}: {reason}", FallbackWarning, stacklevel=2)
        return self._load(cuda, stage)

    def _reserve(self, cuda: Cuda, size: int) -> None:
        """See that the one block of scratch memory, which all engines use in turn, has at least this size.

        Where a larger one cannot be had, those that the present one is enough for keep working.
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

    def _on_device(self, cuda: Cuda, engine: _Engine, name: str, value: Any) -> DeviceArray:
        dtype = engine.dtypes[name]
        if isinstance(value, DeviceArray):
            if value.dtype != dtype:
                raise BackendError(f"{engine.plan.name}.{name}: {value.dtype} given, the engine takes {dtype}")
            return value
        return cuda.to_device(np.asarray(value).astype(dtype, copy=False))


class _Engine:
    """A deserialized plan with its context."""

    def __init__(self, cuda: Cuda, plan: Plan, verify: bool) -> None:
        self.plan = plan
        self._cuda = cuda
        self._stage = STAGES[plan.record.stage]
        self._errors: list[str] = []
        self._trt = library(plan.record.flavour, f"the engine {plan.name}")
        self._logger = make_logger(self._trt, self._note)
        self._runtime, self._engine = self._deserialize(verify)
        tensors = engine_tensors(self._trt, self._engine)
        check_interface(plan, self._stage, tensors)
        self.dtypes = {t.name: np.dtype(t.dtype) for t in tensors}
        self._stream_weights()
        self.scratch_size = int(self._engine.device_memory_size_v2)
        self._cache: Any = None
        self._own_graphs = True
        self._context = self._make_context()
        self._profile: int | None = None
        self._graphs: dict[tuple[Any, ...], Graph | None] = {}
        self._bound: tuple[Any, ...] = ()
        self._warm = False

    def run(self, profile: int, inputs: Mapping[str, DeviceArray], scratch: tuple[int, int]) -> list[DeviceArray]:
        """Put one execution on the stream; returns the outputs in the stage's order."""
        context, stream = self._context, self._cuda.stream
        bound = (profile, tuple(array.shape for array in inputs.values()))
        self._warm = self._warm and bound == self._bound
        self._bound = bound
        if profile != self._profile:
            self._check(context.set_optimization_profile_async(profile, stream), f"profile {profile}")
            self._profile = profile
        for name, array in inputs.items():
            self._check(context.set_input_shape(name, array.shape), f"shape {list(array.shape)} of {name}")
            self._check(context.set_tensor_address(name, array.address), f"address of {name}")
        if missing := context.infer_shapes():
            raise BackendError(f"{self.plan.name}: TensorRT misses {missing}")
        outputs = []
        for name in self._stage.graph_outputs:
            array = DeviceArray(self._cuda, tuple(context.get_tensor_shape(name)), str(self.dtypes[name]))
            self._check(context.set_tensor_address(name, array.address), f"address of {name}")
            outputs.append(array)
        context.set_device_memory(*scratch)
        arrays = [*inputs.values(), *outputs]
        self._execute((profile, *((a.shape, a.address) for a in arrays)))
        return outputs

    def forget_graphs(self) -> None:
        """Drop captured graphs: an address in them is gone."""
        self._cuda.synchronize()
        for graph in self._graphs.values():
            if graph is not None:
                graph.close()
        self._graphs.clear()

    def close(self) -> None:
        """Free the engine; kernels that were compiled for this GPU are kept beside the plan."""
        self.forget_graphs()
        self._save_cache()
        # In this order: a context must not outlive its engine, nor an engine its runtime.
        self._context = self._engine = self._runtime = None

    def _execute(self, key: tuple[Any, ...]) -> None:
        """Run with what is bound: plainly the first time, captured the second time, replayed from then on.

        TensorRT wants a plain run after every change of shapes before one may be captured.
        """
        graph = self._graphs.get(key)
        if graph is None and self._own_graphs and self._warm and key in self._graphs:
            graph = self._graphs[key] = self._capture()
        if graph is not None:
            graph.launch()
            return
        self._enqueue()
        self._warm = True
        if self._own_graphs and key not in self._graphs:
            if len(self._graphs) >= MAX_GRAPHS:
                self.forget_graphs()
            self._graphs[key] = None

    def _capture(self) -> Graph | None:
        """A graph of one execution; None, from then on for all, where this engine cannot be captured."""
        try:
            return self._cuda.capture(self._enqueue)
        except BackendError:  # it waits inside, or has work that depends on its inputs
            self._own_graphs = False
            self.forget_graphs()
            return None

    def _enqueue(self) -> None:
        self._check(self._context.execute_async_v3(self._cuda.stream), "execution")

    def _check(self, done: bool, what: str) -> None:
        if not done:
            raise BackendError(f"{self.plan.name}: TensorRT refuses the {what}: {'; '.join(self._errors[-3:])}")

    def _note(self, severity: str, text: str) -> None:
        if severity in SEVERE:
            self._errors.append(text)

    def _deserialize(self, verify: bool) -> tuple[Any, Any]:
        path, record = self.plan.path, self.plan.record
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                if len(data) != record.size or (verify and hashlib.sha256(data).hexdigest() != record.sha256):
                    raise Malformed(f"{path}: is not the plan of the record beside it: {self.plan.remedy}")
                runtime = self._trt.Runtime(self._logger)
                if hasattr(runtime, "get_engine_validity"):
                    validity, reasons = runtime.get_engine_validity(data)
                    if validity == self._trt.EngineValidity.INVALID:
                        members = self._trt.EngineInvalidityDiagnostics.__members__
                        raise validity_error(self.plan, int(reasons), {n: int(m) for n, m in members.items()})
                engine = runtime.deserialize_cuda_engine(data)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise Malformed(f"{path}: cannot be read: {error}") from error
        if engine is None:
            raise Malformed(f"{path}: TensorRT cannot load it: {'; '.join(self._errors) or 'no reason given'}")
        return runtime, engine

    def _stream_weights(self) -> None:
        """Keep as many of a streaming plan's weights on the GPU as it has room for."""
        engine = self._engine
        if self.plan.record.options.get("weight_streaming") and engine.streamable_weights_size:
            engine.weight_streaming_budget_v2 = streaming_budget(
                engine.streamable_weights_size,
                engine.device_memory_size_v2,
                self._cuda.free_memory,
                engine.get_weight_streaming_automatic_budget(),
            )

    def _make_context(self) -> Any:
        trt, engine = self._trt, self._engine
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(engine, "create_runtime_config"):
            context = engine.create_execution_context(strategy)
        else:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            if hasattr(config, "cuda_graph_strategy"):
                # TensorRT for RTX compiles kernels while it runs and knows itself when a graph can be captured.
                config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
                self._own_graphs = False
            if hasattr(config, "create_runtime_cache"):
                self._cache = config.create_runtime_cache()
                self._load_cache()
                config.set_runtime_cache(self._cache)
            context = engine.create_execution_context(config)
        if context is None:
            raise BackendError(f"{self.plan.name}: TensorRT makes no context: {'; '.join(self._errors)}")
        return context

    @property
    def _cache_file(self) -> Any:
        record = self.plan.record
        return self.plan.path.with_name(f".{record.stage}-sm{self._cuda.architecture}.cache")

    def _load_cache(self) -> None:
        """Kernels that an earlier run compiled here; TensorRT itself refuses those of another GPU or version."""
        self._cache_size = 0
        with suppress(OSError):  # none, or one that cannot be read: kernels are compiled again
            content = self._cache_file.read_bytes()
            if content and self._cache.deserialize(content):
                self._cache_size = len(content)

    def _save_cache(self) -> None:
        """Write compiled kernels beside the plan if there are new ones and the folder can be written."""
        if self._cache is None:
            return
        content = bytes(self._cache.serialize())
        if len(content) == self._cache_size:
            return
        part = self._cache_file.with_suffix(".part")
        try:
            with locked(self.plan.path.with_name(".cache.lock")):
                part.write_bytes(content)
                part.replace(self._cache_file)
        except OSError:  # a folder that cannot be written costs compiling again, nothing else
            with suppress(OSError):  # of a read-only file system even the missing file
                part.unlink()
