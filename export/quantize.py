"""Denoising graphs to graphs that multiply in 8 bits: quantise and dequantise nodes, over the same weights file.

Ranges come from real denoising runs: every recorded call holds both guidance branches, and calls are taken from the
whole length of the loop. Which layers are quantised is decided by measured error, worst first out. What never is: first
and last convolution, time, cue and context embeddings, attention's own products, norms, guidance and the solver.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from higen.backends.recorder import CallRecorder
from higen.bundle import QUANTIZED, Bundle, graph_file, put_file
from higen.errors import BackendError, ModelError, RequestError
from higen.pipeline import Pipeline
from higen.stages import STAGES

__all__ = ["KINDS", "Layer", "Report", "insert", "quantizable", "quantize", "record_calls"]

DENOISING = ("spatial_unet", "temporal_unet")

SENSITIVE = ("unet.conv_in", "unet.conv_out", "unet.time", "unet.context_pool", "embedding", "conditioner")
"""Parts of a weight's name that keep its layer in the graph's own precision."""

CLIPS = (1.0, 0.8, 0.6, 0.4)
"""Parts of the largest magnitude that are tried as the range of an activation; the one with the least error is kept."""


@dataclass(frozen=True)
class Kind:
    """A type of 8 bits: the largest magnitude it is scaled to, its ONNX type, and the error it is allowed."""

    largest: float
    dtype: ir.DataType
    tolerance: float


KINDS = {"int8": Kind(127.0, ir.DataType.INT8, 0.05), "fp8": Kind(448.0, ir.DataType.FLOAT8E4M3FN, 0.15)}

Calls = Sequence[Mapping[str, NDArray[Any]]]


@dataclass(frozen=True)
class Layer:
    """A convolution or a product with a weight: `node` multiplies `activation` with `weight`'s values."""

    weight: str
    node: ir.Node
    activation: ir.Value

    @property
    def axis(self) -> int:
        """The axis of the output channels in the tensor that enters the node."""
        return 0 if self.node.op_type == "Conv" else 1


@dataclass(frozen=True)
class Report:
    """What a quantisation did: layers chosen of those that could be, and the error that is left.

    `error` is the root mean square of the difference of a step's estimate of the clean latents, relative to its own.
    """

    stage: str
    precision: str
    chosen: int
    candidates: int
    error: float
    kept: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**vars(self), "kept": list(self.kept)}


def quantizable(graph: ir.Graph) -> list[Layer]:
    """The layers of a graph that may be computed in 8 bits, in the graph's order."""
    found = []
    for node in graph:
        if node.op_type not in ("Conv", "MatMul") or node.inputs[0] is None:
            continue
        source = node.inputs[1]
        while source is not None and (maker := source.producer()) is not None:
            source = maker.inputs[0] if maker.op_type in ("Cast", "Transpose", "Reshape") else None
        if source is None or source.name is None or source.const_value is None:
            continue
        if source.name in graph.initializers and not any(part in source.name for part in SENSITIVE):
            found.append(Layer(source.name, node, node.inputs[0]))
    return found


def record_calls(bundle: Bundle, prompts: Sequence[str], steps: int, calls: int, **sizes: Any) -> dict[str, Calls]:
    """Inputs of `calls` calls of each denoising stage, from all along the loops of videos of `prompts`."""
    backend = CallRecorder(bundle, DENOISING)
    with Pipeline(bundle, backend) as pipeline:
        for i, prompt in enumerate(prompts):
            for _ in pipeline.stream(prompt, steps=steps, seed=i, **sizes):
                pass
    return {stage: _spread(backend.calls[stage], calls) for stage in DENOISING}


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    """So many of the values, evenly from the first to the last."""
    if len(values) <= count:
        return list(values)
    return [values[i] for i in np.linspace(0, len(values) - 1, count).round().astype(int)]


def quantize(
    bundle: Bundle,
    calls: Mapping[str, Calls],
    precision: str = "int8",
    stages: Sequence[str] = DENOISING,
    tolerance: float | None = None,
    on_report: Callable[[Report], None] = lambda _: None,
) -> Bundle:
    """Write the graph of each denoising stage in a quantised precision (bundle.QUANTIZED).

    calls      inputs to calibrate and to measure with, from `record_calls`
    tolerance  largest error (see `Report`) of a step; layers leave, the worst first, until it holds; None: the kind's

    Raises RequestError for another precision or stage, ModelError where a graph is missing, BackendError where no layer
    can be quantised within the tolerance.
    """
    if precision not in QUANTIZED:
        raise RequestError(f"precision={precision!r}: one of {', '.join(map(repr, QUANTIZED))}")
    if wrong := [stage for stage in stages if stage not in DENOISING]:
        raise RequestError(f"stages={wrong}: of {', '.join(DENOISING)}")
    kind, _, rest = precision.partition(".")
    allowed = KINDS[kind].tolerance if tolerance is None else tolerance
    for stage in stages:
        for base in ("fp32", rest or "fp32"):
            if graph_file(stage, base) not in bundle.files:
                raise ModelError(f"{bundle.path}: no {graph_file(stage, base)} (make it: higen-export onnx)")
    for stage in stages:
        ranges, noise = _calibrate(bundle, stage, calls[stage], KINDS[kind])
        chosen, error = _choose(bundle, stage, calls[stage], KINDS[kind], ranges, noise, allowed)
        model = ir.load(bundle.path / graph_file(stage, rest or "fp32"))
        insert(model.graph, chosen, ranges, KINDS[kind])
        aside = bundle.path / f".{graph_file(stage, precision)}.part"
        try:
            ir.save(model, aside)
            bundle = put_file(bundle, aside, graph_file(stage, precision))
        finally:
            aside.unlink(missing_ok=True)
        kept = tuple(sorted(set(noise) - set(chosen)))
        on_report(Report(stage, precision, len(chosen), len(noise), error, kept))
    return bundle


def insert(graph: ir.Graph, chosen: Mapping[str, Any] | Sequence[str], ranges: Mapping[str, float], kind: Kind) -> None:
    """Put quantise and dequantise nodes before both inputs of the layers whose weights are named in `chosen`.

    ranges   largest magnitude of the activation of each weight's layer
    """
    wanted = set(chosen)
    entering: dict[tuple[ir.Value, float], ir.Value] = {}
    for layer in quantizable(graph):
        if layer.weight not in wanted:
            continue
        high, node = ranges[layer.weight], layer.node
        key = (layer.activation, high)
        if key not in entering:
            scale = np.float32(high / kind.largest)
            entering[key] = _pair(graph, node, layer.activation, scale, kind, None, f"{layer.weight}.activation")
        node.replace_input_with(0, entering[key])
        weight = node.inputs[1]
        assert weight is not None
        values = _values(graph, layer)
        axes = tuple(i for i in range(values.ndim) if i != layer.axis)
        magnitudes = np.maximum(np.abs(values).max(axes), 1e-12)
        scales = (magnitudes / kind.largest).astype(np.float32)
        node.replace_input_with(1, _pair(graph, node, weight, scales, kind, layer.axis, f"{layer.weight}.kernel"))


def _pair(
    graph: ir.Graph, before: ir.Node, value: ir.Value, scale: Any, kind: Kind, axis: int | None, name: str
) -> ir.Value:
    """`value` quantised and dequantised, in nodes in front of `before`."""
    dtype = value.dtype or _computed(graph)
    scales = np.maximum(np.asarray(scale), np.finfo(np.float16).tiny)
    inputs = [
        value,
        _constant(graph, f"{name}.scale", ir.tensor(scales.astype(dtype.numpy()), dtype=dtype)),
        _constant(graph, f"{name}.zero", ir.tensor(np.zeros(scales.shape, kind.dtype.numpy()), dtype=kind.dtype)),
    ]
    attributes = {} if axis is None else {"axis": axis}
    into = ir.node("QuantizeLinear", inputs, attributes, name=f"{name}.quantize")
    back = ir.node("DequantizeLinear", [into.outputs[0], *inputs[1:]], attributes, name=f"{name}.dequantize")
    into.outputs[0].name, back.outputs[0].name = f"{name}.quantized", f"{name}.dequantized"
    into.outputs[0].dtype, back.outputs[0].dtype = kind.dtype, dtype
    graph.insert_before(before, [into, back])
    return back.outputs[0]


def _computed(graph: ir.Graph) -> ir.DataType:
    """What a graph computes in: the type of its first convolution's weight as it enters."""
    conv = next(node for node in graph if node.op_type == "Conv")
    weight = conv.inputs[1]
    while weight is not None and (maker := weight.producer()) is not None:
        if maker.op_type == "Cast":
            return ir.DataType(maker.attributes["to"].as_int())
        weight = maker.inputs[0]
    assert weight is not None
    assert weight.dtype is not None
    return weight.dtype


def _constant(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _values(graph: ir.Graph, layer: Layer) -> NDArray[np.float32]:
    """A layer's weight as it enters its node: a product's as [inputs, outputs]."""
    tensor = graph.initializers[layer.weight].const_value
    assert tensor is not None
    values = tensor.numpy().astype(np.float32)
    return values if layer.node.op_type == "Conv" else values.reshape(values.shape[0], -1).T


def _calibrate(bundle: Bundle, stage: str, calls: Calls, kind: Kind) -> tuple[dict[str, float], dict[str, float]]:
    """Range of the activation and noise of the layer (relative power that 8 bits add), by weight."""
    peaks = _measure(bundle, stage, calls, lambda graph, value: [_peak(graph, value)])
    high = {name: float(np.max(found)) for name, found in peaks.items()}

    def errors(graph: ir.Graph, value: ir.Value) -> list[ir.Value]:
        return [_noise(graph, value, clip * high[str(value.name)], kind) for clip in CLIPS]

    found = _measure(bundle, stage, calls, errors)
    best = {name: int(np.argmin(np.mean(noise, axis=0))) for name, noise in found.items()}
    model = ir.load(bundle.path / graph_file(stage))
    ranges, noises = {}, {}
    for layer in quantizable(model.graph):
        name = str(layer.activation.name)
        ranges[layer.weight] = max(high[name] * CLIPS[best[name]], 1e-6)
        noises[layer.weight] = float(np.mean(found[name], axis=0)[best[name]]) + _weight_noise(model.graph, layer, kind)
    return ranges, noises


def _measure(
    bundle: Bundle, stage: str, calls: Calls, probe: Callable[[ir.Graph, ir.Value], list[ir.Value]]
) -> dict[str, NDArray[np.float64]]:
    """Run a stage's float32 graph with scalars that `probe` adds for each activation: [call, scalar] by its name."""
    model = ir.load(bundle.path / graph_file(stage))
    activations = {str(layer.activation.name): layer.activation for layer in quantizable(model.graph)}
    probes = {name: probe(model.graph, value) for name, value in activations.items()}
    model.graph.outputs.extend(value for values in probes.values() for value in values)
    rows = [_run(bundle, model, call) for call in calls]
    first = len(STAGES[stage].outputs)
    found, start = {}, first
    for name, values in probes.items():
        stop = start + len(values)
        found[name] = np.array([[float(x) for x in row[start:stop]] for row in rows])
        start = stop
    return found


def _run(bundle: Bundle, model: ir.Model, call: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    session = model.meta.get("session")
    if session is None:
        aside = bundle.path / f".{model.graph.name}.calibration.part"
        try:
            ir.save(model, aside)
            options = ort.SessionOptions()
            options.log_severity_level = 3
            session = ort.InferenceSession(str(aside), options, providers=["CPUExecutionProvider"])
        finally:
            aside.unlink(missing_ok=True)
        model.meta["session"] = session
    outputs: list[NDArray[Any]] = session.run(None, dict(call))
    return outputs


def _add(graph: ir.Graph, op: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
    node = ir.node(op, inputs, attributes)
    graph.append(node)
    node.outputs[0].dtype = ir.DataType.FLOAT
    return node.outputs[0]


def _number(graph: ir.Graph, value: float) -> ir.Value:
    return _constant(graph, f"probe.{len(graph.initializers)}", ir.tensor(np.float32(value)))


def _mean(graph: ir.Graph, value: ir.Value) -> ir.Value:
    return _scalar(_add(graph, "ReduceMean", [value], keepdims=0))


def _peak(graph: ir.Graph, value: ir.Value) -> ir.Value:
    return _scalar(_add(graph, "ReduceMax", [_add(graph, "Abs", [value])], keepdims=0))


def _scalar(value: ir.Value) -> ir.Value:
    value.shape = ir.Shape([])
    return value


def _noise(graph: ir.Graph, value: ir.Value, high: float, kind: Kind) -> ir.Value:
    """Power of what 8 bits add to a tensor of this range, relative to its own."""
    scale = _number(graph, max(high, 1e-6) / kind.largest)
    zero = _constant(
        graph, f"probe.{len(graph.initializers)}", ir.tensor(np.zeros((), kind.dtype.numpy()), dtype=kind.dtype)
    )
    quantized = _add(graph, "QuantizeLinear", [value, scale, zero])
    quantized.dtype = kind.dtype
    back = _add(graph, "DequantizeLinear", [quantized, scale, zero])
    off = _add(graph, "Sub", [value, back])
    own = _add(graph, "Add", [_mean(graph, _add(graph, "Mul", [value, value])), _number(graph, 1e-12)])
    return _scalar(_add(graph, "Div", [_mean(graph, _add(graph, "Mul", [off, off])), own]))


def _weight_noise(graph: ir.Graph, layer: Layer, kind: Kind) -> float:
    values = _values(graph, layer)
    axes = tuple(i for i in range(values.ndim) if i != layer.axis)
    scales = np.maximum(np.abs(values).max(axes, keepdims=True), 1e-12) / kind.largest
    if kind.dtype == ir.DataType.INT8:
        back = np.round(values / scales).clip(-128, 127) * scales
    else:
        back = (values / scales).astype(kind.dtype.numpy()).astype(np.float32) * scales
    return float(((values - back) ** 2).mean() / max(float((values**2).mean()), 1e-12))


def _choose(
    bundle: Bundle,
    stage: str,
    calls: Calls,
    kind: Kind,
    ranges: Mapping[str, float],
    noise: Mapping[str, float],
    tolerance: float,
) -> tuple[list[str], float]:
    """The most layers, the least noisy first, with which a step's error stays within the tolerance; and that error."""
    plain = ir.load(bundle.path / graph_file(stage))
    expected = [_run(bundle, plain, call)[1] for call in calls]
    ordered = sorted(noise, key=lambda name: noise[name])
    error = float("inf")
    for part in (1.0, 0.9, 0.8, 0.65, 0.5, 0.35, 0.2, 0.1):
        chosen = ordered[: max(round(part * len(ordered)), 1)]
        model = ir.load(bundle.path / graph_file(stage))
        insert(model.graph, chosen, ranges, kind)
        found = [_run(bundle, model, call)[1] for call in calls]
        error = max(_relative(a, b) for a, b in zip(found, expected, strict=True))
        if error <= tolerance:
            return chosen, error
    raise BackendError(f"{stage}: a tenth of its layers in 8 bits differs by {error:.2f}, allowed is {tolerance}")


def _relative(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.sqrt(((found - expected) ** 2).mean() / max(float((expected**2).mean()), 1e-12)))
