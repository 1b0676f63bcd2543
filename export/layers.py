"""Selects the layers of a graph that may be quantised, by their position in the graph."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from higen.stages import STATE

__all__ = ["BLOCK", "E4M3", "KINDS", "LARGEST_E4M3", "Kind", "Layer", "kind_of", "quantizable", "values_of"]

BLOCK = 16
"""Number of values that share a scale in NVFP4."""

E4M3 = ir.DataType.FLOAT8E4M3FN
LARGEST_E4M3 = 448.0


@dataclass(frozen=True)
class Kind:
    """A number format for multiplication.

    largest     largest magnitude after scaling
    dtype       ONNX type
    operators   operators that may multiply in it
    rounding    those of them whose outputs are rounded too
    weights_only    the activations are not rounded, and multiplication is in float32
    """

    largest: float
    dtype: ir.DataType
    operators: tuple[str, ...] = ("Conv", "MatMul")
    rounding: tuple[str, ...] = ()
    weights_only: bool = False

    @property
    def in_blocks(self) -> bool:
        """Whether each block of values has its own scale. The scales of activations are then computed at run time."""
        return self.dtype == ir.DataType.FLOAT4E2M1


KINDS = {
    "int8": Kind(127.0, ir.DataType.INT8, rounding=("Conv",)),
    "int8.fp16": Kind(127.0, ir.DataType.INT8),
    "fp8": Kind(LARGEST_E4M3, E4M3),
    "nvfp4": Kind(6.0, ir.DataType.FLOAT4E2M1, ("MatMul",)),
    "w8": Kind(127.0, ir.DataType.INT8, weights_only=True),
}
"""The formats, by precision, or by the part of its name before the dot.

ONNX Runtime has an integer kernel for a matrix product with a float output, but convolves in 8 bits only if the output
is rounded to 8 bits as well. TensorRT needs no rounded output.
"""


def kind_of(precision: str) -> Kind:
    """The format in which a quantised precision multiplies."""
    return KINDS.get(precision) or KINDS[precision.partition(".")[0]]


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product: `node` multiplies `activation` by the weight named `weight`."""

    weight: str
    node: ir.Node
    activation: ir.Value

    @property
    def axis(self) -> int:
        """The output-channel axis of the weight as it enters the node."""
        return 0 if self.node.op_type == "Conv" else 1

    def rounds_output(self, kind: Kind) -> bool:
        """Whether the layer's output is rounded too."""
        return self.node.op_type in kind.rounding


def quantizable(graph: ir.Graph, kind: Kind = KINDS["int8"]) -> list[Layer]:
    """The layers of a graph that may be computed in `kind`, in the graph's order.

    These are the layers on the path of the latents, except the first and the last. Those two are sensitive to
    rounding, and so are the layers off that path: the embeddings of the time and of the conditions.
    """
    layers = {layer.node: layer for node in graph if (layer := _layer(graph, node)) is not None}
    passed, ends = _behind_a_layer(graph, layers), _without_a_layer_behind(graph, layers)
    return [
        layer
        for node, layer in layers.items()
        if node.op_type in kind.operators
        and layer.activation in passed
        and not ends.intersection(node.outputs)
        and (not kind.in_blocks or np.prod(_weight(graph, layer).shape.numpy()[1:]) % BLOCK == 0)
    ]


def _layer(graph: ir.Graph, node: ir.Node) -> Layer | None:
    """The node as a layer, if it multiplies by a weight of the graph; else None."""
    if node.op_type not in ("Conv", "MatMul") or node.inputs[0] is None:
        return None
    source = node.inputs[1]
    while source is not None and (maker := source.producer()) is not None:
        source = maker.inputs[0] if maker.op_type in ("Cast", "Transpose", "Reshape") else None
    if source is None or source.name is None or source.name not in graph.initializers or source.const_value is None:
        return None
    return Layer(source.name, node, node.inputs[0])


def _behind_a_layer(graph: ir.Graph, layers: Collection[ir.Node]) -> set[ir.Value]:
    """Tensors that depend on the latents' values (not only their sizes) through at least one layer."""
    entered = {value for value in graph.inputs if value.name == STATE[0]}
    passed = set[ir.Value]()
    for node in graph:
        if node.op_type in ("Shape", "Size"):
            continue
        given = {value for value in node.inputs if value is not None}
        if given & passed or (node in layers and given & entered):
            passed.update(node.outputs)
        elif given & entered:
            entered.update(node.outputs)
    return passed


def _without_a_layer_behind(graph: ir.Graph, layers: Collection[ir.Node]) -> set[ir.Value]:
    """Tensors from which an output is computed without a layer in between."""
    found = set(graph.outputs)
    for node in reversed(graph):
        if node not in layers and found.intersection(node.outputs):
            found.update(value for value in node.inputs if value is not None)
    return found


def _weight(graph: ir.Graph, layer: Layer) -> ir.TensorProtocol:
    tensor = graph.initializers[layer.weight].const_value
    assert tensor is not None
    return tensor


def _read(tensor: ir.TensorProtocol) -> NDArray[Any]:
    """A tensor's values. onnx_ir does not read a file with several hard links, such as one in a Hugging Face cache."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    values = np.fromfile(tensor.path, tensor.dtype.numpy(), tensor.size, offset=tensor.offset or 0)
    return values.reshape(tensor.shape.numpy())


def values_of(graph: ir.Graph, layer: Layer) -> NDArray[np.float32]:
    """A layer's weight as it enters its node; for a matrix product [inputs, outputs]."""
    values = _read(_weight(graph, layer)).astype(np.float32)
    return values if layer.node.op_type == "Conv" else values.reshape(values.shape[0], -1).T
