"""The rounding of a quantised layer, as nodes for an engine and as the same arithmetic in float32.

w8          Only the weight is rounded, as in int8. It is dequantised in every call, so that memory holds its 8 bits.
int8, fp8   One scale for an activation, one for each output channel of a weight. The weight stays in its file and is
            rounded when a graph is loaded or an engine is built.
nvfp4       E2M1 values in blocks of 16 along the summed axis, an E4M3 scale for each block, and one float32 scale for
            the whole tensor. A rounded weight is stored in the graph itself, in half a byte plus a sixteenth of a byte
            for each value. If the graph rounded it instead, an engine would keep its 16 bits. The block scales of an
            activation are computed at run time.

Sources: TensorRT's documentation of explicit quantisation and of IDynamicQuantizeLayer; ONNX's E4M3 and E2M1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from higen.export.layers import BLOCK, E4M3, LARGEST_E4M3, Kind, Layer, quantizable, values_of

__all__ = [
    "SWITCHES",
    "Nodes",
    "blocks_of",
    "insert",
    "insert_switched",
    "rounded_blocks",
    "rounded_once",
]

SWITCHES = "quantized"
"""The added input of a graph with switches, bool [layers]: whether each layer is rounded."""

UNSIGNED = Kind(127.0, ir.DataType.UINT8)
"""8-bit integers around 128. The rounded outputs of layers have this form: ONNX Runtime 1.32 fails on signed ones if a
transposition follows, because it changes only a part of the nodes to unsigned.
"""

NEEDED_OPSET, NEEDED_IR = 23, 11  # for a graph that contains E2M1


def insert(
    model: ir.Model,
    chosen: Collection[str],
    ranges: Mapping[str, float],
    kind: Kind,
    outputs: Mapping[str, float] | None = None,
) -> None:
    """Insert the nodes that a runtime expects before both inputs of the layers with a weight named in `chosen`.

    ranges   largest magnitude of each layer's activation, by the name of its weight
    outputs  that of its output, for the layers whose output is rounded too
    """
    graph = model.graph
    following = dict(pairwise(graph))
    computed = _computed(graph)
    entering: dict[tuple[ir.Value, float], ir.Value] = {}
    for layer in quantizable(graph, kind):
        if layer.weight not in chosen:
            continue
        high, nodes = ranges[layer.weight], Nodes(graph, layer.node, layer.weight)
        activation = _input(layer.node, 0)  # not layer.activation: that is now rounded if it is a layer's output
        key = (activation, high)
        if kind.weights_only:
            entering[key] = activation
        elif key not in entering:
            if kind.in_blocks:
                entering[key] = _entering_blocks(nodes, activation, high, computed)
            else:
                scale = np.asarray(high / kind.largest)
                entering[key] = _pair(nodes, activation, scale, computed, kind, None, "activation")
        layer.node.replace_input_with(0, entering[key])
        values, weight = values_of(graph, layer), _input(layer.node, 1)
        if kind.in_blocks:
            kernel = _stored_blocks(nodes, values, computed)
        else:
            scales = _channel_scales(values, layer.axis, kind)
            kernel = _pair(nodes, weight, scales, computed, kind, layer.axis, "kernel")
        layer.node.replace_input_with(1, kernel)
        if outputs and layer.weight in outputs:
            scale, output = np.asarray(outputs[layer.weight] / kind.largest), layer.node.outputs[0]
            users = tuple(output.uses())
            behind = Nodes(graph, following.get(layer.node), layer.weight)
            _lead(users, _pair(behind, output, scale, computed, UNSIGNED, None, "output"))
    if kind.in_blocks:
        RemoveUnusedNodesPass()(model)  # removes the weights that the graph now stores rounded
        model.ir_version = max(model.ir_version, NEEDED_IR)
        model.opset_imports[""] = max(model.opset_imports[""], NEEDED_OPSET)
        model.opset_imports["trt"] = 1


def _input(node: ir.Node, place: int) -> ir.Value:
    value = node.inputs[place]
    assert value is not None
    return value


def _lead(users: Collection[tuple[ir.Node, int]], value: ir.Value) -> None:
    """Make the nodes take another value at these places."""
    for user, place in users:
        user.replace_input_with(place, value)


def insert_switched(
    graph: ir.Graph,
    ranges: Mapping[str, float],
    kind: Kind,
    computed: ir.DataType = ir.DataType.FLOAT,
    outputs: Mapping[str, float] | None = None,
) -> list[str]:
    """Round every layer that has a range as `insert` would, but in float32, and only if the new input SWITCHES says so.

    computed   the compute type of the graph that `insert` will change; the scales are rounded to it
    outputs    as in `insert`

    Returns the weights' names, in the order of the switches.
    """
    layers = [layer for layer in quantizable(graph, kind) if layer.weight in ranges]
    switches = ir.Value(name=SWITCHES, shape=ir.Shape([len(layers)]), type=ir.TensorType(ir.DataType.BOOL))
    graph.inputs.append(switches)
    following = dict(pairwise(graph))
    for i, layer in enumerate(layers):
        activation, kernel = _input(layer.node, 0), _input(layer.node, 1)
        plain, low = (Nodes(ir.Graph([], [], nodes=[], name="branch"), None, layer.weight) for _ in range(2))
        plain.graph.outputs.append(plain.add("Identity", [activation], "plain.activation"))
        plain.graph.outputs.append(plain.add("Identity", [kernel], "plain.kernel"))
        values = values_of(graph, layer)
        low.graph.outputs.extend(_in_float32(low, layer, values, ranges[layer.weight], kind, computed))
        nodes = Nodes(graph, layer.node, layer.weight)
        switch = nodes.add("Gather", [switches, nodes.constant("index", np.int64(i))], "switch", ir.DataType.BOOL)
        # A branch that is not taken costs nothing.
        branches: dict[str, Any] = {"then_branch": low.graph, "else_branch": plain.graph}
        for place, value in enumerate(nodes.add_all("If", [switch], "chosen", (ir.DataType.FLOAT,) * 2, **branches)):
            layer.node.replace_input_with(place, value)
        if outputs and layer.weight in outputs:
            output = layer.node.outputs[0]
            users = tuple(output.uses())
            plain, low = (Nodes(ir.Graph([], [], nodes=[], name="branch"), None, layer.weight) for _ in range(2))
            plain.graph.outputs.append(plain.add("Identity", [output], "plain.output"))
            scale = np.asarray(outputs[layer.weight] / kind.largest)
            low.graph.outputs.append(_pair(low, output, scale, computed, kind, None, "output", ir.DataType.FLOAT))
            behind = Nodes(graph, following.get(layer.node), layer.weight)
            branches = {"then_branch": low.graph, "else_branch": plain.graph}
            _lead(users, behind.add("If", [switch], "chosen.output", **branches))
    return [layer.weight for layer in layers]


def _in_float32(
    nodes: Nodes,
    layer: Layer,
    values: NDArray[np.float32],
    high: float,
    kind: Kind,
    computed: ir.DataType,
) -> list[ir.Value]:
    """A layer's activation and weight, rounded in float32."""
    entering, weight = _input(layer.node, 0), _input(layer.node, 1)
    if kind.in_blocks:
        count, largest = values.shape[0], float(np.abs(values).max())
        activation = rounded_blocks(nodes, entering, count, high, "activation")
        turned = nodes.add("Transpose", [weight], "kernel.turned", perm=[1, 0])
        kernel = rounded_blocks(nodes, turned, count, largest, "kernel")
        return [activation, nodes.add("Transpose", [kernel], "kernel.back", perm=[1, 0])]
    scale, scales = np.asarray(high / kind.largest), _channel_scales(values, layer.axis, kind)
    float32 = ir.DataType.FLOAT
    if kind.weights_only:
        activation = nodes.add("Identity", [entering], "plain.activation")
    else:
        activation = _pair(nodes, entering, scale, computed, kind, None, "activation", float32)
    return [
        activation,
        _pair(nodes, weight, scales, computed, kind, layer.axis, "kernel", float32),
    ]


@dataclass(frozen=True)
class Nodes:
    """Adds nodes and constants for a layer, before the node `before` (None: at the end of the graph)."""

    graph: ir.Graph
    before: ir.Node | None
    prefix: str

    def add(
        self, op: str, inputs: list[ir.Value], name: str, dtype: ir.DataType = ir.DataType.FLOAT, **attributes: Any
    ) -> ir.Value:
        """Add a node with one output; returns the output."""
        return self.add_all(op, inputs, name, (dtype,), **attributes)[0]

    def add_all(
        self,
        op: str,
        inputs: list[ir.Value],
        name: str,
        dtypes: Sequence[ir.DataType],
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Add a node with one output for each of `dtypes`; returns the outputs."""
        node = ir.node(op, inputs, attributes, domain=domain, num_outputs=len(dtypes), name=f"{self.prefix}.{name}")
        for i, (value, dtype) in enumerate(zip(node.outputs, dtypes, strict=True)):
            value.name, value.dtype = f"{self.prefix}.{name}.{i}", dtype
        if self.before is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self.before, node)
        return node.outputs

    def constant(self, name: str, values: Any, dtype: ir.DataType | None = None) -> ir.Value:
        """Add an initializer with the values of a numpy array or number."""
        tensor = ir.tensor(np.asarray(values), dtype=dtype)
        value = ir.Value(
            name=f"{self.prefix}.{name}",
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value


def _pair(
    nodes: Nodes,
    value: ir.Value,
    scale: NDArray[Any],
    rounded_to: ir.DataType,
    kind: Kind,
    axis: int | None,
    name: str,
    dtype: ir.DataType | None = None,
) -> ir.Value:
    """`value` quantised and dequantised. Scales are rounded to `rounded_to`, stored as `dtype` (None: as rounded)."""
    dtype = dtype or rounded_to
    scales = np.maximum(scale, np.finfo(np.float16).tiny).astype(rounded_to.numpy()).astype(dtype.numpy())
    middle = 128 if kind is UNSIGNED else 0
    constants = [
        nodes.constant(f"{name}.scale", scales, dtype),
        nodes.constant(f"{name}.zero", np.full(scales.shape, middle, kind.dtype.numpy()), kind.dtype),
    ]
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    into = nodes.add("QuantizeLinear", [value, *constants], f"{name}.quantize", kind.dtype, **attributes)
    return nodes.add("DequantizeLinear", [into, *constants], f"{name}.dequantize", dtype, **attributes)


def _channel_scales(values: NDArray[np.float32], axis: int, kind: Kind) -> NDArray[np.float32]:
    others = tuple(i for i in range(values.ndim) if i != axis)
    scales: NDArray[np.float32] = np.maximum(np.abs(values).max(others), 1e-12) / np.float32(kind.largest)
    return scales


def _computed(graph: ir.Graph) -> ir.DataType:
    """The type in which a graph computes: that of the weight as it enters the first convolution."""
    conv = next(node for node in graph if node.op_type == "Conv")
    weight = conv.inputs[1]
    while weight is not None and (maker := weight.producer()) is not None:
        if maker.op_type == "Cast":
            return ir.DataType(maker.attributes["to"].as_int())
        weight = maker.inputs[0]
    assert weight is not None
    assert weight.dtype is not None
    return weight.dtype


def rounded_once(nodes: Nodes, value: ir.Value, high: float, kind: Kind, name: str) -> ir.Value:
    """A float32 tensor quantised and dequantised with one scale."""
    return _pair(nodes, value, np.asarray(high / kind.largest), ir.DataType.FLOAT, kind, None, name)


def blocks_of(values: NDArray[np.float32], largest: float) -> tuple[NDArray[Any], NDArray[Any], np.float32]:
    """`values` [..., n] in NVFP4: E2M1 [..., n], E4M3 scales [..., n/16], and the overall scale. n: a multiple of 16.

    largest   magnitude for the overall scale: the largest of `values`, or of many tensors like it
    """
    whole = _whole_scale(largest)
    blocks = values.reshape(*values.shape[:-1], -1, BLOCK)
    scales = (np.abs(blocks).max(-1) / np.float32(6) / whole).clip(0, LARGEST_E4M3).astype(E4M3.numpy())
    steps = np.maximum(scales.astype(np.float32) * whole, np.finfo(np.float32).tiny)
    scaled = (blocks / steps[..., None]).clip(-6, 6)
    return scaled.astype(ir.DataType.FLOAT4E2M1.numpy()).reshape(values.shape), scales, whole


def _whole_scale(largest: float) -> np.float32:
    """The overall scale. It gives the block that holds the largest value the largest possible E4M3 scale."""
    return np.float32(max(largest, 1e-12) / (6 * LARGEST_E4M3))


def _stored_blocks(nodes: Nodes, values: NDArray[np.float32], computed: ir.DataType) -> ir.Value:
    """A matrix product's weight [inputs, outputs], stored in the graph as NVFP4 and dequantised."""
    codes, scales, whole = blocks_of(np.ascontiguousarray(values.T), float(np.abs(values).max()))
    kernel = _from_blocks(
        nodes,
        nodes.constant("kernel.codes", codes, ir.DataType.FLOAT4E2M1),
        nodes.constant("kernel.scales", scales, E4M3),
        nodes.constant("kernel.scale", whole),
        computed,
        "kernel",
    )
    return nodes.add("Transpose", [kernel], "kernel.turned", computed, perm=[1, 0])


def _entering_blocks(nodes: Nodes, value: ir.Value, high: float, computed: ir.DataType) -> ir.Value:
    """A tensor quantised to NVFP4 and dequantised, with block scales computed at run time."""
    whole = nodes.constant("activation.scale", _whole_scale(high))
    codes, scales = nodes.add_all(
        "TRT_FP4DynamicQuantize",
        [value, whole],
        "activation.quantize",
        (ir.DataType.FLOAT4E2M1, E4M3),
        domain="trt",
        axis=-1,
        block_size=BLOCK,
        scale_type=int(E4M3),
    )
    return _from_blocks(nodes, codes, scales, whole, computed, "activation")


def _from_blocks(
    nodes: Nodes, codes: ir.Value, scales: ir.Value, whole: ir.Value, computed: ir.DataType, name: str
) -> ir.Value:
    steps = nodes.add("DequantizeLinear", [scales, whole], f"{name}.steps")
    if computed != ir.DataType.FLOAT:
        steps = nodes.add("Cast", [steps], f"{name}.steps.cast", computed, to=int(computed))
    return nodes.add("DequantizeLinear", [codes, steps], f"{name}.dequantize", computed, axis=-1, block_size=BLOCK)


def rounded_blocks(nodes: Nodes, value: ir.Value, count: int, high: float, name: str) -> ir.Value:
    """A tensor with `count` values on its last axis, rounded as in `blocks_of` by operators that every runtime has."""

    def add(op: str, inputs: list[ir.Value], part: str, **attributes: Any) -> ir.Value:
        return nodes.add(op, inputs, f"{name}.{part}", **attributes)

    def number(part: str, x: Any) -> ir.Value:
        return nodes.constant(f"{name}.{part}", np.float32(x))

    shape = nodes.add("Shape", [value], f"{name}.shape", ir.DataType.INT64)
    form = nodes.constant(f"{name}.form", np.array([-1, count // BLOCK, BLOCK], np.int64))
    blocks = add("Reshape", [value, form], "blocks")
    last = nodes.constant(f"{name}.last", np.array([2], np.int64))
    peaks = add("ReduceMax", [add("Abs", [blocks], "magnitudes"), last], "peaks", keepdims=1)
    whole = number("whole", _whole_scale(high))
    zero = nodes.constant(f"{name}.zero", np.zeros((), E4M3.numpy()), E4M3)
    scales = add("Div", [peaks, number("six", 6)], "scales")
    scales = nodes.add("QuantizeLinear", [scales, whole, zero], f"{name}.scales.quantize", E4M3)
    scales = add("DequantizeLinear", [scales, whole, zero], "scales.dequantize")
    steps = add("Max", [scales, number("tiny", np.finfo(np.float32).tiny)], "steps")
    scaled = add("Clip", [add("Div", [blocks, steps], "scaled"), number("low", -6), number("high", 6)], "clipped")
    size = add("Abs", [scaled], "size")
    grid = number("grid.4", 2)  # E2M1 values are 0.5 apart below 2, 1 below 4, 2 from there on
    for bound, step in ((4, 1.0), (2, 0.5)):
        below = nodes.add("Less", [size, number(f"bound.{bound}", bound)], f"{name}.below.{bound}", ir.DataType.BOOL)
        grid = add("Where", [below, number(f"step.{bound}", step), grid], f"grid.below.{bound}")
    codes = add("Mul", [add("Round", [add("Div", [scaled, grid], "places")], "nearest"), grid], "codes")
    return add("Reshape", [add("Mul", [codes, scales], "values"), shape], "rounded")
