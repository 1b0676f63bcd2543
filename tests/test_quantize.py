"""Quantised denoising graphs from the built-in model's float32 graph: chosen layers, places of nodes, loss."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import precisions
import pytest
from click.testing import CliRunner

import higen
from higen.api import default_model
from higen.backends.onnx import OnnxBackend
from higen.backends.options import Options
from higen.backends.sessions import session_options
from higen.bundle import Bundle, graph_file, put_file
from higen.engines.compare import compare
from higen.engines.model_engines import build_engines
from higen.engines.shapes import read_profile
from higen.engines.targets import parse_targets
from higen.errors import BackendError, BackendUnavailable, ModelError, OutputError, RequestError
from higen.export.interface import graph_inputs
from higen.export.model_graphs import export_model
from higen.export.quantize import Report, _choose, quantize, record_calls
from higen.exporter import main
from higen.train.emoji.evaluation.report import COLUMNS

GUIDED = ("spatial_unet", "temporal_unet")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(default_model(), tmp_path_factory.mktemp("quantize") / "model"))


@pytest.fixture(scope="module")
def calls(model: Path) -> Any:
    """The recorded calls of three steps of a tiny clip."""
    bundle = Bundle.open(model)
    step = bundle.manifest.sizes.multiple
    return record_calls(bundle, ["a red heart"], 4, 3, GUIDED, frames=2, width=step, height=step)


@pytest.fixture(scope="module")
def quantized(model: Path, calls: Any) -> tuple[Bundle, Report]:
    reports: list[Report] = []
    bundle = quantize(Bundle.open(model), calls, "int8", ["spatial_unet"], 0.3, reports.append)
    return bundle, reports[0]


def test_weights_with_several_hard_links_are_read(model: Path, calls: Any, tmp_path: Path) -> None:
    """As in a Hugging Face cache, and after `higen convert --preview`."""
    linked = Path(shutil.copytree(model, tmp_path / "model", copy_function=os.link))
    for name in ("higen.json", *(path.name for path in linked.glob("*.onnx"))):  # are replaced, and never written to
        assert (linked / name).stat().st_nlink > 1
    bundle = quantize(Bundle.open(linked), calls, "w8", ["spatial_unet"], 0.3)
    assert graph_file("spatial_unet", "w8") in bundle.files


@pytest.mark.parametrize(("name", "value"), [("frames", 0), ("height", 99968), ("width", 33)])
def test_calibration_videos_that_cannot_be_made_are_named(model: Path, name: str, value: int) -> None:
    with pytest.raises(RequestError, match=f"{name}={value}: "):
        record_calls(Bundle.open(model), ["a red heart"], 1, 1, **{name: value})


def test_recording_reports_its_progress(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = Bundle.open(model)
    step = bundle.manifest.sizes.multiple
    record_calls(bundle, ["a red heart"], 1, 1, None, True, frames=2, width=step, height=step)
    assert "calibration: 100%" in capsys.readouterr().err
    # With no time left, recording ends once each stage was called.
    found = record_calls(bundle, ["a red heart", "a cat"], 1, 9, seconds=0, frames=2, width=step, height=step)
    assert {len(calls) for calls in found.values()} == {1}
    assert capsys.readouterr().err == ""


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
    plain, low = (OnnxBackend(bundle, Options("cpu", p)) for p in ("fp32", "int8"))
    worst = 0.0
    for call in calls["spatial_unet"]:
        expected, found = (b.to_numpy(b.run("spatial_unet", **call)["previous"]) for b in (plain, low))
        worst = max(worst, float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean())))
    assert 0 < worst <= 0.3
    assert worst == pytest.approx(report.error, rel=1e-3)


def optimised(bundle: Bundle, precision: str, folder: Path) -> Any:
    """The graph that ONNX Runtime runs, with its weights."""
    options = session_options(1)
    options.optimized_model_filepath = str(folder / f"{precision}.onnx")
    graph = bundle.path / graph_file("spatial_unet", precision)
    ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath).graph


def test_integer_kernels_run_the_chosen_layers(quantized: tuple[Bundle, Report], tmp_path: Path) -> None:
    """ONNX Runtime has an integer kernel for each convolution that was chosen, and for most products."""
    bundle, report = quantized
    chosen = [n for n in ir.load(bundle.path / graph_file("spatial_unet", "int8")).graph if is_quantized(n)]
    assert len(chosen) == report.chosen
    runs = Counter(node.op_type for node in optimised(bundle, "int8", tmp_path).node)
    wanted = Counter(node.op_type for node in chosen)
    # ONNX Runtime 1.32 leaves some products in float32.
    assert runs["QLinearConv"] == wanted["Conv"] > 10
    assert 0.5 * wanted["MatMul"] < runs["MatMulIntegerToFloat"] <= wanted["MatMul"]


def test_weights_in_8_bits_take_a_third_of_the_memory(
    model: Path, calls: Any, quantized: tuple[Bundle, Report], tmp_path: Path
) -> None:
    reports: list[Report] = []
    few = {stage: found[:2] for stage, found in calls.items()}
    bundle = quantize(Bundle.open(model), few, "w8", ["spatial_unet"], 0.3, on_report=reports.append)
    assert (reports[0].chosen, reports[0].work) == (reports[0].candidates, 1)
    assert 0 < reports[0].error < quantized[1].error / 2  # int8 rounds the activations too
    backend, plain = (OnnxBackend(bundle, Options("cpu", precision)) for precision in ("w8", "fp32"))
    call = few["spatial_unet"][0]
    found, expected = (b.to_numpy(b.run("spatial_unet", **call)["previous"]) for b in (backend, plain))
    assert 0 < np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()) <= reports[0].error * 1.001
    graphs = {precision: optimised(bundle, precision, tmp_path) for precision in ("w8", "fp32")}
    held = {p: sum(onnx.numpy_helper.to_array(t).nbytes for t in g.initializer) for p, g in graphs.items()}
    assert held["w8"] < 0.36 * held["fp32"]  # biases, embeddings, the first and the last layer stay as they are


def test_a_quantised_graph_that_cannot_run_is_one_error(
    model: Path, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {stage: found[:1] for stage, found in calls.items()}
    monkeypatch.setattr("higen.export.quantize.insert", lambda model, *_: model.graph.outputs.clear())
    before = Bundle.open(model).files
    with pytest.raises(BackendError, match="spatial_unet: ONNX Runtime cannot run the quantised graph"):
        quantize(Bundle.open(model), few, "w8", ["spatial_unet"])
    assert Bundle.open(model).files == before
    assert not list(model.glob(".*part"))


def test_weights_stay_in_their_file(quantized: tuple[Bundle, Report]) -> None:
    bundle, _ = quantized
    assert bundle.weights("spatial_unet", "int8") == bundle.weights("spatial_unet", "fp32")
    size = bundle.files[graph_file("spatial_unet", "int8")].size
    assert size < bundle.files[graph_file("spatial_unet")].size + 2**20
    assert not list(bundle.path.glob(".*part"))


def test_stages_that_are_not_quantised_run_as_they_are(quantized: tuple[Bundle, Report]) -> None:
    with higen.load(quantized[0].path, "onnx", precision="int8") as pipe:
        pipe("a whale", frames=1, steps=1, guidance=2, progress=False)  # the usual preset needs no guided stage
        report = " ".join(pipe.report().split())
    assert "spatial_unet onnx (cpu, int8)" in report
    assert "vae_decoder onnx (cpu, fp32)" in report


def test_a_tolerance_that_cannot_hold_is_one_error(model: Path, calls: Any) -> None:
    few = {stage: found[:1] for stage, found in calls.items()}
    with pytest.raises(
        BackendError, match=r"spatial_unet: with a tenth of its layers in fewer bits, the output differs by .*1e-09"
    ):
        quantize(Bundle.open(model), few, "int8", ["spatial_unet"], 1e-9)
    assert not list(model.glob(".*part"))


@pytest.mark.parametrize(("seconds", "measured"), [(9, 9), (1000, 40)])
def test_layers_that_there_was_no_time_for_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch, seconds: int, measured: int
) -> None:
    """40 layers of equal error and increasing work. With 16 of them quantised, a step stays within the tolerance."""
    work = {f"layer {i}": float(i + 1) for i in range(40)}

    def errors(chosen: Collection[str], calls: Sequence[int] | None = None) -> list[float]:
        return [0.01 * len(chosen) ** 0.5] * 2

    trial: Any = SimpleNamespace(stage="step", work=work, errors=errors)
    ticks = iter(range(1000))
    monkeypatch.setattr("higen.export.quantize.time", SimpleNamespace(monotonic=lambda: next(ticks)))
    chosen, error = _choose(trial, 0.04, seconds - 1, False)
    assert set(chosen) == {f"layer {i}" for i in range(40 - min(measured, 16), 40)}
    assert error == errors(chosen)[0]
    with pytest.raises(BackendError, match=r"step: there was time to measure 3 of 40 layers, but 4 are needed"):
        _choose(trial, 0.04, next(ticks) + 3, False)


@pytest.mark.parametrize("size", ["256", "0x64", "64x-64", "64x64x3", "axb"])
def test_an_invalid_size_is_one_error(model: Path, size: str) -> None:
    done = CliRunner().invoke(main, ["quantize", str(model), "--precision", "int8", "--size", size])
    assert done.exit_code == 2
    assert f"size='{size}': WIDTHxHEIGHT in pixels, such as 256x256" in done.output


def test_the_command_takes_frames_size_and_minutes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr("higen.export.quantize.record_calls", lambda *a, **sizes: given.extend((a[-1], sizes)))
    monkeypatch.setattr("higen.export.quantize.quantize", lambda *a: given.append(a[-1]))
    command = ["quantize", str(model), "--precision", "int8", "--frames", "2", "--size", "32x64", "--minutes", "2"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert given[:2] == [60, {"frames": 2, "width": 32, "height": 64}]
    assert 60 < given[2] <= 120


def test_a_size_that_the_model_does_not_have_is_one_error(model: Path) -> None:
    done = CliRunner().invoke(main, ["quantize", str(model), "--precision", "int8", "--size", "33x64"])
    assert done.exit_code == 2
    assert "width=33" in done.output


def test_a_full_disk_is_one_error(model: Path, calls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    few = {stage: found[:1] for stage, found in calls.items()}
    monkeypatch.setattr("higen.export.quantize.put_file", full)
    with pytest.raises(OutputError, match=r"cannot be written.*No space left"):
        quantize(Bundle.open(model), few, "int8", ["spatial_unet"], 10.0)
    assert not list(model.glob(".*part"))


def test_wrong_options_are_refused(model: Path, calls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("higen.export.quantize.record_calls", None)  # it takes minutes and must not be called
    bundle = Bundle.open(model)
    with pytest.raises(RequestError, match="precision='int4': one of 'int8'"):
        quantize(bundle, calls, "int4")
    with pytest.raises(RequestError, match=r"stages=\['vae_decoder'\]"):
        quantize(bundle, calls, "int8", ["vae_decoder"])
    hint = f"(make it: higen-export onnx {model} --stage spatial_unet --precision fp16)"
    with pytest.raises(ModelError, match=re.escape(hint)):
        quantize(bundle, calls, "int8.fp16", ["spatial_unet"])
    assert hint in CliRunner().invoke(main, ["quantize", str(model), "--precision", "int8.fp16"]).output
    with pytest.raises(RequestError, match="precision='int8': one of 'fp32', 'fp16', 'bf16'"):
        export_model(bundle, precision="int8")


def test_the_most_work_within_the_tolerance(model: Path, calls: Any) -> None:
    """A looser tolerance quantises more work and more layers. The error never exceeds the tolerance."""
    reports: list[Report] = []
    few = {stage: found[1:2] for stage, found in calls.items()}
    quantize(Bundle.open(model), few, "int8", ["spatial_unet"], 10.0, reports.append)
    low, high = 0.4 * reports[0].error, 0.75 * reports[0].error
    for tolerance in (low, high):
        quantize(Bundle.open(model), few, "int8", ["spatial_unet"], tolerance, reports.append)
    all_of_them, strict, loose = reports
    assert strict.error <= low < loose.error <= high < all_of_them.error
    assert 0.1 < strict.work < loose.work < all_of_them.work == 1
    assert strict.chosen < loose.chosen < all_of_them.chosen == all_of_them.candidates
    assert all_of_them.kept == ()


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The built-in model. Its float32 graph replaces the float16 graph, which takes a minute to export."""
    model = Path(shutil.copytree(default_model(), tmp_path_factory.mktemp("half") / "model"))
    bundle = Bundle.open(model)
    aside = Path(shutil.copy(model / graph_file("spatial_unet"), model / ".graph.part"))
    return put_file(bundle, aside, graph_file("spatial_unet", "fp16"), graph_inputs(aside))


@pytest.mark.parametrize(
    ("precision", "target", "datatype", "lacking"),
    [
        ("int8.fp16", "rtx-sm89", "Int8", "rtx-sm75"),
        ("fp8.fp16", "rtx-sm89", "FP8", "rtx-sm86"),
        ("nvfp4.fp16", "rtx-sm120", "FP4E2M1", "rtx-sm89"),
    ],
)
def test_an_engine_of_a_quantised_graph(
    half: Bundle, calls: Any, precision: str, target: str, datatype: str, lacking: str
) -> None:
    """In the list of kernels, the chosen layers and no others multiply tensors of the type."""
    pytest.importorskip("tensorrt_rtx")
    reports: list[Report] = []
    bundle = quantize(half, calls, precision, ["spatial_unet"], on_report=reports.append)
    assert reports[0].error <= 0.05
    profile = read_profile("default", bundle.manifest)
    with pytest.raises(RequestError, match=f"precision='{precision}': {lacking[4:].upper()} cannot compute in it"):
        build_engines(bundle, parse_targets(f"{target},{lacking}"), [profile], ["spatial_unet"], precision)
    assert not (bundle.path / "engines").exists()
    (record,) = build_engines(bundle, parse_targets(target), [profile], ["spatial_unet"], precision)
    assert record.precision == precision
    log = (bundle.path / "engines" / target / "spatial_unet.log").read_text(encoding="utf-8")
    shutil.rmtree(bundle.path / "engines")
    graph = ir.load(bundle.path / graph_file("spatial_unet", precision)).graph
    layers = [node for node in graph if node.op_type in ("Conv", "MatMul")]
    chosen = {layer.name for layer in layers if is_quantized(layer)}
    assert len(chosen) == reports[0].chosen
    assert products(log, datatype) & {layer.name for layer in layers} == chosen


def is_quantized(node: ir.Node) -> bool:
    """Whether a layer's weight is rounded. Its activation may also be another layer's rounded output."""
    weight = node.inputs[1].producer() if node.op_type in ("Conv", "MatMul") and node.inputs[1] is not None else None
    if weight is not None and weight.op_type == "Transpose" and weight.inputs[0] is not None:  # in NVFP4
        weight = weight.inputs[0].producer()
    return weight is not None and weight.op_type == "DequantizeLinear"


def products(log: str, datatype: str) -> set[str]:
    """Operators in the build log with a kernel that takes this type. One kernel may run several operators."""
    lines = [line for line in log.splitlines() if re.match(r"Name: .*LayerType: (?:gemm|correlation)", line)]
    return {
        name
        for line in lines
        if f"Datatype: {datatype}" in line.partition("Constants:")[0]
        for name in re.findall(r"\[ONNX Layer: ([^\]]+)\]", line)
    }


def test_onnx_runtime_says_that_it_lacks_nvfp4(half: Bundle, calls: Any) -> None:
    bundle = quantize(half, calls, "nvfp4.fp16", ["spatial_unet"])
    with pytest.raises(BackendUnavailable, match=r"spatial_unet\.nvfp4\.fp16\.onnx: ONNX Runtime does not compute"):
        OnnxBackend(bundle, Options("cpu", "nvfp4.fp16")).prepare("spatial_unet")


def test_polygraphy_agrees(quantized: tuple[Bundle, Report]) -> None:
    pytest.importorskip("polygraphy")
    bundle = Bundle.open(quantized[0].path)  # other tests may have quantised the model again
    rows = compare(bundle, "onnx", "int8", ["spatial_unet"], "a red heart", steps=2)
    assert [(row.output, row.calls) for row in rows] == [("latents", 2), ("previous", 2)]
    assert all(0 < row.mean <= row.largest for row in rows)
    strict = compare(bundle, "onnx", "int8", ["spatial_unet"], "a red heart", steps=2, tolerance=1e-9)
    assert not any(row.passed for row in strict)
    assert strict[0].largest == pytest.approx(rows[0].largest)
    # Its inputs are a picture, and a clip in chunks.
    (encoder,) = compare(bundle, "onnx", "int8", ["vae_encoder"], "a red heart", steps=1)
    chunks = bundle.manifest.sizes.frames[1] // bundle.manifest.sizes.chunk
    assert (encoder.output, encoder.calls, encoder.passed) == ("latents", 1 + chunks, True)
    with pytest.raises(RequestError, match="with itself"):
        compare(bundle, "onnx", "fp32")
    with pytest.raises(RequestError, match="with='torch'"):
        compare(bundle, "torch", "fp16")


def test_the_table_of_precisions(quantized: tuple[Bundle, Report], tmp_path: Path) -> None:
    """benchmarks/precisions.py on a tiny clip: its table and the files it keeps."""
    bundle, report = Bundle.open(quantized[0].path), quantized[1]
    step = bundle.manifest.sizes.multiple
    options = {"frames": 2, "width": step, "height": step, "steps": 2}
    prompts = bundle.manifest.prompts[:2]
    rows = precisions.compare(bundle, ("fp32", "int8"), prompts, options)
    videos = {}
    for name in ("fp32", "int8"):
        with higen.load(bundle.path, "onnx", precision=name, threads=1) as pipe:
            videos[name] = [pipe(prompt, seed=i, **options).frames.astype(float) for i, prompt in enumerate(prompts)]
    off = [((a - b) ** 2).mean() for a, b in zip(videos["fp32"], videos["int8"], strict=True)]
    assert rows[1].psnr == pytest.approx(np.mean([10 * np.log10(255**2 / x) for x in off]), rel=1e-4)
    assert rows[1].worst == pytest.approx(10 * np.log10(255**2 / max(off)), rel=1e-4)
    assert rows[0].worst == float("inf")
    extra = bundle.files[graph_file("spatial_unet", "int8")].size - bundle.files[graph_file("spatial_unet")].size
    assert rows[1].size - rows[0].size == extra
    lines = precisions.table(rows, {"int8": {"spatial_unet": report.as_json()}}, {})
    assert lines[0] == "|  | fp32 | int8 |"
    assert f"| spatial_unet: error of a step |  | {report.error:.3f} |" in lines
    assert f"| the worst of them | the same | {rows[1].worst:.1f} |" in lines

    generated = {key: 0.5 for key, _, _ in COLUMNS}
    measured = {
        "groups": {"held-out": {"generated": generated, "frechet": {"ratio": 1.5}}},
        "control": {"motion": {"spearman": 0.9}},
    }
    lines = precisions.table(rows, {}, {"fp32": measured, "int8": measured})
    assert "| background | 50.0% | 50.0% |" in lines
    assert "| PSNR, clip | 0.50 dB | 0.50 dB |" in lines
    assert "| Frechet distance, of real against real | 1.50 x | 1.50 x |" in lines
    assert lines[-1] == "| motion cue followed, Spearman | 0.90 | 0.90 |"

    assert precisions.prepare(default_model(), tmp_path, ["fp32"])[0].files == Bundle.open(default_model()).files
    (tmp_path / "measures.fp32.json").write_text("{}")
    precisions.prepare(default_model(), tmp_path, ["fp32"])
    assert (tmp_path / "measures.fp32.json").exists()
    precisions.prepare(bundle.path, tmp_path, ["fp32"])  # another model
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
