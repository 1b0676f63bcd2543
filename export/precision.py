"""Variants of a model in a lower precision: weights and graphs in fewer bits (higen/precision.py).

Inputs and outputs of a stage stay float32 in every precision, and so do norm statistics, guidance and the solver's
update. The stage modules ensure that.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from safetensors import safe_open
from torch import nn

from higen.bundle import Bundle, put_file
from higen.errors import BackendError, RequestError
from higen.export.weights import DTYPES, cast_behind, stored_tensors
from higen.models.weights import write_safetensors
from higen.precision import NEWEST_OPSET, PRECISIONS
from higen.stages import Stage
from higen.staging import staging

__all__ = ["check_opset", "computed_in", "in_float32", "lowered", "rounded", "write_weights"]

ORDER = ("fp32", "bf16", "fp16")
"""Precisions, safest first. bfloat16 has the range of float32."""


def check_opset(precision: str, opset: int | None) -> int:
    """The opset to export with; None: the precision's default. Raises RequestError for one outside its range."""
    if precision not in PRECISIONS:
        raise RequestError(f"precision={precision!r}: one of {', '.join(map(repr, PRECISIONS))}")
    variant = PRECISIONS[precision]
    chosen = variant.default_opset if opset is None else opset
    if not variant.smallest_opset <= chosen <= NEWEST_OPSET:
        raise RequestError(f"opset={chosen}: from {variant.smallest_opset} to {NEWEST_OPSET} for {precision}")
    return chosen


def computed_in(stage: Stage, precision: str) -> str:
    """The precision in which a stage's graph computes: `precision`, or fp32 if the stage must not compute in it.

    The weights are stored in `precision` in both cases.
    """
    return precision if ORDER.index(precision) <= ORDER.index(stage.lowest) else "fp32"


def write_weights(bundle: Bundle, stage: str, precision: str) -> Bundle:
    """Make sure that the model has a stage's weights in `precision`; returns the bundle with them.

    They are cast tensor by tensor from the model's own weights. Nothing is written for fp32, because its graphs cast
    the weights on loading, or if the model's own weights have that precision. Raises CheckpointError for a value that
    the precision cannot represent.
    """
    own = bundle.file(bundle.weights(stage))
    wanted = DTYPES[PRECISIONS[precision].stored]
    if precision == "fp32" or all(tensor.dtype == wanted for tensor in stored_tensors(own).values()):
        return bundle
    name = bundle.weights_variant(stage, precision)
    with staging(bundle.path) as place:
        aside = place.folder / name
        with safe_open(own, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
        write_safetensors(aside, state, precision)
        return put_file(bundle, aside, name)


def rounded(module: nn.Module, precision: str) -> None:
    """Round a float32 module's weights in place to the values that `precision` can store, for the gate's reference.

    Buffers in the network's state dict are stored and rounded in the same way.
    """
    for tensor in module.state_dict().values() if precision != "fp32" else ():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(_dtype(precision)))


def lowered(module: nn.Module, precision: str) -> nn.Module:
    """A stage's module with its network cast to `precision`, for tracing and for measuring rounding in PyTorch."""
    for network in module.children():  # the stage's own tensors stay in float32
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(_dtype(precision))
    return module


def _dtype(precision: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, PRECISIONS[precision].dtype)
    return dtype


def in_float32(graph: Path, to: Path) -> None:
    """Write a copy of a graph, in the same folder, that computes in float32 what the graph computes in fewer bits.

    It reads the same weights. ONNX Runtime's CPU provider can run the copy for any precision. So structural errors are
    found with float32's tolerance, and rounding does not hide them.
    """
    model = ir.load(graph)
    if model.functions:
        raise BackendError(f"{graph.name}: has functions, which cannot be computed in float32")
    for value in list(model.graph.initializers.values()):
        if value.dtype in LOW:
            if isinstance(value.const_value, ir.ExternalTensor):
                if any(user.op_type != "Cast" for user, _ in value.uses()):  # else it computes in float32 already
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
