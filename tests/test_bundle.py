"""The model directory: `Bundle.open` reads what `create` writes, and any fault in it is one typed error.

tests/test_manifest.py tests the tables of version 2.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import full_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sealing import edit, write

from higen import bundle, commit
from higen.bundle import MANIFEST, Bundle, GraphInput
from higen.errors import IntegrityError, ManifestError, ModelError, RequestError
from higen.families.higen import spec
from higen.families.higen.spec import Defaults, ModelConfig, UNetConfig
from higen.manifest import Manifest
from higen.manifest_file import VERSION
from higen.typed_json import to_json

CONFIG = ModelConfig(
    name="made up",
    unet=UNetConfig(base_channels=64, channel_multipliers=(1, 2), attention_levels=(True, False), head_dim=16),
    defaults=Defaults(frames=16, steps=(8, 4), motion=None),
    optional_cues=True,
    prompts=("a whale", "ein Wal, größer"),
)
TABLES = spec.manifest(CONFIG)
INPUTS = (GraphInput("x", "float32", ("B", 3)),)


def make(path: Path, **contents: bytes) -> Bundle:
    with bundle.create_model(path, TABLES) as folder:
        for name, content in (contents or {"weights": b"0123456789"}).items():
            (folder / name).write_bytes(content)
    return Bundle.open(path)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make(tmp_path / "model").path


@pytest.fixture
def old(model: Path) -> Path:
    """A model directory of version 1, as commit 86f7997 wrote it."""
    files = json.loads((model / MANIFEST).read_text())["files"]
    write(model, {"format": "higen", "version": 1, "model": spec.write_config(CONFIG), "files": files})
    return model


# Round trip


def test_what_is_created_is_read_back(tmp_path: Path) -> None:
    opened = make(tmp_path / "model", a=b"alpha", b=b"")
    assert opened.manifest == TABLES
    assert opened.version == VERSION
    assert {name: record.size for name, record in opened.files.items()} == {"a": 5, "b": 0}
    assert opened.file("a") == tmp_path / "model" / "a"
    assert opened.files["b"].sha256 == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_the_manifest_is_plain_json_with_every_setting(model: Path) -> None:
    text = (model / MANIFEST).read_text(encoding="utf-8")
    manifest = json.loads(text)
    assert text.isascii()
    assert list(manifest)[:3] == ["format", "version", "seal"]
    assert manifest["format"] == "higen"
    assert manifest["version"] == VERSION
    assert {name: manifest[name] for name in to_json(TABLES)} == to_json(TABLES)
    assert manifest["architecture"]["unet"]["channel_multipliers"] == [1, 2]
    assert manifest["sizes"]["frames"] == [1, 16, 256]


def test_settings_that_a_manifest_of_version_1_leaves_out_have_their_default(old: Path) -> None:
    edit(old, lambda m: m.update(model={"name": "short"}))
    opened = Bundle.open(old)
    assert opened.version == 1
    assert opened.manifest == spec.manifest(ModelConfig(name="short"), plain=False)


def test_a_manifest_of_version_1_has_the_tables_of_the_family_that_it_was_written_for(old: Path) -> None:
    opened = Bundle.open(old)
    assert opened.manifest == spec.manifest(CONFIG, plain=False)
    assert opened.graphs == {}
    assert opened.file("weights").read_bytes() == b"0123456789"


def test_a_directory_of_version_1_is_changed_only_on_request(old: Path) -> None:
    before = (old / MANIFEST).read_bytes()
    (old / ".new").write_bytes(b"new")
    for change in (
        lambda: bundle.put_file(Bundle.open(old), old / ".new", "new"),
        lambda: bundle.drop_file(Bundle.open(old), "weights"),
    ):
        with pytest.raises(ManifestError, match=rf"version=1 cannot be changed; first: higen upgrade {old}$"):
            change()
    assert (old / MANIFEST).read_bytes() == before
    assert (old / "weights").exists()


def test_a_model_directory_opens_by_a_relative_path(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    assert Bundle.open("model").manifest == TABLES


# Files that are not what the manifest says


def test_a_missing_file(model: Path) -> None:
    (model / "weights").unlink()
    with pytest.raises(IntegrityError, match=r"weights: listed in higen\.json but not readable"):
        Bundle.open(model)


def test_a_truncated_file(model: Path) -> None:
    (model / "weights").write_bytes(b"01234")
    with pytest.raises(IntegrityError, match=r"weights: 5 bytes, but higen\.json says 10"):
        Bundle.open(model)


def test_an_altered_file_of_the_same_size(model: Path) -> None:
    opened = Bundle.open(model)
    (model / "weights").write_bytes(b"0123456780")
    with pytest.raises(IntegrityError, match=r"does not match the sha256"):
        opened.file("weights")
    assert opened.file("weights", verify=False) == model / "weights"


def test_a_file_that_shrinks_after_opening(model: Path) -> None:
    opened = Bundle.open(model)
    (model / "weights").write_bytes(b"")
    with pytest.raises(IntegrityError, match="0 bytes"):
        opened.file("weights", verify=False)


def test_a_file_that_the_manifest_does_not_list(model: Path) -> None:
    with pytest.raises(IntegrityError, match=r"lists no vae\.safetensors; it lists weights"):
        Bundle.open(model).file("vae.safetensors")


def test_a_folder_in_place_of_a_file(model: Path) -> None:
    (model / "weights").unlink()
    (model / "weights").mkdir()
    with pytest.raises(IntegrityError, match="not a regular file"):
        Bundle.open(model)


def test_a_loop_of_links_in_place_of_a_file(model: Path) -> None:
    (model / "weights").unlink()
    (model / "weights").symlink_to("weights")
    with pytest.raises(IntegrityError, match="not readable"):
        Bundle.open(model)


def test_a_name_that_no_file_system_takes(model: Path) -> None:
    edit(model, lambda m: m.update(files={"x" * 5000: {"size": 1, "sha256": ""}}))
    with pytest.raises(IntegrityError, match="not readable"):
        Bundle.open(model)
    edit(model, lambda m: m.update(files={"\ud800": {"size": 1, "sha256": ""}}))
    with pytest.raises(ManifestError, match=r"not valid JSON: .*surrogates not allowed"):
        Bundle.open(model)


# Manifests that are wrong


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "higen", '{"format": "higen"', "\ufeff{}", "[" * 100_000, "1" * 10_000],
    ids=["empty", "cut", "list", "null", "word", "unclosed", "mark", "deep", "long"],
)
def test_a_file_that_is_not_a_manifest(model: Path, text: str) -> None:
    (model / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(ManifestError, match=r"higen\.json: not"):
        Bundle.open(model)


def test_a_manifest_that_is_not_utf8(model: Path) -> None:
    (model / MANIFEST).write_bytes(b"\xff\xfe{}")
    with pytest.raises(ManifestError, match=r"higen\.json: not valid JSON: 'utf-8' codec"):
        Bundle.open(model)


def test_places_that_are_not_model_directories(model: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "nowhere", tmp_path / "empty", tmp_path / "loop", model / "weights", "a\0b", ""):
        with pytest.raises(ManifestError, match=r"not a model directory, higen\.json cannot be read"):
            Bundle.open(place)


def test_a_manifest_of_a_newer_version(model: Path) -> None:
    edit(model, lambda m: m.update(version=VERSION + 1))
    with pytest.raises(ManifestError, match="version=3, but this higen reads up to 2: pip install --upgrade higen"):
        Bundle.open(model)


@pytest.mark.parametrize("version", [None, 0, -1, 1.0, True, "1", []])
def test_an_invalid_version(model: Path, version: object) -> None:
    edit(model, lambda m: m.update(version=version))
    with pytest.raises(ManifestError, match="a whole number from 1"):
        Bundle.open(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="gguf"), "not a higen manifest"),
        (lambda m: m.pop("files"), "files=None: an object"),
        (lambda m: m.update(model=[]), r"model=\[\]: an object"),
        (lambda m: m["model"].update(nme="x"), r"model\.nme: unknown key; known are name, "),
        (lambda m: m["model"]["unet"].update(depth=3), r"model\.unet\.depth: unknown key"),
        (lambda m: m["model"].update(name=3), r"model\.name=3: a text is wanted"),
        (
            lambda m: m["model"]["unet"].update(base_channels=True),
            r"model\.unet\.base_channels=True: a whole number is wanted",
        ),
        (lambda m: m["model"]["unet"].update(base_channels=48), "48 channels"),
        (lambda m: m["model"]["unet"].update(base_channels=0), "base_channels=0: whole numbers from 1"),
        (lambda m: m["model"]["unet"].update(head_dim=0), "head_dim=0: whole numbers from 1"),
        (lambda m: m["model"]["unet"].update(head_dim=48), "head_dim=48 does not divide the 64 channels"),
        (lambda m: m["model"]["unet"].update(context_heads=7), "context_heads=7 does not divide"),
        (lambda m: m["model"]["unet"].update(attention_levels=[True]), "attention_levels has 1 entries"),
        (lambda m: m["model"]["unet"].update(dropout=1), r"dropout=1\.0"),
        (lambda m: m["model"]["schedule"].update(beta_start=0.5), "beta_start"),
        (lambda m: m["model"]["schedule"].update(beta_end=10**400), r"beta_end=1000.*: a finite number is wanted"),
        (lambda m: m["model"]["schedule"].update(beta_end=float("nan")), "not valid JSON: nan is not a JSON number"),
        (lambda m: m["model"]["autoencoder"].update(factor=0), "factor=0"),
        (lambda m: m["model"]["autoencoder"].update(scale=[0.0]), "no scale 0"),
        (lambda m: m["model"]["text"].update(context_length=2), "context_length=2"),
        (lambda m: m["model"]["defaults"].update(steps=[1]), r"steps=\[1\]"),
        (lambda m: m["model"]["defaults"].update(steps=[1, None]), r"steps\[1\]=None: a whole number is wanted"),
        (lambda m: m["files"].update(weights=10), r"files\.weights: an object is wanted, not 10"),
        (lambda m: m["files"]["weights"].update(md5="x"), r"files\.weights\.md5: unknown key"),
        (lambda m: m["files"]["weights"].update(size="10"), r"files\.weights\.size='10': a whole number is wanted"),
    ],
)
def test_a_manifest_of_version_1_with_something_wrong_names_it(
    old: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(old, change)
    with pytest.raises(ManifestError, match=message):
        Bundle.open(old)


def test_a_record_that_lacks_its_hash(old: Path) -> None:
    edit(old, lambda m: m["files"]["weights"].pop("sha256"))
    with pytest.raises(ManifestError, match=r"files\.weights: has no sha256"):
        Bundle.open(old)


@pytest.mark.parametrize(
    "name",
    [
        *("../secret", "a/../../secret", "/etc/passwd", "..\\secret", "C:\\secret", "c:secret", "\\\\host\\share"),
        *("a//b", "./a", "", "a\0", "a/", MANIFEST),
    ],
)
def test_no_file_of_a_model_lies_outside_it(model: Path, name: str) -> None:
    (model.parent / "secret").write_bytes(b"s")
    edit(model, lambda m: m["files"].update({name: {"size": 1, "sha256": ""}}))
    with pytest.raises(ManifestError, match="a path inside the model directory is wanted"):
        Bundle.open(model)


def test_files_may_lie_in_subfolders(model: Path) -> None:
    (model / "engines").mkdir()
    (model / "engines" / "a.engine").write_bytes(b"e")
    record = to_json(bundle.file_record(model / "engines" / "a.engine"))
    edit(model, lambda m: m["files"].update({"engines/a.engine": record}))
    assert Bundle.open(model).file("engines/a.engine").read_bytes() == b"e"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters()), inner, max_size=4),
    max_leaves=8,
)


def keys(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in nested dictionaries and lists."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, inner in children for found in keys(inner, (*path, key)))]


def opens_or_refuses(folder: Path, manifest: object) -> None:
    write(folder, manifest)
    try:
        opened = Bundle.open(folder)
    except ModelError:
        return
    assert isinstance(opened.manifest, Manifest)


SHARED_FOLDER = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@SHARED_FOLDER
@given(manifest=JSON | st.builds(lambda m, f: {"format": "higen", "version": 1, "model": m, "files": f}, JSON, JSON))
def test_any_json_is_a_model_or_a_typed_error(tmp_path: Path, manifest: object) -> None:
    opens_or_refuses(tmp_path, manifest)


@SHARED_FOLDER
@given(data=st.data(), value=JSON | st.integers(-2, 1000))
def test_a_model_with_any_value_changed_is_a_model_or_a_typed_error(
    tmp_path: Path, data: st.DataObject, value: object
) -> None:
    manifest = {"format": "higen", "version": 1, "model": spec.write_config(CONFIG), "files": {}}
    *path, last = data.draw(st.sampled_from(keys(manifest)[1:]))
    place: Any = manifest
    for key in path:
        place = place[key]
    place[last] = value
    opens_or_refuses(tmp_path, manifest)


# Creating


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def begin(path: Path, failure: type[BaseException] | None = None) -> None:
    """Write a model with the file `new` to `path`, or fail halfway through."""
    with bundle.create_model(path, TABLES, overwrite=True) as folder:
        (folder / "new").write_bytes(b"new")
        if failure is not None:
            raise failure


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing_behind(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure):
        begin(tmp_path / "model", failure)
    assert left(tmp_path) == []


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_keeps_the_model_that_was_there(tmp_path: Path, failure: type[BaseException]) -> None:
    make(tmp_path / "model", old=b"old")
    with pytest.raises(failure):
        begin(tmp_path / "model", failure)
    assert left(tmp_path) == ["model"]
    assert Bundle.open(tmp_path / "model").file("old").read_bytes() == b"old"


@pytest.mark.parametrize("exchanging", [True, False])
def test_a_failure_of_the_move_puts_the_old_model_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanging: bool
) -> None:
    """Also on a system that cannot exchange two folders atomically."""
    make(tmp_path / "model", old=b"old")
    replace = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if (self / "new").exists():  # the new model, on the move to its final path
            raise KeyboardInterrupt
        return replace(self, target)

    def interrupted(*_: Path) -> bool:
        raise KeyboardInterrupt

    if exchanging:
        monkeypatch.setattr(commit, "exchange", interrupted)
    else:
        monkeypatch.setattr(commit, "exchange", lambda *_: False)
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path / "model")
    assert left(tmp_path) == ["model"]
    assert Bundle.open(tmp_path / "model").file("old").read_bytes() == b"old"


def test_nothing_appears_before_everything_is_written(tmp_path: Path) -> None:
    with bundle.create_model(tmp_path / "model", TABLES) as folder:
        (folder / "new").write_bytes(b"new")
        assert not (tmp_path / "model").exists()
    assert Bundle.open(tmp_path / "model").file("new").read_bytes() == b"new"


def test_existing_files_are_replaced_only_on_request(tmp_path: Path) -> None:
    make(tmp_path / "model")
    with pytest.raises(ModelError, match=r"exists already$"), bundle.create_model(tmp_path / "model", TABLES):
        pytest.fail("the caller must not be asked to fill it")


@pytest.mark.parametrize("room", [0, 4])
def test_a_full_disk_is_one_error_and_keeps_what_was_there(tmp_path: Path, room: int) -> None:
    """The disk is full when the caller writes, or later when the manifest is written."""
    make(tmp_path / "model", old=b"old")
    with full_disk(room), pytest.raises(ModelError, match=r"model: cannot be written: .*File too large"):
        begin(tmp_path / "model")
    assert left(tmp_path) == ["model"]
    assert Bundle.open(tmp_path / "model").file("old").read_bytes() == b"old"


def test_overwrite_replaces_a_model_whole(tmp_path: Path) -> None:
    make(tmp_path / "model", old=b"old")
    begin(tmp_path / "model")
    assert sorted(Bundle.open(tmp_path / "model").files) == ["new"]
    assert left(tmp_path) == ["model"]
    assert left(tmp_path / "model") == [MANIFEST, "new"]


def test_overwrite_never_replaces_other_things(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("thesis", "file", "dangling"):
        with (
            pytest.raises(ModelError, match="exists already and is not a model directory"),
            bundle.create_model(tmp_path / name, TABLES, overwrite=True),
        ):
            pytest.fail("the caller must not be asked to fill it")
    assert left(tmp_path) == ["dangling", "file", "thesis"]


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="exists already"), bundle.create_model(tmp_path / "model", TABLES):
        (tmp_path / "model").mkdir()
    assert left(tmp_path) == ["model"]


def test_a_missing_parent_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(ModelError, match=r"folder .*nowhere does not exist"),
        bundle.create_model(tmp_path / "nowhere/m", TABLES),
    ):
        pytest.fail("the caller must not be asked to fill it")


def test_hidden_files_are_not_part_of_the_model(tmp_path: Path) -> None:
    with bundle.create_model(tmp_path / "model", TABLES) as folder:
        (folder / ".cache").write_bytes(b"c")
        (folder / "weights").write_bytes(b"w")
    assert list(Bundle.open(tmp_path / "model").files) == ["weights"]


# Files that come later


@pytest.mark.parametrize("at", range(6))
def test_a_model_is_complete_at_every_moment_while_a_file_is_added(
    model: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """A writer fails after `at` of these renames: aside, journal, manifest without the file, file, manifest with it."""
    aside = model / ".graph.part"
    aside.write_bytes(b"old")
    bundle.put_file(Bundle.open(model), aside, "graph.onnx", INPUTS)
    aside.write_bytes(b"newer")
    renames, replace_path = 0, Path.replace

    def failing(self: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if renames > at:
            raise KeyboardInterrupt
        return replace_path(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", failing)
        if at < 5:
            with pytest.raises(KeyboardInterrupt):
                bundle.put_file(Bundle.open(model), aside, "graph.onnx", INPUTS)
        else:
            bundle.put_file(Bundle.open(model), aside, "graph.onnx", INPUTS)
    left = Bundle.open(model)
    assert left.file("graph.onnx").read_bytes() == (b"newer" if at > 2 else b"old")
    assert [path.name for path in model.iterdir() if path.name.startswith(".higen-")] == []
    if aside.exists():  # the work is done again
        left = bundle.put_file(left, aside, "graph.onnx", INPUTS)
        assert left.file("graph.onnx").read_bytes() == b"newer"


def test_the_same_file_again_changes_nothing(model: Path) -> None:
    aside = model / ".graph.part"
    aside.write_bytes(b"same")
    first = bundle.put_file(Bundle.open(model), aside, "graph.onnx", INPUTS)
    written = (model / "graph.onnx").stat().st_mtime_ns
    aside.write_bytes(b"same")
    assert bundle.put_file(first, aside, "graph.onnx", INPUTS) is first
    assert (model / "graph.onnx").stat().st_mtime_ns == written
    assert not aside.exists()
    left = bundle.drop_file(first, "graph.onnx")
    assert "graph.onnx" not in left.files
    assert Bundle.open(model).files == left.files
    assert not (model / "graph.onnx").exists()


def test_names_of_variants(model: Path) -> None:
    assert bundle.graph_file("spatial_unet") == bundle.graph_file("spatial_unet", "fp32") == "spatial_unet.onnx"
    assert bundle.graph_file("spatial_unet", "fp16") == "spatial_unet.fp16.onnx"
    opened = Bundle.open(model)
    assert opened.weights_variant("conditioner", "bf16") == "unet.bf16.safetensors"
    assert opened.weights_variant("vae_encoder", "fp16") == "vae.fp16.safetensors"
    assert opened.weights_variant("temporal_unet_plain", "int8.fp16") == "unet.fp16.safetensors"
    with pytest.raises(RequestError, match="precision='fp8': one of 'fp32', 'fp16', 'bf16'"):
        bundle.graph_file("spatial_unet", "fp8")
    assert opened.precisions("spatial_unet") == ()
    assert opened.weights("spatial_unet", "fp16") == "unet.safetensors"


def test_a_graph_is_added_with_its_inputs(model: Path) -> None:
    aside = model / ".graph.part"
    aside.write_bytes(b"graph")
    made = bundle.put_file(Bundle.open(model), aside, "graph.onnx", INPUTS)
    assert made.graphs == {"graph.onnx": INPUTS}
    assert Bundle.open(model).graphs == {"graph.onnx": INPUTS}
    assert bundle.drop_file(made, "graph.onnx").graphs == {}
    aside.write_bytes(b"graph")
    for name, inputs in (("graph.onnx", None), ("notes.txt", INPUTS)):
        with pytest.raises(ModelError, match=rf"{name}: inputs must be given for a graph \(\.onnx\), and only"):
            bundle.put_file(Bundle.open(model), aside, name, inputs)
    assert aside.read_bytes() == b"graph"
    assert sorted(Bundle.open(model).files) == ["weights"]


ENTER = """
import sys
from pathlib import Path
from higen.bundle import Bundle, GraphInput, put_file
model, mine = Path(sys.argv[1]), sys.argv[2]
for i in range(50):
    (model / f".{mine}.part").write_text(f"{mine} {i}")
    put_file(Bundle.open(model), model / f".{mine}.part", f"{mine}{i}.onnx", (GraphInput("x", "float32", ("B", 3)),))
"""


def test_two_processes_that_add_files_at_once_lose_none(model: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", ENTER, str(model), name]) for name in ("a", "b")]
    assert [writer.wait(300) for writer in writers] == [0, 0]
    opened = Bundle.open(model)
    assert sorted(opened.graphs) == sorted(f"{name}{i}.onnx" for name in "ab" for i in range(50))
    for name in opened.files:
        opened.file(name)
    assert [path.name for path in model.iterdir() if path.name[0] == "."] == []


SAME = """
import sys
from pathlib import Path
from higen.bundle import Bundle, GraphInput, put_file
model, mine = Path(sys.argv[1]), sys.argv[2]
for i in range(30):
    aside = model / f".{mine}.part"
    aside.write_text(f"{mine} " * (i + 1))
    put_file(Bundle.open(model), aside, "graph.onnx", (GraphInput("x", "float32", ("B", 3)),))
"""


def test_two_processes_that_add_the_same_file_leave_it_with_its_record(model: Path) -> None:
    """A reader finds a whole model at every moment."""
    writers = [subprocess.Popen([sys.executable, "-c", SAME, str(model), name]) for name in ("a", "bb")]
    while any(writer.poll() is None for writer in writers):
        Bundle.open(model)
    assert [writer.returncode for writer in writers] == [0, 0]
    opened = Bundle.open(model)
    assert opened.file("graph.onnx").read_text() in ("a " * 30, "bb " * 30)
    assert [path.name for path in model.iterdir() if path.name[0] == "."] == []


def test_a_killed_change_is_completed_when_the_model_is_opened(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"""
import os, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
count = 0
def hook(event, arguments):
    global count
    if event == "os.rename":
        count += 1
        if count == 4:
            os.kill(os.getpid(), 9)
from pathlib import Path
from higen.bundle import Bundle, GraphInput, put_file
model = Path(sys.argv[1])
inputs = (GraphInput("x", "float32", ("B", 3)),)
for text in ("old", "newer"):
    (model / ".aside").write_text(text)
    if text == "newer":
        sys.addaudithook(hook)
    put_file(Bundle.open(model), model / ".aside", "graph.onnx", inputs)
"""
    assert subprocess.run([sys.executable, "-c", code, str(model)], check=False).returncode == -9
    left = json.loads((model / MANIFEST).read_text())
    assert "graph.onnx" not in left["files"]  # another runtime finds a whole model without the graph
    assert Bundle.open(model).file("graph.onnx").read_bytes() == b"newer"
