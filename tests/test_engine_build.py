"""Engines built by the real TensorRT for RTX, which needs no GPU; skipped where it is not installed."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from higen.backends.plans import PlanRecord
from higen.bundle import Bundle, graph_file, put_file
from higen.engines.build import Options
from higen.engines.graph_facts import GraphFacts, read_graph
from higen.engines.model_engines import Event, build_engines
from higen.engines.shapes import Profile, Range, read_profile
from higen.engines.store import EngineStore
from higen.engines.targets import parse_targets
from higen.errors import EngineError, IntegrityError, NoDriver, RequestError
from higen.export.interface import graph_inputs
from higen.exporter import main

pytest.importorskip("tensorrt_rtx")

SMALL = Profile("small", Range(1, 1, 2), Range(2, 3, 4), Range(8, 8, 16), Range(8, 8, 16), Range(1, 2, 2))


def decoder_graph(path: Path, latents: int = 4, factor: int = 2, layers: int = 1, broken: bool = False) -> None:
    """A decoder that upsamples and convolves. It has the interface of the model's decoder but none of its weights."""
    random = np.random.default_rng(0)
    nodes, tensors, last, width = [], [], "latents", latents
    for i in range(layers):
        weight = random.standard_normal((3, width, 3, 3)).astype(np.float32) / 10
        tensors.append(numpy_helper.from_array(weight, f"w{i}"))
        nodes.append(helper.make_node("Conv", [last, f"w{i}"], [f"c{i}"], pads=[1] * 4))
        last, width = f"c{i}", 3
    tensors.append(numpy_helper.from_array(np.float32([1, 1, factor, factor]), "scales"))
    nodes.append(helper.make_node("Resize", [last, "", "scales"], ["pixels"], mode="nearest"))
    if broken:
        nodes.append(helper.make_node("NoSuchOperator", ["pixels"], ["nothing"]))
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info("latents", TensorProto.FLOAT, ["N", latents, "H", "W"])],
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["N", 3, "Y", "X"])],
        tensors,
    )
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with a decoder graph that has its decoder's interface."""
    copy = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    with_graph(copy)
    return copy


def with_graph(model: Path, **options: Any) -> Bundle:
    aside = model / ".graph.part"
    decoder_graph(aside, **options)
    return put_file(Bundle.open(model), aside, graph_file("vae_decoder"), graph_inputs(aside))


def build(model: Path, target: str = "rtx-sm89", events: list[Event] | None = None, **options: Any) -> list[PlanRecord]:
    heard: list[Event] = [] if events is None else events
    return build_engines(
        Bundle.open(model), parse_targets(target), [SMALL], ["vae_decoder"], on_event=heard.append, **options
    )


def files(model: Path, target: str = "rtx-sm89") -> list[str]:
    folder = model / "engines" / target
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


WHOLE = [".lock", "vae_decoder.engine", "vae_decoder.json", "vae_decoder.log"]


def test_an_engine_and_its_record(model: Path) -> None:
    events: list[Event] = []
    (record,) = build(model, events=events)
    assert files(model) == WHOLE
    plan = (model / "engines" / "rtx-sm89" / "vae_decoder.engine").read_bytes()
    assert record.size == len(plan) > 1000
    assert {(t.name, t.kind, t.dtype, t.shape) for t in record.tensors} == {
        ("latents", "input", "float32", (-1, 4, -1, -1)),
        ("pixels", "output", "float32", (-1, 3, -1, -1)),
    }
    import tensorrt_rtx

    assert (record.flavour, record.library) == ("rtx", tensorrt_rtx.__version__)
    log = (model / "engines" / "rtx-sm89" / "vae_decoder.log").read_text(encoding="utf-8")
    assert "LayerType" in log
    parts = [event.part for event in events if event.state == "building"]
    assert parts == sorted(parts)
    assert len(parts) > 3
    assert [event.state for event in events[-1:]] == ["built"]


def test_three_architectures_in_one_plan_and_in_one_plan_each(model: Path) -> None:
    records = build(model, "rtx,rtx-sm86,rtx-sm120")
    assert [r.architectures for r in records] == [(80, 86, 89, 120), (86,), (120,)]
    for target in ("rtx", "rtx-sm86", "rtx-sm120"):
        assert files(model, target) == WHOLE


def test_the_same_again_is_kept_and_new_weights_are_not(model: Path) -> None:
    (first,) = build(model)
    events: list[Event] = []
    assert build(model, events=events) == [first]
    assert [event.state for event in events] == ["kept"]
    with_graph(model, layers=2)
    events.clear()
    (second,) = build(model, events=events)
    assert second.graph_sha256 != first.graph_sha256
    assert events[0].reason == "another graph"


def test_a_replaced_engine_is_reported_before_it_is_removed(model: Path) -> None:
    """A target holds one engine per stage: a build for other profiles replaces the first."""
    build(model)
    arguments = ["build-engines", str(model), "--target", "rtx-sm89", "--stage", "vae_decoder"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    said, done = result.output.splitlines()
    assert re.fullmatch(r"rtx-sm89/vae_decoder +replaces the fp32 engine for small: other profiles", said)
    assert done.endswith("s (other profiles)")
    assert "replaces" not in CliRunner().invoke(main, arguments).output


def test_a_builder_that_waits_for_another_says_so(model: Path) -> None:
    heard: list[Event] = []
    with ThreadPoolExecutor() as pool, ExitStack() as other:
        other.enter_context(EngineStore(model, "rtx-sm89").building())

        def hear(event: Event) -> None:
            heard.append(event)
            if event.state == "waiting":
                other.close()

        wish = (Bundle.open(model), parse_targets("rtx-sm89"), [SMALL], ["vae_decoder"])
        pool.submit(build_engines, *wish, on_event=hear).result(300)
    assert [event.state for event in heard][:2] == ["waiting", "building"]
    assert heard[0].target == "rtx-sm89"


def test_options_reach_the_builder(model: Path) -> None:
    (plain,) = build(model)
    (streamed,) = build(model, options=Options(workspace=2**26, weight_streaming=True))
    assert streamed.options == {"workspace": 2**26, "weight_streaming": True}
    assert streamed.sha256 != plain.sha256


def test_a_graph_that_tensorrt_cannot_read_is_one_error(model: Path) -> None:
    with_graph(model, broken=True)
    with pytest.raises(EngineError, match=r"vae_decoder\.onnx: TensorRT cannot read it.*NoSuchOperator"):
        build(model)
    assert files(model) == [".lock"]


def test_a_graph_of_another_interface_is_one_error(model: Path) -> None:
    graph = onnx.load(str(model / "vae_decoder.onnx"))
    graph.graph.output[0].name = "images"
    graph.graph.node[-1].output[0] = "images"
    aside = model / ".graph.part"
    onnx.save(graph, str(aside))
    put_file(Bundle.open(model), aside, "vae_decoder.onnx", graph_inputs(aside))
    with pytest.raises(EngineError, match=r"its tensors are .*images.*vae_decoder has .*pixels"):
        build(model)


def test_an_altered_graph_is_not_built_from(model: Path) -> None:
    path = model / "vae_decoder.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="sha256"):
        build(model)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--target", "rtx-sm90"], "RequestError", "take 'tensorrt', on the machine itself"),
        (["--target", "rtx-sm89", "--profile", "fast"], "RequestError", "profile='fast': one of batch"),
        (["--target", "rtx-sm86", "--precision", "fp8.fp16"], "RequestError", "SM86 cannot compute in it"),
        (["--target", "rtx-sm89,rtx-sm75", "--precision", "bf16"], "RequestError", "SM75 cannot compute in it"),
        (["--target", "rtx-sm89", "--precision", "fp16"], "ModelError", "--precision fp16"),
        (["--target", "rtx-sm89", "--stage", "spatial_unet"], "ModelError", "no spatial_unet.onnx (make it: higen-"),
        (
            ["--target", "rtx-sm89", "--precision", "int8", "--stage", "vae_decoder"],
            "ModelError",
            "no spatial_unet.int8.onnx (make it: higen-export quantize {model} --precision int8)",
        ),
        (["--target", "rtx-sm89", "--profile", "{min}"], "RequestError", "smallest <= best <= largest"),
        (["--target", "rtx-sm89", "--profile", "{step}"], "RequestError", "multiples of 4 pixels"),
    ],
)
def test_a_wrong_option_is_one_error_before_anything_is_built(
    model: Path, tmp_path: Path, arguments: list[str], error: str, message: str
) -> None:
    sizes = {"batch": 1, "frames": 4, "height": 16, "width": 24, "images": 2}
    for name, change in (("min", {"frames": [4, 2, 1]}), ("step", {"width": 26})):
        lines = [f"{key} = {value}" for key, value in {**sizes, **change}.items()]
        (tmp_path / f"{name}.toml").write_text("\n".join(lines))
    given = [a.format(min=tmp_path / "min.toml", step=tmp_path / "step.toml") for a in arguments]
    result = CliRunner().invoke(main, ["build-engines", str(model), *given, "--json"])
    assert result.exit_code == 2
    answer = json.loads(result.output)
    assert answer["error"] == error
    assert message.replace("{model}", str(model)) in answer["message"]
    assert not (model / "engines").exists()


def test_a_missing_library_names_its_extra(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    result = CliRunner().invoke(main, ["build-engines", str(model), "--target", "rtx-sm89", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.output)["error"] == "MissingExtra"
    assert "pip install 'higen[rtx]'" in json.loads(result.output)["message"]
    assert not (model / "engines").exists()


def test_a_full_disk_is_detected_before_the_build(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    arguments = ["build-engines", str(model), "--target", "rtx-sm89", "--stage", "vae_decoder", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert json.loads(result.output)["error"] == "OutputError"
    assert not (model / "engines").exists()


def test_the_disk_must_hold_the_engines_of_all_targets(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(EngineStore, "check_space", lambda store, needed: asked.append(needed))
    monkeypatch.setattr("higen.engines.model_engines._build_target", lambda *given: [])
    for targets in ("rtx-sm86", "rtx-sm86,rtx-sm120"):
        build(model, targets)
    assert asked == [asked[0], 2 * asked[0]]


def test_the_disk_need_not_hold_what_is_there_already(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old plan is removed once its successor exists. The size of a previously built plan is known."""
    first, _ = build(model, "rtx-sm86,rtx-sm120")
    asked = []
    monkeypatch.setattr("higen.engines.model_engines.MARGIN", 0)
    monkeypatch.setattr(EngineStore, "check_space", lambda store, needed: asked.append(needed))
    build(model, "rtx-sm86,rtx-sm120")
    build(model, "rtx-sm86,rtx-sm120", options=Options(workspace=2**26))
    nothing, again = asked
    assert nothing == 0
    assert first.size <= again < 1.5 * first.size


def test_a_graph_knows_how_large_its_weights_are_in_a_plan(tmp_path: Path) -> None:
    """Of a weights file shared by stages, only the stage's own tensors count, at its precision of computation."""
    weights = [
        numpy_helper.from_array(np.zeros((3, 5), np.float32), "a"),
        numpy_helper.from_array(np.zeros((7,), np.float16), "b"),
        numpy_helper.from_array(np.zeros((2,), np.int64), "c"),
        helper.make_tensor("d", TensorProto.FLOAT4E2M1, (4,), np.zeros(2, np.uint8).tobytes(), raw=True),
    ]
    weights[0].ClearField("raw_data")
    weights[0].data_location = TensorProto.EXTERNAL
    weights[0].external_data.add(key="location", value="is not there")
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, None])]
    graph = helper.make_graph([], "weights", inputs, [], weights)
    onnx.save(helper.make_model(graph), str(tmp_path / "x.onnx"))
    assert read_graph(tmp_path / "x.onnx", "fp32", "rtx") == GraphFacts({"x": (None, 4, None)}, 4 * 22 + 16 + 2)
    assert read_graph(tmp_path / "x.onnx", "nvfp4.fp16", "rtx").size == 2 * 22 + 16 + 2
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"x\.onnx: is not an ONNX graph"):
        read_graph(tmp_path / "x.onnx", "fp32", "rtx")


def test_a_profile_that_a_fixed_graph_cannot_take_is_one_error(model: Path) -> None:
    graph = onnx.load(str(model / "vae_decoder.onnx"))
    for axis, size in ((2, 4), (3, 8)):
        graph.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = size
    aside = model / ".graph.part"
    onnx.save(graph, str(aside))
    put_file(Bundle.open(model), aside, "vae_decoder.onnx", graph_inputs(aside))
    message = (
        r"profile small: vae_decoder\.latents from \[1, 4, 4, 4\] to \[2, 4, 8, 8\], "
        r"but vae_decoder\.onnx has a fixed shape there, \['any', 4, 4, 8\].*without --static"
    )
    with pytest.raises(RequestError, match=message):
        build(model)
    assert not (model / "engines").exists()
    fixed = replace(SMALL, height=Range(8, 8, 8), width=Range(16, 16, 16))
    (record,) = build_engines(Bundle.open(model), parse_targets("rtx-sm89"), [fixed], ["vae_decoder"])
    assert record.tensors[0].shape == (-1, 4, 4, 8)


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
def test_classic_tensorrt_says_that_it_needs_the_gpu(model: Path) -> None:
    with pytest.raises(NoDriver):
        build(model, "tensorrt")


def test_a_profile_of_the_commands_own_default(model: Path) -> None:
    arguments = ["build-engines", str(model), "--target", "rtx-sm89", "--stage", "vae_decoder"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert re.search(r"rtx-sm89/vae_decoder +fp32 +\d+\.\d MB +built in \d+ s \(not built yet\)", result.output)
    result = CliRunner().invoke(main, [*arguments, "--json"])
    (engine,) = json.loads(result.output)["engines"]
    assert (engine["target"], engine["stage"]) == ("rtx-sm89", "vae_decoder")
    manifest = Bundle.open(model).manifest
    assert read_profile("default", manifest).height.best == manifest.sizes.height


def start(model: Path) -> subprocess.Popen[str]:
    """Start a long build in a process of its own; return when TensorRT is building."""
    with_graph(model, layers=300)
    script = """
import sys
from higen.bundle import Bundle
from higen.engines.graph_facts import GraphFacts, read_graph
from higen.engines.model_engines import build_engines
from higen.engines.store import EngineStore
from higen.engines.targets import parse_targets
sys.path[:0] = [sys.argv[2]]
from test_engine_build import SMALL
def show(event):
    if event.part > 0:
        print(event.state, flush=True)
try:
    build_engines(Bundle.open(sys.argv[1]), parse_targets("rtx-sm89"), [SMALL], ["vae_decoder"], on_event=show)
except KeyboardInterrupt:
    sys.exit(130)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(model), str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_build_leaves_the_old_engine(model: Path, number: int, code: int) -> None:
    (old,) = build(model)
    plan = (model / "engines" / "rtx-sm89" / "vae_decoder.engine").read_bytes()
    process = start(model)
    time.sleep(0.2)
    process.send_signal(number)
    process.communicate(timeout=300)
    assert process.returncode == code
    assert (model / "engines" / "rtx-sm89" / "vae_decoder.engine").read_bytes() == plan
    stored = (model / "engines" / "rtx-sm89" / "vae_decoder.json").read_text(encoding="utf-8")
    assert PlanRecord.from_text(stored, "") == old
    with_graph(model)
    assert build(model) == [old]
    assert files(model) == WHOLE
