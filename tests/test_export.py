"""The exporter on a tiny model's small stages; test_onnx_backend compares the built-in model's graphs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from conftest import TINY
from onnxscript.optimizer import optimize_ir
from safetensors.torch import load_file, save_file
from test_upgrade import write_version_1

from higen.api import default_model
from higen.backends.onnx import OnnxBackend
from higen.backends.options import Options
from higen.backends.select import select_backend
from higen.backends.torch import TorchBackend
from higen.bundle import MANIFEST, Bundle, GraphInput, file_record, graph_file, rewrite
from higen.errors import BackendError, BackendUnavailable, CheckpointError, OutputError, RequestError
from higen.export import graphs, origin
from higen.export import model_graphs as export
from higen.export.cli import main
from higen.export.graphs import LARGEST_INLINE
from higen.export.interface import graph_sizes
from higen.export.model_graphs import export_model
from higen.export.parity import Parity, check_graph, check_rules, references
from higen.export.precision import check_opset, write_weights
from higen.export.shapes import example_inputs, sizes_for, static_sizes
from higen.export.weights import DTYPES
from higen.families.higen import spec
from higen.manifest_file import Opened
from higen.precision import PRECISIONS

EXPORTED = ("text_encoder", "conditioner")


@pytest.fixture(scope="module")
def unoptimized() -> list[ir.Model]:
    """Each graph that `exported` traced, before optimisation."""
    return []


@pytest.fixture(scope="module")
def exported(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, unoptimized: list[ir.Model]
) -> tuple[Bundle, list[Parity]]:
    """A copy of the tiny model with graphs, and what the gate measured."""
    copy = shutil.copytree(tiny_model, tmp_path_factory.mktemp("export") / "model")
    parities: list[Parity] = []
    optimize = graphs._optimize

    def kept(model: ir.Model) -> None:
        unoptimized.append(model.clone())
        optimize(model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "_optimize", kept)
        return export_model(Bundle.open(copy), EXPORTED, on_parity=parities.append), parities


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def low(
    request: pytest.FixtureRequest, exported: tuple[Bundle, list[Parity]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, list[Parity], str]:
    """The same, plus the conditioner's graph in 16 bits."""
    copy = shutil.copytree(exported[0].path, tmp_path_factory.mktemp("low") / "model")
    parities: list[Parity] = []
    made = export_model(Bundle.open(copy), ["conditioner"], precision=request.param, on_parity=parities.append)
    return made, parities, request.param


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A tiny model that a test may change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def traced(exported: tuple[Bundle, list[Parity]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing reuses earlier graphs, because it takes seconds and these tests are not about tracing itself."""

    def trace(bundle: Bundle, module: object, name: str, output: Path, *rest: object) -> None:
        shutil.copy(exported[0].path / graph_file(name), output)

    monkeypatch.setattr(export, "export_stage", trace)


def test_each_graph_passed_at_shapes_it_was_not_traced_with(exported: tuple[Bundle, list[Parity]]) -> None:
    bundle, parities = exported
    for name in EXPORTED:
        assert graph_file(name) in bundle.files
        assert len({p.shape for p in parities if p.stage == name}) >= 3
    assert all(p.passed for p in parities)


@pytest.mark.parametrize("name", EXPORTED)
def test_a_graph_is_valid_named_by_the_table_and_holds_no_weights(
    exported: tuple[Bundle, list[Parity]], name: str
) -> None:
    bundle, _ = exported
    path, stage = bundle.path / graph_file(name), bundle.manifest.stage(name)
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.load(str(path), load_external_data=False).graph
    fixed = bundle.manifest.fixed
    for value, tensor in zip(graph.input, stage.inputs, strict=True):
        assert value.name == tensor.name
        sizes = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        assert sizes == [fixed.get(n, n) if isinstance(n, str) else n for n in tensor.shape]
    assert [value.name for value in graph.output] == list(stage.graph_outputs)
    outside = [t for t in graph.initializer if t.external_data]
    assert outside
    for tensor in outside:
        assert {e.key: e.value for e in tensor.external_data}["location"] == stage.weights
    assert all(len(t.raw_data) <= LARGEST_INLINE for t in graph.initializer)


@pytest.mark.usefixtures("exported")
def test_the_optimiser_equals_onnxscripts_own(unoptimized: list[ir.Model]) -> None:
    """Our optimiser leaves one rule out. That rule changes nothing here, although it inspects slices in both graphs."""
    assert len(unoptimized) == len(EXPORTED)
    for model in unoptimized:
        ours, theirs = model.clone(), model.clone()
        graphs._optimize(ours)
        optimize_ir(theirs, should_fold=graphs._is_bookkeeping)
        assert ir.to_proto(ours) == ir.to_proto(theirs)
        assert [node.op_type for node in ours.graph].count("Slice") >= 2


@pytest.mark.usefixtures("traced")
def test_a_graph_that_differs_is_refused_and_leaves_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(path.name for path in copy.iterdir())

    def off(*arguments: object) -> Iterator[Parity]:
        for parity in check_graph(*arguments):  # type: ignore[arg-type]
            yield Parity(parity.stage, parity.shape, 1e-3)

    monkeypatch.setattr(export, "check_graph", off)
    with pytest.raises(BackendError, match=r"text_encoder at B=3: the graph differs by 1\.0e-03, allowed is 2e-05"):
        export_model(Bundle.open(copy), ("text_encoder",))
    assert sorted(path.name for path in copy.iterdir()) == before


# Fewer bits


def test_weights_with_a_second_link_pass_the_gate(exported: tuple[Bundle, list[Parity]], tmp_path: Path) -> None:
    """A Triton repository makes such links. onnx.checker treats a linked file as an attack."""
    bundle, _ = exported
    os.link(bundle.file(spec.UNET), tmp_path / "again.safetensors")
    check_rules(bundle.path / graph_file("conditioner"))


def test_a_variant_is_added_with_its_own_weights(low: tuple[Bundle, list[Parity], str]) -> None:
    bundle, _, precision = low
    name, weights = graph_file("conditioner", precision), bundle.weights_variant("conditioner", precision)
    assert (name, weights) == (f"conditioner.{precision}.onnx", f"unet.{precision}.safetensors")
    assert bundle.precisions("conditioner") == ("fp32", precision)
    assert bundle.precisions("text_encoder") == ("fp32",)
    own, stored = load_file(bundle.file(spec.UNET)), load_file(bundle.file(weights))
    assert list(own) == list(stored)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert all(torch.equal(stored[key], own[key].to(dtype)) for key in own)
    onnx.checker.check_model(str(bundle.path / name), full_check=True)
    graph = onnx.load(str(bundle.path / name), load_external_data=False).graph
    outside = [t for t in graph.initializer if t.external_data]
    assert {e.value for t in outside for e in t.external_data if e.key == "location"} == {weights}
    assert {t.data_type for t in outside} == {int(DTYPES[PRECISIONS[precision].stored])}
    # Inputs and outputs are float32, as the stage table says.
    assert {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    # The graph computes in fewer bits: no weight is cast up.
    outer = {t.name for t in outside}
    assert not [n for n in graph.node if n.op_type == "Cast" and outer & set(n.input)]


def test_a_variant_is_judged_in_three_ways(low: tuple[Bundle, list[Parity], str]) -> None:
    _, parities, precision = low
    by_way = {way: [p for p in parities if p.way == way] for way in ("graph", "graph in float32", "module")}
    assert all(p.passed and p.precision == precision for p in parities)
    assert len(by_way["graph in float32"]) >= 3
    assert all(p.error is not None and p.error < 2e-5 == p.tolerance for p in by_way["graph in float32"])
    (module,) = by_way["module"]
    # PyTorch's result must show rounding. Without any, something would have computed in float32.
    assert module.error is not None
    assert {"fp16": 2e-5, "bf16": 5e-4}[precision] < module.error < PRECISIONS[precision].step
    if precision == "fp16":
        assert len(by_way["graph"]) >= 3
        assert all(p.error is not None and p.error < PRECISIONS["fp16"].step for p in by_way["graph"])
    else:
        assert [p.note for p in by_way["graph"]] == ["ONNX Runtime has no CPU kernels for it"]


def test_the_gate_sees_an_error_that_rounding_would_hide(low: tuple[Bundle, list[Parity], str]) -> None:
    bundle, _, precision = low
    path = bundle.path / graph_file("conditioner", precision)
    wrong = path.with_name("wrong.onnx")
    graph = onnx.load(str(path), load_external_data=False)
    for node in graph.graph.node:
        for attribute in node.attribute:
            if node.op_type == "LayerNormalization" and attribute.name == "epsilon":
                attribute.f = 1e-3
    wrong.write_bytes(graph.SerializeToString())
    expected = references(TorchBackend(bundle, Options("cpu", "fp32")), "conditioner", precision)
    try:
        found = list(check_graph(bundle, "conditioner", wrong, expected, precision))
    finally:
        wrong.unlink()
    in_float32 = [p for p in found if p.way == "graph in float32"]
    assert any(not p.passed for p in in_float32)
    assert max(p.error or 0 for p in in_float32) < PRECISIONS[precision].step  # the graph itself might have passed
    assert sorted(path.parent.glob(".*")) == []


def test_a_variant_runs_where_its_precision_is_requested(low: tuple[Bundle, list[Parity], str]) -> None:
    bundle, _, precision = low
    stage = bundle.manifest.stage("conditioner")
    sizes = sizes_for(bundle.manifest, {"B": 2, "F": 3, "H": 4, "W": 4})
    inputs = {name: value.numpy() for name, value in example_inputs(bundle.manifest, stage, sizes).items()}
    plain = OnnxBackend(bundle)
    expected = {name: plain.to_numpy(value) for name, value in plain.run("conditioner", **inputs).items()}
    assert plain.describe("conditioner") == "cpu, fp32"
    backend = OnnxBackend(bundle, Options(precision=precision))
    with pytest.raises(BackendUnavailable, match=rf"no text_encoder\.{precision}\.onnx .*--precision {precision}"):
        backend.prepare("text_encoder")
    if precision == "bf16":
        with pytest.raises(
            BackendUnavailable, match=r"conditioner\.bf16\.onnx: this ONNX Runtime cannot run it on cpu"
        ):
            backend.prepare("conditioner")
        return
    for name, value in backend.run("conditioner", **inputs).items():
        error = np.abs(backend.to_numpy(value) - expected[name]).max() / np.abs(expected[name]).max()
        assert 1e-5 < error < PRECISIONS["fp16"].step
    assert backend.describe("conditioner") == "cpu, fp16"
    # A stage without such a graph runs in PyTorch, in the same precision.
    router = select_backend(bundle, options=Options(precision="fp16", device="cpu"))
    for name in EXPORTED:
        router.prepare(name)
    assert [router.choices[name].backend for name in EXPORTED] == ["torch", "onnx"]
    assert [router.choices[name].details for name in EXPORTED] == ["cpu, fp16", "cpu, fp16"]


def test_weights_stored_in_the_precision_are_not_written_again(copy: Path) -> None:
    weights = copy / spec.UNET
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights)
    bundle = rewritten(copy)
    assert write_weights(bundle, "conditioner", "fp16") is bundle
    assert bundle.weights("conditioner", "fp16") == spec.UNET
    assert write_weights(bundle, "conditioner", "bf16").weights("conditioner", "bf16") == "unet.bf16.safetensors"


def test_a_weight_too_great_for_the_precision(copy: Path) -> None:
    weights = copy / spec.UNET
    state = load_file(weights)
    state["unet.conv_in.weight"][0, 0, 0, 0] = 1e6
    save_file(state, weights)
    rewritten(copy)
    before = sorted(path.name for path in copy.iterdir())
    with pytest.raises(CheckpointError, match=r"unet\.conv_in\.weight has values too great for fp16"):
        export_model(Bundle.open(copy), ["conditioner"], precision="fp16")
    assert sorted(path.name for path in copy.iterdir()) == before


def rewritten(model: Path) -> Bundle:
    """Update a model's manifest after changes to its files."""

    def changed(opened: Opened) -> Opened:
        return replace(opened, files={name: file_record(model / name) for name in opened.files})

    rewrite(model, changed)
    return Bundle.open(model)


def test_options_that_no_graph_can_have(tiny_model: Path) -> None:
    assert [check_opset(precision, None) for precision in PRECISIONS] == [21, 21, 23]
    with pytest.raises(RequestError, match="opset=21: from 22 to 23 for bf16"):
        check_opset("bf16", 21)
    with pytest.raises(RequestError, match="precision='int8': one of 'fp32', 'fp16', 'bf16'"):
        export_model(Bundle.open(tiny_model), precision="int8")
    with pytest.raises(RequestError, match="precision='half'"):
        select_backend(Bundle.open(tiny_model), options=Options(precision="half"))


# Fixed shapes


@pytest.mark.parametrize(
    "shape", ["", "1x4x16", "axbxcxd", "0x4x16x24", "1x41x16x24", "1x4x18x24", "1x4x16x0", "1x4x-8x8"]
)
def test_shapes_that_a_model_cannot_have(tiny_model: Path, shape: str) -> None:
    with pytest.raises(RequestError, match=f"^static={shape!r}: "):
        static_sizes(Bundle.open(tiny_model).manifest, shape)


def test_a_static_graph_takes_one_shape(copy: Path) -> None:
    bundle = Bundle.open(copy)
    static = static_sizes(bundle.manifest, "2x4x16x24")
    assert static == {"B": 2, "F": 4, "H": 8, "W": 12}
    parities: list[Parity] = []
    bundle = export_model(bundle, ["vae_decoder"], static=static, on_parity=parities.append)
    assert [p.shape for p in parities] == ["N=1 H=8 W=12", "N=2 H=8 W=12", "N=3 H=8 W=12"]
    assert graph_sizes(bundle.manifest, "vae_decoder", copy / "vae_decoder.onnx") == {"H": 8, "W": 12}
    backend = OnnxBackend(bundle)
    pixels = backend.run("vae_decoder", latents=np.zeros((2, 4, 8, 12), np.float32))["pixels"]
    assert backend.to_numpy(pixels).shape == (2, 3, 16, 24)
    with pytest.raises(BackendError, match=r"vae_decoder\.latents: .*\[2, 4, 8, 8\] given, .*'H': 8, 'W': 12"):
        backend.run("vae_decoder", latents=np.zeros((2, 4, 8, 8), np.float32))


# Interrupted, or out of room


@pytest.mark.usefixtures("traced")
def test_an_interrupted_export_leaves_a_model_and_can_be_run_again(copy: Path) -> None:
    def stop(parity: Parity) -> None:
        if parity.stage == "conditioner":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_model(Bundle.open(copy), EXPORTED, on_parity=stop)
    left = Bundle.open(copy)
    assert [graph_file(name) in left.files for name in EXPORTED] == [True, False]
    assert {path.name for path in copy.iterdir()} == {*left.files, MANIFEST}
    # Files left by a killed process do not block an export, and are removed.
    code = (
        "import os, sys; from higen.bundle import Bundle; from higen.export.place import writing\n"
        "with writing(Bundle.open(sys.argv[1])) as place:\n"
        "    place.beside('conditioner.onnx').write_bytes(b'half'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(copy)], check=False)
    assert len([path for path in copy.iterdir() if path.name.startswith(".higen-")]) == 2
    again = export_model(left, EXPORTED)
    assert all(again.file(graph_file(name)) for name in EXPORTED)
    assert {path.name for path in copy.iterdir()} == {*again.files, MANIFEST}


@pytest.mark.usefixtures("traced")
def test_an_export_resumes_with_the_finished_graphs(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(stages: Sequence[str] = EXPORTED[:1], **options: Any) -> tuple[set[str], list[str]]:
        """The stages that were exported, and the messages about others."""
        done: list[Parity] = []
        said: list[str] = []
        export_model(Bundle.open(copy), stages, resume=True, on_parity=done.append, on_line=said.append, **options)
        return {parity.stage for parity in done}, said

    there = "text_encoder.onnx: exists already"
    export_model(Bundle.open(copy), EXPORTED[:1])  # the state after a run that ended after its first stage
    assert run(EXPORTED) == ({"conditioner"}, [there])
    assert run(EXPORTED) == (set(), [there, "conditioner.onnx: exists already"])
    assert run(opset=22)[0] == {"text_encoder"}
    # Damaged, but of the same size.
    graph = copy / "text_encoder.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert run(opset=22)[0] == {"text_encoder"}
    # Made by another version of the programs.
    monkeypatch.setattr(origin, "__version__", "0")
    assert run(opset=22)[0] == {"text_encoder"}


@pytest.mark.usefixtures("traced")
def test_a_full_disk_is_one_error_and_leaves_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Bundle:
        raise OSError(28, "No space left on device")

    before = sorted(path.name for path in copy.iterdir())
    monkeypatch.setattr(export, "put_file", full)
    with pytest.raises(OutputError, match=r"model: the graphs cannot be written: .*No space left"):
        export_model(Bundle.open(copy), ("text_encoder",))
    assert sorted(path.name for path in copy.iterdir()) == before


# The command


@pytest.mark.parametrize("command", ["onnx", "verify", "inspect"])
def test_a_folder_that_is_not_a_model_directory_is_one_error(tmp_path: Path, command: str) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in (loop, tmp_path, tmp_path / "nothing"):
        result = CliRunner().invoke(main, [command, str(path), "--json"])
        assert result.exit_code == 2
        assert json.loads(result.stdout)["error"] == "ManifestError"
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


def test_the_command_refuses_what_it_cannot_make(tiny_model: Path) -> None:
    for arguments in (["--precision", "bf16", "--opset", "21"], ["--static", "1x2x3"]):
        result = CliRunner().invoke(main, ["onnx", str(tiny_model), *arguments, "--json"])
        assert result.exit_code == 2
        assert json.loads(result.stdout)["error"] == "RequestError"
    result = CliRunner().invoke(main, ["verify", str(tiny_model)])
    assert result.exit_code == 2
    assert "no graph of text_encoder" in result.stderr


@pytest.mark.usefixtures("traced")
def test_an_older_directory_is_upgraded_first_with_a_message(copy: Path) -> None:
    """The old manifest has no plain step; the present one has."""
    write_version_1(copy, [path.name for path in copy.iterdir() if path.name != MANIFEST])
    before = Bundle.open(copy)
    assert before.version == 1
    assert "temporal_unet_plain" not in before.manifest.stage_names
    said: list[str] = []
    after = export_model(before, ["text_encoder"], on_line=said.append)
    assert (after.version, after.manifest) == (2, spec.manifest(TINY))
    assert after.graphs == {"text_encoder.onnx": (GraphInput("tokens", "int64", ("B", 12)),)}
    assert said[0].startswith(f"{copy}: manifest rewritten as version 2")
    said.clear()
    export_model(after, ["text_encoder"], on_line=said.append)
    assert said == []


def test_an_unknown_stage_is_refused(tiny_model: Path) -> None:
    with pytest.raises(RequestError, match="upscaler"):
        export_model(Bundle.open(tiny_model), ("upscaler",))


def test_inspect_says_what_a_model_holds(exported: tuple[Bundle, list[Parity]]) -> None:
    result = CliRunner().invoke(main, ["inspect", str(exported[0].path)])
    assert result.exit_code == 0
    said = " ".join(result.output.split())
    assert "text_encoder graph in fp32" in said
    assert "temporal_unet no graph" in said
    assert "loop temporal temporal_unet or temporal_unet_plain" in said
    assert "control motion curve: amount of motion" in said


def test_inspect_lists_the_presets() -> None:
    result = CliRunner().invoke(main, ["inspect", str(default_model())])
    lines = result.output.splitlines()
    assert "  preset fast           spatial 2 steps, guidance 1; temporal 1 step, guidance 1 (the usual one)" in lines
    assert "  preset full           spatial 12 steps, guidance 1.5; temporal 3 steps, guidance 1" in lines
    ends = {len(line) for line in lines if line.endswith(" MB")}
    assert len(ends) == 1, "the sizes are in one column"
    said = json.loads(CliRunner().invoke(main, ["inspect", str(default_model()), "--json"]).stdout)
    assert [(row["name"], row["steps"], row["usual"]) for row in said["presets"]] == [
        ("fast", [2, 1], True),
        ("full", [12, 3], False),
    ]
