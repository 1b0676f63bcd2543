"""The files that a graph takes tensors from, wherever it names them; compared with what onnx finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, helper

from higen.api import default_model
from higen.backends.external_data import external_files, graph_files
from higen.bundle import Bundle
from higen.errors import IntegrityError


def outside(name: str, location: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in (("offset", "0"), ("location", location), ("length", "8")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


def graph(**fields: object) -> GraphProto:
    return GraphProto(name="g", **fields)


def constant(tensor: TensorProto) -> NodeProto:
    return helper.make_node("Constant", [], ["c"], value=tensor)


def written(path: Path, **fields: object) -> Path:
    path.write_bytes(ModelProto(ir_version=10, **fields).SerializeToString())
    return path


def test_graphs_of_the_built_in_model() -> None:
    bundle = Bundle.open(default_model())
    for name in bundle.graphs:
        found = onnx.load(str(bundle.path / name), load_external_data=False).graph.initializer
        wanted = {e.value for tensor in found for e in tensor.external_data if e.key == "location"}
        assert set(external_files(bundle.path / name)) == wanted
        assert graph_files(bundle, name) == (name, bundle.weights(name.removesuffix(".onnx")))


@pytest.mark.parametrize("where", ["initializer", "sparse", "attribute", "list", "branch", "function", "nested"])
def test_every_place_of_a_tensor_is_looked_at(tmp_path: Path, where: str) -> None:
    tensor, inner = outside("w", "../é.bin"), graph(node=[constant(outside("w", "../é.bin"))])
    fields = {
        "initializer": {"graph": graph(initializer=[helper.make_tensor("a", 1, [1], [0.0]), tensor])},
        "sparse": {"graph": graph(sparse_initializer=[SparseTensorProto(indices=tensor, dims=[2])])},
        "attribute": {"graph": graph(node=[constant(tensor)])},
        "list": {"graph": graph(node=[helper.make_node("F", [], ["x"], domain="d", tensors=[tensor])])},
        "branch": {"graph": graph(node=[helper.make_node("If", ["c"], ["x"], then_branch=inner)])},
        "function": {"functions": [onnx.FunctionProto(name="f", node=[constant(tensor)])]},
        "nested": {
            "graph": graph(
                node=[
                    helper.make_node(
                        "Loop", ["c"], ["x"], body=graph(node=[helper.make_node("If", ["c"], ["x"], b=inner)])
                    )
                ]
            )
        },
    }
    assert external_files(written(tmp_path / "a.onnx", **fields[where])) == {"../é.bin"}


@pytest.mark.parametrize(
    "data", [b"\xff", b"\x3a\xff\xff\xff\xff\x0f", b"\x3a\x05abc", b"\x0b", b"\x80" * 20, b"\x0d\0"]
)
def test_a_file_that_is_not_a_graph_is_one_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.onnx").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"a\.onnx: .*not an ONNX graph"):
        external_files(tmp_path / "a.onnx")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_an_altered_graph_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "altered.onnx"
    whole = bytearray(
        written(path, graph=graph(initializer=[outside("w", "a")], node=[constant(outside("v", "b"))])).read_bytes()
    )
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(whole))
    try:
        found = external_files(path)
    except IntegrityError:
        return
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception:  # Exception is the only common base of protobuf's errors
        return
    tensors = [*model.graph.initializer, *(a.t for node in model.graph.node for a in node.attribute if a.HasField("t"))]
    assert {e.value for tensor in tensors for e in tensor.external_data if e.key == "location"} <= found


def test_a_graph_that_points_into_an_unlisted_file_is_refused(tmp_path: Path) -> None:
    """ONNX Runtime would load the file, whatever it contains."""
    import shutil

    from higen.backends.onnx import OnnxBackend
    from higen.backends.options import Options
    from higen.bundle import put_file
    from higen.export.interface import graph_inputs

    model = Path(shutil.copytree(default_model(), tmp_path / "model"))
    shutil.copyfile(model / "unet.safetensors", model / "swapped.bin")
    content = onnx.load(str(model / "conditioner.onnx"), load_external_data=False)
    for tensor in content.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "swapped.bin"
    aside = model / ".aside"
    aside.write_bytes(content.SerializeToString())
    bundle = put_file(Bundle.open(model), aside, "conditioner.onnx", graph_inputs(aside))
    with pytest.raises(
        IntegrityError, match=r"conditioner\.onnx: takes tensors from 'swapped\.bin', which higen\.json"
    ):
        OnnxBackend(bundle, Options(device="cpu")).prepare("conditioner")


def test_numbers_are_what_the_file_says(tmp_path: Path) -> None:
    """The graph is long, so that lengths take several bytes."""
    tensors = [outside(f"w{i}", f"file {i % 3}") for i in range(500)]
    values = np.zeros(100_000, np.float32)
    large = helper.make_tensor("large", TensorProto.FLOAT, [100_000], values.tobytes(), raw=True)
    assert external_files(written(tmp_path / "a.onnx", graph=graph(initializer=[*tensors, large]))) == {
        "file 0",
        "file 1",
        "file 2",
    }
