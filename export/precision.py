"""What a precision variant is: weights stored and graphs computing in fewer bits (design, section 2).

Inputs and outputs of a stage stay float32 in every precision, and so do norm statistics, prior preconditioning,
guidance and the solver's update: see `higen.models.stage_modules`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from safetensors import safe_open
from torch import nn

from higen.bundle import Bundle, put_file, weights_file
from higen.errors import BackendError, RequestError
from higen.export.weights import cast_behind, stored_tensors
from higen.models.weights import DTYPES, write_safetensors

__all__ = [
    "NEWEST_OPSET",
    "PORTABLE_OPSET",
    "VARIANTS",
    "Variant",
    "check_opset",
    "in_float32",
    "lowered",
    "rounded",
    "write_weights",
]

PORTABLE_OPSET = 21
"""ONNX Runtime 1.20 reads it, and GroupNormalization is native from 21."""

NEWEST_OPSET = 23
"""The newest that TensorRT for RTX takes. Attention is an operator from 23; ONNX Runtime 1.20 refuses it."""


@dataclass(frozen=True)
class Variant:
    """How a precision is exported and judged.

    `tolerance` is the largest difference from the torch stage computing in float32 with the same (rounded) weights,
    relative to the largest output: float32's is for the order of summation, the others' for rounding each activation.
    """

    stored: ir.DataType
    smallest_opset: int
    default_opset: int
    tolerance: float


VARIANTS = {
    "fp32": Variant(ir.DataType.FLOAT, PORTABLE_OPSET, PORTABLE_OPSET, 2e-5),
    "fp16": Variant(ir.DataType.FLOAT16, PORTABLE_OPSET, PORTABLE_OPSET, 1e-2),
    # Conv takes bfloat16 from opset 22.
    "bf16": Variant(ir.DataType.BFLOAT16, 22, NEWEST_OPSET, 8e-2),
}


def check_opset(precision: str, opset: int | None) -> int:
    """The opset to export in; None: the precision's default. Raises RequestError for one that it cannot have."""
    if precision not in VARIANTS:
        raise RequestError(f"precision={precision!r}: one of {', '.join(map(repr, VARIANTS))}")
    variant = VARIANTS[precision]
    chosen = variant.default_opset if opset is None else opset
    if not variant.smallest_opset <= chosen <= NEWEST_OPSET:
        raise RequestError(f"opset={chosen}: from {variant.smallest_opset} to {NEWEST_OPSET} for {precision}")
    return chosen


def write_weights(bundle: Bundle, stage: str, precision: str) -> Bundle:
    """See that the model has a stage's weights in `precision`; returns the bundle with them.

    They are cast tensor by tensor from the model's own. Nothing is written for fp32, where a graph casts as it loads,
    and where the model's own are stored in `precision`. Raises CheckpointError for a value that the precision lacks.
    """
    own = bundle.file(weights_file(stage))
    wanted = VARIANTS[precision].stored
    if precision == "fp32" or all(tensor.dtype == wanted for tensor in stored_tensors(own).values()):
        return bundle
    name = weights_file(stage, precision)
    aside = bundle.path / f".{name}.part"
    try:
        with safe_open(own, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
        write_safetensors(aside, state, precision)
        return put_file(bundle, aside, name)
    finally:
        aside.unlink(missing_ok=True)


def rounded(module: nn.Module, precision: str) -> None:
    """Round a float32 module's weights, in place, to what the precision stores: the gate's reference computes so."""
    for parameter in module.parameters() if precision != "fp32" else ():
        parameter.data.copy_(parameter.data.to(DTYPES[precision]))


def lowered(module: nn.Module, precision: str) -> nn.Module:
    """A stage's module with its network in `precision`: what is traced, and what rounding costs in PyTorch."""
    for network in module.children():  # what belongs to the stage itself stays in float32
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(DTYPES[precision])
    return module


def in_float32(graph: Path, to: Path) -> None:
    """Write a copy of a graph, in the same folder, that computes in float32 what the graph computes in fewer bits.

    It reads the same weights. ONNX Runtime's CPU provider can run it whatever the graph's own precision, so it shows
    every error of structure, at float32's tolerance: rounding hides none.
    """
    model = ir.load(graph)
    if model.functions:
        raise BackendError(f"{graph.name}: has functions, which cannot be computed in float32")
    for value in list(model.graph.initializers.values()):
        if value.dtype in LOW:
            if isinstance(value.const_value, ir.ExternalTensor):
                cast_behind(model.graph, value, ir.DataType.FLOAT)
            else:
                assert value.const_value is not None
                value.const_value = _float32(value.const_value)
                value.dtype = ir.DataType.FLOAT
    for node in model.graph.all_nodes():
        for key, attribute in node.attributes.items():
            if node.op_type == "Cast" and key == "to" and attribute.as_int() in LOW:
                node.attributes[key] = ir.AttrInt64(key, int(ir.DataType.FLOAT))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in LOW:
                node.attributes[key] = ir.AttrTensor(key, _float32(attribute.as_tensor()))
        for out in node.outputs:
            if out.dtype in LOW:
                out.dtype = ir.DataType.FLOAT
    ir.save(model, to)


LOW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _float32(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)
