"""Graphs without large tensors: their initializers refer to the model's safetensors files."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

__all__ = ["StoredTensor", "cast_behind", "point_into", "stored_tensors"]

DTYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16, "I64": ir.DataType.INT64}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file: dtype, shape, offset from the file's start and length in bytes."""

    file: Path
    dtype: ir.DataType
    shape: tuple[int, ...]
    offset: int
    length: int


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file. Only its header is read (8 bytes of length, then JSON, then the data)."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    data = 8 + length
    return {
        name: StoredTensor(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), data + begin, end - begin)
        for name, entry in header.items()
        if name != "__metadata__"
        for begin, end in [entry["data_offsets"]]
    }


def point_into(graph: ir.Graph, weights: dict[str, StoredTensor], folder: Path) -> set[str]:
    """Replace each initializer named in `weights` by a reference into its file, relative to `folder`.

    If a weight is stored in another precision than the graph computes in, a Cast is added after it. A runtime folds the
    Cast when it loads the graph. Returns the names that were replaced.
    """
    replaced = set()
    for name, value in list(graph.initializers.items()):
        stored = weights.get(name)
        if stored is None:
            continue
        computed = value.dtype
        value.const_value = ir.ExternalTensor(
            stored.file.name,
            stored.offset,
            stored.length,
            dtype=stored.dtype,
            shape=ir.Shape(stored.shape),
            name=name,
            base_dir=folder,
        )
        if computed is not None and computed != stored.dtype:
            cast_behind(graph, value, computed)
        value.dtype, value.shape = stored.dtype, ir.Shape(stored.shape)
        replaced.add(name)
    return replaced


def cast_behind(graph: ir.Graph, value: ir.Value, computed: ir.DataType) -> None:
    cast = ir.node("Cast", [value], {"to": int(computed)}, name=f"{value.name}.cast")
    out = cast.outputs[0]
    out.name, out.dtype, out.shape = f"{value.name}.computed", computed, value.shape
    for user, index in list(value.uses()):
        if user is not cast:
            user.replace_input_with(index, out)
    graph.insert_before(graph[0], cast)
