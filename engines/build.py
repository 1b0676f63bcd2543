"""Builds a plan (an engine) from a graph with any of the TensorRT libraries (higen/backends/tensorrt_api.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from higen.backends.plans import PlanProfile, PlanTensor
from higen.backends.tensorrt_api import SEVERE, make_logger, network_tensors
from higen.engines.progress import Progress, cancelled_by_ctrl_c, make_monitor
from higen.errors import EngineError
from higen.stages import Stage

__all__ = ["PLAIN", "BuiltPlan", "Options", "build_plan"]


@dataclass(frozen=True)
class Options:
    """How a plan is built.

    workspace         bytes of GPU scratch memory that a layer may use; None: all of the GPU's memory
    weight_streaming  weights may stay on the host and are copied to the GPU when they are used
    """

    workspace: int | None = None
    weight_streaming: bool = False

    def as_json(self) -> dict[str, Any]:
        """As JSON, for the plan's record."""
        return asdict(self)


PLAIN = Options()


@dataclass(frozen=True)
class BuiltPlan:
    """A plan (a buffer of bytes), its tensors, and TensorRT's log, with the kernels that it chose."""

    data: Any
    tensors: tuple[PlanTensor, ...]
    log: str


class _Log:
    """Keeps the log lines that a person may want to read: the list of kernels, but no verbose output of the parser."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.severe: list[str] = []

    def add(self, severity: str, text: str) -> None:
        if severity in SEVERE:
            self.severe.append(text)
        # The list of layers comes as a single message, of severity VERBOSE.
        if severity != "VERBOSE" or text.startswith(("Name: ", "Layers:")) or "\nName: " in text:
            self.lines.append(f"[{severity}] {text}")

    def check(self, what: str) -> None:
        if self.severe:
            raise EngineError(f"{what}: {'; '.join(dict.fromkeys(self.severe))}")


def build_plan(
    trt: Any,
    graph: Path,
    stage: Stage,
    profiles: Sequence[PlanProfile],
    architectures: Sequence[int],
    options: Options,
    progress: Progress,
) -> BuiltPlan:
    """Build a plan of a stage's graph for all of `profiles`.

    architectures  compute capabilities to build for ahead of time; none for classic TensorRT, which builds for the GPU

    Raises EngineError with the ERROR lines of TensorRT's log, also if TensorRT returned a plan in spite of them, and
    KeyboardInterrupt after Ctrl-C or if `progress.cancelled` was set.
    """
    log = _Log()
    logger = make_logger(trt, log.add)
    builder = trt.Builder(logger)
    network = _parse(trt, builder, logger, graph, log)
    tensors = network_tensors(trt, network)
    _check_tensors(tensors, stage, graph)
    _decompose_attention(trt, network)
    config = builder.create_builder_config()
    _configure(trt, config, architectures, options)
    for profile in profiles:
        made = builder.create_optimization_profile()
        for span in profile.spans:
            made.set_shape(span.name, span.smallest, span.best, span.largest)
        if config.add_optimization_profile(made) < 0:
            log.check(f"{graph.name}, profile {profile.name}")
            raise EngineError(f"{graph.name}: TensorRT refuses the profile {profile.name}")
    monitor = make_monitor(trt, progress)
    config.progress_monitor = monitor
    with cancelled_by_ctrl_c(progress):
        data = builder.build_serialized_network(network, config)
    if progress.cancelled:
        raise KeyboardInterrupt
    log.check(f"{graph.name}: TensorRT could not build it")
    if data is None:
        raise EngineError(f"{graph.name}: TensorRT built nothing and did not say why")
    return BuiltPlan(data, tensors, "\n".join(log.lines) + "\n")


def _parse(trt: Any, builder: Any, logger: Any, graph: Path, log: _Log) -> Any:
    flags = trt.NetworkDefinitionCreationFlag
    # The graph decides the precision. TensorRT versions without this flag make every network strongly typed.
    strong = 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0
    network = builder.create_network(strong)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        found = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = "; ".join(f"{e.node_operator() or 'graph'} {e.node_name()}: {e.desc()}" for e in found)
        raise EngineError(
            f"{graph.name}: TensorRT cannot read it (a graph of an older higen? higen-export onnx {graph.parent}): "
            f"{reasons}"
        )
    log.check(f"{graph.name}: TensorRT cannot read it")
    return network


def _check_tensors(tensors: Sequence[PlanTensor], stage: Stage, graph: Path) -> None:
    found = {t.name: t.kind for t in tensors}
    expected = {t.name: "input" for t in stage.inputs} | dict.fromkeys(stage.graph_outputs, "output")
    if found != expected:
        raise EngineError(f"{graph.name}: its tensors are {found}, {stage.name} has {expected}")


def _decompose_attention(trt: Any, network: Any) -> None:
    """Let TensorRT decompose attention that it has no fused kernel for (float32, some widths), instead of failing."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    if kind is None:  # an older library: its parser never makes this layer
        return
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _configure(trt: Any, config: Any, architectures: Sequence[int], options: Options) -> None:
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # kernel names in the log and in the plan
    # A float32 graph computes in float32: TensorFloat-32 would cost the parity that `verify` promises.
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if hasattr(config, "num_compute_capabilities"):
        config.num_compute_capabilities = len(architectures)
        for i, architecture in enumerate(architectures):
            if not config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{architecture}"), i):
                raise EngineError(f"TensorRT refuses the architecture SM{architecture}")
