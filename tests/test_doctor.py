"""What `higen doctor` prints about a model's stages and its loops' graphs; tests/test_cli.py tests the command."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from higen import cpu
from higen.api import default_model
from higen.bundle import Bundle, drop_file, graph_file
from higen.doctor import LoopGraphs, report


@pytest.fixture
def model(tmp_path: Path) -> Bundle:
    """The built-in model without the graph of the clip's plain step (one branch of guidance)."""
    copy = Bundle.open(shutil.copytree(default_model(), tmp_path / "model"))
    return drop_file(copy, graph_file("temporal_unet_plain"))


def test_graphs_of_both_kinds_of_step_are_listed() -> None:
    found = report(default_model())
    assert found.loops == [LoopGraphs(name, ("fp32",), ("fp32",)) for name in ("spatial", "temporal")]
    assert [choice.stage for choice in found.stages] == list(Bundle.open(default_model()).manifest.stage_names)
    assert found.notes == []
    assert "  temporal            guided: fp32; plain: fp32" in found.as_text().splitlines()


def test_a_backend_that_does_not_work_is_explained_once() -> None:
    found = report(default_model())
    lines = found.as_text().splitlines()
    for name in (backend.backend for backend in found.backends if not backend.works):
        assert sum(line.startswith(f"  {name} ") and " no: " in line for line in lines) == 1
        assert not [line for line in lines if line.lstrip().startswith(f"not {name}")]
        assert name in found.stages[0].passed_over, "the JSON report gives the reason for every stage"
    columns = {line.index(" onnx (") for line in lines if " onnx (" in line}
    assert len(columns) == 1, "the stages' backends are in one column"


def test_a_missing_plain_graph_is_a_note_with_its_command_and_no_fault(model: Bundle) -> None:
    found = report(model.path)
    assert found.healthy
    assert found.loops[1] == LoopGraphs("temporal", ("fp32",), ())
    (note,) = found.notes
    assert note.startswith("no graph of temporal_unet_plain, so a step costs as much at guidance 1 as at any other: ")
    assert note.endswith(f"higen-export onnx {model.path} --stage temporal_unet_plain")
    text = found.as_text()
    assert "  temporal            guided: fp32; plain: no graph" in text.splitlines()
    assert f"note: {note}" in text.splitlines()
    assert "temporal_unet_plain" not in [choice.stage for choice in found.stages]
    assert found.as_json()["loops"][1] == {"loop": "temporal", "guided": ("fp32",), "plain": ()}


def test_the_fast_number_formats_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    slow = "bfloat16 is computed in float32, many times slower"
    for flags, int8, has_bf16 in (
        ({"avx2"}, "unsigned by unsigned (same results, but slower without VNNI)", False),
        ({"avx512_vnni", "avx512_bf16"}, "unsigned by signed (with VNNI)", True),
    ):
        monkeypatch.setattr(cpu, "flags", lambda flags=flags: frozenset(flags))
        found = report(default_model())
        assert (found.as_json()["int8"], found.as_json()["bf16"]) == (int8, has_bf16)
        lines = found.as_text().splitlines()
        assert lines[1] == f"8-bit integers: {int8} products"
        assert (slow in lines) == (not has_bf16)
