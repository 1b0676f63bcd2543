"""Quantised denoising graphs, from the built-in model's float32 graph: what is chosen, where nodes go, what is lost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnxscript.optimizer import optimize_ir

import higen
from higen.api import default_model
from higen.backends.onnx import OnnxBackend
from higen.bundle import Bundle, graph_file, put_file
from higen.engines.compare import compare
from higen.engines.model import build_engines
from higen.engines.shapes import read_profile
from higen.engines.targets import parse_targets
from higen.errors import BackendError, ModelError, RequestError
from higen.export.graphs import is_bookkeeping
from higen.export.model import export_model
from higen.export.quantize import KINDS, Report, insert, quantizable, quantize, record_calls


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(default_model(), tmp_path_factory.mktemp("quantize") / "model"))


@pytest.fixture(scope="module")
def calls(model: Path) -> Any:
    """Three steps of a tiny clip."""
    bundle = Bundle.open(model)
    step = bundle.config.autoencoder.factor * bundle.config.unet.size_multiple
    return record_calls(bundle, ["a red heart"], 4, 3, frames=2, width=step, height=step)


@pytest.fixture(scope="module")
def quantized(model: Path, calls: Any) -> tuple[Bundle, Report]:
    reports: list[Report] = []
    bundle = quantize(Bundle.open(model), calls, "int8", ["spatial_unet"], 0.3, reports.append)
    return bundle, reports[0]


def test_calls_are_taken_from_the_whole_loop(calls: Any) -> None:
    assert {stage: len(found) for stage, found in calls.items()} == {"spatial_unet": 3, "temporal_unet": 3}
    steps = [int(call["t"][0]) for call in calls["temporal_unet"]]
    assert steps == sorted(steps, reverse=True)
    assert len(set(steps)) == 3


def test_the_graph_runs_and_differs_by_what_was_measured(
    quantized: tuple[Bundle, Report], calls: Any, model: Path
) -> None:
    bundle, report = quantized
    assert bundle.precisions("spatial_unet") == ("fp32", "int8")
    assert report.chosen + len(report.kept) == report.candidates
    plain, low = OnnxBackend(bundle, "cpu", "fp32"), OnnxBackend(bundle, "cpu", "int8")
    worst = 0.0
    for call in calls["spatial_unet"]:
        expected, found = (b.to_numpy(b.run("spatial_unet", **call)["previous"]) for b in (plain, low))
        worst = max(worst, float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean())))
    assert 0 < worst <= 0.3
    assert worst == pytest.approx(report.error, rel=1e-3)


def test_sensitive_layers_are_never_candidates(model: Path) -> None:
    graph = ir.load(model / graph_file("spatial_unet")).graph
    names = {layer.weight for layer in quantizable(graph)}
    assert len(names) > 10
    for part in ("unet.conv_in", "unet.conv_out", "unet.time", "embedding", "norm"):
        assert not any(part in name.partition(".blocks")[0] for name in names), part
    assert all(layer.node.op_type in ("Conv", "MatMul") for layer in quantizable(graph))


def test_the_nodes_are_what_the_formula_says(model: Path) -> None:
    """x -> round(x / s) * s with s = range / 127, and a scale for each output channel of the weight."""
    graph = ir.load(model / graph_file("spatial_unet")).graph
    conv = next(layer for layer in quantizable(graph) if layer.node.op_type == "Conv")
    product = next(layer for layer in quantizable(graph) if layer.node.op_type == "MatMul")
    insert(graph, [conv.weight, product.weight], {conv.weight: 6.35, product.weight: 12.7}, KINDS["int8"])
    for layer, high in ((conv, 6.35), (product, 12.7)):
        activation, kernel = (value.producer() for value in layer.node.inputs[:2])
        assert activation.op_type == kernel.op_type == "DequantizeLinear"
        assert float(activation.inputs[1].const_value.numpy()) == pytest.approx(high / 127)
        stored = graph.initializers[layer.weight].const_value.numpy().astype(np.float32)
        channels = stored.reshape(stored.shape[0], -1)
        np.testing.assert_allclose(kernel.inputs[1].const_value.numpy(), np.abs(channels).max(1) / 127, rtol=1e-5)
        assert kernel.attributes["axis"].as_int() == (0 if layer is conv else 1)
        assert not kernel.inputs[2].const_value.numpy().any()


def test_weights_stay_in_their_file(quantized: tuple[Bundle, Report]) -> None:
    bundle, _ = quantized
    assert bundle.weights("spatial_unet", "int8") == bundle.weights("spatial_unet", "fp32")
    size = bundle.files[graph_file("spatial_unet", "int8")].size
    assert size < bundle.files[graph_file("spatial_unet")].size + 2**20
    assert not list(bundle.path.glob(".*part"))


def test_stages_that_are_not_quantised_run_as_they_are(quantized: tuple[Bundle, Report]) -> None:
    with higen.load(quantized[0].path, "onnx", precision="int8") as pipe:
        report = " ".join(pipe.report().split())
    assert "spatial_unet onnx (cpu, int8)" in report
    assert "vae_decoder onnx (cpu, fp32)" in report


def test_a_tolerance_that_cannot_hold_is_one_error(model: Path, calls: Any) -> None:
    few = {stage: found[:1] for stage, found in calls.items()}
    with pytest.raises(BackendError, match=r"spatial_unet: a tenth of its layers in 8 bits differs by .*1e-09"):
        quantize(Bundle.open(model), few, "int8", ["spatial_unet"], 1e-9)
    assert not list(model.glob(".*part"))


def test_wrong_wishes_are_refused(model: Path, calls: Any) -> None:
    bundle = Bundle.open(model)
    with pytest.raises(RequestError, match="precision='int4': one of 'int8'"):
        quantize(bundle, calls, "int4")
    with pytest.raises(RequestError, match=r"stages=\['vae_decoder'\]"):
        quantize(bundle, calls, "int8", ["vae_decoder"])
    with pytest.raises(ModelError, match=r"no spatial_unet\.fp16\.onnx"):
        quantize(bundle, calls, "int8.fp16", ["spatial_unet"])
    with pytest.raises(RequestError, match="precision='int8': one of 'fp32', 'fp16', 'bf16'"):
        export_model(bundle, precision="int8")


def test_an_engine_of_a_quantised_graph(quantized: tuple[Bundle, Report], calls: Any) -> None:
    """Its graph may need its axes folded first: see test_engine_stages."""
    pytest.importorskip("tensorrt_rtx")
    bundle, _ = quantized
    graph = ir.load(bundle.path / graph_file("spatial_unet", "int8"))
    optimize_ir(graph, should_fold=is_bookkeeping)
    aside = bundle.path / ".graph.part"
    ir.save(graph, aside)
    bundle = put_file(bundle, aside, graph_file("spatial_unet", "int8"))
    profile = read_profile("default", bundle.config)
    (record,) = build_engines(bundle, parse_targets("rtx-sm89"), [profile], ["spatial_unet"], "int8")
    assert record.precision == "int8"
    log = bundle.path / "engines" / "rtx-sm89" / "spatial_unet.log"
    assert "Datatype: Int8" in log.read_text(encoding="utf-8")
    shutil.rmtree(bundle.path / "engines")


def test_polygraphy_tells_the_same_story(quantized: tuple[Bundle, Report]) -> None:
    pytest.importorskip("polygraphy")
    bundle = Bundle.open(quantized[0].path)  # other tests have quantised again since
    rows = compare(bundle, "onnx", "int8", ["spatial_unet"], "a red heart", steps=2)
    assert [(row.output, row.calls) for row in rows] == [("latents", 2), ("previous", 2)]
    assert all(0 < row.mean <= row.largest for row in rows)
    strict = compare(bundle, "onnx", "int8", ["spatial_unet"], "a red heart", steps=2, tolerance=1e-9)
    assert not any(row.passed for row in strict)
    assert strict[0].largest == pytest.approx(rows[0].largest)
    with pytest.raises(RequestError, match="with itself"):
        compare(bundle, "onnx", "fp32")
    with pytest.raises(RequestError, match="with='torch'"):
        compare(bundle, "torch", "fp16")
