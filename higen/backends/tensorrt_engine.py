"""One TensorRT engine: a deserialized plan with its execution context.

TensorRT must be called in this order:

    probe the driver -> record -> file -> library -> validity -> deserialize -> context
    profile -> input shapes -> addresses -> scratch memory -> execute (or replay a captured graph)
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from higen.backends.cuda import Cuda, DeviceArray, Graph
from higen.backends.older import as_before, is_older
from higen.backends.plans import Plan, check_interface, streaming_budget, validity_error
from higen.backends.tensorrt_api import SEVERE, engine_tensors, library, make_logger
from higen.errors import BackendError, Malformed, Stale
from higen.stages import Stage
from higen.staging import whole_file

__all__ = ["Engine"]

MAX_GRAPHS = 16
"""Maximum number of captured graphs per stage. A denoising loop alternates between two or three sets of addresses."""


class Engine:
    """A deserialized plan with its execution context."""

    def __init__(self, cuda: Cuda, plan: Plan, stage: Stage, verify: bool) -> None:
        self.plan = plan
        self._cuda = cuda
        self._stage = stage
        self._errors: list[str] = []
        self._trt = library(plan.record.flavour, f"the engine {plan.name}")
        self._logger = make_logger(self._trt, self._note)
        self._runtime, self._engine = self._deserialize(verify)
        tensors = engine_tensors(self._trt, self._engine)
        check_interface(plan, self._stage, tensors)
        self.dtypes = {t.name: np.dtype(t.dtype) for t in tensors}
        declared = {t.name: (t.dtype, len(t.shape)) for t in tensors}
        self._older = [t.name for t in stage.inputs if is_older(t, *declared[t.name])]
        self._stream_weights()
        self.scratch_size = int(self._engine.device_memory_size_v2)
        self._cache: Any = None
        self._cache_size = 0
        self._own_graphs = True
        self._context = self._make_context()
        self._profile: int | None = None
        self._graphs: dict[tuple[Any, ...], Graph | None] = {}
        self._bound: tuple[Any, ...] = ()
        self._warm = False

    def as_declared(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs in the form that the engine takes. Raises Stale if an engine of version 1 cannot take a value."""
        given = dict(tensors)
        for name in self._older:
            value = tensors[name]
            value = value.numpy() if isinstance(value, DeviceArray) else np.asarray(value)
            given[name] = as_before(value)
            if given[name] is None:
                raise Stale(
                    f"{self.plan.name}: it was built before {name} could be {value.ravel()[:4].tolist()}...: "
                    f"{self.plan.renewal}"
                )
        return given

    def run(self, profile: int, inputs: Mapping[str, DeviceArray], scratch: tuple[int, int]) -> list[DeviceArray]:
        """Put one execution on the stream and return the outputs in the stage's order."""
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
            raise BackendError(
                f"{self.plan.name}: TensorRT cannot infer the shapes, because these inputs are missing: {missing}"
            )
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
        """Drop the captured graphs, for example because an address in them is no longer valid."""
        self._cuda.synchronize()
        for graph in self._graphs.values():
            if graph is not None:
                graph.close()
        self._graphs.clear()

    def close(self) -> None:
        """Free the engine. Kernels that were compiled for this GPU are saved in the plan's folder."""
        self.forget_graphs()
        self._save_cache()
        # The order matters: a context must not outlive its engine, nor an engine its runtime.
        self._context = self._engine = self._runtime = None

    def _execute(self, key: tuple[Any, ...]) -> None:
        """Run with the bound tensors: directly the first time, captured the second time, replayed from then on.

        After every change of shapes, TensorRT needs one direct run before a run may be captured.
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
        """A captured graph of one execution. None if this engine cannot be captured; then it is not tried again."""
        try:
            return self._cuda.capture(self._enqueue)
        except BackendError:  # the engine synchronizes inside, or its work depends on its inputs
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
        if path.exists() and not path.is_file():  # reading a pipe would block forever
            raise Malformed(f"{path}: is not a regular file: {self.plan.remedy}")
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                if len(data) != record.size or (verify and hashlib.sha256(data).hexdigest() != record.sha256):
                    raise Malformed(f"{path}: is not the plan that its record describes: {self.plan.remedy}")
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
        """Keep as many weights of a streaming plan on the GPU as fit."""
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
                # TensorRT for RTX compiles kernels at run time and decides itself when to capture a graph.
                config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
                self._own_graphs = False
            if hasattr(config, "create_runtime_cache"):
                self._cache = config.create_runtime_cache()
                self._load_cache()
                config.set_runtime_cache(self._cache)
            context = engine.create_execution_context(config)
        if context is None:
            raise BackendError(f"{self.plan.name}: TensorRT cannot create a context: {'; '.join(self._errors)}")
        return context

    @property
    def _cache_file(self) -> Path:
        record = self.plan.record
        return self.plan.path.with_name(f".{record.stage}-sm{self._cuda.architecture}.cache")

    def _load_cache(self) -> None:
        """Load the kernels that an earlier run compiled. TensorRT refuses those of another GPU or version."""
        with suppress(OSError):  # without a readable cache, kernels are compiled again
            content = self._cache_file.read_bytes() if self._cache_file.is_file() else b""
            if content and self._cache.deserialize(content):
                self._cache_size = len(content)

    def _save_cache(self) -> None:
        """Save compiled kernels in the plan's folder, if there are new ones and the folder is writable."""
        if self._cache is None:
            return
        content = bytes(self._cache.serialize())
        if len(content) == self._cache_size:
            return
        with suppress(OSError), whole_file(self._cache_file) as part:  # else they are only compiled again
            part.write_bytes(content)
