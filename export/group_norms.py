"""Writes group normalisations with operators for which ONNX Runtime's CPU provider has kernels.

It has none for GroupNormalization. When it loads a graph, it replaces each of these nodes by the operators of the
node's definition: loading takes longer, and a run passes over memory more often. It has a kernel for
InstanceNormalization, which gives the same numbers for an input of shape [N, groups, values of a group].
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from higen.export.rounding import Nodes

__all__ = ["with_instance_norms"]


def with_instance_norms(graph: ir.Graph) -> None:
    """Replace each GroupNormalization in float32 by an InstanceNormalization of its groups, a scale and a bias.

    The shape of the input [N, C, ...] may be dynamic; its number of axes must be known. In other precisions the nodes
    stay: engines have kernels for them, which compute the statistics in float32.
    """
    for node in list(graph):
        if node.op_type == "GroupNormalization" and node.domain == "" and node.outputs[0].dtype == ir.DataType.FLOAT:
            _replace(graph, node)


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    x, scale, bias = node.inputs
    assert x is not None
    assert x.shape is not None
    assert scale is not None
    assert bias is not None
    nodes, groups = Nodes(graph, node, str(node.name)), node.attributes["num_groups"].as_int()
    ones, zeros = (nodes.constant(name, np.full(groups, n, np.float32)) for name, n in (("ones", 1), ("zeros", 0)))
    rows = nodes.add("Reshape", [x, nodes.constant("to_groups", np.array([0, groups, -1]))], "groups")
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    normed = nodes.add("InstanceNormalization", [rows, ones, zeros], "normed", epsilon=epsilon)
    y = nodes.add("Reshape", [normed, nodes.add("Shape", [x], "shape", ir.DataType.INT64)], "ungrouped")
    per_channel = nodes.constant("per_channel", np.array([-1, *[1] * (len(x.shape) - 2)]))
    for op, value, what in (("Mul", scale, "scale"), ("Add", bias, "bias")):
        y = nodes.add(op, [y, nodes.add("Reshape", [value, per_channel], what)], f"with_{what}")
    out = node.outputs[0]
    y.shape = x.shape
    out.replace_all_uses_with(y, replace_graph_outputs=True)
    name, out.name = out.name, None
    graph.remove(node, safe=True)
    y.name = name
