"""A repository's files: configurations follow the stage table, weights are linked, and a failure leaves nothing."""

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

import onnxruntime as ort
import pytest
from click.testing import CliRunner
from made_up_model import MANIFEST, write_made_up_model

from higen.api import default_model
from higen.backends.plans import ENGINES, PlanProfile, PlanRecord, Span
from higen.bundle import Bundle, GraphInput, file_record, graph_file, put_file
from higen.engines.triton import client, server
from higen.engines.triton import repository as written
from higen.engines.triton.config import stage_config
from higen.engines.triton.repository import Settings, write_repository
from higen.errors import (
    EngineError,
    HigenError,
    IntegrityError,
    Malformed,
    ManifestError,
    MissingExtra,
    ModelError,
    RequestError,
    Stale,
)
from higen.exporter import main


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


def names_of(bundle: Bundle) -> list[str]:
    return [stage.name for stage in bundle.manifest.all_stages]


def weights_of(bundle: Bundle, stage: str) -> str:
    return bundle.manifest.stage(stage).weights


def test_the_files_of_a_repository(repository: Path, bundle: Bundle) -> None:
    found = sorted(str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file())
    stages = [
        name
        for stage in bundle.manifest.all_stages
        for name in (f"{stage.name}/config.pbtxt", f"{stage.name}/1/model.onnx", f"{stage.name}/1/{stage.weights}")
    ]
    own = ["config.pbtxt", "1/model.py", "1/model/higen.json", "1/model/tokenizer.json"]
    assert found == sorted([*stages, *(f"higen/{name}" for name in own)])
    assert Bundle.open(repository / "higen" / "1" / "model").manifest == bundle.manifest
    assert all(os.access(path, os.R_OK) and path.stat().st_mode & 0o044 for path in repository.rglob("*"))


def test_weights_are_there_once_and_every_graph_loads(repository: Path, bundle: Bundle) -> None:
    weights = [repository / stage / "1" / weights_of(bundle, stage) for stage in ("conditioner", "spatial_unet")]
    linked = len({path.stat().st_ino for path in weights})
    assert linked == 1
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for stage in bundle.manifest.stages:
        graph = repository / stage.name / "1" / "model.onnx"
        session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        assert [value.name for value in session.get_inputs()] == [tensor.name for tensor in stage.inputs]


def test_why_hard_links(bundle: Bundle, tmp_path: Path) -> None:
    """ONNX Runtime does not follow a symbolic link out of the graph's folder. If a version does, such links suffice."""
    for name in (graph_file("text_encoder"), weights_of(bundle, "text_encoder")):
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
    copies = [tmp_path / "repository" / stage.name / "1" / stage.weights for stage in bundle.manifest.stages]
    for name in {path.name for path in copies}:
        assert len({path.stat().st_ino for path in copies if path.name == name}) == 1
        assert copies[0].stat().st_ino != (bundle.path / name).stat().st_ino


def settings_of(text: str, name: str) -> list[str]:
    return re.findall(rf"^\s*{name}: (.*)$", text, flags=re.MULTILINE)


@pytest.mark.parametrize(("device", "kind"), [("cpu", "KIND_CPU"), ("gpu", "KIND_GPU")])
def test_where_the_stages_run(bundle: Bundle, tmp_path: Path, device: str, kind: str) -> None:
    settings = Settings(device=device, max_batch=1, slots=3, line=0, instances=2, threads=4)
    write_repository(bundle, tmp_path / "repository", settings)
    for name in bundle.manifest.stage_names:
        text = (tmp_path / "repository" / name / "config.pbtxt").read_text()
        assert settings_of(text, "kind") == [kind]
        assert settings_of(text, "count") == ["2"]
        assert settings_of(text, "max_batch_size") == ["2" if name.startswith("vae") else "1"]
        assert '"intra_op_thread_count"' in text
    text = (tmp_path / "repository" / "higen" / "config.pbtxt").read_text()
    assert settings_of(text, "kind") == ["KIND_CPU"]
    limits, stages = (json.loads(json.loads(value)) for value in settings_of(text, "string_value"))
    assert (limits["slots"], limits["line"], limits["rows"]["temporal_unet"]) == (3, 0, 1)
    assert stages == dict.fromkeys(names_of(bundle), "onnxruntime")


@pytest.mark.parametrize(("device", "gpus"), [("gpu:1", [1]), ("cuda:12", [12]), ("cuda", None)])
def test_stages_on_one_gpu(bundle: Bundle, tmp_path: Path, device: str, gpus: list[int] | None) -> None:
    write_repository(bundle, tmp_path / "repository", Settings(device=device))
    text = (tmp_path / "repository" / "text_encoder" / "config.pbtxt").read_text()
    assert "kind: KIND_GPU" in text
    assert settings_of(text, "gpus") == ([json.dumps(gpus)] if gpus else [])


def test_a_stage_s_configuration(bundle: Bundle) -> None:
    text = stage_config(
        bundle.manifest.stage("text_encoder"),
        bundle.manifest.fixed,
        backend="onnxruntime",
        device="cpu",
        max_batch=8,
        instances=1,
        threads=None,
    )
    length, width = bundle.manifest.fixed["L"], bundle.manifest.fixed["Dt"]
    assert text == (
        'name: "text_encoder"\nbackend: "onnxruntime"\nmax_batch_size: 8\n'
        f'input {{\n  name: "tokens"\n  data_type: TYPE_INT64\n  dims: [{length}]\n}}\n'
        f'output {{\n  name: "hidden"\n  data_type: TYPE_FP32\n  dims: [{length}, {width}]\n}}\n'
        "instance_group {\n  kind: KIND_CPU\n  count: 1\n}\n"
        "dynamic_batching {\n  max_queue_delay_microseconds: 0\n}\n"
    )


def test_a_stage_that_holds_one_sample_does_not_batch() -> None:
    """The first axis does not count samples, a vector stays a vector, and Triton must not batch its requests."""
    given = {"backend": "onnxruntime", "device": "cpu", "max_batch": 8, "instances": 1, "threads": None}
    assert stage_config(MANIFEST.stage("unpack"), MANIFEST.fixed, **given) == (
        'name: "unpack"\nbackend: "onnxruntime"\nmax_batch_size: 0\n'
        'input {\n  name: "latents"\n  data_type: TYPE_FP32\n  dims: [-1, 3, -1, -1, -1]\n}\n'
        'output {\n  name: "pixels"\n  data_type: TYPE_FP32\n  dims: [-1, 3, -1, -1, -1]\n}\n'
        "instance_group {\n  kind: KIND_CPU\n  count: 1\n}\n"
    )
    mixer = replace(MANIFEST.stage("mixer"), batch=False)
    assert settings_of(stage_config(mixer, MANIFEST.fixed, **given), "dims") == [
        "[-1, 5]", "[-1, -1]", "[-1, -1, 8]", "[-1]", "[-1]", "[-1, -1, 5]"
    ]  # fmt: skip


@pytest.fixture
def made_up(tmp_path: Path) -> Bundle:
    return write_made_up_model(tmp_path / "made-up")


def test_a_model_without_an_installed_family(made_up: Bundle, tmp_path: Path) -> None:
    backends = write_repository(made_up, tmp_path / "repository", Settings(max_batch=3))
    assert backends == {**dict.fromkeys(MANIFEST.stage_names, "onnxruntime"), "higen": "python"}
    sizes = {name: settings_of((tmp_path / "repository" / name / "config.pbtxt").read_text(), "max_batch_size")[0]
             for name in backends}  # fmt: skip
    assert sizes == {**dict.fromkeys(MANIFEST.stage_names, "3"), "look": "0", "unpack": "0", "higen": "0"}
    text = (tmp_path / "repository" / "higen" / "config.pbtxt").read_text()
    names = [json.loads(name) for name in settings_of(text, "name")]
    assert {"wobble", "drift", "drift_matrix", "grain", "mood", "sketch", "sketch_file"} <= set(names)
    assert (text.count("optional: true"), text.index("optional")) == (
        text.count("input {") - 1,  # all except the prompt
        text.index("optional", text.index('"negative_prompt"')),
    )
    inner = tmp_path / "repository" / "higen" / "1" / "model"
    assert sorted(path.name for path in inner.iterdir()) == ["higen.json", "words.json"]


def test_the_guided_graphs_are_enough(tmp_path: Path) -> None:
    """The repository then has no plain stages, and the configuration of `higen` says so."""
    made = write_made_up_model(tmp_path / "made-up", without=("draft_one", "film_one"))
    backends = write_repository(made, tmp_path / "repository", Settings())
    assert set(backends) == {*MANIFEST.stage_names, "higen"} - {"draft_one", "film_one"}
    assert not (tmp_path / "repository" / "film_one").exists()
    text = (tmp_path / "repository" / "higen" / "config.pbtxt").read_text()
    assert list(json.loads(json.loads(settings_of(text, "string_value")[1]))) == [n for n in backends if n != "higen"]
    made = write_made_up_model(tmp_path / "other", without=("draft_two",))
    with pytest.raises(IntegrityError, match="no graph in fp32 of draft_two: higen-export onnx"):
        write_repository(made, tmp_path / "refused", Settings())


def as_before(inputs: tuple[GraphInput, ...]) -> tuple[GraphInput, ...]:
    """Change a graph's inputs to those of the step contract of version 1."""
    changed = {"t": GraphInput("t", "int64", ("B",)), "guidance": GraphInput("guidance", "float32", ("B",))}
    return tuple(changed.get(tensor.name, tensor) for tensor in inputs)


def test_a_graph_of_an_older_step_contract_is_refused(made_up: Bundle, tmp_path: Path) -> None:
    older = {**made_up.graphs, "film_two.onnx": as_before(made_up.graphs["film_two.onnx"])}
    command = re.escape(f"higen-export onnx {made_up.path} --precision fp32")
    with pytest.raises(IntegrityError, match=rf"film_two\.onnx: .*takes t as int64 \['B'\].*: {command}"):
        write_repository(replace(made_up, graphs=older), tmp_path / "repository", Settings())
    older["film_two.onnx"] = made_up.graphs["film_two.onnx"][1:]
    with pytest.raises(
        IntegrityError, match=rf"film_two\.onnx: only one of the graph and the stage has the input latents: {command}"
    ):
        write_repository(replace(made_up, graphs=older), tmp_path / "repository", Settings())
    with pytest.raises(
        ManifestError, match=f"of version 1, Triton reads 2: higen upgrade {re.escape(str(made_up.path))}"
    ):
        write_repository(replace(made_up, version=1, graphs={}), tmp_path / "repository", Settings())
    assert not (tmp_path / "repository").exists()


def put_engine(model: Bundle, stage: str = "temporal_unet", **given: Any) -> Path:
    """An engine in the folder engines/tensorrt-sm90, with the record that a builder would write."""
    target = given.get("target", "tensorrt-sm90")
    folder = model.path / ENGINES / target
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / f"{stage}.engine"
    plan.write_bytes(b"plan")
    files = (graph_file(stage), weights_of(model, stage))
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
    # Rows with guidance 1 also run on the stage that has an engine.
    assert set(backends) == {*names_of(model), "higen"} - {"temporal_unet_plain"}
    text = (tmp_path / "repository" / "temporal_unet" / "config.pbtxt").read_text()
    assert settings_of(text, "backend") == ['"tensorrt"']
    assert settings_of(text, "profile") == ['["1"]']  # the profile for batches of 1 to 8
    assert "intra_op_thread_count" not in text
    version = tmp_path / "repository" / "temporal_unet" / "1"
    assert [path.name for path in version.iterdir()] == ["model.plan"]
    assert (version / "model.plan").read_bytes() == b"plan"


def test_a_plain_stage_is_run_as_the_guided_one_is(made_up: Bundle, tmp_path: Path) -> None:
    put_engine(made_up, "film_one")
    backends = write_repository(made_up, tmp_path / "graphs", Settings(**GPU))
    assert {backends[name] for name in MANIFEST.stage_names} == {"onnxruntime"}
    put_engine(made_up, "film_two")
    backends = write_repository(made_up, tmp_path / "engines", Settings(**GPU))
    assert {name for name, backend in backends.items() if backend == "tensorrt"} == {"film_one", "film_two"}


def test_an_engine_of_a_stage_that_does_not_batch_may_use_all_its_profiles(made_up: Bundle, tmp_path: Path) -> None:
    put_engine(made_up, "unpack")
    write_repository(made_up, tmp_path / "repository", Settings(**GPU))
    text = (tmp_path / "repository" / "unpack" / "config.pbtxt").read_text()
    assert settings_of(text, "profile") == ['["0", "1", "2"]']
    assert settings_of(text, "max_batch_size") == ["0"]


def test_an_engine_of_an_older_step_contract_is_refused(made_up: Bundle, tmp_path: Path) -> None:
    put_engine(made_up, "film_two")
    older = {**made_up.graphs, "film_two.onnx": as_before(made_up.graphs["film_two.onnx"])}
    with pytest.raises(IntegrityError, match=r"film_two\.onnx: an older export.*higen-export onnx"):
        write_repository(replace(made_up, graphs=older), tmp_path / "repository", Settings(**GPU))


@pytest.mark.parametrize(
    ("record", "settings", "error", "message"),
    [
        ({"flavour": "rtx"}, {}, EngineError, "TensorRT for RTX, but Triton reads those of classic TensorRT"),
        ({"graph_sha256": "0" * 64}, {}, Stale, "temporal_unet.onnx has changed"),
        ({"sha256": "0" * 64}, {}, Malformed, "is not the plan that its record describes"),
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


def test_a_broken_engine_is_not_skipped_silently(model: Bundle, tmp_path: Path) -> None:
    record = put_engine(model).with_suffix(".json")
    record.write_text("{")
    assert_nothing_written(tmp_path, Malformed, "not the record of an engine", model, **GPU)
    record.unlink()
    assert_nothing_written(tmp_path, Malformed, "has no record", model, **GPU)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "tpu"}, "device='tpu': one of 'cpu', 'gpu'"),
        *(({"device": name}, "device=.*: one of 'cpu'") for name in ("cuda:banana", "cuda:-1", "gpu:", "cpu:7", "")),
        *(({"device": name}, "device=.*: one of 'cpu'") for name in ("cuda:01", "GPU", "gpu:1 ", None)),
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
    weights = weights_of(model, "vae_encoder")
    (model.path / weights).write_bytes(b"\0" * model.files[weights].size)
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
    assert backends == dict.fromkeys(names_of(bundle), "onnxruntime") | {"higen": "python"}
    code, output = run(str(bundle.path), str(tmp_path / "repository"))
    assert (code, "exists already" in output) == (2, True)
    code, output = run(str(bundle.path), str(tmp_path / "other"), "--device", "tpu", "--json")
    assert (code, json.loads(output)["error"]) == (2, "RequestError")
    code, output = run(str(tmp_path / "nothing"), str(tmp_path / "other"))
    assert (code, "not a model directory" in output) == (2, True)
    assert not (tmp_path / "other").exists()


def test_the_error_for_a_model_without_graphs_says_how_to_make_them(tiny_model: Path, tmp_path: Path) -> None:
    code, output = run(str(tiny_model), str(tmp_path / "repository"))
    assert (code, "higen-export onnx" in output) == (2, True)


def test_a_graph_of_one_shape_is_refused(model: Bundle, tmp_path: Path) -> None:
    """`higen-export onnx --static` writes such a graph in place of the usual one."""
    name = graph_file("vae_decoder")
    fixed = tuple(replace(tensor, shape=(1, *tensor.shape[1:])) for tensor in model.graphs[name])
    changed = replace(model, graphs={**model.graphs, name: fixed})
    with pytest.raises(IntegrityError, match=r"vae_decoder\.onnx: latents has a fixed size N=1 \(--static\)"):
        write_repository(changed, tmp_path / "repository", Settings())
    assert not (tmp_path / "repository").exists()


def test_an_axis_that_no_request_varies_may_be_fixed(made_up: Bundle, tmp_path: Path) -> None:
    """A one-sample stage always gets one sample. Its configuration then has the graph's fixed size."""
    (latents,) = made_up.graphs["unpack.onnx"]
    graphs = {**made_up.graphs, "unpack.onnx": (replace(latents, shape=(1, *latents.shape[1:])),)}
    write_repository(replace(made_up, graphs=graphs), tmp_path / "repository", Settings())
    text = (tmp_path / "repository" / "unpack" / "config.pbtxt").read_text()
    assert settings_of(text, "dims") == ["[1, 3, -1, -1, -1]"] * 2


def copied(model: Bundle, name: str, to: str) -> Bundle:
    """Copy a file of the model, graph or not, to another name."""
    part = model.path / ".part"
    shutil.copy(model.path / name, part)
    return put_file(model, part, to, model.graphs.get(name))


def test_another_precision(model: Bundle, tmp_path: Path) -> None:
    """The precision's graphs with the weights that they refer to: the precision's own, otherwise the model's."""
    own = model.weights_variant("spatial_unet", "fp16")
    model = copied(model, weights_of(model, "spatial_unet"), own)
    for name in model.manifest.stage_names:
        model = copied(model, graph_file(name), graph_file(name, "fp16"))
    write_repository(model, tmp_path / "repository", Settings(device="gpu", precision="fp16"))
    for name in model.manifest.stage_names:
        version = tmp_path / "repository" / name / "1"
        assert {path.name for path in version.iterdir()} == {"model.onnx", model.weights(name, "fp16")}
    assert (tmp_path / "repository" / "temporal_unet" / "1" / own).is_file()
    with pytest.raises(IntegrityError, match=r"no graph in bf16 of text_encoder.*--precision bf16"):
        write_repository(model, tmp_path / "other", Settings(precision="bf16"))


def test_files_added_later_are_not_part_of_it(model: Bundle, tmp_path: Path) -> None:
    (model.path / ".part").write_text("mine")
    model = put_file(model, model.path / ".part", "notes.txt")
    write_repository(model, tmp_path / "repository", Settings())
    assert not list((tmp_path / "repository").rglob("notes.txt"))


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient", None)
    with pytest.raises(MissingExtra, match=r"tritonclient.*higen\[triton\]"):
        next(client.stream("127.0.0.1:1", "a whale"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"nvidia-pytriton.*higen\[triton\]"):
        server.command(tmp_path, tmp_path, 1, 2)
