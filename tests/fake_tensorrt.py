"""A fake of TensorRT's Python modules as higen uses them, on ONNX Runtime and the fake CUDA driver.

Each of the four real bindings is imitated from its own list of names (tensorrt_surface.json). An attribute or enum
member that the real binding lacks raises AttributeError, so feature detection and misspelt names are tested. The real
rules hold: the order of settings, the shapes that a profile allows, which memory must stay allocated, and when a graph
can be captured.
"""

from __future__ import annotations

import enum
import json
import re
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime as ort
from fake_cuda import STREAM, FakeDriver

from higen.backends.sessions import session_options

SURFACES: dict[str, dict[str, list[str]]] = json.loads(
    (Path(__file__).parent / "tensorrt_surface.json").read_text(encoding="utf-8")
)

SCRATCH = 4096
"""Default bytes of scratch memory that a fake engine asks for."""

VALUES = {  # only the enums with significant values
    "EngineInvalidityDiagnostics": {
        "VERSION_MISMATCH": 1,
        "UNSUPPORTED_CC": 2,
        "OLD_CUDA_DRIVER": 4,
        "OLD_CUDA_RUNTIME": 8,
        "INSUFFICIENT_GPU_MEMORY": 16,
        "MALFORMED_ENGINE": 32,
        "CUDA_ERROR": 64,
    }
}

DTYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64}


class Died(BaseException):
    """The real library would have ended the process here."""


class Surfaced:
    """An object with only the attributes of the real class."""

    _kind: ClassVar[str] = ""
    _module: FakeTensorrt

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            self._know(name)
        try:
            return object.__getattribute__(self, name)
        except AttributeError:
            if name.startswith("_"):
                raise
            raise NotImplementedError(f"the fake {self._kind} has no {name} yet") from None

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            self._know(name)
        object.__setattr__(self, name, value)

    def _know(self, name: str) -> None:
        kind = object.__getattribute__(self, "_kind")
        module = object.__getattribute__(self, "_module")
        if name not in module._surface.get(kind, ()):
            raise AttributeError(f"{module._name}: {kind} has no attribute {name!r}")


class FakeTensorrt:
    """One of the modules. `name` is a key of SURFACES. `driver` is the fake GPU; without it the runtime dies."""

    def __init__(self, name: str, driver: FakeDriver | None = None, factor: int = 2) -> None:
        self._name = name
        self._surface = SURFACES[name]
        self._driver = driver
        self._factor = factor
        self.engines: weakref.WeakSet[Any] = weakref.WeakSet()
        self.validity: tuple[str, int] | None = None
        self.build_errors: list[str] = []
        self.scratch = SCRATCH
        self.capabilities: list[int] = []
        self.__version__ = name.rpartition("-")[2]

    def __getattr__(self, name: str) -> Any:
        surface = self.__dict__.get("_surface", {})
        if name not in surface:
            raise AttributeError(f"{self.__dict__.get('_name')} has no {name}")
        if kind := _CLASSES.get(name):
            return type(name, (kind,), {"_kind": name, "_module": self})
        if all(member.isupper() or member[0].isupper() for member in surface[name]):
            values = VALUES.get(name, {member: i for i, member in enumerate(surface[name])})
            made = enum.IntEnum(name, {member: values.get(member, 0) for member in surface[name]})  # type: ignore[misc]
            setattr(self, name, made)
            return made
        raise NotImplementedError(f"the fake has no {name} yet")

    def _make(self, kind: str, *arguments: Any) -> Any:
        return getattr(self, kind)(*arguments)


class _Callback(Surfaced):
    """ILogger and IProgressMonitor: meant to be subclassed; a subclass may add attributes."""

    def __init__(self) -> None:
        self._initialized = True

    def _know(self, name: str) -> None:
        pass


def _log(logger: Any, severity: str, text: str) -> None:
    assert logger._initialized, "a logger's __init__ must call ILogger.__init__"
    logger.log(SimpleNamespace(name=severity), text)


class _Builder(Surfaced):
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> Any:
        strong = self._module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        assert flags & (1 << int(strong)), "the network must be strongly typed, because the graph sets the precision"
        return self._module._make("INetworkDefinition")

    def create_builder_config(self) -> Any:
        return self._module._make("IBuilderConfig")

    def create_optimization_profile(self) -> Any:
        return self._module._make("IOptimizationProfile")

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        monitor = config._monitor
        monitor.phase_start("Building engine", None, 2)
        going = monitor.step_complete("Building engine", 0)
        for text in self._module.build_errors:  # it still "succeeds", as the real builder does
            _log(self._logger, "ERROR", text)
        if not going:
            return None
        monitor.step_complete("Building engine", 1)
        monitor.phase_finish("Building engine")
        _log(self._logger, "VERBOSE", "Searching for input: x")
        _log(self._logger, "VERBOSE", "Layers:\nName: _gemm_mha_v2_myl0_6, LayerType: kgen, Inputs: [], Outputs: []")
        if network._graph is None or not config._profiles:
            _log(self._logger, "ERROR", "nothing to build")
            return None
        plan = {
            "library": self._module.__version__,
            "graph": str(network._graph),
            "profiles": [profile._shapes for profile in config._profiles],
            "streaming": "WEIGHT_STREAMING" in config._flags,
        }
        self._module.capabilities = list(config._capabilities)
        made = self._module._make("IHostMemory")
        made._data = json.dumps(plan).encode()
        return made._data


class _Network(Surfaced):
    def __init__(self) -> None:
        self._graph: Path | None = None
        self._tensors: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {"input": [], "output": []}

    @property
    def num_inputs(self) -> int:
        return len(self._tensors["input"])

    @property
    def num_outputs(self) -> int:
        return len(self._tensors["output"])

    num_layers = 0

    def get_input(self, index: int) -> Any:
        return self._tensor("input", index)

    def get_output(self, index: int) -> Any:
        return self._tensor("output", index)

    def _tensor(self, kind: str, index: int) -> Any:
        made = self._module._make("ITensor")
        name, dtype, shape = self._tensors[kind][index]
        made.name, made.shape, made.dtype = name, shape, getattr(self._module.DataType, dtype)
        return made


class _Plain(Surfaced):
    """A class that holds only values."""


class _Parser(Surfaced):
    num_errors = 0

    def __init__(self, network: Any, logger: Any) -> None:
        self._network = network

    def parse_from_file(self, path: str) -> bool:
        try:
            graph = onnx.load(path, load_external_data=False).graph
        except Exception:  # not ONNX
            self.num_errors = 1
            return False
        types = {1: "FLOAT", 10: "HALF", 7: "INT64"}
        self._network._graph = Path(path)
        for kind, values in (("input", graph.input), ("output", graph.output)):
            for value in values:
                shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim)
                self._network._tensors[kind].append((value.name, types[value.type.tensor_type.elem_type], shape))
        return True

    def get_error(self, index: int) -> Any:
        made = self._module._make("ParserError")
        made.desc, made.node_name, made.node_operator = (lambda: "not ONNX"), (lambda: ""), (lambda: "")
        return made


class _BuilderConfig(Surfaced):
    def __init__(self) -> None:
        self._flags: set[str] = {"TF32"}
        self._profiles: list[Any] = []
        self._capabilities: list[int] = []
        self._monitor: Any = None

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(flag.name)

    def set_flag(self, flag: Any) -> None:
        self._flags.add(flag.name)

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        assert pool.name == "WORKSPACE"
        assert size > 0

    def add_optimization_profile(self, profile: Any) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    @property
    def progress_monitor(self) -> Any:
        return self._monitor

    @progress_monitor.setter
    def progress_monitor(self, monitor: Any) -> None:
        self._monitor = monitor

    @property
    def num_compute_capabilities(self) -> int:
        return len(self._capabilities)

    @num_compute_capabilities.setter
    def num_compute_capabilities(self, count: int) -> None:
        self._capabilities = [0] * count

    def set_compute_capability(self, capability: Any, index: int) -> bool:
        self._capabilities[index] = int(capability.name.removeprefix("SM"))
        return True


class _Profile(Surfaced):
    def __init__(self) -> None:
        self._shapes: dict[str, list[tuple[int, ...]]] = {}

    def set_shape(self, name: str, smallest: Any, best: Any, largest: Any) -> None:
        # The real one silently accepts unknown names.
        self._shapes[name] = [tuple(smallest), tuple(best), tuple(largest)]


class _Runtime(Surfaced):
    def __init__(self, logger: Any) -> None:
        driver = self._module._driver
        if driver is None or not driver.current:
            raise Died("the runtime was made without a driver")
        self._logger = logger

    def get_engine_validity(self, data: Any) -> tuple[Any, int]:
        validity, reasons = self._module.validity or ("VALID", 0)
        return self._module.EngineValidity[validity], reasons

    def deserialize_cuda_engine(self, data: Any) -> Any:
        try:
            plan = json.loads(bytes(data))
        except ValueError:
            _log(self._logger, "ERROR", "magic tag does not match")
            return None
        if plan["library"] != self._module.__version__:
            _log(self._logger, "ERROR", "version mismatch")
            return None
        return self._module._make("ICudaEngine", plan, self)


class _Engine(Surfaced):
    def __init__(self, plan: dict[str, Any], runtime: Any) -> None:
        self._plan, self._runtime = plan, runtime
        self._session = ort.InferenceSession(plan["graph"], session_options(), providers=["CPUExecutionProvider"])
        graph = onnx.load(plan["graph"], load_external_data=False).graph
        self._io = {value.name: ("INPUT", value) for value in graph.input}
        self._io |= {value.name: ("OUTPUT", value) for value in graph.output}
        self._streamable = 1000 if plan["streaming"] else 0
        self._budget: int | None = None
        self.device_memory_size_v2 = self._module.scratch
        self._module.engines.add(self)

    @property
    def num_io_tensors(self) -> int:
        return len(self._io)

    def get_tensor_name(self, index: int) -> str:
        return list(self._io)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self._module.TensorIOMode[self._io[name][0]]

    def get_tensor_dtype(self, name: str) -> Any:
        types = {1: "FLOAT", 10: "HALF", 7: "INT64"}
        return self._module.DataType[types[self._io[name][1].type.tensor_type.elem_type]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        dims = self._io[name][1].type.tensor_type.shape.dim
        return tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)

    @property
    def streamable_weights_size(self) -> int:
        return self._streamable

    def get_weight_streaming_automatic_budget(self) -> int:
        return 400

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._streamable if self._budget is None else self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        self._budget = budget

    def create_runtime_config(self) -> Any:
        return self._module._make("IRuntimeConfig")

    def create_execution_context(self, config: Any) -> Any:
        return self._module._make("IExecutionContext", self, config)


class _RuntimeConfig(Surfaced):
    def __init__(self) -> None:
        self._strategy: Any = None
        self._cache: Any = None
        self._graphs: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._strategy = strategy

    @property
    def cuda_graph_strategy(self) -> Any:
        return self._graphs

    @cuda_graph_strategy.setter
    def cuda_graph_strategy(self, strategy: Any) -> None:
        self._graphs = strategy

    def create_runtime_cache(self) -> Any:
        return self._module._make("IRuntimeCache")

    def set_runtime_cache(self, cache: Any) -> bool:
        self._cache = cache
        return True


class _RuntimeCache(Surfaced):
    def __init__(self) -> None:
        self._kernels = b""

    def deserialize(self, content: bytes) -> bool:
        if not content.startswith(b"kernels:"):
            return False
        self._kernels = content
        return True

    def serialize(self) -> bytes:
        return self._kernels


class _Context(Surfaced):
    def __init__(self, engine: Any, config: Any) -> None:
        assert config._strategy.name == "USER_MANAGED"
        self._engine, self._config = engine, config
        self._driver: FakeDriver = self._module._driver  # type: ignore[assignment]
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = (0, 0)
        self._ran: tuple[Any, ...] | None = None

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == STREAM
        assert not self._driver.capturing
        if not 0 <= index < len(self._engine._plan["profiles"]):
            return False
        self._profile, self._shapes = index, {}
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        assert self._profile is not None, "shapes are set after the profile"
        smallest, _, largest = self._engine._plan["profiles"][self._profile][name]
        if len(shape) != len(smallest) or any(
            not low <= n <= high for low, n, high in zip(smallest, shape, largest, strict=True)
        ):
            return False
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self._engine._io
        assert address % 256 == 0
        self._addresses[name] = address
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 256 == 0
        assert size >= self._engine.device_memory_size_v2
        self._scratch = (address, size)

    def infer_shapes(self) -> list[str]:
        return [n for n, (mode, _) in self._engine._io.items() if mode == "INPUT" and n not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        assert not self.infer_shapes(), "an output's shape is known when all inputs' are"
        sizes: dict[str, int] = {}
        for key, shape in self._shapes.items():
            dims = self._engine._io[key][1].type.tensor_type.shape.dim
            sizes |= {d.dim_param: n for d, n in zip(dims, shape, strict=True) if d.dim_param}
        factor = self._module._factor
        for latent, pixel in (("H", "Y"), ("W", "X")):
            if latent in sizes:
                sizes.setdefault(pixel, sizes[latent] * factor)
            elif pixel in sizes:
                sizes[latent] = sizes[pixel] // factor
        dims = self._engine._io[name][1].type.tensor_type.shape.dim
        return tuple(sizes[d.dim_param] if d.dim_param else d.dim_value for d in dims)

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM, "the default stream is slow"
        assert self._driver.current, "no context is current"
        assert not self.infer_shapes(), "every input's shape must be set"
        state = (self._profile, tuple(sorted(self._shapes.items())))
        if self._driver.capturing and self._ran != state:
            return False  # after a change of shapes, one execution without capture must come first
        arrays = {}
        for name, (mode, _) in self._engine._io.items():
            dtype = np.dtype(DTYPES[self._engine.get_tensor_dtype(name).name])
            shape = self.get_tensor_shape(name)
            view = self._driver.view(self._addresses[name], int(np.prod(shape)) * dtype.itemsize)
            arrays[name] = (mode, view, dtype, shape)
        scratch = self._driver.view(*self._scratch)
        session = self._engine._session
        if not self._driver.capturing:
            self._ran = state
            if self._config._cache is not None:
                self._config._cache._kernels = b"kernels:" + re.sub(rb"\W", b"", repr(state).encode())[:20]

        def work() -> None:
            scratch[:] = np.random.default_rng(0).integers(0, 256, scratch.shape, np.uint8)
            given = {n: v.view(d).reshape(s).copy() for n, (m, v, d, s) in arrays.items() if m == "INPUT"}
            names = [n for n, (m, *_) in arrays.items() if m == "OUTPUT"]
            for name, value in zip(names, session.run(names, given), strict=True):
                _, view, _, shape = arrays[name]
                assert value.shape == shape
                view[:] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)

        self._driver.enqueue(work)
        return True


_CLASSES: dict[str, type[Surfaced]] = {
    "Builder": _Builder,
    "IBuilderConfig": _BuilderConfig,
    "ICudaEngine": _Engine,
    "IExecutionContext": _Context,
    "IHostMemory": _Plain,
    "ILogger": _Callback,
    "INetworkDefinition": _Network,
    "IOptimizationProfile": _Profile,
    "IProgressMonitor": _Callback,
    "IRuntimeCache": _RuntimeCache,
    "IRuntimeConfig": _RuntimeConfig,
    "ITensor": _Plain,
    "OnnxParser": _Parser,
    "ParserError": _Plain,
    "Runtime": _Runtime,
}
