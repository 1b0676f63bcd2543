"""Graphs as they were made before manifest version 2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from higen.bundle import Bundle, put_file
from higen.export.interface import graph_inputs

__all__ = ["as_version_1"]


def as_version_1(model: Path, stage: str) -> None:
    """Replace a stage's graph by the one that version 1 made: integer timesteps and one guidance value per sample."""
    bundle = Bundle.open(model)
    weights = model / bundle.weights(stage)
    content = weights.read_bytes()
    weights.unlink()  # it is a link, and ONNX Runtime does not follow links next to a graph
    weights.write_bytes(content)
    graph = onnx.load(str(model / f"{stage}.onnx"), load_external_data=False)
    rows = {value.name: value for value in graph.graph.input}
    rows["t"].type.tensor_type.elem_type = onnx.TensorProto.INT64
    del rows["guidance"].type.tensor_type.shape.dim[1]
    for node in graph.graph.node:
        for i, name in enumerate(node.input):
            if name in ("t", "guidance"):
                node.input[i] = f"{name}.now"
    nodes = [
        onnx.helper.make_node("Cast", ["t"], ["t.now"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Unsqueeze", ["guidance", "one"], ["guidance.now"]),
    ]
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "one"))
    for node in reversed(nodes):
        graph.graph.node.insert(0, node)
    aside = model / ".graph.part"
    onnx.save(graph, str(aside))
    put_file(bundle, aside, f"{stage}.onnx", graph_inputs(aside))
