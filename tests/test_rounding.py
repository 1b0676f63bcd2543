"""Rounding of quantised layers: the nodes follow the formulas, and the measured values are those that get computed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from higen.api import default_model
from higen.bundle import graph_file
from higen.export.layers import KINDS, quantizable
from higen.export.rounding import SWITCHES, Nodes, blocks_of, insert, insert_switched, rounded_blocks

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
"""The magnitudes of E2M1. Every other one, starting with 0, has an even last bit."""

STAGE = "spatial_unet"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(default_model(), tmp_path_factory.mktemp("rounding") / "model"))


def load(model: Path) -> ir.Model:
    return ir.load(model / graph_file(STAGE))


def nearest(values: Any) -> Any:
    """The nearest E2M1 values by exhaustive search; ties go to the even value."""
    off = np.abs(np.abs(values)[..., None] - E2M1)
    order = np.where(np.arange(8) % 2 == 0, 0, 1e-9)  # prefers the even value in a tie
    return np.copysign(E2M1[np.argmin(off + order, axis=-1)], values)


def decoded(codes: Any, scales: Any, whole: Any) -> Any:
    blocks = codes.astype(np.float64).reshape(*scales.shape, 16)
    return (blocks * (scales.astype(np.float64) * float(whole))[..., None]).reshape(codes.shape)


def emulated(values: Any, largest: float) -> Any:
    """The result of `rounded_blocks` in ONNX Runtime."""
    x = ir.Value(name="x", shape=ir.Shape(values.shape), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], name="blocks", opset_imports={"": 21})
    out = rounded_blocks(Nodes(graph, None, "x"), x, values.shape[-1], largest, "x")
    out.shape = ir.Shape(values.shape)
    graph.outputs.append(out)
    content = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return ort.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, {"x": values})[0]


def test_values_in_blocks_are_rounded_to_the_nearest() -> None:
    """A grid with every tie; the values make all scales 1."""
    grid = np.arange(-48, 49) / 8
    values = np.concatenate([grid, np.full(16 * 7 - len(grid), 6.0)]).astype(np.float32).reshape(7, 16)
    values[:, 0] = 6
    codes, scales, whole = blocks_of(values, 6 * 448)
    assert float(whole) == 1
    assert (scales.astype(np.float32) == 1).all()
    np.testing.assert_array_equal(codes.astype(np.float32), nearest(values))
    np.testing.assert_array_equal(emulated(values, 6 * 448), nearest(values))


floats = st.floats(-1000, 1000, width=32)


@given(values=arrays(np.float32, (3, 2, 32), elements=floats), largest=st.sampled_from([1000.0, 50.0]))
def test_what_is_measured_is_what_is_stored(values: Any, largest: float) -> None:
    """Both saturate if the range is too small."""
    np.testing.assert_allclose(emulated(values, largest), decoded(*blocks_of(values, largest)), rtol=1e-6, atol=1e-30)


def test_blocks_are_as_near_as_their_types_allow() -> None:
    """The error is at most a sixth of the block's largest value (half the step from 4 to 6), plus E4M3's rounding."""
    values = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)
    off = np.abs(decoded(*blocks_of(values, float(np.abs(values).max()))) - values)
    largest = np.abs(values).reshape(40, 4, 16).max(-1).repeat(16, -1)
    assert (off <= largest * (1 / 6 + 1 / 16)).all()
    assert np.sqrt((off**2).mean()) < 0.12


def test_the_nodes_are_what_the_formula_says(model: Path) -> None:
    """x -> round(x / s) * s with s = range / 127, and a scale for each output channel of the weight."""
    whole = load(model)
    graph = whole.graph
    conv = next(layer for layer in quantizable(graph) if layer.node.op_type == "Conv")
    product = next(layer for layer in quantizable(graph) if layer.node.op_type == "MatMul")
    insert(whole, [conv.weight, product.weight], {conv.weight: 6.35, product.weight: 12.7}, KINDS["int8"])
    for layer, high in ((conv, 6.35), (product, 12.7)):
        activation, kernel = (value.producer() for value in layer.node.inputs[:2])
        assert activation.op_type == kernel.op_type == "DequantizeLinear"
        assert float(activation.inputs[1].const_value.numpy()) == pytest.approx(high / 127)
        stored = graph.initializers[layer.weight].const_value.numpy().astype(np.float32)
        channels = stored.reshape(stored.shape[0], -1)
        np.testing.assert_allclose(kernel.inputs[1].const_value.numpy(), np.abs(channels).max(1) / 127, rtol=1e-5)
        assert kernel.attributes["axis"].as_int() == (0 if layer is conv else 1)
        assert not kernel.inputs[2].const_value.numpy().any()


def test_a_rounded_output_is_what_the_formula_says(model: Path) -> None:
    """Every user of a convolution takes its output from 8 bits around 128, even a layer behind it."""
    whole = load(model)
    convolutions = {layer.weight: 6.35 for layer in quantizable(whole.graph) if layer.node.op_type == "Conv"}
    users = {name: len(layer_of(whole, name).node.outputs[0].uses()) for name in convolutions}
    insert(whole, list(convolutions), convolutions, KINDS["int8"], convolutions)
    for node in [node for node in whole.graph if node.name.endswith(".output.quantize")]:
        (behind,) = [user for user, _ in node.outputs[0].uses()]
        assert len(behind.outputs[0].uses()) == users.pop(node.name.removesuffix(".output.quantize"))
        assert (len(node.inputs[0].uses()), node.inputs[0].producer().op_type) == (1, "Conv")
        for end in (node, behind):
            assert float(end.inputs[1].const_value.numpy()) == pytest.approx(0.05)
            assert end.inputs[2].const_value.numpy() == np.uint8(128)
    assert not users


def layer_of(model: ir.Model, weight: str) -> Any:
    return next(layer for layer in quantizable(model.graph) if layer.weight == weight)


def test_nvfp4_weights_lie_in_the_graph(model: Path) -> None:
    """Two codes per byte, one scale per sixteen values, and the float weight is no longer used."""
    whole = load(model)
    layer = quantizable(whole.graph, KINDS["nvfp4"])[0]
    stored = whole.graph.initializers[layer.weight].const_value.numpy().astype(np.float32)
    insert(whole, [layer.weight], {layer.weight: 4.0}, KINDS["nvfp4"])
    ir.save(whole, model / "graph.part")
    content = onnx.load(str(model / "graph.part"), load_external_data=False)
    assert {entry.domain: entry.version for entry in content.opset_import} == {"": 23, "trt": 1}
    tensors = {tensor.name: tensor for tensor in content.graph.initializer}
    assert layer.weight not in tensors
    codes, scales, scale = (tensors[f"{layer.weight}.kernel.{part}"] for part in ("codes", "scales", "scale"))
    assert codes.data_type == onnx.TensorProto.FLOAT4E2M1
    assert (list(codes.dims), len(codes.raw_data)) == (list(stored.shape), stored.size // 2)
    assert scales.data_type == onnx.TensorProto.FLOAT8E4M3FN
    assert list(scales.dims) == [stored.shape[0], stored.shape[1] // 16]
    values = decoded(*(onnx.numpy_helper.to_array(tensor) for tensor in (codes, scales, scale)))
    np.testing.assert_allclose(values, decoded(*blocks_of(stored, np.abs(stored).max())), rtol=1e-6)
    assert np.sqrt(((values - stored) ** 2).mean() / (stored**2).mean()) < 0.12
    makers = {name: node for node in content.graph.node for name in node.output}
    product = next(node for node in content.graph.node if node.name == layer.node.name)
    entering = makers[makers[product.input[0]].input[0]]
    assert (entering.op_type, entering.domain) == ("TRT_FP4DynamicQuantize", "trt")


def test_sensitive_layers_are_never_candidates(model: Path) -> None:
    graph = load(model).graph
    names = {layer.weight for layer in quantizable(graph)}
    assert len(names) > 10
    for part in ("unet.conv_in", "unet.conv_out", "unet.time", "embedding", "norm"):
        assert not any(part in name.partition(".blocks")[0] for name in names), part
    assert all(layer.node.op_type in ("Conv", "MatMul") for layer in quantizable(graph))
    products = quantizable(graph, KINDS["nvfp4"])
    assert {layer.weight for layer in products} < names
    assert {layer.node.op_type for layer in products} == {"MatMul"}


@pytest.mark.parametrize("kind", ["int8", "fp8", "w8"])
def test_a_switched_graph_computes_what_the_chosen_layers_would(model: Path, kind: str) -> None:
    random = np.random.default_rng(0)
    layers = quantizable(load(model).graph)[3:40:6]
    ranges = {layer.weight: 4.0 for layer in layers}
    outputs = {layer.weight: 6.0 for layer in layers if layer.rounds_output(KINDS[kind])}
    assert bool(outputs) == (kind == "int8")
    switched = load(model)
    names = insert_switched(switched.graph, ranges, KINDS[kind], outputs=outputs)
    assert names == list(ranges)
    inputs = {
        value.name: np.ones([n if isinstance(n, int) else 4 for n in value.shape], np.int64)
        if value.dtype == ir.DataType.INT64
        else random.normal(size=[n if isinstance(n, int) else 4 for n in value.shape]).astype(np.float32)
        for value in load(model).graph.inputs
    }
    switches = np.arange(len(names)) % 2 == 0
    real = load(model)
    insert(real, [name for name, on in zip(names, switches, strict=True) if on], ranges, KINDS[kind], outputs)
    expected = run(model, real, inputs)
    np.testing.assert_allclose(run(model, switched, {**inputs, SWITCHES: switches}), expected, atol=2e-5)
    plain = run(model, switched, {**inputs, SWITCHES: ~switches & switches})
    np.testing.assert_allclose(plain, run(model, load(model), inputs), atol=2e-5)
    assert np.abs(plain - expected).max() > 1e-3


def run(model: Path, graph: ir.Model, inputs: dict[str, Any]) -> Any:
    ir.save(graph, model / "graph.part")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # integer kernels round differently
    session = ort.InferenceSession(str(model / "graph.part"), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[1]
