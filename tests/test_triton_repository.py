"""The repository as files: configurations by the stage table, weights linked, nothing left behind on a failure."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner

from higen.api import default_model
from higen.backends.plans import ENGINES, PlanProfile, PlanRecord, Span
from higen.bundle import Bundle, add_files, file_record, graph_file, weights_file
from higen.engines.triton import client, server
from higen.engines.triton import repository as written
from higen.engines.triton.config import stage_config
from higen.engines.triton.repository import Settings, write_repository
from higen.errors import (
    EngineError,
    HigenError,
    IntegrityError,
    Malformed,
    MissingExtra,
    ModelError,
    RequestError,
    Stale,
)
from higen.exporter import main
from higen.stages import STAGES, dimensions


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(default_model())


@pytest.fixture
def model(tmp_path: Path) -> Bundle:
    """A copy of the built-in model, to be changed."""
    return Bundle.open(shutil.copytree(default_model(), tmp_path / "model"))


@pytest.fixture(scope="module")
def repository(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("triton") / "repository"
    write_repository(bundle, target, Settings())
    return target


def test_the_files_of_a_repository(repository: Path, bundle: Bundle) -> None:
    found = sorted(str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file())
    stages = [
        name
        for stage in STAGES
        for name in (f"{stage}/config.pbtxt", f"{stage}/1/model.onnx", f"{stage}/1/{weights_file(stage)}")
    ]
    own = ["config.pbtxt", "1/model.py", "1/model/higen.json", "1/model/tokenizer.json"]
    assert found == sorted([*stages, *(f"higen/{name}" for name in own)])
    assert Bundle.open(repository / "higen" / "1" / "model").config == bundle.config
    assert all(os.access(path, os.R_OK) and path.stat().st_mode & 0o044 for path in repository.rglob("*"))


def test_weights_are_there_once_and_every_graph_loads(repository: Path, bundle: Bundle) -> None:
    weights = [repository / stage / "1" / weights_file(stage) for stage in ("conditioner", "spatial_unet")]
    linked = len({path.stat().st_ino for path in weights})
    assert linked == 1
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for name, stage in STAGES.items():
        graph = repository / name / "1" / "model.onnx"
        session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        assert [value.name for value in session.get_inputs()] == [tensor.name for tensor in stage.inputs]


def test_why_hard_links(bundle: Bundle, tmp_path: Path) -> None:
    """ONNX Runtime follows no symbolic link out of the graph's folder; should it once, links could be simpler."""
    for name in (graph_file("text_encoder"), weights_file("text_encoder")):
        (tmp_path / name).symlink_to(bundle.path / name)
    shutil.copy(bundle.path / graph_file("text_encoder"), tmp_path / "copied.onnx")
    with pytest.raises(Exception, match=r"(?i)external data"):
        ort.InferenceSession(str(tmp_path / "copied.onnx"), providers=["CPUExecutionProvider"])


def test_a_model_on_another_file_system_is_copied_once(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def within(source: Path, to: Path) -> None:
        if bundle.path in Path(source).parents:
            raise OSError(errno.EXDEV, "another file system")
        link(source, to)

    monkeypatch.setattr(os, "link", within)
    write_repository(bundle, tmp_path / "repository", Settings())
    copies = [tmp_path / "repository" / stage / "1" / weights_file(stage) for stage in STAGES]
    for name in {path.name for path in copies}:
        assert len({path.stat().st_ino for path in copies if path.name == name}) == 1
        assert copies[0].stat().st_ino != (bundle.path / name).stat().st_ino


def settings_of(text: str, name: str) -> list[str]:
    return re.findall(rf"^\s*{name}: (.*)$", text, flags=re.MULTILINE)


@pytest.mark.parametrize(("device", "kind"), [("cpu", "KIND_CPU"), ("gpu", "KIND_GPU")])
def test_where_the_stages_run(bundle: Bundle, tmp_path: Path, device: str, kind: str) -> None:
    settings = Settings(device=device, max_batch=1, slots=3, line=0, instances=2, threads=4)
    write_repository(bundle, tmp_path / "repository", settings)
    for name in STAGES:
        text = (tmp_path / "repository" / name / "config.pbtxt").read_text()
        assert settings_of(text, "kind") == [kind]
        assert settings_of(text, "count") == ["2"]
        assert settings_of(text, "max_batch_size") == ["2" if name.startswith("vae") else "1"]
        assert '"intra_op_thread_count"' in text
    text = (tmp_path / "repository" / "higen" / "config.pbtxt").read_text()
    assert settings_of(text, "kind") == ["KIND_CPU"]
    (limits,) = [json.loads(json.loads(value)) for value in settings_of(text, "string_value")]
    assert (limits["slots"], limits["line"], limits["rows"]["temporal_unet"]) == (3, 0, 1)


def test_a_stage_s_configuration(bundle: Bundle) -> None:
    text = stage_config(
        STAGES["text_encoder"],
        dimensions(bundle.config),
        backend="onnxruntime",
        device="cpu",
        max_batch=8,
        instances=1,
        threads=None,
    )
    length, width = bundle.config.text.context_length, bundle.config.unet.text_dim
    assert text == (
        'name: "text_encoder"\nbackend: "onnxruntime"\nmax_batch_size: 8\n'
        f'input {{\n  name: "tokens"\n  data_type: TYPE_INT64\n  dims: [{length}]\n}}\n'
        f'output {{\n  name: "hidden"\n  data_type: TYPE_FP32\n  dims: [{length}, {width}]\n}}\n'
        "instance_group {\n  kind: KIND_CPU\n  count: 1\n}\n"
        "dynamic_batching {\n  max_queue_delay_microseconds: 0\n}\n"
    )


def put_engine(model: Bundle, stage: str = "temporal_unet", **given: Any) -> Path:
    """An engine in the folder engines/tensorrt-sm90, with the record that a builder would write."""
    target = given.get("target", "tensorrt-sm90")
    folder = model.path / ENGINES / target
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / f"{stage}.engine"
    plan.write_bytes(b"plan")
    files = (graph_file(stage), weights_file(stage))
    values: dict[str, Any] = {
        "stage": stage,
        "target": target,
        "precision": "fp32",
        "flavour": "tensorrt",
        "library": "10.13.0",
        "architectures": (90,),
        **dict(zip(("graph", "weights"), files, strict=True)),
        **{f"{kind}_sha256": model.files[name].sha256 for kind, name in zip(("graph", "weights"), files, strict=True)},
        "tensors": (),
        "profiles": tuple(
            PlanProfile(name, (Span("latents", (least, 4), (least, 4), (most, 4)),))
            for name, least, most in (("one", 1, 1), ("many", 1, 8), ("large", 4, 16))
        ),
        "options": {},
        **dict(zip(("size", "sha256"), (file_record(plan).size, file_record(plan).sha256), strict=True)),
        "built": "2026-11-23T00:00:00Z",
        "seconds": 1.0,
    }
    (folder / f"{stage}.json").write_text(PlanRecord(**values | given).to_text())
    return plan


GPU = {"device": "gpu", "engines": "tensorrt-sm90"}


def test_engines_are_used_where_they_are(model: Bundle, tmp_path: Path) -> None:
    put_engine(model)
    backends = write_repository(model, tmp_path / "repository", Settings(**GPU, threads=2))
    assert backends["temporal_unet"] == "tensorrt"
    assert {backend for name, backend in backends.items() if name != "temporal_unet"} == {"onnxruntime", "python"}
    text = (tmp_path / "repository" / "temporal_unet" / "config.pbtxt").read_text()
    assert settings_of(text, "backend") == ['"tensorrt"']
    assert settings_of(text, "profile") == ['["1"]']  # the one that takes batches of 1 to 8
    assert "intra_op_thread_count" not in text
    version = tmp_path / "repository" / "temporal_unet" / "1"
    assert [path.name for path in version.iterdir()] == ["model.plan"]
    assert (version / "model.plan").read_bytes() == b"plan"


@pytest.mark.parametrize(
    ("record", "settings", "error", "message"),
    [
        ({"flavour": "rtx"}, {}, EngineError, "TensorRT for RTX, but Triton reads those of classic TensorRT"),
        ({"graph_sha256": "0" * 64}, {}, Stale, "temporal_unet.onnx has changed"),
        ({"sha256": "0" * 64}, {}, Malformed, "is not the plan of its record"),
        ({}, {"max_batch": 9}, RequestError, "1 to 9 samples, but is built for 1 to 1, 1 to 8, 4 to 16"),
        ({"target": "other"}, {}, ModelError, "engines='tensorrt-sm90': no engine of any stage; .* has other"),
    ],
    ids=["rtx", "stale", "altered", "batch", "target"],
)
def test_engines_that_do_not_fit_are_refused(
    model: Bundle,
    tmp_path: Path,
    record: dict[str, Any],
    settings: dict[str, Any],
    error: type[HigenError],
    message: str,
) -> None:
    put_engine(model, **record)
    assert_nothing_written(tmp_path, error, message, model, **GPU, **settings)


def test_a_broken_engine_is_not_passed_over_in_silence(model: Bundle, tmp_path: Path) -> None:
    record = put_engine(model).with_suffix(".json")
    record.write_text("{")
    assert_nothing_written(tmp_path, Malformed, "no record of an engine", model, **GPU)
    record.unlink()
    assert_nothing_written(tmp_path, Malformed, "has no record beside it", model, **GPU)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "tpu"}, "device='tpu': one of 'cpu', 'gpu'"),
        ({"precision": "fp8"}, "precision='fp8': one of 'fp32'"),
        ({"max_batch": 0}, "max_batch=0: a whole number from 1"),
        ({"slots": True}, "slots=True"),
        ({"line": -1}, "line=-1: a whole number from 0"),
        ({"threads": 0}, "threads=0"),
        ({"engines": "h100"}, "engines='h100' with device='cpu': TensorRT runs on a GPU"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Settings(**settings)


def assert_nothing_written(folder: Path, error: type[HigenError], message: str, bundle: Bundle, **given: Any) -> None:
    before = sorted(folder.iterdir())
    with pytest.raises(error, match=message):
        write_repository(bundle, folder / "repository", Settings(**given))
    assert sorted(folder.iterdir()) == before


def test_what_cannot_be_written_leaves_nothing_behind(model: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    assert_nothing_written(folder, ModelError, "no engine of any stage; .* has nothing", model, **GPU)
    without = replace(model, files={k: v for k, v in model.files.items() if k != graph_file("vae_decoder")})
    assert_nothing_written(folder, IntegrityError, "no graph in fp32 of vae_decoder: higen-export onnx", without)
    (model.path / weights_file("vae_encoder")).write_bytes(b"\0" * model.files[weights_file("vae_encoder")].size)
    assert_nothing_written(folder, IntegrityError, "does not match the sha256", model)


def test_a_target_that_cannot_be(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the folder .* does not exist"):
        write_repository(bundle, tmp_path / "missing" / "repository", Settings())
    (tmp_path / "there").mkdir()
    with pytest.raises(ModelError, match="exists already"):
        write_repository(bundle, tmp_path / "there", Settings())
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(ModelError, match="exists already"):
        write_repository(bundle, tmp_path / "dangling", Settings())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "there"]


def test_a_full_disk_leaves_nothing_behind(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(written.shutil, "copyfile", full)
    monkeypatch.setattr(os, "link", full)
    assert_nothing_written(tmp_path, ModelError, "cannot be written: .*no space left", bundle)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["triton", *arguments])
    return result.exit_code, result.output


def test_the_command(bundle: Bundle, tmp_path: Path) -> None:
    code, output = run(str(bundle.path), str(tmp_path / "repository"), "--device", "gpu", "--json")
    assert code == 0
    backends = json.loads(output)["backends"]
    assert backends == dict.fromkeys(STAGES, "onnxruntime") | {"higen": "python"}
    code, output = run(str(bundle.path), str(tmp_path / "repository"))
    assert (code, "exists already" in output) == (2, True)
    code, output = run(str(bundle.path), str(tmp_path / "other"), "--device", "tpu", "--json")
    assert (code, json.loads(output)["error"]) == (2, "RequestError")
    code, output = run(str(tmp_path / "nothing"), str(tmp_path / "other"))
    assert (code, "not a model directory" in output) == (2, True)
    assert not (tmp_path / "other").exists()


def test_a_model_without_graphs_is_told_how_to_make_them(tiny_model: Path, tmp_path: Path) -> None:
    code, output = run(str(tiny_model), str(tmp_path / "repository"))
    assert (code, "higen-export onnx" in output) == (2, True)


def test_a_graph_of_one_shape_is_refused(model: Bundle, tmp_path: Path) -> None:
    """What `higen-export onnx --static` leaves in the place of a graph."""
    path = model.path / graph_file("vae_decoder")
    graph = onnx.load(path, load_external_data=False)
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    path.write_bytes(graph.SerializeToString())
    add_files(model, [path.name])
    with pytest.raises(IntegrityError, match=r"vae_decoder\.onnx: latents has a fixed batch \(--static\)"):
        write_repository(Bundle.open(model.path), tmp_path / "repository", Settings())
    assert not (tmp_path / "repository").exists()


def test_another_precision(model: Bundle, tmp_path: Path) -> None:
    """Its graphs, with the weights that they point into: those of their own, else the model's."""
    for name in STAGES:
        shutil.copy(model.path / graph_file(name), model.path / graph_file(name, "fp16"))
    own = weights_file("spatial_unet", "fp16")
    shutil.copy(model.path / weights_file("spatial_unet"), model.path / own)
    model = add_files(model, [own, *(graph_file(name, "fp16") for name in STAGES)])
    write_repository(model, tmp_path / "repository", Settings(device="gpu", precision="fp16"))
    for name in STAGES:
        version = tmp_path / "repository" / name / "1"
        assert {path.name for path in version.iterdir()} == {"model.onnx", model.weights(name, "fp16")}
    assert (tmp_path / "repository" / "temporal_unet" / "1" / own).is_file()
    with pytest.raises(IntegrityError, match=r"no graph in bf16 of text_encoder.*--precision bf16"):
        write_repository(model, tmp_path / "other", Settings(precision="bf16"))


def test_files_added_later_are_no_part_of_it(model: Bundle, tmp_path: Path) -> None:
    (model.path / "notes.txt").write_text("mine")
    write_repository(add_files(model, ["notes.txt"]), tmp_path / "repository", Settings())
    assert not list((tmp_path / "repository").rglob("notes.txt"))


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient", None)
    with pytest.raises(MissingExtra, match=r"tritonclient.*higen\[triton\]"):
        next(client.stream("127.0.0.1:1", "a whale"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"nvidia-pytriton.*higen\[triton\]"):
        server.command(tmp_path, tmp_path, 1, 2)
