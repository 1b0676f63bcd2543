"""Group normalisations of exported graphs, against PyTorch's and against ONNX's own definition."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from higen.export.group_norms import with_instance_norms


def model(dims: int, channels: int, groups: int, epsilon: float, dtype: ir.DataType) -> ir.Model:
    """One node with an input of free sizes; its output is the graph's."""
    given = [("x", ["n", channels, *"abc"[: dims - 2]]), ("scale", [channels]), ("bias", [channels])]
    inputs = [ir.Value(name=n, shape=ir.Shape(s), type=ir.TensorType(dtype)) for n, s in given]
    node = ir.node("GroupNormalization", inputs, {"num_groups": groups, "epsilon": epsilon}, name="norm")
    node.outputs[0].name, node.outputs[0].dtype = "y", dtype
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 21}, name="one")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    ("dims", "channels", "groups", "epsilon"), [(3, 6, 3, 1e-5), (4, 32, 32, 1e-6), (5, 8, 1, 0.1)]
)
def test_the_numbers_are_pytorchs(dims: int, channels: int, groups: int, epsilon: float) -> None:
    made = model(dims, channels, groups, epsilon, ir.DataType.FLOAT)
    with_instance_norms(made.graph)
    assert "GroupNormalization" not in [node.op_type for node in made.graph]
    assert [value.name for value in made.graph.outputs] == ["y"]
    session = ort.InferenceSession(ir.to_proto(made).SerializeToString(), providers=["CPUExecutionProvider"])
    numbers = np.random.default_rng(dims)
    scale, bias = numbers.standard_normal((2, channels), np.float32)
    for sizes in ((5, 3, 2), (1, 4, 6)):
        x = 30 + 4 * numbers.standard_normal((2, channels, *sizes[: dims - 2]), np.float32)
        (y,) = session.run(None, {"x": x, "scale": scale, "bias": bias})
        wanted = torch.nn.functional.group_norm(
            torch.from_numpy(x), groups, weight=torch.from_numpy(scale), bias=torch.from_numpy(bias), eps=epsilon
        )
        np.testing.assert_allclose(y, wanted.numpy(), atol=2e-5)


def test_other_precisions_keep_their_nodes() -> None:
    made = model(4, 8, 2, 1e-5, ir.DataType.FLOAT16)
    with_instance_norms(made.graph)
    assert [node.op_type for node in made.graph] == ["GroupNormalization"]
