"""Where graphs are written: a model in Hugging Face's cache, a read-only model, and files that belong to others."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import onnxruntime as ort
import pytest
from click.testing import CliRunner

from higen.api import default_model
from higen.bundle import MANIFEST, Bundle, drop_file, graph_file, put_file
from higen.errors import ModelError, OutputError
from higen.export.interface import graph_inputs
from higen.export.model_graphs import _drop_unused_weights, export_model
from higen.export.place import writing
from higen.export.precision import write_weights
from higen.export.quantize import check_graphs
from higen.exporter import main

STAGE = "conditioner"


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """The layout of Hugging Face's cache: a snapshot of links to blobs."""
    snapshot = tmp_path / "snapshots" / "x"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for file in default_model().iterdir():
        name = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, tmp_path / "blobs" / name)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", name))
    return snapshot


def loads(graph: Path) -> bool:
    return bool(ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"]).get_inputs())


@pytest.mark.parametrize("linking", [True, False], ids=["hard link", "copy"])
def test_a_graph_can_be_written_beside_linked_weights(
    cached: Path, monkeypatch: pytest.MonkeyPatch, linking: bool
) -> None:
    if not linking:

        def refused(*_: object) -> None:
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(Path, "hardlink_to", refused)
    blobs = {path: path.read_bytes() for path in (cached.parents[1] / "blobs").iterdir()}
    bundle = Bundle.open(cached)
    with writing(bundle) as place:
        aside = place.beside(graph_file(STAGE))
        aside.write_bytes((cached / graph_file(STAGE)).read_bytes() + b"")
        assert loads(aside)
        drop_file(bundle, graph_file(STAGE))
        bundle = put_file(bundle, aside, graph_file(STAGE), graph_inputs(aside))
    for name in ("unet.safetensors", "vae.safetensors", MANIFEST, graph_file(STAGE)):
        assert not (cached / name).is_symlink()
    assert (cached / graph_file("vae_decoder")).is_symlink()
    assert all(loads(cached / name) for name in bundle.graphs)
    for name in bundle.files:
        bundle.file(name)
    assert {path: path.read_bytes() for path in (cached.parents[1] / "blobs").iterdir()} == blobs
    shared = (cached / "unet.safetensors").stat().st_nlink == 2
    assert shared == linking


def test_links_within_the_folder_stay(tmp_path: Path) -> None:
    model = Path(shutil.copytree(default_model(), tmp_path / "model"))
    (model / "vae.safetensors").rename(model / "weights of the codec")
    (model / "vae.safetensors").symlink_to("weights of the codec")
    with writing(Bundle.open(model)):
        assert (model / "vae.safetensors").is_symlink()


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imitate a read-only file system, because root may write to any other folder."""
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and real(path, mode))


@pytest.mark.parametrize(
    "command",
    [["onnx", "--stage", STAGE], ["onnx", "--precision", "fp16"], ["quantize", "--precision", "int8"]],
    ids=["onnx", "fp16", "quantize"],
)
def test_a_read_only_model_is_one_line_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    model = Path(shutil.copytree(default_model(), tmp_path / "model"))
    read_only(monkeypatch)
    done = CliRunner().invoke(main, [command[0], str(model), *command[1:]])
    assert done.exit_code == 2
    (line,) = done.output.splitlines()
    assert line.startswith(f"OutputError: {model}: its graphs cannot be written there")


def test_a_foreign_file_in_place_of_a_graph_is_refused_before_the_work(tmp_path: Path) -> None:
    model = Path(shutil.copytree(default_model(), tmp_path / "model"))
    stage = Bundle.open(model).manifest.denoising[0]
    for name in (graph_file(STAGE, "fp16"), graph_file(stage, "int8")):
        (model / name).write_text("a graph of mine")
    with pytest.raises(ModelError, match=r"conditioner\.fp16\.onnx: higen\.json does not list it, .* move it away"):
        export_model(Bundle.open(model), [STAGE], precision="fp16")
    with pytest.raises(ModelError, match=r"int8\.onnx: higen\.json does not list it"):
        check_graphs(Bundle.open(model), "int8", [stage])
    shutil.copyfile(model / graph_file(STAGE), model / ".aside")
    with pytest.raises(ModelError, match="does not list it"):
        put_file(Bundle.open(model), model / ".aside", graph_file(STAGE, "fp16"), ())
    assert (model / graph_file(STAGE, "fp16")).read_text() == "a graph of mine"


def test_weights_without_a_graph_go_unless_another_export_is_at_work(tmp_path: Path) -> None:
    model = Path(shutil.copytree(default_model(), tmp_path / "model"))
    bundle = write_weights(Bundle.open(model), "text_encoder", "bf16")
    name = bundle.weights_variant("text_encoder", "bf16")
    assert name in bundle.files
    with writing(bundle) as place:
        with writing(bundle):  # stands for another process
            _drop_unused_weights(bundle, place, "bf16")
            assert name in Bundle.open(model).files
        _drop_unused_weights(bundle, place, "bf16")
    assert name not in Bundle.open(model).files
    assert not (model / name).exists()


def test_an_error_of_the_system_is_an_output_error(tmp_path: Path) -> None:
    model = Path(shutil.copytree(default_model(), tmp_path / "model"))

    def write() -> None:
        with writing(Bundle.open(model)):
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match=r"cannot be written: .*No space left"):
        write()
