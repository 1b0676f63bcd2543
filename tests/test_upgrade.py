"""`higen upgrade`: a directory of version 1 becomes version 2, and no byte of its weights and graphs changes."""

from __future__ import annotations

import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx
import pytest
from conftest import TINY
from onnx import TensorProto, helper

from higen.bundle import MANIFEST, Bundle, file_record, graph_file
from higen.errors import IntegrityError, ManifestError, ModelError
from higen.families.higen import spec
from higen.families.higen.version_1 import graph_inputs as version_1_inputs
from higen.manifest_file import VERSION, read_manifest
from higen.typed_json import to_json
from higen.upgrade import graph_inputs, upgrade

TABLES = spec.manifest(TINY)
OLD = [stage for stage in TABLES.stages if not stage.name.endswith("_plain")]
KINDS = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


def write_graph(path: Path, stage: Any, static: dict[str, int] | None = None) -> None:
    """A graph with the inputs of version 1's graph, which returns its first input."""
    fixed = {**TABLES.fixed, **(static or {})}
    inputs = [
        helper.make_tensor_value_info(t.name, KINDS[t.dtype], [fixed.get(n, n) for n in t.shape])
        for t in version_1_inputs(stage)
    ]
    first = inputs[0].type.tensor_type
    outputs = [
        helper.make_tensor_value_info(name, first.elem_type, [d.dim_value or d.dim_param for d in first.shape.dim])
        for name in stage.graph_outputs[:1]
    ]
    node = helper.make_node("Identity", [inputs[0].name], [outputs[0].name])
    graph = helper.make_graph([node], stage.name, inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)


def write_version_1(folder: Path, files: list[str]) -> None:
    """The manifest as `higen` 0.1 wrote it."""
    manifest = {
        "format": "higen",
        "version": 1,
        "model": spec.write_config(TINY),
        "files": {name: to_json(file_record(folder / name)) for name in sorted(files)},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


@pytest.fixture
def old(tiny_model: Path, tmp_path: Path) -> Path:
    """A directory of version 1 with a graph of every stage."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "old model"))
    for stage in OLD:
        write_graph(folder / graph_file(stage.name), stage)
    write_version_1(folder, [path.name for path in folder.iterdir() if path.name != MANIFEST])
    return folder


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir() if p.name != MANIFEST}


def test_it_reads_as_version_1_before_and_as_version_2_after(old: Path) -> None:
    before, kept = Bundle.open(old), contents(old)
    assert (before.version, before.manifest) == (1, spec.manifest(TINY, plain=False))
    found = upgrade(old)
    after = Bundle.open(old)
    assert (after.version, after.manifest, after.files) == (VERSION, TABLES, before.files)
    assert contents(old) == kept
    assert (found.before, found.resealed, found.graphs) == (1, False, 6)
    assert [path.name for path in old.parent.iterdir() if path.name.startswith(".")] == []


def test_each_graphs_own_inputs_are_recorded(old: Path) -> None:
    upgrade(old)
    graphs = Bundle.open(old).graphs
    assert set(graphs) == {graph_file(stage.name) for stage in OLD}
    for stage in OLD:
        rows = [(row.name, row.dtype, row.shape) for row in graphs[graph_file(stage.name)]]
        fixed = TABLES.fixed
        assert rows == [
            (t.name, t.dtype, tuple(fixed.get(n, n) for n in t.shape))  # type: ignore[arg-type]
            for t in version_1_inputs(stage)
        ]
    step = {row.name: (row.dtype, row.shape) for row in graphs["temporal_unet.onnx"]}
    assert (step["t"], step["guidance"]) == (("int64", ("B",)), ("float32", ("B",)))


def test_it_says_what_to_export_and_how(old: Path) -> None:
    found = upgrade(old)
    stale = [(e.stage, e.precision) for e in found.exports if e.stale]
    missing = [(e.stage, e.precision) for e in found.exports if not e.stale]
    assert stale == [("spatial_unet", "fp32"), ("temporal_unet", "fp32")]
    assert missing == [("spatial_unet_plain", "fp32"), ("temporal_unet_plain", "fp32")]
    stages = "--stage spatial_unet --stage spatial_unet_plain --stage temporal_unet --stage temporal_unet_plain"
    assert found.commands == (f"higen-export onnx '{old}' {stages}",)
    first, *rest = found.as_lines()
    assert first.startswith(f"{old}: manifest rewritten as version 2; 6 graphs and the weights are as they were")
    assert "spatial_unet (fp32), temporal_unet (fp32)" in rest[0]
    assert "spatial_unet_plain (fp32), temporal_unet_plain (fp32)" in rest[1]
    assert rest[2:] == [f"  {found.commands[0]}"]
    assert json.loads(json.dumps(found.as_json()))["commands"] == list(found.commands)
    again = upgrade(old)
    assert (again.before, again.exports) == (2, found.exports)


def test_precisions_and_fixed_sizes_have_commands_of_their_own(old: Path) -> None:
    stage, sizes = TABLES.stage("temporal_unet"), {"B": 2, "F": 4, "H": 8, "W": 12}
    for precision in ("fp16", "int8"):
        write_graph(old / graph_file(stage.name, precision), stage, sizes if precision == "fp16" else None)
    write_version_1(old, [path.name for path in old.iterdir() if path.name != MANIFEST])
    both = "--stage temporal_unet --stage temporal_unet_plain"
    assert upgrade(old).commands[1:] == (
        f"higen-export onnx '{old}' --precision fp16 --static 2x4x16x24 {both}",
        f"higen-export quantize '{old}' --precision int8 {both}",
    )
    assert Bundle.open(old).graphs["temporal_unet.fp16.onnx"][0].shape == (2, 4, 4, 8, 12)


def test_a_directory_without_graphs_has_nothing_to_export(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    write_version_1(folder, [path.name for path in folder.iterdir() if path.name != MANIFEST])
    found = upgrade(folder)
    assert (found.before, found.exports, found.commands) == (1, (), ())
    assert len(found.as_lines()) == 1


@pytest.mark.parametrize("missing", [(), ("onnx",), ("onnx", "onnxruntime")])
def test_graphs_are_read_with_what_is_installed(
    old: Path, missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows come from onnx, else ONNX Runtime, else version 1's known inputs. All three give the same rows."""
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    upgrade(old)
    rows = Bundle.open(old).graphs["spatial_unet.onnx"]
    assert [(row.name, row.dtype) for row in rows] == [
        (t.name, t.dtype) for t in version_1_inputs(TABLES.stage("spatial_unet"))
    ]
    wanted = ("B", 4, 1, "H", "W") if missing != ("onnx", "onnxruntime") else ("B", "C", 1, "H", "W")
    assert rows[0].shape == wanted


def test_a_graph_that_onnxruntime_cannot_load_is_taken_for_its_stages(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    path, stage = old / "spatial_unet.onnx", TABLES.stage("spatial_unet")
    path.write_bytes(b"a kernel that is not here")
    assert [row.name for row in graph_inputs(path, stage)] == [t.name for t in stage.inputs]
    with pytest.raises(IntegrityError, match=r"cannot be read here: pip install 'higen\[export\]'"):
        graph_inputs(path, None)


def test_a_file_that_is_not_a_graph(old: Path) -> None:
    (old / "spatial_unet.onnx").write_bytes(b"not a graph")
    write_version_1(old, [path.name for path in old.iterdir() if path.name != MANIFEST])
    before = (old / MANIFEST).read_bytes()
    with pytest.raises(IntegrityError, match=r"spatial_unet\.onnx: not an ONNX graph"):
        upgrade(old)
    assert (old / MANIFEST).read_bytes() == before


def test_an_input_of_another_type_is_refused(old: Path) -> None:
    model = onnx.load(old / "vae_decoder.onnx")
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    onnx.save(model, old / "vae_decoder.onnx")
    write_version_1(old, [path.name for path in old.iterdir() if path.name != MANIFEST])
    with pytest.raises(ModelError, match=r"vae_decoder\.onnx: its input latents is of DOUBLE; float32 and int64"):
        upgrade(old)


@pytest.mark.parametrize("broken", ["missing", "cut", "altered"])
def test_a_broken_directory_is_left_as_it_is(old: Path, broken: str) -> None:
    path = old / "temporal_unet.onnx"
    content = path.read_bytes()
    if broken == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if broken == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    before = (old / MANIFEST).read_bytes()
    with pytest.raises(IntegrityError, match=r"temporal_unet\.onnx"):
        upgrade(old)
    assert (old / MANIFEST).read_bytes() == before


def test_many_at_once(old: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(upgrade, [old] * 8))
    assert {len(one.exports) for one in found} == {4}
    assert {one.before for one in found} <= {1, 2}
    assert Bundle.open(old).manifest == TABLES


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(old: Path) -> None:
    old.chmod(0o555)
    try:
        with pytest.raises(ModelError, match="cannot be written"):
            upgrade(old)
    finally:
        old.chmod(0o755)


# Version 2


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edit(model: Path, old: str, new: str) -> None:
    text = (model / MANIFEST).read_text(encoding="utf-8")
    assert text.count(old) >= 1, old
    (model / MANIFEST).write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize("reseal", [False, True])
def test_version_2_stays_as_it_is(model: Path, reseal: bool) -> None:
    before = (model / MANIFEST).read_bytes()
    found = upgrade(model, reseal)
    assert (model / MANIFEST).read_bytes() == before
    assert (found.before, found.resealed, found.exports) == (2, reseal, ())


def test_an_edit_needs_a_new_seal(model: Path) -> None:
    edit(model, '"steps": 4', '"steps": 5')
    with pytest.raises(IntegrityError, match=r"was edited .*higen upgrade --reseal"):
        upgrade(model)
    found = upgrade(model, reseal=True)
    assert found.as_lines()[0].startswith(f"{model}: manifest of version 2, edit accepted and sealed")
    assert [loop.steps for loop in Bundle.open(model).manifest.loops] == [5, 5]
    assert upgrade(model).resealed is False


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('"text_encoder.hidden"', '"text_decoder.hidden"', "text_decoder"),
        ('"temporal"', '"spatial"', "appears twice"),
        ('"steps": 4', '"steps": 0', "steps=0"),
        ('"version": 2', '"version": 3', "pip install --upgrade higen"),
        ('"kind": "scaled_linear"', '"kind": "square"', "kind='square'"),
    ],
)
def test_an_edit_is_checked_all_the_same(model: Path, old: str, new: str, match: str) -> None:
    edit(model, old, new)
    before = (model / MANIFEST).read_bytes()
    with pytest.raises(ManifestError, match=match):
        upgrade(model, reseal=True)
    assert (model / MANIFEST).read_bytes() == before


def test_an_edited_file_is_not_an_edit_of_the_tables(model: Path) -> None:
    """The seal covers only the manifest. A file that does not match the manifest stays broken."""
    (model / spec.TOKENIZER).write_text("{}", encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        upgrade(model, reseal=True)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="not a model directory"):
        upgrade(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_manifest_of_version_1_has_no_seal_to_break(old: Path) -> None:
    assert read_manifest(old).version == 1
    found = upgrade(old, reseal=True)
    assert (found.before, found.resealed) == (1, False)
