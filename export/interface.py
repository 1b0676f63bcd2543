"""Inputs and outputs of a finished graph file, read from the file itself."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from higen.bundle import GraphInput
from higen.errors import BackendError
from higen.manifest import Manifest
from higen.stages import FREE, TOKENS, Stage

__all__ = ["check_interface", "graph_inputs", "graph_sizes"]

TYPES = {ir.DataType.FLOAT: "float32", ir.DataType.INT64: "int64"}


def graph_inputs(graph: Path) -> tuple[GraphInput, ...]:
    """The inputs of a graph file as the manifest records them: a symbol for each free axis, a size for each fixed axis.

    Raises BackendError for an input with a dtype that no stage has, or with an unknown number of axes.
    """
    return tuple(_input(graph, value) for value in ir.load(graph).graph.inputs)


def _input(graph: Path, value: ir.Value) -> GraphInput:
    dtype = _dtype(value)
    if dtype is None or value.shape is None:
        raise BackendError(f"{graph.name}: its input {value.name} is {value.dtype} {value.shape}: float32 or int64")
    shape = tuple(n if isinstance(n, int) else str(n.value) for n in value.shape)
    return GraphInput(str(value.name), dtype, shape)  # type: ignore[arg-type]


def _dtype(value: ir.Value) -> str | None:
    return None if value.dtype is None else TYPES.get(value.dtype)


def check_interface(stage: Stage, graph: Path) -> None:
    """Check that a graph file has the inputs and outputs of the stage's row. Raises BackendError if not."""
    content = ir.load(graph).graph
    wanted = [(t.name, t.dtype) for t in stage.inputs] + [(name, "float32") for name in stage.graph_outputs]
    found = [(str(value.name), _dtype(value) or str(value.dtype)) for value in (*content.inputs, *content.outputs)]
    if found != wanted:
        off = ", ".join(f"{name} {dtype}" for name, dtype in found if (name, dtype) not in wanted)
        raise BackendError(
            f"{stage.name}: the graph has {off or found}; the stage takes and gives {wanted}, in every precision"
        )


def graph_sizes(manifest: Manifest, name: str, graph: Path) -> dict[str, int]:
    """The free symbols of a stage (without Y and X) that its graph file fixes, with their sizes."""
    stage, content, sizes = manifest.stage(name), ir.load(graph).graph, dict[str, int]()
    shapes = {t.name: t.shape for t in stage.inputs}
    ends = [(shapes[str(value.name)], value) for value in content.inputs if value.name in shapes]
    ends += [(t.shape, value) for t, value in zip(stage.outputs, content.outputs, strict=True)]
    for shape, value in ends:
        for symbol, size in zip(shape, value.shape or (), strict=False):
            if symbol in (*FREE[:5], TOKENS) and symbol not in manifest.fixed and isinstance(size, int):
                sizes[str(symbol)] = size
    return sizes
